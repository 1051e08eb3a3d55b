"""What a training command would do, and what it would take."""
