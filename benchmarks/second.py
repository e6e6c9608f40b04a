"""The drawn tasks of the second set: leaves, dividing cells, charts and stacked sheets, of 64 x 64 pixels.

A function takes a random generator and a class and returns the image; the generator alone decides what is drawn. The
functions that draw shapes return what the label can be read from, for the tests.
"""

from colorsys import hsv_to_rgb
from itertools import permutations

import numpy as np
from drawing import (
    SIDE,
    clouds,
    colour,
    contrasting,
    ellipse,
    filled,
    finished,
    ground,
    littered,
    mixed,
    stroked,
    turned,
)
from PIL import ImageFilter


def _moved(points, along):
    """Move points (n, 2) along x."""
    return points + np.array([along, 0])


# ---- leaves: which plant?


def _along(width, teeth=0, depth=0.0):
    """Return the outline (80, 2) of a leaf from x = -1 to 1 whose half width is a function of the place in [0, 1]."""
    place = np.linspace(0, 1, 40)
    saw = 1 + depth * (place * teeth % 1 - 0.5) if teeth else 1.0
    half = width(place) * saw
    upper = np.stack([2 * place - 1, half], axis=1)
    return np.concatenate([upper, upper[::-1] * [1, -1]])


def _around(radius):
    """Return the outline (120, 2) whose distance from the middle is a function of the angle; the stalk is at pi."""
    angle = np.linspace(-np.pi, np.pi, 120, endpoint=False)
    return radius(angle)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _leaflets(angles, places, length, width):
    """Return outlines of leaflets that start on the midrib at some places and point in some directions."""
    shape = _moved(ellipse(length / 2, width / 2), length / 2)
    return [_moved(turned(shape, angle), place) for angle, place in zip(angles, places, strict=True)]


_PAIRS = np.linspace(-0.75, 0.5, 5)
LEAVES = {  # each in [-1, 1], with its tip at x = 1
    "beech": lambda: [_along(lambda t: 0.95 * np.sqrt(t) * (1 - t) ** 0.75)],
    "chestnut": lambda: _leaflets(np.linspace(-2.0, 2.0, 5), [-0.35] * 5, 1.15, 0.36),
    "clover": lambda: _leaflets([-2.1, 0, 2.1], [-0.1] * 3, 0.95, 0.75),
    "elm": lambda: [_along(lambda t: 0.95 * np.sqrt(t) * (1 - t) ** 0.75, teeth=7, depth=0.55)],
    "ginkgo": lambda: [_around(lambda a: 0.1 + 0.9 * (np.abs(a) < 1.15) * (1 - 0.45 * np.exp(-((a / 0.13) ** 2))))],
    "linden": lambda: [
        _around(lambda a: 0.85 * (1 + 0.2 * np.cos(a)) * (1 - 0.6 * np.exp(-((abs(a) - np.pi) ** 2) * 9)))
    ],
    "maple": lambda: [_around(lambda a: 0.5 + 0.5 * np.abs(np.cos(2.5 * a)) ** 1.5 - 0.3 * (np.abs(a) > 2.6))],
    "oak": lambda: [_along(lambda t: (0.35 + 0.2 * np.cos(8 * np.pi * t)) * (0.5 + t) * (1 - t**6) + 0.02)],
    "rowan": lambda: _leaflets([*[1.0] * 5, *[-1.0] * 5, 0], [*_PAIRS, *_PAIRS, 0.5], 0.6, 0.24),
    "willow": lambda: [_along(lambda t: 0.28 * np.sin(np.pi * t) ** 0.8)],
}


