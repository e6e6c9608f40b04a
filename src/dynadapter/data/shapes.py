"""Drawn images of shapes, from plain to cluttered: a task that needs no download."""

import math
from colorsys import hsv_to_rgb
from functools import lru_cache
from random import Random
from typing import Any, ClassVar, NamedTuple

from PIL import Image, ImageDraw

from dynadapter.data.base import ImageData, Split
from dynadapter.data.dataset import Sample

FINER = 3
"""Images are drawn this many times larger and then reduced, which smooths edges."""

Point = tuple[float, float]
Outline = list[Point]


# ---- outlines in the unit circle, y downwards ------------------------------------------------------------------------


def _polygon(corners: int, inner: float = 1.0) -> Outline:
    """Return a regular polygon on its flat side; with `inner` below 1, every second corner makes it a star."""
    turn = -math.pi / 2 if corners % 2 or inner < 1 else math.pi / corners - math.pi / 2
    angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
    return [
        ((inner if k % 2 else 1.0) * math.cos(angle), (inner if k % 2 else 1.0) * math.sin(angle))
        for k, angle in enumerate(angles)
    ]


def _arc(start: float, end: float, radius: float = 1.0, centre: Point = (0.0, 0.0)) -> Outline:
    """Return points on a circle from one angle to another, in degrees, clockwise on the screen."""
    steps = [math.radians(start + (end - start) * k / 39) for k in range(40)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in steps]


def _cross() -> Outline:
    """Return a plus sign."""
    half = 0.34  # half the width of an arm
    corner = [(-half, -0.95), (half, -0.95), (half, -half)]
    return [(x, y) if k == 0 else _turned((x, y), k) for k in range(4) for x, y in corner]


def _turned(point: Point, quarters: int) -> Point:
    for _ in range(quarters):
        point = (-point[1], point[0])
    return point


def _heart() -> Outline:
    """Return the usual heart curve, scaled to the unit circle."""
    steps = [2 * math.pi * k / 48 for k in range(48)]
    return [
        (
            16 * math.sin(t) ** 3 / 17,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in steps
    ]


def _moon() -> Outline:
    """Return a crescent: an outer arc and, back again, an inner one."""
    return _arc(50, 310) + _arc(292, 68, radius=0.8265, centre=(0.333, 0.0))


class Kind(NamedTuple):
    """A class of shapes.

    Attributes:
        hue: Colour of its plain images, in [0, 1).
        outline: The border.
        hole: The border of a hole, where the shape has one.
    """

    hue: float
    outline: Outline
    hole: Outline | None = None


KINDS = {
    "circle": Kind(0.60, _arc(0, 360)),
    "cross": Kind(0.88, _cross()),
    "heart": Kind(0.00, _heart()),
    "moon": Kind(0.16, _moon()),
    "ring": Kind(0.76, _arc(0, 360), hole=_arc(0, 360, radius=0.52)),
    "square": Kind(0.33, _polygon(4)),
    "star": Kind(0.08, _polygon(10, inner=0.45)),
    "triangle": Kind(0.48, _polygon(3)),
}
"""The classes, in the order of their indices."""
CLASSES = tuple(KINDS)


# ---- one image -------------------------------------------------------------------------------------------------------


def draw_shape(rng: Random, kind: str, difficulty: float, size: int = 48) -> Image.Image:
    """Draw a shape of a class.

    A plain image has one large, upright, bright shape in the colour of its class on a dark background. With the
    difficulty, the colour drifts to those of other classes, the shape turns, moves, shrinks and fades, and strips cover
    the background and parts of the shape.

    Args:
        rng: Random numbers; the same state draws the same image.
        kind: One of `CLASSES`.
        difficulty: From 0 (plain) to 1 (cluttered).
        size: Height and width in pixels.

    >>> draw_shape(Random(0), "star", difficulty=0.5).size
    (48, 48)
    """
    side = size * FINER
    image = _background(rng, difficulty, side)
    draw = ImageDraw.Draw(image)
    for _ in range(round(14 * difficulty)):
        _draw_strip(rng, draw, (rng.uniform(0, side), rng.uniform(0, side)), side * rng.uniform(0.03, 0.09))

    radius = side * (0.40 - 0.13 * difficulty) * rng.uniform(0.94, 1.06)
    free = 0.6 * difficulty * (side / 2 - radius)
    centre = (side / 2 + rng.uniform(-free, free), side / 2 + rng.uniform(-free, free))
    angle = difficulty * rng.uniform(-math.pi / 4, math.pi / 4)
    hue = KINDS[kind].hue + 0.15 * difficulty * rng.uniform(-1, 1)
    mask = Image.new("L", image.size, 0)
    for border, opacity in ((KINDS[kind].outline, 1 - 0.25 * difficulty), (KINDS[kind].hole, 0)):
        if border is not None:
            ImageDraw.Draw(mask).polygon(_place(border, centre, radius, angle), fill=round(255 * opacity))
    image.paste(_rgb(hue, rng.uniform(0.6, 0.9), rng.uniform(0.85, 1.0)), mask=mask)

    for _ in range(round(3 * max(0.0, difficulty - 0.3))):
        where = (centre[0] + rng.uniform(-radius, radius), centre[1] + rng.uniform(-radius, radius))
        _draw_strip(rng, draw, where, 0.6 * radius)
    return image.reduce(FINER)


def _background(rng: Random, difficulty: float, side: int) -> Image.Image:
    """Draw a soft background; with the difficulty it gets brighter and more uneven."""
    hue, value, spread = rng.random(), rng.uniform(0.15, 0.35) + 0.25 * difficulty, 0.04 + 0.28 * difficulty
    cells = [
        _rgb(hue + 0.3 * spread * rng.uniform(-1, 1), 0.35, value + spread * rng.uniform(-1, 1)) for _ in range(16)
    ]
    small = Image.frombytes("RGB", (4, 4), bytes(byte for cell in cells for byte in cell))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def _draw_strip(rng: Random, draw: ImageDraw.ImageDraw, centre: Point, length: float) -> None:
    outline = [(-1.0, -0.3), (1.0, -0.3), (1.0, 0.3), (-1.0, 0.3)]
    points = _place(outline, centre, length, rng.uniform(0, math.pi))
    draw.polygon(points, fill=_rgb(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.8)))


