"""ExitClassifier: training and frozen tensors, against formulas in plain Python."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, raises_one_line
from lightning.pytorch import Callback
from saved import same
from tiny import FAMILIES, Losses, Named, cross_entropy, loader, make_classifier, noise_batches, shaken, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dynadapter.adapters import AdapterLayer, LoRA, RepAdapter
from dynadapter.training.callbacks import BidirectionalSparsity
from dynadapter.training.mixing import Mixing
from dynadapter.training.schedules import Constant, Cosine, Linear, Schedule, Warmup

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def numpy_state() -> str:
    return str(np.random.get_state())  # noqa: NPY002  (timm draws from these)


# ---- the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_a_weighted_sum(smoothing: float) -> None:
    module, losses = shaken(make_classifier(label_smoothing=smoothing)), Losses()
    module.net.exit_weights.copy_(torch.tensor([0.5, 0.0, 2.0]))
    (batch,) = loader(1)
    with torch.inference_mode():
        early, _, last = (cross_entropy(one, batch[1], smoothing) for one in module.net(batch[0]))
    trainer(losses, max_steps=1).fit(module, loader(1))
    assert losses.seen == [pytest.approx(0.5 * early + 2 * last, rel=1e-5)]


@pytest.mark.parametrize("samples", [1, 4, 5])
@pytest.mark.parametrize("spec", [Mixing(), Mixing(mixup=0.0), Mixing(cutmix=0.0)])
def test_mixing_equals_timm(spec: Mixing, samples: int) -> None:
    module, losses, batches = (
        shaken(make_classifier(mixing=spec, label_smoothing=0.1)),
        Losses(),
        noise_batches(samples, samples),
    )
    images, targets = (part.clone() for part in batches.dataset.tensors)
    mixer, states = module.mixing, []
    module.mixing = lambda *batch: (states.append(np.random.get_state()), mixer(*batch))[1]  # noqa: NPY002
    before = numpy_state()
    trainer(losses, max_steps=1).fit(module, batches)
    assert numpy_state() == before
    assert torch.equal(batches.dataset.tensors[0], images)  # timm mixes in place

    np.random.set_state(states[0])  # noqa: NPY002
    if samples % 2:  # timm needs an even batch
        images, targets = torch.cat([images, images[-1:]]), torch.cat([targets, targets[-1:]])
    mixup = timm.data.Mixup(spec.mixup, spec.cutmix, label_smoothing=0.1, num_classes=CLASSES)
    images, targets = mixup(images, targets)
    with torch.no_grad():
        logits = shaken(make_classifier()).net(images)[:, :samples]
    each = -(targets[:samples] * logits.log_softmax(-1)).sum(-1).mean(-1)
    assert losses.seen == [pytest.approx(float(each.mean()), rel=1e-5)]


@pytest.mark.parametrize("label", [-1, -100, CLASSES])
def test_invalid_labels_are_named(label: int) -> None:
    batches = noise_batches(4, 2)
    batches.dataset.tensors[1][3] = label
    said = f"^label {label} in a batch; this model has classes 0 to 4; correct the labels"
    for run in (trainer().fit, trainer().validate, trainer().test):
        with pytest.raises(ValueError, match=said):
            run(make_classifier(), batches)


# ---- the frozen backbone


class Modes(Callback):
    """Record, in every loop, which parts are in training mode during a step."""

    def __init__(self) -> None:
        self.seen: dict[str, set[tuple[bool, bool, bool]]] = {}

    def _note(self, loop: str, net: Any) -> None:
        adapters = [layer for layer in net.backbone.modules() if isinstance(layer, AdapterLayer)]
        ours = {id(part) for layer in adapters for name, part in layer.named_modules() if "base_layer" not in name}
        ours |= {id(part) for part in net.backbone.get_classifier().modules()}
        backbone = any(part.training for part in net.backbone.modules() if id(part) not in ours)
        learning = [part.training for head in net.heads for part in head.modules()]
        learning += [layer.dropout.training for layer in adapters]
        self.seen.setdefault(loop, set()).add((backbone, any(learning), all(learning)))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note("fit", pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note("fit", pl_module.net)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note("validate", pl_module.net)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note("test", pl_module.net)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note("predict", pl_module.net)


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_is_unchanged_by_every_loop(family: str) -> None:
    module, modes = make_classifier(family), Modes()
    before = {name: p.detach().clone() for name, p in module.net.backbone.named_parameters()}
    trained = {name for name, p in module.net.backbone.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in module.net.backbone.named_buffers() if not name.endswith("dropout.rate")}
    dropout = BidirectionalSparsity(shallow=Constant(0.3), keep=Constant(1.0))
    fitting = trainer(modes, dropout, max_epochs=1)
    fitting.fit(module, loader(2), loader(1))
    fitting.test(module, loader(1), verbose=False)
    fitting.predict(module, DataLoader(Named(), batch_size=None))
    assert modes.seen.pop("fit") == {(False, True, True)}
    assert modes.seen == {loop: {(False, False, False)} for loop in ("validate", "test", "predict")}
    for name, p in module.net.backbone.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name
    after = dict(module.net.backbone.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in buffers.items())


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)],
)
def test_training_in_16_bits(precision: str, dtype: torch.dtype) -> None:
    # AdamW's default eps is 0 in float16, and the second step would raise for a loss that is not finite.
    module = make_classifier(optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-4))
    before = {name: p.detach().to(dtype, copy=True) for name, p in module.named_parameters()}
    fitting = trainer(precision=precision)
    fitting.fit(module, loader(3), loader(1))
    assert math.isfinite(fitting.callback_metrics["train/loss"])
    for name, p in module.named_parameters():
        assert p.dtype == dtype
        assert p.isfinite().all()
        if not p.requires_grad:
            assert torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in module.named_parameters())


# ---- the optimiser


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("schedule", "by_hand"),
    [
        (Linear(1.0, 0.0), lambda t: 1 - t),
        (Cosine(1.0, 0.1), lambda t: 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2),
        (
            Warmup(fraction=0.4, start=0.2, then=Constant(1.0)),
            lambda t: 0.2 + 0.8 * t / 0.4 if t < 0.4 else 1.0,
        ),
    ],
)
def test_learning_rate_follows_its_schedule(schedule: Schedule, by_hand: Any) -> None:
    rates = Rates()
    module = make_classifier(lr_schedule=schedule, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    trainer(rates, max_epochs=2, accumulate_grad_batches=2).fit(module, loader(6))
    steps = [0.5 * by_hand(step / 5) for step in range(6)]
    assert rates.seen[::2] == pytest.approx(steps)
    assert rates.seen[::2] == rates.seen[1::2]  # the batches of one accumulation


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(list(loader(2).dataset) * 2)


@pytest.mark.parametrize(
    ("options", "batches"), [({"max_epochs": -1}, loader(2)), ({}, DataLoader(Endless(), batch_size=2))]
)
def test_training_without_an_end(options: dict, batches: DataLoader) -> None:
    with raises_one_line(ValueError, match=r"lr_schedule follows the progress of training.*set max_steps"):
        trainer(**options).fit(make_classifier(), batches)
    rates = Rates()

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    constant = make_classifier(lr_schedule=Constant(0.5), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer(rates, Stop(), **options).fit(constant, batches)
    assert set(rates.seen) == {0.05}


@pytest.mark.parametrize("adapter", [LoRA(rank=2), RepAdapter(), None])
def test_optimizer_gets_trained_tensors_only(adapter: Any) -> None:
    taken: list[Any] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        taken.extend(parameters)
        return torch.optim.SGD(taken, lr=0.1)

    module = make_classifier(adapter=adapter, optimizer=optimizer)
    trainer(max_steps=1).fit(module, loader(1))
    names = {id(p): name for name, p in module.named_parameters()}
    got = [names[id(p)] for p in taken]
    assert len(set(got)) == len(got)
    ours = [name for name in names.values() if name.startswith(("net.heads.", "net.beside.", "net.backbone.head."))]
    theirs = [
        f"net.backbone.{name}.{own}"
        for name, layer in module.net.backbone.named_modules()
        if isinstance(layer, AdapterLayer)
        for own, _ in layer.named_parameters()
        if "base_layer" not in own
    ]
    assert bool(theirs) == (adapter is not None)
    assert set(got) == {*ours, *theirs}
    assert all(module.get_parameter(name).grad is not None for name in got)


# ---- random numbers


class Untouched(Callback):
    """Check that a step does not change the global random state."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = torch.get_rng_state(), numpy_state()

    def on_train_batch_end(self, *_: Any) -> None:
        assert torch.equal(torch.get_rng_state(), self.before[0])
        assert numpy_state() == self.before[1]


