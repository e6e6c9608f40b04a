"""Signals and Ctrl-C: stop a training after a step, the same on all processes, and save it."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dynadapter.cli.errors import stopping_signals
from dynadapter.cli.runs import is_first_process

Handler = Callable[[int, FrameType | None], Any]


class StopOnSignal(Callback):
    """Stop at a point from which a training can be resumed exactly: after an optimiser step and its validation.

    At each step the processes check whether any of them received a signal. The state is saved as ``last.ckpt`` next to
    the other checkpoints, unless a checkpoint of the same step exists. A second Ctrl-C stops at once and saves nothing.
    Commands other than fit stop at once.

    SIGTERM, SIGHUP (closed terminal) and SIGUSR1 (warning of a scheduler) do the same as Ctrl-C.

    (Lightning's own handling of SIGTERM can stop processes at different steps, or in the middle of a validation.)
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._requeue: int | None = None
        self._agreed = False
        self._saved = -1

    # ---- listening

    def _install(self, handler: Handler) -> None:
        pid = os.getpid()

        def here(number: int, frame: FrameType | None) -> None:
            if os.getpid() == pid:  # processes that read images inherit the handler
                handler(number, frame)

        # Lightning has installed a handler of its own only now, and in the end restores the one before that.
        if threading.current_thread() is threading.main_thread():
            for number in {*stopping_signals(), signal.SIGINT} - {self._requeue}:
                signal.signal(number, here)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave to Lightning the signal with which SLURM requests a save and a requeue."""
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal or getattr(signal, "SIGUSR1", None)
            if self._requeue is not None and threading.current_thread() is threading.main_thread():
                signal.signal(self._requeue, signal.SIG_DFL)  # it leaves a handler of others alone

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            more = "; Ctrl-C again stops at once, and saves nothing" if number == signal.SIGINT else ""
            if is_first_process():
                with contextlib.suppress(OSError):  # not by print, which may be in the middle of printing
                    os.write(2, f"\ndynadapter: stopping after this step{more}\n".encode())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(self._remember)

    on_sanity_check_start = on_train_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._stop_lightning(trainer, False)  # it would stop in the middle of the validation
        else:
            self._stop_at_once(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_at_once(trainer)

    def _stop_at_once(self, trainer: Trainer) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                return
            self.signal = number
            for process in getattr(trainer.strategy.launcher, "procs", ()):  # those that Lightning has started
                with contextlib.suppress(OSError):
                    process.send_signal(signal.SIGTERM)
            raise SIGTERMException

        self._install(stop)

    # ---- stopping

    def _any_process_received(self, trainer: Trainer) -> bool:
        here = self.signal is not None
        return trainer.strategy.reduce_boolean_decision(here, all=False) if trainer.world_size > 1 else here

    def _stop_lightning(self, trainer: Trainer, stop: bool) -> None:
        trainer._signal_connector.received_sigterm = stop  # Lightning looks at it after the step and after the epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return  # no checkpoint holds the gradients so far
        self._agreed = self._any_process_received(trainer)
        if self._agreed and not trainer.is_last_batch:
            self._stop_lightning(trainer, True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._agreed and trainer.state.fn == "fit" and not trainer.is_last_batch:
            self._stop_lightning(trainer, True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agreed = self._agreed or self._any_process_received(trainer)
        self._stop_lightning(trainer, self._agreed)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        saver = trainer.checkpoint_callback
        if not isinstance(exception, SIGTERMException) or not self._agreed or self._saved == trainer.global_step:
            return
        if isinstance(saver, ModelCheckpoint) and saver.dirpath is not None:
            trainer.save_checkpoint(Path(saver.dirpath) / f"last{saver.FILE_EXTENSION}", weights_only=False)
