"""Compare the epochs of the product's training with those of the second trainer in learning.py, in one run.

    python benchmarks/fast_path.py

Both train `micro` with LoRA of rank 8 and exits every 3 blocks on 800 random images of 48 pixels, in batches of 64, on
one thread. They alternate epoch by epoch: the second trainer runs an epoch whenever Lightning starts one. The product's
time is the whole of Lightning's epoch, callbacks and CSV logger included, without validation and saving. A round gives
the ratio of the medians of epochs 2 to 6, of wall time and of the process's CPU time, which other programs on the
machine disturb less. The result is one JSON line a recipe.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import timm
import torch
from learning import BackboneFile, Fit, Protocol, Task, build, normalized
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from recipes import Recipe

import dynadapter
from dynadapter import (
    BidirectionalSparsity,
    Constant,
    EarlyToLate,
    ExitClassifier,
    ExitWeights,
    LinearHeads,
    LinearInDepth,
    LoRA,
    VTAB1k,
)
from dynadapter.bench.timing import cpu_name

MICRO = Path(dynadapter.__file__).parent / "backbones" / "weights" / "micro.json"
IMAGES, SIZE, CLASSES, BATCH, EPOCHS = 800, 48, 10, 64, 6

PLAIN = Recipe(heads=LinearHeads(), weighting=LinearInDepth(), shallow=None, keep=Constant(1.0))
SPARSE = Recipe(heads=LinearHeads(), weighting=EarlyToLate(), shallow=Constant(0.2), keep=Constant(0.9))
RECIPES = {"plain": PLAIN, "sparse": SPARSE}


def draw_images(root: Path) -> None:
    """Write a task of random images in the layout of VTAB-1k."""
    random = np.random.default_rng(0)
    folder = root / "random"
    folder.mkdir()
    lines = []
    for index in range(IMAGES):
        pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(f"{index}.png {index % CLASSES}\n")
    (folder / "train800.txt").write_text("".join(lines))
    (folder / "val200.txt").write_text(lines[0])  # never read
    (folder / "classes.txt").write_text("".join(f"class{k}\n" for k in range(CLASSES)))


def second_trainer(root: Path, recipe: Recipe) -> Fit:
    """Build the second trainer on the images."""
    backbone = BackboneFile.read(MICRO)
    preprocess = replace(backbone.preprocess, image_size=SIZE)
    images = Task(root, "random", preprocess).split("train800")
    net = build(backbone, CLASSES, "lora", recipe, 1.0, 0)
    pixels = normalized(images, preprocess, torch.device("cpu"))
    return Fit(net, recipe, pixels, images.targets, Protocol(epochs=EPOCHS + 1, batch=BATCH), 0)


def clocks() -> np.ndarray:
    """Return wall time and the process's CPU time in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class Alternate(Callback):
    """Run an epoch of the second trainer before each epoch of the product, and time both."""

    def __init__(self, second: Fit) -> None:
        self.second = second
        self.product_times: list[np.ndarray] = []
        self.second_times: list[np.ndarray] = []
        self._start: np.ndarray | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = clocks()
        if self._start is not None:
            self.product_times.append(now - self._start)
        for _ in range(IMAGES // BATCH):
            self.second.step()
        self._start = clocks()
        self.second_times.append(self._start - now)


def one_round(root: Path, recipe: Recipe, logs: Path) -> np.ndarray:
    """Train both for six epochs; return median seconds of epochs 2 to 6: (product, second trainer) x (wall, CPU)."""
    torch.manual_seed(0)
    model = ExitClassifier(CLASSES, "micro", image_size=SIZE, adapter=LoRA(rank=8), heads=recipe.heads, every=3)
    data = VTAB1k(root, "random", image_size=SIZE, normalization="half", batch_size=BATCH, cache=True)
    alternate = Alternate(second_trainer(root, recipe))
    callbacks: list[Callback] = [ExitWeights(recipe.weighting)]
    if recipe.shallow is not None:
        callbacks.append(BidirectionalSparsity(recipe.shallow, recipe.deep, recipe.keep))
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "limit_val_batches": 0, "log_every_n_steps": 10}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS + 1,  # the start of the seventh ends the sixth
        logger=CSVLogger(logs),
        callbacks=[*callbacks, alternate],
        **options,
    )
    trainer.fit(model, datamodule=data)
    return np.median([alternate.product_times[1:EPOCHS], alternate.second_times[1:EPOCHS]], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each recipe")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fast_path.jsonl")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_images(root)
        rounds: dict[str, list[np.ndarray]] = {name: [] for name in RECIPES}
        for _ in range(args.rounds):
            for name, recipe in RECIPES.items():
                rounds[name].append(one_round(root, recipe, root / "logs"))
                product, second = rounds[name][-1]
                print(f"{name}: {product} and {second} s (wall, CPU), ratios {product / second}", flush=True)
    versions = {"torch": torch.__version__, "lightning": lightning.__version__, "timm": timm.__version__}
    with args.out.open("a", encoding="utf-8") as file:
        for name, times in rounds.items():
            seconds = np.array(times)  # (rounds, trainers, clocks)
            ratios = seconds[:, 0] / seconds[:, 1]
            wall, cpu = np.median(ratios, axis=0).round(4).tolist()
            line = {
                "recipe": name,
                "wall_ratio": wall,
                "cpu_ratio": cpu,
                "wall_ratios": ratios[:, 0].round(4).tolist(),
                "cpu_ratios": ratios[:, 1].round(4).tolist(),
                "product_seconds": seconds[:, 0].round(4).tolist(),
                "second_trainer_seconds": seconds[:, 1].round(4).tolist(),
                "cpu": cpu_name(),
                "threads": 1,
                "load_average": [round(load, 2) for load in os.getloadavg()],
                "versions": versions,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
