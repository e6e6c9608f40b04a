"""Checkpoints of ExitClassifier: small, complete and resumable."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import CLASSES, VIT
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from saved import fitted, logits, read, same
from tiny import FAMILIES, SaveFirstEpoch, loader, make_classifier, trainer
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.adapters import Adapter, LoRA, RepAdapter, adapter_layers
from dynadapter.data import Shapes
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.images.preprocess import Preprocess
from dynadapter.training.callbacks import BidirectionalSparsity, ExitWeights, WeightAverage
from dynadapter.training.contents import trainable_only
from dynadapter.training.mixing import Mixing
from dynadapter.training.module import ExitClassifier
from dynadapter.training.schedules import Constant, Linear, Warmup
from dynadapter.training.weighting import EarlyToLate

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


# ---- what is in it


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_holds_trained_tensors(family: str, tmp_path: Path) -> None:
    module = make_classifier(family)
    held = read(fitted(module, tmp_path / "a.ckpt"))["state_dict"]
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert same(held, trained)
    assert not any(name.startswith(("val_", "test_")) for name in held)


def test_other_trained_tensors_are_saved(tmp_path: Path) -> None:
    module = make_classifier()
    module.net.backbone.norm.requires_grad_(True)
    path = fitted(module, tmp_path / "a.ckpt")
    assert "net.backbone.norm.weight" in read(path)["state_dict"]
    again = ExitClassifier.load_from_checkpoint(path)
    assert torch.equal(again.net.backbone.norm.weight, module.net.backbone.norm.weight)


@pytest.mark.parametrize(
    "adapter", [LoRA(rank=3, split="qv"), Adapter(), RepAdapter(), None], ids=lambda a: type(a).__name__
)
def test_load_from_checkpoint(adapter: Any, tmp_path: Path) -> None:
    settings = {
        "heads": LinearHeads(),
        "exit_depths": [1, 4],
        "lr_schedule": Warmup(0.5, 0.1, Linear(1.0, 0.0)),
        "label_smoothing": 0.1,
        "mixing": Mixing(),
        "adapter": adapter,
    }
    module = make_classifier(**settings)
    path = fitted(module, tmp_path / "a.ckpt")
    again = ExitClassifier.load_from_checkpoint(path)
    assert dict(again.hparams) == dict(module.hparams)
    assert again.net.exit_depths == (1, 4, 6)
    assert torch.equal(logits(again), logits(module))
    assert same(again.state_dict(), module.state_dict())


@pytest.mark.parametrize(("classes", "weights", "resumable"), [(10, 0.6e6, 1.8e6), (100, 2.1e6, 6.3e6)])
def test_size_for_lora_on_vit_tiny(classes: int, weights: float, resumable: float, tmp_path: Path) -> None:
    module = ExitClassifier(classes, "vit_tiny_patch16_224", pretrained=False, adapter=LoRA())
    images = TensorDataset(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    fitting = trainer(max_steps=1)
    fitting.fit(module, DataLoader(images, batch_size=2))
    for name, most, alone in (("weights", weights, True), ("resumable", resumable, False)):  # AdamW: twice the weights
        fitting.save_checkpoint(tmp_path / name, weights_only=alone)
        assert (tmp_path / name).stat().st_size < most


# ---- what travels with it


def test_names_and_preprocessing_are_saved(tmp_path: Path) -> None:
    data = Shapes(image_size=32, batch_size=8, normalization="half", interpolation="bilinear")
    names = data.class_names[::-1]
    module = make_classifier(num_classes=len(names), class_names=names)
    fitting = trainer(max_steps=1, limit_val_batches=1)
    fitting.fit(module, datamodule=data)
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    again = ExitClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.class_names == names
    assert again.preprocessing == data.preprocessing
    assert again.preprocessing == {
        "image_size": 32,
        "normalization": "half",
        "interpolation": "bilinear",
        "resize": "stretch",
        "value_range": None,
    }
    assert Preprocess(**again.preprocessing) == data.preprocess
    assert again.data_config == module.data_config
    assert again.data_config["init_args"]["normalization"] == "half"
    unnamed = make_classifier(num_classes=len(names))  # given no names, so it uses the checkpoint's
    trainer().validate(unnamed, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert unnamed.class_names == again.class_names
    assert unnamed.preprocessing == again.preprocessing
    other = Shapes(image_size=32, batch_size=8, normalization="imagenet")
    with pytest.warns(UserWarning, match="normalization=imagenet instead of half") as said:
        trainer(max_steps=1, limit_val_batches=1).fit(again, datamodule=other)
    assert len([one for one in said if "not read as in the training" in str(one.message)]) == 1
    assert again.preprocessing["normalization"] == "imagenet"  # of the last training


def test_settings_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="a")
    trainer(logger=logger, max_steps=1).fit(make_classifier(mixing=Mixing()), loader(1))
    written = (tmp_path / "a" / "hparams.yaml").read_text()
    assert "vit_tiny_patch16_224" in written
    assert "rank" in written


# ---- resume


class SeenEverywhere(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(("accumulate", "mixing"), [(1, None), (2, Mixing())])
def test_resume_equals_an_unbroken_training(accumulate: int, mixing: Mixing | None, tmp_path: Path) -> None:
    def train(*more: Callback, **where: Any) -> tuple[ExitClassifier, Any]:
        torch.manual_seed(3)
        torch.rand(len(where))  # the two random states differ
        module = make_classifier(mixing=mixing)
        sparsity = BidirectionalSparsity(Linear(0.5, 0.2), Constant(0.1), keep=Linear(0.3, 0.9))
        fitting = trainer(ExitWeights(EarlyToLate()), sparsity, *more, max_epochs=3, accumulate_grad_batches=accumulate)
        fitting.fit(module, loader(3), loader(1), **where)
        return module, fitting.optimizers[0].state_dict()

    straight, one = train(SaveFirstEpoch(tmp_path / "0.ckpt"))
    resumed, other = train(seen := SeenEverywhere(), ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    per_epoch = 3 if accumulate == 1 else 2
    assert min(seen.steps) >= per_epoch
    assert max(seen.steps) == 3 * per_epoch
    assert same(straight.state_dict(), resumed.state_dict())
    assert one["param_groups"] == other["param_groups"]
    assert all(same(one["state"][k], other["state"][k]) for k in one["state"])


# ---- averaging, copies, other modules


def test_copies_are_independent(tmp_path: Path) -> None:
    module = make_classifier()
    twin = copy.deepcopy(module)
    fitted(twin, tmp_path / "twin.ckpt")
    assert same(module.state_dict(), make_classifier().state_dict())
    assert not same(twin.state_dict(), module.state_dict())
    assert same(twin.state_dict(), read(tmp_path / "twin.ckpt")["state_dict"])
    module.load_state_dict(twin.state_dict())
    assert torch.equal(logits(module), logits(twin))


def test_trainable_only_in_any_module() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleDict({"net": make_classifier().net})
            self.own = torch.nn.Linear(2, 2).requires_grad_(False)  # frozen, but outside the backbone
            trainable_only(self)

    module = Wrapper()
    held = set(module.state_dict())
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert held == trained | {"own.weight", "own.bias"}
    other = Wrapper()
    other.load_state_dict(module.state_dict())
    assert same(other.state_dict(), module.state_dict())
    assert len(module.inner.state_dict()) > len(held)  # a part's own state dict is whole
    bare = ExitNet(make_classifier().net.backbone)
    whole = len(bare.state_dict())
    trainable_only(bare)
    assert 0 < len(bare.state_dict()) < whole


# ---- the whole model


def test_full_checkpoint_needs_no_backbone(tmp_path: Path) -> None:
    weights = tmp_path / "backbone.pth"
    bare = make_classifier(adapter=None, backbone_seed=5).net.backbone.state_dict()
    torch.save(bare, weights)
    module = make_classifier(weights=str(weights), full_checkpoint=True)
    path = fitted(module, tmp_path / "a.ckpt")
    assert set(bare) <= {k.removeprefix("net.backbone.").replace("base_layer.", "") for k in read(path)["state_dict"]}
    weights.unlink()
    again = ExitClassifier.load_from_checkpoint(path)
    assert torch.equal(logits(again), logits(module))
    assert again.backbone_hash == module.backbone_hash
    other = make_classifier()  # another backbone; the checkpoint holds its own
    trainer().validate(other, loader(1), ckpt_path=path, verbose=False, weights_only=True)
    assert torch.equal(logits(other), logits(module))
    assert other.backbone_hash == module.backbone_hash


@pytest.mark.parametrize("adapter", [LoRA(rank=2), RepAdapter()], ids=lambda a: type(a).__name__)
def test_merged_model_is_saved_whole(adapter: Any, tmp_path: Path) -> None:
    module = make_classifier(adapter=adapter)
    fitted(module, tmp_path / "a.ckpt")
    before = logits(module)
    assert module.merge() is module
    assert not adapter_layers(module)
    torch.testing.assert_close(logits(module), before, rtol=1e-4, atol=1e-5)
    path = tmp_path / "merged.ckpt"
    saving = trainer()
    saving.validate(module, loader(1), verbose=False)
    saving.save_checkpoint(path)
    again = ExitClassifier.load_from_checkpoint(path)
    assert torch.equal(logits(again), logits(module))
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **VIT)
    held = {k.removeprefix("net.backbone."): v for k, v in read(path)["state_dict"].items() if "backbone" in k}
    plain.load_state_dict(held)  # timm's names, all of them
    images = next(iter(loader(3)))[0]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), logits(module)[-1])


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_training_on_from_a_full_checkpoint(merged: bool, average: bool, tmp_path: Path) -> None:
    """A later checkpoint keeps its backbone, which the settings of the later training do not describe."""
    callbacks = [WeightAverage(decay=0.5)] * average
    first = make_classifier(adapter=None, backbone_seed=5, full_checkpoint=True)
    if merged:
        first = make_classifier().merge()
    path = fitted(first, tmp_path / "a.ckpt", *callbacks)
    other = make_classifier(adapter=None)
    fitting = trainer(*callbacks, max_epochs=3)
    fitting.fit(other, loader(2), ckpt_path=path, weights_only=True)
    assert fitting.global_step > 2
    fitting.save_checkpoint(tmp_path / "b.ckpt")
    again = ExitClassifier.load_from_checkpoint(tmp_path / "b.ckpt")
    assert again.backbone_hash == first.backbone_hash
    assert torch.equal(logits(again), logits(other))
    lean = ExitClassifier.load_from_checkpoint(path, full_checkpoint=False)
    again = ExitClassifier.load_from_checkpoint(fitted(lean, tmp_path / "c.ckpt"))
    assert torch.equal(logits(again), logits(lean))


def test_failed_merge_changes_nothing(tmp_path: Path) -> None:
    module = make_classifier(adapter=Adapter())
    before = module.backbone_hash
    with pytest.raises(ValueError, match="Adapter cannot be merged"):
        module.merge()
    assert module.backbone_hash == before
    assert not module.full_checkpoint
    again = ExitClassifier.load_from_checkpoint(fitted(module, tmp_path / "a.ckpt"))
    assert same(again.state_dict(), module.state_dict())
    assert len(adapter_layers(again)) == 6