def leaf(rng, label):
    """Draw a leaf of a kind, tilted and turned, with its veins and a shadow, among twigs and fallen scraps."""
    pixels = ground(rng)
    pixels = littered(rng, pixels, rng.integers(1, 4), (0.05, 0.18))
    size, angle, centre = rng.uniform(0.62, 0.85), rng.uniform(0, 2 * np.pi), rng.uniform(-0.12, 0.12, 2)
    lean = np.array([[1, rng.uniform(-0.2, 0.2)], [rng.uniform(-0.1, 0.1), rng.uniform(0.75, 1.15)]])
    curl = rng.uniform(-0.2, 0.2)

    def placed(points):
        points = np.asarray(points, dtype=float) * rng.uniform(0.97, 1.03)
        bent = points + np.stack([np.zeros(len(points)), curl * points[:, 0] ** 2], axis=1)
        return turned(bent @ lean * size, angle) + centre

    outlines = [placed(outline) for outline in list(LEAVES.values())[label]()]
    mask = np.max([filled(outline) for outline in outlines], axis=0)
    shadow = np.max([filled(outline + rng.uniform(0.03, 0.1)) for outline in outlines], axis=0)
    pixels = mixed(shadow * rng.uniform(0.2, 0.5), np.zeros(3), pixels)
    green = contrasting(rng, pixels.mean((0, 1)), 0.2)
    stalk = stroked([placed([(-0.7, 0), (-1.35, 0)])], rng.uniform(1, 2))
    pixels = mixed(stalk, green * 0.7, pixels)
    spots = 1 + rng.uniform(0, 0.5) * (clouds(rng, 8) - 0.5)
    pixels = mixed(mask, green * spots[..., None], pixels)
    veins = stroked([placed([(-0.9, 0), (0, 0), (0.8, 0)])], rng.uniform(0.7, 1.3))
    pixels = mixed(veins * mask * rng.uniform(0.2, 0.7), green * rng.choice([0.6, 1.4]), pixels)
    return finished(rng, pixels)


# ---- cells: at which stage of division is the cell in the middle?

STAGES = ["interphase", "prophase", "metaphase", "anaphase", "telophase", "divided"]


def division(rng, label):
    """Return the parts of a dividing cell, its axis along x: outlines of the cell, and of its chromatin.

    Returns:
        Outlines of the body, outlines of solid chromatin, and threads of it.
    """
    size = rng.uniform(0.36, 0.44)
    body = [ellipse(size * rng.uniform(0.95, 1.15), size * rng.uniform(0.9, 1.05))]
    if label == 0:
        return body, [ellipse(*size * rng.uniform(0.42, 0.6, 2))], []
    if label == 1:
        ends = size * 0.6 * rng.uniform(-1, 1, (9, 2, 2)) / np.sqrt(2)
        return body, [], list(ends)
    if label == 2:
        return body, [_ragged(rng, size * rng.uniform(0.14, 0.2), size * rng.uniform(0.6, 0.78), 0)], []
    if label == 3:
        apart, body = size * rng.uniform(0.25, 0.42), [body[0] * np.array([1.2, 1])]
        plates = [_ragged(rng, *size * rng.uniform((0.11, 0.45), (0.16, 0.62)), side * 0.2) for side in (-1, 1)]
        return body, [_moved(plate, side * apart) for plate, side in zip(plates, (-1, 1), strict=True)], []
    apart, wide = (
        size * (rng.uniform(0.62, 0.8) if label == 4 else rng.uniform(0.85, 1.0)),
        1.12 if label == 4 else 0.82,
    )
    bodies = [_moved(ellipse(apart * wide, size * rng.uniform(0.75, 0.9)), side * apart) for side in (-1, 1)]
    if label == 4:
        plates = [_ragged(rng, *size * rng.uniform((0.14, 0.28), (0.2, 0.42)), side * 0.1) for side in (-1, 1)]
        return bodies, [_moved(plate, side * apart * 1.1) for plate, side in zip(plates, (-1, 1), strict=True)], []
    nuclei = [ellipse(*size * rng.uniform(0.34, 0.44, 2)) for _ in (-1, 1)]
    return bodies, [_moved(nucleus, side * apart) for nucleus, side in zip(nuclei, (-1, 1), strict=True)], []


