"""Default places in convolutional networks, whose blocks have neither attention nor an MLP."""

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from dynadapter.backbones import blocks

ASIDE = ("downsample", "shortcut")
"""Children of a block beside its main path."""


def convolutions(
    model: nn.Module, layers: Mapping[str, nn.Module], fits: Callable[[nn.Module], bool], last: bool
) -> list[str]:
    """Return the names of the convolutions that mix the channels of each block: its 1x1 convolutions, or all if it has
    none.

    Args:
        model: The backbone.
        layers: Its layers by name, without wrappers.
        fits: Function that returns whether a kind can wrap a layer.
        last: Whether to return only the last one of each block.

    Returns:
        Their names in the order of the blocks; none for a model of an unknown family.
    """
    try:
        parts = {id(getattr(part, "base_layer", part)) for unit in blocks(model) for part in unit}
    except TypeError:
        return []
    chosen: list[str] = []
    for name in [name for name, layer in layers.items() if id(layer) in parts]:
        found = [inner for inner in _main_path(name, layers) if fits(layers[inner])]
        found = [inner for inner in found if layers[inner].kernel_size == (1, 1)] or found
        chosen += found[-1:] if last else found
    return chosen


def _main_path(block: str, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of a block's convolutions, without those nested deeper, such as gates."""
    for name, layer in layers.items():
        key, _, rest = name.removeprefix(f"{block}.").partition(".")
        direct = rest.lstrip("0123456789.") in ("", "conv")  # the numbers are those of convolutions side by side
        if name.startswith(f"{block}.") and key not in ASIDE and direct and isinstance(layer, nn.Conv2d):
            yield name
