"""BidirectionalSparsity: dropout that falls with depth, and masked adapter gradients in the backward pass."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from dynadapter.adapters import AdapterLayer
from dynadapter.training.progress import progress, start_progress
from dynadapter.training.schedules import Constant, Schedule
from dynadapter.training.sharding import is_sharded


class BidirectionalSparsity(Callback):
    """Train adapters sparsely in both directions (Dyn-Adapter, bidirectional sparsity).

    Forward: an adapter at relative depth d (0 in the first block, 1 in the last) drops its bottleneck activations at
    the rate ``(1 - d) * shallow + d * deep``. Backward: each optimiser step updates every adapter element with
    probability ``keep``, drawn anew for each step. Heads are never masked. The paper states that shallow layers drop
    more and that adapter gradients are masked; the line over depth, all rates and the meaning of "masked" are ours.

    Works in any LightningModule with adapters. Rates depend on the progress of training, masks on the number of
    optimiser steps and the seed. So nothing has to be saved, a resumed training continues exactly, and all
    data-parallel processes draw the same masks, on any device. Gradients are masked before they are clipped. Logs
    ``sparsity/keep``, ``sparsity/dropout_shallow`` and ``sparsity/dropout_deep``. Sharded parameters (FSDP) are not
    supported.

    AdamW's bias correction counts the steps of a tensor, not of an element: with a small ``keep`` the first updates of
    an element are larger than without masks.

    Args:
        shallow: Dropout rate in the first block; null keeps every adapter's own rate and ignores ``deep``.
        deep: Dropout rate in the last block.
        keep: Probability that a step updates an element; at 1 there are no masks and no cost.
        masked: What happens to a masked element: ``frozen`` keeps the element and its optimiser state unchanged in this
            step; ``gradient`` sets only its gradient to zero, so that momentum and weight decay still change it.
        seed: Seed of the masks.

    Raises:
        ValueError: At the start of fit, if the module holds no adapters, a rate or ``keep`` is out of range, or the
            schedules vary and training has no known end.
    """

    def __init__(
        self,
        shallow: Schedule | None = Constant(0.1),  # noqa: B008 - frozen
        deep: Schedule = Constant(0.0),  # noqa: B008
        keep: Schedule = Constant(0.95),  # noqa: B008
        masked: Literal["frozen", "gradient"] = "frozen",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if masked not in ("frozen", "gradient"):
            raise ValueError(f"masked={masked!r} is unknown; choose 'frozen' or 'gradient'")
        self.shallow = shallow
        self.deep = deep
        self.keep = keep
        self.masked = masked
        self.seed = seed
        self._detach()

    def _detach(self) -> None:
        """Release the module and remove the hooks of the optimisers."""
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        self._handles: list[Any] = []
        self._layers: list[AdapterLayer] = []
        self._elements: list[nn.Parameter] = []
        self._held: list[_Held] = []
        self._dropout: tuple[float, float] | None = None
        self._keep = 1.0  # at the current step

    def _schedules(self) -> dict[str, Schedule]:
        """Return the schedules in use, by name."""
        forward = {} if self.shallow is None else {"shallow": self.shallow, "deep": self.deep}
        return {"keep": self.keep, **forward}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self._layers = [part for part in pl_module.modules() if isinstance(part, AdapterLayer)]
        if not self._layers:
            raise ValueError(
                f"BidirectionalSparsity found no adapters in {type(pl_module).__name__}; "
                "inject some into its backbone, as in inject(backbone, LoRA())"
            )
        if is_sharded(pl_module):
            raise ValueError(
                "BidirectionalSparsity masks whole tensors, and here they are sharded; leave it out "
                "(sparsity: null), or train with strategy: ddp"
            )
        self._elements = [p for layer in self._layers for p in layer.own_parameters().values() if p.requires_grad]
        for end in (0.0, 1.0):  # an invalid end value is reported before training
            for name, schedule in self._schedules().items():
                _share(schedule, end, name)
        if self.masked == "frozen":
            self._handles = [one.register_step_post_hook(self._after_step) for one in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: the number of batches is unknown until now.
        start_progress(trainer, type(self).__name__, any(schedule.varies for schedule in self._schedules().values()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = progress(trainer)
        self._keep = _share(self.keep, now, "keep")
        values = {"sparsity/keep": self._keep}
        if self.shallow is not None:
            shallow, deep = _share(self.shallow, now, "shallow"), _share(self.deep, now, "deep")
            if (shallow, deep) != self._dropout:
                for layer in self._layers:
                    layer.dropout.set((1 - layer.depth) * shallow + layer.depth * deep)
                self._dropout = (shallow, deep)
            values |= {"sparsity/dropout_shallow": shallow, "sparsity/dropout_deep": deep}
        pl_module.log_dict(values)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._held = []  # a step skipped for an overflow may have left entries
        if self._keep == 1 or not self._elements:
            return
        own = {element for group in optimizer.param_groups for element in group["params"]}
        for element, moves in zip(self._elements, self._draw(self._keep, trainer.global_step), strict=True):
            if element not in own or element.grad is None:
                continue
            element.grad.masked_fill_(~moves, 0)
            if self.masked == "frozen":
                self._held.append(_Held(element, moves, optimizer))

    def _draw(self, keep: float, step: int) -> list[Tensor]:
        """Return masks of the adapter tensors: True where this step updates an element."""
        # Drawn on the CPU, so that masks do not depend on the device, and together, for a single transfer.
        generator = torch.Generator().manual_seed((self.seed * 1_000_000_007 + step) % 2**63)
        sizes = [element.numel() for element in self._elements]
        moves = torch.rand(sum(sizes), generator=generator) < keep
        parts = moves.to(self._elements[0].device).split(sizes)
        return [part.view(element.shape) for part, element in zip(parts, self._elements, strict=True)]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for held in self._held:
            held.restore(optimizer)
        self._held = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()


class _Held:
    """A copy of one adapter tensor and its optimiser state before a step."""

    def __init__(self, element: nn.Parameter, moves: Tensor, optimizer: Optimizer) -> None:
        self.element = element
        self.moves = moves
        self.before = element.detach().clone()
        self.state = {key: value.clone() for key, value in _elementwise_state(optimizer, element).items()}

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Restore the masked elements."""
        self.element.copy_(torch.where(self.moves, self.element, self.before))
        for key, value in _elementwise_state(optimizer, self.element).items():
            # State created in this step is restored to zero, its initial value in all of torch.optim except for
            # Rprop's step size.
            value.copy_(torch.where(self.moves, value, self.state.get(key, 0)))


def _elementwise_state(optimizer: Optimizer, element: Tensor) -> dict[str, Tensor]:
    """Return the optimiser's tensors with one value per element, such as momentum; the step counter has none."""
    state = optimizer.state.get(element, {})
    return {
        key: value
        for key, value in state.items()
        if key != "step" and isinstance(value, Tensor) and value.shape == element.shape
    }


def _share(schedule: Schedule, now: float, name: str) -> float:
    share = schedule(now)
    if not 0 <= share <= 1 or (share == 1 and name != "keep"):  # dropout divides by 1 - rate
        allowed = "[0, 1]" if name == "keep" else "[0, 1)"
        raise ValueError(f"{name}={schedule} gives {share} at progress {now:g}; it must stay in {allowed}")
    return share
