"""Figures: exact sums over every target token."""
