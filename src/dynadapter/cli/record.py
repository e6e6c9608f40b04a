"""``run.json``: settings, versions, machine, data and results of a run."""

import json
import os
import platform
import shlex
import subprocess
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynadapter import spec
from dynadapter.bench.timing import machine
from dynadapter.cli import imports
from dynadapter.cli.errors import one_line
from dynadapter.cli.resume import Earlier
from dynadapter.data import ImageData
from dynadapter.data.base import STAGES, Split
from dynadapter.files import write
from dynadapter.serve.formats import Unread, write_unread
from dynadapter.training.module import ExitClassifier

NAME = "run.json"
SKIPPED = "skipped.csv"
VALIDATION = "validation.txt"
PACKAGES = (
    "dynadapter",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "jsonargparse",
    "torchmetrics",
    "fvcore",
    "safetensors",
    "numpy",
    "pillow",
)
SCHEDULED = ("exit_weights/", "sparsity/")
"""Logged settings that a schedule changes; they are no results."""
PROGRAMS = r"^(filter|lfs\.extension)\..*\.(clean|process)$"
"""Settings of git whose programs read changed files."""


class Record(Callback):
    """Write ``run.json`` when a run begins, and complete it when it ends.

    ``how`` is ``finished``, ``stopped`` or ``failed``; null, like ``ended``, for a run that was killed.
    """

    def __init__(self, folder: Path, args: list[str], seed: int | bool, before: Earlier | None = None) -> None:
        self.path = folder / NAME
        lines = [] if before is None else before.lines
        here = machine(PACKAGES)
        self.skipped: dict[str, str] = {}
        self.earlier = {name: float(value) for line in lines for name, value in line.items()}
        self.content: dict[str, Any] = {
            "command": args[0],
            "command_line": shlex.join(["dynadapter", *args, *imports.given()]),
            "started": now(),
            "ended": None,
            "how": None,
            "message": None,
            "resumed_from": None if before is None else str(before.checkpoint.resolve()),
            "seed": None if seed is False else seed,
            "packages": {name: here.pop(name, None) for name in PACKAGES},
            "git": git_state(),
            "machine": here | {"system": platform.platform()},
            "results": {},
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add what is known when a stage begins, and write the file and the lists of images."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(pl_module, ExitClassifier) or not isinstance(data, ImageData):
            return
        if data.test_label == "test":
            self._describe(trainer, pl_module, data, stage)
        else:  # a further test set: settings and protocol are those of the first one
            self.content["data"]["splits"][data.test_label] = described(data, "test")
        self._write()
        self.skipped |= data.skipped
        write_unread(self.path.with_name(SKIPPED), [Unread(file, reason) for file, reason in self.skipped.items()])
        if stage == "fit":
            list_validation(self.path.with_name(VALIDATION), data)

    def _describe(self, trainer: Trainer, module: ExitClassifier, data: ImageData, stage: str) -> None:
        """Add model, trainer and data, with the splits of a stage."""
        self.content["backbone"] = {"name": module.backbone_name, "hash": module.backbone_hash}
        self.content["trainer"] = {
            "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
            "strategy": type(trainer.strategy).__name__,
            "processes": trainer.world_size,
            "precision": trainer.precision,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "global_batch_size": _global_batch_size(trainer, data),
        }
        splits = self.content.get("data", {}).get("splits", {})
        self.content["data"] = {
            "class": f"{type(data).__module__}.{type(data).__qualname__}",
            "settings": plain({name: value for name, value in data.hparams.items() if not name.startswith("_")}),
            "class_names": list(data.class_names),
            "splits": splits | {split: described(data, split) for split in STAGES.get(stage, ())},
        }
        self.content["protocol"] = protocol(trainer, module, data)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether the checkpoint that is measured is the best one of its training by a metric."""
        if trainer.state.fn == "fit" or "protocol" not in self.content:
            return
        for state in checkpoint["callbacks"].values():
            best = state.get("best_model_path") if isinstance(state, dict) else None
            if best and Path(str(best)).name == Path(str(trainer.ckpt_path)).name and state.get("monitor"):
                self.content["protocol"]["selection"] = one_line(f"best {state['monitor']} when it was saved")

    def end(self, trainer: Trainer, how: str, message: str | None = None) -> None:
        """Complete the file, if it was begun."""
        if not self.path.exists() or not trainer.is_global_zero:
            return
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        results = {**self.earlier, **self.content["results"], **logged}
        self.content["results"] = {
            name: value
            for name, value in results.items()
            if name not in ("epoch", "step") and not name.startswith(SCHEDULED)
        }
        self.content |= {"ended": now(), "how": how, "message": message and one_line(message)}
        try:
            self._write()
        except OSError:
            if how == "finished":  # else the run ends with an error already, maybe for this very reason
                raise

    def keep(self, trainer: Trainer) -> None:
        """Store the metrics logged so far, before another stage clears them."""
        self.content["results"] |= {name: float(value) for name, value in trainer.logged_metrics.items()}

    def _write(self) -> None:
        write(self.path, (json.dumps(plain(self.content), indent=2) + "\n").encode())


def list_validation(path: Path, data: ImageData) -> None:
    """Write a list of the validation images, relative to the data's folder; no list for images in memory."""
    folder = getattr(data, "folder", None)
    files = [Path(source) for source, _ in data.dataset("val").samples if isinstance(source, os.PathLike)]
    if files and folder is not None:
        lines = [Path(os.path.relpath(file, folder)).as_posix() + "\n" for file in files]
        write(path, "".join(lines).encode("utf-8", "surrogateescape"))


def now() -> str:
    """Return the time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """Convert a structure for JSON; infinite numbers, NaN and other objects become text."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def git_state() -> dict[str, Any] | None:
    """Return the commit of the repository around the current folder, and whether tracked files differ from it.

    Submodules are not compared.

    Returns:
        ``{commit, dirty}``, or None if there is no repository, no commit or no git. ``dirty`` is None if the
        repository's settings name a program that the comparison would run, or if git cannot compare.
    """
    try:
        commit = _git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    try:
        named = _git("config", "--show-scope", "--includes", "--name-only", "--get-regexp", PROGRAMS, codes=(0, 1))
        if any(not line.startswith(("system", "global")) for line in named.splitlines()):
            return {"commit": commit, "dirty": None}
        changes = _git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):  # git before 2.26 does not tell whose they are
        return {"commit": commit, "dirty": None}
    return {"commit": commit, "dirty": bool(changes.strip())}


