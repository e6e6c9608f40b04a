"""Write tasks whose test images nobody has looked at, and development tasks to choose a recipe with.

    python benchmarks/fresh.py --out TASKS [--tiny_imagenet FOLDER]
    python benchmarks/fresh.py --out OTHERS --drawing 1 --tasks leaves

Each task has the layout of VTAB-1k: 800 + 200 labelled images, and 2000 to 3100 test images, of 48 or 64 pixels. Names
of development tasks begin with ``dev_``: their test images may be read as often as needed. Those of the other tasks are
read once, when everything is chosen. The same versions of numpy and Pillow write the same bytes again. The second
command draws other images of a task, to look at them and to judge how difficult it is.

FOLDER holds mosaics of Tiny ImageNet (see tools/pretrain). Its last 20 classes make two tasks; ``tools.pretrain
--classes 180`` leaves them out. ``micro`` was trained on all 200 classes, on these very images, so the two tasks say
nothing about it. The handwritten digits are scikit-learn's; all else is drawn.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
import drawing
import scenes
import second
import third

from tools.pretrain.images import class_names, files_of, tiles

SIZES = {"train800": 800, "val200": 200}
HELD_OUT = 20
"""The last classes of Tiny ImageNet, which a pre-training with ``--classes 180`` does not see."""
TILE = 48

Images = Iterator[tuple[Image.Image, int]]


class Task(NamedTuple):
    """A task.

    Attributes:
        group: Its group in the tables.
        classes: Their names.
        images: Returns images and labels of a list, from its name and its length.
        test: Number of test images.
    """

    group: str
    classes: list[str]
    images: Callable[[str, int], Images]
    test: int = 2000


# ---- images and their labels


def draws(name: str, split: str, count: int, classes: int) -> Iterator[tuple[np.random.Generator, int]]:
    """Yield a generator and a label for each image of a list: classes in equal numbers, in a drawn order."""
    order = np.random.default_rng(list(f"{name} {split}".encode())).permutation(count)
    for index, place in enumerate(order):
        yield np.random.default_rng(list(f"{name} {split} {index}".encode())), int(place) % classes


def drawn(
    draw: Callable[[np.random.Generator, int], Image.Image], name: str, classes: int, split: str, count: int
) -> Images:
    """Draw the images of a list, each from its own random numbers."""
    for rng, label in draws(name, split, count, classes):
        yield draw(rng, label), label


def digits(name: str, split: str, count: int) -> Images:
    """Draw scikit-learn's digits; no handwritten digit is in two lists."""
    from sklearn.datasets import load_digits

    held = load_digits()
    for rng, label in draws(name, split, count, 10):
        own = held.images[held.target == label] / 16
        third, rest = len(own) // 3, len(own) // 9
        part = {"train800": own[:third], "val200": own[third : third + rest], "test": own[third + rest :]}[split]
        yield drawing.digit(rng, part[rng.integers(len(part))]), label


def photographs(folder: Path, names: list[str], split: str, count: int) -> Images:
    """Cut the mosaics of some classes into images, each of which is in one list; equal images are taken once."""
    start = {"train800": 0, "val200": SIZES["train800"], "test": sum(SIZES.values())}[split] // len(names)
    seen: set[bytes] = set()
    found = []
    for label, name in enumerate(names):
        parts = np.concatenate([tiles(files_of(folder / part, name)[0], TILE) for part in ("train", "val")])
        parts = [part for part in parts if not (part.tobytes() in seen or seen.add(part.tobytes()))]
        order = np.random.default_rng(list(name.encode())).permutation(len(parts))[start:]
        found += [(place, Image.fromarray(parts[k]), label) for place, k in enumerate(order)]
    found = sorted(found, key=lambda one: one[0])[:count]  # each class in turn
    for place in np.random.default_rng(list(f"{names[0]} {split}".encode())).permutation(len(found)):
        yield found[place][1:]


