"""Match the classes of data with those of a model, by name or by number."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from dynadapter.data.dataset import Sample
from dynadapter.data.lists import LABEL
from dynadapter.files import listed
from dynadapter.training.matching import unnamed


def match_classes(own: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the model's index of each class of the data.

    Names match equal names in either encoding of accents, and numbers match equal numbers ("02" is 2), in any order:
    folders are sorted as text, but the labels of a list are sorted as numbers. A model without names matches the same
    number of classes in their order.
    Data without names (only the numbers from 0) are the model's indices if the numbers of classes are equal.

    Args:
        own: The class names of the data, in the order of their labels.
        names: The model's class names, in the order of their indices; the data need not have all of them.

    Raises:
        ValueError: The data have a class that the model does not know.

    >>> match_classes(["0", "1", "10", "2"], [str(k) for k in range(11)])
    [0, 1, 10, 2]
    >>> match_classes(["dog"], ["cat", "dog"])
    [1]
    """
    found = positions(own, names)
    if None not in found:
        return [label for label in found if label is not None]
    theirs, ours = _numbers(names), _numbers(own)
    if theirs and ours:
        place = {number: label for label, number in enumerate(theirs)}
        if all(number in place for number in ours):
            return [place[number] for number in ours]
    elif unnamed(names) and len(own) == len(names):
        return list(range(len(own)))
    elif ours and sorted(ours) == list(range(len(names))):
        return ours
    if unnamed(names) and not ours:
        raise ValueError(
            f"the model has {len(names)} classes without names, and the data have {len(own)}: {listed(own)}; give the "
            "model class_names, or data with all of its classes"
        )
    if unnamed(own) and not theirs:
        raise ValueError(
            f"the data have {len(own)} classes without names, and the model has {len(names)}: {listed(names)}; name "
            "the classes of the data, for lists in classes.txt"
        )
    unknown = [name for name, label in zip(own, found, strict=True) if label is None]
    raise ValueError(
        f"the data have classes that the model does not know: {listed(unknown)}; the model has {listed(names)}; the "
        f"data have {listed(own)}"
    )


def positions(own: Iterable[str], names: Sequence[str]) -> list[int | None]:
    """Return the index of each name among others, None for an unknown one; macOS and Linux encode accents differently.

    >>> positions(["e\u0301", "b"], ["a", "\u00e9"])
    [1, None]
    """
    composed = {unicodedata.normalize("NFC", name): label for label, name in enumerate(names)}
    exact = {name: label for label, name in enumerate(names)}
    return [exact.get(name, composed.get(unicodedata.normalize("NFC", name))) for name in own]


def sorted_names(names: Iterable[str]) -> list[str]:
    """Return class names sorted by value if all are whole numbers, else alphabetically."""
    found = sorted(names)
    return sorted(found, key=lambda name: (int(name), name)) if all(map(LABEL.fullmatch, found)) else found


def renumbered(samples: Sequence[Sample], index: Sequence[int] | Mapping[int, int]) -> list[Sample]:
    """Return samples with label k replaced by ``index[k]``."""
    return [(source, index[label]) for source, label in samples]


def _numbers(names: Sequence[str]) -> list[int]:
    """Return class names as distinct whole numbers; empty if they are not."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return []
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else []
