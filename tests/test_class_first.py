"""The class token's row first, the rest of the block for samples that continue: equal results at lower cost."""

from dataclasses import replace

import pytest
import torch
from conftest import make_convnext, make_swin, make_vit
from cost_references import counting, halved
from torch import nn

from dynadapter import backbones
from dynadapter.adapters import (
    SSF,
    Adapter,
    AdapterPlus,
    AdapterSpec,
    AdaptFormer,
    BitFit,
    DoRA,
    FacT,
    LoRA,
    RepAdapter,
    inject,
)
from dynadapter.backbones import create_backbone
from dynadapter.cost import exit_costs
from dynadapter.cost.costs import up_to_each_exit
from dynadapter.cost.meters import Parts, count_by_fvcore
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Never, confidence
from dynadapter.exits.temperature import Scaled
from dynadapter.serve.stream import Stream

ADAPTERS: list[AdapterSpec | None] = [
    None,
    Adapter(),
    Adapter(placement="houlsby"),
    AdaptFormer(bottleneck=4),
    LoRA(rank=4),
    LoRA(rank=4, split="qv"),
    RepAdapter(),
    RepAdapter(placement="attn", bias=False),
    SSF(),
    BitFit(),
    DoRA(rank=4),
    FacT(rank=4),
    AdapterPlus(),
]
VITS = {
    "plain": {},
    "layer scale, norms of q and k": {"init_values": 0.3, "qk_norm": True},
    "registers": {"reg_tokens": 3},
    "pre-norm, no bias of qkv": {"pre_norm": True, "qkv_bias": False},
}


def network(backbone: nn.Module, adapter: AdapterSpec | None = None, **options) -> ExitNet:
    if adapter is not None:
        inject(backbone, adapter)
    net = ExitNet(backbone, every=2, **({"heads": LinearHeads()} | options)).eval()
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():  # blocks that do something, adapters that are no identity
        if parameter.ndim > 1 and "pos_embed" not in name:
            nn.init.normal_(parameter, std=0.15)
    return net


def pictures(count: int = 12) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def middle_threshold(net: ExitNet, images: torch.Tensor) -> Confidence:
    """A threshold per early exit half-way between two samples' confidences, so that rounding decides nothing."""
    values = confidence(net(images))[:-1].sort(dim=1).values
    middle = values.shape[1] // 2
    return Confidence(tuple(values[:, middle - 1 : middle + 1].mean(1).tolist()))


def assert_same(net: ExitNet) -> None:
    images = pictures()
    with torch.no_grad():
        for policy in (Never(), Confidence(0.0), middle_threshold(net, images)):
            plain, first = (net.early(images, policy, class_first=way) for way in (False, True))
            assert torch.equal(first.exit_index, plain.exit_index)
            torch.testing.assert_close(first.logits, plain.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "adapter"), [*(({}, one) for one in ADAPTERS), *((one, None) for one in VITS.values())], ids=str
)
def test_same_answers_on_every_network(options, adapter):
    net = network(make_vit(**options), adapter)
    assert all(net.splits(k) for k in range(net.num_exits))
    assert_same(net)


def test_same_answers_with_unfused_attention(monkeypatch):
    net = network(make_vit(), LoRA(rank=4))
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    assert_same(net)


@pytest.mark.parametrize(
    "net",
    [
        lambda: network(make_swin()),
        lambda: network(make_convnext()),
        lambda: network(make_vit(global_pool="avg")),
        lambda: network(make_vit(), heads=LinearHeads(pooling="mean")),
        lambda: network(make_swin(), LoRA(rank=4)),
    ],
    ids=["swin", "convnext", "mean pooling", "mean heads", "swin with LoRA"],
)
def test_falls_back_to_the_whole_block(net):
    net = net()
    assert not any(net.splits(k) for k in range(net.num_exits - 1))
    assert_same(net)


def test_distilled_backbone_reads_two_tokens():
    backbone = create_backbone("deit_tiny_distilled_patch16_224", 5, img_size=32, patch_size=8, embed_dim=48, depth=4)
    net = network(backbone)
    assert [net.splits(k) for k in range(net.num_exits)] == [True, False]
    assert_same(net)


