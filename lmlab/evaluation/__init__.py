"""Evaluation: windows over held-out documents, their nll, the metrics made of it, records, and comparisons."""
