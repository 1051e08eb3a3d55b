"""A report of runs: what their directories say, as figures, tables and a page."""
