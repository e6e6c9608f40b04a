"""A run's folder: the plan, the checkpoint, the log, and the training that continues from there."""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from dynadapter.files import replacing, write
from tools.pretrain.images import Images
from tools.pretrain.learner import Learner, accuracy
from tools.pretrain.recipe import WHOLE, Recipe

# ---- the plan


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_step(learner: Learner, train: Images, number: int) -> float:
    """Time training steps: the median of three rounds, or of fewer where they are long."""
    gpu, times = learner.device.type != "cpu", []
    count = learner.recipe.batch
    for _ in range(4):
        synchronize(learner.device)
        start = time.perf_counter()
        for _ in range(20 if gpu else 1):
            learner.step(train.pixels[:count], train.labels[:count], number)
        synchronize(learner.device)
        times.append((time.perf_counter() - start) / (20 if gpu else 1))
        if len(times) > 1 and sum(times) > 10:
            break
    return statistics.median(times[1:])  # the first round also compiles and allocates


def make_plan(learner: Learner, train: Images, val: Images, asked: dict[str, Any]) -> dict[str, Any]:
    """Time some steps, undo them, and fix precision and number of epochs.

    Returns:
        precision, epochs, steps (of an epoch) and what was measured.

    Raises:
        ValueError: If no epoch fits into the minutes.
    """
    before = copy.deepcopy(learner.state())
    auto = ["bf16"] if learner.device.type == "cuda" and torch.cuda.is_bf16_supported() else ["fp32", "bf16"]
    seconds = {}
    for precision in auto if asked["precision"] == "auto" else [asked["precision"]]:
        learner.schedule(precision, 1000)
        seconds[precision] = seconds_a_step(learner, train, number=100)
    precision = min(seconds, key=seconds.__getitem__)
    learner.schedule(precision, 1000)
    mean = seconds[precision]
    if learner.recipe.patch_drop:
        mean += WHOLE * (seconds_a_step(learner, train, number=999) - mean)
    start = time.perf_counter()
    accuracy(learner.model, val)
    evaluation = 2 * (time.perf_counter() - start)
    learner.load(before)
    steps = len(train) // learner.recipe.batch
    epoch = steps * mean + evaluation
    fitting = int(0.97 * 60 * asked["minutes"] / epoch) if asked["minutes"] else asked["epochs"]
    if fitting < 1:
        raise ValueError(f"--minutes {asked['minutes']} is too short: an epoch takes {epoch / 60:.1f} minutes")
    epochs = min(fitting, asked["epochs"] or fitting)
    rates = {kind: round(learner.recipe.batch / each, 1) for kind, each in seconds.items()}
    return {
        "precision": precision,
        "epochs": epochs,
        "steps": steps,
        "images_per_second": rates,
        "epoch_seconds": round(epoch, 2),
        "minutes": round(epochs * epoch / 60, 1),
    }


# ---- the run


