"""Exit tokens: learned tokens for the early heads that pass the frozen blocks and do not influence the other tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynadapter import backbones
from dynadapter.adapters import AdapterLayer, needs_grid
from dynadapter.adapters.base import MAX_COUNT, check_size, matrices, unwrapped
from dynadapter.exits.heads import Heads, linear


class Update(nn.Module):
    """A low-rank update, zero at the start: ``scale * up @ down @ x``.

    Args:
        inputs: Channels of a token.
        outputs: Channels of the result.
        rank: Rank of the update.
        scale: Factor of the update.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (..., inputs) to (..., outputs)."""
        hidden = nn.functional.linear(x, self.down.to(x.dtype))
        return self.scale * nn.functional.linear(hidden, self.up.to(x.dtype))


class Updates(nn.Module):
    """The updates of the exit tokens in one block: of their queries, and of the MLP's hidden channels.

    Args:
        block: The block.
        rank: Rank of each update.
        scale: Factor of each update.
    """

    def __init__(self, block: Any, rank: int, scale: float) -> None:
        super().__init__()
        block = unwrapped(block)
        attention, mlp = block.attn, unwrapped(block.mlp)
        hidden, width = matrices(mlp)[0].weight.shape
        self.query = Update(width, attention.num_heads * attention.head_dim, rank, scale)
        self.hidden = Update(width, hidden, rank, scale)


class ExitTokenUpdates(nn.Module):
    """The exit tokens of a network and their low-rank updates in each block that they pass.

    Args:
        backbone: A timm ViT with plain blocks.
        blocks: Number of blocks that they pass: all blocks before the last early exit.
        count: Number of exit tokens.
        rank: Rank of the updates.
        scale: Factor of the updates.

    Raises:
        ValueError: If a block cannot run with exit tokens.
    """

    def __init__(self, backbone: nn.Module, blocks: int, count: int, rank: int, scale: float) -> None:
        super().__init__()
        units: Any = backbones.blocks(backbone)[:blocks]
        other = next((unit[-1] for unit in units if not backbones.takes_exit_tokens(backbone, unit)), None)
        if other is not None:
            raise ValueError(
                f"ExitTokens needs timm's plain ViT blocks with plain MLPs, not {_unfit(backbone, other)}; use other "
                "heads, such as Attentive"
            )
        self.count = count
        self.first = nn.Parameter(torch.empty(count, backbones.widths(backbone)[0]))
        nn.init.trunc_normal_(self.first, std=0.02)
        self.updates = nn.ModuleList(Updates(unit[-1], rank, scale) for unit in units)

    def append(self, x: Tensor) -> Tensor:
        """Append the exit tokens to the first block's input (batch, tokens, width).

        Each starts as a copy of the first token (the class token if there is one) plus a learned vector.
        """
        return torch.cat([x, x[:, :1].detach() + self.first.to(x.dtype)], 1)

    def run(
        self, backbone: nn.Module, place: int, x: Tensor, exit_tokens: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the block after ``place`` blocks; see :func:`dynadapter.backbones.run_with_exit_tokens`.

        With gradient checkpointing the backward pass computes the block again, as in ``run_unit``.
        """
        (block,) = backbones.blocks(backbone)[place]
        updates: Any = self.updates[place]
        inputs = (block, x, exit_tokens, updates.query, updates.hidden, bias)
        return backbones.checkpointed(backbone, backbones.run_with_exit_tokens, *inputs)


def _unfit(backbone: nn.Module, block: Any) -> str:
    """Return what keeps exit tokens out of a block, as text."""
    around = isinstance(block, AdapterLayer) and not hasattr(block, "after")
    if around or needs_grid(block):
        return f"the adapter {needs_grid(block) or block.kind} on them"
    block = unwrapped(block)
    attention: Any = getattr(block, "attn", None)
    for name, layer in (("attention", attention), ("qkv", getattr(unwrapped(attention), "qkv", None))):
        if isinstance(layer, AdapterLayer) and not hasattr(layer, "some"):
            return f"the adapter {layer.kind} on their {name}"
    return f"{type(block).__name__} of {type(backbone).__name__}"


class ExitTokenHead(nn.Module):
    """LayerNorm, then a linear layer over the exit tokens.

    Args:
        width: Channels of a token.
        num_classes: Number of classes.
        count: Number of exit tokens.
    """

    def __init__(self, width: int, num_classes: int, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classify = linear(count * width, num_classes)

    def forward(self, tokens: Tensor, logs: Tensor | None, exit_tokens: Tensor) -> Tensor:
        """Map exit tokens to logits (batch, classes).

        Args:
            tokens: (batch, tokens, width), not read.
            logs: Not read.
            exit_tokens: Exit tokens (batch, count, width).
        """
        return self.classify(self.norm(exit_tokens).flatten(1))


@dataclass(frozen=True)
class ExitTokens(Heads):
    """Early heads with their own tokens, which pass the blocks together with the backbone's tokens (ours).

    Exit tokens attend to the backbone's tokens, and no token attends to them. They pass the frozen blocks with their
    own low-rank updates. The early losses train only exit tokens, updates and early heads: the adapters and the last
    exit train as in the static network. For ViTs with timm's plain blocks.

    Related: exit-specific adapters (MET, arXiv 2409.13999), latent tokens that classify early in a separate branch
        (Dyn-Perceiver, arXiv 2306.11248), and prompts (VPT, arXiv 2203.12119).

    Args:
        count: Number of exit tokens, from 1 to 64; each costs as much as one more token.
        rank: Rank of the updates of their queries and of the MLPs' hidden channels.
        scale: Factor of the updates, above 0.
    """

    count: int = 4
    rank: int = 8
    scale: float = 4.0

    def __post_init__(self) -> None:
        check_size("rank", self.rank)
        check_size("count", self.count, MAX_COUNT)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be a finite number above 0")

    def build_exit_tokens(self, backbone: nn.Module, blocks: int) -> ExitTokenUpdates:
        return ExitTokenUpdates(backbone, blocks, self.count, self.rank, self.scale)

    def build(
        self, exit: int, exits: int, width: int, num_classes: int, prefix_tokens: int, class_token: bool
    ) -> ExitTokenHead:
        return ExitTokenHead(width, num_classes, self.count)
