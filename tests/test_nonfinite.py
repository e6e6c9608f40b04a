"""NaN and infinity in weights, losses and logits: a training stops and saves nothing, a command ends in one line."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused
from conftest import VIT, raises_one_line
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file
from tiny import Losses, make_classifier, noise_batches, trainer, write_checkpoint

from dynadapter.backbones import create_backbone
from dynadapter.data import ImageFolder
from dynadapter.training.callbacks import FiniteCheck
from dynadapter.training.module import ExitClassifier
from dynadapter.training.restoring import load_classifier

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    module, path = make_classifier(), tmp_path / "a.ckpt"
    module.preprocessing = {"image_size": 32, "normalization": "half"}
    return write_checkpoint(module, path)


def spoil(path: Path, change: Callable[[torch.Tensor], None], name: str = "lora") -> None:
    held = torch.load(path, weights_only=True)
    change(next(x for key, x in held["state_dict"].items() if name in key).data.view(-1))
    torch.save(held, path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_checkpoint_is_not_loaded(checkpoint: Path, value: float) -> None:
    spoil(checkpoint, lambda x: x[:1].fill_(value))
    words = r"1 of \d+ tensors of the checkpoint hold NaN or infinity, .*lora.* among them"
    with pytest.raises(ValueError, match=words):
        load_classifier(checkpoint)
    with pytest.raises(ValueError, match=words):
        ExitClassifier.load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=words):
        trainer().test(make_classifier(), noise_batches(4, 2), ckpt_path=str(checkpoint))


@pytest.mark.parametrize(
    ("name", "options", "tensor"),
    [
        ("regnetx_002", {}, "s1.b1.conv1.bn.running_mean"),
        ("regnetx_002", {}, "s1.b1.conv1.bn.weight"),
        ("vit_tiny_patch16_224", VIT, "blocks.1.mlp.fc1.weight"),
    ],
)
def test_broken_backbone_weights_are_refused(name: str, options: dict, tensor: str, tmp_path: Path) -> None:
    state = create_backbone(name, 5, **options).state_dict()
    state[tensor].view(-1)[0] = torch.nan
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"1 weights of '{name}' hold NaN or infinity, {tensor}"):
        create_backbone(name, 5, weights=tmp_path / "w.safetensors", **options)


def test_predict_stops_at_broken_logits(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are finite, the logits are not."""
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "photo.png")
    args = ["predict", f"--images={tmp_path / 'photo.png'}", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'o.csv'}"]
    spoil(checkpoint, lambda x: x.fill_(3e38), "backbone.head.weight")
    for changed, words in ((False, "1 of 1 images are not finite"), (True, "hold NaN or infinity")):
        if changed:
            spoil(checkpoint, lambda x: x[:1].fill_(torch.nan))
        assert words in refused([*args, "--policy=Never"], capsys)
        assert not (tmp_path / "o.csv").exists()


# ---- in a training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_loss_stops_training(value: float) -> None:
    batches = noise_batches(6, 2)
    batches.dataset.tensors[0][2] = value  # in the second batch
    losses = Losses()
    with raises_one_line(
        ValueError,
        match=r"the training loss is not finite at step 1 \(epoch 0, exit 1, 2, 3, 1 of 2 images\); lower the learning",
    ):
        trainer(losses).fit(make_classifier(), batches)
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
    with raises_one_line(ValueError, match=r"^1 trained tensors are not finite after step 2, net.backbone.head.weight"):
        trainer(spoilt, saving(tmp_path), enable_checkpointing=True).fit(make_classifier(), noise_batches(6, 2))
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert held["global_step"] == 1
    assert all(tensor.isfinite().all() for tensor in held["state_dict"].values())


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("save", [False, True])
def test_accelerator_checks_a_step_later(
    batch: int, save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FiniteCheck, "_readable", staticmethod(lambda losses: False))
    batches = noise_batches(6, 2)
    batches.dataset.tensors[0][2 * batch] = math.nan
    counted = Spoilt(step=-1)
    options = {"enable_checkpointing": True} if save else {}
    run = trainer(counted, *([saving(tmp_path)] if save else []), max_epochs=1, **options)
    with pytest.raises(ValueError, match=rf"the training loss is not finite at step {batch} \(epoch 0, exit 1, 2, 3, "):
        run.fit(make_classifier(), batches, noise_batches(2, 2))
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
