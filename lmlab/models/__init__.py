"""Models: loading and checking them, their loss, what makes their steps cheaper, and generation."""
