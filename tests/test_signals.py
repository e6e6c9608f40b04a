"""SIGTERM and Ctrl-C during a training: it stops after a step and is saved."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny import make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.cli.errors import Terminated, stoppable
from dynadapter.cli.signals import StopOnSignal
from dynadapter.training.checkpoints import RunCheckpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers that Lightning changes when it stops."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class At(Callback):
    """Send this process a signal in a training step, or in a validation batch."""

    def __init__(self, number: int, train: int | None = None, val: int | None = None) -> None:
        self.number, self.train, self.val = number, train, val
        self.trained: list[int] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(batch_idx)
        if len(self.trained) - 1 == self.train:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.validated.append(batch_idx)
        if len(self.validated) - 1 == self.val:
            os.kill(os.getpid(), self.number)


def images(batches: int) -> DataLoader:
    pixels = torch.randn(2 * batches, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(pixels, torch.arange(2 * batches) % 5), batch_size=2)


def stopped(folder: Path, at: At, **options: Any) -> tuple[StopOnSignal, dict[str, Any] | None]:
    """Train two epochs of four batches, with two batches of validation, until a signal; return what is saved."""
    stop = StopOnSignal()
    saver = RunCheckpoint(dirpath=folder, filename="last", enable_version_counter=False)
    run = trainer(at, saver, stop, enable_checkpointing=True, num_sanity_val_steps=0, **options)
    with pytest.raises(SystemExit) as ending:
        run.fit(make_classifier(), images(4), images(2))
    assert isinstance(ending.value, SIGTERMException)
    path = folder / "last.ckpt"
    return stop, torch.load(path, weights_only=True) if path.exists() else None


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_after_step_and_saves(number: int, tmp_path: Path, capfd: Any) -> None:
    at = At(number, train=1)
    stop, saved = stopped(tmp_path, at)
    assert stop.signal == number
    assert at.trained == [0, 1]
    assert saved is not None
    assert saved["global_step"] == 2
    told = capfd.readouterr().err
    assert "dynadapter: stopping after this step" in told
    assert ("Ctrl-C again stops at once" in told) == (number == signal.SIGINT)


def test_signal_while_accumulating(tmp_path: Path) -> None:
    at = At(signal.SIGTERM, train=0)
    _, saved = stopped(tmp_path, at, accumulate_grad_batches=2)
    assert at.trained == [0, 1]
    assert saved is not None
    assert saved["global_step"] == 1


@pytest.mark.parametrize(
    ("at", "options", "trained", "validated"),
    [
        (At(signal.SIGTERM, val=0), {}, 4, 2),  # at the end of an epoch
        (At(signal.SIGTERM, val=0), {"val_check_interval": 2}, 3, 2),  # in the middle of one: after the next step
        (At(signal.SIGTERM, train=1), {"val_check_interval": 2}, 2, 2),  # the validation that follows on the step
    ],
)
def test_signal_during_validation(at: At, options: dict, trained: int, validated: int, tmp_path: Path) -> None:
    at = At(at.number, at.train, at.val)
    _, saved = stopped(tmp_path, at, **options)
    assert (len(at.trained), len(at.validated)) == (trained, validated)
    assert saved is not None
    assert saved["global_step"] == trained


def test_second_ctrl_c_takes_no_step(tmp_path: Path) -> None:
    class Twice(Callback):
        steps = 0

        def on_train_batch_start(self, *_: Any) -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.steps += 1

    twice = Twice()
    saver = RunCheckpoint(dirpath=tmp_path, filename="last")
    run = trainer(twice, saver, StopOnSignal(), enable_checkpointing=True, num_sanity_val_steps=0)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(make_classifier(), images(4), images(1))
    assert not twice.steps
    assert not list(tmp_path.iterdir())


def test_callback_without_signal_changes_nothing(tmp_path: Path) -> None:
    module, at = make_classifier(), At(signal.SIGTERM)
    with_it = trainer(at, StopOnSignal())
    with_it.fit(module, images(4), images(1))
    alone = make_classifier()
    trainer().fit(alone, images(4), images(1))
    states: tuple[dict[str, Tensor], ...] = (module.state_dict(), alone.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(at.trained) == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signal_raises_terminated(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Terminated, match=f"stopped by {number.name}") as ending, stoppable():
        os.kill(os.getpid(), number)
    assert ending.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert not issubclass(Terminated, Exception)  # no handler for errors catches it


def test_nohup_keeps_ignoring_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
        trainer(StopOnSignal(), At(signal.SIGHUP, train=0)).fit(make_classifier(), images(1), images(1))


def test_slurm_keeps_its_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning answers SIGUSR1: it saves a checkpoint of its own and queues the job again; the training goes on."""
    called: list[list[str]] = []
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call", lambda cmd: called.append(cmd) or 0
    )
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    at, stop = At(signal.SIGUSR1, train=1), StopOnSignal()
    run = trainer(at, stop, plugins=[SLURMEnvironment()], default_root_dir=tmp_path, max_epochs=1)
    with stoppable():
        run.fit(make_classifier(), images(4), images(1))
    assert called == [["scontrol", "requeue", "123"]]
    assert (stop.signal, len(at.trained)) == (None, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["hpc_ckpt_1.ckpt"]


def test_worker_processes_keep_their_signals() -> None:
    """A signal to the whole process group reaches forked workers, which inherit the handler; they go on."""
    stop = StopOnSignal()
    stop._install(stop._remember)
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGHUP)
        os._exit(0 if stop.signal is None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_sigterm_in_another_thread() -> None:
    seen = []

    def work() -> None:
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
