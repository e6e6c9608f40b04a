"""Trainings that are interrupted at any moment and resumed end exactly like uninterrupted ones."""

import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from commands import TINY, refused

from dynadapter.cli import app, main
from dynadapter.cli.continuing import apply_settings
from dynadapter.cli.layers import run_root
from dynadapter.cli.report import find_run
from dynadapter.cli.resume import earlier_run
from dynadapter.cli.runs import Metrics, is_numeric, read_lines
from dynadapter.training.module import ExitClassifier

COMMAND = [sys.executable, "-m", "dynadapter.cli"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]

EPOCHS = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=4"]
CASES = {
    "plain": EPOCHS,
    "augmented": [*EPOCHS, "--data.augment=flip", "--model.mixing=Mixing"],
    "strongly augmented": [
        *EPOCHS,
        "--data.num_workers=2",
        "--data.augment=Augment",
        "--data.augment.auto=rand-m9-mstd0.5-inc1",
        "--data.augment.erasing=0.5",
        "--data.augment.repeats=2",
    ],
    "without validation": [*EPOCHS, "--trainer.limit_val_batches=0"],
    "validation twice an epoch": [*EPOCHS, "--trainer.val_check_interval=0.5"],
    "steps": ["--trainer.max_epochs=-1", "--trainer.max_steps=10", "--trainer.limit_train_batches=4"],
    "accumulated": ["--trainer.max_epochs=2", "--trainer.limit_train_batches=5", "--trainer.accumulate_grad_batches=2"],
    "saved by steps": [*EPOCHS, "--checkpoint.every_n_train_steps=2"],
    "saved rarely": [*EPOCHS, "--checkpoint.every_n_epochs=3"],
    "best": [*EPOCHS, "--checkpoint.monitor=val/acc", "--checkpoint.mode=max"],
    "named": [*EPOCHS, "--checkpoint.filename={epoch}-{step}"],
    "one batch": ["--trainer.max_epochs=3", "--trainer.limit_train_batches=1"],
    "workers": [*EPOCHS, "--data.num_workers=2", "--data.augment=flip"],
    "averaged": [*EPOCHS, "--trainer.callbacks+=WeightAverage", "--trainer.callbacks.decay=0.9"],
}


class Killed(BaseException):
    """End a training in this process as SIGKILL would: no handler saves anything."""


def fit(root: Path, *args: str) -> None:
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={root}", *args])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of an uninterrupted run of a case."""
    done: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in done:
            root = tmp_path_factory.mktemp("whole")
            fit(root, *CASES[case])
            done[case] = root / "version_0"
        return done[case]

    return run


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    """Call a function in the training step of a batch, counted over all epochs."""
    step = ExitClassifier.training_step
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def arrange(batch: int, happen: Callable[[], Any]) -> None:
        def training_step(self: ExitClassifier, *args: Any) -> Any:
            if self.trainer.fit_loop.total_batch_idx == batch:
                happen()
            return step(self, *args)

        monkeypatch.setattr(ExitClassifier, "training_step", training_step)

    yield arrange
    for number, handler in handlers.items():  # Lightning turns SIGINT off for its way out
        signal.signal(number, handler)


