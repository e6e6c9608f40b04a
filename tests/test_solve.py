"""What is chosen, against plain loops; honest numbers by cross-fitting; intervals and guarantees, by simulation."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_vit
from scipy import stats
from test_calibrate import COSTS, GOALS, agrees, chosen, fake, lost
from written_folder import taken

from dynadapter.calibrate import COMBINES, Goal, choosing, evaluate, policy_for, solve, split_folds
from dynadapter.calibrate.choosing import (
    SAFETY,
    Options,
    Samples,
    beliefs,
    candidates,
    cheapest,
    choose,
    credits_of,
    most_accurate,
)
from dynadapter.calibrate.intervals import difference_interval, share_interval
from dynadapter.calibrate.report import measured_data, thresholds
from dynadapter.exits.combining import decision, predicting, with_decision
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import AtExit, Confidence, Entropy, Margin, Never, Patience, Policy, read_off
from dynadapter.exits.temperature import Scaled
from dynadapter.serve.export import policy_settings
from dynadapter.serve.runtime.policies import Policy as RuntimePolicy
from dynadapter.serve.stream import Stream
from dynadapter.spec import plain, restore
from dynadapter.training.callbacks.early_exit import EarlyExit


def planted(right: list[float], samples: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of two classes: exit k is right on this share of the samples, with random confidence."""
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(2, (samples,), generator=g)
    logits = torch.zeros(len(right), samples, 2)
    for k, share in enumerate(right):
        good = torch.rand(samples, generator=g) < share
        logits[k, torch.arange(samples), torch.where(good, targets, 1 - targets)] = 3 * torch.rand(samples, generator=g)
    return logits, targets


def test_cost_takes_the_most_accurate() -> None:
    """The strictest threshold within the budget costs 0.5 and is less accurate than all samples at exit 1."""
    logits, targets = planted([0.78, 0.6, 0.6])
    found = solve(logits, targets, [25, 60, 100], Goal(cost=0.5), with_temperatures=False)
    cheapest = evaluate(Confidence(0.0), logits, targets, [25, 60, 100])
    assert found.calibration.cost < 0.27
    assert found.calibration.accuracy >= cheapest.accuracy - 0.01
    assert found.cross_fitted.accuracy == pytest.approx(0.78, abs=0.03)
    # and it uses the budget where that is worth it
    logits, targets = planted([0.6, 0.6, 0.9])
    found = solve(logits, targets, [25, 60, 100], Goal(cost=0.5))
    assert 0.4 < found.calibration.cost <= 0.5


def test_ties_go_to_the_cheapest() -> None:
    logits, targets = planted([0.7], 200)
    found = solve(logits.expand(3, -1, -1), targets, COSTS, Goal(cost=0.9))
    assert found.calibration.shares == found.cross_fitted.shares == (1, 0, 0)


def test_note_if_no_image_exits_early() -> None:
    """Token merging can make the whole network cheaper than the budget."""
    logits, targets = planted([0.0, 1.0], 300)
    found = solve(logits, targets, [10, 45], Goal(cost=0.5), static=100)
    assert decision(found.found.policy) == Never()
    assert "no image exits early under this policy; each of them costs 45.0% of static" in found.notes
    assert not solve(*planted([0.95, 0.8], 300), [10, 45], Goal(cost=0.5), static=100).notes
    # whatever the goal; and a network of one exit has nothing to note
    assert any("no image" in note for note in solve(logits, targets, [10, 45], Goal(accuracy_drop=0.1)).notes)
    assert not solve(logits[-1:], targets, [45], Goal(cost=0.5), static=100).notes


@pytest.mark.parametrize("goal", [Goal(cost=0.6), Goal(accuracy_drop=1.0)], ids=str)
def test_cross_fitted_numbers_are_honest(goal: Goal) -> None:
    """On average over many draws they are those of the chosen policy on the population; in-sample ones are better."""
    population, answers = fake(20000, exits=3)
    g = torch.Generator().manual_seed(3)
    gaps, optimism = [], []
    for seed in range(12):
        i = torch.randint(len(answers), (60,), generator=g)
        found = solve(population[:, i], answers[i], COSTS, goal, static=100, seed=seed)
        truth = evaluate(found.found.policy, population, answers, COSTS, static=100).accuracy
        last = evaluate(Never(), population, answers, COSTS, static=100).accuracy
        shift = found.calibration.accuracy_last_exit - last  # how easy these samples are
        gaps.append(found.cross_fitted.accuracy - shift - truth)
        optimism.append(found.calibration.accuracy - shift - truth)
    tensor = torch.tensor(gaps)
    assert abs(tensor.mean()) < 3 * tensor.std() / math.sqrt(len(gaps)) + 0.004
    assert torch.tensor(optimism).mean() > tensor.mean()