def _ragged(rng, wide, high, bow):
    """Return the outline (40, 2) of an uneven plate, bowed along x."""
    outline = ellipse(wide, high) * rng.uniform(0.85, 1.15, (40, 1))
    return outline + np.stack([bow * outline[:, 1] ** 2 / high, np.zeros(40)], axis=1)


def cell(rng, label):
    """Draw a stained cell at one of six stages of division, among cells at any stage, as under a microscope."""
    stain = np.clip(rng.choice([(0.85, 0.6, 0.75), (0.65, 0.7, 0.9), (0.8, 0.8, 0.65)]) + rng.normal(0, 0.06, 3), 0, 1)
    dark = stain * rng.uniform(0.25, 0.5) * np.clip(1 + rng.normal(0, 0.2, 3), 0.5, 1.5)
    empty = np.clip(stain + rng.uniform(0.1, 0.3), 0, 1)
    pixels = mixed(np.clip(clouds(rng, 5), 0, 1) * 0.4, stain, np.ones((SIDE, SIDE, 3)) * empty)

    def laid(pixels, parts, angle, centre):
        body, solid, threads = ([turned(part, angle) + centre for part in some] for some in parts)
        cover = np.max([filled(one) for one in body], axis=0)
        rim = stroked([np.concatenate([one, one[:1]]) for one in body], 1.2) * (1 if len(body) == 1 else cover)
        pixels = mixed(cover * 0.75, stain * rng.uniform(0.85, 0.95), pixels)
        pixels = mixed(rim * 0.35, dark, pixels)
        for one in solid:
            pixels = mixed(filled(one) * rng.uniform(0.75, 0.95), dark, pixels)
        return mixed(stroked(threads, rng.uniform(1.5, 2.4)) * 0.9, dark, pixels) if threads else pixels

    centre = rng.uniform(-0.12, 0.12, 2)
    for _ in range(rng.integers(4, 9)):
        place = rng.uniform(-1.1, 1.1, 2)
        if np.hypot(*(place - centre)) > 0.8:
            pixels = laid(pixels, division(rng, rng.integers(len(STAGES))), rng.uniform(0, np.pi), place)
    pixels = laid(pixels, division(rng, label), rng.uniform(0, np.pi), centre)
    for _ in range(rng.integers(0, 4)):
        dirt = turned(ellipse(*rng.uniform(0.02, 0.08, 2)), rng.uniform(0, np.pi)) + rng.uniform(-1, 1, 2)
        pixels = mixed(filled(dirt) * rng.uniform(0.4, 0.9), dark, pixels)
    image = finished(rng, pixels, noise=0.07)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))


# ---- charts: how do the values go on?

TRENDS = {  # from place in [-1, 1] to height in [-1, 1], and where it turns
    "rising": lambda x, turn: x,
    "falling": lambda x, turn: -x,
    "peak": lambda x, turn: 1 - 2 * np.abs(x - turn) / (1 + np.abs(turn)),
    "valley": lambda x, turn: 2 * np.abs(x - turn) / (1 + np.abs(turn)) - 1,
    "wave": lambda x, turn: np.sign(turn) * np.sin(np.pi * x),
    "level": lambda x, turn: 0 * x,
}


def heights(rng, label):
    """Return the heights (values,) of a chart in [0, 1], which follow a trend with some noise."""
    place = np.linspace(-1, 1, rng.integers(7, 11))
    trend = list(TRENDS.values())[label](place, rng.uniform(0.05, 0.35) * rng.choice([-1, 1]))
    wide = rng.uniform(0.3, 0.42)
    middle = rng.uniform(wide + 0.05, 0.95 - wide)
    return np.clip(middle + wide * trend + rng.normal(0, 0.04, len(place)), 0.02, 1)


