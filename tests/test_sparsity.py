"""BidirectionalSparsity: dropout by depth, and masks that keep an element unchanged."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import raises_one_line
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from saved import same
from tiny import QUIET, ByHand, SaveFirstEpoch, TinyModule, adamw, loader, trainer
from torch import Tensor, nn

from dynadapter.adapters import AdapterLayer, adapter_layers
from dynadapter.training.callbacks.loss_weights import ExitWeights
from dynadapter.training.callbacks.sparsity import BidirectionalSparsity
from dynadapter.training.schedules import Constant, Cosine, Linear, Schedule
from dynadapter.training.weighting import EarlyToLate

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adam with decay in the gradient": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
}


def sparse(keep: float | Schedule, **options: Any) -> BidirectionalSparsity:
    keep = keep if isinstance(keep, Schedule) else Constant(keep)
    return BidirectionalSparsity(shallow=None, keep=keep, **options)


class Steps(Callback):
    """Record which elements each batch changes, and the optimiser's state of each element before and after."""

    def __init__(self) -> None:
        self.moved: list[list[Tensor]] = []
        self.heads_moved: list[bool] = []
        self.states: list[list[tuple[dict, dict]]] = []

    def on_train_batch_start(self, trainer, pl_module: TinyModule, batch, batch_idx) -> None:
        self.before = [p.detach().clone() for p in pl_module.adapter_tensors()]
        self.heads = [p.detach().clone() for p in pl_module.net.heads.parameters()]
        self.state = self._state(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module: TinyModule, outputs, batch, batch_idx) -> None:
        after = [p.detach() for p in pl_module.adapter_tensors()]
        self.moved.append([a != b for a, b in zip(after, self.before, strict=True)])
        heads = pl_module.net.heads.parameters()
        self.heads_moved.append(any(not torch.equal(a, b) for a, b in zip(heads, self.heads, strict=True)))
        self.states.append(list(zip(self.state, self._state(trainer, pl_module), strict=True)))

    def _state(self, trainer, pl_module: TinyModule) -> list[dict[str, Tensor]]:
        (optimizer,) = trainer.optimizers
        return [
            {k: v.clone() for k, v in optimizer.state.get(p, {}).items() if k != "step" and isinstance(v, Tensor)}
            for p in pl_module.adapter_tensors()
        ]

    def shares(self) -> list[float]:
        return [float(torch.cat([m.flatten() for m in step]).float().mean()) for step in self.moved]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_elements_keep_their_state(optimizer: str) -> None:
    steps, module = Steps(), TinyModule(OPTIMIZERS[optimizer])
    trainer(sparse(0.5), steps).fit(module, loader(3))
    count = sum(p.numel() for p in module.adapter_tensors())
    slack = 5 * math.sqrt(0.25 / count)  # five standard deviations of a mean of coin tosses
    assert steps.shares() == [pytest.approx(0.5, abs=slack)] * 6
    assert all(steps.heads_moved)
    for step, states in zip(steps.moved, steps.states, strict=True):
        for moved, (before, after) in zip(step, states, strict=True):
            for key, value in after.items():
                was = before.get(key, torch.zeros_like(value))
                assert torch.equal(value[~moved], was[~moved]), key


def test_masks_are_independent() -> None:
    steps = Steps()
    trainer(sparse(0.5), steps).fit(TinyModule(), loader(3))
    flat = [torch.cat([m.flatten() for m in step]).float() for step in steps.moved]
    for i in range(6):
        for j in range(i):
            assert (flat[i] == flat[j]).float().mean() == pytest.approx(0.5, abs=0.1)
    assert {tuple(m.shape) for m in steps.moved[0]} == {tuple(p.shape) for p in TinyModule().adapter_tensors()}


def test_the_keep_rate_is_scheduled() -> None:
    steps = Steps()
    trainer(sparse(Linear(0.0, 1.0)), steps).fit(TinyModule(), loader(3))
    assert steps.shares() == pytest.approx([k / 5 for k in range(6)], abs=0.1)
    assert steps.shares()[0] == 0
    assert steps.shares()[-1] == 1


