"""Sweeps: the plan of the runs, the results of each run, and the final table. Training is not in this package."""
