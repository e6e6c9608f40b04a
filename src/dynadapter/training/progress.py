"""The progress of a training: the fraction of its plan that is done. All schedules are functions of it."""

import math
from collections.abc import Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer


def progress(trainer: Trainer) -> float:
    """Return the progress before the next optimiser step: 0 at the first step of training and 1 at the last.

    It is the largest of the finished fractions of the planned epochs, of ``max_steps`` and of ``max_time``. Within an
    epoch, batches count. So a training that is resumed with another batch size, number of devices or accumulation
    continues at the same progress and ends as planned.

    Without ``max_time`` it depends only on the trainer's counters: a training resumed without changes continues
    exactly, and all batches of one optimiser step see the same value. With ``max_time`` it follows the clock of the
    first process, and the batches of one step see different values.
    """
    return min(max(_fractions(trainer), default=0.0), 1.0)


def start_progress(trainer: Trainer, caller: str, varies: bool, batches: int | None = None) -> None:
    """Check that a training whose schedules vary has a known end, and convert the position of a resume in its epoch.

    Call it in ``on_train_start``. Lightning counts the batches of an epoch. After a resume with another batch size an
    epoch has another number of batches than the ``batches`` before, and the count is converted.

    Raises:
        ValueError: Something varies, and the end is unknown.
    """
    if varies and not list(_fractions(trainer)):
        raise ValueError(
            f"{caller} follows the progress of training, and this training has no known end; set max_steps or "
            "max_time (or max_epochs, with a data loader that has a length), or choose values that stay constant"
        )
    counts, now = trainer.fit_loop.epoch_loop.batch_progress, trainer.num_training_batches
    if counts.is_last_batch:
        batches = counts.current.ready
    if batches is not None and 0 < batches < math.inf and math.isfinite(now) and batches != now:
        seen = counts.current.ready
        shift = math.ceil(seen * now / batches) - seen
        for count in ("ready", "started", "processed", "completed"):
            setattr(counts.current, count, getattr(counts.current, count) + shift)


def _fractions(trainer: Trainer) -> Iterator[float]:
    """Yield the finished fraction of each limit of the training."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs >= 0 and math.isfinite(batches):
        # Of Lightning's counts only this one grows before the next learning rate is set
        now = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        begun = now - now % trainer.accumulate_grad_batches if now < batches else batches
        yield (trainer.current_epoch * batches + begun) / max(epochs * batches - _last_step(trainer), 1)
    if trainer.max_steps >= 0:
        # In manual optimisation Lightning counts the steps of every optimiser
        together = 1 if trainer.lightning_module.automatic_optimization else len(trainer.optimizers)
        yield trainer.global_step / max(trainer.max_steps - together, 1)
    for timer in (callback for callback in trainer.callbacks if isinstance(callback, Timer)):  # type: ignore[attr-defined]
        elapsed, remaining = timer.time_elapsed(), timer.time_remaining()
        if remaining is not None:
            # The clocks of processes differ, and their values must not
            yield trainer.strategy.broadcast(elapsed / max(elapsed + remaining, 1e-9))


def _last_step(trainer: Trainer) -> int:
    """Return the number of batches in the last optimiser step of a training with the given number of epochs."""
    assert trainer.max_epochs is not None
    accumulated, batches = trainer.accumulate_grad_batches, int(trainer.num_training_batches)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = callback.get_accumulate_grad_batches(trainer.max_epochs - 1)
    return batches % accumulated or min(accumulated, batches)
