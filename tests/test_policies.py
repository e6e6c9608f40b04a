"""Policies against hand formulas and a per-sample loop."""

import inspect
import io
import math

import pytest
import torch
from conftest import raises_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from dynadapter.exits import policies
from dynadapter.exits.policies import (
    AtExit,
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
from dynadapter.exits.temperature import Scaled

KINDS = [Confidence(), Entropy(), Margin(), Patience(), Never(), AtExit(2), Confidence((0.9, 0.5, 0.7))]
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("policy", [*KINDS, Scaled(Never(), 2.0), Scaled(Patience(), 2.0)])
def test_never_exits_nobody(policy):
    assert policy.uses_early_exits == ("never" not in policy.name)
    for scale in (0.0, 1.0, 1e3):  # no class is sure, some are, one is
        logits = scale * torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
        left = torch.stack([policy.should_exit(logits[: k + 1]) for k in range(3)])
        assert policy.uses_early_exits or not left.any()


def should_exit(policy: Policy, history: list[list[float]]) -> bool:
    """Decide for a single sample, in plain Python and double precision."""
    last, k = history[-1], len(history) - 1
    if not all(math.isfinite(x) for x in last):
        return False
    p = sorted((math.exp(x - max(last)) for x in last), reverse=True)
    p = [x / sum(p) for x in p]
    threshold = getattr(policy, "threshold", None)
    if isinstance(threshold, tuple):
        threshold = threshold[k]
    if isinstance(policy, Confidence):
        return p[0] >= threshold
    if isinstance(policy, Margin):
        return p[0] - p[1] >= threshold
    if isinstance(policy, Entropy):
        return -sum(x * math.log(x) for x in p if x) / math.log(len(p)) <= threshold
    if isinstance(policy, AtExit):
        return len(history) >= policy.exit
    if isinstance(policy, Patience):
        recent = history[-policy.patience :]
        finite = all(math.isfinite(x) for row in recent for x in row)
        return len(history) >= policy.patience and finite and len({row.index(max(row)) for row in recent}) == 1
    return False


def routed(policy: Policy, logits: Tensor) -> list[int]:
    exits, samples, _ = logits.shape
    rows = logits.double().tolist()
    return [
        next((k for k in range(exits - 1) if should_exit(policy, [rows[j][i] for j in range(k + 1)])), exits - 1)
        for i in range(samples)
    ]


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)  # the new name came with 4.49


def test_every_kind_is_tried_here() -> None:
    here = {kind for kind in vars(policies).values() if isinstance(kind, type) and issubclass(kind, Policy)}
    assert {type(kind) for kind in KINDS} == {kind for kind in here if not inspect.isabstract(kind)}


@given(
    seed=st.integers(0, 2**31),
    exits=st.integers(1, 5),
    samples=st.integers(0, 6),
    classes=st.integers(2, 6),
    bad=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 5), st.sampled_from(BAD)), max_size=4),
    thresholds=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    patience=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_route_equals_a_loop_over_samples(seed, exits, samples, classes, bad, thresholds, patience) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(exits, samples, classes, generator=generator, dtype=torch.float64)
    for k, i, c, value in bad:
        if k < exits and i < samples and c < classes:
            logits[k, i, c] = value
    one, many = thresholds[0], tuple(thresholds[: exits - 1])
    kinds: list[Policy] = [Patience(patience), Never()]
    kinds += [kind(threshold) for kind in (Confidence, Entropy, Margin) for threshold in (one, many)]
    for policy in kinds:
        taken = route(policy, logits)
        assert taken.dtype == torch.int64
        assert taken.tolist() == routed(policy, logits), policy


@pytest.mark.parametrize("policy", KINDS)
@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_logits_never_exit(policy: Policy, bad: float) -> None:
    certain = torch.tensor([40.0, 0.0, 0.0]).expand(3, 2, 3).clone()
    certain[:, 1, 2] = bad
    taken = route(policy, torch.cat([certain, certain[:1]]))
    assert taken[1] == 3
    assert taken[0] < 3 or isinstance(policy, Never)


def test_patience_nonfinite_exit() -> None:
    logits = torch.tensor([[9.0, 0.0], [math.nan, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])[:, None]
    assert route(Patience(2), logits).tolist() == [3]


def test_patience_counts_exits_that_agree() -> None:
    classes = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 2, 3, 4]])
    logits = torch.nn.functional.one_hot(classes.T, 5).float()
    assert route(Patience(1), logits).tolist() == [0, 0, 0, 0]
    assert route(Patience(2), logits).tolist() == [1, 2, 2, 4]
    assert route(Patience(4), logits).tolist() == [3, 4, 4, 4]
    assert route(Patience(9), logits).tolist() == [4, 4, 4, 4]


