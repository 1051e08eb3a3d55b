"""The training loop's parts: takes objects, never a config."""