def killed() -> None:
    raise Killed


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def pressed() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(root: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Train until the interruption; return the exit code, or None for a kill."""
    try:
        fit(root, *CASES[case])
    except SystemExit as ending:
        return ending.code  # type: ignore[return-value]
    except Killed:
        return None
    finally:
        monkeypatch.undo()
    raise AssertionError("the training was not interrupted")


# ---- the same result -------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops")
PARTS += ("current_model_state", "averaging_state")  # of weight averaging, whose average is the state_dict


def require_same(one: Path, other: Path) -> None:
    """Require equal runs: weights, optimiser, schedules and counters in every file, bit for bit, and the log."""
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        a, b = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other))
        for part in PARTS:
            if part != "loops" or name != "weights.ckpt":
                assert equal(a.get(part), b.get(part)), (name, part)
    logs = [lines(run / "metrics.csv") for run in (one, other)]
    assert logs[0] == logs[1]
    results = [json.loads((run / "run.json").read_text())["results"] for run in (one, other)]
    assert results[0] == results[1]


def state_of(run: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}


FAST = [
    ("plain", 1, terminated, 143),
    ("accumulated", 5, pressed, 130),
    ("saved by steps", 3, killed, None),
    ("best", 9, killed, None),
]
MORE = [
    ("plain", 5, killed, None),
    ("plain", 7, terminated, 143),
    ("plain", 6, pressed, 130),
    ("accumulated", 5, terminated, 143),
    ("augmented", 6, terminated, 143),
    ("without validation", 5, killed, None),
    ("without validation", 3, terminated, 143),
    ("validation twice an epoch", 3, killed, None),
    ("validation twice an epoch", 5, terminated, 143),
    ("steps", 6, killed, None),
    ("steps", 3, terminated, 143),
    ("saved by steps", 5, killed, None),
    ("saved rarely", 3, terminated, 143),
    ("saved rarely", 6, terminated, 143),
    ("best", 3, terminated, 143),
    ("named", 5, killed, None),
    ("named", 2, terminated, 143),
    ("one batch", 1, terminated, 143),
    ("one batch", 2, terminated, 143),
    ("workers", 6, terminated, 143),
    ("workers", 6, killed, None),
    ("averaged", 6, terminated, 143),
    ("averaged", 9, killed, None),
]


@pytest.mark.parametrize(
    ("case", "batch", "happening", "code"),
    [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)],
    ids=lambda part: getattr(part, "__name__", None) or str(part),
)
def test_resumed_run_equals_uninterrupted(case, batch, happening, code, whole, at, tmp_path, monkeypatch, capfd):
    expected = whole(case)
    at(batch, happening)
    assert interrupted(tmp_path, case, monkeypatch) == code
    first = tmp_path / "version_0"
    if code:
        last = capfd.readouterr().err.splitlines()[-1]
        said = "stopped by SIGTERM" if code == 143 else "interrupted"
        assert last == f"dynadapter: {said}; continue with: dynadapter fit --resume {first}"
    before = state_of(first)
    main(["fit", "--resume", str(first)])
    require_same(expected, tmp_path / "version_1")
    assert state_of(first) == before  # the interrupted run is unchanged


def test_resume_after_several_interruptions(whole, at, tmp_path, monkeypatch):
    expected = whole("plain")
    at(2, terminated)
    assert interrupted(tmp_path, "plain", monkeypatch) == 143
    for run, batch, happening in ((0, 5, killed), (1, 6, killed), (2, 9, terminated)):
        at(batch, happening)
        with pytest.raises((Killed, SystemExit)):
            main(["fit", "--resume", str(tmp_path / f"version_{run}")])
        monkeypatch.undo()
    main(["fit", "--resume", str(tmp_path / "version_3")])
    require_same(expected, tmp_path / "version_4")


def test_resume_after_the_last_checkpoint(whole, tmp_path, monkeypatch):
    """All steps are done: the new folder is complete nevertheless."""
    expected = whole("plain")
    monkeypatch.setattr("dynadapter.cli.app.DynCLI.after_fit", lambda self: killed())
    assert interrupted(tmp_path, "plain", monkeypatch) is None
    main(["fit", "--resume", str(tmp_path / "version_0")])
    require_same(expected, tmp_path / "version_1")


@pytest.mark.parametrize("case", ["plain", "averaged"])
def test_finished_run_can_train_longer(case, tmp_path):
    """The end that is saved without a due save continues as one that is saved after every epoch."""
    runs = []
    for name, every in (("epochs", "n_epochs=1"), ("steps", "n_train_steps=5")):
        root = tmp_path / name
        fit(root, *CASES[case], "--epochs=2", f"--checkpoint.every_{every}")
        main(["fit", "--resume", str(root / "version_0"), "--epochs=3"])
        runs.append(root / "version_1")
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in runs]
    assert [end["global_step"] for end in ends] == [12, 12]
    assert all(equal(ends[0].get(part), ends[1].get(part)) for part in PARTS)
    assert lines(runs[0] / "metrics.csv") == lines(runs[1] / "metrics.csv")


# ---- messages --------------------------------------------------------------------------------------------------------


def test_resume_without_checkpoint_is_refused(at, tmp_path, monkeypatch, capsys):
    at(1, killed)
    assert interrupted(tmp_path, "plain", monkeypatch) is None
    run = tmp_path / "version_0"
    assert json.loads((run / "run.json").read_text())["ended"] is None
    error = refused(["fit", "--resume", run], capsys)
    assert f"{run} was interrupted before it saved a checkpoint; " in error
    assert error.endswith(f"start again with: dynadapter fit --config {run / 'config.yaml'}")
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]


def test_resume_of_a_resume_without_checkpoint(whole, at, tmp_path, monkeypatch):
    expected = whole("plain")
    at(5, killed)
    assert interrupted(tmp_path, "plain", monkeypatch) is None
    monkeypatch.setattr("dynadapter.cli.continuing.Continue.on_load_checkpoint", lambda *args: killed())
    monkeypatch.setattr("dynadapter.cli.app.remove_if_empty", lambda folder: None)  # a kill cleans nothing up
    with pytest.raises(Killed):
        main(["fit", "--resume", str(tmp_path / "version_0")])
    monkeypatch.undo()
    assert not (tmp_path / "version_1" / "checkpoints").exists()
    main(["fit", "--resume", str(tmp_path / "version_1")])
    require_same(expected, tmp_path / "version_2")


def test_second_ctrl_c_stops_at_once(at, tmp_path, monkeypatch, capfd):
    def twice() -> None:
        pressed()
        pressed()

    at(6, twice)
    assert interrupted(tmp_path, "plain", monkeypatch) == 130
    run = tmp_path / "version_0"
    shown = capfd.readouterr().err.splitlines()
    assert any("stopping after this step; Ctrl-C again stops at once" in line for line in shown)
    assert shown[-1] == f"dynadapter: interrupted; continue with: dynadapter fit --resume {run}"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4  # the epoch before


def test_sigterm_without_checkpoints(at, tmp_path, monkeypatch, capfd):
    at(1, terminated)
    with pytest.raises(SystemExit) as ending:
        fit(tmp_path, "--checkpoint=null", *EPOCHS)
    assert ending.value.code == 143
    assert capfd.readouterr().err.splitlines()[-1].endswith("stopped by SIGTERM before anything was saved; start again")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_way_on_after_an_early_stop(finished, at, monkeypatch, capfd):
    """The new folder holds nothing and is removed, so the message does not name it."""
    monkeypatch.setattr("dynadapter.data.Shapes.setup", lambda self, stage: pressed())  # `at` restores the handlers
    command = ["fit", "--resume", str(finished), "--epochs=2"]
    with pytest.raises(SystemExit) as ending:
        main(command)
    assert ending.value.code == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.endswith(f"interrupted before anything new was saved; continue with: dynadapter {' '.join(command)}")
    assert not (finished.parent / "version_1").exists()


def test_full_disk_when_checkpoints_are_copied(finished, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished, tmp_path / "version_0")  # the new folder stays beside it

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("dynadapter.cli.continuing.write", full)
    line = refused(["fit", "--resume", run, "--epochs=2"], capsys)
    assert "the disk is full" in line
    assert f"continue with: dynadapter fit --resume {run} --epochs=2" in line


def test_sigterm_stops_test_at_once(tiny_run, tmp_path, monkeypatch, capfd):
    shutil.copytree(tiny_run, tmp_path / "version_0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(ExitClassifier, "test_step", lambda self, *args: terminated())
    with pytest.raises(SystemExit) as ending:
        main(["test", "--ckpt_path", str(tmp_path / "version_0" / "checkpoints" / "last.ckpt")])
    assert ending.value.code == 143
    assert capfd.readouterr().err.splitlines()[-1] == "dynadapter: stopped by SIGTERM"
    assert not (tmp_path / "test_0").exists()  # it has measured nothing
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("runs") / "version_0"))


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--resume", "{R}/version_7"], ("version_7 does not exist", "such as {R}/version_0")),
        (["--resume", "{R}"], ("is not the folder of a run, such as {R}/version_0",)),
        (["--resume={R}/version_0/config.yaml"], ("is not a folder",)),
        (["--resume", "{R}/version_0", "-c", "{R}/version_0/config.yaml"], ("is finished",)),
        (["--resume", "{R}/version_0", "--epochs=2", "--init_from", "no.ckpt"], ("init_from starts a training",)),
        (["-c", TINY, "--ckpt_path={R}/version_0/checkpoints/last.ckpt", "--init_from=x"], ("leave one of them out",)),
        (["--resume", "{R}/version_0/checkpoints"], ("holds no config.yaml", "killed before it began")),
        (["--resume", "{R}/version_0"], ("is finished", "--trainer.max_epochs NUMBER")),
        (["--resume"], ("--resume needs a folder",)),
        (["--resume", "{R}/version_0", "--ckpt_path", "x"], ("no --ckpt_path",)),
        (["--resume", "{R}/version_0", "--resume", "{R}/version_0"], ("give it once",)),
        (["-c", "{R}/resume.yaml", "-c", TINY], ("not a key of a config file",)),
        (["-c", TINY, "--ckpt_path", "{R}/version_0/checkpoints/weights.ckpt"], ("only the trained part", "last.ckpt")),
    ],
    ids=lambda part: " ".join(part).replace(TINY, "TINY"),
)
def test_resume_with_invalid_arguments(args, names, finished, capsys):
    root = finished.parent
    (root / "resume.yaml").write_text("resume: runs/version_0")
    error = refused(["fit", *(arg.replace("{R}", str(root)) for arg in args)], capsys)
    for name in names:
        assert name.replace("{R}", str(root)) in error
    assert {path.name for path in root.iterdir()} == {"version_0", "resume.yaml"}


def test_resume_with_changed_settings(finished, tmp_path, capsys):
    main(["fit", "--resume", str(finished), "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path}"])
    run = tmp_path / "version_0"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert [line["step"] for line in lines(run / "metrics.csv")] == ["0", "1", "1", "2", "3", "3"]
    record = json.loads((run / "run.json").read_text())
    assert record["resumed_from"] == str((finished / "checkpoints" / "last.ckpt").resolve())
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    assert "test needs a checkpoint" in refused(["test", "-c", run / "config.yaml"], capsys)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # that of the resumed run
def test_own_folders_and_loggers_resume(at, tmp_path, monkeypatch, capsys):
    """The printed command works in every folder, and no other training saves between the checkpoints."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    own = [*EPOCHS, "--checkpoint.dirpath=saved", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    second = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=more"]
    second += ["--trainer.callbacks.monitor=val/acc_exit1", "--trainer.callbacks.mode=max"]
    at(5, killed)
    with pytest.raises(Killed):
        fit(tmp_path, *own, *second)
    run, saved = tmp_path / "version_0", tmp_path / "here" / "saved"
    command = f"fit --resume {run} --config {run / 'config.yaml'}"
    assert f"results in {run}; if it is interrupted: dynadapter {command}\n" in capsys.readouterr().out
    assert find_run(str(run)).checkpoint == saved / "last.ckpt"
    error = refused(["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", *own], capsys)
    assert f"dirpath={saved} holds last.ckpt of another training; give another folder" in error
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "add -c" in refused(["fit", "--resume", run], capsys)
    main(command.split())
    assert torch.load(saved / "last.ckpt", weights_only=True)["global_step"] == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "here", "version_0", "version_1"]