@pytest.mark.parametrize("with_temperatures", [False, True])
def test_samples_are_measured_by_others(with_temperatures: bool) -> None:
    """By hand: each fold by the policy of the other nine."""
    logits, targets = fake(200, exits=3, classes=4)
    goal, right = Goal(accuracy_drop=2), 0
    found = solve(logits, targets, COSTS, goal, seed=4, with_temperatures=with_temperatures)
    index = torch.zeros(200, dtype=torch.int64)
    for fold in split_folds(200, 10, 4, targets):
        rest = torch.tensor([i for i in range(200) if i not in fold.tolist()])
        policy = chosen(logits[:, rest], targets[rest], COSTS, goal, temperatures=with_temperatures, seed=4).policy
        routed = read_off(policy, logits[:, fold])
        index[fold] = routed.exit_index
        right += int((routed.logits.argmax(-1) == targets[fold]).sum())
    assert found.cross_fitted.accuracy == right / 200
    assert found.cross_fitted.shares == tuple((index == k).double().mean().item() for k in range(3))


def test_risk_uses_all_images_without_temperatures() -> None:
    logits, targets = planted([0.9], 200)
    logits = logits.expand(3, -1, -1)  # all exits agree: no loss at all
    found = solve(logits, targets, COSTS, Goal(risk=0.02))
    assert found.calibration.shares == found.cross_fitted.shares == (1, 0, 0)
    assert found.found.samples == 200
    assert not isinstance(found.found.policy, Scaled)
    half = solve(logits, targets, COSTS, Goal(risk=0.02), with_temperatures=True, combines=("own",))
    assert half.calibration.shares == (0, 0, 1)
    assert "100 samples are too few, 114 are needed" in half.notes[0]
    assert "the temperatures were fitted on the other half" in half.protocol
    # patience by the exits' own logits reads no temperatures, so the certificate has all samples
    for combines, used in ((("own",), 200), (("own", "mean"), 100)):
        found = solve(logits, targets, COSTS, Goal(risk=0.1), kind=Patience, combines=combines, with_temperatures=True)
        assert found.found.samples == used
        assert ("fitted on the other half" in found.protocol) == (used == 100)
    # three ways of combining share the error: 169 samples with no loss certify 0.02 at 1 - 0.1 / 3
    few = solve(logits[:, :168], targets[:168], COSTS, Goal(risk=0.02))
    assert any("168 samples are too few, 169 are needed" in note for note in few.notes)


def test_risk_holds_at_its_confidence() -> None:
    """Draw 200 images many times: how often is the true risk of the certified policy above the limit?"""
    population, answers = fake(20000, exits=3)
    g, truth = torch.Generator().manual_seed(5), {Never(): 0.0}
    goal, draws, broken, costs = Goal(risk=0.08, confidence=0.8), 60, 0, 0.0
    for _ in range(draws):
        i = torch.randint(len(answers), (200,), generator=g)
        policy = policy_for(goal, population[:, i], answers[i], [1, 2, 3])
        if policy not in truth:
            truth[policy] = lost(policy, population, answers).mean().item()
        broken += truth[policy] > goal.amount
        costs += evaluate(policy, population[:, i], answers[i], [1, 2, 3]).cost / draws
    assert 0 < broken / draws <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / draws)
    assert costs < 0.95  # it saves compute


