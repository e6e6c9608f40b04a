"""Predictions that combine exits, against plain loops over samples and exits."""

import math

import pytest
import torch
from conftest import BACKBONES, make_vit
from torch import Tensor

from dynadapter.exits.combining import Combined
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import AtExit, Confidence, Entropy, Margin, Never, Patience, confidence, read_off, route
from dynadapter.exits.temperature import Scaled
from dynadapter.serve.stream import Stream
from dynadapter.spec import plain, restore

KINDS = ["mean", "geometric"]
POLICIES = [Confidence(0.5), Entropy(0.6), Margin(0.3), Patience(2), Never(), AtExit(2)]


def stacked(exits: int = 3, samples: int = 40, classes: int = 4) -> Tensor:
    return 2 * torch.randn(exits, samples, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_hand(logits: Tensor, by: str, exit: int, sample: int) -> list[float]:
    """Probabilities of a sample at an exit; exits with logits that are not finite are left out."""
    used = [k for k in range(exit + 1) if logits[k, sample].isfinite().all()]
    rows = {k: logits[k, sample].softmax(-1).tolist() for k in used}
    columns = range(logits.shape[-1])
    if by == "mean":
        values = [sum(rows[k][c] for k in used) / len(used) for c in columns]
    else:
        total = sum(k + 1 for k in used)
        values = [math.prod(rows[k][c] ** ((k + 1) / total) for k in used) for c in columns]
    return [value / sum(values) for value in values]


@pytest.mark.parametrize("by", KINDS)
def test_combination_by_hand(by):
    logits = stacked()
    logits[0, :5, 1] = torch.inf  # the first exit of five samples counts for nothing
    logits[1, 3] = torch.nan
    combined = Combined(by=by).combine(logits).softmax(-1)
    for k in range(3):
        for i in range(logits.shape[1]):
            if logits[k, i].isfinite().all():
                assert combined[k, i].tolist() == pytest.approx(by_hand(logits, by, k, i))
            else:
                assert not combined[k, i].isfinite().all()


@pytest.mark.parametrize("heat", [None, (2.0, 0.5, 1.0)], ids=["own", "temperatures"])
@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("inner", POLICIES, ids=lambda policy: policy.name)
def test_decides_and_predicts_by_combination(inner, by, heat):
    """Temperatures divide each exit's own logits before they are combined."""
    logits = stacked()
    logits[1, 3] = torch.nan
    policy = Combined(inner, by) if heat is None else Scaled(Combined(inner, by), heat)
    combined = Combined(inner, by).combine(logits / torch.tensor(heat or [1.0])[:, None, None])
    routed = read_off(policy, logits)
    assert routed.exit_index.tolist() == route(inner, combined).tolist() == route(policy, logits).tolist()
    rows = torch.arange(logits.shape[1])
    torch.testing.assert_close(routed.logits, combined[routed.exit_index, rows])


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_routing_equals_stacked_logits(kind, by):
    net = ExitNet(BACKBONES[kind](), LinearHeads(), every=2).eval()
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = net(images)
        scores = confidence(Combined(by=by).combine(logits))
        policy = Combined(Confidence(tuple(scores[:-1].quantile(0.6, 1).tolist())), by)
        expected, routed = read_off(policy, logits), net.early(images, policy)
    assert routed.exit_index.tolist() == expected.exit_index.tolist()
    assert len(expected.exit_index.unique()) > 1
    torch.testing.assert_close(routed.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_never_predicts_by_all_exits():
    net = ExitNet(make_vit(), LinearHeads(), every=2).eval()
    images, policy = torch.randn(4, 3, 32, 32), Combined(Never(), "mean")
    with torch.no_grad():
        expected = net(images).softmax(-1).mean(0)
        routed = net.early(images, policy)
    assert routed.exit_index.tolist() == [net.num_exits - 1] * 4
    torch.testing.assert_close(routed.logits.softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_stream_answers_by_combination():
    net = ExitNet(make_vit(), LinearHeads(), every=2).eval()
    images, stream = torch.randn(7, 3, 32, 32), Stream(net, Combined(Confidence(0.4)), batch=3, wait=9)
    for image in images:
        stream.push(image[None])
    with torch.no_grad():
        expected = read_off(stream.policy, net(images))
    answers = stream.flush()
    assert [answer.exit_index for answer in answers] == expected.exit_index.tolist()
    torch.testing.assert_close(
        torch.stack([answer.logits for answer in answers]), expected.logits, rtol=1e-4, atol=1e-5
    )


def test_survives_json():
    policy = Scaled(Combined(Confidence((0.5, 0.7)), "mean"), (1.0, 2.0, 1.5))
    assert restore(plain(policy), type(policy)) == policy


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Combined(by="median"), "by='median' is unknown; choose 'mean' or 'geometric'"),  # type: ignore[arg-type]
        (lambda: Combined(Combined()), "combine the exits once"),
        (lambda: Combined(Scaled()), "combine the exits once, after temperatures: Scaled\\(Combined"),
        (lambda: Combined(Confidence((0.1, 0.2))).check(2), "threshold has 2 values"),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(ValueError, match=message):
        build()
