"""lmlab measured against its peers, side by side on one machine: see README.md."""
