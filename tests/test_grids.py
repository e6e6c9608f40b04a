"""Images that are not square: refused where the blocks or an adapter would take their patches for another grid."""

from typing import Any

import pytest
import timm
import torch
from conftest import raises_one_line
from torch import nn

from dynadapter import Convpass, ExitNet, LoRA, create_backbone, inject
from dynadapter.adapters import AdapterSpec

ROTARY: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
VIT = ROTARY | {"img_size": 64, "dynamic_img_size": True}
CASES: list[tuple[str, dict[str, Any], AdapterSpec]] = [
    ("vit_small_plus_patch16_dinov3", VIT, LoRA(rank=2)),
    ("vit_base_patch16_rope_mixed_224", VIT, LoRA(rank=2)),
    ("eva_giant_patch14_224", VIT, Convpass(bottleneck=2)),
    ("vit_tiny_patch16_224", VIT, Convpass(bottleneck=2)),
    ("naflexvit_base_patch16_map", ROTARY | {"rope_type": "mixed"}, LoRA(rank=2)),
    ("naflexvit_base_patch16_gap", ROTARY, Convpass(bottleneck=2)),
    ("qwen3_vit_88m", ROTARY, LoRA(rank=2)),
]


def network(name: str, options: dict[str, Any], spec: AdapterSpec) -> ExitNet:
    if not timm.is_model(name):
        pytest.skip("not in this release of timm")
    backbone = create_backbone(name, 5, **options)
    inject(backbone, spec)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    return ExitNet(backbone, every=1).eval()


@pytest.mark.parametrize(("name", "options", "spec"), CASES, ids=[f"{name}-{spec.label}" for name, _, spec in CASES])
@torch.no_grad()
def test_wide_image_with_patches_of_a_square(name: str, options: dict[str, Any], spec: AdapterSpec) -> None:
    net = network(name, options, spec)
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()
    assert net(torch.randn(1, 3, 32, 32)).isfinite().all()
    with raises_one_line(ValueError, match="4 x 16 patches do not form a square; give square images"):
        net(torch.randn(1, 3, 32, 128))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva_giant_patch14_224"])
@torch.no_grad()
def test_wide_image_without_a_grid(name: str) -> None:
    net, wide = network(name, VIT, LoRA(rank=2)), torch.randn(1, 3, 32, 128)
    torch.testing.assert_close(net(wide)[-1], net.backbone(wide))


@pytest.mark.parametrize(("name", "spec"), [(CASES[0][0], LoRA(rank=2)), (CASES[3][0], Convpass(bottleneck=2))])
@torch.no_grad()
def test_square_image_with_patches_of_a_wide_one(name: str, spec: AdapterSpec) -> None:
    net = network(name, VIT | {"img_size": (32, 128)}, spec)
    wide = torch.randn(1, 3, 32, 128)
    torch.testing.assert_close(net(wide)[-1], net.backbone(wide))
    with raises_one_line(ValueError, match="8 x 8 patches do not fit"):
        net(torch.randn(1, 3, 64, 64))
