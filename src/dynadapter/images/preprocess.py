"""Turn a decoded image into the array that a backbone takes.

This file imports only Pillow and numpy: an exported folder holds a copy of it, and every evaluation uses it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dynadapter.images.reading import Source, decoded
from dynadapter.images.values import Range

Interpolation = Literal["bicubic", "bilinear", "nearest"]
Resize = Literal["stretch", "crop"]
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
Normalization = Literal["imagenet", "half", "none"] | Statistics

STATISTICS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
MAX_SIZE = 4096
"""Largest ``image_size``."""
LONGEST = 32
"""Crop a strip before resizing if its resized form would be longer than this many squares."""


@dataclass(frozen=True)
class Preprocess:
    """Resize an image, scale it to [0, 1] and normalise it.

    Args:
        image_size: Height and width of the result in pixels.
        interpolation: How pixels are resampled; bicubic and bilinear are antialiased when an image shrinks.
        resize: ``stretch`` the image to a square (the VTAB-1k protocol), or ``crop`` its centre after the shorter side
            is resized to `image_size`.
        normalization: ``imagenet`` and ``half`` subtract a mean and divide by a deviation, ``none`` keeps [0, 1];
            or a pair (mean, deviation), each with a value per colour.
        value_range: The values (low, high) that become 0 and 255 in images of more than 8 bits, such as (0, 4095) for
            12 bits in a 16-bit file; values outside are clipped. None for the whole range of 16 bits. Floats need a
            range.

    Raises:
        ValueError: A setting has another value.

    >>> Preprocess(image_size=32)(Image.new("RGB", (8, 8))).shape
    (3, 32, 32)
    """

    image_size: int = 224
    interpolation: Interpolation = "bicubic"
    resize: Resize = "stretch"
    normalization: Normalization = "imagenet"
    value_range: Range | None = None

    def __post_init__(self) -> None:
        size = self.image_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"image_size must be a whole number of at least 1 pixel, not {size!r}")
        if size > MAX_SIZE:
            raise ValueError(f"image_size={size} is too large; give at most {MAX_SIZE} pixels")
        for name, choices in (("interpolation", get_args(Interpolation)), ("resize", get_args(Resize))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from: {', '.join(choices)}")
        if isinstance(self.normalization, str):
            if self.normalization not in STATISTICS:
                choices = (*STATISTICS, "or a pair (mean, deviation)")
                raise ValueError(f"unknown normalization {self.normalization!r}; choose from: {', '.join(choices)}")
        else:
            object.__setattr__(self, "normalization", _statistics(self.normalization))
        if self.value_range is not None:
            object.__setattr__(self, "value_range", _range(self.value_range))

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation of the three colours, for pixels in [0, 1]."""
        return STATISTICS[self.normalization] if isinstance(self.normalization, str) else self.normalization

    def read(self, source: Source) -> NDArray[np.uint8]:
        """Decode an image and return its resized bytes ``(3, size, size)``; see :meth:`opened`."""
        with self.opened(source) as image:
            return self.pixels(image)

    @contextmanager
    def opened(self, source: Source) -> Iterator[Image.Image]:
        """Decode an image, and reserve its memory inside the context.

        Content of a file that is not used gives a warning, once for each kind (`UnusedRange`, `UnreadPages`).

        Args:
            source: As in :func:`~dynadapter.images.reading.load_image`, which lists the errors as well.
        """
        with decoded(source, self.value_range) as (image, remarks):
            for remark in remarks:
                if type(remark) not in self._warned:
                    self._warned.add(type(remark))
                    warnings.warn(remark, stacklevel=2)
            yield image

    @cached_property
    def _warned(self) -> set[type[UserWarning]]:
        return set()

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize an image and return its bytes ``(3, size, size)``."""
        size, (width, height) = self.image_size, image.size
        wanted = (size, size)
        if self.resize == "crop":
            if max(width, height) > LONGEST * min(width, height):  # the resized strip might not fit in memory
                image = _centre(image, min(width, LONGEST * height), min(height, LONGEST * width))
                width, height = image.size
            # The longer side is rounded down, as in torchvision
            wanted = (int(size * width / min(width, height)), int(size * height / min(width, height)))
        image = image if image.mode == "RGB" else image.convert("RGB")
        if image.size != wanted:
            image = image.resize(wanted, Image.Resampling[self.interpolation.upper()])
        return np.asarray(_centre(image, size, size)).transpose(2, 0, 1).copy()

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return bytes ``(..., 3, size, size)`` as normalised float32 of the same shape."""
        mean, deviation = np.asarray(self.statistics, np.float32)[..., None, None]
        values = pixels.astype(np.float32)
        values *= np.float32(1 / 255)
        values -= mean
        values /= deviation
        return values

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return a decoded image as ``(3, size, size)`` float32."""
        return self.normalize(self.pixels(image))


def _range(given: object) -> Range:
    """Return a pair of limits; a config file has a list."""
    try:
        low, high = map(float, given)  # type: ignore[call-overload]
        fits = not isinstance(given, str) and -np.inf < low < high < np.inf
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"value_range={given!r} is not (low, high) with low below high, such as (0, 4095)")
    return low, high


def _statistics(given: object) -> Statistics:
    """Return a mean and a deviation as a pair of tuples; a config file has lists."""
    try:
        values = np.asarray(given, np.float64)
        fits = values.shape == (2, 3) and bool(np.isfinite(values).all()) and bool((values[1] > 0).all())
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"normalization {given} is not ((mean of 3 colours), (deviation of 3 colours above 0))")
    mean, deviation = values.tolist()
    return (mean[0], mean[1], mean[2]), (deviation[0], deviation[1], deviation[2])


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut the centre out of an image; the corner is rounded to the nearest pixel, as in torchvision."""
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
