"""ResNet and all that timm builds of its class: wide ResNet, ResNeXt, SE-ResNet, Res2Net, ResNeSt, SKNet."""

from typing import Any

from timm.models.resnet import ResNet
from torch import Tensor, nn

from dynadapter.backbones.cut import _map_to_tokens, _same_forward, blocks, embed, finish, tokens, widths
from dynadapter.backbones.depth import remove_last_blocks


@embed.register
def _(model: ResNet, images: Tensor) -> Tensor:
    _same_forward(model, ResNet)
    return model.maxpool(model.act1(model.bn1(model.conv1(images))))


@blocks.register
def _(model: ResNet) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, ResNet)
    return [(block,) for stage in _stages(model) for block in stage]  # the first block of a stage downsamples


@finish.register
def _(model: ResNet, x: Tensor) -> Tensor:
    return x


@tokens.register
def _(model: ResNet, x: Tensor) -> Tensor:
    return _map_to_tokens(x)


@widths.register
def _(model: ResNet) -> list[int]:
    infos: Any = model.feature_info[1:]  # the first is the stem's
    return [info["num_chs"] for info, stage in zip(infos, _stages(model), strict=True) for _ in stage]


@remove_last_blocks.register
def _(model: ResNet, count: int) -> None:
    last: Any = model.layer4
    model.layer4 = last[: len(last) - count]


def _stages(model: Any) -> list[Any]:
    return [model.layer1, model.layer2, model.layer3, model.layer4]
