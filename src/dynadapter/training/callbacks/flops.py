"""FlopsReport: print tables of cost and accuracy at the end of a run, per exit and per exit policy."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from torch import Tensor

from dynadapter.cost import ExitCosts, cost_table, exit_costs, exit_parameters
from dynadapter.cost.table import percents, policy_table
from dynadapter.printing import print_tables
from dynadapter.training.callbacks._common import data_module, exit_net, split_of
from dynadapter.training.callbacks.early_exit import EarlyExit, PolicyResult
from dynadapter.training.metrics import ExitUse
from dynadapter.training.sharding import is_sharded


class FlopsReport(Callback):
    """Count the GMACs up to each exit (1 MAC = 2 FLOPs), and average them over the exit shares.

    It logs ``<split>/<policy>/gmacs`` for every policy of an :class:`EarlyExit` callback, and ``<split>/gmacs`` if a
    step's output itself holds ``exit_index`` (a :class:`~dynadapter.exits.policies.Routed`, or a mapping). At the end
    of a run it prints a table exit | after block | GMACs | % of static | accuracy | share | parameters, and one with a
    row per policy. Accuracies are those that the module logs as ``<split>/acc_exit<k>``.

    Works in any LightningModule that holds one :class:`~dynadapter.exits.net.ExitNet`; the order of the callbacks does
    not matter.

    Args:
        image_size: Pixels of the square input; None uses that of the data module, else that of the first batch, and
            until then the backbone's own.
        show: Whether to print the tables.

    Attributes:
        costs: MACs of one image up to each exit; available from ``setup`` on.
    """

    def __init__(self, image_size: int | None = None, show: bool = True) -> None:
        self.image_size = image_size
        self.show = show
        self.costs: ExitCosts | None = None
        self._size: int | tuple[int, int] | None = None
        self._own: ExitUse | None = None
        self._early: list[EarlyExit] = []

    @property
    def average_gmacs(self) -> dict[str, float]:
        """Average cost in GMACs of an image of the last split, by policy; key ``""`` is routing by the step itself."""
        if self.costs is None:
            return {}
        return {name: self.costs.average(shares) / 1e9 for name, shares in self._shares().items()}

    def _results(self) -> list[PolicyResult]:
        return [result for callback in self._early for result in callback.results]

    def _shares(self) -> dict[str, Tensor]:
        own = {"": self._own.compute().cpu()} if self._own is not None and self._own.update_called else {}
        return {result.name: result.shares for result in self._results()} | own

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Trace the network once; a sharded network keeps its earlier costs."""
        self._count(pl_module, self._given_size(trainer))
        self._own = None
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        self._early = [callback for callback in callbacks if isinstance(callback, EarlyExit)]

    def _given_size(self, trainer: Trainer) -> int | None:
        return self.image_size or getattr(data_module(trainer), "image_size", None)

    def _count(self, pl_module: LightningModule, size: int | tuple[int, int] | None) -> None:
        """Count the MACs of an image of this size, unless the network is sharded."""
        self._size, net = size, exit_net(pl_module, self)
        if not is_sharded(net):
            self.costs = exit_costs(net, size)
        elif self.costs is None:
            raise ValueError(
                "FlopsReport cannot count the MACs of a sharded network; use the callback of an earlier stage, or "
                "`dynadapter flops`"
            )

    # ---- counting the exits that a step's output holds

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; trace the network again if a checkpoint has changed the size of the images."""
        if (size := self._given_size(trainer)) not in (None, self._size):
            self._count(pl_module, size)
        self._own = ExitUse(exit_net(pl_module, self).num_exits).to(pl_module.device)

    on_train_start = on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the untrained network's exits."""
        self._own = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the exits of a batch; the first batch gives the image size where nothing else did."""
        images = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
        if self._size is None and isinstance(images, Tensor) and images.ndim in (4, 5):
            self._count(pl_module, (images.shape[-2], images.shape[-1]))
        exits = outputs.get("exit_index") if isinstance(outputs, Mapping) else getattr(outputs, "exit_index", None)
        if exits is not None and self._own is not None:
            self._own.update(torch.as_tensor(exits, device=self._own.device))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    # ---- logging

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the average cost of an image."""
        average, split = self.average_gmacs, split_of(trainer)
        values = {f"{split}/{name}/gmacs" if name else f"{split}/gmacs": value for name, value in average.items()}
        pl_module.log_dict(values, sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the counts of all processes; Lightning logs nothing in predict."""
        self._shares()

    # ---- printing

    def tables(self, trainer: Trainer, pl_module: LightningModule, split: str) -> list[Table]:
        """Return the table of the exits, and that of the policies if there are any."""
        assert self.costs is not None
        net, shares = exit_net(pl_module, self), self._shares()
        logged = [trainer.callback_metrics.get(f"{split}/acc_exit{k}") for k in range(1, net.num_exits + 1)]
        columns: dict[str, list[str]] = {}
        if None not in logged:
            columns["accuracy"] = percents(logged)  # type: ignore[arg-type]
        first = next(iter(shares), None)  # the table of the policies has all of them
        if first is not None:
            columns["share"] = percents(shares[first])
        columns["parameters"] = [f"{count:,}" for count in exit_parameters(net)]
        exits = cost_table(self.costs, **columns)
        exits.title = f"Exits ({split}{', shares under ' + first if first else ''})"
        if not shares:
            return [exits]
        accuracy = {result.name: result.accuracy for result in self._results()}
        routed = {name or "as routed": (accuracy.get(name), by_exit) for name, by_exit in shares.items()}
        return [exits, policy_table(f"Early exit ({split})", self.costs, routed)]

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the tables of the last validation, or of what the trainer has measured."""
        if self.show:
            print_tables(*self.tables(trainer, pl_module, split_of(trainer)))

    on_test_end = on_predict_end = on_fit_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the tables, unless the validation belongs to a training."""
        if trainer.state.fn == "validate":
            self.on_fit_end(trainer, pl_module)