def test_resume_command_with_an_own_class(tmp_path, monkeypatch, capsys):
    """It names the config, unless the module is loaded before the configuration is read, as by ``--import``."""
    (tmp_path / "own_watch.py").write_text("from lightning.pytorch import Callback\n\nclass Watch(Callback): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for number, trusted in enumerate((True, False)):
        if not trusted:
            monkeypatch.setattr(app, "LOADED", app.LOADED | {"own_watch"})
        fit(tmp_path, "--trainer.max_steps=1", "--trainer.callbacks+=own_watch.Watch")
        run = tmp_path / f"version_{number}"
        more = f" --config {run / 'config.yaml'}" if trusted else ""
        assert f"; if it is interrupted: dynadapter fit --resume {run}{more}\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # that of the resumed run
@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "own folders"])
def test_resume_of_a_run_that_was_continued(shared, at, tmp_path, monkeypatch, capsys):
    """With a shared folder it continues from the later run, and keeps all lines; after the end it does nothing."""
    folder = ["--checkpoint.dirpath=saved"] if shared else []
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "version_0"
    resume = ["fit", f"--resume={run}", f"--config={run / 'config.yaml'}"]
    at(3, terminated)
    with pytest.raises(SystemExit):
        fit(tmp_path, *EPOCHS, *folder)
    for batch in (7, None):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        if batch is None:
            main(resume)
        else:
            at(batch, terminated)
            with pytest.raises(SystemExit):
                main(resume)
    assert {line["step"] for line in lines(tmp_path / "version_2" / "metrics.csv")} == {str(step) for step in range(12)}
    words = f"{tmp_path / 'version_2'} continued {run} and is finished; to train it longer, add"
    assert words in refused(resume, capsys)
    monkeypatch.chdir(run)
    assert words.replace(f" {run} ", " . ") in refused(["fit", "--resume=.", "--config=config.yaml"], capsys)
    monkeypatch.chdir(tmp_path)
    if shared:
        shutil.rmtree(tmp_path / "version_2")
        for other in (False, True):
            if other:  # a later run at the same place, which saves elsewhere
                shutil.copytree(run, tmp_path / "version_2")
                config = tmp_path / "version_2" / "config.yaml"
                config.write_text(config.read_text().replace("/saved\n", "/other\n"))
            before = earlier_run(tmp_path / "saved" / "last.ckpt", tmp_path / "version_1")
            assert {line["step"] for line in before.lines} < {str(step) for step in range(12)}
            assert f"was saved by {tmp_path / 'version_2'}, which is not there any more" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["last.ckpt", "../checkpoints/last.ckpt"])
