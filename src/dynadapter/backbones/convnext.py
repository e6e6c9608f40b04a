"""ConvNeXt, versions 1 and 2."""

from timm.models import convnext
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from dynadapter.backbones.cut import (
    _map_to_tokens,
    _same_forward,
    _staged_blocks,
    _staged_widths,
    blocks,
    checkpointing,
    convert,
    embed,
    finish,
    tokens,
    widths,
)


@embed.register
def _(model: ConvNeXt, images: Tensor) -> Tensor:
    _same_forward(model, ConvNeXt)
    return model.stem(images)


@blocks.register
def _(model: ConvNeXt) -> list[tuple[nn.Module, ...]]:
    _same_forward(model, ConvNeXt)
    return _staged_blocks(model.stages)


@finish.register
def _(model: ConvNeXt, x: Tensor) -> Tensor:
    return model.norm_pre(x)


@tokens.register
def _(model: ConvNeXt, x: Tensor) -> Tensor:
    return _map_to_tokens(x)


@widths.register
def _(model: ConvNeXt) -> list[int]:
    return _staged_widths(model, model.stages)


@checkpointing.register
def _(model: ConvNeXt) -> bool:
    return any(stage.grad_checkpointing for stage in model.stages)


@convert.register
def _(model: ConvNeXt, state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = convnext.checkpoint_filter_fn(state, model)
    if not any(name.startswith(("head.fc.", "head.norm.")) for name in state):
        # A file of masked pre-training ends before the head, whose norm then starts as the identity, as in timm.
        state |= {name: own for name, own in model.state_dict().items() if name.startswith("head.norm.")}
    return state
