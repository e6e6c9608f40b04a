"""Policies at evaluation time: who leaves where, and how accurate that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from dynadapter.callbacks._common import exit_net
from dynadapter.metrics import ExitUse
from dynadapter.policies import Confidence, Policy, route


@dataclass
class PolicyResult:
    """What a policy gave on a whole split.

    Attributes:
        name: The policy's short name.
        accuracy: Share of the samples that were classified right, in [0, 1].
        shares: Share of the samples that left at each exit (exits,), adding up to 1.
        nonfinite: Samples whose logits were not finite; such a sample never leaves early.
    """

    name: str
    accuracy: float
    shares: Tensor
    nonfinite: int


class _Tally:
    """Accuracy, exit use and non-finite logits of one policy while a split runs."""

    def __init__(self, exits: int, classes: int, device: torch.device) -> None:
        self.accuracy = MulticlassAccuracy(classes, average="micro").to(device)
        self.use = ExitUse(exits).to(device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, exits: Tensor, targets: Tensor) -> None:
        self.accuracy.update(logits.argmax(-1), targets)  # of indices: a non-finite row is a wrong answer, not a crash
        self.use.update(exits)
        self.nonfinite += (~logits.isfinite().all(-1)).sum()


class EarlyExit(Callback):
    """Applies policies whenever the model is validated, tested or asked to predict.

    In a test each policy really routes every batch (:meth:`ExitNet.early`); in validation the same answer is computed
    from the logits of all exits, which the step returns anyway. Predictions follow the first policy.
    Each policy logs ``<split>/<policy>/acc`` and ``<split>/<policy>/share_exit<k>``.

    A step of the LightningModule takes part by returning a mapping with ``logits`` (exits, batch, classes) and
    ``targets`` (batch,); its test batches are ``(images, targets)``.

    Args:
        policies: The policies to apply, each with thresholds of its own.

    Attributes:
        results: What each policy gave on the last split.
    """

    def __init__(self, policies: Sequence[Policy] | None = None) -> None:
        self.policies = list(policies) if policies is not None else [Confidence(0.9)]
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"each policy may be given once; got {', '.join(names)}")
        self.results: list[PolicyResult] = []
        self._tallies: dict[str, _Tally] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the thresholds before anything runs, and sets the policy of predictions."""
        net = exit_net(pl_module, self)
        for policy in self.policies:
            policy.check(net.num_exits)
        if stage == "predict" and self.policies:
            pl_module.policy = self.policies[0]  # type: ignore[assignment]

    def _start(self, pl_module: LightningModule) -> None:
        net = exit_net(pl_module, self)
        self._tallies = {p.name: _Tally(net.num_exits, net.num_classes, pl_module.device) for p in self.policies}

    on_validation_epoch_start = on_test_epoch_start = lambda self, trainer, pl_module: self._start(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Reads off the stacked logits where each policy lets the samples leave."""
        logits, targets = outputs["logits"], outputs["targets"]
        for policy in self.policies:
            exits = route(policy, logits)
            self._tallies[policy.name].add(logits[exits, torch.arange(len(targets))], exits, targets)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Routes the batch once a policy."""
        images, targets = batch[0], outputs["targets"]
        net = exit_net(pl_module, self)
        for policy in self.policies:
            with trainer.precision_plugin.forward_context():
                routed = net.early(images, policy)
            self._tallies[policy.name].add(routed.logits, routed.exits, targets)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        self.results = []
        for name, tally in self._tallies.items():
            nonfinite = trainer.strategy.reduce(tally.nonfinite, reduce_op="sum")
            result = PolicyResult(name, float(tally.accuracy.compute()), tally.use.compute().cpu(), int(nonfinite))
            self.results.append(result)
            values = {f"{split}/{name}/acc": result.accuracy}
            for k, share in enumerate(result.shares.tolist(), start=1):
                values[f"{split}/{name}/share_exit{k}"] = share
            # Every rank holds the same reduced values already.
            pl_module.log_dict(values, on_step=False, on_epoch=True, rank_zero_only=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what each policy gave."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what each policy gave."""
        self._finish(trainer, pl_module, "test")