def test_checkpoint_of_the_current_folder(place, finished, monkeypatch):
    monkeypatch.chdir(finished / "checkpoints")
    assert earlier_run(Path(place)).lines == earlier_run(finished / "checkpoints" / "last.ckpt").lines != []
    assert run_root(Path(place)) == finished.parent
    assert find_run(place).folder == finished


def test_config_file_beats_the_resumed_run(finished, tmp_path):
    (tmp_path / "other.yaml").write_text(f"trainer: {{default_root_dir: {tmp_path / 'other'}}}")
    main(["fit", "--resume", str(finished), "-c", str(tmp_path / "other.yaml"), "--epochs=2"])
    assert (tmp_path / "other" / "version_0" / "checkpoints" / "last.ckpt").is_file()
    moved = Path(shutil.copytree(finished, tmp_path / "moved" / "version_0"))
    main(["fit", "--resume", str(moved), "-c", str(moved / "config.yaml"), "--epochs=2"])  # to trust it
    assert (tmp_path / "moved" / "version_1").is_dir()


def test_resume_with_another_learning_rate(finished, tmp_path):
    settings = ["--trainer.max_epochs=2", "--lr=1e-5", "--model.optimizer.weight_decay=0.5"]
    main(["fit", "--resume", str(finished), *settings, f"--trainer.default_root_dir={tmp_path}"])
    state = torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    [group] = state["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"]) == (1e-5, 0.5)
    assert 0 < group["lr"] <= 1e-5
    assert state["lr_schedulers"][0]["base_lrs"] == [1e-5]


