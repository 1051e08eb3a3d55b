"""The run directory: identity, manifest, where every file lies."""
