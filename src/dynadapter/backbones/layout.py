"""Weights laid out in memory as a CPU multiplies few rows by them fastest: another order, the same values."""

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def lay_out_for_cpu(module: M) -> M:
    """Lays the matrices of linear layers out so that small batches take less time on a CPU.

    ``nn.Linear`` keeps its weight (outputs, inputs) row by row, and a product with few rows then spends much of its
    time on bringing the matrix into another order. Here it is kept column by column. Shapes, names and state dicts stay
    the same, and so do files that are written of them; copies, other types and training keep the new order. Laying out
    twice changes nothing.

    On a CPU with MKL an image alone takes about a sixth less time, from eight on all is as before (ours, measured by
    ``benchmarks/latency.py``). Sums over few rows may come in another order, so that logits differ in their last bits:
    therefore nothing is laid out unasked, and networks that are compared are to be laid out alike.

    Weights elsewhere than on the CPU, and those in 16 bits, which other routines multiply, stay as they are.

    >>> layer = lay_out_for_cpu(nn.Linear(3, 2))
    >>> layer.weight.shape, layer.weight.stride()
    (torch.Size([2, 3]), (1, 2))

    Args:
        module: Any module, such as an :class:`~dynadapter.exits.net.ExitNet` or a backbone; it is changed in place.

    Returns:
        The module itself.

    Raises:
        TypeError: If it is no module; of a bundle give the ``net``.
    """
    if not isinstance(module, nn.Module):
        hint = "its net" if hasattr(module, "net") else "an nn.Module"
        raise TypeError(f"a {type(module).__name__} cannot be laid out; give {hint}")
    for layer in module.modules():
        weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
        if weight is not None and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
            weight.data = weight.data.t().contiguous().t()
    return module
