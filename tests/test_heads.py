"""Early heads against hand formulas."""

import pytest
import torch
from conftest import raises_one_line
from torch.nn import functional as F

from dynadapter.exits.heads import Balanced, ExitHead, Heads, LinearHeads, MLPHeads, PooledHeads

KINDS = [Balanced(), LinearHeads(), MLPHeads()]


def build(kind: Heads, exit: int = 0, exits: int = 4, width: int = 24, **changes) -> ExitHead:
    options = {"num_classes": 5, "prefix_tokens": 1, "class_token": True} | changes
    return kind.build(exit=exit, exits=exits, width=width, **options)


def parameters(head: ExitHead) -> int:
    return sum(p.numel() for p in head.parameters())


def linear_size(width: int, classes: int) -> int:
    return 2 * width + width * classes + classes


def mlp_size(width: int, hidden: int, classes: int) -> int:
    return 2 * width + (width + 1) * hidden + (hidden + 1) * classes


def test_every_kind_is_tried_here() -> None:
    assert {type(kind) for kind in KINDS} == set(PooledHeads.__subclasses__())


@pytest.mark.parametrize(
    ("kind", "exits", "mlps"),
    [
        (Balanced(), 4, 2),
        (Balanced(), 5, 2),
        (Balanced(), 3, 1),
        (Balanced(), 2, 1),
        (Balanced(mlp_exits=0), 4, 0),
        (Balanced(mlp_exits=1), 4, 1),
        (Balanced(mlp_exits=9), 4, 3),
        (LinearHeads(), 4, 0),
        (MLPHeads(), 4, 3),
    ],
)
def test_parameters_by_formula(kind: Heads, exits: int, mlps: int) -> None:
    sizes = [parameters(build(kind, exit=k, exits=exits, width=768, num_classes=100)) for k in range(exits - 1)]
    assert sizes == [mlp_size(768, 64, 100)] * mlps + [linear_size(768, 100)] * (exits - 1 - mlps)


def test_hidden_width_counts() -> None:
    assert parameters(build(MLPHeads(hidden=7))) == mlp_size(24, 7, 5)
    assert parameters(build(Balanced(hidden=7))) == mlp_size(24, 7, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["auto", "cls", "mean"])
@pytest.mark.parametrize("prefix_tokens", [1, 5])
def test_forward_norm_pool_classify(kind: Heads, pooling: str, prefix_tokens: int) -> None:
    head = build(type(kind)(pooling=pooling), prefix_tokens=prefix_tokens)  # type: ignore[arg-type]
    torch.nn.init.normal_(head.norm.weight)
    torch.nn.init.normal_(head.norm.bias)
    tokens = torch.randn(3, prefix_tokens + 16, 24)
    normed = F.layer_norm(tokens, (24,), head.norm.weight, head.norm.bias, eps=1e-6)
    pooled = normed[:, prefix_tokens:].mean(1) if pooling == "mean" else normed[:, 0]
    logits = head(tokens)
    assert logits.shape == (3, 5)
    assert head.reads_class_token == (pooling != "mean")
    torch.testing.assert_close(logits, head.classify(pooled))


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_pooling_without_class_token(pooling: str) -> None:
    head = build(LinearHeads(pooling=pooling), prefix_tokens=0, class_token=False)  # type: ignore[arg-type]
    assert not head.reads_class_token
    tokens = torch.randn(3, 16, 24)
    torch.testing.assert_close(head(tokens), head(tokens[:, torch.randperm(16)]))


def test_pooling_reads_only_its_tokens() -> None:
    tokens, other = torch.randn(2, 3, 17, 24).unbind()
    mean, cls = build(LinearHeads(pooling="mean")), build(LinearHeads(pooling="cls"))
    torch.testing.assert_close(mean(tokens), mean(torch.cat([other[:, :1], tokens[:, 1:]], 1)))
    torch.testing.assert_close(cls(tokens), cls(torch.cat([tokens[:, :1], other[:, 1:]], 1)))


def test_starts_like_a_timm_head() -> None:
    head = build(MLPHeads(), width=512)
    first = head.classify[0]  # type: ignore[index]
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(not layer.bias.any() for layer in head.classify if hasattr(layer, "bias"))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Balanced(hidden=0), "hidden=0 must be at least 1"),
        (lambda: MLPHeads(hidden=-1), "hidden=-1 must be at least 1"),
        (lambda: Balanced(mlp_exits=-1), "mlp_exits=-1 must be at least 0"),
        (lambda: LinearHeads(pooling="max"), "pooling='max' is unknown; choose 'auto', 'cls' or 'mean'"),
        (lambda: build(LinearHeads(pooling="cls"), class_token=False), "use pooling='mean' or 'auto'"),
    ],
)
def test_mistakes_are_one_line(make, message: str) -> None:
    with raises_one_line(ValueError, match=message):
        make()
