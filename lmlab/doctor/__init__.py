"""Checks of a machine: its software, its devices, what it reaches, and what its runs do."""
