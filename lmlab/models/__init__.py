"""Models: loading them, scoring with them, letting them speak."""
