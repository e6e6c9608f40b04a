"""ExitClassifier: training, frozen tensors and metrics, against formulas in plain Python."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny import FAMILIES, loader, make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dynadapter.adapters import AdapterLayer, LoRA, RepAdapter
from dynadapter.data import ImageFolder
from dynadapter.exits.policies import Confidence, Patience
from dynadapter.exits.temperature import Scaled
from dynadapter.training.callbacks import BidirectionalSparsity, FiniteCheck
from dynadapter.training.mixing import Mixing
from dynadapter.training.module import ExitClassifier
from dynadapter.training.schedules import Constant, Cosine, Linear, Schedule, Warmup

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def data(samples: int, batch_size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


def shaken(module: ExitClassifier) -> ExitClassifier:
    """Change all trained tensors, so that exits differ and logits are not uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def numpy_state() -> str:
    return str(np.random.get_state())  # noqa: NPY002  (timm draws from these)


# ---- the loss


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> float:
    """Return the mean over a batch, computed sample by sample."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        log_p = [z - math.log(sum(math.exp(other) for other in row)) for z in row]
        wanted = [smoothing / len(row) + (1 - smoothing) * (k == target) for k in range(len(row))]
        total -= sum(w * p for w, p in zip(wanted, log_p, strict=True))
    return total / len(targets)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        assert float(trainer.callback_metrics["train/loss"]) == float(outputs["loss"])
        self.seen.append(float(outputs["loss"]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_a_weighted_sum(smoothing: float) -> None:
    module, losses = shaken(make_classifier(label_smoothing=smoothing)), Losses()
    module.net.exit_weights.copy_(torch.tensor([0.5, 0.0, 2.0]))
    (batch,) = loader(1)
    with torch.inference_mode():
        early, _, last = (cross_entropy(one, batch[1], smoothing) for one in module.net(batch[0]))
    trainer(losses, max_steps=1).fit(module, loader(1))
    assert losses.seen == [pytest.approx(0.5 * early + 2 * last, rel=1e-5)]


def test_exit_weights_are_equal_by_default() -> None:
    assert make_classifier().net.exit_weights.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("samples", [1, 4, 5])
@pytest.mark.parametrize("spec", [Mixing(), Mixing(mixup=0.0), Mixing(cutmix=0.0)])
def test_mixing_equals_timm(spec: Mixing, samples: int) -> None:
    module, losses, batches = (
        shaken(make_classifier(mixing=spec, label_smoothing=0.1)),
        Losses(),
        data(samples, samples),
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_loss_stops_training(value: float) -> None:
    batches = data(6, 2)
    batches.dataset.tensors[0][2] = value  # in the second batch
    losses = Losses()
    with pytest.raises(
        ValueError,
        match=r"the training loss is not finite at step 1 \(epoch 0, exit 1, 2, 3, 1 of 2 images\); lower the learning",
    ) as error:
        trainer(losses).fit(make_classifier(), batches)
    assert "\n" not in str(error.value)
    assert len(losses.seen) == 1


class Spoilt(Callback):
    """Make a trained tensor infinite after a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.steps = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps += 1
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.net.backbone.head.weight.fill_(math.inf)


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="last", enable_version_counter=False)


