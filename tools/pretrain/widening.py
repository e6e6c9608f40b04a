"""Widen a Vision Transformer into one that computes the same (Net2Net, Chen et al. 2016).

Every channel becomes several with the same value. A layer that reads them divides its old weight among them at random,
so that the copies get different gradients from the first step on.
"""

import math

import torch
from torch import Tensor

UNEVEN = 0.3
"""How much a share of a weight differs from an equal share, at most, relative to it."""
NOISE = 0.02
"""Noise on the rows of queries and keys, in their standard deviations: without it equal rows would stay equal."""
PER_CHANNEL = {"cls_token", "pos_embed", "patch_embed.proj.bias", "attn.proj.bias", "mlp.fc2.bias"} | {
    f"{norm}.{part}" for norm in ("norm", "norm1", "norm2") for part in ("weight", "bias")
}
"""Tensors whose last dimension is the channels of a token; names of blocks without their prefix."""


def widened(state: dict[str, Tensor], heads: int, width: int, wide_heads: int, seed: int = 0) -> dict[str, Tensor]:
    """Widen the tensors of timm's Vision Transformer: a class token, a fused qkv, LayerNorm, no layer scale.

    Args:
        state: The tensors under timm's names, float32.
        heads: Attention heads of the narrow model.
        width: Width of the wide model's tokens, a multiple of the narrow one's; hidden layers grow alike.
        wide_heads: Attention heads of the wide model, a multiple of ``heads``; the rest of the factor widens each head.
        seed: Random seed of how weights are divided.

    Returns:
        Tensors of the wide model, which gives the same logits except for the noise on queries and keys.

    Raises:
        ValueError: If a number is not such a multiple, or a tensor is not one of such a model.
    """
    narrow = state["cls_token"].shape[-1]
    times, more = width // narrow, wide_heads // heads
    if width % narrow or wide_heads % heads or times % more:
        raise ValueError(
            f"width {narrow} with {heads} heads cannot become {width} with {wide_heads}; give multiples, and no "
            "larger factor for the heads than for the width"
        )
    draw = torch.Generator().manual_seed(seed)
    size = narrow // heads
    wide = torch.arange(width)
    channels = wide % narrow
    inner = (wide // (size * times // more)) % heads * size + wide % size  # the old row of q, k or v of each new one
    found = {}
    for name, tensor in state.items():
        kind = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        if kind in PER_CHANNEL:
            found[name] = tensor[..., channels]
        elif kind == "patch_embed.proj.weight":
            found[name] = tensor[channels]
        elif kind in ("attn.qkv.weight", "attn.qkv.bias"):
            parts = [part[inner] for part in tensor.chunk(3)]
            parts[0] = parts[0] / math.sqrt(times / more)  # a score sums over more rows and is scaled by less
            wider = torch.cat(parts)
            wider = _shared(wider, channels, draw) if wider.ndim == 2 else wider
            if more < times:
                rows = slice(2 * width)
                wider[rows] += NOISE * wider[rows].std() * torch.randn(wider[rows].shape, generator=draw)
            found[name] = wider
        elif kind == "attn.proj.weight":
            found[name] = _shared(tensor[channels], inner, draw)
        elif kind in ("mlp.fc1.weight", "mlp.fc1.bias"):
            wider = tensor.repeat(times, *(1,) * (tensor.ndim - 1))
            found[name] = _shared(wider, channels, draw) if tensor.ndim == 2 else wider
        elif kind == "mlp.fc2.weight":
            found[name] = _shared(tensor[channels], torch.arange(times * tensor.shape[1]) % tensor.shape[1], draw)
        elif kind == "head.weight":
            found[name] = _shared(tensor, channels, draw)
        elif kind == "head.bias":
            found[name] = tensor.clone()
        else:
            raise ValueError(f"{name} is not a tensor of a plain Vision Transformer and cannot be widened")
    return found


def _shared(weight: Tensor, sources: Tensor, draw: torch.Generator) -> Tensor:
    """Divide the columns of a weight (rows, old columns) among copies: (rows, copies) with the same sums."""
    shares = 1 + UNEVEN * (2 * torch.rand(len(weight), len(sources), generator=draw) - 1)
    sums = torch.zeros(weight.shape).index_add_(1, sources, shares)
    return weight[:, sources] * shares / sums[:, sources]
