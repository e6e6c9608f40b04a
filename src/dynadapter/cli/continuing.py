"""Restore the state of an interrupted training exactly, in a new run folder."""

import inspect
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dynadapter.cli.errors import Mistake
from dynadapter.cli.resume import LINE, RUN, Earlier
from dynadapter.cli.runs import Metrics
from dynadapter.files import write
from dynadapter.training.checkpoints import read
from dynadapter.training.entries import ADVICE


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
        """Store the run, and the line that is about to be logged: a training resumed from here will not log it."""
        checkpoint[RUN] = os.path.abspath(trainer.default_root_dir)
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