def _place(outline: Outline, centre: Point, radius: float, angle: float) -> Outline:
    """Scale an outline, rotate it and move it to its centre."""
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    return [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in outline]


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """Return a colour as bytes; the hue wraps around, the value is clipped to [0, 1]."""
    red, green, blue = hsv_to_rgb(hue % 1, saturation, min(max(value, 0.0), 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


# ---- data sets -------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """An image with its class index and its difficulty in [0, 1]."""

    image: Image.Image
    label: int
    difficulty: float


@lru_cache(maxsize=4)  # a process that sets up the same data again does not draw it again
def draw_split(split: str, images: int, seed: int = 0, size: int = 48) -> tuple[Drawn, ...]:
    """Draw the images of a split: classes in turn, difficulties uniform in [0, 1].

    An image depends only on the seed, the split's name and its index. A shorter split is the start of a longer one, and
    two splits have different images.
    """
    drawn = []
    for index in range(images):
        rng, label = Random(f"{seed} {split} {index}"), index % len(CLASSES)
        difficulty = rng.random()
        drawn.append(Drawn(draw_shape(rng, CLASSES[label], difficulty, size), label, difficulty))
    return tuple(drawn)


class Shapes(ImageData):
    """Drawn shapes of eight classes, from plain to cluttered; the same arguments always draw the same images.

    Args:
        train_images: Images for training.
        val_images: Images for validation.
        test_images: Images for testing.
        seed: Random seed of the images.
        kwargs: As for :class:`~dynadapter.data.base.ImageData`. The images are drawn at ``image_size``; without a model
            ``auto`` is 48.
    """

    without_model: ClassVar[dict[str, Any]] = {"image_size": 48}

    def __init__(
        self,
        train_images: int = 1000,
        val_images: int = 400,
        test_images: int = 400,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.images = {"train": train_images, "val": val_images, "test": test_images}
        if few := [f"{split}_images={count}" for split, count in self.images.items() if count < 1]:
            raise ValueError(f"{few[0]} must be at least 1")
        self.seed = seed
        self.class_names = list(CLASSES)

    def samples(self, split: Split) -> list[Sample]:
        return [(drawn.image, drawn.label) for drawn in self._drawn(split)]

    def difficulties(self, split: Split) -> list[float]:
        """Return the difficulty of each image of a split, in the order of its samples: 0 is plain, 1 is cluttered."""
        return [drawn.difficulty for drawn in self._drawn(split)]

    def _drawn(self, split: Split) -> tuple[Drawn, ...]:
        return draw_split(split, self.images[split], self.seed, self.image_size)
