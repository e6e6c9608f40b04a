"""Kinds of adapter × families of backbone × properties, with every kind in its default places."""

import copy
import functools

import pytest
import torch
from test_backbones import ARCHITECTURES
from torch import Tensor, nn

from dynadapter import (
    SSF,
    VPT,
    Adapter,
    AdapterPlus,
    AdaptFormer,
    BitFit,
    Confidence,
    Convpass,
    DoRA,
    ExitCosts,
    ExitNet,
    FacT,
    LoRA,
    RepAdapter,
    exit_costs,
    inject,
)
from dynadapter.adapters import AdapterSpec, adapter_layers
from dynadapter.backbones import create_backbone
from dynadapter.exits.policies import read_off
from dynadapter.serve.bundle.tensors import fill, frozen_names, saved_tensors
from dynadapter.spec import plain, restore
from dynadapter.training.contents import frozen_keys

NAMES = (
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "vit_small_plus_patch16_dinov3",
    "vit_base_patch16_rope_mixed_224",
    "beitv2_base_patch16_224",
    "naflexvit_base_patch16_map",
    "hiera_tiny_224",
    "maxvit_rmlp_pico_rw_256",
    *(name for name, _, _ in ARCHITECTURES if name == "qwen3_vit_88m"),
    "swinv2_tiny_window8_256",
    "convnext_tiny",
    "test_resnet",
    "regnetv_064",
    "test_efficientnet",
)
WHOLE = ("eva02_tiny_patch14_224", "convnext_tiny")  # costs and saving do not depend on the family
KINDS: list[AdapterSpec] = [
    LoRA(rank=2),
    RepAdapter(bottleneck=2),
    Adapter(bottleneck=2),
    AdaptFormer(bottleneck=16),
    SSF(std=0.0),
    BitFit(),
    DoRA(rank=2),
    FacT(rank=2),
    AdapterPlus(bottleneck=2, drop_path=0.0),
    Convpass(bottleneck=2),
    VPT(prompts=3),
    VPT(prompts=3, placement="shallow"),
]
FREE = (SSF, BitFit)  # arithmetic on single elements is not counted
NO_PLACES = {
    VPT: [name for name in NAMES if not name.startswith(("eva", "vit"))],
    Convpass: ["hiera_tiny_224"],
}
SIZE = 32


def shaken(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in parameters:
            one.add_(torch.randn(one.shape, generator=generator), alpha=0.1)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@functools.cache
def whole_backbone(name: str) -> nn.Module:
    """Return a backbone that has no zeros that would hide a mistake."""
    options = next(options for other, options, _ in ARCHITECTURES if other == name)
    backbone = create_backbone(name, num_classes=5, pretrained=False, **options)
    shaken(backbone, list(backbone.parameters()))
    return backbone.eval()


def network(name: str, spec: AdapterSpec) -> ExitNet:
    """Return a network on a copy of this backbone; a copy takes a tenth of the time of a build."""
    backbone = copy.deepcopy(whole_backbone(name))
    with torch.no_grad():
        before = backbone(images())
    inject(backbone, spec)
    with torch.no_grad():
        if not isinstance(spec, VPT):
            torch.testing.assert_close(backbone(images()), before)  # the identity at the start
    return ExitNet(backbone, every=1)


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: f"{type(spec).__name__} {getattr(spec, 'placement', '')}")
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_in_every_family(name: str, spec: AdapterSpec) -> None:
    if name in NO_PLACES.get(type(spec), ()):
        with pytest.raises(ValueError, match=rf"{type(spec).__name__} has no default places in .*; kinds .*, SSF"):
            network(name, spec)
        return
    net = network(name, spec)
    adapters = [p for layer in adapter_layers(net.backbone).values() for p in layer.parameters() if p.requires_grad]
    trained = [p for p in net.parameters() if p.requires_grad]
    heads = {id(p) for p in (*net.heads.parameters(), *net.backbone.get_classifier().parameters())}
    assert {id(p) for p in trained} == {id(p) for p in adapters} | heads
    static = exit_costs(copy.deepcopy(net), SIZE) if name in WHOLE else None
    shaken(net, trained)  # beside the start, where half of the adapters' tensors have no gradient
    net.train()
    net(images()).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    net.eval()

    with torch.no_grad():
        logits = net(images())
        policy = Confidence(logits[0].softmax(-1).amax(-1).median().item())
        routed, expected = net.early(images(), policy), read_off(policy, logits)
    assert routed.exit_index.equal(expected.exit_index)
    torch.testing.assert_close(routed.logits, expected.logits, rtol=1e-4, atol=1e-5)

    merged = None
    if all(layer.mergeable for layer in adapter_layers(net.backbone).values()):
        merged = copy.deepcopy(net).merge(1e-4)
        assert not adapter_layers(merged.backbone)
        with torch.no_grad():
            torch.testing.assert_close(merged(images()), logits, rtol=1e-3, atol=1e-4)
    if static is not None:
        check_costs(net, merged, static, spec)
        check_saving(net, network(name, spec), logits, spec)


def check_costs(net: ExitNet, merged: ExitNet | None, static: ExitCosts, spec: AdapterSpec) -> None:
    costs = exit_costs(net, SIZE)
    assert costs.macs == static.macs
    assert costs.relative[-1] > 1
    if merged is not None:
        assert (exit_costs(merged, SIZE).macs[-1] < costs.macs[-1]) is not isinstance(spec, FREE)


def check_saving(net: ExitNet, fresh: ExitNet, logits: Tensor, spec: AdapterSpec) -> None:
    """A bundle's file and a checkpoint hold the same tensors, which make the same network again."""
    assert restore(plain(spec), AdapterSpec) == spec
    assert frozen_names(net) == frozen_keys(net)
    fill(fresh.eval(), saved_tensors(net, whole=False), False, "bundle")
    with torch.no_grad():
        torch.testing.assert_close(fresh(images()), logits)


@pytest.mark.parametrize("name", ["vit_small_plus_patch16_dinov3", "vit_base_patch16_rope_mixed_224"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    net = network(name, LoRA(rank=2)).train()
    gradients = []
    for on in (False, True):
        net.backbone.set_grad_checkpointing(on)
        net.zero_grad()
        net(images()).pow(2).sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_dinov3_takes_any_square() -> None:
    net = network("vit_small_plus_patch16_dinov3", LoRA(rank=2))
    for size in (32, 48, 80):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(net(x)[-1], net.backbone(x))
    with pytest.raises(ValueError, match="24 patches do not form a square; give square images"):
        net(torch.randn(1, 3, 32, 48))


def test_patch_dropout_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match=r"leave (patch_drop_rate|it) out"):
        create_backbone("eva02_tiny_patch14_224", num_classes=5, pretrained=False, img_size=28, patch_drop_rate=0.5)
