"""The sweepers of lmlab. Hydra accepts sweepers from the package `hydra_plugins` only."""

from lmlab.sweeps import grid, search


class Grid(grid.GridSweeper):
    """Runs every combination of the swept values; see lmlab/sweeps/grid.py."""


class Search(search.SearchSweeper):
    """Runs the points that Optuna chooses; see lmlab/sweeps/search.py."""
