"""Keep the logits of all exits of an evaluation for later computations, such as thresholds."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class StackedLogits(Callback):
    """Keep the logits of all exits and the targets of a validation or a test, on the CPU.

    The steps of the module must return a mapping with ``logits`` (exits, batch, classes) and ``targets`` (batch,).
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    @property
    def logits(self) -> Tensor:
        """Logits (exits, samples, classes), float32."""
        return torch.cat(self._logits, 1)

    @property
    def targets(self) -> Tensor:
        """Targets (samples,)."""
        return torch.cat(self._targets)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the step returned."""
        self._logits.append(outputs["logits"].float().cpu())
        self._targets.append(outputs["targets"].cpu())

    on_test_batch_end = on_validation_batch_end
