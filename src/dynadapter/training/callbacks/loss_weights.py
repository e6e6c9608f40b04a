"""ExitWeights: a loss-weight schedule for the exits."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynadapter.exits.net import ExitNet
from dynadapter.training.callbacks._common import exit_net
from dynadapter.training.progress import progress, start_progress
from dynadapter.training.weighting import LateToEarly, Weighting


class ExitWeights(Callback):
    """Write each exit's weight in the joint loss into ``ExitNet.exit_weights`` during training.

    Works in any LightningModule that holds one :class:`~dynadapter.exits.net.ExitNet` and multiplies its losses by this
    buffer. The weights depend on the :func:`~dynadapter.training.progress.progress` of training alone, so a resumed
    training continues exactly. They are logged as ``exit_weights/1``, ``exit_weights/2`` and so on.

    Args:
        weighting: The weights as a function of progress.

    Raises:
        ValueError: At the start of fit, if the module holds no ExitNet or several, if the weights of the first or the
            last step are invalid, or if the weights vary and training has no known end.
    """

    def __init__(self, weighting: Weighting = LateToEarly()) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.weighting = weighting

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._net: ExitNet = exit_net(pl_module, self)
        for end in (0.0, 1.0):
            self.weighting(end, self._net.num_exits)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: the number of batches is unknown until now.
        start_progress(trainer, type(self).__name__, self.weighting.varies)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        weights = self.weighting(progress(trainer), self._net.num_exits)
        with torch.no_grad():
            self._net.exit_weights.copy_(torch.tensor(weights))  # in place: a compiled step needs no recompilation
        pl_module.log_dict({f"exit_weights/{k}": weight for k, weight in enumerate(weights, 1)})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.__dict__.pop("_net", None)  # the callback may be used for another network