def test_scores_of_known_distributions() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(confidence(p.log()), torch.tensor([0.7, 1 / 3]))
    torch.testing.assert_close(margin(p.log()), torch.tensor([0.5, 0.0]))
    by_hand = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    torch.testing.assert_close(entropy(p.log()), torch.tensor([by_hand, 1.0]))


@pytest.mark.parametrize("score", [confidence, entropy, margin])
def test_scores_range_and_precision(score) -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        values = score(logits.to(dtype))
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((values >= 0) & (values <= 1)).all()
    torch.testing.assert_close(score(logits.bfloat16()), score(logits.bfloat16().float()), rtol=0, atol=0)
    assert score(torch.randn(3, 1)).tolist() == ([0, 0, 0] if score is entropy else [1, 1, 1])


def test_loosest_threshold_exits_all() -> None:
    logits = torch.zeros(3, 4, 5)  # the lowest possible confidence
    for policy in (Confidence(0), Margin(0), Entropy(1)):
        assert route(policy, logits).tolist() == [0] * 4
    assert route(Never(), logits).tolist() == [2] * 4


def test_a_static_network_has_one_exit_only() -> None:
    for policy in (Confidence(), Confidence(()), Patience(), Never()):
        assert route(policy, torch.randn(1, 3, 5)).tolist() == [0] * 3


@pytest.mark.parametrize(
    ("threshold", "exits", "message"),
    [
        ((0.9, 0.8), 4, "threshold has 2 values, this network has 3 early exits (4 exits); give one value or 3"),
        ((0.9,), 4, "threshold has 1 value, this network has 3 early exits (4 exits); give one value or 3"),
        ((0.9, 0.8), 2, "threshold has 2 values, this network has 1 early exit (2 exits); give one value or 1"),
    ],
)
@pytest.mark.parametrize("kind", [Confidence, Entropy, Margin])
def test_thresholds_of_the_wrong_number(kind, threshold, exits: int, message: str) -> None:
    for call in (lambda: kind(threshold).check(exits), lambda: route(kind(threshold), torch.zeros(exits, 2, 3))):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
            call()
        assert str(error.value) == message


@pytest.mark.parametrize("kind", [Confidence, Entropy, Margin])
@pytest.mark.parametrize("threshold", [1.5, -0.1, math.nan, math.inf, (0.5, 1.5), (0.5, math.nan)])
def test_threshold_out_of_range_message(kind, threshold) -> None:
    with raises_one_line(ValueError, match=r"is not in \[0, 1\].*use Never\(\)"):
        kind(threshold)


@pytest.mark.parametrize("threshold", ["0.9", None, True, ("a",)])
def test_thresholds_that_are_no_numbers(threshold) -> None:
    with pytest.raises(TypeError, match=r"must be a number in \[0, 1\]"):
        Confidence(threshold)


def test_patience_below_one() -> None:
    with pytest.raises(ValueError, match="patience=0 must be at least 1"):
        Patience(0)


def test_exits_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="exit=0 must be a whole number of at least 1"):
        AtExit(0)
    AtExit(2).check(3)
    with pytest.raises(
        ValueError, match=r"exit=3 is not an early exit of this network \(3 exits\); give 1 to 2, or Nev"
    ):
        AtExit(3).check(3)


def test_names_unique_and_safe() -> None:
    assert [kind.name for kind in KINDS] == [
        "confidence_0.9",
        "entropy_0.3",
        "margin_0.5",
        "patience_2",
        "never",
        "at_exit_2",
        "confidence_0.9_0.5_0.7",
    ]


def test_a_list_is_taken_as_a_tuple() -> None:
    assert Confidence([0.9, 1]) == Confidence((0.9, 1.0))  # type: ignore[arg-type]
    assert hash(Confidence([0.9, 1])) == hash(Confidence((0.9, 1.0)))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", KINDS)
def test_a_config_and_a_checkpoint_hold_it(policy: Policy) -> None:
    parser = ArgumentParser()
    parser.add_argument("--policy", type=Policy)
    arguments = [f"--policy={type(policy).__name__}"]
    for key, value in vars(policy).items():
        arguments.append(f"--policy.{key}={list(value) if isinstance(value, tuple) else value}")
    parsed = parser.parse_args(arguments)
    assert instantiate(parser, parsed).policy == policy

    file = io.BytesIO()
    torch.save({"policy": policy}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["policy"] == policy
