"""WeightAverage: the average of the trained tensors only, and the same after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import raises_one_line
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from tiny import SaveFirstEpoch, TinyModule, loader, make_classifier, trainer
from torch import Tensor

from dynadapter.training.callbacks import WeightAverage
from dynadapter.training.checkpoints import RunCheckpoint
from dynadapter.training.schedules import Constant


class ByHand(Callback):
    """Average the trained tensors."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        old = self.average or now
        self.average = {name: self.decay * old[name] + (1 - self.decay) * now[name] for name in now}


@pytest.mark.parametrize("decay", [0.9, 0.3, 0.0])
def test_average_equals_the_formula(decay: float) -> None:
    module, by_hand = make_classifier(lr_schedule=Constant(1.0)), ByHand(decay)
    before = {name: tensor.clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    trainer(WeightAverage(decay), by_hand).fit(module, loader(3), loader(1))
    for name, tensor in module.named_parameters():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor, by_hand.average[name], atol=1e-6, rtol=1e-5)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])  # to the last bit
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_buffers())


class Validated(Callback):
    """Record the trained tensors during validation and during a training batch."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {"validated": [], "trained": []}

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen["validated"].append(float(pl_module.adapter_tensors()[0].detach().sum()))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen["trained"].append(float(pl_module.adapter_tensors()[0].detach().sum()))


class Validating(TinyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_validation_uses_the_average() -> None:
    seen, alone = Validated(), Validated()
    trainer(seen, WeightAverage(decay=0.9), num_sanity_val_steps=0).fit(Validating(), loader(3), loader(1))
    trainer(alone, num_sanity_val_steps=0).fit(Validating(), loader(3), loader(1))
    assert seen.seen["trained"] == alone.seen["trained"]
    assert seen.seen["validated"] != alone.seen["validated"]


def test_failed_validation_restores_the_weights(tmp_path: Path) -> None:
    """A checkpoint saved at an error holds the average as the weights, and the current weights beside it."""

    class Failing(ByHand):
        def on_validation_batch_start(self, *_: Any) -> None:
            raise RuntimeError("damaged image")

    by_hand = Failing(0.9)
    saver = RunCheckpoint(tmp_path, filename="a", save_on_exception=True)
    module = make_classifier(lr_schedule=Constant(1.0))
    fitting = trainer(saver, WeightAverage(0.9), by_hand, num_sanity_val_steps=0, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="damaged image"):
        fitting.fit(module, loader(3), loader(1))
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, tensor in trained.items():
        torch.testing.assert_close(held["state_dict"][name], by_hand.average[name], atol=1e-6, rtol=1e-5)
        assert torch.equal(held["current_model_state"][name], tensor)
    assert not all(torch.equal(held["state_dict"][name], tensor) for name, tensor in trained.items())


def test_checkpoints_of_weights_only_are_refused(tmp_path: Path) -> None:
    """Lightning would save the current weights in them."""
    saver = RunCheckpoint(tmp_path, save_weights_only=True)
    with raises_one_line(ValueError, match="save_weights_only=True leaves the average out; leave save_weights_only"):
        trainer(saver, WeightAverage(), enable_checkpointing=True).fit(make_classifier(), loader(1), loader(1))
    trainer(saver, WeightAverage(), enable_checkpointing=True).validate(make_classifier(), loader(1), verbose=False)


def test_averaging_of_lightning_alone_is_refused() -> None:
    """Its average would be in no checkpoint, and a frozen backbone would lose its batch statistics."""
    with raises_one_line(ValueError, match="StochasticWeightAveraging is not supported.*give WeightAverage"):
        trainer(StochasticWeightAveraging(swa_lrs=0.01)).fit(make_classifier(), loader(1), loader(1))


@pytest.mark.parametrize("epochs", [2, 1])  # after one no step is left
def test_resume_continues_the_average(epochs: int, tmp_path: Path) -> None:
    def run(*more: Callback, **where: Any) -> dict[str, Tensor]:
        module = make_classifier()
        trainer(WeightAverage(decay=0.9), *more, max_epochs=epochs).fit(module, loader(3), loader(1), **where)
        return module.state_dict()

    whole = run(SaveFirstEpoch(tmp_path / "0.ckpt"))
    resumed = run(ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    module = make_classifier()  # the saved weights are the average
    trainer(WeightAverage()).validate(module, loader(1), ckpt_path=tmp_path / "0.ckpt", verbose=False)
    held = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert all(torch.equal(tensor, held["state_dict"][name]) for name, tensor in module.state_dict().items())
    assert not all(torch.equal(held["current_model_state"][name], held["state_dict"][name]) for name in whole)


def test_one_object_averages_in_two_trainings() -> None:
    average = WeightAverage(decay=0.9)
    states = []
    for _ in range(2):
        module = make_classifier()
        trainer(average).fit(module, loader(3), loader(1))
        states.append(module.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_stages_after_fit_measure_the_module(tmp_path: Path) -> None:
    fitting = trainer(WeightAverage(decay=0.9), SaveFirstEpoch(tmp_path / "0.ckpt"))
    fitting.fit(make_classifier(lr_schedule=Constant(1.0)), loader(3), loader(1))
    for given in ({"ckpt_path": tmp_path / "0.ckpt", "weights_only": True}, {}):
        measured, expected = (
            one.validate(make_classifier(), loader(3), verbose=False, **given)
            for one in (fitting, trainer(WeightAverage()))
        )
        assert measured == expected


def test_average_of_doubles_is_double() -> None:
    module, by_hand = make_classifier(lr_schedule=Constant(1.0)), ByHand(0.9)
    trainer(WeightAverage(0.9), by_hand, precision="64-true").fit(module, loader(3), loader(1))
    for name, tensor in module.named_parameters():
        if tensor.requires_grad:
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, by_hand.average[name], atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "bfloat16"), ("16-true", "float16")])
def test_averages_in_16_bits_are_refused(precision: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"in {dtype} round away; train with .* not {precision}"):
        trainer(WeightAverage(), precision=precision).fit(make_classifier(), loader(1), loader(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": 1.0}, "decay=1.0 must be at least 0"),
        ({"decay": -0.1}, "decay=-0.1"),
    ],
)
def test_invalid_settings_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WeightAverage(**options)
