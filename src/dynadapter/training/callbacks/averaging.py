"""WeightAverage: validate and save a moving average of the trained tensors."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dynadapter.training.sharding import is_sharded


class WeightAverage(EMAWeightAveraging):
    """Keep an exponential moving average of the trained tensors; the frozen backbone keeps its values.

    Validation uses the average, and a checkpoint saves it as the weights. A resumed training restores both the average
    and the current weights. Buffers, such as batch statistics and scheduled rates, are not averaged. (Lightning's
    EMAWeightAveraging also averages frozen tensors, which changes them by rounding.)

    Args:
        decay: Fraction of the average that a step keeps, in [0, 1).

    Raises:
        ValueError: If ``decay`` is out of range; at the start of fit, if the network is sharded, its trained tensors
            have 16 bits, or checkpoints hold the weights only.
    """

    _swapped = False  # whether the module holds the average, and the average the module's weights

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1; 0 averages nothing")
        super().__init__(use_buffers=False, decay=decay)
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the average when fit begins; the other stages measure the module's own weights."""
        self._average_model, self._swapped = None, False
        if stage == "fit":
            self._latest_update_step = 0  # Lightning keeps that of an earlier fit; a resume restores it afterwards
            # Lightning does not ask callbacks then, so that such a file would hold the current weights
            if any(getattr(saver, "save_weights_only", False) for saver in trainer.checkpoint_callbacks):
                raise ValueError(
                    "WeightAverage needs whole checkpoints, and save_weights_only=True leaves the average out; leave "
                    "save_weights_only out"
                )
            if getattr(pl_module, "device_mesh", None) is not None or is_sharded(pl_module):
                raise ValueError("WeightAverage needs whole tensors, here they are sharded; train with strategy: ddp")
            self._average_model = _Average(pl_module, self.decay)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to the module's device and precision; frozen tensors share memory with the module."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)
        for average, current in zip(self._average_model.module.parameters(), pl_module.parameters(), strict=True):
            if not current.requires_grad:
                average.data = current.data
            elif torch.finfo(current.dtype).bits < 32:
                raise ValueError(
                    f"WeightAverage adds small updates, which tensors in {str(current.dtype).removeprefix('torch.')} "
                    f"round away; train with precision bf16-mixed or 16-mixed, not {trainer.precision}"
                )
            else:
                average.data = average.data.to(current.dtype)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the current weights back into the module."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module also where no step was left to train, and training did not begin."""
        self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the current weights back if validation failed; callbacks that save a checkpoint come later."""
        if self._swapped:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average in fit; in other stages the loaded weights are the average already."""
        if self._average_model is not None:
            averaged: Any = self._average_model.module
            averaged.full_checkpoint = getattr(pl_module, "full_checkpoint", False)  # loading may have set it
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the weights, and the state for a resume."""
        if self._average_model is not None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


class _Average(AveragedModel):
    """A copy of a module whose trained tensors follow those of the module."""

    def __init__(self, module: LightningModule, decay: float) -> None:
        super().__init__(module)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average one step; the first one copies the module. Buffers are copied."""
        share = torch.where(self.n_averaged == 0, 1.0, 1 - self.decay)  # a tensor: the device is not waited for
        for average, current in zip(self.module.parameters(), model.parameters(), strict=True):
            if current.requires_grad:
                average.lerp_(current, share.to(average.dtype))
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.n_averaged += 1
