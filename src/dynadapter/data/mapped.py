"""The base of data modules for data sets of other libraries, whose items are pairs of an image and a label."""

from abc import abstractmethod
from typing import Any

from dynadapter.data.base import Split
from dynadapter.data.dataset import Sample
from dynadapter.data.held_out import HeldOutData
from dynadapter.data.library_images import LibraryImages
from dynadapter.data.splits import MissingSplit


class MappedData(HeldOutData):
    """Base of data modules whose images are inside data sets of other libraries.

    A subclass sets `class_names` in its ``__init__`` and defines `open_part`. Without a validation split, a fraction of
    each class of ``train`` is held out, each image by a hash of its index. Appended images therefore do not change the
    split of the others.

    Args:
        kwargs: As for :class:`~dynadapter.data.held_out.HeldOutData`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._parts: dict[str, LibraryImages | None] = {}

    @abstractmethod
    def open_part(self, split: Split) -> LibraryImages | None:
        """Return the images of a split of the data set; None if it has no such split."""

    def part(self, split: Split) -> LibraryImages | None:
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
        return self.half(split, found, names)
