"""One run of a sweep: train as ``fit`` does, measure with one pass, append the line, in a run folder of its own."""

import contextlib
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from dynadapter.bench.timing import machine
from dynadapter.calibrate import policy_for
from dynadapter.cli.app import DynCLI
from dynadapter.cli.errors import Mistake, one_line
from dynadapter.cli.record import git_state, now
from dynadapter.cli.resume import to_resume
from dynadapter.cli.sweep_file import SweepFile
from dynadapter.cost import exit_costs
from dynadapter.exits.policies import Policy
from dynadapter.spec import restore
from dynadapter.sweep import lines
from dynadapter.sweep.measure import measure
from dynadapter.sweep.plan import FINAL, SEARCH, Unit, as_dict
from dynadapter.training.callbacks.stacked_logits import StackedLogits

PACKAGES = ("dynadapter", "torch", "lightning", "timm")


def run_folder(file: SweepFile, unit: Unit) -> Path:
    """Return the folder of a run."""
    return file.out / "runs" / unit.name


def run_unit(file: SweepFile, unit: Unit) -> bool:
    """Do one run, unless it is finished or another process does it.

    Args:
        file: The sweep.
        unit: The run; a final one needs the line of its train800 twin.

    Returns:
        Whether it was done here.
    """
    folder = run_folder(file, unit)
    with lines.claim(folder) as mine:
        if not mine:
            return False
        done = lines.read(file.out)
        if unit in done:
            return False
        lines.append(file.out, measured(file, unit, folder, done))
        return True


def measured(file: SweepFile, unit: Unit, folder: Path, done: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    """Train and measure; return the line, without appending it.

    Args:
        file: The sweep.
        unit: The run.
        folder: Its folder; an interrupted training in it is continued.
        done: The finished runs.
    """
    line: dict[str, Any] = {
        "run": as_dict(unit),
        "group": file.sweep.tasks[unit.task],
        "configs": [one if isinstance(one, dict) else one.stem for one in file.layers[unit.adapter, unit.recipe]],
    }
    if unit.split == FINAL and "failed" in done[file.sweep.twin(unit)]:
        return {**line, "failed": "its train800 run failed, so there are no thresholds to take over", **_about()}
    start = time.perf_counter()
    with _quietly(folder / "log.txt"):
        try:
            trained = _fit(file, unit, folder)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            return {**line, "failed": one_line(error), **_about()}
        seconds = time.perf_counter() - start
        line |= _results(file, unit, folder, trained, done)
    line["seconds"] = {"training": round(seconds, 2), "all": round(time.perf_counter() - start, 2)}
    line["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return line | _about()


def _about() -> dict[str, Any]:
    """Return the machine with its versions, the state of the code, and the time."""
    return {"machine": machine(PACKAGES), "git": git_state(), "time": now()}


# ---- training


def _fit(file: SweepFile, unit: Unit, folder: Path) -> DynCLI:
    """Train as ``dynadapter fit`` does, from the newest checkpoint that an interrupted training left."""
    left = sorted(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    for run in reversed(left):
        with contextlib.suppress(Mistake, ValueError):  # nothing to continue: train from the start
            to_resume(str(run), nothing_new=False)
            return DynCLI(["fit", f"--resume={run}", *_changes(file, unit, folder)])
    for run in left:
        shutil.rmtree(run)
    return DynCLI(["fit", *_configs(file, unit, folder), *_changes(file, unit, folder)])


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
    """Return the settings of a run that lie over all config files."""
    values = {
        "seed_everything": unit.seed,
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
    """Write what a training prints and warns of to a file instead, and leave out Lightning's remarks."""
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


def _results(
    file: SweepFile, unit: Unit, folder: Path, trained: DynCLI, done: dict[Unit, dict[str, Any]]
) -> dict[str, Any]:
    """Run the split of a unit through the network once, calibrate or take over the policy, and pack the predictions."""
    trainer, model, data = trained.trainer, trained.model, trained.datamodule
    stacked = StackedLogits()
    trainer.callbacks.append(stacked)  # type: ignore[attr-defined]
    trainer.limit_val_batches = 1.0
    split: Literal["val", "test"] = "test" if unit.split == FINAL else "val"
    evaluate = trainer.test if split == "test" else trainer.validate
    evaluate(model, datamodule=data, verbose=False)
    logits, targets = stacked.logits, stacked.targets
    costs = exit_costs(model.net, data.image_size)
    macs, static = list(costs.macs), costs.static
    twin = None
    if unit.split == SEARCH:
        policy = policy_for(file.sweep.goal, logits, targets, macs, static)
    else:
        twin = file.sweep.twin(unit)
        policy = restore(done[twin]["policy"]["policy"], Policy)
    results, exit_index = measure(policy, logits, targets, macs, static, costs.exit_depths)
    results["policy"]["calibrated_on"] = (twin or unit).name
    places = {str(source): place for place, (source, _) in enumerate(data.samples(split))}
    files = torch.tensor([places[str(source)] for source, _ in data.dataset(split).samples])
    lines.pack(folder, logits, targets, files, exit_index)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    measured_on = "test" if unit.split == FINAL else "val200"
    about = {"trainable": trainable, "steps": trainer.global_step, "batch_size": data.batch_size}
    return {"measured_on": measured_on, **results, **about}


def remove_lost(file: SweepFile) -> None:
    """Remove the checkpoints of finished runs whose scale lost."""
    for unit in file.sweep.lost(lines.read(file.out)):
        for place in run_folder(file, unit).glob("version_*/checkpoints"):
            shutil.rmtree(place, ignore_errors=True)
