"""Convolutional families: batch norm stays frozen, networks are saved, loaded, exported, cut and checkpointed."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import CLASSES
from cost_references import by_torch
from test_backbones import REGNET, shake
from tiny import QUIET, loader, trainer
from torch import Tensor, nn

from dynadapter import AdaptFormer, ExitClassifier, ExitNet, LoRA, RepAdapter, create_backbone, exit_costs, inject
from dynadapter.adapters import adapter_layers
from dynadapter.backbones import blocks, embed, remove_last_blocks
from dynadapter.exits.policies import Confidence, Never
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle import bundle_from_classifier, load

pytestmark = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore:You defined a `validation_step`")]

FAMILIES: dict[str, dict[str, Any]] = {"test_resnet": {}, "regnety_002": REGNET, "test_efficientnet": {}}


def made(name: str, **options: Any) -> nn.Module:
    return shake(create_backbone(name, CLASSES, **(FAMILIES[name] | options)))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "tracked" in name}


def classifier(name: str, tmp_path: Path, **options: Any) -> ExitClassifier:
    """Return a model on a backbone out of a file, with statistics that no new backbone has."""
    torch.save(made(name).state_dict(), tmp_path / "weights.pth")
    options = {"adapter": LoRA(rank=2), "every": 2, "backbone_args": FAMILIES[name]} | options
    return ExitClassifier(CLASSES, backbone=name, pretrained=False, weights=str(tmp_path / "weights.pth"), **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_stay_in_training(name: str, tmp_path: Path) -> None:
    module = classifier(name, tmp_path)
    before = statistics(module.net)
    assert len(before) > 10
    expected = statistics(made(name))
    assert all(torch.equal(value, expected[key.removeprefix("backbone.")]) for key, value in before.items())
    trainer(max_epochs=1).fit(module, loader(2))
    norms = [part for part in module.net.train().modules() if isinstance(part, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    after = statistics(module.net)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_statistics_move_without_freezing(images: Tensor) -> None:
    net = ExitNet(made("test_resnet"), every=2, freeze=False).train()
    before = statistics(net)
    net(images)
    assert not any(torch.equal(value, before[key]) for key, value in statistics(net).items())


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoint_and_bundle_reload(name: str, tmp_path: Path, images: Tensor) -> None:
    module = classifier(name, tmp_path)
    run = trainer(max_steps=2)
    run.fit(module, loader(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not any("running" in key for key in held)  # they belong to the backbone, which has a name and a hash
    again = ExitClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    folder = bundle_from_classifier(module, tmp_path / "bundle", policy=Never(), preprocessing={})
    bundle = load(folder, weights=tmp_path / "weights.pth")
    with torch.no_grad():
        expected = module.eval().net(images)
        assert torch.equal(again.eval().net(images), expected)
        assert torch.equal(bundle.net(images), expected)


@pytest.mark.parametrize(
    "name",
    ["test_resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("regnety_002", "test_efficientnet"))],
)
def test_export_equals_the_network(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from dynadapter.serve.export import export_onnx

    backbone = made(name)
    inject(backbone, RepAdapter(bottleneck=2))
    shake_adapters(backbone)
    names = [str(k) for k in range(CLASSES)]
    net = ExitNet(backbone, every=3).eval()
    done = export_onnx(net, tmp_path / "out", policy=Confidence(0.5), class_names=names, preprocess=Preprocess(32))
    assert len(done["stages"]) == net.num_exits


def shake_adapters(model: nn.Module) -> None:
    for layer in adapter_layers(model).values():
        for name, tensor in layer.named_parameters():
            if not name.startswith("base_layer."):
                nn.init.normal_(tensor, std=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_depth_rises_from_0_to_1(name: str) -> None:
    backbone = made(name)
    inject(backbone, AdaptFormer(bottleneck=2))
    depths = [wrapper.depth for wrapper in adapter_layers(backbone).values()]  # one in each block
    assert depths == pytest.approx(torch.linspace(0, 1, len(blocks(backbone))).tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_keeps_gradients(name: str, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net = ExitNet(made(name), every=2).train()
    inject(net.backbone, LoRA(rank=2))
    count = Mock(wraps=torch.utils.checkpoint.checkpoint)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", count)
    gradients = []
    for on in (False, True):
        net.backbone.set_grad_checkpointing(on)  # type: ignore[operator]
        net.zero_grad()
        net(images).pow(2).sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
        assert count.call_count == net.depth * on
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("test_resnet", {"layers": (1, 1, 1, 3)}, 2),
        ("regnety_002", {"depth": 8}, 2),
        ("test_efficientnet", {}, 2),
    ],
)
@torch.no_grad()
def test_cut_model_equals_its_prefix(name: str, options: dict[str, Any], count: int, images: Tensor) -> None:
    whole, cut = made(name, **options), made(name, **options)
    remove_last_blocks(cut, count)
    found = []
    for model in (whole, cut):
        x = embed(model, images)
        for unit in blocks(model)[: len(blocks(whole)) - count]:
            for part in unit:
                x = part(x)
        found.append(x)
    assert len(blocks(cut)) == len(blocks(whole)) - count
    assert torch.equal(*found)


@pytest.mark.parametrize("name", [*FAMILIES, "tf_mobilenetv3_small_minimal_100"])
def test_costs_equal_torchs_counter(name: str) -> None:
    net = ExitNet(create_backbone(name, CLASSES, **FAMILIES.get(name, {})), every=2).eval()
    costs = exit_costs(net, 64)
    assert costs.meter == "fvcore"
    exact = [macs - light for macs, light in zip(costs.macs, costs.light, strict=True)]
    assert exact == by_torch(net, 64)


def test_drop_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_block_rate=0\.1 would have no effect"):
        create_backbone("test_resnet", CLASSES, drop_block_rate=0.1)
