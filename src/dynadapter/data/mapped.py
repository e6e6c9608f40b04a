"""The base of data modules for data sets of other libraries, whose items are pairs of an image and a label."""

from abc import abstractmethod
from typing import Any

from dynadapter.data.base import ImageData, Split
from dynadapter.data.dataset import Sample
from dynadapter.data.held import HeldImages
from dynadapter.data.splits import MissingSplit, hold_out


class MappedData(ImageData):
    """Base of data modules whose images are inside data sets of other libraries.

    A subclass sets `class_names` in its ``__init__`` and defines `open_part`. Without a validation split, a fraction of
    each class of ``train`` is held out, each image by a hash of its index. Appended images therefore do not change the
    split of the others.

    Args:
        val_fraction: Probability that a training image is held out if there is no validation split, in [0, 1); 0 for no
            validation.
        split_seed: Seed of the held-out images.
    """

    validation_switch = "val_fraction above 0"

    def __init__(self, *, val_fraction: float = 0.2, split_seed: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), not {val_fraction}")
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self._parts: dict[str, HeldImages | None] = {}

    @abstractmethod
    def open_part(self, split: Split) -> HeldImages | None:
        """Return the images of a split of the data set; None if it has no such split."""

    def part(self, split: Split) -> HeldImages | None:
        """Return the images of a split; it is opened at the first call."""
        if split not in self._parts:
            self._parts[split] = self.open_part(split)
        return self._parts[split]

    def samples(self, split: Split) -> list[Sample]:
        whole = self.part(split)
        held_out = split != "test" and self.part("val") is None
        if held_out:
            whole = self.part("train")
        if whole is None:
            raise MissingSplit(f"{type(self).__name__} has no images for {'train' if held_out else split}")
        found: list[Sample] = list(zip(whole.images(), whole.labels, strict=True))
        if not held_out:
            return found
        names = [(str(label), str(index)) for index, label in enumerate(whole.labels)]
        kept, held = hold_out(names, self.val_fraction, self.split_seed)
        return [found[index] for index in (kept if split == "train" else held)]
