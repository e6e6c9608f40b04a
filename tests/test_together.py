"""Several tasks in one batch, against each bundle by itself."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import BACKBONES
from served import POLICY, Gate, parts_of
from torch import nn

from dynadapter import Adapter, Confidence, DoRA, Engine, FacT, LoRA, TokenMerging, inject
from dynadapter.adapters import AdapterSpec, adapter_layers
from dynadapter.backbones import create_backbone, fingerprint
from dynadapter.exits.heads import Balanced, LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy
from dynadapter.serve.bundle import BackboneSource, Bundle
from dynadapter.serve.bundle.saving import describe
from dynadapter.serve.together import Together

LORA = LoRA(rank=2)
READ: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": {"img_size": 32, "patch_size": 16, "depth": 4},
    "beit_base_patch16_224": {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 3},
    "swinv2_tiny_window8_256": {
        "img_size": 32,
        "depths": (2, 2),
        "embed_dim": 24,
        "num_heads": (2, 4),
        "window_size": 4,
    },
}
"""Families whose attention by default reads the weight of its layer qkv."""


def reading(family: str) -> nn.Module:
    """Return such a backbone; timm begins its biases, and the scales of its blocks, near zero."""
    backbone = create_backbone(family, 5, **READ[family])
    generator = torch.Generator().manual_seed(0)
    for one in (p for p in backbone.parameters() if p.ndim == 1):
        nn.init.normal_(one, 0.5, 0.3, generator=generator)
    return backbone


def bundle(
    adapter: AdapterSpec | None = LORA,
    classes: int = 5,
    family: str = "vit",
    seed: int = 0,
    policy: Policy = POLICY,
    every: int = 2,
    parts: dict[str, Any] | None = None,
    **options,
) -> Bundle:
    """Return a bundle whose frozen tensors are those of every other one of this family."""
    torch.manual_seed(seed)
    backbone = reading(family) if family in READ else BACKBONES[family]()
    source = BackboneSource(family, fingerprint(backbone), "seed", READ.get(family, {}))
    backbone.reset_classifier(classes)
    if adapter is not None:
        inject(backbone, adapter)
    net = ExitNet(backbone, every=every, **({"heads": LinearHeads()} | options)).eval()
    for one in (p for p in net.parameters() if p.requires_grad):
        nn.init.normal_(one, std=0.3)
    net.requires_grad_(False)
    own = {"costs": None, "adapter": adapter, "backbone": source, "class_names": tuple("abcdefghij"[:classes])}
    own |= parts or {}
    return Bundle(net, policy, describe(net, **parts_of(net, policy, **own)))


def other_source() -> BackboneSource:
    """The same tensors in another network."""
    return replace(bundle().config.backbone, timm_args={"act_layer": "relu"})


def images(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {}),
        ("vit", {"heads": Balanced()}),
        ("vit", {"token_merging": TokenMerging(after=(2,), share=0.25)}),
        ("swin", {}),
        ("convnext", {}),
    ],
    ids=["vit", "attentive", "token merging", "swin", "convnext"],
)
def test_rows_equal_their_own_bundle(family, options):
    other = LoRA(rank=3, split="qv") if family == "vit" else FacT(rank=2)
    kinds = (LoRA(rank=2, scale=0.5), other, None)
    bundles = [
        bundle(kind, classes, family, seed, **options)
        for seed, (kind, classes) in enumerate(zip(kinds, (5, 3, 8), strict=True))
    ]
    for one in bundles:  # so that some images leave at exit 1
        sure = one.net(images())[0].softmax(-1).amax(-1).sort().values
        one.policy = Confidence(float(sure[len(sure) // 2 - 1 : len(sure) // 2 + 1].mean()))
    expected = [one.route(images()) for one in bundles]
    gate = Gate()
    engines = Engine.together({str(k): one for k, one in enumerate(bundles)}, batch=7, queue=100, compute=gate)
    with gate.closed():  # so that all tasks wait, and share batches
        answers = [[engine.submit(image) for image in images()] for engine in engines.values()]
    for engine in engines.values():
        engine.close()
    assert all(len(one.exit_index.unique()) > 1 for one in expected)
    for asked, alone in zip(answers, expected, strict=True):
        assert [job.result().exit_index for job in asked] == alone.exit_index.tolist()
        found = torch.stack([job.result().probabilities for job in asked])
        torch.testing.assert_close(found, alone.logits.softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", READ)
def test_attention_that_reads_the_weight(family):
    """Only the second bundle has an adapter around the layer, so the first one's attention does not call it."""
    bundles = [bundle(kind, family=family, seed=seed) for seed, kind in enumerate((None, LORA))]
    x = images(6)
    with torch.no_grad():
        expected = [one.net(rows) for one, rows in zip(bundles, (x[:3], x[3:]), strict=True)]
        bare = copy.deepcopy(bundles[1].net)
        for layer in adapter_layers(bare.backbone).values():
            layer.scale = 0.0
        assert not torch.allclose(bare(x[3:]), expected[1], atol=0.01)
        together, inputs = Together(bundles), (x,)
        for k in range(together.net.num_exits):
            inputs, logits = together.step(k, inputs, (3, 3))
            for task, alone in enumerate(expected):
                torch.testing.assert_close(logits[task], alone[k], rtol=1e-4, atol=1e-4)


def test_frozen_tensors_are_held_once():
    bundles = [bundle(), bundle(seed=1)]
    together = Together(bundles)
    nets = [bundles[0].net, bundles[1].net, together.net]
    assert len({net.backbone.blocks[0].attn.proj.weight.data_ptr() for net in nets}) == 1
    assert type(bundles[0].net.backbone.blocks[0].attn.qkv).__name__ == "LoRALayer"
    assert len(adapter_layers(together.net.backbone)) == 6


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: bundle(Adapter(bottleneck=2)), "its adapter is Adapter, and only low-rank ones"),
        (lambda: bundle(DoRA(rank=2)), "its adapter is DoRA, and only low-rank ones"),
        (lambda: bundle(every=3), "their exits or their token merging differ"),
        (lambda: bundle(family="swin"), "their backbones differ"),
        (lambda: bundle(parts={"backbone": other_source()}), r"their backbones differ \(timm_args\)"),
    ],
)
def test_bundles_that_do_not_fit(other, reason):
    with pytest.raises(ValueError, match=f"bundle 1 cannot be in one batch with bundle 0: {reason}.*run it by itself"):
        Together([bundle(), other()])


def test_merged_bundle_does_not_fit():
    merged = bundle(seed=1)
    merged.net.merge(1e-3)
    with pytest.raises(ValueError, match=r"qkv\.weight differs, because a bundle is merged"):
        Together([bundle(), merged])
