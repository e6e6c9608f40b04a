"""Images of few or many channels, hybrid ViTs, other poolings, other sizes: each is timm's own result at every exit."""

from typing import Any

import pytest
import torch
from conftest import parting
from test_backbones import CONVNEXT, HIERA, MAXVIT, NAFLEX, SWIN
from test_backbones import VIT as DEEP

from dynadapter import ExitNet, LoRA, create_backbone, exit_costs, inject
from dynadapter.exits.policies import read_off

VIT = DEEP | {"depth": 2}
HYBRID = {key: value for key, value in VIT.items() if key != "patch_size"} | {"img_size": 64}
PLAIN = "vit_tiny_patch16_224"

# name, arguments, (channels, height, width)
CASES: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("vit_tiny_r_s16_p8_224", HYBRID, (3, 64, 64)),
    ("vit_small_resnet26d_224", HYBRID | {"in_chans": 1}, (1, 64, 64)),
    (PLAIN, VIT | {"in_chans": 1}, (1, 32, 32)),
    (PLAIN, VIT | {"in_chans": 4}, (4, 32, 32)),
    ("swin_tiny_patch4_window7_224", SWIN | {"depths": (1, 1, 1), "in_chans": 1}, (1, 32, 32)),
    ("convnext_atto", CONVNEXT | {"in_chans": 4}, (4, 32, 32)),
    ("hiera_tiny_224", HIERA | {"in_chans": 4}, (4, 32, 32)),
    ("coatnet_0_rw_224", MAXVIT | {"block_type": ("C", "T"), "in_chans": 1}, (1, 32, 32)),
    ("naflexvit_base_patch16_gap", NAFLEX | {"in_chans": 1}, (1, 32, 32)),
    ("deit_tiny_distilled_patch16_224", VIT, (3, 32, 32)),
    (PLAIN, VIT | {"global_pool": "map"}, (3, 32, 32)),
    (PLAIN, VIT | {"global_pool": "avg"}, (3, 32, 32)),
    (PLAIN, VIT | {"dynamic_img_size": True}, (3, 32, 48)),
    (PLAIN, VIT | {"dynamic_img_size": True, "dynamic_img_pad": True}, (3, 30, 45)),
    ("vit_small_patch14_reg4_dinov2", VIT, (3, 32, 32)),
]


@pytest.mark.parametrize(("name", "options", "shape"), CASES, ids=[f"{n}-{s}-{len(o)}" for n, o, s in CASES])
def test_small_input_is_timms_result(name: str, options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    backbone = create_backbone(name, 5, **options)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone(images)
        inject(backbone, LoRA(rank=2))
        net = ExitNet(backbone, every=1).eval()
        logits = net(images)
        policy = parting(logits[0])
        routed, read = net.early(images, policy), read_off(policy, logits)
    assert torch.equal(logits[-1], expected)
    assert routed.exit_index.equal(read.exit_index)
    torch.testing.assert_close(routed.logits, read.logits, rtol=1e-4, atol=1e-5)
    costs = exit_costs(net, shape[1:])  # an operator that the meter does not know is a warning, and so an error
    assert sorted(costs.macs) == list(costs.macs)
    net.train()(images).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=f"do not fit a backbone with in_chans={shape[0]}"):
        net(torch.zeros(1, shape[0] + 1, *shape[1:]))


@pytest.mark.parametrize("name", [PLAIN, "convnext_atto", "hiera_tiny_224", "qwen3_vit_88m"])
def test_no_pooling_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"global_pool='' leaves features unpooled; choose 'avg'"):
        create_backbone(name, 5, global_pool="")
