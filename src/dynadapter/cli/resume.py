"""Continue an interrupted training so that the result equals that of an uninterrupted one."""

import inspect
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from dynadapter.cli import imports
from dynadapter.cli.configs import take
from dynadapter.cli.errors import Mistake, mistakes
from dynadapter.cli.layers import OFF, assignments, with_folders
from dynadapter.cli.runs import Metrics, is_first_process, is_numeric, read_lines
from dynadapter.cli.safety import check_run
from dynadapter.files import Busy, locked, write
from dynadapter.limits import read_json, read_yaml
from dynadapter.training.checkpoints import newest, read
from dynadapter.training.entries import ADVICE, TRAINING, require_entries

LINE = "dynadapter_line"
"""Key in a checkpoint: the line of ``metrics.csv`` that was about to be written when it was saved."""


# ---- from where ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Earlier:
    """The run that a training continues.

    Args:
        checkpoint: The file.
        step: Number of optimiser steps in it.
        lines: The lines of the run's ``metrics.csv`` up to that step.
    """

    checkpoint: Path
    step: int
    lines: list[dict[str, str]] = field(default_factory=list)


class ToResume(NamedTuple):
    """The files that ``--resume FOLDER`` refers to.

    Args:
        config: The run's config file.
        checkpoint: Its newest intact checkpoint; if it has none yet, the checkpoint from which it was resumed itself.
        log: The folder of the ``metrics.csv`` that belongs to that checkpoint.
    """

    config: Path
    checkpoint: Path
    log: Path


def resume_command(run: Path, settings: Mapping[str, Any]) -> str:
    """Return the command line that continues a run; it names the run's config if the settings need trust."""
    config = run / "config.yaml"
    try:
        check_run(config, settings, (), ())
    except Mistake:
        trusted = ["--config", str(config)]
    else:
        trusted = []
    return shlex.join(["dynadapter", "fit", "--resume", str(run), *trusted, *imports.given()])


class Resumed(NamedTuple):
    """A command line in which ``--resume FOLDER`` is replaced by the config and the checkpoint of that run.

    Args:
        files: Config files, that of the run first.
        rest: The other arguments.
        log: The folder with the ``metrics.csv`` to continue; None without a resume.
        layer: Settings above the run's config and below those of the user.
    """

    files: list[str]
    rest: list[str]
    log: Path | None = None
    layer: Mapping[str, Any] = MappingProxyType({})


def expand_resume(files: list[str], rest: list[str]) -> Resumed:
    """Replace ``--resume FOLDER``; all settings of the user override those of the run."""
    needs = "--resume needs a folder, such as runs/version_0"
    folders, left = take(rest, needs, "--resume")
    if not folders:
        return Resumed(files, rest)
    if len(folders) > 1 or any(arg.partition("=")[0] == "--ckpt_path" for arg in left):
        raise Mistake("--resume names the run and its checkpoint; give it once, and no --ckpt_path")
    if not (folder := os.path.expanduser(folders[0])):
        raise Mistake(needs)
    run = Path(folder)
    own = os.path.realpath(run / "config.yaml")  # given to trust it
    found = to_resume(folder, nothing_new=not left and all(os.path.realpath(file) == own for file in files))
    root = (run if run.name not in ("", "..") else run.resolve()).parent
    layer: dict[str, Any] = {"trainer": {"default_root_dir": str(root)}}
    data = read_yaml(found.config).get("data")
    if isinstance(data, dict) and "download" in (data.get("init_args") or {}):  # only the user lets data be fetched
        layer["data"] = {"class_path": data.get("class_path"), "init_args": {"download": False}}
    return Resumed([str(found.config), *files], [f"--ckpt_path={found.checkpoint}", *left], found.log, layer)


def to_resume(folder: str, nothing_new: bool) -> ToResume:
    """Find the config and the checkpoint that ``--resume FOLDER`` refers to.

    Args:
        folder: Folder of the run.
        nothing_new: Whether no other setting is given; then a finished run cannot be continued.
    """
    run = Path(folder)
    config = run / "config.yaml"
    if not run.is_dir():
        what = "is not a folder" if run.exists() else "does not exist"
        raise Mistake(f"--resume {folder} {what}; give the folder of a run{_newest_run(run.parent)}")
    if not config.is_file():
        runs = _newest_run(run)
        why = "is not the folder of a run" if runs else "holds no config.yaml: the run was killed before it began"
        raise Mistake(f"--resume {folder} {why}{runs or '; start again'}")
    _require_ended(run, run / "checkpoints")  # not yet a folder that an untrusted config names
    record = read_record(run)
    if nothing_new and record.get("how") == "finished":
        raise Mistake(f"{run} is finished, nothing is left to do; to train longer, add --trainer.max_epochs NUMBER")
    again = shlex.join(["dynadapter", "fit", "--config", str(config)])
    before = record.get("resumed_from")
    try:
        if found := newest(checkpoint_folder(run)):
            for path in found.damaged:
                _print_once(f"{path} is damaged and left out")
            return ToResume(config, found.path, run)
    except ValueError as error:
        if before is None:
            raise Mistake(f"{error}; remove them, and start again with: {again}") from error
    if before is None:
        raise Mistake(f"{run} was interrupted before it saved a checkpoint; start again with: {again}")
    if not Path(before).is_file():
        raise Mistake(f"{run} saved nothing of its own, and the checkpoint that it continued is missing: {before}")
    return ToResume(config, Path(before), Path(before).parent.parent)


