"""Seed random numbers from a number alone, so that a training can be resumed exactly."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def step_seed(seed: int, draw: int) -> int:
    """Return the seed of one step in one process.

    Args:
        seed: Global seed of the training.
        draw: Index of the batch, counted over the whole training and all processes.
    """
    return (seed + 1_000_003 * (draw + 1)) % 2**63


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch, numpy and Python inside the context; restore their random states afterwards.

    Args:
        seed: From 0 to 2**63 - 1.
        device: The device whose generator is seeded, in addition to the CPU's.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (timm draws from both)
    gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        # torch.manual_seed would seed every accelerator of the machine
        torch.default_generator.manual_seed(seed)
        if gpu:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
