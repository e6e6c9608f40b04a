"""Find what an interrupted training continues from: the run, its checkpoint and its ``metrics.csv``."""

import contextlib
import os
import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from dynadapter.cli import imports
from dynadapter.cli.configs import take
from dynadapter.cli.errors import Mistake, mistakes
from dynadapter.cli.layers import OFF, assignments, with_folders
from dynadapter.cli.runs import is_first_process, is_numeric, list_runs, read_lines
from dynadapter.cli.safety import check_run, require_loaded
from dynadapter.files import Busy, locked, shown
from dynadapter.limits import read_json, read_yaml
from dynadapter.training.checkpoints import newest, read
from dynadapter.training.entries import TRAINING, require_entries

LINE = "dynadapter_line"
"""Key in a checkpoint: the line of ``metrics.csv`` that was about to be written when it was saved."""
RUN = "dynadapter_run"
"""Key in a checkpoint: the folder of its run, because several runs may save into one ``checkpoint.dirpath``."""


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


def resume_command(run: Path, settings: Mapping[str, Any], loaded: Container[str]) -> str:
    """Return the command line that continues a run; it names the run's config if the settings need trust.

    Args:
        run: The run folder.
        settings: Its configuration.
        loaded: The modules that are loaded before a configuration is parsed; a class of another one needs trust.
    """
    config = run / "config.yaml"
    try:
        check_run(config, settings, (), ())
        require_loaded(settings, loaded)
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
    if nothing_new and (later := _finished_later(run)):
        raise Mistake(
            f"{later} continued {run} and is finished; to train it longer, add --trainer.max_epochs NUMBER to --resume "
            f"{later}; to continue {run} once more, add a setting, such as its own --trainer.max_epochs NUMBER"
        )
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


def _finished_later(run: Path) -> Path | None:
    """Return a later run in the same folder that continued a run, perhaps through others, and is finished."""
    runs = list_runs(run.resolve().parent)
    number = next((number for number, one in enumerate(runs) if one.name == run.resolve().name), len(runs))
    saved = {os.path.realpath(checkpoint_folder(run))}
    for later in runs[number + 1 :]:
        record = read_record(later)
        if os.path.realpath(Path(str(record.get("resumed_from"))).parent) not in saved:
            continue
        if record.get("how") == "finished":
            return later if run.name in ("", "..") else run.parent / later.name
        with contextlib.suppress(Mistake, OSError):  # a damaged config, or none
            saved.add(os.path.realpath(checkpoint_folder(later)))
    return None


def _newest_run(folder: Path) -> str:
    there = [path for path in list_runs(folder) if (path / "config.yaml").is_file()]
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
    file = _log(checkpoint, path, log or run) / "metrics.csv"
    lines = list(filter(is_numeric, read_lines(file))) if file.is_file() else []
    lines = [line for line in lines if float(line.get("step", "inf")) < step]
    line = checkpoint.get(LINE, {})
    pending = {str(key): str(value) for key, value in line.items()} if isinstance(line, dict) else {}
    if pending and is_numeric(pending) and pending not in lines:
        lines.append(pending)
    return Earlier(path, step, lines)


def _log(checkpoint: Mapping[str, Any], path: Path, run: Path) -> Path:
    """Return the folder of the ``metrics.csv`` of a checkpoint: with a folder of its own, that of the run it names."""
    named, here = checkpoint.get(RUN), os.path.realpath(path.parent)
    if not isinstance(named, str) or here == os.path.realpath(run / "checkpoints"):
        return run  # also where it was moved
    with contextlib.suppress(Mistake, OSError):  # a damaged config
        if Path(named).is_dir() and os.path.realpath(checkpoint_folder(Path(named))) == here:
            return Path(named)
    _print_once(f"{path} was saved by {shown(named)}, which is not there any more: metrics.csv starts as that of {run}")
    return run


def read_record(run: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run; return an empty mapping if there is none."""
    try:
        record = read_json(run / "run.json")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
