"""Sweeps: their points, the grid and the search that choose them, and what became of each."""
