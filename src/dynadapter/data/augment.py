"""Augmentation of training images, by timm's and torchvision's transforms."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from dynadapter.data.normalize import normalize
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import Source
from dynadapter.spec import Spec
from dynadapter.training.random_state import seeded

Change = Callable[[Any], Any]
PART = re.compile(r"(mstd|mmax|inc|[mnwptdab])\d+(\.\d+)?")
"""A part of the name of timm's policies, such as ``m9``."""
TRIALS = 4
"""How often named transforms are tried before a training; some choose a size or another transform by chance."""


@dataclass(frozen=True)
class Augment(Spec):
    """Random augmentation of training images by timm's transforms.

    In order: crop and resize, mirror, `auto` or `color_jitter`, `transforms`, normalise, erase a rectangle. All random
    numbers of an image follow from seed, epoch and image.

    Args:
        scale: Least and greatest area of the crop, as fractions of the image; null for the whole image, resized as in
            evaluation.
        ratio: Least and greatest ratio of the crop's width to its height.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        auto: An augmentation policy of timm: RandAugment as in ``rand-m9-mstd0.5-inc1``, AutoAugment as in
            ``original``, 3-Augment (``3a``), or AugMix as in ``augmix-m5-w4-d2``.
        color_jitter: Strength of random changes of brightness, contrast and saturation. Not used with `auto`, except
            with ``3a``.
        erasing: Probability that a rectangle is filled with random pixels.
        repeats: How often each image occurs in an epoch (Hoffer et al. 2020). The length of an epoch does not change,
            so it has fewer different images.
        transforms: Transforms of torchvision.transforms.v2 in order, each a name with its arguments, as in
            ``[{RandomPerspective: {p: 0.3}}]``. They take and return Pillow images. `RandomApply` and the like have
            such a list as their argument ``transforms``.

    Raises:
        ValueError: A value is out of range, or a policy or transform is unknown.
    """

    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    auto: str | None = None
    color_jitter: float | None = None
    erasing: float = 0.0
    repeats: int = 1
    transforms: tuple[dict[str, dict[str, Any]], ...] = ()

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} must be two rising fractions in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={list(self.ratio)} must be two rising numbers above 0")
        for name in ("hflip", "vflip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        if self.color_jitter is not None and not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter={self.color_jitter} must be in [0, 1]")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be at least 1")
        _changes_of_timm(self, Preprocess(image_size=8))  # says at once what is wrong
        for given in self.transforms:
            _named(given)


class Augmentation:
    """The transforms of an :class:`Augment` for images of one preprocessing.

    Args:
        augment: The settings.
        preprocess: The preprocessing of evaluation, whose size, interpolation and normalization are also used here.

    Raises:
        ValueError: A policy or a transform is unknown, has wrong arguments, or cannot be applied to an image.
    """

    def __init__(self, augment: Augment, preprocess: Preprocess) -> None:
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms import RandomResizedCropAndInterpolation

        self.preprocess = preprocess
        size, interpolation = preprocess.image_size, preprocess.interpolation
        self.crop: Change | None = None
        if augment.scale is not None:
            self.crop = RandomResizedCropAndInterpolation(size, augment.scale, augment.ratio, interpolation)
        self.changes = [
            v2.RandomHorizontalFlip(augment.hflip),
            v2.RandomVerticalFlip(augment.vflip),
            *_changes_of_timm(augment, preprocess),
            *map(_named, augment.transforms),
        ]
        self.erase = RandomErasing(augment.erasing, mode="pixel", device="cpu")
        self._try(augment.transforms)

    def __call__(self, source: Source, number: int) -> Tensor:
        """Return an augmented and normalised image, ``(3, size, size)`` float32.

        Args:
            source: The image.
            number: Seed of all random numbers of the image.

        Raises:
            ValueError: The image has another size after the transforms.
        """
        with self.preprocess.opened(source) as image, seeded(number):
            if self.crop is not None:
                image = self.crop(image.convert("RGB"))
            else:
                image = Image.fromarray(self.preprocess.pixels(image).transpose(1, 2, 0))
            for change in self.changes:
                image = change(image)
            self._check(image)
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())
            return self.erase(normalize(pixels, self.preprocess))

    def _check(self, image: Any) -> None:
        """Raise a ValueError for the result of transforms that is no image of the network's size."""
        size = self.preprocess.image_size
        if not isinstance(image, Image.Image) or image.size != (size, size):
            found = image.size if isinstance(image, Image.Image) else type(image).__name__
            raise ValueError(f"augment.transforms must give images of {size} x {size} pixels, not {found}")

    def _try(self, transforms: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
        """Apply the named transforms to an image, so that those that cannot work fail before a training."""
        changes = [(next(iter(given)), _named(given, always=True)) for given in transforms]
        for number in range(TRIALS if changes else 0):
            image: Any = Image.new("RGB", (self.preprocess.image_size,) * 2)
            with seeded(number):
                for name, change in changes:
                    try:
                        image = change(image)
                    except Exception as error:  # of any transform
                        raise ValueError(f"transforms: {name}: {str(error).partition(chr(10))[0]}") from error
            self._check(image)


def _changes_of_timm(augment: Augment, preprocess: Preprocess) -> list[Change]:
    """Return the transforms of `auto` and `color_jitter`."""
    from timm.data.transforms_factory import transforms_imagenet_train

    parts = (augment.auto or "").split("-")[1:]
    try:
        if not all(map(PART.fullmatch, parts)):
            raise ValueError  # timm ignores a part that it does not know
        _, changes, _ = transforms_imagenet_train(
            preprocess.image_size,
            color_jitter=augment.color_jitter,  # type: ignore[arg-type]
            auto_augment=augment.auto,
            interpolation=preprocess.interpolation,
            mean=preprocess.statistics[0],
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"auto={augment.auto!r} is not a policy of timm; give one such as rand-m9-mstd0.5-inc1, original, 3a or "
            "augmix-m5-w4-d2"
        ) from error
    return list(changes.transforms)


def _named(given: Mapping[str, Mapping[str, Any]], always: bool = False) -> Change:
    """Build a transform of torchvision from its name and arguments.

    Args:
        given: The name with its arguments.
        always: Whether a transform with a probability above 0 is applied always.
    """
    if not isinstance(given, Mapping) or len(given) != 1 or not isinstance(next(iter(given.values())) or {}, Mapping):
        raise ValueError(
            f"transforms: {given!r:.80} must be a name with arguments, as in {{RandomRotation: {{degrees: 9}}}}"
        )
    [(name, args)] = given.items()
    kind = getattr(v2, name, None)
    if not (isinstance(kind, type) and issubclass(kind, v2.Transform)) or kind is v2.Lambda:
        raise ValueError(f"transforms: torchvision.transforms.v2 has no transform {name!r:.80} for images")
    args = dict(args or {})
    if isinstance(inner := args.get("transforms"), list | tuple):
        args["transforms"] = [_named(one, always) for one in inner]
    try:
        change: Any = kind(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"transforms: {name}: {str(error).splitlines()[0]}") from error
    if always and isinstance(chance := getattr(change, "p", None), int | float) and chance > 0:
        change.p = 1.0
    return change