def _git(*args: str, codes: tuple[int, ...] = (0,)) -> str:
    """Return the output of git, without the programs that a repository's own settings can name."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *args]
    no_fetch = {**os.environ, "GIT_ALLOW_PROTOCOL": ""}  # git status fetches missing objects, by such a program
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=no_fetch)
    if done.returncode not in codes:
        raise subprocess.SubprocessError
    return done.stdout


def described(data: ImageData, split: Split) -> dict[str, Any]:
    """Return the number of images of a split, in total and by class, and their hash."""
    samples = data.dataset(split).samples
    count = Counter(label for _, label in samples)
    names = data.class_names
    classes = {names[k]: count[k] for k in range(len(names))}
    return {"images": len(samples), "classes": classes, "hash": hash_of(samples)}


def hash_of(samples: Any) -> str | None:
    """Return the hash of pairs of an image and a label; None if they are too large, or one cannot be read."""
    try:
        from dynadapter.data.identity import HASHED_BYTES, data_hash, size_of

        if sum(size_of(source) for source, _ in samples) > HASHED_BYTES:
            return None
        return data_hash(samples)
    except (ImportError, OSError):  # an image that cannot be read is named when it is needed
        return None


def protocol(trainer: Trainer, module: ExitClassifier, data: ImageData) -> dict[str, Any]:
    """Return the protocol: how images are read, and on which split choices were made."""
    chosen = ("task", "split", "val_fraction", "split_seed", "shots", "shots_seed")
    settings = {name: data.hparams[name] for name in chosen if name in data.hparams}
    return {
        "backbone": module.backbone_name,
        "preprocessing": data.preprocessing,
        "augment": spec.plain(data.augment),
        "data": settings,
        "epochs": trainer.max_epochs,
        "steps": None if trainer.max_steps == -1 else trainer.max_steps,
        "selection": "last epoch",  # a fit measures that; of a test see Record.on_load_checkpoint
    }


def _global_batch_size(trainer: Trainer, data: ImageData) -> int:
    """Return the images of a training step, over all processes and accumulated batches."""
    given = getattr(data, "global_batch_size", None)
    return given or data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
