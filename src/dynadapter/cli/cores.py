"""The processor cores that this process may use."""

import os


def usable_cores() -> int:
    """Return the number of cores: those of the process's CPU affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