def tasks(tiny_imagenet: Path | None = None, drawing_of: int = 0) -> dict[str, Task]:
    """Return the tasks by name.

    Args:
        tiny_imagenet: Folder with its mosaics; without it there are no tasks of Tiny ImageNet.
        drawing_of: Random seed of the drawn images; 0 is that of the tasks.
    """

    def of(name: str, group: str, classes: list[str], draw: Callable) -> Task:
        key = f"{name} drawing {drawing_of}" if drawing_of else name
        return Task(group, classes, partial(drawn, draw, key, len(classes)))

    directions = [f"{360 * k // drawing.DIRECTIONS} degrees" for k in range(drawing.DIRECTIONS)]
    views = [f"{360 * k // scenes.VIEWS} degrees" for k in range(scenes.VIEWS)]
    distances = [f"{2.6 + k:.1f} to {3.6 + k:.1f}" for k in range(scenes.DISTANCES)]
    found = {
        "pointer_direction": of("pointer_direction", "Structured", directions, drawing.pointer),
        "scene_distance": of("scene_distance", "Structured", distances, scenes.distance),
        "textures": of("textures", "Specialized", list(drawing.TEXTURES), drawing.texture),
        "digits": Task("Specialized", [str(k) for k in range(10)], partial(digits, "digits")),
        "leaves": of("leaves", "Natural", list(second.LEAVES), second.leaf),
        "cell_division": of("cell_division", "Specialized", second.STAGES, second.cell),
        "chart_trend": of("chart_trend", "Structured", list(second.TRENDS), second.chart),
        "stacked_sheets": of("stacked_sheets", "Structured", [" on ".join(one) for one in second.ORDERS], second.stack),
        "butterflies": of("butterflies", "Natural", third.BUTTERFLIES, third.butterfly),
        "land_use": of("land_use", "Specialized", list(third.LAND), third.land),
        "disc_and_frame": of("disc_and_frame", "Structured", list(third.SIDES), third.relation),
        "largest_disc": of("largest_disc", "Structured", third.PLACES, third.discs),
        "dev_symbols": of("dev_symbols", "Specialized", list(drawing.SYMBOLS), drawing.symbol),
        "dev_view": of("dev_view", "Structured", views, scenes.view),
    }
    if tiny_imagenet is not None:
        words = dict(line.split("\t") for line in (tiny_imagenet / "classes.txt").read_text("utf-8").splitlines())
        held_out = class_names(tiny_imagenet)[-HELD_OUT:]
        for name, own in (("unseen10", held_out[1::2]), ("dev_unseen10", held_out[::2])):
            found[name] = Task(
                "Natural", [words[each] for each in own], partial(photographs, tiny_imagenet, own), test=3100
            )
    return found


# ---- the folder of a task


def write(folder: Path, task: Task, sizes: dict[str, int]) -> str:
    """Write a task, and return a hash of its lists and images."""
    lists, total = {}, hashlib.sha256()
    (folder / "images").mkdir(parents=True)
    for split, count in sizes.items():
        lines = []
        for index, (image, label) in enumerate(task.images(split, count)):
            name = f"images/{split}_{index:05d}.png"
            image.save(folder / name)
            lines.append(f"{name} {label}\n")
            total.update(lines[-1].encode() + image.tobytes())
        lists[split] = "".join(lines)
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, text in (lists | {"classes": "".join(f"{one}\n" for one in task.classes)}).items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return total.hexdigest()


def main(argv: list[str] | None = None) -> None:
    """Write all tasks that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks")
    parser.add_argument(
        "--tiny_imagenet", type=Path, help="folder with mosaics of 48 pixels, for the two natural tasks"
    )
    parser.add_argument("--tasks", nargs="+", help="write these alone")
    parser.add_argument("--tiny", action="store_true", help="some images of each task, to try the program")
    parser.add_argument("--drawing", type=int, default=0, help="draw other images than those of the tasks, which are 0")
    args = parser.parse_args(argv)
    known = tasks(args.tiny_imagenet, args.drawing)
    if unknown := sorted(set(args.tasks or ()) - known.keys()):
        parser.error(f"no task is named {unknown[0]}; there are {', '.join(known)} (unseen10 needs --tiny_imagenet)")
    for name in args.tasks or known:
        folder = args.out / name
        if folder.exists():
            print(f"{name}: {folder} is there")
            continue
        sizes = {**SIZES, "test": known[name].test}
        sizes = dict.fromkeys(sizes, 24) if args.tiny else sizes
        part = args.out / f"{name}.part"  # a stopped run leaves no half task
        shutil.rmtree(part, ignore_errors=True)
        hashed = write(part, known[name], sizes)
        part.rename(folder)
        print(f"{name}: {known[name].group}, {len(known[name].classes)} classes, sha256 {hashed}", flush=True)


if __name__ == "__main__":
    main()
