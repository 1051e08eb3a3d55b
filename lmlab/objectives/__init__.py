"""What a label is, and which positions are scored."""
