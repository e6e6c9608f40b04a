"""EarlyExit: apply exit policies in evaluation to the logits of all exits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Policy, read_off
from dynadapter.training.callbacks._common import exit_net, split_of
from dynadapter.training.losses import IGNORED
from dynadapter.training.metrics import BalancedAccuracy, ExitUse, MacroF1, Recall
from dynadapter.training.sharding import is_sharded


@dataclass
class PolicyResult:
    """The result of one policy on a whole split.

    Args:
        name: The policy's short name.
        accuracy: Fraction of the samples that were classified right, in [0, 1].
        balanced: The mean over classes of this fraction, in [0, 1].
        macro_f1: The mean over classes of F1, in [0, 1].
        by_class: Accuracy of each class ``(classes,)``; NaN for a class without samples.
        shares: Exit shares ``(exits,)``, which sum to 1.
        nonfinite: Samples whose logits were not finite; they never exit early and count as wrong.
    """

    name: str
    accuracy: float
    balanced: float
    macro_f1: float
    by_class: Tensor
    shares: Tensor
    nonfinite: int


class PolicyUse(ExitUse):
    """Count how many samples stop at each exit, how many of them are right, and non-finite logits."""

    right: Tensor
    nonfinite: Tensor

    def __init__(self, exits: int, classes: int) -> None:
        super().__init__(exits)
        self.by_class = Recall(classes)
        self.balanced = BalancedAccuracy(classes)
        self.macro_f1 = MacroF1(classes)
        self._add_sum("right")
        self._add_sum("nonfinite")

    def update(self, exit_index: Tensor, logits: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Count a batch.

        Args:
            exit_index: ``(batch,)`` integers, from 0.
            logits: Logits at these exits ``(batch, classes)``.
            targets: Class indices ``(batch,)``.
        """
        super().update(exit_index)
        finite = logits.isfinite().all(-1)
        predicted = logits.argmax(-1).masked_fill(~finite, -1)
        self.right += (predicted == targets).sum()
        self.nonfinite += (~finite).sum()
        for metric in (self.by_class, self.balanced, self.macro_f1):
            metric.update(predicted, targets)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return the exit shares ``(exits,)``, the accuracy, and the number of samples with non-finite logits."""
        return super().compute(), self.right.to(self.real) / self.counts.sum().clamp(min=1), self.nonfinite


class EarlyExit(Callback):
    """Apply exit policies in validation, test and prediction.

    Validation and test run the network once and apply every policy to the logits of all exits, which the step returns.
    Predictions are routed by the first policy. Each policy logs ``<split>/<policy>/acc``, ``balanced_acc``,
    ``macro_f1`` and ``share_exit<k>``, with k from 1.

    Several processes give the same results as one. Padding samples (class -100) are ignored.

    Works in any LightningModule that holds one :class:`~dynadapter.exits.net.ExitNet`, if its validation and test steps
    return a mapping with ``logits`` ``(exits, batch, classes)`` and ``targets`` ``(batch,)``. Its prediction step finds
    the policy as ``self.policy``.

    Args:
        policies: The policies to apply, each with its own thresholds; null is ``Confidence(0.9)``.
        verify_routing: Also route every batch of a validation or test, and compare exits and classes with those from
            the logits. Batches must start with the images. A sharded network cannot be routed and is not compared.
        by_class: Also log the accuracy of each class that occurs, ``<split>/<policy>/acc_of/<class>``.

    Raises:
        ValueError: A policy is given twice; before anything runs, if thresholds do not fit the exits; with
            `verify_routing`, if routing gives another exit or class.
    """

    def __init__(
        self, policies: Sequence[Policy] | None = None, verify_routing: bool = False, by_class: bool = False
    ) -> None:
        self.policies = list(policies) if policies is not None else [Confidence(0.9)]
        self.verify_routing = verify_routing
        self.by_class = by_class
        names = [policy.name for policy in self.policies]
        if len(set(names)) < len(names):
            raise ValueError(f"give each policy only once; got {', '.join(names)}")
        self._uses: dict[str, PolicyUse] = {}

    @property
    def results(self) -> list[PolicyResult]:
        """The result of each policy on the last split; empty if none has run."""
        results = []
        for name, use in self._uses.items():
            shares, accuracy, nonfinite = use.compute()  # torchmetrics makes one share a scalar
            results.append(
                PolicyResult(
                    name,
                    float(accuracy),
                    balanced=float(use.balanced.compute()),
                    macro_f1=float(use.macro_f1.compute()),
                    by_class=use.by_class.compute().cpu(),
                    shares=shares.cpu().reshape(-1),
                    nonfinite=int(nonfinite),
                )
            )
        return results

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the thresholds before anything runs, and set the policy of predictions."""
        net = exit_net(pl_module, self)
        for policy in self.policies:
            policy.check(net.num_exits)
        if stage == "predict" and self.policies:
            pl_module.policy = self.policies[0]  # type: ignore[assignment]
        self._uses = {}

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the untrained network's results, as Lightning does with its own."""
        self._uses = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = exit_net(pl_module, self)
        made = {policy.name: PolicyUse(net.num_exits, net.num_classes) for policy in self.policies}
        self._uses = {name: use.to(pl_module.device) for name, use in made.items()}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Read the exits of a batch off its logits."""
        step = "test" if trainer.state.fn == "test" else "validation"
        stacked, targets = _output(outputs, "logits", step), _output(outputs, "targets", step)
        counted = (targets != IGNORED).nonzero()[:, 0]
        logits, targets = stacked[:, counted], targets[counted]
        for policy in self.policies:
            routed = read_off(policy, logits)
            self._uses[policy.name].update(routed.exit_index, routed.logits, targets)
        net = exit_net(pl_module, self)
        if self.verify_routing and not is_sharded(net):
            with trainer.precision_plugin.forward_context():
                for policy in self.policies:
                    _compare_routing(net, policy, batch[0], stacked, f"{step} batch {batch_idx}")

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the results of each policy."""
        split = split_of(trainer)
        for result in self.results:
            values = {f"{split}/{result.name}/acc": result.accuracy}
            values[f"{split}/{result.name}/balanced_acc"] = result.balanced
            values[f"{split}/{result.name}/macro_f1"] = result.macro_f1
            if self.by_class:
                names = getattr(pl_module, "class_names", range(len(result.by_class)))
                recalls = zip(names, result.by_class.tolist(), strict=True)
                values |= {f"{split}/{result.name}/acc_of/{c}": recall for c, recall in recalls if recall == recall}
            for k, share in enumerate(result.shares.tolist(), start=1):
                values[f"{split}/{result.name}/share_exit{k}"] = share
            pl_module.log_dict(values, sync_dist=True)  # equal in all processes; Lightning warns without sync_dist
            if result.nonfinite:
                rank_zero_warn(
                    f"{split}, {result.name}: {result.nonfinite} sample(s) have logits that are not finite; they count "
                    "as wrong and cannot exit early"
                )

    on_test_epoch_end = on_validation_epoch_end


def _output(outputs: Any, key: str, step: str) -> Tensor:
    """Return one entry of what a step returned."""
    if not isinstance(outputs, Mapping) or key not in outputs:
        given = f"one with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"EarlyExit needs {step}_step to return a mapping with {key!r}, not {given}")
    return outputs[key]


def _compare_routing(net: ExitNet, policy: Policy, images: Tensor, stacked: Tensor, where: str) -> None:
    """Route a batch and compare exits and classes with those read off the logits of all exits."""
    expected, routed = read_off(policy, stacked), net.early(images, policy)
    classes = expected.logits.argmax(-1)
    differs = (expected.exit_index != routed.exit_index) | (classes != routed.logits.argmax(-1))
    different = differs.nonzero()[:, 0].tolist()
    if different:
        first = different[0]
        raise ValueError(
            f"verify_routing: {policy.name} differs for {len(different)} of {len(images)} images in {where}; image "
            f"{first} stops at exit {int(routed.exit_index[first]) + 1} with class "
            f"{int(routed.logits[first].argmax())} when routed; its logits say exit "
            f"{int(expected.exit_index[first]) + 1} and "
            f"class {int(classes[first])}; rounding near a threshold can cause a single such image, more are a fault"
        )
