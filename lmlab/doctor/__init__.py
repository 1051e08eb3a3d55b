"""The self-check of a machine."""
