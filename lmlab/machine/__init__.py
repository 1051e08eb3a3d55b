"""What a machine has to be able to do, tried out: a check says what it found, and leaves nothing behind."""
