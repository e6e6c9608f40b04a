"""Drawn images of 64 x 64 pixels in the plane: pointers, textures, handwritten digits and symbols, each under clutter.

A function takes a random generator and a class and returns the image; the generator alone decides what is drawn.
"""

from colorsys import hsv_to_rgb

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
FINER = 4
"""Shapes are drawn this many times larger and then reduced, which smooths edges."""
Y, X = np.mgrid[:SIDE, :SIDE] / (SIDE - 1) * 2 - 1


# ---- colours, grounds and masks


def colour(rng, saturation=(0.2, 0.9), value=(0.25, 1.0)):
    """Draw a colour: (3,) in [0, 1]."""
    return np.array(hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)))


def contrasting(rng, other, least=0.25):
    """Draw a colour whose brightness differs from another's."""
    while True:
        found = colour(rng)
        if abs(found.mean() - other.mean()) >= least:
            return found


def clouds(rng, cells):
    """Draw smooth noise: (64, 64) around 0.5, with that many bumps on a side."""
    small = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)


def mixed(mask, over, below):
    """Lay a colour or pixels over others where the mask (64, 64) is 1."""
    return mask[..., None] * over + (1 - mask[..., None]) * below


def ground(rng):
    """Draw an uneven ground of two near colours: (64, 64, 3)."""
    first = colour(rng, value=(0.2, 0.8))
    second = np.clip(first + rng.uniform(-0.25, 0.25, 3), 0, 1)
    return mixed(np.clip(0.6 * clouds(rng, 4) + 0.4 * clouds(rng, 12), 0, 1), first, second)


def filled(outline):
    """Return the mask (64, 64) of a polygon with corners (n, 2) in [-1, 1]."""
    big = Image.new("L", (SIDE * FINER, SIDE * FINER))
    ImageDraw.Draw(big).polygon([tuple(point) for point in (outline + 1) / 2 * SIDE * FINER], fill=255)
    return np.asarray(big.reduce(FINER)) / 255


def stroked(lines, width):
    """Return the mask (64, 64) of lines through points (n, 2) in [-1, 1], `width` pixels wide."""
    big = Image.new("L", (SIDE * FINER, SIDE * FINER))
    draw = ImageDraw.Draw(big)
    for line in lines:
        points = [tuple(point) for point in (line + 1) / 2 * SIDE * FINER]
        draw.line(points, fill=255, width=round(width * FINER), joint="curve")
    return np.asarray(big.reduce(FINER)) / 255


