"""Merge adapters into the weights of the backbone, and compare the outputs."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import AdapterLayer, matrices
from dynadapter.adapters.injection import adapter_layers, set_called


def merge(model: nn.Module, tolerance: float = 1e-5) -> None:
    """Replace each wrapper with its base layer, with the update merged in; the state dict has timm's keys again.

    The merged layers are frozen. Each is compared with its wrapper on random tokens before any layer is replaced. A
    model without adapters stays unchanged.

    Args:
        model: The backbone; changed in place.
        tolerance: Largest relative error (Frobenius norm) of a merged layer's output.

    Raises:
        ValueError: If a kind cannot be merged or an error exceeds the tolerance. The model is then unchanged.
    """
    merged = {}
    for name, layer in adapter_layers(model).items():
        merged[name] = layer.merged()
        error = _error(layer, merged[name])
        if not error <= tolerance:  # NaN is above any tolerance
            raise ValueError(
                f"merging {name} changes its output by {error:.1e} (relative), more than tolerance={tolerance:.0e}; "
                "nothing was merged: keep the adapters, merge in float32, or allow more"
            )
    for name, plain in merged.items():
        model.set_submodule(name, plain)
        set_called(model, name, False)


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU; some accelerators have no float64."""
    return tensor.detach().to("cpu", torch.float64)


def rebuilt(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Return a frozen copy of a linear layer, convolution or norm with other values.

    Args:
        layer: The layer to copy.
        weight: The values of its weight, in any shape.
        bias: (out,), or None to keep the layer's own.
    """
    layer = copy.deepcopy(layer).requires_grad_(False)
    matrix: Any = next(iter(matrices(layer)), layer)
    matrix.weight.copy_(weight.view(matrix.weight.shape))
    if bias is not None and matrix.bias is not None:
        matrix.bias.copy_(bias)
    return layer


@torch.no_grad()
def _error(layer: AdapterLayer, merged: nn.Module) -> float:
    """Return the relative difference between the outputs of a wrapper and its merged layer on random tokens."""
    first: Any = next(iter(matrices(merged)), merged)
    weight = next(first.parameters())
    width = getattr(first, "in_channels", weight.shape[-1])  # the latter of a norm too, (width,)
    sides = [8 * step for step in getattr(first, "stride", (1, 1))]
    shape = (4, width, *sides) if layer.channels_first else (256, width)
    generator = torch.Generator().manual_seed(0)  # leaves the global random state unchanged
    tokens = torch.randn(shape, generator=generator).to(weight)
    training = layer.dropout.training
    layer.dropout.eval()
    expected = exact(layer(tokens))
    layer.dropout.train(training)
    difference = torch.linalg.vector_norm(exact(merged(tokens)) - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp_min(torch.finfo(torch.float64).tiny))