class Counting(torch.optim.SGD):
    """Its groups also count steps, as those of optimisers without schedules do."""

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, lr, momentum)
        for group in self.param_groups:
            group["steps"] = 0


@pytest.mark.parametrize("decays", [True, False])
def test_changed_settings_of_several_groups(decays):
    def groups(lr: float, momentum: float) -> torch.optim.Optimizer:
        own = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in (lr, 0.5)]
        return Counting(own, lr=1.0, momentum=momentum)

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        kinds = torch.optim.lr_scheduler
        return kinds.ExponentialLR(optimizer, 0.5) if decays else kinds.ReduceLROnPlateau(optimizer)

    trained = groups(0.1, 0.9)
    schedule_before = schedule(trained)
    for group in trained.param_groups:
        group["params"][0].grad = torch.ones(2)
        group["steps"] = 1
    trained.step()
    schedule_before.step(*([] if decays else [1.0]))
    for lr, momentum in ((0.1, 0.9), (0.2, 0.8)):
        resumed = groups(lr, momentum)
        scheduler = schedule(resumed)
        given = [resumed.state_dict()["param_groups"]]
        resumed.load_state_dict(trained.state_dict())
        scheduler.load_state_dict(schedule_before.state_dict())
        trainer = SimpleNamespace(optimizers=[resumed], lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)])
        apply_settings(trainer, given)
        same = lr == 0.1
        assert equal(resumed.state_dict(), trained.state_dict()) == same
        assert equal(resumed.state_dict()["state"], trained.state_dict()["state"])
        assert [(group["momentum"], group["steps"]) for group in resumed.param_groups] == [(momentum, 1)] * 2
        if decays:
            assert [group["lr"] for group in resumed.param_groups] == pytest.approx([lr / 2, 0.25])
            assert scheduler.base_lrs == [lr, 0.5]


