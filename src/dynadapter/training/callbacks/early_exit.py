"""Policies at evaluation time: who leaves where, and how accurate that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dynadapter.exits.policies import Confidence, Policy, route
from dynadapter.training.callbacks._common import exit_net
from dynadapter.training.losses import IGNORED
from dynadapter.training.metrics import ExitUse
from dynadapter.training.sharding import is_sharded


@dataclass
class PolicyResult:
    """What a policy gave on a whole split.

    Args:
        name: The policy's short name.
        accuracy: Share of the samples that were classified right, in [0, 1].
        shares: Share of the samples that left at each exit (exits,), adding up to 1.
        nonfinite: Samples whose logits were not finite; they never leave early and count as wrong.
    """

    name: str
    accuracy: float
    shares: Tensor
    nonfinite: int


class PolicyUse(ExitUse):
    """Counts at which exit samples left under a policy, how many of them were right, and non-finite logits.

    Args:
        exits: Number of all exits, the last included.
    """

    right: Tensor
    nonfinite: Tensor

    def __init__(self, exits: int) -> None:
        super().__init__(exits)
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("nonfinite", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, exits: Tensor, logits: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Counts a batch.

        Args:
            exits: Zero-based exits (batch,).
            logits: Logits at those exits (batch, classes).
            targets: Classes (batch,).
        """
        super().update(exits)
        finite = logits.isfinite().all(-1)
        self.right += ((logits.argmax(-1) == targets) & finite).sum()
        self.nonfinite += (~finite).sum()

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Gives the shares (exits,), the accuracy, and the number of samples with non-finite logits."""
        return super().compute(), self.right / self.counts.sum().clamp(min=1), self.nonfinite


class EarlyExit(Callback):
    """Applies policies whenever the model is validated, tested or asked to predict.

    In a test each policy really routes every batch (:meth:`ExitNet.early`); in validation, and where the network is
    sharded, the same answer is computed from the logits of all exits, which the step returns anyway. Predictions follow
    the first policy. Each policy logs ``<split>/<policy>/acc`` and ``<split>/<policy>/share_exit<k>``.

    Several processes give what one would. Samples of class -100 only fill up a batch and are not counted.

    Works in any LightningModule that holds one :class:`~dynadapter.exits.net.ExitNet`, if its validation step returns a
    mapping with ``logits`` (exits, batch, classes) and ``targets`` (batch,), its test step one with ``targets``, and
    its test batches start with the images. Its prediction step finds the policy as ``self.policy``.

    Args:
        policies: The policies to apply, each with thresholds of its own; null is ``Confidence(0.9)``.

    Raises:
        ValueError: If a policy is given twice; or, before anything runs, if thresholds do not fit the exits.
    """

    def __init__(self, policies: Sequence[Policy] | None = None) -> None:
        self.policies = list(policies) if policies is not None else [Confidence(0.9)]
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"each policy may be given once; got {', '.join(names)}")
        self._uses: dict[str, PolicyUse] = {}

    @property
    def results(self) -> list[PolicyResult]:
        """What each policy gave on the last split; empty where none has run."""
        results = []
        for name, use in self._uses.items():
            shares, accuracy, nonfinite = use.compute()
            results.append(PolicyResult(name, float(accuracy), shares.cpu(), int(nonfinite)))
        return results

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the thresholds before anything runs, and sets the policy of predictions."""
        net = exit_net(pl_module, self)
        for policy in self.policies:
            policy.check(net.num_exits)
        if stage == "predict" and self.policies:
            pl_module.policy = self.policies[0]  # type: ignore[assignment]
        self._uses = {}

    # ---- validation: read off the logits of all exits

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count."""
        self._start(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Reads off the stacked logits where each policy lets the samples leave."""
        self._read_off(outputs, "validation")

    def _read_off(self, outputs: Any, step: str) -> None:
        logits, targets = self._output(outputs, "logits", step), self._output(outputs, "targets", step)
        counted = (targets != IGNORED).nonzero()[:, 0]
        logits, targets = logits[:, counted], targets[counted]
        rows = torch.arange(len(targets), device=targets.device)
        for policy in self.policies:
            exits = route(policy, logits)
            self._uses[policy.name].update(exits, logits[exits, rows], targets)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what each policy gave."""
        self._log(pl_module, "val")

    # ---- test: route

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count."""
        self._start(pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Routes the batch once a policy."""
        targets, net = self._output(outputs, "targets", "test"), exit_net(pl_module, self)
        if is_sharded(net):  # all processes must run all blocks: each has a part of every tensor
            self._read_off(outputs, "test")
            return
        counted = (targets != IGNORED).nonzero()[:, 0]
        for policy in self.policies:
            with trainer.precision_plugin.forward_context():
                routed = net.early(batch[0], policy)
            self._uses[policy.name].update(routed.exit_index[counted], routed.logits[counted], targets[counted])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what each policy gave."""
        self._log(pl_module, "test")

    # ----

    def _start(self, pl_module: LightningModule) -> None:
        exits = exit_net(pl_module, self).num_exits
        self._uses = {policy.name: PolicyUse(exits).to(pl_module.device) for policy in self.policies}

    def _output(self, outputs: Any, key: str, step: str) -> Tensor:
        if not isinstance(outputs, Mapping) or key not in outputs:
            given = (
                f"one with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else type(outputs).__name__
            )
            raise ValueError(f"EarlyExit needs {step}_step to return a mapping with {key!r}, not {given}")
        return outputs[key]

    def _log(self, pl_module: LightningModule, split: str) -> None:
        for result in self.results:
            values = {f"{split}/{result.name}/acc": result.accuracy}
            for k, share in enumerate(result.shares.tolist(), start=1):
                values[f"{split}/{result.name}/share_exit{k}"] = share
            pl_module.log_dict(values, sync_dist=True)  # they are the same already; Lightning would warn
            if result.nonfinite:
                rank_zero_warn(
                    f"{split}, {result.name}: {result.nonfinite} sample(s) have logits that are not finite; they count "
                    "as wrong and cannot leave early"
                )
