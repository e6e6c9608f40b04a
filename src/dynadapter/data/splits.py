"""Hold images out for validation, the same ones on every machine."""

import random
from collections.abc import Hashable, Sequence


class MissingSplit(ValueError):
    """A data set has no list or folder for a split."""


def hold_out(labels: Sequence[Hashable], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a fraction of each class.

    A class of two or more images keeps at least one on either side; a single image is not held out.

    Args:
        labels: The class of each image.
        fraction: Fraction to hold out, in [0, 1).
        seed: Random seed. The result depends on `labels`, `fraction` and `seed` alone.

    Returns:
        The indices kept and the indices held out, both ascending.

    >>> [len(part) for part in hold_out(["cat"] * 10 + ["dog"] * 5, fraction=0.2, seed=0)]
    [12, 3]
    """
    by_class: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    generator = random.Random(seed)
    held: set[int] = set()
    for indices in by_class.values():
        generator.shuffle(indices)
        if fraction > 0:
            count = max(1, round(fraction * len(indices)))
            held.update(indices[: min(count, len(indices) - 1)])
    return [i for i in range(len(labels)) if i not in held], sorted(held)
