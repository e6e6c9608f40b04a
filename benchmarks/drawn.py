"""Draws four tasks in the layout of VTAB-1k, to compare recipes on as many validation images as one likes.

    python benchmarks/drawn.py --out drawn
    python benchmarks/transfer.py --data drawn --backbone runs/micro/micro.json --phase search --out drawn.jsonl

200 validation images tell differences of seven points from chance, and 2000 of them tell two; and what is chosen here
has seen no test split of another task. ``train800.txt`` lists 800 images, ``val200.txt`` as many as ``--validation``
asks for (the name is the layout's), ``train800val200.txt`` the 800 and the first 200 of those, and ``test.txt`` others.

The same arguments draw the same images with the same version of Pillow, whose own font the letters have.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 64
"""Height and width of an image in pixels."""
FINER = 4
"""Drawn this many times larger, for smooth edges."""
SIDE = SIZE * FINER
CORNERS = {"triangle": 3, "square": 4, "hexagon": 6}
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789&?!@"

Color = tuple[int, int, int]
Points = list[tuple[float, float]]


# ---- parts of a picture ----------------------------------------------------------------------------------------------


def ground(rng: Random, rough: bool = False) -> tuple[Image.Image, Color]:
    """Draws a gradient, with coarse noise on it if it is to be rough; gives the colour where it begins, too."""
    start = np.array([rng.randint(20, 235) for _ in range(3)])
    change = np.array([rng.randint(-60, 60) for _ in range(3)])
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    along = math.cos(angle) * x + math.sin(angle) * y
    along = (along - along.min()) / np.ptp(along)
    pixels = start + change * along[..., None]
    if rough:
        coarse = np.random.default_rng(rng.getrandbits(32)).normal(128, 35, (8, 8, 3)).clip(0, 255).astype(np.uint8)
        pixels = pixels + np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) - 128.0
    red, green, blue = (int(value) for value in start)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), (red, green, blue)


def contrast(rng: Random, other: Color) -> Color:
    """Picks a colour that can be seen on another."""
    while True:
        color = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
        if sum(abs(a - b) for a, b in zip(color, other, strict=True)) > 150:
            return color


def turned(points: Points, x: float, y: float, angle: float) -> Points:
    """Turns points about zero and moves them."""
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in points]


def shape(kind: str, x: float, y: float, radius: float, angle: float, narrow: float) -> Points:
    """Gives the corners of a star or a polygon; the polygon is made narrow by a factor."""
    if kind == "star":
        spikes = [radius * (0.45 if i % 2 else 1.0) for i in range(10)]
        return turned(
            [(r * math.cos(i * math.pi / 5), r * math.sin(i * math.pi / 5)) for i, r in enumerate(spikes)], x, y, angle
        )
    corners = [2 * math.pi * i / CORNERS[kind] for i in range(CORNERS[kind])]
    return turned([(radius * math.cos(a), radius * narrow * math.sin(a)) for a in corners], x, y, angle)


# ---- the tasks -------------------------------------------------------------------------------------------------------


def count(rng: Random) -> tuple[Image.Image, int]:
    """How many shapes there are, 1 to 7, none over another."""
    wanted, (image, behind) = rng.randint(1, 7), ground(rng)
    draw, placed = ImageDraw.Draw(image), list[tuple[float, float, float]]()
    while len(placed) < wanted:
        radius = rng.uniform(3.5, 7) * FINER
        x, y = (rng.uniform(radius, SIDE - radius) for _ in range(2))
        if all(math.hypot(x - u, y - v) > radius + other + 2 * FINER for u, v, other in placed):
            placed.append((x, y, radius))
        elif rng.random() < 0.01:  # no room is left: begin anew
            placed.clear()
    for x, y, radius in placed:
        kind = rng.choice(("star", "triangle", "hexagon"))
        draw.polygon(shape(kind, x, y, radius, rng.uniform(0, 7), rng.uniform(0.6, 1)), fill=contrast(rng, behind))
    return image, wanted - 1


def position(rng: Random) -> tuple[Image.Image, int]:
    """How low a shape lies, in 12 steps, on a rough ground."""
    image, behind = ground(rng, rough=True)
    low, margin = rng.random(), 9 * FINER
    x, y = rng.uniform(margin, SIDE - margin), margin + low * (SIDE - 2 * margin)
    kind, radius = rng.choice(("star", *CORNERS)), rng.uniform(5, 9) * FINER
    points = shape(kind, x, y, radius, rng.uniform(0, 7), rng.uniform(0.6, 1))
    ImageDraw.Draw(image).polygon(points, fill=contrast(rng, behind))
    return image, int(low * 12)


def direction(rng: Random) -> tuple[Image.Image, int]:
    """Where an arrow points, in 12 steps of 30 degrees."""
    image, behind = ground(rng)
    turn, length = rng.random(), rng.uniform(10, 20) * FINER
    x, y = (rng.uniform(length, SIDE - length) for _ in range(2))
    w = length * rng.uniform(0.25, 0.5)
    upper = [(-length, -w / 2), (0.0, -w / 2), (0.0, -1.4 * w), (length, 0.0)]
    arrow = upper + [(u, -v) for u, v in reversed(upper[:-1])]
    ImageDraw.Draw(image).polygon(turned(arrow, x, y, 2 * math.pi * turn), fill=contrast(rng, behind))
    return image, int(turn * 12)


def letter(rng: Random) -> tuple[Image.Image, int]:
    """Which of 35 letters stands on a plate; blurred, dark or noisy."""
    index, (image, _) = rng.randrange(len(LETTERS)), ground(rng, rough=True)
    radius = rng.uniform(18, 28) * FINER
    x, y = (SIDE / 2 + rng.uniform(-4, 4) * FINER for _ in range(2))
    plate = rng.choice(((200, 30, 30), (30, 60, 180), (235, 235, 235), (240, 200, 40), (30, 130, 60)))
    draw, box = ImageDraw.Draw(image), (x - radius, y - radius, x + radius, y + radius)
    if rng.random() < 0.4:
        draw.rectangle(box, fill=plate)
    else:
        draw.ellipse(box, fill=plate)
    ink = Image.new("L", image.size, 0)
    font = ImageFont.load_default(radius * rng.uniform(1.0, 1.3))
    ImageDraw.Draw(ink).text((x, y), LETTERS[index], font=font, fill=255, anchor="mm")
    ink = ink.rotate(rng.uniform(-12, 12), center=(x, y), resample=Image.Resampling.BICUBIC)
    image.paste((250, 250, 250) if sum(plate) < 450 else (15, 15, 15), mask=ink)
    image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))
    light, noise = rng.uniform(0.3, 1.1), np.random.default_rng(rng.getrandbits(32)).normal(0, 6, (SIZE, SIZE, 3))
    return Image.fromarray((np.asarray(image) * light + noise).clip(0, 255).astype(np.uint8)), index


TASKS: dict[str, Callable[[Random], tuple[Image.Image, int]]] = {
    "drawn_count": count,
    "drawn_position": position,
    "drawn_direction": direction,
    "drawn_letter": letter,
}
"""What is drawn, by the folder's name: image and class index from a generator of random numbers."""


