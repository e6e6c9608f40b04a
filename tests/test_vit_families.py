"""Bundles, checkpoints' arguments, ONNX and other depths of the families beside the plain ViT, Swin and ConvNeXt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_networks import options as export_options
from exported_networks import spread
from test_backbones import ARCHITECTURES
from tiny import make_classifier, shaken

from dynadapter import Confidence, LoRA, bundle_from_classifier, create_backbone, load
from dynadapter.backbones import blocks, cut_depth, set_image_size
from dynadapter.cost.meters import Part
from dynadapter.cost.operators import OPERATORS
from dynadapter.serve.export import export_onnx
from dynadapter.training.module import ExitClassifier

NAMES = ("beitv2_base_patch16_224", "naflexvit_base_patch16_map", "qwen3_vit_88m", "eva02_tiny_patch14_224")
WIDTHS = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16}
CASES = [
    *(case[:2] for case in ARCHITECTURES if case[0] in NAMES),
    ("hiera_tiny_224", {"img_size": 32, "embed_dim": 16, "stages": (1, 1, 1, 2)}),
    ("maxvit_tiny_tf_224", {"img_size": 32, **WIDTHS}),
]


def classifier(name: str, options: dict[str, Any]) -> ExitClassifier:
    return shaken(make_classifier(backbone=name, backbone_args=options, adapter=LoRA(rank=2))).eval()


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_bundle_is_the_network(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    module = classifier(name, options)
    place = bundle_from_classifier(module, tmp_path / "bundle", policy=Confidence(0.5), preprocessing={}, costs=None)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load(place).net(images), module.net(images))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_onnx_graphs_match_the_network(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    net = spread(classifier(name, options).net)
    export_onnx(net, tmp_path / "exported", **export_options())  # compares logits and exits with the network


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_first_blocks_alone(name: str, options: dict[str, Any]) -> None:
    model = create_backbone(name, 5, **options)
    count = len(blocks(model)) - 1
    cut_depth(model, count)
    assert len(blocks(model)) == count
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_eva_returns_to_its_own_size() -> None:
    model = create_backbone("eva02_tiny_patch14_224", 5, img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(images)
    set_image_size(model, 48)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    set_image_size(model, 32)
    assert torch.equal(model(images), before)


def test_beit_keeps_its_size() -> None:
    model = create_backbone("beit_base_patch16_224", 5, img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="was built for 32 pixels"):
        set_image_size(model, 48)


def test_size_that_the_windows_do_not_fit() -> None:
    for name in ("hiera_tiny_224", "coatnet_0_rw_224"):
        with pytest.raises(ValueError, match=r"image_size=240 is not a multiple of 32 pixels.*; use 224 or 256"):
            create_backbone(name, 5, image_size=240)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchs_attention_is_counted() -> None:
    from fvcore.nn import FlopCountAnalysis

    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    part = Part(lambda x: layer(x, x, x, need_weights=False)[0])
    part.layer = layer  # the trace must know its parameters
    with torch.no_grad():
        counted = FlopCountAnalysis(part.eval(), torch.zeros(3, 5, 8))
        counted.set_op_handle(**{f"aten::{name}": count for name, count in OPERATORS.items()})
        assert counted.total() == 3 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)


def test_split_lora_needs_rows_in_order() -> None:
    with pytest.raises(ValueError, match=r"alternate by head; use split='fused'"):
        make_classifier(backbone="maxvit_tiny_rw_224", backbone_args={"depths": (1, 1, 1, 1)}, adapter=LoRA(split="qv"))
