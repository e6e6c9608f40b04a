"""Checkpoints of ExitClassifier: small, strict, resumable, and refused by other models."""

import copy
import errno
import io
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import CLASSES, SWIN, VIT
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import FAMILIES, SaveFirstEpoch, loader, make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.adapters import Adapter, LoRA, RepAdapter, adapter_layers
from dynadapter.data import Shapes
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.images.preprocess import Preprocess
from dynadapter.training.callbacks import BidirectionalSparsity, ExitWeights, WeightAverage
from dynadapter.training.checkpoints import AtomicCheckpointIO, RunCheckpoint, check, newest
from dynadapter.training.checkpoints import read as read_whole
from dynadapter.training.contents import trainable_only
from dynadapter.training.mixing import Mixing
from dynadapter.training.module import ExitClassifier
from dynadapter.training.schedules import Constant, Linear, Warmup
from dynadapter.training.weighting import EarlyToLate

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def fitted(module: ExitClassifier, path: Path) -> Path:
    fitting = trainer(max_steps=2)
    fitting.fit(module, loader(2))
    fitting.save_checkpoint(path)
    return path


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(module: ExitClassifier) -> Tensor:
    with torch.no_grad():
        return module.eval().net(next(iter(loader(3)))[0])


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


@pytest.mark.parametrize(("classes", "weights", "resumable"), [(10, 0.46e6, 1.4e6), (100, 0.65e6, 1.9e6)])
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
    }
    assert Preprocess(**again.preprocessing) == data.preprocess
    assert again.data_config == module.data_config
    assert again.data_config["init_args"]["normalization"] == "half"
    unnamed = make_classifier(num_classes=len(names))  # given no names, so it uses the checkpoint's
    trainer().validate(unnamed, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert unnamed.class_names == again.class_names
    assert unnamed.preprocessing == again.preprocessing
    other = Shapes(image_size=32, batch_size=8, normalization="imagenet")
    trainer(max_steps=1, limit_val_batches=1).fit(again, datamodule=other)
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


def test_dropout_depends_on_the_seed() -> None:
    def train(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        module = make_classifier()
        trainer(BidirectionalSparsity(Constant(0.5), keep=Constant(1.0)), max_epochs=1).fit(module, loader(3))
        return module.state_dict()

    assert same(train(0), train(0))
    assert not same(train(0), train(1))


# ---- averaging, copies, other modules


def test_weight_averaging(tmp_path: Path) -> None:
    class ByHand(Callback):
        """Average the trained tensors only."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            now = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
            old = getattr(self, "average", now)
            self.average = {name: 0.9 * old[name] + 0.1 * now[name] for name in now}

    def train(*more: Callback, **where: Any) -> tuple[ExitClassifier, Any]:
        torch.manual_seed(0)
        module = make_classifier(lr_schedule=Constant(1.0))
        fitting = trainer(WeightAverage(decay=0.9), *more, max_epochs=2)
        fitting.fit(module, loader(3), loader(1), **where)
        return module, fitting

    by_hand = ByHand()
    straight, _ = train(by_hand, SaveFirstEpoch(tmp_path / "0.ckpt"))
    held = read(tmp_path / "0.ckpt")
    trained = {name for name, p in straight.named_parameters() if p.requires_grad}
    assert set(held["state_dict"]) == set(held["current_model_state"]) == trained
    after = straight.state_dict()
    assert all(torch.allclose(after[name], by_hand.average[name], atol=1e-6) for name in trained)
    resumed, _ = train(ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert all(torch.allclose(after[name], resumed.state_dict()[name], atol=1e-6) for name in trained)
    fresh = dict(make_classifier().named_parameters())
    for name, p in straight.named_parameters():
        if name not in trained:
            assert torch.equal(p, fresh[name]), name


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


# ---- what does not fit


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = read(path)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


LORA_B = "net.backbone.blocks.3.attn.qkv.lora_b"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["state_dict"].pop(LORA_B), rf"Missing key\(s\) in state_dict: \"{LORA_B}\""),
        (lambda c: c["state_dict"].pop("net.backbone.head.bias"), "net.backbone.head.bias"),
        (lambda c: c["state_dict"].update(extra=torch.zeros(1)), r"Unexpected key\(s\) in state_dict: \"extra\""),
        (lambda c: c["state_dict"].update({LORA_B: torch.zeros(1)}), f"size mismatch for {LORA_B}"),
        (lambda c: c.pop("dynadapter"), "not written by dynadapter: it names no backbone"),
        (lambda c: c["dynadapter"].update(format=99), "format 99, this dynadapter reads 2; update dynadapter"),
    ],
)
@pytest.mark.parametrize("way", ["python", "trainer"])
def test_changed_checkpoint_is_refused(edit: Any, message: str, way: str, tmp_path: Path) -> None:
    path = change(fitted(make_classifier(), tmp_path / "a.ckpt"), edit)
    ways = {
        "python": lambda: ExitClassifier.load_from_checkpoint(path),
        "trainer": lambda: trainer().validate(make_classifier(), loader(1), ckpt_path=path, weights_only=True),
    }
    with pytest.raises(ValueError, match=message) as error:
        ways[way]()
    assert "\n" not in str(error.value)


ABC = [f"class {k}" for k in range(CLASSES)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone_seed": 1},
            r"trained on backbone 'vit_tiny_patch16_224' with weights \w{12}, this model has 'vit_tiny",
        ),
        ({"backbone": FAMILIES["swin"]["backbone"], "backbone_args": SWIN}, "this model has 'swin_tiny"),
        ({"backbone_args": VIT | {"depth": 3}}, "give the backbone, weights, backbone_args and depth of"),
        ({"num_classes": 9, "class_names": None}, "the checkpoint knows 5 classes, this model 9"),
        ({"class_names": [*ABC[:4], "other"]}, "class 4 is 'class 4' in the checkpoint and 'other' in this model"),
        ({"class_names": ABC[::-1]}, "class 0 is 'class 0' in the checkpoint and 'class 4' in this model"),
        ({"adapter": LoRA(rank=3)}, "does not fit this model: size mismatch for net.backbone.blocks.0.attn.qkv.lora_a"),
        (
            {"adapter": Adapter()},
            r"Missing key\(s\).*Unexpected key\(s\).*Give the adapter, heads, exit_depths",
        ),
        ({"adapter": None}, r"Unexpected key\(s\) .*lora_a"),
        ({"every": 3}, r"Unexpected key\(s\) .*net.heads.1"),
        ({"heads": LinearHeads()}, r"net.heads.0"),
    ],
)
def test_checkpoint_of_another_model(changes: dict, message: str, tmp_path: Path) -> None:
    path = fitted(make_classifier(class_names=ABC), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        ExitClassifier.load_from_checkpoint(path, **changes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


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
    small = fitted(other, tmp_path / "small.ckpt")
    assert read(small)["dynadapter"]["backbone_hash"] == module.backbone_hash


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
    # Its heads without the merged backbone do not fit the original backbone.
    lean = ExitClassifier.load_from_checkpoint(path, full_checkpoint=False)
    heads = fitted(lean, tmp_path / "heads.ckpt")
    assert len(read(heads)["state_dict"]) < len(held)
    with pytest.raises(ValueError, match="the checkpoint was trained on backbone"):
        ExitClassifier.load_from_checkpoint(heads)


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


# ---- older formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [1, 0, None])
def test_older_formats_are_refused(format: int | None, tmp_path: Path) -> None:
    def age(checkpoint: dict[str, Any]) -> None:
        del checkpoint["dynadapter"]["format"]
        if format is not None:
            checkpoint["dynadapter"]["format"] = format

    path = change(fitted(make_classifier(), tmp_path / "a.ckpt"), age)
    line = f"old format {format or 0}, this dynadapter reads 2; train again, or use the version of dynadapter that"
    with pytest.raises(ValueError, match=line) as error:
        ExitClassifier.load_from_checkpoint(path)
    assert "\n" not in str(error.value)


def test_missing_keys_are_counted(tmp_path: Path) -> None:
    path = fitted(make_classifier(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"Missing key\(s\).* \.\.\. \((\d+) keys\)") as error:
        ExitClassifier.load_from_checkpoint(path, adapter=Adapter())
    whole = str(error.value.__cause__)
    missing = next(line for line in whole.splitlines() if "Missing" in line)
    assert f"({missing.count('net.')} keys)" in str(error.value)
    with pytest.raises(ValueError, match=r"And \d+ more like this\."):  # one line each
        ExitClassifier.load_from_checkpoint(path, adapter=LoRA(rank=3))


def test_other_classes_are_listed(tmp_path: Path) -> None:
    path = fitted(make_classifier(class_names=ABC), tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"the checkpoint has 'class 0', 'class 1', .*; this model has 'a', 'b', 'c', "
    ):
        ExitClassifier.load_from_checkpoint(path, class_names=list("abcde"))
    with pytest.raises(ValueError, match=r"this model has '0', '1', .*, '7' and 92 more"):
        ExitClassifier.load_from_checkpoint(path, num_classes=100, class_names=None)


# ---- whole or not there ----------------------------------------------------------------------------------------------

CONTENT = {"state_dict": {"a": torch.arange(100.0)}, "optimizer_states": [], "global_step": 3, "name": "text"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(saved: Path) -> None:
    for loaded in (AtomicCheckpointIO().load_checkpoint(saved), read_whole(saved)):
        assert loaded["name"] == "text"
        assert torch.equal(loaded["state_dict"]["a"], torch.arange(100.0))
    with pytest.raises(FileNotFoundError):
        AtomicCheckpointIO().load_checkpoint(saved.with_name("other.ckpt"))


def test_other_file_systems_use_lightning() -> None:
    where = "memory://folder/a.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, where)
    assert AtomicCheckpointIO().load_checkpoint(where)["name"] == "text"
    AtomicCheckpointIO().remove_checkpoint(where)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_save_keeps_the_old_file(call: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(os, call, killed)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process removes nothing
    with pytest.raises(Killed):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"name": "new"}, saved)
    monkeypatch.undo()
    assert names(saved.parent) == ["last.ckpt", "last.ckpt.partial"]
    assert read_whole(saved)["name"] == "text"
    found = newest(saved.parent)
    assert found is not None
    assert (found.path, found.step, found.damaged) == (saved, 3, [])
    AtomicCheckpointIO().save_checkpoint(CONTENT, saved.with_name("best.ckpt"))  # of any name
    assert names(saved.parent) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_is_one_line(call: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    told = f"checkpoint {saved} cannot be written: No space left on device; .* whole"
    with pytest.raises(OSError, match=told) as error:
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"name": "new"}, saved)
    assert "\n" not in str(error.value)
    assert names(saved.parent) == ["last.ckpt"]
    assert read_whole(saved)["name"] == "text"


FULL = """
import resource, sys
from dynadapter.cli import main
from dynadapter.training.checkpoints import AtomicCheckpointIO
save = AtomicCheckpointIO.save_checkpoint
def limited(self, checkpoint, *args, **kwargs):
    if checkpoint["global_step"] == 4:  # from the second epoch on no file may have more than a few bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    return save(self, checkpoint, *args, **kwargs)
AtomicCheckpointIO.save_checkpoint = limited
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_training_on_a_full_disk(tmp_path: Path) -> None:
    tiny = Path(__file__).parent / "conf" / "tiny.yaml"
    args = ["fit", "-c", str(tiny), "--trainer.max_epochs=4", f"--trainer.default_root_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-c", FULL, *args], capture_output=True, text=True, check=False)
    saved = tmp_path / "version_0" / "checkpoints"
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"dynadapter: error: checkpoint {saved / 'last.ckpt'} cannot be written: File too large; "
    )
    assert "Traceback" not in done.stderr
    assert names(saved) == ["last.ckpt"]
    assert read_whole(saved / "last.ckpt")["global_step"] == 2


