"""Drawn images of 64 x 64 pixels in space: ellipsoids on a floor, with light and shadow, by casting a ray a pixel.

A function takes a random generator and a class and returns the image; the generator alone decides what is drawn.
Points are (x, y, z): y is up, the floor is y = 0.
"""

import numpy as np
from drawing import SIDE, clouds, colour, contrasting, finished

RAYS = 2 * SIDE
"""Rays on each side of the image; the picture is reduced afterwards."""


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def rays(pitch, wide):
    """Return directions (rays, 3) of a camera that looks along z, tilted down by `pitch`, with a slope up to `wide`."""
    y, x = (np.mgrid[:RAYS, :RAYS] + 0.5) / RAYS * 2 * wide - wide
    ahead, cos, sin = np.ones_like(x), np.cos(pitch), np.sin(pitch)
    return unit(np.stack([x, -y * cos - ahead * sin, ahead * cos - y * sin], axis=-1).reshape(-1, 3))


def cast(origins, directions, centres, radii):
    """Return the distance (rays,) to the nearest ellipsoid that a ray meets, infinity for none, and its index."""
    widths, shifts = (1 / radii**2).T, (centres / radii**2).T
    a = directions**2 @ widths
    b = (origins * directions) @ widths - directions @ shifts
    c = origins**2 @ widths - 2 * origins @ shifts + (centres**2 / radii**2).sum(1) - 1
    root = b * b - a * c
    distance = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
    distance = np.where(distance > 1e-6, distance, np.inf)
    return distance.min(1), distance.argmin(1)


def render(rng, eye, directions, centres, radii, colours, turn=None):
    """Render ellipsoids on a floor: centres, radii and colours are (ellipsoids, 3); `turn` rotates camera and light."""
    light = unit(np.array([rng.uniform(-0.8, 0.8), 1.2, rng.uniform(-0.8, 0.3)]))
    if turn is not None:
        eye, directions, light = eye @ turn, directions @ turn, light @ turn
    origins = np.broadcast_to(eye, directions.shape)
    distance, index = cast(origins, directions, centres, radii)
    floor = np.where(directions[:, 1] < -1e-3, -eye[1] / np.minimum(directions[:, 1], -1e-3), np.inf)
    first = colour(rng, saturation=(0, 0.5), value=(0.4, 0.8))
    grain = np.stack([np.kron(clouds(rng, 7), np.ones((2, 2))).ravel()] * 3, axis=-1)
    pixels = np.where(np.isfinite(floor)[:, None], first * (0.7 + 0.5 * grain), colour(rng, (0, 0.4), (0.5, 1)))

    ground = np.isfinite(floor) & (floor < distance)
    spots = origins[ground] + directions[ground] * floor[ground, None]
    shade, _ = cast(spots, np.broadcast_to(light, spots.shape), centres, radii)
    pixels[ground] *= np.where(np.isfinite(shade), 0.45, 1)[:, None]

    hit = np.isfinite(distance) & ~ground
    spots, which = origins[hit] + directions[hit] * distance[hit, None], index[hit]
    normal = unit((spots - centres[which]) / radii[which] ** 2)
    facing = np.maximum(normal @ light, 0)
    shine = np.maximum((normal * unit(light - directions[hit])).sum(-1), 0) ** 40
    pixels[hit] = colours[which] * (0.3 + 0.7 * facing)[:, None] + rng.uniform(0, 0.6) * shine[:, None]
    return finished(rng, pixels.reshape(SIDE, 2, SIDE, 2, 3).mean((1, 3)))


# ---- how far is the nearest object?

DISTANCES = 6


def distance(rng, label):
    """Draw balls and eggs of two sizes on a floor; the nearest stands at one of six distances."""
    nearest = 2.6 + label + rng.uniform(0.1, 0.9)
    far = np.append(nearest, rng.uniform(min(nearest + 0.5, 9.4), 9.5, rng.integers(1, 6)))
    centres, radii = [], []
    for one in far:
        angle = rng.uniform(-0.42, 0.42)
        size = rng.choice([0.35, 0.6]) * rng.uniform(0.8, 1.2, 3)
        centre = np.array([one * np.sin(angle), size[1], one * np.cos(angle)])
        if all(
            np.hypot(*(centre - other)[::2]) > size.max() + before.max()
            for other, before in zip(centres, radii, strict=True)
        ):
            centres.append(centre)
            radii.append(size)
    colours = np.array([colour(rng, (0.4, 1), (0.4, 1)) for _ in centres])
    eye = np.array([0, rng.uniform(1.7, 2.3), 0])
    return render(rng, eye, rays(rng.uniform(0.2, 0.3), 0.55), np.array(centres), np.array(radii), colours)


# ---- from which side is the animal seen?

VIEWS = 12
ANIMAL = {  # centre and radii; it looks along x
    "body": ((0, 0.62, 0), (0.55, 0.26, 0.24)),
    "head": ((0.62, 0.98, 0), (0.21, 0.2, 0.17)),
    "neck": ((0.48, 0.8, 0), (0.16, 0.26, 0.13)),
    "snout": ((0.83, 0.92, 0), (0.15, 0.09, 0.09)),
    "tail": ((-0.68, 0.8, 0), (0.24, 0.06, 0.06)),
    **{f"ear {z}": ((0.55, 1.2, z), (0.05, 0.13, 0.06)) for z in (-0.12, 0.12)},
    **{f"leg {x} {z}": ((x, 0.25, z), (0.09, 0.3, 0.09)) for x in (-0.38, 0.38) for z in (-0.16, 0.16)},
}


def view(rng, label):
    """Draw a four-legged animal from one of twelve sides; each animal has its own proportions and colours."""
    centres, radii = (np.array([part[k] for part in ANIMAL.values()]) for k in (0, 1))
    radii = radii * rng.uniform(0.75, 1.35, radii.shape)
    stretch = rng.uniform(0.85, 1.2, 3)
    angle = 2 * np.pi * (label + rng.uniform(-0.4, 0.4)) / VIEWS
    first = colour(rng, (0.1, 0.8), (0.3, 1))
    colours = np.array([first if rng.random() < 0.6 else contrasting(rng, first, 0.1) for _ in ANIMAL])
    tilt, away = rng.uniform(0.2, 0.8), rng.uniform(3.2, 4.2)
    eye = np.array([rng.uniform(-0.3, 0.3), 0.6 + away * np.sin(tilt), -away * np.cos(tilt)])
    # Camera and light turn around the animal, whose ellipsoids keep to the axes
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    return render(rng, eye, rays(tilt, 0.36), centres * stretch, radii, colours, turn)
