"""Pre-train a small ViT from scratch on a folder of images.

    python -m tools.pretrain --data tiny-imagenet-48 --arch micro --out runs/micro
    python -m tools.pretrain --data tiny-imagenet-48 --arch micro --out runs/micro --minutes 150 --patch_drop 0.5

The first line is for a GPU (300 epochs), the second for a CPU: as many epochs as fit into the minutes. The same command
resumes a run that was stopped or killed. ``--data`` holds mosaics, or ``train/CLASS/*`` and ``val/CLASS/*`` (see
images.py). The whole set is kept on the device as bytes and augmented there batch by batch.

``--out`` gets ``checkpoint.pt``, ``log.jsonl`` (a line an epoch) and at the end NAME.safetensors (the averaged weights
in float16, under timm's names), NAME.json (architecture, recipe, accuracies, hashes, machine) and NAME.md (the card).
"""

import argparse
import contextlib
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from dynadapter.bench.timing import machine
from tools.pretrain.export import export
from tools.pretrain.images import read
from tools.pretrain.learner import Learner
from tools.pretrain.recipe import ARCHS, STRENGTHS, Recipe, make_recipe
from tools.pretrain.run import Run

TINY_IMAGENET = (
    "The images are Tiny ImageNet's, which come from ImageNet and are for non-commercial research and education. "
    "Whether weights trained on them are bound by that is unsettled, so use them for research."
)
UNKNOWN = "Look up under which terms the source's images may be used; they were not recorded with this run."


# ---- the command line


def positive(text: str) -> float:
    """Read a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def count(text: str) -> int:
    """Read a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="folder with train/ and val/")
    add("--out", required=True, help="folder for checkpoint, log and results")
    add("--arch", choices=ARCHS, default="micro", help="micro: 1.4 M parameters, tiny: 5.4 M, small: 9.5 M")
    add("--name", help="name of the resulting files; default: --arch")
    add("--classes", type=count, default=0, help="use the first so many classes only")
    add("--epochs", type=count, default=0, help="passes over the data; default on a GPU: 300")
    add("--minutes", type=positive, help="as many epochs as fit, at most --epochs; default on a CPU: 150")
    add("--augment", choices=STRENGTHS, help="default: full on a GPU, light on a CPU for few epochs")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the faster one")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--device", help="default: cuda where there is one")
    add("--threads", type=count, help="threads on a CPU; default: torch's")
    add("--save_every", type=positive, default=60, help="seconds between checkpoints (default: 60)")
    add("--stop_after", type=positive, default=math.inf, help="save and stop so many seconds after the start")
    add("--start", type=Path, help="start with these weights, an earlier run's .safetensors")
    add("--head", choices=("keep", "drop"), default="keep", help="keep or drop the classifier in the weight file")
    add("--source", help="name of the data on the card; default: the folder's")
    add("--licence", help="a sentence on the terms of the data, for the card")
    add("--measure", action="store_true", help="print the plan and its images/s, and do not train")
    group = parser.add_argument_group("recipe")
    for one in fields(Recipe):
        kind: Any = {"action": argparse.BooleanOptionalAction} if one.type is bool else {"type": one.type}
        group.add_argument(f"--{one.name}", default=None, **kind, help=one.metadata["help"])
    args = parser.parse_args(argv)
    args.name = args.name or args.arch
    folder = Path(args.data).resolve().name
    args.source = args.source or folder
    known = "tiny-imagenet" in f"{folder} {args.source}".lower().replace(" ", "-")
    args.licence = args.licence or (TINY_IMAGENET if known else UNKNOWN)
    return args


# ---- the program


@contextlib.contextmanager
def stopping(at: float) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether to stop: the time is over, or a signal came. A second signal kills."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caught: list[int] = []

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    for number in previous:
        signal.signal(number, catch)
    try:
        yield lambda: bool(caught) or time.monotonic() > at
    finally:
        restore()


def device_of(name: str | None) -> torch.device:
    """Return the named device, or a GPU where there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); leave it out") from None
    return device


def pretrain(args: argparse.Namespace) -> None:
    """Train or resume; write the results when all is done."""
    started, out = time.monotonic(), Path(args.out)
    device = device_of(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = make_recipe(args, device)
    train, val, names = read(args.data, recipe.size, args.classes)
    if recipe.batch > len(train):
        raise ValueError(f"--batch {recipe.batch} is more than the {len(train)} training images; give a smaller one")
    print(f"{len(train)} + {len(val)} images of {len(names)} classes, {time.monotonic() - started:.1f} s", flush=True)
    asked = {"precision": args.precision, "epochs": args.epochs, "minutes": args.minutes}
    if not (args.epochs or args.minutes):
        asked |= {"epochs": 300} if device.type != "cpu" else {"minutes": 150.0}
    data = {"classes": names, "images": [len(train), len(val)]}
    learner = Learner(recipe, len(names), device, args.compile, args.start)
    asked |= {"start": hashlib.sha256(args.start.read_bytes()).hexdigest() if args.start else None}
    run = Run(out, learner, train.to(device), val.to(device), {"recipe": asdict(recipe), "data": data, "asked": asked})
    run.begin()
    print(json.dumps({"plan": run.plan, "done": run.place.epoch, "machine": machine()}), flush=True)
    if args.measure:
        return
    with stopping(started + args.stop_after) as stop:
        if run.train_until(stop, args.save_every):
            export(run, args, names)
        else:
            print("stopped and saved; the same command resumes", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run the program; a user's mistake is one line and exit code 2."""
    args = arguments(argv)
    try:
        pretrain(args)
    except (ValueError, OSError) as error:
        print(f"pretrain: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
