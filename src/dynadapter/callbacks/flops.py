"""The table at the end: what each exit costs, how well it does, and what the routing that really occurred has cost."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from dynadapter.callbacks._common import exit_net
from dynadapter.callbacks.early_exit import EarlyExit
from dynadapter.cost import ExitCosts, cost_table, exit_costs, exit_parameters
from dynadapter.metrics import ExitUse


class FlopsReport(Callback):
    """Counts multiply-adds up to each exit, and averages them over the exits at which samples really left.

    It logs ``<split>/<policy>/gmacs`` for every policy of an :class:`EarlyExit` callback, and ``<split>/gmacs`` where a
    step's output itself holds ``exits`` (a :class:`~dynadapter.net.Routed`, or a mapping). At the end of a run it prints
    a table exit | after block | GMACs | accuracy | share | parameters, and one with a row a policy.

    Args:
        image_size: Pixels of the square input; None takes that of the data module, else the trunk's own.
        show: Whether to print the tables.

    Attributes:
        costs: Multiply-adds of one image up to each exit; available from ``setup`` on.
        average_gmacs: The last split's average cost of one image, by policy; key ``""`` for a step's own routing.
    """

    def __init__(self, image_size: int | None = None, show: bool = True) -> None:
        self.image_size = image_size
        self.show = show
        self.costs: ExitCosts | None = None
        self.average_gmacs: dict[str, float] = {}
        self._own: ExitUse | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Traces the network once."""
        size = self.image_size or getattr(getattr(trainer, "datamodule", None), "image_size", None)
        self.costs = exit_costs(exit_net(pl_module, self), size)

    def _start(self, pl_module: LightningModule) -> None:
        self._own = ExitUse(exit_net(pl_module, self).num_exits).to(pl_module.device)

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = lambda self, trainer, pl_module: (
        self._start(pl_module)
    )

    def _count(self, outputs: Any) -> None:
        exits = outputs.get("exits") if isinstance(outputs, dict) else getattr(outputs, "exits", None)
        if exits is not None and self._own is not None:
            self._own.update(torch.as_tensor(exits, device=self._own.device))

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = (
        lambda self, trainer, pl_module, outputs, *_, **__: self._count(outputs)
    )

    def _finish(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        assert self.costs is not None
        shares = {r.name: r.shares for c in trainer.callbacks if isinstance(c, EarlyExit) for r in c.results}
        if self._own is not None and self._own.update_called:
            shares[""] = self._own.compute().cpu()
        self.average_gmacs = {name: self.costs.average(share) / 1e9 for name, share in shares.items()}
        if split != "predict":
            values = {f"{split}/{name}/gmacs".replace("//", "/"): v for name, v in self.average_gmacs.items()}
            pl_module.log_dict(values, on_step=False, on_epoch=True, rank_zero_only=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the average cost of an image."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the average cost of an image."""
        self._finish(trainer, pl_module, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages the cost of an image."""
        self._finish(trainer, pl_module, "predict")

    @rank_zero_only
    def _print(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        if self.show and self.costs is not None:
            console = Console()
            console.width = max(console.width, 100)  # a narrow pipe would fold the names
            for table in self.tables(trainer, pl_module, split):
                console.print(table)

    def tables(self, trainer: Trainer, pl_module: LightningModule, split: str) -> list[Table]:
        """Makes the table of the exits, and that of the policies where there are any.

        Args:
            trainer: The trainer, after a run.
            pl_module: The module that ran.
            split: ``val``, ``test`` or ``predict``.
        """
        assert self.costs is not None
        net, metrics = exit_net(pl_module, self), trainer.callback_metrics
        results = [r for c in trainer.callbacks if isinstance(c, EarlyExit) for r in c.results] if split != "predict" else []
        own = self._own.compute() if self._own is not None and self._own.update_called else None
        shares = results[0].shares if results else own
        columns: dict[str, list[str]] = {}
        accuracy = [metrics.get(f"{split}/acc_exit{k + 1}") for k in range(net.num_exits)]
        if all(a is not None for a in accuracy):
            columns["accuracy"] = [f"{float(a):.1%}" for a in accuracy]  # type: ignore[arg-type]
        if shares is not None:
            columns["share"] = [f"{s:.1%}" for s in shares.tolist()]
        columns["parameters"] = [f"{n:,}" for n in exit_parameters(net)]
        exits = cost_table(self.costs, **columns)
        exits.title = f"Exits ({split})" + (f", shares under {results[0].name}" if results else "")
        if split == "predict" and "" in self.average_gmacs:
            average = self.average_gmacs[""]
            exits.caption = f"an image took {average:.3g} GMACs on average, {1e9 * average / self.costs.trunk:.1%} of the trunk"
        if not results:
            return [exits]
        policies = Table("policy", title=f"Policies ({split})")
        for heading in ("accuracy", "GMACs", "of the trunk", "share of samples by exit"):
            policies.add_column(heading, justify="right")
        for result in results:
            gmacs = self.average_gmacs[result.name]
            share = " / ".join(f"{s:.1%}" for s in result.shares.tolist())
            cells = (f"{result.accuracy:.1%}", f"{gmacs:.3g}", f"{1e9 * gmacs / self.costs.trunk:.1%}", share)
            policies.add_row(result.name, *cells)
        return [exits, policies]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what the last validation gave."""
        self._print(trainer, pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the tables, unless the validation was one of many inside training."""
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the tables."""
        self._print(trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the tables."""
        self._print(trainer, pl_module, "predict")