def test_exiting_samples_compute_one_row():
    net = network(make_vit())
    images = pictures()
    rows: list[tuple[int, int]] = []
    mlp = net.backbone.blocks[net.exit_depths[0] - 1].mlp
    mlp.register_forward_hook(lambda module, inputs, output: rows.append(tuple(output.shape[:2])))
    with torch.no_grad():
        policy = middle_threshold(net, images)
        rows.clear()
        exits = net.early(images, policy).exit_index
    assert rows == [(12, 1), (int((exits > 0).sum()), 17)]


def exact_run(net: ExitNet) -> tuple[int, ...]:
    """Return what the meter counts of class-first routing up to each exit, its estimates left out."""
    with torch.no_grad():
        counts = count_by_fvcore(Parts(net.eval(), class_first=True), pictures(1), {})
    return up_to_each_exit(net.num_exits, {name: part.total() - part["light"] for name, part in counts.items()})


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_class_first_macs_are_what_runs(adapter):
    """Up to each exit the meter agrees, to the last multiply-add, with torch's counter on real routing."""
    depth = 6 if adapter in (None, LoRA(rank=4)) else 4  # with a stage in the middle, or without
    net = network(make_vit(depth=depth), adapter)
    image = pictures(1)
    for k in range(net.num_exits):
        policy = Confidence(tuple(0.0 if i == k else 1.0 for i in range(net.num_exits - 1)))
        with torch.no_grad(), counting() as counter:
            assert net.early(image, policy, class_first=True).exit_index.tolist() == [k]
        assert halved(counter) == exact_run(net)[k]


def test_class_first_changes_no_other_cost():
    net = network(make_vit())
    plain, first = exit_costs(net), exit_costs(net, class_first=True)
    assert plain.class_first_macs is None
    assert replace(first, class_first_macs=None) == plain
    assert all(run < whole for run, whole in zip(first.class_first_macs, first.macs, strict=True))


def test_cost_without_class_token_equal():
    net = network(make_swin())
    costs = exit_costs(net, 32, class_first=True)
    assert costs.class_first_macs == costs.macs


def test_splits_known_layers_only():
    backbone = make_vit()
    assert backbones.splits(backbone, backbones.blocks(backbone)[0])
    backbone.blocks[0].attn.qkv = nn.Sequential(backbone.blocks[0].attn.qkv)
    assert not backbones.splits(backbone, backbones.blocks(backbone)[0])


def test_class_first_default_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    net, asked = network(make_vit()), []
    begin = net.begin
    monkeypatch.setattr(net, "begin", lambda k, x, first: asked.append(first) or begin(k, x, first))
    for count in (1, 3, 4):
        net.early(pictures(count), Confidence(1.0))
    assert asked == [False] * 3 + [False] * 3 + [True] * 3
    monkeypatch.setattr("dynadapter.exits.net.CLASS_FIRST_WORK", 17 * 48 * 48)  # this backbone's
    asked.clear()
    net.early(pictures(1), Confidence(1.0))
    assert asked == [True] * 3
    monkeypatch.undo()
    assert net.prefers_class_first(torch.empty(1, 197, 384))  # ViT-S at 224 px
    assert not net.prefers_class_first(torch.empty(1, 65, 192))  # ViT-Ti of 64 tokens


@pytest.mark.parametrize("policy", [Never(), Scaled(Never(), 2.0)])
@pytest.mark.parametrize("class_first", [False, True])
def test_never_runs_no_early_head(policy, class_first):
    net, asked = network(make_vit()), []
    images = pictures(5)
    expected = net.early(images, Confidence(1.0), class_first)
    assert expected.exit_index.tolist() == [net.num_exits - 1] * 5
    logits = expected.logits / (2 if isinstance(policy, Scaled) else 1)
    for k, head in enumerate(net.heads):
        head.register_forward_hook(lambda *_, k=k: asked.append(k))
    routed = net.early(images, policy, class_first)
    assert (routed.exit_index.tolist(), asked) == (expected.exit_index.tolist(), [])
    torch.testing.assert_close(routed.logits, logits)
    stream = Stream(net, policy, batch=2)
    stream.push(images)
    torch.testing.assert_close(torch.stack([answer.logits for answer in stream.flush()]), logits)
    assert not asked