def test_unloadable_contents_are_not_saved(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"would not load under weights_only=True: it holds pathlib\.\w+Path; "):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"where": Path("a")}, saved)
    assert read_whole(saved)["name"] == "text"


@pytest.mark.parametrize("left", [0, 1, 100, -1, -30, -1000])
def test_a_file_that_was_cut_off(left: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:left])
    for reader in (check, read_whole, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=rf"{saved} is no checkpoint that can be read: ") as error:
            reader(saved)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"can be read: last\.ckpt"):
        newest(saved.parent)


def test_flipped_bits_are_found_or_harmless(tmp_path: Path) -> None:
    path = fitted(make_classifier(), tmp_path / "a.ckpt")
    whole, content = path.read_bytes(), read(path)
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        place = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            again = read_whole(path)
        except ValueError:
            found += 1
        else:
            assert same(again["state_dict"], content["state_dict"]), place
            assert again["optimizer_states"][0]["state"].keys() == content["optimizer_states"][0]["state"].keys()
    assert found > 100  # the others hit padding, dates and the like


def test_torch_does_not_check_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(1000)) + 500] = 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["a"].any()
    with pytest.raises(ValueError, match="cut off or damaged"):
        check(path)


def test_hostile_archives_are_not_unpacked(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    (tmp_path / "bomb.ckpt").write_bytes(bomb.getvalue())
    with pytest.raises(ValueError, match="it was not written by torch"):
        check(tmp_path / "bomb.ckpt")


def test_most_steps_is_newest(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name, step in (("a", 5), ("b", 9), ("c", 7)):
        AtomicCheckpointIO().save_checkpoint(CONTENT | {"global_step": step}, tmp_path / f"{name}.ckpt")
    weights = {key: value for key, value in CONTENT.items() if key != "optimizer_states"}
    AtomicCheckpointIO().save_checkpoint(weights | {"global_step": 20}, tmp_path / "weights.ckpt")
    assert newest(tmp_path) == (tmp_path / "b.ckpt", 9, [])
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:-9])
    assert newest(tmp_path) == (tmp_path / "c.ckpt", 7, [tmp_path / "b.ckpt"])


def test_lightning_checkpoints_interchange() -> None:
    for options in ({}, {"monitor": "val/acc", "mode": "max"}, {"every_n_train_steps": 5}):
        assert RunCheckpoint(**options).state_key == ModelCheckpoint(**options).state_key


def test_last_does_not_depend_on_best(tmp_path: Path) -> None:
    class Worse(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("score", -float(trainer.current_epoch))

    saver = RunCheckpoint(dirpath=tmp_path, filename="best", monitor="score", mode="max", save_last=True)
    trainer(Worse(), saver, max_epochs=3, enable_checkpointing=True).fit(make_classifier(), loader(2), loader(1))
    assert {name: read(tmp_path / name)["global_step"] for name in names(tmp_path)} == {"best.ckpt": 2, "last.ckpt": 6}
