"""Choosing on all samples and measuring by cross-fitting: what is chosen, and that the numbers are honest."""

import math

import pytest
import torch
from test_calibrate import COSTS, GOALS, agrees, chosen, fake, lost

from dynadapter.calibrate import Goal, choosing, evaluate, policy_for, solve, split_folds
from dynadapter.exits.combining import decision
from dynadapter.exits.policies import Confidence, Never, Patience, read_off
from dynadapter.exits.temperature import Scaled


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
    # patience reads no temperatures, so the certificate has all samples
    assert solve(logits, targets, COSTS, Goal(risk=0.02), kind=Patience, with_temperatures=True).found.samples == 200
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
