"""An adapter kind for each range of blocks of a backbone."""

import re
from dataclasses import dataclass

from torch import nn

from dynadapter.adapters.base import AdapterLayer, Adapters
from dynadapter.adapters.injection import Layers, build_wrappers
from dynadapter.backbones import blocks

RANGE = re.compile(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?")


@dataclass(frozen=True)
class ByBlocks(Adapters):
    """An adapter kind for each range of blocks, such as a larger rank in late blocks.

    >>> from dynadapter import LoRA, RepAdapter
    >>> ByBlocks({"1-3": None, "4-11": LoRA(rank=4), "12": RepAdapter()}).label
    'none in blocks 1-3, LoRA in blocks 4-11, RepAdapter in block 12'

    Args:
        ranges: Adapters by range of blocks, such as ``{"1-6": LoRA(rank=4), "7-12": LoRA(rank=8)}``; None means no
            adapter in these blocks. Blocks count from 1, as in ``exit_depths``: with ``every=3``, blocks 1-3 are before
            exit 1. Each block of the backbone must be in one range. Layers outside of all blocks are not wrapped.
    """

    ranges: dict[str, Adapters | None]

    def __post_init__(self) -> None:
        ranges = {str(blocks): part for blocks, part in self.ranges.items()}  # YAML reads one block as a number
        object.__setattr__(self, "ranges", ranges)
        for text, part in ranges.items():
            if isinstance(part, ByBlocks) or not isinstance(part, Adapters | None):
                raise ValueError(f"ranges: {text} has {part!r:.100}; give an adapter kind, such as LoRA, or None")
        end, last = 0, ""
        for start, stop, text, _ in self.in_order():
            if start <= end:
                raise ValueError(f"ranges: blocks {last} and {text} overlap; give each block once")
            end, last = stop, text

    @property
    def label(self) -> str:
        """Each kind with its range."""
        parts = [
            f"{'none' if part is None else part.label} in block{'s' * (stop > start)} {text}"
            for start, stop, text, part in self.in_order()
        ]
        return ", ".join(parts)

    def check(self, depth: int) -> None:
        """Check that each block of a backbone is in a range."""
        end = 0
        for start, stop, text, _ in [*self.in_order(), (depth + 1, depth, "", None)]:
            if stop > depth:
                raise ValueError(f"ranges: blocks {text} do not fit a backbone of {depth} blocks; end at {depth}")
            if start > end + 1:
                gap = f"{end + 1}-{start - 1}" if start > end + 2 else f"{end + 1}"
                raise ValueError(f"ranges: {gap} of {depth} blocks is missing; add it, with null for no adapter")
            end = stop

    def in_order(self) -> list[tuple[int, int, str, Adapters | None]]:
        """List the ranges in order, each as first block, last block, text of the key, and adapters."""
        found = []
        for text, part in self.ranges.items():
            match = RANGE.fullmatch(text)
            start, stop = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if stop < start:
                raise ValueError(
                    f"ranges: {text!r:.40} is not a range of blocks; give one such as 1-3, or 4 for one block"
                )
            found.append((start, stop, text, part))
        found.sort(key=lambda entry: entry[:2])
        return found


@build_wrappers.register
def _(spec: ByBlocks, model: nn.Module, layers: Layers) -> dict[str, AdapterLayer]:
    units = blocks(model)
    spec.check(len(units))
    wrappers: dict[str, AdapterLayer] = {}
    for start, stop, text, part in spec.in_order():
        if part is None:
            continue
        members = {id(one) for unit in units[start - 1 : stop] for piece in unit for one in piece.modules()}
        chosen = {name: place for name, place in layers.items() if id(place[1]) in members}
        try:
            wrappers |= build_wrappers(part, model, chosen)
        except ValueError as error:
            raise ValueError(f"blocks {text}: {error}") from error
    return wrappers
