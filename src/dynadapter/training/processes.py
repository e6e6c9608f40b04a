"""Combine values of the processes of a distributed training; with one process they are returned unchanged."""

from typing import Any

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Check whether this process is one of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the elementwise mean of a tensor over all processes."""
    if not is_distributed():
        return values
    values = values / torch.distributed.get_world_size()
    torch.distributed.all_reduce(values)
    return values


def gather_from_processes(value: Any) -> list[Any]:
    """Return the values of all processes in the order of their ranks; every process must call this."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
