"""LearningCheck: warn if the training loss did not fall."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

LEAST_EPOCHS = 5
"""A training of fewer epochs is not checked."""


class LearningCheck(Callback):
    """Compare the last exit's training loss of the last epoch with that of the first.

    A learning rate or adapter scale that is too large can destroy the features during training. Every image then gets
    the same prediction, and the loss is finite but that of guessing. ``dynadapter fit`` warns of such a training, and a
    sweep does not choose its scale.

    Works with a module that has ``step_losses`` (see :class:`FiniteCheck`). A resumed training continues the check.
    """

    def __init__(self) -> None:
        self._means: list[float] = []
        self._sum: Tensor | float = 0.0
        self._steps = 0

    @property
    def means(self) -> tuple[float, ...]:
        """The last exit's mean training loss of each epoch so far."""
        return tuple(self._means)

    @property
    def finding(self) -> str | None:
        """The warning as one line; None if the loss fell, or after fewer than five epochs."""
        if len(self._means) < LEAST_EPOCHS or self._means[-1] < self._means[0]:
            return None
        return (
            f"the training learned nothing: the mean loss of the last exit is {self._means[-1]:.3f} in the last epoch, "
            f"and was {self._means[0]:.3f} in the first; lower the adapter's scale or the learning rate"
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        noted: tuple[Tensor, Tensor] | None = getattr(pl_module, "step_losses", None)
        if noted is not None:
            self._sum = self._sum + noted[0][-1]  # stays on its device: reading it would wait
            self._steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps:
            self._means.append(float(self._sum) / self._steps)
        self._sum, self._steps = 0.0, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.finding is not None:
            rank_zero_warn(self.finding)

    def state_dict(self) -> dict[str, Any]:
        """Return the means so far."""
        return {"means": list(self._means), "sum": float(self._sum), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the means so far."""
        self._means = [float(mean) for mean in state_dict["means"]]
        self._sum, self._steps = float(state_dict["sum"]), int(state_dict["steps"])
