"""VPT: learned tokens (prompts) among the tokens of the image, in every block or from the first block on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter.adapters.base import AdapterLayer, check_choice, check_size, parameter
from dynadapter.adapters.blocks import BlockSpec
from dynadapter.backbones import add_prefix_tokens, prefix_tokens, takes_prefix_tokens, widths


class VPTLayer(AdapterLayer):
    """A layer that inserts prompts after the prefix tokens.

    Args:
        base_layer: A block, at whose end the prompts are removed, or the last layer before the first block.
        spec: The adapter's configuration.
        prompts: (prompts, width), the initial prompts.
        prefix: Tokens before the patches.

    Attributes:
        prompts: (prompts, width).
    """

    adds_tokens = True

    def __init__(self, base_layer: nn.Module, spec: "VPT", prompts: nn.Parameter, prefix: int) -> None:
        super().__init__(base_layer, spec)
        self.dropout.to(prompts.device)
        self.deep = spec.placement == "deep"
        self.prefix = prefix
        self.prompts = prompts

    def install(self, model: nn.Module, name: str) -> None:
        """Replace the layer with this wrapper, and let the model expect the prompts."""
        add_prefix_tokens(model, self.base_layer if self.deep else None, len(self.prompts))
        super().install(model, name)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **context: Tensor) -> Tensor:
        """Map tokens (batch, tokens, width) to the layer's output, with the prompts or without."""
        if not self.deep:
            return self._joined(self.base_layer(x))
        if attn_mask is not None:  # one row for all queries: what each key's score gets
            row = attn_mask[:, :, :1]
            row = torch.cat([row[..., : self.prefix], F.pad(row[..., self.prefix :], (len(self.prompts), 0))], -1)
            context["attn_mask"] = row.expand(-1, -1, row.shape[-1], -1)
        y = self.base_layer(self._joined(x), **context)
        return torch.cat([y[:, : self.prefix], y[:, self.prefix + len(self.prompts) :]], 1)

    def _joined(self, x: Tensor) -> Tensor:
        prompts = self.dropout(self.scale * self.prompts).to(x.dtype)
        prompts = prompts.expand(x.shape[0], -1, -1)  # len(x) would fix the batch in an exported graph
        return torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], 1)


@dataclass(frozen=True, kw_only=True)
class VPT(BlockSpec):
    """Prompts: learned tokens that the image's tokens attend to. They change the output from the start.

    Source: Jia et al. 2022, VPT (arXiv 2203.12119). With ``deep`` the prompts are removed at the end of each block, so
        heads and token merging do not see them. With ``shallow`` they stay and count as prefix tokens: heads that
        average the patches leave them out, and the heads of :class:`~dynadapter.exits.attentive.Attentive` read them.
        For ViTs whose blocks attend among all tokens. Exit tokens work only with ``shallow``. It cannot be merged.

    Args:
        prompts: Number of prompts.
        placement: ``deep`` for new prompts in each block, ``shallow`` for prompts in front of the first block, which
            pass all blocks.
        targets: Patterns of blocks, for ``deep``; empty means all blocks.
    """

    prompts: int = 50
    placement: Literal["deep", "shallow"] = "deep"

    def __post_init__(self) -> None:
        check_size("prompts", self.prompts)
        check_choice("placement", self.placement, "deep", "shallow")
        if self.targets and self.placement == "shallow":
            raise ValueError(
                f"targets={self.targets} do not fit placement='shallow', which has one place; leave them out"
            )
        super().__post_init__()

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the layer can be a block, or for ``shallow`` the last layer before the first block."""
        return self.placement == "shallow" or super().fits(layer)

    def defaults(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
        """Return the names of all blocks, or of the layer before the first block; none if prompts do not fit."""
        if not takes_prefix_tokens(model):
            return []
        return super().defaults(model, layers) if self.placement == "deep" else [n for n in layers if n == "norm_pre"]

    def wrap(self, model: nn.Module, name: str) -> VPTLayer:
        """Build the wrapper of one layer.

        Raises:
            ValueError: If that layer is not a block, or the model cannot have prompts.
        """
        if not takes_prefix_tokens(model):
            raise ValueError(
                f"VPT cannot wrap {name}: {type(model).__name__} does not take more tokens than those of its patches; "
                "choose another kind"
            )
        width = self.width(model, name) if self.placement == "deep" else widths(model)[0]
        stem = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Conv3d))
        prompts = parameter(stem.weight, self.prompts, width)
        bound = math.sqrt(6 / (stem.weight[0].numel() + width))
        nn.init.uniform_(prompts, -bound, bound)
        return VPTLayer(model.get_submodule(name), self, prompts, prefix_tokens(model))