# ---- files -----------------------------------------------------------------------------------------------------------


def draw(root: Path, name: str, validation: int, test: int) -> None:
    """Draws a task into a folder; lists are written last, so a folder with lists is whole."""
    folder, lines = root / name, []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(800 + validation + test):
        image, label = TASKS[name](Random(f"{name} {i}"))
        image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(folder / f"images/{i:05d}.png")
        lines.append(f"images/{i:05d}.png {label}\n")
    train, rest = lines[:800], lines[800:]
    lists = {"train800": train, "val200": rest[:validation], "train800val200": lines[:1000], "test": rest[validation:]}
    for split, part in lists.items():
        (folder / f"{split}.txt").write_text("".join(part))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder for each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--validation", type=int, default=2000, help="validation images, at least 200")
    parser.add_argument("--test", type=int, default=200, help="test images, at least 1")
    args = parser.parse_args(argv)
    if args.validation < 200 or args.test < 1:
        parser.error("--validation must be at least 200 and --test at least 1")
    for name in args.tasks:
        if (args.out / name / "test.txt").exists():
            parser.error(f"{args.out / name} is there already; name another folder")
        draw(args.out, name, args.validation, args.test)
        print(f"{args.out / name}: {800 + args.validation + args.test} images")


if __name__ == "__main__":
    main()
