"""FiniteCheck: stop training when a loss or a trained tensor is not finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dynadapter.training.callbacks._common import data_module
from dynadapter.training.processes import gather_from_processes, is_distributed
from dynadapter.training.sharding import local_part

Exits = tuple[Tensor, Tensor]


@dataclass
class _Step:
    """The losses and the position of a training step.

    Args:
        losses: Of each exit ``(exits,)``, the mean over all processes.
        finite: For each image of this process ``(batch,)``, whether all its logits are finite.
        step: Number of earlier optimiser steps.
        epoch: Index of the epoch.
        batch: Index of the batch in the epoch.
        copied: Event after which ``losses`` is readable on the CPU; None if it is readable now.
    """

    losses: Tensor
    finite: Tensor
    step: int
    epoch: int
    batch: int
    copied: torch.cuda.Event | None = None


class FiniteCheck(Callback):
    """Stop training when a loss is not finite, and name the exits and images.

    On a CPU the check comes before the backward pass. On an accelerator, reading a value would wait for the device.
    Each step is therefore checked when the next one begins, and before validation, saving and the end of training.

    Works with a module whose ``step_losses`` holds, after each training step, the exits' losses ``(exits,)``, equal in
    all processes, and whether the logits of each image are finite ``(batch,)``. :class:`ExitClassifier` adds this
    callback to every trainer.
    """

    def __init__(self) -> None:
        self._last: _Step | None = None  # the step that has not been checked yet
        self._batch = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._check_last(trainer)
        self._batch = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        noted: Exits | None = getattr(pl_module, "step_losses", None)
        if noted is None:
            return
        losses, finite = noted
        known, copied = self._readable(losses), None
        if losses.device.type == "cuda":  # copied now, read when the next step begins
            losses = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True).copy_(losses, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._last = _Step(losses, finite, trainer.global_step, trainer.current_epoch, self._batch, copied)
        if known:
            self._check_last(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_last(trainer)

    on_train_end = on_validation_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_last(trainer)

    @staticmethod
    def _readable(losses: Tensor) -> bool:
        """Check whether values can be read without waiting for a device."""
        return losses.device.type == "cpu"

    def _check_last(self, trainer: Trainer) -> None:
        """Check the last step; all processes do this at the same point with the same result."""
        last, self._last = self._last, None
        if last is None:
            return
        if last.copied is not None:
            last.copied.synchronize()
        if last.losses.isfinite().all():
            return
        exits = [str(k) for k, loss in enumerate(last.losses.tolist(), start=1) if not math.isfinite(loss)]
        where = [part for part in gather_from_processes(_describe_images(last, trainer)) if part]
        raise ValueError(
            f"the training loss is not finite at step {last.step} (epoch {last.epoch}, exit {', '.join(exits)}"
            f"{', ' if where else ''}{'; '.join(where)}); lower the learning rate, clip gradients, train in bf16 or 32 "
            "bits, or look for images with broken values"
        )


def _describe_images(last: _Step, trainer: Trainer) -> str:
    """Return the number and, if known, the names of this process's images whose logits were not finite."""
    broken = (~last.finite).nonzero()[:, 0].tolist()
    if not broken:
        return ""
    files = getattr(data_module(trainer), "files", None)
    names = files(last.epoch, last.batch) if files is not None else []
    count = f"{len(broken)} of {len(last.finite)} images"
    process = f" in process {trainer.global_rank}" if is_distributed() else ""
    if len(names) != len(last.finite):
        return count + process
    listed = ", ".join(names[row] for row in broken[:8]) + (" ..." if len(broken) > 8 else "")
    return f"{count}{process}: {listed}"


def require_finite_weights(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Check the trained tensors in a checkpoint before it replaces an earlier one."""
    trained = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
    states = [checkpoint.get(key, {}) for key in ("state_dict", "current_model_state")]
    broken = [
        name
        for state in states
        for name, tensor in state.items()
        if name in trained and not local_part(tensor).isfinite().all()
    ]
    named = [name for names in gather_from_processes(broken) for name in names]
    if named:
        raise ValueError(
            f"{len(set(named))} trained tensors are not finite after step {module.global_step}, {named[0]} among "
            "them; the earlier checkpoint is kept: resume from it with a lower learning rate, clipped gradients, or "
            "in bf16 or 32 bits"
        )