def chart(rng, label):
    """Draw a chart of bars or of a filled area whose values follow a trend, with grid lines and marks."""
    pixels = ground(rng)
    left, right = rng.uniform(-0.95, -0.8), rng.uniform(0.8, 0.95)
    base, high = rng.uniform(0.75, 0.9), rng.uniform(1.4, 1.6)

    def box(x, y, wide, tall):
        return np.array([(x, y), (x + wide, y), (x + wide, y - tall), (x, y - tall)])

    paper = colour(rng, (0, 0.3), (0.1, 1))
    pixels = mixed(filled(box(left, base, right - left, high)) * rng.uniform(0.8, 1), paper, pixels)
    levels = base - high * rng.random(rng.integers(1, 4))
    lines = [np.array([(left, level), (right, level)]) for level in levels]
    pixels = mixed(stroked(lines, 0.8) * rng.uniform(0.3, 0.6), colour(rng), pixels)
    values, ink = heights(rng, label), contrasting(rng, paper, 0.35)
    step = (right - left) / len(values)
    wide = step * rng.uniform(0.7, 1)
    if rng.random() < 0.5:
        outlines = [box(left + step * k + (step - wide) / 2, base, wide, high * one) for k, one in enumerate(values)]
    else:
        across = left + step * (np.arange(len(values)) + 0.5)
        top = np.stack([across, base - high * values], axis=1)
        outlines = [np.concatenate([top, [(across[-1], base), (across[0], base)]])]
    pixels = mixed(np.max([filled(one) for one in outlines], axis=0), ink, pixels)
    for _ in range(rng.integers(0, 3)):
        mark = ellipse(*rng.uniform(0.04, 0.1, 2)) + rng.uniform(-1, 1, 2)
        pixels = mixed(filled(mark), colour(rng), pixels)
    return finished(rng, pixels)


# ---- stacked sheets: in which order do they lie?

HUES = {"red": 0.0, "green": 0.33, "blue": 0.63}
ORDERS = list(permutations(HUES))
"""From the top down."""
_SHEETS = [
    ellipse(1, 1),
    np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    1.2 * np.array([(np.cos(a), np.sin(a)) for a in np.pi * np.array([0.5, 7 / 6, 11 / 6])]),
]


def sheets(rng):
    """Return the masks (3, 64, 64) of three sheets; each two overlap outside of the third."""
    while True:
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(3) / 3 + rng.uniform(-0.4, 0.4, 3)
        middle = rng.uniform(-0.15, 0.15, 2)
        masks = []
        for angle in angles:
            shape = _SHEETS[rng.integers(3)] * rng.uniform(0.38, 0.6) * rng.uniform(0.85, 1.15, 2)
            place = middle + rng.uniform(0.28, 0.45) * np.array([np.cos(angle), np.sin(angle)])
            masks.append(filled(turned(shape, rng.uniform(0, np.pi)) + place))
        masks = np.array(masks)
        pairs = [(masks[a] * masks[b] * (1 - masks[c])).sum() for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 2, 0))]
        if min(pairs) > 60:
            return masks


def stack(rng, label):
    """Draw a red, a green and a blue sheet that lie on each other in one of six orders."""
    pixels = ground(rng)
    grey = pixels.mean(2, keepdims=True)
    pixels = grey + 0.25 * (pixels - grey)
    masks = sheets(rng)
    for name, mask in zip(ORDERS[label][::-1], masks, strict=True):
        hue = (HUES[name] + rng.uniform(-0.05, 0.05)) % 1
        paint = np.array(hsv_to_rgb(hue, rng.uniform(0.55, 0.95), rng.uniform(0.45, 1.0)))
        shade = np.roll(mask, rng.integers(1, 3, 2), (0, 1)) * (1 - mask) * rng.uniform(0, 0.4)
        pixels = mixed(shade, np.zeros(3), pixels)
        grain = 1 + rng.uniform(0, 0.5) * (clouds(rng, rng.integers(3, 12)) - 0.5)
        pixels = mixed(mask, paint * grain[..., None], pixels)
    for _ in range(rng.integers(1, 4)):  # strips over them
        line = rng.uniform(-1, 1, (2, 2))
        pixels = mixed(stroked([line], rng.uniform(1, 3)), colour(rng, (0, 0.3)), pixels)
    return finished(rng, pixels)
