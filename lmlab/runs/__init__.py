"""Runs: their directory, manifest and status, their log, and how they begin, go on and end."""
