"""Ranks: launching them, agreeing between them, and the signals that stop them."""
