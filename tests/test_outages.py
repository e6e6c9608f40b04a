"""Damaged entries of a checkpoint, and what fails beside the program: one line that names it and the way out."""

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, refused

from dynadapter.cli import main
from dynadapter.cli.errors import Mistake, describe
from dynadapter.cli.resume import earlier_run
from dynadapter.training.entries import MODEL, OURS, TRAINING
from dynadapter.training.module import ExitClassifier
from dynadapter.training.restoring import load_classifier

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={root}", "--trainer.max_epochs=2"])
    return root / "version_0"


@pytest.fixture(scope="module")
def content(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


DAMAGES: dict[str, Callable[[Any, Any], Any]] = {
    "missing": lambda part, key: part.pop(key),
    "none": lambda part, key: part.__setitem__(key, None),
    "another type": lambda part, key: part.__setitem__(key, "text" if isinstance(part[key], list) else [1.5]),
}
NO_DAMAGE = {("dynadapter.data", "none"), ("dynadapter.batches", "none"), ("optimizer_states", "missing")}
KEYS = [*MODEL, *(f"dynadapter.{name}" for name in OURS), *TRAINING]


@pytest.mark.parametrize(("key", "damage"), [(k, d) for k in KEYS for d in DAMAGES if (k, d) not in NO_DAMAGE])
def test_damaged_entry_is_named(key: str, damage: str, content: dict[str, Any], tmp_path: Path) -> None:
    damaged = content | {"dynadapter": dict(content["dynadapter"])}
    home, _, name = key.rpartition(".")
    DAMAGES[damage](damaged[home] if home else damaged, name)
    path = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(damaged, path)
    with pytest.raises((ValueError, Mistake), match=rf"last\.ckpt: its entry {key}") as error:
        earlier_run(path) if key in TRAINING else load_classifier(path)
    assert ": give another one of this run" in str(error.value)
    assert "\n" not in str(error.value)


def _moments_of_another_shape(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(7, 5)


def _progress_of_the_optimizer(content: dict[str, Any]) -> None:
    del content["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_moments_of_another_shape, "optimizer_states holds exp_avg of another shape"),
        (_progress_of_the_optimizer, "4 steps are done, and its loops say 0"),
        (lambda content: content["loops"].pop("fit_loop"), "cannot be restored (KeyError: 'fit_loop')"),
    ],
)
def test_damaged_training_state(
    damage: Callable[[dict[str, Any]], None],
    words: str,
    run: Path,
    content: dict[str, Any],
    tmp_path: Path,
    capsys: Any,
) -> None:
    damaged = copy.deepcopy(content)
    damage(damaged)
    place = tmp_path / "version_0" / "checkpoints"
    place.mkdir(parents=True)
    torch.save(damaged, place / "last.ckpt")
    (tmp_path / "version_0" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    line = refused(["fit", "--resume", tmp_path / "version_0", "--trainer.max_epochs=3"], capsys)
    assert words in line
    assert "give another one of this run" in line


# ---- what fails beside the program

OUTAGES = [
    (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "reads images was killed", "num_workers"),
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), "reads images was killed", "num_workers"),
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. "), "shared memory", "/dev/shm"),
    (
        RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1"),
        "another process",
        "abo",
    ),
    (torch.distributed.DistBackendError("NCCL error in: x.cpp:1, remote process exited"), "another process", "above"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a"), "the disk is full", "free space"),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "a"), "the disk is full", "free space"),
    (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "a"), "file system failed", "mount"),
    (OSError(errno.EIO, os.strerror(errno.EIO), "a"), "file system failed", "mount"),
    (OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), "a"), "file system failed", "mount"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a"), "too many files are open", "ulimit -n"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory is full", "smaller batch"),
    (MemoryError(), "memory is full", "smaller batch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "memory is full", "smaller"),
]