def checkpoint_folder(run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    try:
        with mistakes():
            given = read_yaml(run / "config.yaml")["checkpoint"]["dirpath"]
    except (KeyError, TypeError):
        given = None
    return Path(given) if isinstance(given, str) and given else run / "checkpoints"


def _require_ended(run: Path, checkpoints: Path) -> None:
    """Refuse a run that is still running; further processes that Lightning starts for this command skip the check."""
    if not is_first_process():
        return
    try:
        with locked(checkpoints):
            pass
    except Busy as error:
        raise Mistake(f"{run} is still running: {str(error).rpartition(';')[0]}; wait for it or stop it") from error


def _newest_run(folder: Path) -> str:
    there = [path for path in folder.glob("version_*") if (path / "config.yaml").is_file()]
    there.sort(key=lambda path: int(path.name.removeprefix("version_")) if path.name[8:].isdecimal() else -1)
    return f", such as {there[-1]}" if there else ""


@rank_zero_only
def _print_once(line: str) -> None:
    print(line, flush=True)


def earlier_run(path: Path, log: Path | None = None, given: Sequence[str] = ()) -> Earlier:
    """Read the parts of the earlier run that a resumed training needs.

    Args:
        path: The checkpoint.
        log: The folder with the ``metrics.csv``; None if the checkpoint is in its run folder.
        given: The command line. An ``init_from`` on it is refused; one in the config of the run has had its effect.
    """
    if dict(assignments(given)).get("init_from", "null") not in OFF:
        raise Mistake(f"init_from starts a training, and this one continues from {path}; leave one of them out")
    run = with_folders(path).parent.parent
    _require_ended(run, path.parent)
    checkpoint = read(path)
    if "optimizer_states" not in checkpoint:
        raise Mistake(f"{path} holds only the trained part, without the optimiser's state; give last.ckpt to continue")
    with mistakes(f"{path}: "):
        require_entries(checkpoint, TRAINING)
    step = checkpoint["global_step"]
    file = (log or run) / "metrics.csv"
    lines = list(filter(is_numeric, read_lines(file))) if file.is_file() else []
    lines = [line for line in lines if float(line.get("step", "inf")) < step]
    line = checkpoint.get(LINE, {})
    pending = {str(key): str(value) for key, value in line.items()} if isinstance(line, dict) else {}
    if pending and is_numeric(pending) and pending not in lines:
        lines.append(pending)
    return Earlier(path, step, lines)


def read_record(run: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run; return an empty mapping if there is none."""
    try:
        record = read_json(run / "run.json")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


# ---- restore the training exactly ------------------------------------------------------------------------------------


class Continue(Callback):
    """Restore the state of a training exactly, in a new folder.

    Lightning restores the model, the optimiser and the progress of the loops. This callback adds the lines of
    ``metrics.csv`` and the best checkpoint so far, with which later ones are compared. It also corrects the progress
    that Lightning 2.6 restores one too high, and applies changed settings of the optimiser, which Lightning replaces by
    those of the checkpoint.
    """

    def __init__(self, before: Earlier | None) -> None:
        self.before = before
        self._groups: list[list[dict[str, Any]]] = []
        self._counted = before is None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the line that is about to be logged, because a training resumed from here will not log it."""
        if line := _pending_line(trainer):
            checkpoint[LINE] = line

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy lines and files into the new folder, and point ModelCheckpoint to them."""
        if self.before is None or trainer.state.fn != "fit":
            return
        for logger in trainer.loggers:
            if isinstance(logger, Metrics):
                logger.write_earlier()
        for saver in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(saver.state_key)
            if isinstance(saver, ModelCheckpoint) and state is not None:
                moved = trainer.strategy.broadcast(self._move(saver, state) if trainer.is_global_zero else state)
                checkpoint["callbacks"][saver.state_key] = moved
                saver._last_checkpoint_saved = moved["best_model_path"] or moved["last_model_path"]
        _complete_epoch(checkpoint["loops"]["fit_loop"])

    def _move(self, saver: ModelCheckpoint, state: dict[str, Any]) -> dict[str, Any]:
        """Copy the checkpoints that a state names into the new folder, unless they are later than the resumed one."""
        assert self.before is not None
        old, new = self.before.checkpoint.parent, Path(str(saver.dirpath))
        maintained = {Path(path).name for path in (*state["best_k_models"], state["best_model_path"]) if path}
        if saver.save_last or saver.filename == saver.CHECKPOINT_NAME_LAST:
            maintained.add(f"last{saver.FILE_EXTENSION}")
        new.mkdir(parents=True, exist_ok=True)
        here = {name: str(new / name) for name in sorted(maintained) if self._copy(old / name, new / name)}
        best = {here[Path(p).name]: score for p, score in state["best_k_models"].items() if Path(p).name in here}

        def there(path: str) -> str:
            return here.get(Path(path).name, "") if path else ""

        last = here.get(f"last{saver.FILE_EXTENSION}", "")
        plain = saver.monitor is None and saver.filename == saver.CHECKPOINT_NAME_LAST
        scored = there(state["best_model_path"])
        return state | {
            "dirpath": saver.dirpath,
            "best_k_models": best,
            "best_model_path": last if plain else scored,  # else the next one would be called last-v1
            "best_model_score": state["best_model_score"] if scored else None,
            "kth_best_model_path": there(state["kth_best_model_path"]),
            "last_model_path": last if saver.save_last else "",
        }

    def _copy(self, source: Path, target: Path) -> bool:
        assert self.before is not None
        try:
            if read(source)["global_step"] > self.before.step:
                return False  # the training will write it again
            if target.exists() and source.samefile(target):
                return True
            content = source.read_bytes()
        except (OSError, ValueError, KeyError):
            return False
        write(target, content)  # if the disk is full, the command ends, and no checkpoint is lost
        shutil.copystat(source, target)
        return True

    # ---- what Lightning restores too far, and what it counts twice

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the optimiser's settings as given, before Lightning restores those of the checkpoint."""
        self._groups = [optimizer.state_dict()["param_groups"] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before is not None and trainer.global_step != self.before.step:  # then schedules would start anew
            raise Mistake(
                f"{self.before.checkpoint} says that {self.before.step} steps are done, and its loops say "
                f"{trainer.global_step}; {ADVICE}"
            )
        if self.before is not None:
            _require_moments(trainer)
            apply_settings(trainer, self._groups)
            epoch = trainer.fit_loop.epoch_progress.current
            if epoch.ready == epoch.completed:
                trainer.fit_loop.epoch_loop.restarting = False  # Lightning sets it for a training by max_steps

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count_steps(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._count_steps(trainer)

    def _count_steps(self, trainer: Trainer) -> None:
        """Set the loggers' count to the optimiser's steps, as in a training that was not interrupted."""
        if not self._counted:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._counted = True


def _require_moments(trainer: Trainer) -> None:
    """Check the moments of optimisers such as Adam: a wrong shape would fail in the middle of a step."""
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if name in ("exp_avg", "exp_avg_sq") and getattr(value, "shape", None) != parameter.shape:
                    raise Mistake(f"its entry optimizer_states holds {name} of another shape than its tensor; {ADVICE}")


def apply_settings(trainer: Trainer, given: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Set changed settings of restored optimisers; the state of each parameter stays.

    Only arguments of the optimiser's class are settings, because some optimisers count their steps in their groups. The
    learning rate is scaled, so that it stays where its schedule is.

    Args:
        trainer: A trainer whose optimisers and schedules are restored.
        given: The parameter groups of each optimiser before that.
    """
    for optimizer, groups in zip(trainer.optimizers, given, strict=True):
        state, names = optimizer.state_dict(), inspect.signature(type(optimizer)).parameters.keys() - {"lr"}
        scaled, changed = {}, False
        for number, (group, new) in enumerate(zip(state["param_groups"], groups, strict=True)):
            settings = {name: new[name] for name in names & new.keys()}
            before, lr = group.get("initial_lr"), new.get("initial_lr")
            if before != lr is not None:
                settings |= {"initial_lr": lr, "lr": group["lr"] * (lr / before) if before else lr}
                scaled[number] = lr
            changed |= group != group | settings
            group |= settings
        if changed:
            optimizer.load_state_dict(state)  # some settings decide where the state lies
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer and hasattr(config.scheduler, "base_lrs"):
                for number, lr in scaled.items():
                    config.scheduler.base_lrs[number] = lr


def _complete_epoch(loops: dict[str, Any]) -> None:
    """Mark an epoch complete if it was saved after its last step and no validation follows."""
    batches = loops["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        epochs, batch = loops["epoch_progress"][part], batches[part]
        if batches["is_last_batch"] and batch["processed"] > batch["completed"]:  # no validation was to come
            batch["completed"] = batch["processed"]
            epochs["processed"] = epochs["started"]
        if epochs["processed"] == epochs["started"]:
            epochs["completed"] = epochs["processed"]


def _pending_line(trainer: Trainer) -> dict[str, Any] | None:
    """Return the line that Lightning logs after this save for a finished step or epoch."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    batch, epoch = loop.batch_progress.current, trainer.fit_loop.epoch_progress.current
    in_step = batch.processed > batch.completed  # type: ignore[attr-defined]
    if not trainer.training or not (in_step or epoch.processed > epoch.completed):  # type: ignore[attr-defined]
        return None
    if in_step and (loop._should_accumulate() or not connector.should_update_logs):
        return None
    metrics = connector.metrics["log"]
    if not metrics:
        return None
    values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    step = int(values.pop("step", loop._batches_that_stepped - (0 if in_step else 1)))
    return {"epoch": trainer.current_epoch} | values | {"step": step}