def test_resume_skips_damaged_checkpoints(at, tmp_path, monkeypatch, capsys):
    at(9, killed)
    assert interrupted(tmp_path, "best", monkeypatch) is None
    saved = tmp_path / "version_0" / "checkpoints"
    last = (saved / "last.ckpt").read_bytes()
    (saved / "last.ckpt").write_bytes(last[: len(last) // 2])
    (saved / "other.ckpt.partial").write_bytes(last)
    main(["fit", "--resume", str(tmp_path / "version_0")])
    out = capsys.readouterr().out
    assert f"{saved / 'last.ckpt'} is damaged and left out" in out
    assert f"from {saved / 'best.ckpt'}" in out
    (saved / "best.ckpt").write_bytes(b"")
    shutil.rmtree(tmp_path / "version_1")  # it is finished
    error = refused(["fit", "--resume", tmp_path / "version_0"], capsys)
    assert "can be read: best.ckpt, last.ckpt; remove them, and start again with" in error


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_metrics_line_cut_off_by_a_kill(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,2.5\n0,x,2.5\n0,1,\n0,2")
    lines = read_lines(tmp_path / "metrics.csv")
    assert lines == [
        {"epoch": "0", "step": "0", "train/loss": "2.5"},
        {"epoch": "0", "step": "x", "train/loss": "2.5"},  # a word stays in the file, and no resumed training reads it
        {"epoch": "0", "step": "1"},
    ]
    assert list(map(is_numeric, lines)) == [True, False, True]


def test_metrics_header_written_atomically(tmp_path, monkeypatch):
    log = Metrics(save_dir=tmp_path, name="", version="a")
    log.log_metrics({"b": 1.5}, step=0)
    log.save()
    old = (tmp_path / "a" / "metrics.csv").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: killed())
    log.log_metrics({"a": 2.5}, step=1)
    with pytest.raises(Killed):
        log.save()
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == old
    monkeypatch.undo()
    log.save()
    log.log_metrics({"a": 3.5}, step=2)
    log.save()
    assert (tmp_path / "a" / "metrics.csv").read_text() == "a,b,step\n,1.5,0\n2.5,,1\n3.5,,2\n"


# ---- real kills ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config that trains for a few seconds, and the folder of its uninterrupted run."""
    folder = tmp_path_factory.mktemp("digits")
    config = yaml.safe_load(Path(TINY).read_text())
    config["trainer"] |= {"max_epochs": 12, "limit_train_batches": 10, "default_root_dir": str(folder / "whole")}
    config["checkpoint"] = {"every_n_train_steps": 4}
    (folder / "digits.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run([*COMMAND, "fit", "-c", folder / "digits.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "digits.yaml", folder / "whole" / "version_0"


def way_on(output: str) -> list[str]:
    """Return the resume command that a run prints at its start."""
    line = next(line for line in output.splitlines() if "if it is interrupted: dynadapter " in line)
    return line.partition("if it is interrupted: dynadapter ")[2].split()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_sigkill_at_random_moments(seed, digits, tmp_path):
    config, whole = digits
    rng = random.Random(seed)
    args = ["fit", "-c", str(config), f"--trainer.default_root_dir={tmp_path}"]
    for count in range(3):
        process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        log = tmp_path / f"version_{count}" / "metrics.csv"
        new = rng.randrange(1, 25)  # of some 130 lines: by progress, because time means little on a busy machine
        while process.poll() is None and not (log.exists() and len(read_lines(log)) >= new + count * 25):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        output, _ = process.communicate()
        if process.returncode == 0:  # it was faster
            break
        again = way_on(output)
        if list((tmp_path / Path(again[-1]).name).glob("checkpoints/*.ckpt")):
            args = again
    else:
        done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert count  # it was killed at least once
    require_same(whole, max(tmp_path.glob("version_*"), key=lambda run: int(run.name[8:])))


KILLED_WHEN = """
import os, signal, sys
import dynadapter.training.checkpoints as target
from dynadapter.cli import app, main
count = 0
def killing(function, before):
    def call(*args, **kwargs):
        global count
        if not str(args[-1]).endswith(("{name}", ".partial")):
            return function(*args, **kwargs)
        count += 1
        if before and count == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if count == {nth}:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
target.os.replace = killing(os.replace, {before})
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "before", "nth"), [("last.ckpt", True, 3), ("last.ckpt", False, 3)])
def test_sigkill_while_checkpoint_is_renamed(name, before, nth, digits, tmp_path):
    config, whole = digits
    code = KILLED_WHEN.format(name=name, before=before, nth=nth)
    args = ["fit", "-c", str(config), f"--trainer.default_root_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = tmp_path / "version_0" / "checkpoints"
    assert bool(list(saved.glob(".last.ckpt.*.partial"))) == before
    done = subprocess.run([*COMMAND, *way_on(done.stdout)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    require_same(whole, tmp_path / "version_1")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_stop_at_one_step(number, tmp_path):
    args = ["-c", TINY, *EPOCHS, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=24"]

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, "fit", *args], capture_output=True, text=True, check=False, timeout=200)

    assert run(*args, f"--trainer.default_root_dir={tmp_path / 'whole'}").returncode == 0
    root = tmp_path / "stopped"
    process = subprocess.Popen(
        [*COMMAND, "fit", *args, f"--trainer.default_root_dir={root}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (root / "version_0" / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    if number == signal.SIGTERM:
        process.send_signal(number)  # the first process alone
    else:
        os.killpg(process.pid, number)  # all of them, as a terminal does
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + number, errors
    assert errors.count("continue with:") == 1
    done = run("--resume", str(root / "version_0"))
    assert done.returncode == 0, done.stderr
    require_same(tmp_path / "whole" / "version_0", root / "version_1")


# ---- deterministic mode ----------------------------------------------------------------------------------------------


def test_deterministic_mode_repeats_bits(tmp_path):
    try:
        for _ in range(2):
            fit(tmp_path, *EPOCHS, "--trainer.deterministic=true", "--model.mixing=Mixing", "--test_after=true")
    finally:
        torch.use_deterministic_algorithms(False)
    require_same(tmp_path / "version_0", tmp_path / "version_1")
    record = json.loads((tmp_path / "version_0" / "run.json").read_text())
    assert record["trainer"]["deterministic"] is True
    assert record["results"]["test/acc"] >= 0
