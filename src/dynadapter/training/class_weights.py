"""Weights of the classes in the loss, for classes with different numbers of images."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dynadapter.files import listed

ClassWeights = Literal["auto"] | Mapping[str, float]
READ_AS = ("True", "False", "None")
"""What YAML makes of class names such as yes, off and null."""


def check_class_weights(given: Any) -> None:
    """Raise a ValueError unless class weights are ``auto``, null, or a mapping of names to numbers of at least 0."""
    if given is None or given == "auto":
        return
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"class_weights={given!r} must be auto, or a number for each class name, as in {{cat: 2.0}}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"class_weights: {name}: {value!r} must be a finite number of at least 0")


def class_weights(given: ClassWeights, names: Sequence[str], counts: Sequence[int] | None) -> Tensor:
    """Return the weight of each class in the loss.

    ``auto`` weighs class c by ``N / (K n_c)``, with N training images, n_c of them of class c, and K classes that have
    images (scikit-learn's ``balanced``). A mapping has weights by name; classes without an entry have weight 1. Both
    are scaled so that the mean over the drawn images is 1, which leaves the effective learning rate unchanged.

    Args:
        given: ``auto``, or weights by class name.
        names: Class names in the order of their indices.
        counts: Number of training images of each class, as :func:`count_classes` returns it; None if unknown.

    Returns:
        ``(classes,)`` float32.
    """
    images = None if counts is None else torch.tensor(counts, dtype=torch.float64)
    if given == "auto":
        if images is None:
            raise ValueError("class_weights=auto needs a data module that lists its images; give weights by class name")
        weights = images.sum() / ((images > 0).sum() * images.clamp(min=1))
    else:
        assert isinstance(given, Mapping)
        own = [_composed(name) for name in names]
        by_name = {_composed(name): float(value) for name, value in given.items()}
        if unknown := [name for name in by_name if name not in own]:
            hint = "; YAML reads yes, no, on, off and null as other values: quote them" if unknown[0] in READ_AS else ""
            raise ValueError(f"class_weights: {unknown[0]} is not a class; the classes are {listed(names)}{hint}")
        if len(by_name) < len(given):
            twice = next(name for name, count in Counter(map(_composed, given)).items() if count > 1)
            raise ValueError(f"class_weights: {twice} is given twice; give each class one weight")
        weights = torch.tensor([by_name.get(name, 1.0) for name in own], dtype=torch.float64)
    if images is not None:
        mean = (images * weights).sum() / images.sum()
        if not mean:
            raise ValueError("class_weights: all training images have the weight 0")
        weights = weights / mean
    return weights.float()


def _composed(name: Any) -> str:
    """Return a class name as text in one encoding of accents; YAML reads the name 0 as a number."""
    return unicodedata.normalize("NFC", str(name))


def lists_images(data: Any) -> bool:
    """Check whether a data module lists its images by ``dataset(split)``; an attribute of that name does not."""
    return callable(getattr(data, "dataset", None)) and hasattr(data, "class_names")


def count_classes(data: Any, classes: int) -> list[int] | None:
    """Return the number of training images of each class; None if the data do not provide it.

    Balanced data draw each class equally often: then 1 for a class with images, and 0 for the others.
    """
    if not lists_images(data):
        return None
    counts = [0] * classes
    for _, label in data.dataset("train").samples:
        counts[label] += 1
    return [min(count, 1) for count in counts] if getattr(data, "balanced", False) else counts


def require_one_correction(given: ClassWeights | None, data: Any) -> None:
    """Raise a ValueError if ``auto`` weights are combined with balanced drawing of training images."""
    if given == "auto" and getattr(data, "balanced", False):
        raise ValueError(
            "class_weights=auto and balanced=True correct twice for unbalanced classes; set data.balanced: false, or "
            "model.class_weights: null"
        )


def without_images(data: Any) -> list[str]:
    """Return messages that name classes without training or validation images, or with fewer images than ``shots``."""
    lines = []
    for split, word in (("train", "training"), ("val", "validation")) if lists_images(data) else ():
        count = Counter(label for _, label in data.dataset(split).samples)
        if count and (missing := [name for label, name in enumerate(data.class_names) if not count[label]]):
            lines.append(f"no {word} image of: {listed(missing)}")
        shots = getattr(data, "shots", None) or 0
        few = [f"{name} ({count[label]})" for label, name in enumerate(data.class_names) if 0 < count[label] < shots]
        if split == "train" and few:
            lines.append(f"fewer than {shots} training images, all of them used, of: {listed(few)}")
    return lines