def test_nonfinite_weights_are_never_saved(tmp_path: Path) -> None:
    spoilt = Spoilt(step=2)
    with pytest.raises(
        ValueError, match=r"^1 trained tensors are not finite after step 2, net.backbone.head.weight"
    ) as e:
        trainer(spoilt, saving(tmp_path), enable_checkpointing=True).fit(make_classifier(), data(6, 2))
    assert "\n" not in str(e.value)
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert held["global_step"] == 1
    assert all(tensor.isfinite().all() for tensor in held["state_dict"].values())


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("save", [False, True])
def test_accelerator_checks_a_step_later(
    batch: int, save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FiniteCheck, "_readable", staticmethod(lambda losses: False))
    batches = data(6, 2)
    batches.dataset.tensors[0][2 * batch] = math.nan
    counted = Spoilt(step=-1)
    options = {"enable_checkpointing": True} if save else {}
    run = trainer(counted, *([saving(tmp_path)] if save else []), max_epochs=1, **options)
    with pytest.raises(ValueError, match=rf"the training loss is not finite at step {batch} \(epoch 0, exit 1, 2, 3, "):
        run.fit(make_classifier(), batches, data(2, 2))
    assert counted.steps == batch + 1
    assert not any(key.startswith("val") for key in run.callback_metrics)  # broken weights are not validated
    held = [torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")]
    assert held == ([batch] if save and batch else [])


def test_nonfinite_loss_names_images(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(tmp_path / "train" / "ab"[i % 2] / f"{i}.png")
    module = make_classifier(num_classes=2)
    last = list(dict(module.net.heads[1].named_modules()))[-1]
    with torch.no_grad():
        module.net.heads[1].get_submodule(last).bias.fill_(math.nan)
    images = ImageFolder(tmp_path, val_fraction=0, batch_size=2, image_size=32)
    with pytest.raises(ValueError, match=r"at step 0 \(epoch 0, exit 2, 2 of 2 images: \S+/\d.png, \S+/\d.png\); low"):
        trainer().fit(module, datamodule=images)


@pytest.mark.parametrize("label", [-1, -100, CLASSES])
def test_invalid_labels_are_named(label: int) -> None:
    batches = data(4, 2)
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


class Named(IterableDataset):
    """A batch of images with the names of their files."""

    def __iter__(self) -> Any:
        yield torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a", "b", "c", "d"]


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
    with pytest.raises(ValueError, match=r"lr_schedule follows the progress of training.*set max_steps") as error:
        trainer(**options).fit(make_classifier(), batches)
    assert "\n" not in str(error.value)
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
    ours = [name for name in names.values() if name.startswith(("net.heads.", "net.backbone.head."))]
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
    trainer(dropout, Untouched(), max_steps=3).fit(module, data(12, 4))
    return module.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


# ---- measures


def calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Return the calibration error of Guo et al. 2017: |accuracy - confidence|, averaged over bins by their size."""
    rows: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, target in zip(logits.softmax(-1), targets.tolist(), strict=True):
        p = float(row.max())
        rows[min(int(p * bins), bins - 1)].append((p, int(row.argmax()) == target))
    error = 0.0
    for row in (row for row in rows if row):
        gap = sum(right for _, right in row) / len(row) - sum(p for p, _ in row) / len(row)
        error += abs(gap) * len(row) / len(targets)
    return error


@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_equal_the_whole_split(split: str) -> None:
    module, batches = shaken(make_classifier()), data(37, 8)  # the last batch is smaller
    images, targets = batches.dataset.tensors
    with torch.no_grad():
        logits = module.eval().net(images)
    run = trainer()
    (got,) = (run.validate if split == "val" else run.test)(module, batches, verbose=False)
    for k in range(3):
        right = [int(row.argmax()) == int(t) for row, t in zip(logits[k], targets, strict=True)]
        assert got[f"{split}/acc_exit{k + 1}"] == pytest.approx(sum(right) / 37)
        assert got[f"{split}/ece_exit{k + 1}"] == pytest.approx(calibration_error(logits[k], targets), rel=1e-4)
        assert got[f"{split}/loss_exit{k + 1}"] == pytest.approx(cross_entropy(logits[k], targets, 0.0), rel=1e-4)
    assert got[f"{split}/acc"] == got[f"{split}/acc_exit3"]
    assert len(got) == 3 * 3 + 1
    assert len({got[f"{split}/acc_exit{k}"] for k in (1, 2, 3)}) > 1


def test_metrics_start_anew_each_epoch() -> None:
    module, batches = shaken(make_classifier()), data(11, 4)
    fitting = trainer(num_sanity_val_steps=2)
    fitting.fit(module, loader(2), batches)
    after = {k: float(v) for k, v in fitting.callback_metrics.items() if k.startswith("val/")}
    (again,) = trainer().validate(module, batches, verbose=False)
    assert after == pytest.approx(again)


def test_nonfinite_logits_count_as_wrong() -> None:
    module, batches = shaken(make_classifier()), data(10, 5)
    images, targets = batches.dataset.tensors
    (clean,) = trainer().validate(
        module, DataLoader(TensorDataset(images[1:], targets[1:]), batch_size=5), verbose=False
    )
    images[0] = math.nan
    targets[0] = 0  # argmax of a row of NaN
    (got,) = trainer().validate(module, batches, verbose=False)
    for k in (1, 2, 3):
        assert got[f"val/acc_exit{k}"] == pytest.approx(clean[f"val/acc_exit{k}"] * 9 / 10)
        assert got[f"val/ece_exit{k}"] == pytest.approx(clean[f"val/ece_exit{k}"])


def test_predictions_follow_the_policy() -> None:
    names = [f"class {k}" for k in range(CLASSES)]
    module = shaken(make_classifier(class_names=names))
    ((images, files),) = Named()
    with torch.no_grad():
        logits = module.eval().net(images)
    (never,) = trainer().predict(module, DataLoader(Named(), batch_size=None))
    assert never["exit_index"].tolist() == [2] * 4
    confidences = logits.softmax(-1).amax(-1)
    policy = Confidence(float(confidences[0].median()) + 1e-4)
    module.policy = policy
    (got,) = trainer().predict(module, DataLoader(Named(), batch_size=None))
    leave = [next((k for k in (0, 1) if confidences[k, i] >= policy.threshold), 2) for i in range(4)]
    assert len(set(leave)) > 1
    assert got["files"] == files
    assert got["exit_index"].tolist() == leave
    assert got["classes"] == [names[int(logits[k, i].argmax())] for i, k in enumerate(leave)]
    assert got["confidence"].tolist() == pytest.approx(
        [float(confidences[k, i]) for i, k in enumerate(leave)], rel=1e-4
    )


@pytest.mark.parametrize("temperatures", [2.0, (0.5, 3.0, 2.0)])
def test_confidence_uses_the_temperature(temperatures: Any) -> None:
    module = shaken(make_classifier())
    ((images, _),) = Named()
    module.policy = Scaled(Scaled(Patience(2), 1.5), temperatures)
    (got,) = trainer().predict(module, DataLoader(Named(), batch_size=None))
    heat = [1.5 * t for t in (temperatures if isinstance(temperatures, tuple) else [temperatures] * 3)]
    with torch.no_grad():
        logits = module.eval().net(images)
    for i, k in enumerate(got["exit_index"].tolist()):
        assert float(got["confidence"][i]) == pytest.approx(float((logits[k, i] / heat[k]).softmax(-1).max()), rel=1e-4)


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 leaves nothing to tell apart"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        ({"class_names": ["a", "b"]}, "2 class names for 5 classes"),
        ({"every": 7}, "every=7 fits no exit into a backbone of 6 blocks"),
        ({"exit_depths": [2, 9]}, "exit_depths="),
        ({"backbone": "vit_tiny_patch16_225"}, "timm has no model 'vit_tiny_patch16_225'; the nearest are"),
        ({"adapter": LoRA(targets=("*.nope",))}, "no layer of VisionTransformer matches the target"),
    ],
)
def test_invalid_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_classifier(**options)
    assert "\n" not in str(error.value)


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
