"""RegNet X, Y, Z and V."""

from typing import Any

from timm.models import regnet
from timm.models.regnet import RegNet
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _map_to_tokens,
    _same_forward,
    blocks,
    checkpointing,
    convert,
    embed,
    finish,
    tokens,
    widths,
)
from dynadapter.backbones.depth import remove_last_blocks


@embed.register
def _(model: RegNet, images: Tensor) -> Tensor:
    _same_forward(model, RegNet)
    return model.stem(images)


@blocks.register
def _(model: RegNet) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, RegNet)
    return [(block,) for stage in _stages(model) for block in stage.children()]


@finish.register
def _(model: RegNet, x: Tensor) -> Tensor:
    return model.final_conv(x)


@tokens.register
def _(model: RegNet, x: Tensor) -> Tensor:
    return _map_to_tokens(x)


@widths.register
def _(model: RegNet) -> list[int]:
    infos: Any = model.feature_info[1:]  # the first is the stem's
    return [info["num_chs"] for info, stage in zip(infos, _stages(model), strict=True) for _ in stage.children()]


@checkpointing.register
def _(model: RegNet) -> bool:
    return any(stage.grad_checkpointing for stage in _stages(model))


@remove_last_blocks.register
def _(model: RegNet, count: int) -> None:
    last: Any = model.s4
    for name in list(last._modules)[-count:] if count else ():
        delattr(last, name)


@convert.register
def _(model: RegNet, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return regnet._filter_fn(state)


def _stages(model: Any) -> list[Any]:
    return [model.s1, model.s2, model.s3, model.s4]
