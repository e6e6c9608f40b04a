"""The drawn tasks of the third set: butterflies, land from above, two things and their places, and the largest disc.

A function takes a random generator and a class and returns the image, 64 x 64 pixels; the generator alone decides what
is drawn. The functions that place shapes return what the label can be read from, for the tests.
"""

import numpy as np
from drawing import (
    SIDE,
    X,
    Y,
    clouds,
    colour,
    contrasting,
    ellipse,
    filled,
    finished,
    ground,
    littered,
    mixed,
    points_near,
    soft,
    stroked,
    turned,
)
from PIL import ImageFilter


def _square(half):
    """Return the corners (4, 2) of a square around 0."""
    return half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])


# ---- butterflies: which kind?

WINGS = {  # radius of the right wings by direction, from -1 (up) over 0 (to the side) to 1 (down)
    "round": lambda t: 0.6 + 0.3 * np.abs(np.sin(np.pi * t)) ** 0.6,
    "pointed": lambda t: 0.5 + 0.5 * np.exp(-((t + 0.5) ** 2) * 22) + 0.15 * (t > 0.1),
    "tailed": lambda t: 0.6 + 0.25 * np.abs(np.sin(np.pi * t)) + 0.45 * np.exp(-((t - 0.72) ** 2) * 160),
    "scalloped": lambda t: 0.65 + 0.2 * np.abs(np.sin(np.pi * t)) + 0.09 * np.cos(9 * np.pi * t),
}
MARKS = ["eyes", "bands"]
BUTTERFLIES = [f"{wing} with {mark}" for wing in WINGS for mark in MARKS]


def butterfly(rng, label):
    """Draw a butterfly of a kind, turned and tilted, among petals and grass."""
    pixels = ground(rng)
    pixels = littered(rng, pixels, rng.integers(2, 6), (0.06, 0.25))
    size, angle, centre = rng.uniform(0.62, 0.85), rng.uniform(0, 2 * np.pi), rng.uniform(-0.12, 0.12, 2)
    lean = np.array([[rng.uniform(0.75, 1.05), rng.uniform(-0.15, 0.15)], [rng.uniform(-0.15, 0.15), 1]])

    def placed(points):
        return turned(points @ lean * size, angle) + centre

    way = np.linspace(-0.97, 0.97, 60)
    radius = WINGS[list(WINGS)[label // len(MARKS)]](way) * rng.uniform(0.96, 1.04, 60)
    right = radius[:, None] * np.stack([np.cos(way * np.pi / 2), np.sin(way * np.pi / 2)], axis=1)
    wing = contrasting(rng, pixels.mean((0, 1)), 0.2)
    mark = contrasting(rng, wing, 0.25)
    for side in (np.array([1, 1]), np.array([-1, 1])):
        mask = filled(placed(right * side))
        pixels = mixed(mask, wing * (1 + rng.uniform(0, 0.4) * (clouds(rng, 7) - 0.5))[..., None], pixels)
        if MARKS[label % len(MARKS)] == "eyes":
            for place in ((0.45, -0.32), (0.42, 0.34)):
                eye = ellipse(0.15, 0.15) * rng.uniform(0.8, 1.2) + np.array(place)
                pixels = mixed(filled(placed(eye * side)) * mask, mark, pixels)
        else:
            for part in (0.45, 0.72):
                pixels = mixed(stroked([placed(right[4:-4] * part * side)], rng.uniform(2, 3)) * mask, mark, pixels)
    body = filled(placed(ellipse(0.07, rng.uniform(0.4, 0.5))))
    return finished(rng, mixed(body, wing * 0.3, pixels))


# ---- land from above: what is it used for?


def _houses(u, v, rng):
    inside = np.maximum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)) < rng.uniform(0.2, 0.3)
    return inside * (0.6 + 0.4 * (u % 1 > 0.5))


def _orchard(u, v, rng):
    return soft(2 - 6 * np.hypot(u % 1 - 0.5, v % 1 - 0.5) + clouds(rng, 24) - 0.5, rng)


def _forest(u, v, rng):
    nearest, _ = points_near(rng, 1.6 * u, 1.6 * v)
    return np.clip(1 - 1.2 * nearest, 0, 1)


def _ponds(u, v, rng):
    nearest, _ = points_near(rng, u / 1.6, v / 1.6)
    return nearest + 0.3 * (clouds(rng, 9) - 0.5) < 0.32


def _parcels(u, v, rng):
    """Fields side by side, each of one brightness."""
    across = np.floor(u / 1.1).astype(int)
    along = np.floor(v / 1.5 + 0.4 * (across % 2)).astype(int)
    return rng.random((9, 9))[across % 9, along % 9]


def _road(u, v, rng):
    middle = u - u.mean() + rng.uniform(0.2, 0.5) * np.sin(v)
    return (np.abs(middle) < rng.uniform(0.3, 0.45)) * np.where(np.abs(middle) < 0.07, 0.3, 1)


