"""Attention as separate products, for exporters."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def written_out_attention(model: nn.Module) -> Iterator[None]:
    """Make timm's attention compute its products one by one inside the context.

    The exporter replaces torch's fused attention by twice as many operators, each of which costs time in a small batch,
    and cannot replace it where it has five axes, as in Hiera.
    """
    fused = [part for part in model.modules() if getattr(part, "fused_attn", None) is True]
    try:
        for part in fused:
            part.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for part in fused:
            part.fused_attn = True  # type: ignore[assignment]
