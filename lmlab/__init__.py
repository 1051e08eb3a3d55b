"""lmlab trains, measures and compares language models."""

__version__ = "0.1.0"
