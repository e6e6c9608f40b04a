"""BEiT, versions 1 and 2: Vision Transformers with a learned bias for each pair of relative positions."""

from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from dynadapter.backbones.cut import _same_forward, arguments, embed


@embed.register
def _(model: Beit, images: Tensor) -> Tensor:
    _same_forward(model, Beit)
    x = model.patch_embed(images)
    x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
    return model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)


@arguments.register
def _(model: Beit, unit: tuple[nn.Module, ...], x: Tensor) -> dict[str, Any]:
    """Return the bias that all blocks share, if there is one."""
    return {} if model.rel_pos_bias is None else {"shared_rel_pos_bias": model.rel_pos_bias()}
