"""A frozen backbone: what is trained, which switches of timm work, and which images it takes."""

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from conftest import BACKBONES, CLASSES, CONVNEXT, SWIN, VIT, raises_one_line
from PIL import Image
from tiny import QUIET, make_classifier, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.adapters import Adapter, AdapterLayer, AdaptFormer, LoRA, RepAdapter, inject
from dynadapter.backbones import classifier, create_backbone
from dynadapter.data.folder import ImageFolder
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence
from dynadapter.training.losses import joint_loss

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

PLAIN = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "convnext": ("convnext_tiny", CONVNEXT),
}
KINDS = [LoRA(rank=2, targets=("*.mlp.fc1",)), RepAdapter(bottleneck=4), Adapter(), AdaptFormer(), None]


def plain_timm(family: str, **changes: Any) -> nn.Module:
    name, arguments = PLAIN[family]
    return timm.create_model(name, num_classes=CLASSES, **(arguments | changes))


def added(net: ExitNet) -> set[str]:
    """Return the names of what should be trained: heads, classifier, and what adapters add."""
    free = {id(p) for part in [net.heads, *classifier(net.backbone)] for p in part.parameters()}
    for layer in (part for part in net.modules() if isinstance(part, AdapterLayer)):
        free |= {id(p) for name, p in layer.named_parameters() if not name.startswith(("base_layer.", "norm."))}
    return {name for name, p in net.named_parameters() if id(p) in free}


def moved(net: ExitNet, images: Tensor) -> set[str]:
    """Train two steps (the first can leave half of an adapter, behind zeros) and return what changed."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        joint_loss(net.train()(images), torch.arange(4) % CLASSES, net.exit_weights).backward()
        optimizer.step()
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_plain_timm_model_is_frozen(family: str, kind: Any, at_once: bool, images: Tensor) -> None:
    backbone = plain_timm(family)
    if kind is not None:
        inject(backbone, kind, freeze=at_once)
    net = ExitNet(backbone, every=2)
    assert moved(net, images) == added(net)


def test_freeze_false_trains_everything(images: Tensor) -> None:
    backbone = plain_timm("vit", proj_drop_rate=0.5)
    inject(backbone, LoRA(rank=2), freeze=False)
    assert all(p.requires_grad for p in backbone.parameters())
    net = ExitNet(backbone, every=2, freeze=False)
    assert moved(net, images) == {name for name, _ in net.named_parameters()}
    assert all(part.training for part in net.train().modules())
    assert not any(part.training for part in net.eval().modules())


def test_injecting_twice_keeps_both(images: Tensor) -> None:
    backbone = plain_timm("vit")
    inject(backbone, LoRA(rank=2))
    inject(backbone, AdaptFormer(bottleneck=4))
    net = ExitNet(backbone, every=2)
    assert moved(net, images) == added(net)


def test_peft_adapters_are_trained(images: Tensor) -> None:
    peft = pytest.importorskip("peft")
    backbone = plain_timm("vit")
    settings = peft.LoraConfig(r=2, target_modules=["qkv"], lora_dropout=0.5)
    backbone = peft.inject_adapter_in_model(settings, backbone)
    with pytest.warns(UserWarning, match="classifier is frozen .* last exit stays as it is"):
        ExitNet(backbone, every=2)
    backbone.get_classifier().requires_grad_(True)
    net = ExitNet(backbone, every=2)
    lora = {name for name, _ in net.named_parameters() if "lora_" in name}
    assert len(lora) == 12
    assert moved(net, images) == added(net) | lora
    assert {part.training for name, part in net.train().named_modules() if "lora_dropout" in name} == {True}
    assert not net.backbone.blocks[0].attn.qkv.base_layer.training


def test_a_frozen_classifier_is_named() -> None:
    backbone = plain_timm("vit").requires_grad_(False)
    ExitNet(backbone)  # nothing of it is trained
    inject(backbone, LoRA(rank=2))
    with pytest.warns(UserWarning, match=r"call backbone.get_classifier\(\).requires_grad_\(True\)"):
        ExitNet(backbone)


# ---- stochastic depth


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("gradients", [True, False])
def test_drop_path_equals_timm_in_training(family: str, gradients: bool, images: Tensor) -> None:
    name, arguments = PLAIN[family]
    backbone = create_backbone(name, CLASSES, **arguments, drop_path_rate=0.5)
    theirs = copy.deepcopy(backbone).train()  # without other dropout or batch norm, so all of it can train
    net = ExitNet(backbone, exit_depths=[]).train()
    answers = []
    for model in (net, theirs):
        torch.manual_seed(3)
        with torch.set_grad_enabled(gradients):
            answers.append(model(images).reshape(4, CLASSES))
    assert torch.allclose(*answers, atol=1e-6)
    assert not torch.allclose(net(images)[0], answers[0], atol=1e-4)  # drawn anew
    assert torch.equal(net.eval()(images)[0], theirs.eval()(images))


@pytest.mark.parametrize("family", PLAIN)
def test_drop_path_is_off_by_default(family: str, images: Tensor) -> None:
    for changes in ({}, {"drop_path_rate": None}):
        net = ExitNet(BACKBONES[family](**changes), every=2)
        assert torch.equal(net.train()(images), net.eval()(images))


@pytest.mark.parametrize("name", ["drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"])
def test_dropout_without_effect_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0.1 would have no effect.* use drop_path_rate"):
        create_backbone("vit_tiny_patch16_224", CLASSES, **(VIT | {name: 0.1}))
    create_backbone("vit_tiny_patch16_224", CLASSES, **(VIT | {name: 0.0}))


# ---- gradient checkpointing


@pytest.mark.parametrize("family", PLAIN)
def test_checkpointing_keeps_gradients(family: str, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Mock(wraps=torch.utils.checkpoint.checkpoint)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", count)
    backbone = BACKBONES[family](drop_path_rate=0.3)
    inject(backbone, LoRA(rank=2, dropout=0.2, targets=("*.mlp.fc1",)))
    net = ExitNet(backbone, every=2).train()
    gradients = []
    for on in (False, True):
        backbone.set_grad_checkpointing(on)  # type: ignore[operator]
        net.zero_grad()
        torch.manual_seed(0)
        joint_loss(net(images), torch.arange(4), net.exit_weights).backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        assert count.call_count == 6 * on  # one for each block
    assert gradients[0].keys() == gradients[1].keys() == added(net)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    with torch.no_grad():
        net(images)
        net.eval().early(images, Confidence(0.5))
    assert count.call_count == 6


# ---- channels


@pytest.mark.parametrize("channels", [1, 4])
def test_own_channels_are_trained(channels: int) -> None:
    module = make_classifier(backbone_args=VIT | {"in_chans": channels})
    data = DataLoader(TensorDataset(torch.randn(4, channels, 32, 32), torch.arange(4)), batch_size=2)
    fitting = trainer(max_epochs=1)
    fitting.fit(module, data, data)
    assert 0 <= float(fitting.callback_metrics["val/acc"]) <= 1


@pytest.mark.parametrize("loop", ["fit", "validate", "test"])
def test_other_channels_are_one_line(loop: str, tmp_path: Any) -> None:
    for split in ("train", "val", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (32, 32)).save(tmp_path / split / name / f"{k}.png")
    module = make_classifier(backbone_args=VIT | {"in_chans": 1}, num_classes=2)
    data = ImageFolder(tmp_path, image_size=32, batch_size=2)
    with raises_one_line(ValueError, match="images of 3 channels do not fit a backbone with in_chans=1; leave"):
        getattr(trainer(max_epochs=1, num_sanity_val_steps=0), loop)(module, datamodule=data)
