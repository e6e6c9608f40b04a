"""Backbones that ship with the package: a name gives shape and weights, without a network."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from dynadapter import ExitClassifier, LoRA, create_backbone
from dynadapter.backbones import fingerprint
from dynadapter.backbones import packaged as module
from dynadapter.serve.bundle import BackboneSource

BASE = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packaged backbones with one that is called small; gives its weight file."""
    torch.manual_seed(1)
    state = {
        name: tensor.half() for name, tensor in timm.create_model(BASE, num_classes=7, **SHAPE).state_dict().items()
    }
    safetensors.torch.save_file(state, tmp_path / "small.safetensors")
    digest = hashlib.sha256((tmp_path / "small.safetensors").read_bytes()).hexdigest()
    about = {"architecture": BASE, "timm_args": SHAPE, "preprocess": {"image_size": 32}, "sha256": digest}
    (tmp_path / "small.json").write_text(json.dumps(about))
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return tmp_path / "small.safetensors"


def test_name_gives_shape_and_weights(small):
    expected = create_backbone(BASE, 5, weights=small, **SHAPE)
    found = create_backbone("small", 5, pretrained=True)
    assert fingerprint(found) == fingerprint(expected)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), expected.parameters(), strict=True))


def test_without_weights_drawn_from_seed(small):
    assert fingerprint(create_backbone("small", 5, seed=3)) == fingerprint(create_backbone(BASE, 5, seed=3, **SHAPE))


def test_another_file_wins(small, tmp_path):
    other = timm.create_model(BASE, num_classes=5, **SHAPE)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "other.safetensors")
    found = create_backbone("small", 5, pretrained=True, weights=tmp_path / "other.safetensors")
    assert torch.equal(found.head.weight, other.head.weight)


def test_another_image_size_is_fitted(small):
    found = create_backbone("small", 5, pretrained=True, image_size=48)
    expected = create_backbone(BASE, 5, weights=small, **(SHAPE | {"img_size": 48}))
    assert fingerprint(found) == fingerprint(expected)
    assert fingerprint(create_backbone("small", 5, pretrained=True, img_size=48)) == fingerprint(expected)
    with pytest.raises(ValueError, match="image_size=45 is not a multiple of 8 pixels"):
        create_backbone("small", 5, pretrained=True, image_size=45)


def test_damaged_or_other_shape_refused(small):
    with pytest.raises(ValueError, match=r"do not fit 'small': .* missing"):
        create_backbone("small", 5, pretrained=True, depth=3)
    small.write_bytes(small.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"small\.safetensors' is missing or damaged; install dynadapter again"):
        create_backbone("small", 5, pretrained=True)
    create_backbone("small", 5)  # its shape needs no file


def test_a_mistyped_name_is_told_the_nearest(small):
    with pytest.raises(ValueError, match="timm has no model 'smal'; the nearest are small"):
        create_backbone("smal", 5)


def test_models_and_bundles_take_the_name(small):
    model = ExitClassifier(5, backbone="small", adapter=LoRA(rank=2), every=1)
    assert (model.backbone_name, model.net.exit_depths) == ("small", (1, 2))
    assert model.backbone_hash == fingerprint(create_backbone("small", 5, pretrained=True))
    source = BackboneSource("small", model.backbone_hash, "pretrained")
    assert fingerprint(source.create(5, pretrained=True)) == model.backbone_hash


@pytest.mark.parametrize("name", module.names())
def test_what_ships_is_whole(name):
    backbone = module.find(name)
    assert backbone is not None
    assert backbone.weights().stat().st_size <= 3e6
    assert "research" in (module.FOLDER / f"{name}.md").read_text()
    model = create_backbone(name, 10, pretrained=True)
    assert sum(p.numel() for p in model.parameters()) <= 1.5e6
    about = json.loads((module.FOLDER / f"{name}.json").read_text())
    assert fingerprint(model) == about["fingerprint"]
