"""The base of data modules that hold out training images for validation where there are no others."""

from collections.abc import Sequence
from typing import Any, TypeVar

from dynadapter.data.base import ImageData, Split
from dynadapter.data.splits import hold_out

T = TypeVar("T")


class HeldOutData(ImageData):
    """Base of data modules without fixed validation images.

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
        self.val_fraction, self.split_seed = val_fraction, split_seed

    def half(self, split: Split, items: Sequence[T], names: Sequence[tuple[str, str]]) -> list[T]:
        """Return the training images that are kept, for ``train``, or those that are held out, for ``val``.

        Args:
            split: ``train`` or ``val``.
            items: All training images.
            names: Class and name of each, by which :func:`hold_out` decides.
        """
        kept, held = hold_out(names, self.val_fraction, self.split_seed)
        return [items[k] for k in (kept if split == "train" else held)]
