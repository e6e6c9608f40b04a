"""Hold images out for validation: the same on every machine, whatever other images there are."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path


class MissingSplit(ValueError):
    """A data set has no list or folder for a split."""


def hold_out(images: Sequence[tuple[str, str]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out about a fraction of each class, each image by a hash of its name only.

    Adding or removing an image does not change the split of the others, so no training image becomes a validation
    image. There are two exceptions for classes of several images: if no image would be held out, the one with the
    lowest hash is, and if none would be kept, the one with the highest hash is. A single image is kept. An image that
    occurs twice is on one side.

    Args:
        images: The class of each image, and the path of its file in the folder of the class.
        fraction: Probability that an image is held out, in [0, 1).
        seed: Part of every hash.

    Returns:
        The indices kept and the indices held out, both ascending.

    >>> hold_out([("cat", f"{k}.png") for k in range(10)], fraction=0.2, seed=0)
    ([0, 1, 3, 4, 5, 6, 7, 8, 9], [2])
    """
    numbers = [draw(name, path, seed) for name, path in images]
    by_class: dict[str, set[float]] = {}
    for (name, _), number in zip(images, numbers, strict=True):
        by_class.setdefault(name, set()).add(number)
    held: set[tuple[str, float]] = set()
    for name, drawn in by_class.items():
        below = sum(number < fraction for number in drawn)
        if fraction > 0:
            below = min(max(below, 1), len(drawn) - 1)
        held.update((name, number) for number in sorted(drawn)[:below])
    is_held = [(name, number) in held for (name, _), number in zip(images, numbers, strict=True)]
    return [i for i, one in enumerate(is_held) if not one], [i for i, one in enumerate(is_held) if one]


def draw(name: str, path: str, seed: int) -> float:
    """Return a number in [0, 1] that depends only on the arguments; both encodings of accents give the same number."""
    text = unicodedata.normalize("NFC", f"{seed}\0{name}\0{path}")
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def path_in(source: os.PathLike[str], folder: Path | None) -> str:
    """Return the path of an image in the data's folder, for hashes that must not depend on where the folder is.

    >>> path_in(Path("/data/set/train/a.png"), Path("/data/set")), path_in(Path("train/a.png"), Path("."))
    ('/train/a.png', '/train/a.png')

    Args:
        source: The file.
        folder: The folder of all images; None returns the path as it is.
    """
    if folder is None:
        return Path(source).as_posix()
    name, start = os.fspath(source), os.path.join(folder, "")
    if isinstance(source, Path) and name.startswith(start) and ".." not in name:  # relpath is slow for a million images
        return "/" + name[len(start) :].replace(os.sep, "/")
    return f"/{Path(os.path.relpath(source, folder)).as_posix()}"