ODD = {
    "two samples": (fake(2, exits=3), {}),
    "three samples": (fake(3, exits=3), {}),
    "one class": ((fake(30, exits=3)[0], torch.zeros(30, dtype=torch.int64)), {}),
    "equal scores": ((torch.zeros(3, 30, 4), torch.arange(30) % 4), {}),
    "one exit": (fake(30, exits=1), {"costs": (104,)}),
    "seven of a class each": (fake(70, exits=3), {}),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("kind", [Confidence, Patience])
@pytest.mark.parametrize("goal", GOALS)
def test_odd_samples_give_valid_policies(case: str, kind: type, goal: str) -> None:
    (logits, targets), options = ODD[case]
    costs = options.get("costs", COSTS)
    amount = GOALS[goal] if goal != "cost" else min(1.0, costs[0] / 80)
    for fitted in (True, False):
        found = solve(logits, targets, costs, Goal(**{goal: amount}), kind=kind, static=104, with_temperatures=fitted)
        assert agrees(found.calibration, found.found.policy, logits, targets, costs, 104)
        assert found.cross_fitted.samples == len(targets)
        assert sum(found.cross_fitted.shares) == pytest.approx(1)
        if goal == "cost":
            assert found.calibration.cost <= amount


def test_few_and_nonfinite_samples_are_noted() -> None:
    logits, targets = fake(30, exits=3)
    logits[0, 0, 0], logits[2, 1, 1] = torch.nan, torch.inf
    found = solve(logits, targets, COSTS, Goal(cost=1.0), samples="images")
    assert found.nonfinite == 2
    assert any(note.startswith("30 images are too few") for note in found.notes)
    assert any("2 of all 30 images" in note for note in found.notes)
    logits[2, :, 0] = torch.nan
    with pytest.raises(ValueError, match="the last exit has finite logits for none of 30 images"):
        solve(logits, targets, COSTS, Goal(cost=1.0), samples="images")


def test_folds_that_miss_the_goal_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain that needs every sample: without one of them it is out of reach."""
    monkeypatch.setattr(choosing, "SAFETY", 0)
    monkeypatch.setattr(choosing, "PRIOR", 0)
    logits, targets = planted([1.0, 0.5], 20)
    gain = 100 * (logits[1].argmax(-1) != targets).double().mean().item()
    found = solve(logits, targets, [1, 2], Goal(accuracy_drop=-gain), with_temperatures=False)
    assert found.calibration.shares == (1, 0)
    assert any("folds cannot reach the goal" in note for note in found.notes)


# ---- candidates, intervals and where a choice is used


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
    assert taken(runtime, logits.numpy()).tolist() == expected.exit_index.tolist()
    answers = runtime.combine(logits.numpy())[expected.exit_index, np.arange(9)]
    np.testing.assert_allclose(answers, expected.logits, rtol=1e-3, atol=1e-4)
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


@pytest.mark.parametrize("amount", [1.0, 3.0, 6.0])
def test_reference_is_compared_by_labels(amount):
    """The network's own opinion must not decide between it and a better one: no policy is far below the goal."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        targets = torch.randint(10, (200,), generator=g)
        seen = torch.randn(5, 200, 10, generator=g) + torch.nn.functional.one_hot(targets, 10)
        posteriors = seen.cumsum(0)  # each exit sees one more piece of evidence, and the reference all five
        data = Samples(posteriors[:4], targets, [25, 50, 75, 100], reference=posteriors[4].argmax(-1))
        theirs = (data.reference == targets).double().mean()
        try:
            policy = choose(data, Goal(accuracy_drop=amount, reference="x")).found.policy
        except ValueError:
            continue
        ours = (read_off(policy, data.logits).logits.argmax(-1) == targets).double().mean()
        assert theirs - ours <= amount / 100 + 0.02


def test_intervals_are_scipys_and_cover():
    wilson = stats.binomtest(150, 200).proportion_ci(0.95, method="wilson")
    assert share_interval(150, 200) == pytest.approx((wilson.low, wilson.high))
    g, covered = np.random.default_rng(0), 0
    for won, missed in g.multinomial(200, [0.06, 0.04, 0.9], size=4000)[:, :2]:
        low, high = difference_interval(int(won), int(missed), 200)
        covered += low <= 0.02 <= high
    assert 0.94 <= covered / 4000 <= 0.975


def test_options_narrow_the_choice():
    logits, targets = fake(100, exits=3)
    for by in COMBINES:
        policy = chosen(logits, targets, COSTS, Goal(cost=0.7), combines=(by,), searches=("one_exit",)).policy
        assert isinstance(policy, type(predicting(by, HEAT))) or by == "own"
    assert Options().combines == COMBINES


def test_confidence_is_of_the_routed_samples():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 120, 4, generator=generator), torch.randint(4, (120,), generator=generator)
    solution = solve(logits, targets, [1.0, 2.0, 3.0], Goal(cost=0.6))
    sure = [row.softmax(0).max().item() for row in read_off(solution.found.policy, logits).logits]
    mean = sum(sure) / 120
    assert solution.calibration.confidence == pytest.approx(mean, abs=1e-6)
    deviation = (sum((value - mean) ** 2 for value in sure) / 120) ** 0.5
    assert solution.calibration.confidence_deviation == pytest.approx(deviation, abs=1e-6)
    stored = measured_data(solution, "val", "images")  # a server compares with the policy itself
    for name in ("shares", "confidence", "confidence_deviation"):
        assert stored[name] == plain(getattr(solution.calibration, name))
    assert stored["accuracy"] == solution.cross_fitted.accuracy
    assert 0.25 < stored["confidence"] < 1
