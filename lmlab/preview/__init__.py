"""The preview of a training command: what it would do, and what it would take."""
