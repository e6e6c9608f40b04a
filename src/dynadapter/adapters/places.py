"""Default places by block: the convolutions that stand in for attention and MLP, and the blocks that have no place."""

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import nn

from dynadapter.backbones import blocks

ASIDE = ("downsample", "shortcut")
"""Children of a block beside its main path."""


def convolutions(
    layers: Mapping[str, nn.Module], parts: Collection[str], fits: Callable[[nn.Module], bool], last: bool
) -> list[str]:
    """Return the names of the convolutions that mix the channels of a block: the 1x1 ones, or all if it has none.

    Args:
        layers: The model's layers by name, without wrappers.
        parts: The names of the block's modules.
        fits: Function that returns whether a kind can wrap a layer.
        last: Whether to return only the last one.
    """
    found = [inner for part in parts for inner in _main_path(part, layers) if fits(layers[inner])]
    found = [inner for inner in found if layers[inner].kernel_size == (1, 1)] or found
    return found[-1:] if last else found


def blocks_without(model: nn.Module, layers: Mapping[str, nn.Module], chosen: Collection[str]) -> list[list[str]]:
    """Return the blocks that none of some layers lies in, each as the names of its modules.

    Args:
        model: The backbone.
        layers: Its layers by name, without wrappers; a block that is not among them is left out.
        chosen: Names of layers.

    Returns:
        In the order of the blocks; none for a model of an unknown family.
    """
    try:
        units = blocks(model)
    except TypeError:
        return []
    names = {id(layer): name for name, layer in layers.items()}
    found = [[names.get(id(getattr(part, "base_layer", part)), "") for part in unit] for unit in units]
    inside = {name[:end] for name in chosen for end in [*_ends(name), len(name)]}
    return [parts for parts in found if any(parts) and not inside & {*parts}]


def _ends(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _main_path(block: str, layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of a block's convolutions, without those nested deeper, such as gates."""
    for name, layer in layers.items():
        key, _, rest = name.removeprefix(f"{block}.").partition(".")
        direct = rest.lstrip("0123456789.") in ("", "conv")  # the numbers are those of convolutions side by side
        direct |= key == "attn" and rest.endswith(".proj")  # MobileNetV4
        if name.startswith(f"{block}.") and key not in ASIDE and direct and isinstance(layer, nn.Conv2d):
            yield name
