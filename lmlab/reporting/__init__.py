"""A report of runs: a page with charts and tables, made from what their directories hold."""
