"""A backbone cut to its first blocks: the same features, read by its own norm and head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKBONES, CLASSES
from tiny import loader, make_classifier, trainer
from torch import Tensor, nn

from dynadapter.adapters import LoRA
from dynadapter.backbones import blocks, classify, cut_depth, embed, finish
from dynadapter.cost import exit_costs
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Never
from dynadapter.serve.bundle import bundle_from_classifier, load
from dynadapter.training.module import ExitClassifier

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

DEPTHS = {"vit": 2, "swin": 5, "convnext": 6}  # within the last stage, whose channels the head reads


def classify_after(model: nn.Module, depth: int, images: Tensor) -> Tensor:
    """Return the logits of the model's own norm and head on the output of a block."""
    x = embed(model, images)
    for unit in blocks(model)[:depth]:
        for module in unit:
            x = module(x)
    return classify(model, finish(model, x))


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES)
def test_cut_backbone_equals_its_prefix(family: str, images: Tensor) -> None:
    depth, options = DEPTHS[family], {"depths": (2, 1, 1, 3)} if family == "convnext" else {}
    whole, cut = BACKBONES[family](**options), BACKBONES[family](**options)
    cut_depth(cut, depth)
    assert len(blocks(cut)) == depth
    assert torch.equal(cut(images), classify_after(whole, depth, images))
    names = set(cut.state_dict())
    assert names < set(whole.state_dict())  # timm's own names
    static = ExitNet(cut, exit_depths=[])
    assert torch.equal(static(images)[0], cut(images))


@pytest.mark.parametrize(
    ("family", "depth", "message"),
    [
        ("vit", 0, "depth=0 does not fit a backbone of 6 blocks; choose 1 to 6"),
        ("vit", 7, "depth=7 does not fit a backbone of 6 blocks; choose 1 to 6"),
        (
            "swin",
            4,
            "depth=4 ends where the SwinTransformer has 32 channels, .* read 64; choose 5 to 6",
        ),
        ("convnext", 5, "depth=5 ends where the ConvNeXt has 32 channels, .* read 48; choose 6 to 6"),
    ],
)
def test_depths_that_do_not_fit(family: str, depth: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        cut_depth(BACKBONES[family](), depth)


def test_cut_costs_the_prefix_and_the_head() -> None:
    backbone = make_classifier(adapter=None).net.backbone
    with_exits = exit_costs(ExitNet(backbone, every=2))
    cut = exit_costs(make_classifier(adapter=None, depth=4, exit_depths=[]).net)
    whole = exit_costs(make_classifier(adapter=None, exit_depths=[]).net)
    block = (whole.macs[-1] - cut.macs[-1]) / 2
    assert block > 0
    assert cut.macs[-1] == pytest.approx(whole.macs[-1] - 2 * block)
    prefix = with_exits.macs[1] - with_exits.macs[0]  # blocks 3 and 4, and the second early head
    assert 2 * block < prefix < 2.1 * block


def test_cut_model_reloads_and_travels(tmp_path: Path) -> None:
    module = make_classifier(depth=3, every=1)
    assert module.net.exit_depths == (1, 2, 3)
    assert module.backbone_hash != make_classifier().backbone_hash
    run = trainer(max_steps=1)
    run.fit(module, loader(1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = ExitClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    images = next(iter(loader(1)))[0]
    with torch.no_grad():
        expected = module.eval().net(images)
        assert torch.equal(again.eval().net(images), expected)
        options: dict[str, Any] = {"policy": Never(), "preprocessing": {}}
        bundle = load(bundle_from_classifier(module, tmp_path / "bundle", **options))
        assert torch.equal(bundle.net(images), expected)
    with pytest.raises(ValueError, match="give the backbone, weights, backbone_args and depth of the training"):
        ExitClassifier.load_from_checkpoint(tmp_path / "a.ckpt", depth=2, exit_depths=[1])


def test_cut_keeps_given_weights(tmp_path: Path) -> None:
    torch.save(make_classifier(adapter=None, backbone_seed=3).net.backbone.state_dict(), tmp_path / "w.pth")
    whole = make_classifier(adapter=LoRA(rank=2), weights=str(tmp_path / "w.pth"))
    cut = make_classifier(adapter=LoRA(rank=2), weights=str(tmp_path / "w.pth"), depth=4)
    expected, found = whole.net.backbone.state_dict(), cut.net.backbone.state_dict()
    frozen = [name for name in found if "lora" not in name and "head" not in name]
    assert len(frozen) > 40
    assert all(torch.equal(found[name], expected[name]) for name in frozen)
    assert cut.net.num_classes == CLASSES
