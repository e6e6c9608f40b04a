"""Architectures that no other file names: each works, or is refused in one line that names what is missing."""

import warnings
from typing import Any

import pytest
import torch
from conftest import CLASSES, parting, raises_one_line
from test_backbones import shake
from torch import Tensor, nn

from dynadapter import AdapterPlus, DoRA, ExitNet, LoRA, RepAdapter, create_backbone, exit_costs, inject
from dynadapter.adapters import Adapter, adapter_layers
from dynadapter.backbones import blocks
from dynadapter.exits.policies import read_off

WORK = {  # in which blocks LoRA has a default place
    "mobilevit_xxs": "all",  # transformers inside of some blocks
    "mobilevitv2_050": "all",
    "mobilenetv4_hybrid_medium": "all",  # attention over maps, with shared keys
    "efficientnet_cc_b0_4e": "some",  # CondConv
    "mixnet_s": "all",  # convolutions of several sizes side by side
    "resnest14d": "all",  # attention among parts of the channels
    "resnetv2_50x1_bit": "none",  # BiT: standardised weights
}
REFUSED = {
    "poolformer_s12": "MetaFormer",
    "cait_xxs24_224": "Cait",
    "pvt_v2_b0": "PyramidVisionTransformerV2",
    "levit_128s": "LevitDistilled",
    "dla34": "DLA",
    "vgg11": "VGG",
    "fastvit_t8": "FastVit",
    "edgenext_xx_small": "EdgeNeXt",
    "nf_resnet26": "NormFreeNet",
    "ghostnet_050": "GhostNet",
}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def adapted(model: nn.Module) -> list[bool]:
    """Return for each block whether an adapter is in it."""
    names = {id(layer) for layer in adapter_layers(model).values()}
    return [any(id(inner) in names for part in unit for inner in part.modules()) for unit in blocks(model)]


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_class(name: str) -> None:
    with pytest.raises(TypeError, match=rf"no cut is known for {REFUSED[name]}; known: ") as error:
        create_backbone(name, CLASSES)
    message = str(error.value)
    assert "\n" not in message
    assert "register embed, blocks, finish, tokens and widths" in message


@pytest.mark.parametrize("name", WORK)
def test_architecture_works(name: str) -> None:
    model, places = shake(create_backbone(name, CLASSES)), WORK[name]
    with torch.no_grad():
        expected = model(images())
    if places == "none":
        with raises_one_line(ValueError, match=r"LoRA has no default places in .*; kinds that have: AdapterPlus;"):
            inject(model, LoRA(rank=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject(model, AdapterPlus(drop_path=0.0) if places == "none" else LoRA(rank=2))
    assert all(adapted(model)) == (places != "some")
    words = [str(one.message) for one in caught if "no default places in" in str(one.message)]
    assert len(words) == (places == "some")
    net = ExitNet(model, every=len(blocks(model)) // 3).eval()
    with torch.no_grad():
        logits = net(images())
        assert torch.equal(logits[-1], expected)  # timm's own forward pass, before the injection
        policy = parting(logits[0])
        routed, read = net.early(images(), policy), read_off(policy, logits)
    assert routed.exit_index.equal(read.exit_index)
    torch.testing.assert_close(routed.logits, read.logits, rtol=1e-4, atol=1e-4)
    assert exit_costs(net, 64).relative[0] < 1
    net.train()
    net(images()).pow(2).sum().backward()
    own = [p for layer in adapter_layers(model).values() for p in layer.own_parameters().values()]
    assert own
    assert all(p.grad is not None for p in own)


def test_blocks_without_places_are_named() -> None:
    model = create_backbone("efficientnet_cc_b0_4e", CLASSES)
    with pytest.warns(UserWarning, match=r"RepAdapter has no default places in \d+ of 16 blocks, blocks.*CondConvRes"):
        inject(model, RepAdapter(bottleneck=2))


@pytest.mark.parametrize("kind", [LoRA(rank=2), DoRA(rank=2), RepAdapter(bottleneck=2), Adapter(bottleneck=2)])
def test_mixed_networks_have_places_in_every_block(kind: Any) -> None:
    """Networks with attention in some blocks, and convolutions alone in others."""
    for name, options in [
        ("coatnet_0_rw_224", {"img_size": 32, "embed_dim": (32, 64), "depths": (1, 2), "stem_width": 16}),
        ("mobilevit_xxs", {}),
    ]:
        block_type = {"block_type": ("C", "T")} if "coat" in name else {}
        model = create_backbone(name, CLASSES, **options, **block_type)
        inject(model, kind)
        assert all(adapted(model)), name
