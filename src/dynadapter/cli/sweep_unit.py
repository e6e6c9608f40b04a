"""One run of a sweep in its own folder: train as ``fit`` does, measure with one pass, and append the line."""

import contextlib
import logging
import math
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dynadapter.bench.timing import machine
from dynadapter.cli.app import DynCLI
from dynadapter.cli.errors import Mistake, one_line
from dynadapter.cli.record import described, git_state, now
from dynadapter.cli.resume import to_resume
from dynadapter.cli.sweep_file import SweepFile
from dynadapter.cost import exit_costs
from dynadapter.exits.policies import Policy
from dynadapter.sweep import lines
from dynadapter.sweep.measure import measure, measure_policy
from dynadapter.sweep.plan import FINAL, SEARCH, Arm, Line, Unit, as_dict, fingerprint
from dynadapter.training.callbacks.stacked_logits import StackedLogits

PACKAGES = ("dynadapter", "torch", "lightning", "timm")


def run_unit(file: SweepFile, unit: Unit) -> bool:
    """Execute one run, unless it is finished or another process executes it; return whether this call did."""
    folder = file.run_folder(unit)
    with lines.claim(folder) as mine:
        if not mine:
            return False
        done = file.done()
        if unit in done:
            return False
        former = file.trained().get(unit)
        line = measured(file, unit, folder, done) if former is None else remeasured(file, unit, folder, former, done)
        file.check({**done, unit: line})
        lines.append(file.out, line)
        return True


