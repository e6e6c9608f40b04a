"""ExitNet against timm's own forward and against one sample at a time."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from conftest import BACKBONES, CLASSES, make_vit, raises_one_line
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynadapter import backbones
from dynadapter.adapters import AdapterLayer, LoRA, inject
from dynadapter.exits.depths import exit_blocks
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import (
    Confidence,
    Entropy,
    Margin,
    Never,
    Patience,
    Policy,
    confidence,
    entropy,
    margin,
    route,
)

EVERY = 2  # exits after blocks 2, 4 and 6 of six


def pictures(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@cache
@torch.no_grad()
def network(kind: str) -> ExitNet:
    """A network whose exits differ in class and confidence from sample to sample, as after training."""
    torch.manual_seed(0)
    net = ExitNet(BACKBONES[kind](), LinearHeads(), every=EVERY).eval()
    for head, logits in zip([*net.heads, *backbones.classifier(net.backbone)], net(pictures(64, 0)), strict=True):
        last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
        spread, middle = logits.std(0) / 2.5, logits.mean(0)
        last.weight /= spread[:, None]
        last.bias.copy_((last.bias - middle) / spread)
    return net


@pytest.fixture(params=BACKBONES)
def net(request: pytest.FixtureRequest) -> ExitNet:
    return network(request.param)


@contextmanager
def rows_seen(net: ExitNet) -> Iterator[list[list[int]]]:
    """Collects for every block the batch sizes with which it is called."""
    units = backbones.blocks(net.backbone)
    seen: list[list[int]] = [[] for _ in units]
    handles = [
        unit[-1].register_forward_hook(lambda _, args, out, calls=calls: calls.append(len(out)))
        for unit, calls in zip(units, seen, strict=True)
    ]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def alone(net: ExitNet, image: Tensor, policy: Policy) -> tuple[int, Tensor]:
    """Routes a single sample: the reference."""
    x = net.embed(image[None])
    history = []
    for k in range(net.num_exits):
        x = net.stage(k, x)
        history.append(net.head(k, x))
        if k == net.num_exits - 1 or policy.should_exit(torch.stack(history)).item():
            return k, history[-1][0]
    raise AssertionError("every sample stops at the last exit")


def clear_cut(policy: Policy, logits: Tensor) -> bool:
    """Whether no score is so close to its threshold that the rounding of another batch size could decide."""
    first, second = logits.topk(2).values.unbind(-1)
    if isinstance(policy, Patience):
        return bool((first - second > 1e-3).all())
    for kind, score in ((Confidence, confidence), (Entropy, entropy), (Margin, margin)):
        if isinstance(policy, kind):
            return all(
                bool(((score(one) - policy.threshold_at(k)).abs() > 1e-4).all()) for k, one in enumerate(logits[:-1])
            )
    return True


thresholds = st.floats(0, 1) | st.tuples(st.floats(0, 1), st.floats(0, 1))
policies = (
    st.builds(Confidence, thresholds)
    | st.builds(Entropy, thresholds)
    | st.builds(Margin, thresholds)
    | st.builds(Patience, st.integers(1, 4))
    | st.just(Never())
)


@pytest.mark.parametrize("kind", BACKBONES)
@given(policy=policies, batch=st.integers(0, 6), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_routing_equals_one_sample_at_a_time(kind: str, policy: Policy, batch: int, seed: int) -> None:
    net, images = network(kind), pictures(batch, seed)
    with torch.no_grad():
        stacked = net(images) if batch else torch.zeros(net.num_exits, 0, CLASSES)
        assume(clear_cut(policy, stacked))
        with rows_seen(net) as seen:
            routed = net.early(images, policy, class_first=False)

    expected = [alone(net, image, policy) for image in images]
    assert routed.exit_index.tolist() == [k for k, _ in expected]
    assert routed.logits.shape == (batch, CLASSES)
    assert routed.nonfinite == 0
    for logits, (_, reference) in zip(routed.logits, expected, strict=True):
        torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)

    assert torch.equal(routed.exit_index, route(policy, stacked))
    torch.testing.assert_close(routed.logits, stacked[routed.exit_index, range(batch)], rtol=1e-4, atol=1e-4)

    for block, calls in enumerate(seen):  # each block ran once for the remaining samples, and never for an empty batch
        still_in = sum(block < net.exit_depths[k] for k, _ in expected)
        assert calls == ([still_in] if still_in else [])


def test_fixture_uses_every_exit(net: ExitNet) -> None:
    exits = net.early(pictures(32, 0), Confidence(0.9)).exit_index
    assert set(exits.tolist()) == {0, 1, 2}


def test_all_leave_at_the_first_exit(net: ExitNet) -> None:
    images = pictures(4, 1)
    with torch.no_grad(), rows_seen(net) as seen:
        routed = net.early(images, Confidence(0.0), class_first=False)
    assert seen == [[4]] * EVERY + [[]] * (net.depth - EVERY)
    assert routed.exit_index.tolist() == [0] * 4
    assert torch.equal(routed.logits, net.at(0)(images))


def test_nobody_leaves(net: ExitNet) -> None:
    images = pictures(4, 1)
    with torch.no_grad(), rows_seen(net) as seen:
        routed = net.early(images, Never(), class_first=False)
    assert seen == [[4]] * net.depth
    assert torch.equal(routed.logits, net(images)[-1])


def test_order_follows_the_input(net: ExitNet) -> None:
    images, order = pictures(12, 2), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        straight, shuffled = net.early(images, Confidence(0.9)), net.early(images[order], Confidence(0.9))
    assert len(straight.exit_index.unique()) > 1
    assert torch.equal(shuffled.exit_index, straight.exit_index[order])
    torch.testing.assert_close(shuffled.logits, straight.logits[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [Confidence(0.0), Entropy(1.0), Margin(0.0), Patience(1)])
def test_logits_that_are_not_finite_go_on(net: ExitNet, policy: Policy, bad: float) -> None:
    def spoil(head: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[1, 2] = bad
        return logits

    handle = net.heads[0].register_forward_hook(spoil)
    try:
        routed = net.early(pictures(3, 3), policy)
    finally:
        handle.remove()
    assert routed.exit_index.tolist() == [0, 1, 0]
    assert routed.nonfinite == 0


def test_nonfinite_image_counted_alone(net: ExitNet) -> None:
    images = pictures(3, 3)
    clean = net.early(images, Confidence(0.0))
    images[1] = math.nan
    routed = net.early(images, Confidence(0.0))
    assert routed.exit_index.tolist() == [0, net.num_exits - 1, 0]
    assert routed.nonfinite == 1
    assert torch.equal(routed.logits[[0, 2]], clean.logits[[0, 2]])


@pytest.mark.parametrize("policy", [Confidence((0.9,)), Confidence((0.9, 0.8, 0.7)), Margin((0.5,)), Entropy(())])
def test_thresholds_checked_before_run(net: ExitNet, policy: Policy) -> None:
    with rows_seen(net) as seen, pytest.raises(ValueError, match=r"this network has 2 early exits \(3 exits\)"):
        net.early(pictures(1, 0), policy)
    assert not any(seen)


@pytest.mark.parametrize("every", [2, 4, 6])
def test_the_last_exit_is_timms_own_model(any_backbone: nn.Module, images: Tensor, every: int) -> None:
    net = ExitNet(any_backbone, every=every)
    logits = net(images)
    assert logits.shape == (len(net.exit_depths), len(images), CLASSES)
    assert torch.equal(logits[-1], any_backbone(images))


def test_exit_equals_timms_forward_and_head(any_backbone: nn.Module, images: Tensor) -> None:
    net, outputs = ExitNet(any_backbone, every=EVERY), []
    for blocks in net.exit_depths[:-1]:
        backbones.blocks(any_backbone)[blocks - 1][-1].register_forward_hook(lambda _, args, out: outputs.append(out))
    any_backbone(images)
    expected = [head(backbones.tokens(any_backbone, x)) for head, x in zip(net.heads, outputs, strict=True)]
    assert torch.equal(net(images)[:-1], torch.stack(expected))


def test_at_ends_at_one_exit(net: ExitNet) -> None:
    images = pictures(2, 0)
    with torch.no_grad():
        logits = net(images)
        for k in range(net.num_exits):
            with rows_seen(net) as seen:
                assert torch.equal(net.at(k)(images), logits[k])
            assert sum(map(len, seen)) == net.exit_depths[k]
        assert torch.equal(net.at(-1)(images), logits[-1])


@pytest.mark.parametrize("k", [3, -4])
def test_at_an_exit_that_is_not_there(net: ExitNet, k: int) -> None:
    with pytest.raises(ValueError, match=f"exit index {k} is out of range; this network has exit indices 0 to 2"):
        net.at(k)


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ({}, (3, 6, 9, 12)),
        ({"every": 12}, (12,)),
        ({"every": 1}, tuple(range(1, 13))),
        ({"every": 7}, (7, 12)),
        ({"exit_depths": [1]}, (1, 12)),
        ({"exit_depths": [4, 12]}, (4, 12)),
        ({"exit_depths": []}, (12,)),
    ],
)
def test_exit_blocks(arguments: dict, places: tuple[int, ...]) -> None:
    assert exit_blocks(12, **arguments) == places


@pytest.mark.parametrize("every", [0, -1, 13])
def test_an_interval_that_does_not_fit(every: int) -> None:
    with pytest.raises(ValueError, match=f"every={every} fits no exit into a backbone of 12 blocks; use 1 to 12"):
        exit_blocks(12, every=every)


@pytest.mark.parametrize("exits", [[0], [3, 3], [6, 3], [13], [3, 13], [-1, 3]])
def test_exits_that_do_not_fit(exits: list[int]) -> None:
    with raises_one_line(ValueError, match="must be strictly rising block counts from 1 to 12"):
        exit_blocks(12, exit_depths=exits)


def test_a_backbone_without_a_classifier(vit: nn.Module) -> None:
    vit.reset_classifier(0)  # type: ignore[operator]
    with pytest.raises(ValueError, match="the backbone has no classifier"):
        ExitNet(vit)


def test_backbone_stays_in_eval_mode(any_backbone: nn.Module) -> None:
    inject(any_backbone, LoRA(targets=("*.mlp.fc1",)))
    net = ExitNet(any_backbone, every=EVERY)
    adapters = [module for module in net.modules() if isinstance(module, AdapterLayer)]
    assert adapters
    trained = {
        id(part) for module in [*adapters, *net.heads, *backbones.classifier(any_backbone)] for part in module.modules()
    }
    trained -= {id(part) for layer in adapters for part in layer.base_layer.modules()}
    for mode in (True, False, True):
        net.train(mode)
        assert net.training == mode
        for part in net.backbone.modules():
            assert part.training == (mode and id(part) in trained), part
        assert all(part.training == mode for part in net.heads.modules())


def test_only_heads_and_adapters_learn(any_backbone: nn.Module, images: Tensor) -> None:
    inject(any_backbone, LoRA(targets=("*.mlp.fc1",)))
    net = ExitNet(any_backbone, every=EVERY).train()
    net(images).sum().backward()
    classifier = {id(p) for head in backbones.classifier(any_backbone) for p in head.parameters()}
    for name, parameter in net.named_parameters():
        ours = name.startswith("heads.") or id(parameter) in classifier or "base_layer" not in name
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.requires_grad <= ours


def test_exit_weights_buffer_not_saved() -> None:
    net = ExitNet(make_vit(), every=EVERY)
    assert torch.equal(net.exit_weights, torch.full((3,), 1 / 3))
    assert "exit_weights" in dict(net.named_buffers())
    assert "exit_weights" not in net.state_dict()