def test_gradient_masks_keep_momentum() -> None:
    steps = Steps()
    trainer(sparse(0.5, masked="gradient"), steps).fit(TinyModule(), loader(3))
    assert min(steps.shares()) > 0.99

    def plain(p):
        return torch.optim.SGD(p, lr=1e-2)

    weights = []
    for masked in ("gradient", "frozen"):  # equal if only the gradient changes an element
        module = TinyModule(plain)
        trainer(sparse(0.5, masked=masked), steps := Steps()).fit(module, loader(3))
        weights.append(module.state_dict())
        assert steps.shares() == [pytest.approx(0.5, abs=0.1)] * 6
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def trained(*callbacks: Callback, **options: Any) -> dict[str, Tensor]:
    module = TinyModule()
    trainer(*callbacks, **options).fit(module, loader(3))
    return module.state_dict()


def test_keeping_everything_changes_nothing() -> None:
    assert same(trained(sparse(1.0)), trained())


def test_seed_decides_the_masks() -> None:
    assert same(trained(sparse(0.5)), trained(sparse(0.5)))
    assert not same(trained(sparse(0.5)), trained(sparse(0.5, seed=1)))


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_with_other_trainer_options(options: dict) -> None:
    steps = Steps()
    trainer(sparse(0.5), steps, **options).fit(TinyModule(), loader(4))
    every = options.get("accumulate_grad_batches", 1)
    stepped = [share for k, share in enumerate(steps.shares(), 1) if k % every == 0]
    waited = [share for k, share in enumerate(steps.shares(), 1) if k % every]
    assert stepped == [pytest.approx(0.5, abs=0.1)] * (8 // every)
    assert not any(waited)


class Overflow(Callback):
    """Make the third step's gradients infinite, as an overflow in float16 does."""

    def on_after_backward(self, trainer, pl_module: TinyModule) -> None:
        if trainer.global_step == 2:
            for p in pl_module.net.heads.parameters():
                p.grad.fill_(math.inf)  # type: ignore[union-attr]


def test_gradient_scaler_may_skip_a_step() -> None:
    steps, scaler = Steps(), torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(sparse(0.5), steps, Overflow(), plugins=[plugin]).fit(TinyModule(), loader(3))
    assert steps.shares() == [pytest.approx(share, abs=0.1) for share in (0.5, 0.5, 0, 0.5, 0.5, 0.5)]
    assert steps.shares()[2] == 0


class Clipped(TinyModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        self.zeros = [float((p.grad == 0).float().mean()) for p in self.adapter_tensors()]
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.norm = math.hypot(*(float(p.grad.norm()) for p in self.parameters() if p.grad is not None))


def test_masks_precede_clipping() -> None:
    steps, module = Steps(), Clipped()
    trainer(sparse(0.5), steps, gradient_clip_val=1e-3).fit(module, loader(3))
    assert steps.shares() == [pytest.approx(0.5, abs=0.1)] * 6
    assert sum(module.zeros) / len(module.zeros) == pytest.approx(0.5, abs=0.1)
    assert module.norm == pytest.approx(1e-3, rel=1e-2)


class Measured(ByHand):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        before = [p.detach().clone() for p in self.adapter_tensors()]
        super().training_step(batch, batch_idx)
        moved = [a != b for a, b in zip(self.adapter_tensors(), before, strict=True)]
        self.share = float(torch.cat([m.flatten() for m in moved]).float().mean())


def test_manual_optimisation() -> None:
    module = Measured()
    trainer(sparse(0.5)).fit(module, loader(3))
    assert module.share == pytest.approx(0.5, abs=0.1)


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.seen.append([float(layer.dropout.rate) for layer in adapter_layers(pl_module).values()])


class OnlyABackbone(TinyModule):
    """A module without an ExitNet."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net.backbone
        del self.net

    def adapter_tensors(self) -> list[nn.Parameter]:
        return (
            [p for p in self.parameters() if p.requires_grad]
            if hasattr(self, "backbone")
            else super().adapter_tensors()
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])


@pytest.mark.parametrize("kind", [TinyModule, OnlyABackbone])
def test_dropout_falls_over_depth(kind: type[TinyModule]) -> None:
    shallow, deep = Linear(0.5, 0.1), Cosine(0.0, 0.2)
    rates, module = Rates(), kind()
    trainer(BidirectionalSparsity(shallow, deep), rates).fit(module, loader(3))
    expected = [
        [(1 - block / 5) * shallow(step / 5) + block / 5 * deep(step / 5) for block in range(6)] for step in range(6)
    ]
    assert rates.seen == [pytest.approx(row, abs=1e-6) for row in expected]


def test_without_shallow_rates_are_kept() -> None:
    module, rates = TinyModule(), Rates()
    layers = [part for part in module.modules() if isinstance(part, AdapterLayer)]
    for k, layer in enumerate(layers):
        layer.dropout.set(k / 10)
    trainer(sparse(0.5), rates).fit(module, loader(1))
    assert rates.seen == [pytest.approx([k / 10 for k in range(6)])] * 2


def test_values_are_logged() -> None:
    logged = []

    class Log(Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer(BidirectionalSparsity(Linear(0.4, 0.2), keep=Linear(0.5, 1.0)), Log()).fit(TinyModule(), loader(1))
    ends = [(0.5, 0.4), (1.0, 0.2)]
    for row, (keep, shallow) in zip(logged, ends, strict=True):
        expected = {"sparsity/keep": keep, "sparsity/dropout_shallow": shallow, "sparsity/dropout_deep": 0.0}
        assert row == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd with momentum"])
def test_resume_equals_an_unbroken_training(tmp_path: Path, optimizer: str) -> None:
    def callbacks() -> list[Callback]:
        both = BidirectionalSparsity(Linear(0.5, 0.1), Linear(0.1, 0.0), keep=Linear(0.3, 0.9))
        return [ExitWeights(EarlyToLate()), both]

    straight, resumed = TinyModule(OPTIMIZERS[optimizer]), TinyModule(OPTIMIZERS[optimizer])
    first = trainer(*callbacks(), SaveFirstEpoch(tmp_path / "0.ckpt"))
    first.fit(straight, loader(3))
    second = trainer(*callbacks())
    second.fit(resumed, loader(3), ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert len(resumed.seen) == 3
    assert same(straight.state_dict(), resumed.state_dict())
    states = [one.optimizers[0].state_dict()["state"] for one in (first, second)]
    assert all(same(states[0][k], states[1][k]) for k in states[0])


def hooks(owner) -> int:
    return sum(len(one._optimizer_step_post_hooks) for one in owner.optimizers)


def test_hooks_are_removed_after_fit() -> None:
    counts = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            counts.append(hooks(trainer))

    callback, steps, module = sparse(0.5), Steps(), TinyModule()
    one = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    module.optimizer = lambda parameters: one  # the same optimiser in both trainings
    for _ in range(2):
        fitting = trainer(callback, steps, Count(), max_epochs=1)
        fitting.fit(module, loader(2))
        assert hooks(fitting) == 0
    assert counts == [1] * 4
    assert steps.shares() == [pytest.approx(0.5, abs=0.1)] * 4


class Fails(TinyModule):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def test_failed_training_leaves_no_hooks() -> None:
    fitting = trainer(sparse(0.5))
    with pytest.raises(RuntimeError, match="out of luck"):
        fitting.fit(Fails(), loader(2))
    assert hooks(fitting) == 0


class Bare(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        for name in adapter_layers(self.net):
            self.net.set_submodule(name, self.net.get_submodule(name).base_layer)


@pytest.mark.parametrize(
    ("callback", "module", "options", "message"),
    [
        (sparse(0.5), Bare, {}, "found no adapters in Bare; inject some"),
        (sparse(Linear(0.5, 1.5)), TinyModule, {}, r"keep=Linear.* gives 1.5 at progress 1; it must stay in \[0, 1\]"),
        (BidirectionalSparsity(Constant(1.0)), TinyModule, {}, r"shallow=.* gives 1.0 .*it must stay in \[0, 1\)"),
        (BidirectionalSparsity(deep=Constant(-0.1)), TinyModule, {}, r"deep=.* gives -0.1 .*it must stay in \[0, 1\)"),
        (sparse(Linear(0.5, 1.0)), TinyModule, {"max_epochs": -1}, "no known end; set max_steps"),
    ],
)
def test_invalid_settings_stop_before_a_step(callback, module: type[TinyModule], options: dict, message: str) -> None:
    instance = module()
    with raises_one_line(ValueError, match=message):
        trainer(callback, **options).fit(instance, loader())
    assert not instance.seen


def test_unknown_mask_is_named() -> None:
    with pytest.raises(ValueError, match="masked='off' is unknown; choose 'frozen' or 'gradient'"):
        BidirectionalSparsity(masked="off")  # type: ignore[arg-type]


class FrozenAdapters(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        for element in self.adapter_tensors():
            element.requires_grad_(False)


def test_frozen_adapters_are_not_masked() -> None:
    module = FrozenAdapters()
    trainer(sparse(0.5)).fit(module, loader(1))
    assert len(module.seen) == 2