def measured(file: SweepFile, unit: Unit, folder: Path, done: Mapping[Unit, Line]) -> dict[str, Any]:
    """Train in a folder, or continue the training there, and measure; return the line, without appending it."""
    line: dict[str, Any] = {
        "run": as_dict(unit),
        "group": file.sweep.tasks[unit.task],
        "fresh": unit.task in file.sweep.fresh,
        **({"scale_from": source} if (source := file.sweep.scale_from.get(unit.recipe)) else {}),
        "configs": [one if isinstance(one, dict) else one.stem for one in file.layers[unit.adapter, unit.recipe]],
    }
    if unit.split == FINAL and "failed" in done[file.sweep.twin(unit)]:
        return {**line, "failed": "its train800 run failed, so there are no thresholds to take over", **_about()}
    if unit.split == FINAL:
        lines.require_logits(file.run_folder(file.sweep.twin(unit)))
    with _quietly(folder / "log.txt"):
        try:
            trained = _fit(file, unit, folder)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            return {**line, "failed": one_line(error), **_about()}
        if trained.learning.finding is not None:
            return {**line, "failed": trained.learning.finding, **_about()}
        seconds, start = trained.epochs.training, time.perf_counter()
        line |= _results(file, unit, folder, trained, done)
    means = [round(mean, 4) for mean in trained.learning.means]
    line["training_loss"] = {"first_epoch": means[0], "last_epoch": means[-1]}
    line["seconds"] = {"training": round(seconds, 2), "all": round(seconds + time.perf_counter() - start, 2)}
    line["seconds"] |= trained.epochs.medians()
    line["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return line | _about()


def _about() -> dict[str, Any]:
    """Return the machine with its versions, the state of the code, and the time."""
    return {"machine": machine(PACKAGES), "git": git_state(), "time": now()}


# ---- training


class EpochSeconds(Callback):
    """Time a training, and its epochs without validation, saving, start and end; a resumed training goes on counting.

    Args:
        begun: When this process began the training, by ``time.perf_counter``.
    """

    def __init__(self, begun: float) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._begun = begun
        self._start: tuple[float, float] | None = None

    @property
    def training(self) -> float:
        """Seconds of the training so far, and up to its last checkpoint in earlier processes."""
        return time.perf_counter() - self._begun

    def state_dict(self) -> dict[str, Any]:
        """Return the times so far."""
        return {"wall": list(self.wall), "cpu": list(self.cpu), "training": self.training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the times so far."""
        self.wall, self.cpu = ([float(value) for value in state_dict[name]] for name in ("wall", "cpu"))
        self._begun -= float(state_dict["training"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timers."""
        self._start = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the timers before the checkpoint is saved. An epoch in which the training was resumed is not counted."""
        if self._start is not None:
            self.wall.append(time.perf_counter() - self._start[0])
            self.cpu.append(time.process_time() - self._start[1])
            self._start = None

    def medians(self) -> dict[str, float]:
        """Return the median epoch in wall-clock and in CPU seconds of the process; the first one also decodes images.

        An epoch in which the training was interrupted does not count.
        """
        return {
            name: round(statistics.median(times[1:] or times), 4)
            for name, times in (("epoch", self.wall), ("epoch_cpu", self.cpu))
            if times
        }


class TimedCLI(DynCLI):
    """A training that is timed."""

    def __init__(self, args: list[str]) -> None:
        self.begun = time.perf_counter()
        super().__init__(args)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        self.epochs = EpochSeconds(self.begun)
        return super()._instantiate_trainer(config, [*callbacks, self.epochs])


def _fit(file: SweepFile, unit: Unit, folder: Path) -> TimedCLI:
    """Train as ``dynadapter fit`` does, from the newest checkpoint that an interrupted training left."""
    left = sorted(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    for run in reversed(left):
        try:
            to_resume(str(run), nothing_new=False)
        except (Mistake, ValueError):  # nothing to continue
            continue
        return TimedCLI(["fit", f"--resume={run}", *_changes(file, unit, folder)])
    for run in left:
        shutil.rmtree(run)
    return TimedCLI(["fit", *_configs(file, unit, folder), *_changes(file, unit, folder)])


def _configs(file: SweepFile, unit: Unit, folder: Path) -> list[str]:
    """Return the config files of a run; settings without a file are written into the run folder."""
    args = []
    for number, layer in enumerate(file.layers[unit.adapter, unit.recipe], start=1):
        path = layer
        if isinstance(layer, dict):
            path = folder / f"settings_{number}.yaml"
            path.write_text(yaml.safe_dump(layer, sort_keys=False), encoding="utf-8")
        args.append(f"--config={path}")
    return args


def _changes(file: SweepFile, unit: Unit, folder: Path) -> list[str]:
    """Return the settings of a run that override all config files."""
    values = {
        "seed_everything": unit.seed,
        "data.shots_seed": unit.seed,  # few shots: other seeds draw other images
        "model.adapter.scale": unit.scale,
        "data.root": file.root,
        "data.task": unit.task,
        "data.split": unit.split,
        "trainer.default_root_dir": folder,
        "trainer.devices": 1,
        "trainer.limit_val_batches": 0,  # the last epoch counts: measuring others would only cost time
        "trainer.check_val_every_n_epoch": 1,  # without validation images: a checkpoint after each epoch
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
        "early_exit": "null",
        "flops_report": "null",
    }
    return [f"--{name}={value}" for name, value in values.items()]


@contextlib.contextmanager
def _quietly(log: Path) -> Iterator[None]:
    """Redirect output and warnings of a training to a file, without Lightning's remarks."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with log.open("a", encoding="utf-8") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The number of training batches")  # small tasks
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- measuring


def _results(file: SweepFile, unit: Unit, folder: Path, trained: TimedCLI, done: Mapping[Unit, Line]) -> dict[str, Any]:
    """Run the split of a unit through the network once, calibrate, measure, and pack the results of each image."""
    trainer, model, data = trained.trainer, trained.model, trained.datamodule
    split: Literal["val", "test"] = "test" if unit.split == FINAL else "val"
    logits, targets, files = _evaluated(trained, split)
    costs = exit_costs(model.net, data.image_size)
    macs, static = list(costs.macs), costs.static
    if unit.recipe in file.sweep.scale_from:  # whose network has every block
        source = file.sweep.search(file.sweep.source(Arm(unit.task, unit.adapter, unit.recipe)))
        static = next(done[one]["static_macs"] for one in source if one.scale == unit.scale)
    lines.pack(folder, logits, targets, files)
    twin = file.run_folder(file.sweep.twin(unit)) if unit.split == FINAL else folder
    policies, about = _policies(file, unit, lines.unpack(twin), done, macs, static, {})
    results, images = measure(policies, logits, targets, macs, static, costs.exit_depths)
    results["policies"] = {name: results["policies"].get(name, {}) | about[name] for name in about}
    return {
        "measured_on": "test" if unit.split == FINAL else "val200",
        **results,
        "macs": macs,
        "static_macs": static,
        "images_hash": fingerprint(described(data, split)["hash"], files.tolist(), targets.tolist()),
        "per_image": lines.as_text(images),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.global_step,
        "steps_of_epoch": math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches),
        "batch_size": data.batch_size,
        "device": trainer.strategy.root_device.type,
    }


def _evaluated(trained: TimedCLI, split: Literal["val", "test"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (exits, images, classes), targets (images,) and places (images,) in the order of the list."""
    trainer, model, data = trained.trainer, trained.model, trained.datamodule
    stacked = StackedLogits()
    trainer.callbacks.append(stacked)  # type: ignore[attr-defined]
    trainer.limit_val_batches = 1.0
    evaluate = trainer.test if split == "test" else trainer.validate
    evaluate(model, datamodule=data, verbose=False)
    with data.own_classes():
        places = {str(source): place for place, (source, _) in enumerate(data.samples(split))}
    files = torch.tensor([places[str(source)] for source, _ in data.dataset(split).samples])
    order = files.argsort()
    return stacked.logits[:, order], stacked.targets[order], files[order]


def _policies(
    file: SweepFile,
    unit: Unit,
    val200: tuple[Tensor, Tensor],
    done: Mapping[Unit, Line],
    macs: Sequence[float],
    static: float,
    former: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, Policy], dict[str, dict[str, Any]]]:
    """Calibrate to every goal on logits and targets of val200, from this run or from the train800 twin of a final run.

    A goal that is in the run's former results with the same target is not calibrated again.

    Returns:
        The new policies by the name of their goal; and for each goal the run on which it was calibrated, its target and
        its result there, or the former result, or why the goal could not be reached.
    """
    sweep, (logits, targets) = file.sweep, val200
    last = (logits[-1].argmax(-1) == targets).double().mean().item()
    policies: dict[str, Policy] = {}
    about: dict[str, dict[str, Any]] = {}
    for goal in sweep.goals:
        accuracy = None
        if goal.reference not in (None, unit.recipe):
            if unit.split == SEARCH:
                continue  # the scale of the reference may not be chosen yet
            accuracy = sweep.reference_accuracy(unit, goal, done)
            if accuracy is None:
                about[goal.name] = {"unreached": goal.untrained}
                continue
        target = goal.target(last, accuracy)
        if former.get(goal.name, {}).get("target") == target:
            about[goal.name] = former[goal.name]
            continue
        try:
            policies[goal.name] = policy = goal.policy(logits, targets, macs, static, accuracy)
        except ValueError as error:
            if goal is sweep.goals[0]:
                raise
            about[goal.name] = {"unreached": one_line(error)}
            continue
        found = measure_policy(policy, logits, targets, macs, static)
        about[goal.name] = {
            "calibrated_on": sweep.twin(unit).name,
            "target": target,
            "val200": {name: found[name] for name in ("accuracy", "percent_of_static")},
        }
    return policies, about


def remeasured(file: SweepFile, unit: Unit, folder: Path, former: Line, done: Mapping[Unit, Line]) -> dict[str, Any]:
    """Return the line of a trained run with the policies of this sweep; new ones come from the logits in its folder.

    All else stays as it was measured: results of former goals, which other files may have, exits, times and versions.
    """
    if unit.split == FINAL:
        lines.require_logits(file.run_folder(file.sweep.twin(unit)))
    static = former["static_macs"]
    macs = former.get("macs") or [static * entry["percent_of_static"] / 100 for entry in former["exits"]]  # older lines
    val200 = lines.unpack(file.run_folder(file.sweep.twin(unit)) if unit.split == FINAL else folder)
    policies, about = _policies(file, unit, val200, done, macs, static, former["policies"])
    about |= {name: entry for name, entry in former["policies"].items() if name not in about}
    depths = [entry["after_block"] for entry in former["exits"]]
    results, images = measure(policies, *lines.unpack(folder), macs, static, depths)
    right, routed = lines.right_of(former)
    by_goal = {"exit_index": lines.exit_index_of(former), "routed": routed}
    for name, values in by_goal.items():
        values |= zip(policies, images[name], strict=True)
        images[name] = np.stack([values[goal] for goal in lines.reached(about)])
    return {
        **former,
        "policies": {name: results["policies"].get(name, {}) | about[name] for name in about},
        "per_image": lines.as_text(images | {"right": right}),
    }


def remove_lost(file: SweepFile) -> None:
    """Remove the checkpoints of finished runs at scales that were rejected; see :meth:`Sweep.lost`."""
    for unit in file.sweep.lost(file.done()):
        for place in file.run_folder(unit).glob("version_*/checkpoints"):
            shutil.rmtree(place, ignore_errors=True)