LAND = {
    "fields": _parcels,
    "forest": _forest,
    "houses": _houses,
    "orchard": _orchard,
    "ploughed": lambda u, v, rng: soft(np.sin(3 * np.pi * u), rng),
    "ponds": _ponds,
    "road": _road,
    "terraces": lambda u, v, rng: soft(np.sin(2.5 * np.pi * (u + 2 * clouds(rng, 3))), rng),
}


def land(rng, label):
    """Draw land of one use from above, in any direction and light, with some trees and a thin cloud."""
    angle, often = rng.uniform(0, 2 * np.pi), rng.uniform(1.8, 3.6)
    bent = [axis + rng.uniform(0, 0.15) * (clouds(rng, 4) - 0.5) for axis in (X, Y)]
    u, v = (turned(np.stack(bent, axis=-1).reshape(-1, 2), angle).T * often).reshape(2, SIDE, SIDE)
    height = np.clip(list(LAND.values())[label](u + 50, v + 50, rng), 0, 1).astype(float)
    soil = colour(rng, (0.2, 0.6), (0.3, 0.8))
    rough = soil * (1 + rng.uniform(0.1, 0.6) * (clouds(rng, 14) - 0.5))[..., None]
    pixels = mixed(height * rng.uniform(0.45, 0.95), contrasting(rng, soil, 0.15), rough)
    for _ in range(rng.integers(0, 7)):
        tree = ellipse(*rng.uniform(0.04, 0.1, 2)) + rng.uniform(-1, 1, 2)
        pixels = mixed(filled(tree) * rng.uniform(0.5, 1), colour(rng, value=(0.15, 0.5)), pixels)
    haze = np.clip(clouds(rng, 3) - rng.uniform(0.5, 0.9), 0, 1)
    image = finished(rng, mixed(haze, np.ones(3), pixels), noise=0.08)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))


# ---- two things: where is the disc, seen from the frame?

SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1), "inside": (0, 0)}


def two_things(rng, label):
    """Return the centre (2,) of the frame and its half width, and the centre of the disc and its radius."""
    half, radius = rng.uniform(0.26, 0.36), rng.uniform(0.13, 0.18)
    way = np.array(list(SIDES.values())[label])
    aside = rng.uniform(-0.25, 0.25) if way.any() else 0.0
    apart = way * (half + radius + rng.uniform(0.08, 0.4)) + way[::-1] * aside
    jitter = 0 if way.any() else rng.uniform(-0.07, 0.07, 2)
    room = 0.95 - half - np.abs(apart) / 2
    frame = rng.uniform(-1, 1, 2) * np.clip(room, 0, 0.4) - apart / 2
    return frame, half, frame + apart + jitter, radius


def relation(rng, label):
    """Draw a frame and a disc at one of five places from it, among strokes and specks."""
    pixels = ground(rng)
    for _ in range(rng.integers(1, 5)):
        line = np.cumsum(rng.normal(0, 0.2, (3, 2)), axis=0) + rng.uniform(-1, 1, 2)
        pixels = mixed(stroked([line], rng.uniform(1, 3)) * rng.uniform(0.4, 1), colour(rng), pixels)
        speck = ellipse(*rng.uniform(0.03, 0.07, 2)) + rng.uniform(-1, 1, 2)
        pixels = mixed(filled(speck), colour(rng), pixels)
    frame, half, disc, radius = two_things(rng, label)
    mean = pixels.mean((0, 1))
    outline = turned(_square(half), rng.uniform(-0.3, 0.3)) + frame
    line = stroked([np.concatenate([outline, outline[:2]])], rng.uniform(2, 3.5))
    pixels = mixed(line, contrasting(rng, mean, 0.25), pixels)
    return finished(rng, mixed(filled(ellipse(radius, radius) + disc), contrasting(rng, mean, 0.25), pixels))


# ---- nine discs: where is the largest?

PLACES = [f"{row} {column}" for row in ("upper", "middle", "lower") for column in ("left", "centre", "right")]


def nine(rng, label):
    """Return the radii (9,) and the centres (9, 2) of discs in three rows; that of the label is the largest."""
    radii = rng.uniform(0.07, 0.13, 9)
    radii[label] = rng.uniform(0.24, 0.3)
    grid = np.stack(np.meshgrid([-0.58, 0, 0.58], [-0.58, 0, 0.58]), axis=-1).reshape(9, 2)
    return radii, grid + rng.uniform(-0.06, 0.06, (9, 2)) + rng.uniform(-0.1, 0.1, 2)


def discs(rng, label):
    """Draw nine discs of any colour, of which one is the largest, with strips over them."""
    pixels = ground(rng)
    mean = pixels.mean((0, 1))
    for radius, centre in zip(*nine(rng, label), strict=True):
        shape = turned(ellipse(radius * rng.uniform(0.9, 1.1), radius), rng.uniform(0, np.pi)) + centre
        pixels = mixed(filled(shape) * rng.uniform(0.7, 1), contrasting(rng, mean, 0.15), pixels)
    for _ in range(rng.integers(2, 6)):
        line = np.cumsum(rng.normal(0, 0.4, (3, 2)), axis=0) + rng.uniform(-1, 1, 2)
        pixels = mixed(stroked([line], rng.uniform(1, 3)), colour(rng), pixels)
    return finished(rng, pixels, noise=0.08)
