"""What is chosen, against plain loops; intervals and the guarantee of a choice, by simulation; and where it is used."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_vit
from scipy import stats
from test_calibrate import COSTS, chosen, fake
from test_solve import planted

from dynadapter.calibrate import COMBINES, Goal, choosing, evaluate, solve
from dynadapter.calibrate.choosing import (
    SAFETY,
    Options,
    Samples,
    beliefs,
    candidates,
    cheapest,
    credits_of,
    most_accurate,
)
from dynadapter.calibrate.intervals import difference_interval, share_interval
from dynadapter.calibrate.report import thresholds
from dynadapter.exits.combining import decision, predicting, with_decision
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import AtExit, Confidence, Entropy, Margin, Never, Patience, Policy, read_off
from dynadapter.serve.export import policy_settings
from dynadapter.serve.runtime.policies import Policy as RuntimePolicy
from dynadapter.serve.stream import Stream
from dynadapter.spec import plain, restore
from dynadapter.training.callbacks.early_exit import EarlyExit

HEAT = (1.5, 0.8, 1.2)
DECISIONS = [
    Confidence(0.5),
    Confidence((0.6, 0.4)),
    Entropy(0.6),
    Margin(0.3),
    Patience(2),
    AtExit(1),
    AtExit(2),
    Never(),
]


def settings() -> list[Policy]:
    """Every kind of setting that can be chosen."""
    return [with_decision(predicting(by, heat), one) for by in COMBINES for heat in (None, HEAT) for one in DECISIONS]


@pytest.fixture(scope="module")
def network() -> tuple[ExitNet, torch.Tensor, torch.Tensor]:
    """A network with three exits, images, and the logits of all exits."""
    net = ExitNet(make_vit(), LinearHeads(), every=2).eval()
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for head in net.heads:
            head.classify.weight.mul_(20)  # so that some images are sure, and others are not
        return net, images, net(images)


@pytest.mark.parametrize("policy", settings(), ids=lambda policy: policy.name)
def test_setting_is_the_same_everywhere(policy, network):
    net, images, logits = network
    expected = read_off(policy, logits)
    with torch.no_grad():
        routed = net.early(images, policy)
    assert routed.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(routed.logits, expected.logits, rtol=1e-3, atol=1e-4)
    stream = Stream(net, policy, batch=4, wait=9)
    for image in images:
        stream.push(image[None])
    answers = stream.flush()
    assert [answer.exit_index for answer in answers] == expected.exit_index.tolist()
    torch.testing.assert_close(torch.stack([a.logits for a in answers]), expected.logits, rtol=1e-3, atol=1e-4)
    # calibration.json, bundle and checkpoint
    assert restore(json.loads(json.dumps(plain(policy))), Policy) == policy
    # the exported runtime, in numpy
    runtime = RuntimePolicy(*json.loads(json.dumps(policy_settings(policy, 3)))[:1], 3, policy_settings(policy, 3)[1])
    assert runtime.route(logits.numpy()).tolist() == expected.exit_index.tolist()
    taken = runtime.combine(logits.numpy())[expected.exit_index, np.arange(9)]
    np.testing.assert_allclose(taken, expected.logits, rtol=1e-3, atol=1e-4)
    # tables, and validation and test of a training
    assert len(thresholds(policy, 3)) == 3
    assert EarlyExit([policy]).policies == [policy]
    targets = expected.logits.argmax(-1)
    assert evaluate(policy, logits, targets, COSTS).accuracy == 1


def by_loop(data: Samples, goal: Goal) -> tuple[list[float], list[float]]:
    """Accuracy (by beliefs) and cost of every candidate, sample by sample, from read_off() alone."""
    tried = candidates(data, goal)
    belief = beliefs(data, data.temperatures(goal))
    accuracies, costs = [], []
    for one in tried.settings:
        routed = read_off(one.data.complete(one.policy), data.logits)
        rows = zip(routed.logits.argmax(-1).tolist(), routed.exit_index.tolist(), strict=True)
        both = [(belief[i, c].item(), data.costs[k] / 104) for i, (c, k) in enumerate(rows)]
        accuracies.append(sum(a for a, _ in both) / len(both))
        costs.append(sum(c for _, c in both) / len(both))
    return accuracies, costs


@pytest.mark.parametrize("goal", [Goal(cost=0.7), Goal(accuracy_drop=2.0)], ids=str)
def test_candidates_are_what_routing_does(goal):
    logits, targets = fake(60, exits=3, classes=4)
    data = Samples(logits, targets, COSTS)
    tried, (accuracies, costs) = candidates(data, goal), by_loop(data, goal)
    assert tried.credit.mean(1).tolist() == pytest.approx(accuracies)
    assert tried.cost.mean(1).tolist() == pytest.approx(costs)
    assert {(one.by, one.search) for one in tried.settings} == {
        (by, search) for by in COMBINES for search in ("one_exit", "thresholds")
    }
    if goal.name == "cost":
        assert max(costs) <= 0.7 + 1e-9
        assert accuracies[most_accurate(tried)] == pytest.approx(max(accuracies))
    else:
        drops = (tried.compared - tried.credit).numpy()
        worst = drops.mean(1) + SAFETY * drops.std(1) / 60**0.5
        best = cheapest(tried, goal)
        assert worst[best] <= 0.02 + 1e-9
        fits = [costs[i] for i in range(len(costs)) if worst[i] <= 0.02 + 1e-9]
        assert costs[best] <= min(fits) + 0.05


def test_beliefs_are_labels_and_predictions():
    logits, targets = fake(50, exits=3, classes=4)
    logits[2, 7] = math.nan
    belief = beliefs(Samples(logits, targets, COSTS), None)
    assert belief.sum(1).tolist() == pytest.approx([1.0] * 50)
    assert belief[7].tolist() == torch.nn.functional.one_hot(targets[7], 4).tolist()
    assert (belief.gather(1, targets[:, None]) >= 50 / 250 - 1e-9).all()
    assert credits_of(belief, torch.tensor([[-1] * 50])).sum() == 0


def test_all_at_one_exit_is_chosen_where_best(monkeypatch):
    """Exit 2 is always right, exits 1 and 3 seldom: nothing with a threshold comes close."""
    monkeypatch.setattr(choosing, "PRIOR", 0)
    found = solve(*planted([0.4, 1.0, 0.4]), [25, 60, 100], Goal(accuracy_drop=-61.5), combines=("own",))
    assert decision(found.found.policy) == AtExit(2)
    assert found.calibration.accuracy == 1
    assert found.calibration.shares == (0, 1, 0)


def test_reference_moves_the_goal():
    logits, targets = fake(400, exits=3)
    perfect, drop = targets.clone(), Goal(accuracy_drop=1.0, reference="static.ckpt")
    with pytest.raises(ValueError, match="cannot be reached"):
        solve(logits, targets, COSTS, drop, reference=perfect)
    poor = solve(logits, targets, COSTS, drop, reference=(targets + 1) % 10)
    assert poor.cross_fitted.accuracy_reference == 0
    assert poor.cross_fitted.shares[0] == 1
    assert poor.cross_fitted.difference_interval.low > 0.2
    with pytest.raises(ValueError, match="one class for each of 400"):
        solve(logits, targets, COSTS, drop, reference=perfect[:3])
    assert str(drop) == "accuracy at most 1 points below static.ckpt"


def test_intervals_are_scipys_and_cover():
    wilson = stats.binomtest(150, 200).proportion_ci(0.95, method="wilson")
    assert share_interval(150, 200) == pytest.approx((wilson.low, wilson.high))
    g, covered = np.random.default_rng(0), 0
    for gained, lost in g.multinomial(200, [0.06, 0.04, 0.9], size=4000)[:, :2]:
        low, high = difference_interval(int(gained), int(lost), 200)
        covered += low <= 0.02 <= high
    assert 0.94 <= covered / 4000 <= 0.975


def test_options_narrow_the_choice():
    logits, targets = fake(100, exits=3)
    for by in COMBINES:
        policy = chosen(logits, targets, COSTS, Goal(cost=0.7), combines=(by,), searches=("one_exit",)).policy
        assert isinstance(policy, type(predicting(by, HEAT))) or by == "own"
    assert Options().combines == COMBINES
