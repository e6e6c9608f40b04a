"""Matrix products of the adapter kinds, for tokens and for maps with channels first."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def by_channel(values: Tensor, x: Tensor, channels_first: bool) -> Tensor:
    """Return values (channels,) in the type of ``x`` and in a shape that broadcasts over it."""
    values = values.to(x.dtype)
    return values[(..., *[None] * (x.ndim - 2))] if channels_first else values


def project(x: Tensor, weight: Tensor, bias: Tensor | None, channels_first: bool) -> Tensor:
    """Multiply each token by a matrix, in the type of the activations.

    Args:
        x: (..., width), or (batch, width, rows, columns) with channels first.
        weight: (out, width).
        bias: (out,) or None.
        channels_first: Whether ``x`` has its channels in the second dimension.

    Returns:
        ``weight @ token + bias`` for each token, in the layout of ``x``.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if channels_first:
        return F.conv2d(x, weight[:, :, None, None], bias)
    return F.linear(x, weight, bias)


def some_outputs(matrix: nn.Module, x: Tensor, outputs: slice) -> Tensor:
    """Compute only some outputs of a frozen linear layer, or 1x1 convolution, for tokens (..., width)."""
    weight, bias = matrix.weight, matrix.bias
    return project(x, weight.flatten(1)[outputs], None if bias is None else bias[outputs], False)  # type: ignore[operator, index]


def is_recorded(layer: nn.Module) -> bool:
    """Check whether a forward hook may keep the output of a layer, which then may not be overwritten."""
    return bool(layer._forward_hooks or nn.modules.module._global_forward_hooks)


def add_product(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    channels_first: bool,
    own: bool = False,
) -> Tensor:
    """Add ``scale * (weight @ hidden + bias)`` to each token of ``x``.

    It uses ``addmm``, since a separate product and sum would read the wide activations twice more, which takes longer
    than the product itself. It uses ``out=`` and not ``addmm_`` because fvcore's and torch's counters know only the
    former.

    Args:
        x: (..., out), or (batch, out, rows, columns) with channels first.
        hidden: (..., rank), or (batch, rank, rows, columns).
        weight: (out, rank).
        bias: (out,) or None.
        scale: Factor of the update.
        channels_first: Whether the channels are in the second dimension.
        own: Whether ``x`` may be overwritten when no gradient is recorded.

    Returns:
        The sum in the layout of ``x``.
    """
    if channels_first:
        return torch.add(x, project(hidden, weight, bias, True).to(x.dtype), alpha=scale)
    rows = x.reshape(-1, x.shape[-1])  # (tokens, out)
    if bias is not None:
        rows, own = torch.add(rows, bias.to(x.dtype), alpha=scale), True
    hidden = hidden.reshape(-1, hidden.shape[-1]).to(x.dtype)  # (tokens, rank)
    out = rows if own and not torch.is_grad_enabled() else None  # autograd does not support `out=`
    if out is None and _is_wider_than_autocast(x):  # addmm would round x too, which may be the residual stream
        return torch.add(rows, F.linear(hidden, weight.to(x.dtype)), alpha=scale).view(x.shape)
    return torch.addmm(rows, hidden, weight.t().to(x.dtype), alpha=scale, out=out).view(x.shape)


def _is_wider_than_autocast(x: Tensor) -> bool:
    """Check whether autocast is on, with another type than that of ``x``."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return enabled and x.dtype != torch.get_autocast_dtype(kind)