@pytest.mark.parametrize(("error", "cause", "way"), OUTAGES, ids=lambda value: str(value)[:40])
def test_outage_is_named(error: Exception, cause: str, way: str) -> None:
    line, code = describe(error)
    assert code == 2
    assert line.startswith("error: ")
    assert cause in line
    assert way in line
    assert "\n" not in line


@pytest.mark.parametrize("path", ["photos/igloo/1.jpg", "gloo/1.jpg", "timed out/1.jpg"])
def test_name_of_a_file_is_no_outage(path: str) -> None:
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    assert describe(missing) == (f"error: [Errno 2] No such file or directory: '{path}' (--debug shows where)", 2)
    assert "another process" not in describe(RuntimeError(f"{path.replace('gloo/', 'igloo/')} is odd"))[0]


class Failing(torch.utils.data.Dataset):
    """A set whose only image fails."""

    def __init__(self, fails: Callable[[], Any]) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 1

    def __getitem__(self, k: int) -> Any:
        return self.fails()


def _checked() -> None:
    raise ValueError("size=3 is odd;\ngive 2")


def _disconnected() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "a.png")


def _own() -> None:
    raise OSError("a.png: operation timed out of habit")


def _full() -> None:
    raise MemoryError


IN_WORKERS: list[tuple[Callable[[], Any], int, str]] = [
    (_checked, 2, "error: size=3 is odd; give 2 (--debug shows where)"),
    (_disconnected, 2, "error: the file system failed or is disconnected; check the disk or the mount ([Errno 5] "),
    (_own, 2, "error: a.png: operation timed out of habit (--debug shows where)"),
    (lambda: Path("gloo.png").read_bytes(), 2, "error: [Errno 2] No such file or directory: 'gloo.png' "),
    (_full, 2, "error: the memory is full; give a smaller batch size, or fewer processes (MemoryError) "),
    (lambda: int("x"), 1, "bug: ValueError: invalid literal for int() with base 10: 'x' "),
    (lambda: {}["x"], 1, "bug: KeyError: 'x' "),
]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("fails", "code", "line"), IN_WORKERS)
def test_error_of_a_worker_process(workers: int, fails: Callable[[], Any], code: int, line: str) -> None:
    context = "fork" if workers else None  # which takes the functions of this file
    loader = torch.utils.data.DataLoader(Failing(fails), num_workers=workers, multiprocessing_context=context)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        list(loader)
    described = describe(caught.value)
    assert described[1] == code
    assert described[0].startswith(line)


@pytest.mark.parametrize(
    "fails",
    [lambda: bytes([0x89]).decode(), lambda: Path("a\0b").read_bytes(), lambda: [1] * 10**30],
)
def test_value_that_python_refuses(fails: Callable[[], Any]) -> None:
    try:
        fails()
    except Exception as error:
        line, code = describe(error)
        assert (code, line[:7]) == (2, "error: ")


@pytest.mark.timeout(120)
def test_killed_worker_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    step = ExitClassifier.training_step

    def kills(self: ExitClassifier, *args: Any) -> Any:
        if self.global_step == 3:
            worker = next(iter(torch.multiprocessing.active_children()))
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(1)  # torch's handler of SIGCHLD must find it; a join could take its status away first
        return step(self, *args)

    monkeypatch.setattr(ExitClassifier, "training_step", kills)
    args = ["--data.num_workers=1", "--trainer.max_epochs=3", "--trainer.limit_train_batches=2"]
    line = refused(["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", *args], capsys)
    assert line.startswith("dynadapter: error: a process that reads images was killed")
    assert f"continue with: dynadapter fit --resume {tmp_path / 'version_0'}" in line


def test_reader_of_the_output_ends() -> None:
    """As ``| head`` does, which ends before the output."""
    command, pipe = [sys.executable, "-m", "dynadapter.cli", "configs"], subprocess.PIPE
    for more in ([], ["vtab"]):
        with subprocess.Popen([*command, *more], stdout=pipe, stderr=pipe) as one:
            assert one.stdout is not None
            assert one.stderr is not None
            one.stdout.close()
            assert (one.stderr.read(), one.wait()) == (b"", 141)