def turned(points, angle):
    """Rotate points (n, 2), clockwise on the screen."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def ellipse(width, height):
    """Return the outline of an ellipse: (40, 2)."""
    steps = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([width * np.cos(steps), height * np.sin(steps)], axis=1)


def littered(rng, pixels, count, size):
    """Lay scraps and twigs over the pixels: so many of each, scraps with half axes in a range."""
    for _ in range(count):
        scrap = turned(ellipse(*rng.uniform(*size, 2)), rng.uniform(0, np.pi)) + rng.uniform(-1, 1, 2)
        pixels = mixed(filled(scrap) * rng.uniform(0.4, 1), colour(rng), pixels)
        twig = np.cumsum(rng.normal(0, 0.3, (3, 2)), axis=0) + rng.uniform(-1, 1, 2)
        pixels = mixed(stroked([twig], rng.uniform(0.8, 2)) * rng.uniform(0.3, 0.9), colour(rng), pixels)
    return pixels


def finished(rng, pixels, noise=0.05):
    """Light the pixels from one side, add noise, and return the image."""
    light = 1 + rng.uniform(-0.25, 0.25) * X + rng.uniform(-0.25, 0.25) * Y
    pixels = pixels * light[..., None] + rng.normal(0, rng.uniform(0, noise), pixels.shape)
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))


# ---- pointers: where does it point?

POINTERS = {
    "dart": [(1, 0), (-0.8, 0.75), (-0.35, 0), (-0.8, -0.75)],
    "arrow": [(1, 0), (0.1, 0.65), (0.1, 0.25), (-0.9, 0.25), (-0.9, -0.25), (0.1, -0.25), (0.1, -0.65)],
}
DIRECTIONS = 8


def pointer(rng, label):
    """Draw a pointer in one of eight directions, among shapes that point nowhere."""
    pixels = ground(rng)
    for _ in range(rng.integers(2, 6)):
        size = rng.uniform(0.08, 0.22, 2)
        shape = ellipse(*size) if rng.random() < 0.5 else size * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
        place = turned(shape, rng.uniform(0, np.pi)) + rng.uniform(-1, 1, 2)
        pixels = mixed(filled(place) * rng.uniform(0.5, 1), colour(rng), pixels)
    outline = np.array(POINTERS[rng.choice(list(POINTERS))]) * (
        rng.uniform(0.45, 0.65) * rng.uniform(0.85, 1.15, (1, 2))
    )
    centre = rng.uniform(-0.3, 0.3, 2)
    place = turned(outline, 2 * np.pi * (label + rng.uniform(-0.35, 0.35)) / DIRECTIONS) + centre
    pixels = mixed(filled(place), contrasting(rng, pixels.mean((0, 1)), 0.35), pixels)
    for _ in range(rng.integers(0, 2)):  # strips over it
        strip = np.array([(-1, -0.06), (1, -0.06), (1, 0.06), (-1, 0.06)]) * rng.uniform(0.3, 0.6)
        place = turned(strip, rng.uniform(0, np.pi)) + centre + rng.uniform(-0.3, 0.3, 2)
        pixels = mixed(filled(place), colour(rng), pixels)
    return finished(rng, pixels)


# ---- textures


def soft(wave, rng):
    """Turn a wave in [-1, 1] into [0, 1], with soft or sharp edges."""
    return 0.5 + 0.5 * np.tanh(wave * rng.uniform(1, 6))


def points_near(rng, u, v):
    """Return the distances to the nearest and second nearest of scattered points, about one a unit square."""
    u, v = u - u.min(), v - v.min()
    high = int(max(u.max(), v.max())) + 2
    cells = np.stack(np.mgrid[-1:high, -1:high], axis=-1).reshape(-1, 2)
    points = cells + rng.uniform(0.05, 0.95, cells.shape)
    near = points[(points < [u.max() + 1, v.max() + 1]).all(1)]
    distances = np.hypot(u[..., None] - near[:, 0], v[..., None] - near[:, 1])
    return np.moveaxis(np.partition(distances, 1, axis=-1)[..., :2], -1, 0)


def dots(u, v, rng):
    shifted = u + 0.5 * (np.floor(v) % 2)
    return soft(2 - 7 * np.hypot(shifted % 1 - 0.5, v % 1 - 0.5), rng)


def bricks(u, v, rng):
    shifted = u / 2 + 0.5 * (np.floor(v) % 2)
    edge = np.minimum(2 * np.minimum(shifted % 1, 1 - shifted % 1), np.minimum(v % 1, 1 - v % 1))
    return soft(8 * edge - 1, rng)


def scales(u, v, rng):
    """Rows of discs, each over the next."""
    found, row = np.zeros_like(u), np.floor(v)
    for below in (1, 0):
        shifted = u + 0.5 * ((row + below) % 2)
        distance = np.hypot(shifted % 1 - 0.5, (v % 1 - below) * 0.8)
        found = np.where(distance < 0.55, distance / 0.55, found)
    return found


def weave(u, v, rng):
    over = (np.floor(u) + np.floor(v)) % 2
    across, along = np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)
    return np.where(over > 0, 1 - 2 * across, 0.6 * (1 - 2 * along))


def blobs(u, v, rng):
    nearest, _ = points_near(rng, u, v)
    return soft(2 - 5 * nearest, rng)


def cells(u, v, rng):
    nearest, second = points_near(rng, u, v)
    return soft(8 * (second - nearest) - 1, rng)


TEXTURES = {
    "blobs": blobs,
    "bricks": bricks,
    "cells": cells,
    "checks": lambda u, v, rng: soft(2 * np.sin(np.pi * u) * np.sin(np.pi * v), rng),
    "dots": dots,
    "grid": lambda u, v, rng: soft(2 - 9 * np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)), rng),
    "marble": lambda u, v, rng: soft(np.sin(np.pi * u + 9 * clouds(rng, 5) + 3 * clouds(rng, 10)), rng),
    "rings": lambda u, v, rng: soft(np.sin(2 * np.pi * np.hypot(u - u.mean() - 1, v - v.mean() + 1)), rng),
    "scales": scales,
    "stripes": lambda u, v, rng: soft(np.sin(2 * np.pi * u), rng),
    "weave": weave,
    "zigzag": lambda u, v, rng: soft(np.sin(2 * np.pi * (u + np.abs(v % 2 - 1))), rng),
}


def texture(rng, label):
    """Draw a texture of any scale, direction and colours, bent, faded and unevenly lit."""
    angle, often, warp = rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 4.5), rng.uniform(0, 0.25)
    bent = [axis + warp * (clouds(rng, 4) - 0.5) for axis in (X, Y)]
    u, v = (turned(np.stack(bent, axis=-1).reshape(-1, 2), angle).T * often).reshape(2, SIDE, SIDE)
    stretch = rng.uniform(0.8, 1.25)
    height = np.clip(list(TEXTURES.values())[label](u * stretch + 50, v / stretch + 50, rng), 0, 1)
    first = colour(rng)
    second = contrasting(rng, first, 0.12)
    faded = rng.uniform(0.4, 1) * np.clip(height + rng.uniform(0, 0.6) * (clouds(rng, 6) - 0.5), 0, 1)
    return finished(rng, mixed(faded, first, second), noise=0.08)


# ---- handwritten digits


def warped(rng, picture):
    """Place a small picture, (8, 8) in [0, 1], in the image: scaled, turned, slanted, moved."""
    scale = 8 / rng.uniform(1.1, 1.6)  # pixels of the picture in half of the image
    turn, slant = rng.uniform(-0.4, 0.4), rng.uniform(-0.3, 0.3)
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    back = np.array([[cos, sin], [-sin + slant * cos, cos + slant * sin]]) / SIDE * 2
    start = np.array([4, 4]) - back @ (SIDE / 2 + rng.uniform(-9, 9, 2))
    padded = Image.fromarray(np.pad(picture, 4).astype(np.float32))
    matrix = (*back[0], start[0] + 4, *back[1], start[1] + 4)
    mask = padded.transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(mask) * 1.5 - 0.25, 0, 1)


def digit(rng, picture):
    """Draw a handwritten digit, (8, 8) in [0, 1], in one colour on an uneven ground with scribbles."""
    pixels = ground(rng)
    for _ in range(rng.integers(1, 4)):
        line = np.cumsum(rng.normal(0, 0.25, (4, 2)), axis=0) + rng.uniform(-1, 1, 2)
        pixels = mixed(stroked([line], rng.uniform(1.5, 4)) * rng.uniform(0.3, 0.8), colour(rng), pixels)
    ink = contrasting(rng, pixels.mean((0, 1)), 0.3)
    return finished(rng, mixed(warped(rng, picture), ink, pixels))


# ---- symbols drawn by hand


def _curve(x, y, turns=1.0, points=60):
    steps = np.linspace(0, 2 * np.pi * turns, points)
    return np.stack([x(steps), y(steps)], axis=1)


def _corners(*points):
    """Return straight lines between corners, with points on the way that a hand can bend."""
    ends = np.array(points, dtype=float)
    steps = np.linspace(0, len(ends) - 1, 12 * (len(ends) - 1) + 1)
    return np.stack([np.interp(steps, range(len(ends)), ends[:, axis]) for axis in (0, 1)], axis=1)


_STAR = [(np.sin(4 * np.pi * k / 5), -np.cos(4 * np.pi * k / 5)) for k in range(6)]
SYMBOLS = {
    "arrow": [_corners((-1, 0), (1, 0)), _corners((0.4, -0.5), (1, 0), (0.4, 0.5))],
    "bolt": [_corners((0.3, -1), (-0.5, 0.1), (0.4, 0), (-0.3, 1))],
    "cross": [_corners((-0.8, -0.8), (0.8, 0.8)), _corners((0.8, -0.8), (-0.8, 0.8))],
    "cup": [
        _corners((-0.8, -0.6), (-0.6, 0.8), (0.4, 0.8), (0.6, -0.6), (-0.8, -0.6)),
        _corners((0.6, -0.3), (1, 0), (0.5, 0.4)),
    ],
    "fish": [_curve(lambda t: np.cos(t) - np.sin(t) ** 2 / 1.4, lambda t: 0.9 * np.cos(t) * np.sin(t))],
    "hash": [_corners((x, -0.9), (x, 0.9)) for x in (-0.4, 0.4)] + [_corners((-0.9, y), (0.9, y)) for y in (-0.4, 0.4)],
    "heart": [
        _curve(lambda t: np.sin(t) ** 3, lambda t: -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t)) / 16)
    ],
    "house": [_corners((-0.8, 0), (-0.8, 0.9), (0.8, 0.9), (0.8, 0), (-0.8, 0), (0, -0.9), (0.8, 0))],
    "loop": [_curve(lambda t: np.cos(t), lambda t: np.sin(2 * t) / 2)],
    "spiral": [_curve(lambda t: t * np.cos(t) / 16, lambda t: t * np.sin(t) / 16, 2.5)],
    "star": [_corners(*_STAR)],
    "tree": [_corners((0, -1), (-0.7, 0.4), (0.7, 0.4), (0, -1)), _corners((0, 0.4), (0, 1))],
}


def symbol(rng, label):
    """Draw a symbol with a shaking hand, on a ground with other strokes."""
    pixels = ground(rng)
    shape = np.diag(rng.uniform(0.75, 1.2, 2))
    shape[0, 1] = rng.uniform(-0.25, 0.25)  # slanted
    size, angle, centre = rng.uniform(0.35, 0.65), rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3, 2)
    lines = []
    for line in list(SYMBOLS.values())[label]:
        steps = np.linspace(0, 1, len(line))
        shake = [np.interp(steps, np.linspace(0, 1, 7), rng.normal(0, 0.1, 7)) for _ in range(2)]
        lines.append(turned((line + np.stack(shake, axis=1)) @ shape * size, angle) + centre)
    for _ in range(rng.integers(2, 7)):
        line = np.cumsum(rng.normal(0, 0.22, (5, 2)), axis=0) + rng.uniform(-1, 1, 2)
        pixels = mixed(stroked([line], rng.uniform(1, 3)) * rng.uniform(0.4, 1), colour(rng), pixels)
    ink = contrasting(rng, pixels.mean((0, 1)))
    return finished(rng, mixed(stroked(lines, rng.uniform(1.5, 3.5)), ink, pixels))