@dataclass
class Place:
    """How far a run is: whole epochs, then steps of the epoch begun, the sum of their losses and their seconds."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    total_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """A folder with a checkpoint and a log, and the training that continues from there.

    Args:
        out: The folder.
        learner: What trains.
        train: Images to train on.
        val: Images to validate on.
        identity: What has to be the same when the run continues: recipe, data, and the given options.
    """

    def __init__(self, out: Path, learner: Learner, train: Images, val: Images, identity: dict[str, Any]) -> None:
        self.checkpoint, self.log = out / "checkpoint.pt", out / "log.jsonl"
        self.learner, self.train, self.val, self.identity = learner, train, val, identity
        self.plan: dict[str, Any] = {}
        self.place = Place()
        out.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Continue from the checkpoint, or make the plan.

        Raises:
            ValueError: If the checkpoint belongs to another run, or cannot be read.
        """
        if self.checkpoint.exists():
            try:
                held = torch.load(self.checkpoint, map_location=self.learner.device, weights_only=True)
            except Exception as error:  # torch, zipfile and pickle each have their own
                name = type(error).__name__
                raise ValueError(f"{self.checkpoint} cannot be read ({name}); delete it to start anew") from None
            self._check_identity(held["identity"])
            self.learner.load(held["learner"])
            self.plan, self.place = held["plan"], Place(**held["place"])
        else:
            self.plan = make_plan(self.learner, self.train, self.val, self.identity["asked"])
        self.learner.schedule(self.plan["precision"], self.plan["epochs"] * self.plan["steps"])
        self._write_log()

    def _check_identity(self, other: dict[str, Any]) -> None:
        """Raise ValueError where the checkpoint has another recipe, other data or another plan."""
        defaults = {one.name: one.default for one in fields(Recipe)}  # for options newer than the checkpoint
        for group, own in self.identity.items():
            for name, value in own.items():
                held = other[group].get(name, defaults.get(name))
                if held != value:
                    raise ValueError(
                        f"{str(self.checkpoint)!r} was begun with {name}={held!r:.60}, not {value!r:.60}; "
                        "give the options it was begun with to continue, or another --out"
                    )

    def train_until(self, stop: Callable[[], bool], save_every: float) -> bool:
        """Train until the plan is done (true) or ``stop()`` is true (false), and save.

        Args:
            stop: Called after every step.
            save_every: Seconds between checkpoints.
        """
        while self.place.epoch < self.plan["epochs"]:
            if not self._train_epoch(stop, save_every):
                return False
            self._end_epoch()
        self.save()
        return True

    def _train_epoch(self, stop: Callable[[], bool], save_every: float) -> bool:
        """Train to the end of the epoch; false if it was stopped before."""
        place, steps, learner = self.place, self.plan["steps"], self.learner
        batch, device = learner.recipe.batch, learner.device
        generator = torch.Generator().manual_seed(learner.recipe.seed * 1_000_003 + place.epoch)
        order = torch.randperm(len(self.train), generator=generator).to(device)
        before, started = place.seconds, time.monotonic()
        saved = started
        losses = torch.tensor(place.loss, dtype=torch.float64, device=device)
        while place.step < steps:
            index = order[place.step * batch : (place.step + 1) * batch]
            number = place.epoch * steps + place.step
            losses += learner.step(self.train.pixels[index], self.train.labels[index], number)
            place.step += 1
            halt = stop()
            if halt or time.monotonic() - saved > save_every:
                place.loss, place.seconds = float(losses), before + time.monotonic() - started
                self.save()
                saved = time.monotonic()
                speed = place.step * batch / place.seconds
                print(f"epoch {place.epoch + 1} step {place.step}/{steps}: {speed:.0f} images/s", flush=True)
                if halt:
                    return False
        place.loss, place.seconds = float(losses), before + time.monotonic() - started
        return True

    def _end_epoch(self) -> None:
        """Evaluate, write the epoch's line and go to the next."""
        place, learner, steps = self.place, self.learner, self.plan["steps"]
        self._check_finite()
        started = time.monotonic()
        found = {"val_acc": accuracy(learner.model, self.val), "val_acc_ema": accuracy(learner.ema.module, self.val)}
        place.total_seconds += place.seconds + time.monotonic() - started
        line = {
            "epoch": place.epoch + 1,
            "loss": round(place.loss / steps, 5),
            **{name: round(value, 5) for name, value in found.items()},
            "lr": round(learner.optimizers["adamw"].param_groups[0]["lr"], 7),
            "seconds": round(place.seconds, 2),
            "images_per_second": round(steps * learner.recipe.batch / place.seconds, 1),
            "total_minutes": round(place.total_seconds / 60, 2),
        }
        place.history.append(line)
        place.epoch, place.step, place.loss, place.seconds = place.epoch + 1, 0, 0.0, 0.0
        self._write_log()
        print(json.dumps(line), flush=True)

    def _check_finite(self) -> None:
        """Raise ValueError where the loss is not finite, so that no good checkpoint is overwritten."""
        if not math.isfinite(self.place.loss):
            raise ValueError(f"the loss is not finite in epoch {self.place.epoch + 1}; start anew with a lower --lr")

    def save(self) -> None:
        """Write the checkpoint, all of it or nothing."""
        self._check_finite()
        content = {"identity": self.identity, "plan": self.plan, "place": vars(self.place)}
        with replacing(self.checkpoint) as file:
            torch.save(content | {"learner": self.learner.state()}, file)

    def _write_log(self) -> None:
        """Write the lines of all finished epochs; epochs after the checkpoint of a killed run are run again."""
        write(self.log, "".join(json.dumps(line) + "\n" for line in self.place.history).encode())