def trained(seed: int, draws: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    torch.rand(draws)
    module = make_classifier(mixing=Mixing())
    dropout = BidirectionalSparsity(shallow=Constant(0.5), keep=Constant(1.0))
    trainer(dropout, Untouched(), max_steps=3).fit(module, noise_batches(12, 4))
    return module.state_dict()


def test_random_numbers_depend_on_seed_only() -> None:
    first = trained(7)
    assert same(first, trained(7))
    assert same(first, trained(7, draws=5))  # other draws from the global generator do not matter
    assert not same(first, trained(8))


def test_each_step_draws_its_own_numbers() -> None:
    seen: list[float] = []
    module = make_classifier()
    forward = module.net.forward
    module.net.forward = lambda images: (seen.append(float(torch.rand(()))), forward(images))[1]
    trainer(accumulate_grad_batches=3).fit(module, loader(3))
    assert len(set(seen)) == 6


# ---- invalid settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        ({"class_names": ["a", "b"]}, "2 class names for 5 classes"),
        ({"every": 7}, "every=7 fits no exit into a backbone of 6 blocks"),
        ({"exit_depths": [2, 9]}, "exit_depths="),
        ({"backbone": "vit_tiny_patch16_225"}, "timm has no model 'vit_tiny_patch16_225'; the nearest are"),
        ({"adapter": LoRA(targets=("*.nope",))}, "no layer of VisionTransformer matches the target"),
    ],
)
def test_invalid_settings_are_named(options: dict, message: str) -> None:
    with raises_one_line(ValueError, match=message):
        make_classifier(**options)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_model_in_another_default_type(precision: str) -> None:
    """The backbone's hash would be another, so that no checkpoint could be loaded."""
    with (
        trainer(precision=precision).init_module(),
        raises_one_line(ValueError, match="outside of trainer.init_module"),
    ):
        make_classifier()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.0, "cutmix": 0.0}, "mixup=0.0 and cutmix=0.0 must be at least 0 and one of them above"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"prob": 1.5}, r"prob=1.5 must be in \[0, 1\]"),
        ({"switch": math.nan}, r"switch=nan must be in \[0, 1\]"),
    ],
)
def test_invalid_mixing_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing(**options)
