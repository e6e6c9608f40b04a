"""Sweeps: which runs there are, the results of each run, and the table at the end. Training is not in this package."""
