"""Files are whole or as they were when the disk is full, and one process at a time writes to a place."""

import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import TINY
from tiny import QUIET, loader, make_classifier, trainer

from dynadapter.cli import main
from dynadapter.cli.runs import Metrics, read_lines
from dynadapter.files import Busy, append, locked, replacing, replacing_folder, write, write_folder
from dynadapter.serve.formats import Unread, write_unread
from dynadapter.sweep import lines
from dynadapter.training.checkpoints import AtomicCheckpointIO, RunCheckpoint

BIG = b"x" * 5000


@contextmanager
def full_disk(size: int = 1000) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: the write takes what fits, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def by_replacing(folder: Path) -> None:
    with replacing(folder / "file") as file:
        for _ in range(50):
            file.write(BIG[:100])


def metrics_line(folder: Path) -> None:
    logger = Metrics(save_dir=folder, name="", version="")
    logger.experiment.metrics_file_path = str(folder / "file")
    logger.experiment.metrics_keys = ["a", "b"]
    logger.experiment.metrics = [{"a": 1.5, "b": 2.5}] * 300
    logger.experiment.save()


def result_line(folder: Path) -> None:
    (folder / "file").rename(folder / lines.RESULTS)
    try:
        lines.append(folder, {"run": "x" * 5000})
    finally:
        (folder / lines.RESULTS).rename(folder / "file")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "write": lambda folder: write(folder / "file", BIG),
    "append": lambda folder: append(folder / "file", BIG),
    "replacing": by_replacing,
    "folder": lambda folder: write_folder(folder / "sub", {"a": b"new", "b": BIG}),
    "checkpoint": lambda folder: AtomicCheckpointIO().save_checkpoint({"a": "x" * 5000}, folder / "file"),
    "unread images": lambda folder: write_unread(folder / "file", [Unread("name" * 9, "reason")] * 50),
    "a line of metrics.csv": metrics_line,
    "a line of results.jsonl": result_line,
}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_full_disk_cuts_nothing_off(writer: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a,b\n1,2\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        writer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sub"]
    assert (tmp_path / "file").read_bytes() == b"a,b\n1,2\n"
    assert [path.read_bytes() for path in (tmp_path / "sub").iterdir()] == [b"old"]


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_full_disk_during_a_training(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in one line that says how to continue; every file in its folder is whole."""
    real = RunCheckpoint.on_train_epoch_end

    def then_full(self: Any, trainer: Any, module: Any) -> None:
        real(self, trainer, module)
        if trainer.current_epoch == 1:
            size = (tmp_path / "version_0" / "metrics.csv").stat().st_size + 9
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(RunCheckpoint, "on_train_epoch_end", then_full)
    args = ["fit", "-c", TINY, "--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path}"]
    try:
        with pytest.raises(SystemExit) as ending:
            main([*args, "--trainer.check_val_every_n_epoch=9"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ending.value.code == 2
    assert line.startswith("dynadapter: error: ")
    assert f"dynadapter fit --resume {tmp_path / 'version_0'}" in line
    run = tmp_path / "version_0"
    assert (run / "metrics.csv").read_bytes().endswith(b"\n")
    assert len(read_lines(run / "metrics.csv")) == (run / "metrics.csv").read_bytes().count(b"\n") - 1
    assert not [path for path in run.rglob("*") if path.name.endswith((".partial", ".lock"))]
    main(["fit", "--resume", str(run)])


# ---- locks


HOLD = """
import sys, time
from pathlib import Path
from dynadapter.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "place")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_lock_ends_with_its_process(holder: subprocess.Popen, tmp_path: Path) -> None:
    place = tmp_path / "place"
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (place, tmp_path / "link" / "place", tmp_path / "x" / ".." / "place"):
        with pytest.raises(Busy, match=rf"is being written by another process \(process {holder.pid} on .*\); wait"):
            locked(name).__enter__()
    with pytest.raises(Busy):
        write_folder(place, {"a": b""})
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(place), pytest.raises(Busy, match="another thread"):
        locked(place).__enter__()
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


def test_lock_admits_one_thread_at_a_time(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(50):
            try:
                with locked(tmp_path / "place"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except Busy:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_folder_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"x": b"first"}, overwrite=False)
    with pytest.raises(ValueError, match="exists"), replacing_folder(tmp_path / "a", overwrite=False):
        pass
    assert (tmp_path / "a" / "x").read_bytes() == b"first"


@pytest.mark.filterwarnings(*QUIET, "ignore:Checkpoint directory .* is not empty")
def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    def saver() -> RunCheckpoint:
        return RunCheckpoint(dirpath=tmp_path / "saved", filename="last", enable_version_counter=False)

    class Second(RunCheckpoint):
        def on_train_start(self, *_: Any) -> None:
            with pytest.raises(Busy, match="saved is being written by another"):
                trainer(saver(), max_steps=1, enable_checkpointing=True).fit(make_classifier(), loader(1), loader(1))

    for _ in range(2):  # the first one releases the folder
        first = Second(dirpath=tmp_path / "saved", filename="last", enable_version_counter=False)
        trainer(first, max_steps=1, enable_checkpointing=True).fit(make_classifier(), loader(1), loader(1))
        assert [path.name for path in (tmp_path / "saved").iterdir()] == ["last.ckpt"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
