"""Calibration against brute force over route(), and the coverage of the guarantee by simulation."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dynadapter.calibrate import (
    KINDS,
    Goal,
    Scaled,
    candidates,
    curve,
    curve_rows,
    evaluate,
    fit_temperatures,
    geometric_shares,
    losses,
    measured_risk,
    policy_for,
    solve,
    split_folds,
    to_accuracy_drop,
    to_cost,
    with_guarantee,
)
from dynadapter.calibrate.refine import Walk
from dynadapter.calibrate.report import solution_data, thresholds
from dynadapter.calibrate.scores import Scores
from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.policies import Confidence, Entropy, Margin, Never, Patience, Policy, confidence, route
from dynadapter.spec import restore

THRESHOLDED = [Confidence, Entropy, Margin]


def fake(samples, exits=4, classes=10, seed=0):
    """Logits whose later exits are more accurate, of samples of unequal difficulty."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=g)
    ease = 3 * torch.rand(samples, generator=g)
    logits = torch.randn(exits, samples, classes, generator=g)
    for k in range(exits):
        logits[k, torch.arange(samples), targets] += ease * (0.4 + 2.2 * (k + 1) / exits)
    return 1.5 * logits, targets


def by_hand(policy, logits, targets, costs, static=None):
    """Return cost, accuracy and shares of a policy, sample by sample, from route() alone."""
    exits, samples, _ = logits.shape
    taken = route(policy, logits).tolist()
    right = 0
    for i, k in enumerate(taken):
        row = logits[k, i]
        right += not row.isnan().any() and row.argmax().item() == targets[i].item()
    cost = math.fsum(costs[k] for k in taken) / (samples * (static or costs[-1]))
    return cost, right / samples, tuple(taken.count(k) / samples for k in range(exits))


def agrees(outcome, policy, logits, targets, costs, static=None):
    cost, accuracy, shares = by_hand(policy, logits, targets, costs, static)
    return (outcome.cost, outcome.accuracy, outcome.shares) == (pytest.approx(cost, rel=1e-12), accuracy, shares)


def brute_force(kind, logits, temperatures):
    """Return every policy with one shared threshold that can make a difference on these logits, and Never."""
    if kind is Patience:
        return [Never(), *(Patience(p) for p in range(1, len(logits) + 1))]
    scores = Scores(kind, Stacked(logits, None, range(1, len(logits) + 1), temperatures=temperatures))
    values = {scores.threshold(v) for v in scores.sure.unique().tolist() if v > -math.inf} | {0.0, 1.0}
    return [Never(), *(Scaled(kind(value), tuple(temperatures)) for value in sorted(values))]


@st.composite
def problems(draw):
    """Draw few samples with many ties, saturated scores, NaN and infinities; costs, temperatures and a kind."""
    exits, samples, classes = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    value = st.one_of(
        st.integers(-2, 2).map(float),
        st.floats(-3, 3, width=32),
        st.sampled_from([math.nan, math.inf, -math.inf, 200.0, -3e38]),
    )
    size = exits * samples * classes
    logits = torch.tensor(draw(st.lists(value, min_size=size, max_size=size))).view(exits, samples, classes)
    targets = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples)))
    steps = draw(st.lists(st.integers(1, 9), min_size=exits, max_size=exits))
    costs = torch.tensor(steps).cumsum(0).tolist()
    static = draw(st.sampled_from([None, costs[-1] * 0.75]))
    temperatures = draw(st.lists(st.sampled_from([1.0, 0.5, 2.7]), min_size=exits, max_size=exits))
    kind = draw(st.sampled_from(list(KINDS.values())))
    return logits, targets, costs, static, temperatures, kind


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(2, 12))
def test_curve_is_what_routing_does(problem, points):
    logits, targets, costs, static, temperatures, kind = problem
    found = curve(logits, targets, costs, kind, temperatures=temperatures, static=static, points=points)
    assert 1 <= len(found.routed) <= points
    assert all(a.cost < b.cost for a, b in pairwise(found.routed))
    for point in found.routed:
        assert agrees(point, point.policy, logits, targets, costs, static)
    everything = [
        by_hand(policy, logits, targets, costs, static)[0] for policy in brute_force(kind, logits, temperatures)
    ]
    assert found.routed[0].cost == pytest.approx(min(everything))
    assert found.routed[-1].cost == found.anytime[-1].cost == pytest.approx(max(everything))
    assert found.routed[-1].policy == found.anytime[-1].policy == Never()
    for k, point in enumerate(found.anytime):
        assert point.shares == tuple(float(k == j) for j in range(len(logits)))
        assert point.cost == pytest.approx(costs[k] / (static or costs[-1]))
        assert point.label == f"exit {k + 1}"


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.05, 1.4))
def test_to_cost_is_brute_force(problem, budget):
    logits, targets, costs, static, temperatures, kind = problem
    given = {"kind": kind, "temperatures": temperatures, "static": static}
    reached = [by_hand(policy, logits, targets, costs, static)[0] for policy in brute_force(kind, logits, temperatures)]
    if budget > max(1, costs[-1] / (static or costs[-1])):
        with pytest.raises(ValueError, match=r"at most .*: a fraction of static"):
            to_cost(logits, targets, costs, budget, **given)
        return
    if min(reached) > budget:
        with pytest.raises(ValueError, match=r"cannot be reached.*exit 1"):
            to_cost(logits, targets, costs, budget, **given)
        return
    found = to_cost(logits, targets, costs, budget, **given)
    assert agrees(found, found.policy, logits, targets, costs, static)
    assert found.cost == pytest.approx(max(cost for cost in reached if cost <= budget))
    assert found.cost <= budget
    if kind in THRESHOLDED:
        refined = to_cost(logits, targets, costs, budget, search="refined", **given)
        assert agrees(refined, refined.policy, logits, targets, costs, static)
        assert refined.cost <= budget
        assert refined.accuracy >= found.accuracy


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 5.0, 12.5, 50.0, 100.0, -10.0]))
def test_to_accuracy_drop_is_brute_force(problem, points):
    logits, targets, costs, static, temperatures, kind = problem
    given = {"kind": kind, "temperatures": temperatures, "static": static}
    tried = [by_hand(policy, logits, targets, costs, static) for policy in brute_force(kind, logits, temperatures)]
    good = [cost for cost, accuracy, _ in tried if accuracy >= tried[0][1] - points / 100 - 1e-9]
    if not good:
        with pytest.raises(ValueError, match=r"cannot be reached.*above the last exit"):
            to_accuracy_drop(logits, targets, costs, points, **given)
        return
    found = to_accuracy_drop(logits, targets, costs, points, **given)
    assert agrees(found, found.policy, logits, targets, costs, static)
    assert found.cost == pytest.approx(min(good))
    assert found.accuracy >= tried[0][1] - points / 100 - 1e-9
    if kind in THRESHOLDED:
        refined = to_accuracy_drop(logits, targets, costs, points, search="refined", **given)
        assert agrees(refined, refined.policy, logits, targets, costs, static)
        assert refined.accuracy >= tried[0][1] - points / 100 - 1e-9
        assert refined.cost <= found.cost


@settings(max_examples=50, deadline=None)
@given(problems(), st.floats(0.05, 1.4))
def test_geometric_shares_are_within_budget(problem, budget):
    logits, targets, costs, static, temperatures, kind = problem
    if kind is Patience:
        with pytest.raises(ValueError, match="no thresholds"):
            geometric_shares(logits, targets, costs, budget, kind=kind)
        return
    try:
        found = geometric_shares(logits, targets, costs, budget, kind=kind, temperatures=temperatures, static=static)
    except ValueError as error:
        assert "cannot be reached" in str(error) or "a fraction of static" in str(error)  # noqa: PT017
        return
    assert agrees(found, found.policy, logits, targets, costs, static)
    assert found.cost <= budget


@pytest.mark.parametrize("kind", THRESHOLDED)
@pytest.mark.parametrize("q", [0.3, 1.0, 2.5])
def test_walk_is_msdnets(kind, q):
    """A per-sample loop over sorted scores, as MSDNet describes it."""
    logits, targets = fake(203)
    scores = Scores(kind, Stacked(logits, targets, [1, 2, 3, 4]))
    parts = [Fraction(q) ** k for k in range(4)]
    taken: dict[int, int] = {}
    for k in range(3):
        count = 0
        for i in scores.sure[k].sort(descending=True).indices.tolist():
            if i not in taken and count < math.floor(203 * parts[k] / sum(parts)):
                taken[i] = k
                count += 1
    assert scores.exit_index(Walk(scores).cuts(math.log(q))).tolist() == [taken.get(i, 3) for i in range(203)]


def test_geometric_shares_use_the_budget():
    logits, targets = fake(2000)
    for budget in (0.26, 0.4, 0.7, 0.95, 1.0):
        found = geometric_shares(logits, targets, [1, 2, 3, 4], budget)
        assert budget - 0.003 < found.cost <= budget
    shares = torch.tensor(geometric_shares(logits, targets, [1, 2, 3, 4], 0.5).shares)
    assert torch.allclose(shares[1:] / shares[:-1], shares[1:2] / shares[:1], rtol=0.02)  # p_k ~ q^k


def test_policy_includes_temperatures():
    logits, targets = fake(500)
    logits = logits * torch.tensor([4.0, 2.0, 1.0, 1.0]).view(4, 1, 1)
    temperatures = fit_temperatures(logits, targets)
    found = to_cost(logits, targets, [1, 2, 3, 4], 0.5, temperatures=torch.tensor(temperatures, dtype=torch.float64))
    assert isinstance(found.policy, Scaled)
    assert found.policy.temperatures == found.temperatures == temperatures
    assert found.accuracy == evaluate(found.policy, logits, targets, [1, 2, 3, 4]).accuracy
    assert isinstance(to_cost(logits, targets, [1, 2, 3, 4], 0.5).policy, Confidence)
    patient = to_cost(logits, targets, [1, 2, 3, 4], 0.9, kind=Patience, temperatures=temperatures)
    assert isinstance(patient.policy, Patience)


def test_refined_beats_shared_threshold():
    logits, targets = fake(4000)
    logits[0] *= 4  # the first exit is far too confident
    costs = [1, 2, 3, 4]
    shared = to_cost(logits, targets, costs, 0.6)
    refined = to_cost(logits, targets, costs, 0.6, search="refined")
    assert refined.accuracy > shared.accuracy + 0.02
    assert refined.accuracy >= geometric_shares(logits, targets, costs, 0.6).accuracy
    cheap = to_accuracy_drop(logits, targets, costs, 1.0, search="refined")
    assert cheap.cost < to_accuracy_drop(logits, targets, costs, 1.0).cost - 0.02
    for found in (refined, cheap):  # the result also holds on other samples
        fresh, answers = fake(4000, seed=1)
        fresh[0] *= 4
        assert evaluate(found.policy, fresh, answers, costs).accuracy > found.accuracy - 0.02


def test_last_bit_changes_no_exit():
    """Scores that differ in the last bit, as on another machine, take the same exits."""
    logits, targets = fake(300)
    for kind in THRESHOLDED:
        for found in (
            to_cost(logits, targets, [1, 2, 3, 4], 0.5, kind=kind),
            geometric_shares(logits, targets, [1, 2, 3, 4], 0.5, kind=kind),
            to_accuracy_drop(logits, targets, [1, 2, 3, 4], 1.0, kind=kind, search="refined"),
        ):
            taken = route(found.policy, logits)
            assert torch.equal(taken, route(found.policy, logits * (1 + 1e-7)))
            assert torch.equal(taken, route(found.policy, logits * (1 - 1e-7)))


def test_nonfinite_logits_take_the_last_exit():
    logits, targets = fake(40)
    logits[:-1, :10] = math.nan
    for kind in KINDS.values():
        found = to_cost(logits, targets, [1, 2, 3, 4], 0.5, kind=kind)
        assert found.shares[-1] >= 0.25
        assert "10 of 40 samples" in found.notes[0]
    with pytest.raises(ValueError, match=r"10, whose logits there are not finite.*0\.4375 of static"):
        to_cost(logits, targets, [1, 2, 3, 4], 0.3)
    nothing = torch.full((4, 5, 3), math.nan)
    labels = torch.zeros(5, dtype=torch.int64)
    for kind in KINDS.values():
        found = to_cost(nothing, labels, [1, 2, 3, 4], 1.0, kind=kind)
        assert (found.shares, found.accuracy, found.cost) == ((0, 0, 0, 1), 0.0, 1.0)
        assert len(curve(nothing, labels, [1, 2, 3, 4], kind).routed) == 1
    assert with_guarantee(nothing, labels, [1, 2, 3, 4]).shares == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="the average cost is 1 of"):
        to_cost(nothing, labels, [1, 2, 3, 4], 0.5)


def test_lowest_named_budget_is_reachable():
    logits, targets = fake(77)
    costs = [4.476, 8.838, 13.2, 17.583]
    with pytest.raises(ValueError, match=r"is 0\.2546 of static") as caught:
        to_cost(logits, targets, costs, 0.1)
    assert "\n" not in str(caught.value)
    assert to_cost(logits, targets, costs, 0.2546).shares[0] == 1
    assert to_cost(logits, targets, costs, costs[0] / costs[-1]).shares[0] == 1
    assert to_cost(logits, targets, costs, 1.0).policy == Never()


def test_best_named_gain_is_reachable():
    logits, targets = fake(90)
    logits[-1] = logits[-1].roll(1, -1)  # the last exit is mostly wrong
    with pytest.raises(ValueError, match="give at least") as caught:
        to_accuracy_drop(logits, targets, [1, 2, 3, 4], -100)
    points = float(str(caught.value).rsplit(" ", 1)[1])
    assert points < -10
    found = to_accuracy_drop(logits, targets, [1, 2, 3, 4], points)
    assert found.accuracy >= evaluate(Never(), logits, targets, [1, 2, 3, 4]).accuracy - points / 100 - 1e-9


# ---- the guarantee


def test_losses_by_definition():
    logits, targets = fake(400)
    policy = Confidence(0.5)
    taken = route(policy, logits)
    routed = logits[taken, torch.arange(400)].argmax(-1)
    last = logits[-1].argmax(-1)
    lost, gap, inconsistency = (
        losses(policy, logits, targets, loss) for loss in ("lost", "accuracy_gap", "inconsistency")
    )
    assert torch.equal(lost, ((last == targets) & (routed != targets)).double())
    assert torch.equal(inconsistency, (routed != last).double())
    drop = evaluate(Never(), logits, targets, [1, 2, 3, 4]).accuracy
    drop -= evaluate(policy, logits, targets, [1, 2, 3, 4]).accuracy
    assert gap.mean().item() == pytest.approx(drop)
    assert (gap <= lost).all()
    assert (lost <= inconsistency).all()
    assert torch.equal(losses(policy, logits, None, "inconsistency"), inconsistency)


@pytest.mark.parametrize(
    ("loss", "bound"),
    [("lost", None), ("lost", "hoeffding_bentkus"), ("accuracy_gap", None), ("inconsistency", "betting")],
)
def test_guarantee_holds_at_its_confidence(loss, bound):
    """Calibrate on many draws of a known population and count how often the true risk exceeds the limit."""
    population, answers = fake(20000, exits=3)
    risk, level, draws, samples = 0.05, 0.8, 250, 250
    tried = [Confidence(t.item()) for t in torch.linspace(2.5, -0.5, 31, dtype=torch.float64).sigmoid()]
    table = torch.stack([losses(policy, population, answers, loss) for policy in tried])
    truth = dict(zip(tried, table.mean(-1).tolist(), strict=True)) | {Never(): 0.0}
    assert min(truth.values()) < risk < max(truth.values())  # otherwise nothing is tested

    g = torch.Generator().manual_seed(5)
    broken, careless, costs = 0, 0, []
    for _ in range(draws):
        i = torch.randint(len(answers), (samples,), generator=g)
        found = with_guarantee(
            population[:, i], answers[i], [1, 2, 3], risk, level, loss=loss, bound=bound, policies=tried
        )
        broken += truth[found.policy] > risk
        costs.append(found.cost)
        fine = table[:, i].mean(-1) <= risk  # trusts the mean on the samples
        careless += truth[tried[int(fine.nonzero().max())]] > risk
    error = 3 * math.sqrt(level * (1 - level) / draws)
    assert broken / draws <= 1 - level + error
    assert sum(costs) / draws < 0.95  # it saves compute
    assert careless / draws > 1 - level + error  # the count detects a method without the guarantee


@pytest.mark.parametrize("kind", KINDS.values())
def test_guarantee_is_a_fixed_sequence_test(kind):
    logits, targets = fake(1500)
    temperatures = (2.0, 1.5, 1.0, 1.0)
    found = with_guarantee(logits, targets, [1, 2, 3, 4], 0.05, 0.9, kind=kind, temperatures=temperatures)
    lost = [
        int(losses(policy if kind is Patience else Scaled(policy, temperatures), logits, targets).sum())
        for policy in candidates(kind, 4)
    ]
    most = max(n for n in range(75) if stats.binom.cdf(n, 1500, 0.05) <= 0.1)
    run = next((i for i, n in enumerate(lost) if n > most), len(lost))
    chosen = candidates(kind, 4)[run - 1]
    assert found.policy == (chosen if kind is Patience else Scaled(chosen, temperatures))
    assert found.risk == lost[run - 1] / 1500
    assert found.cost == evaluate(found.policy, logits, targets, [1, 2, 3, 4]).cost < 1
    assert "probability at least 0.9" in found.notes[0]


def test_too_few_samples_take_the_last_exit():
    logits, targets = fake(113)
    logits[:] = logits[-1]  # all exits agree: no loss at all
    found = with_guarantee(logits, targets, [1, 2, 3, 4], 0.02, 0.9)
    assert found.policy == Never()
    assert (found.cost, found.risk) == (1.0, 0.0)
    assert "113 samples are too few, 114 are needed" in found.notes[0]
    more = torch.cat([logits, logits[:, :1]], 1)
    labels = torch.cat([targets, targets[:1]])
    found = with_guarantee(more, labels, [1, 2, 3, 4], 0.02, 0.9)
    assert (found.shares[0], found.notes[0][:16]) == (1.0, "with probability")
    # Without targets, and with a policy that fails its test.
    found = with_guarantee(more, None, [1, 2, 3, 4], 0.02, 0.9, loss="inconsistency")
    assert found.shares[0] == 1
    assert math.isnan(found.accuracy)
    wild = more.clone()
    wild[0] = wild[0].roll(1, -1)
    found = with_guarantee(wild, labels, [1, 2, 3, 4], 0.02, 0.9, policies=[Confidence(0.0)])
    assert found.policy == Never()
    assert "too few" not in found.notes[0]
    assert with_guarantee(more, labels, [1, 2, 3, 4], policies=[]).policy == Never()


def test_guarantee_of_given_policies():
    logits, targets = fake(3000)
    costs = [1, 2, 3, 4]
    temperatures = fit_temperatures(logits[:, :1000], targets[:1000])
    tested = []
    for budget in (0.9, 0.8, 0.7, 0.6, 0.5):
        policy = to_cost(
            logits[:, :1000], targets[:1000], costs, budget, search="refined", temperatures=temperatures
        ).policy
        tested.append(policy.policy if isinstance(policy, Scaled) else policy)
    found = with_guarantee(logits[:, 1000:], targets[1000:], costs, 0.05, policies=tested, temperatures=temperatures)
    assert found.policy in [Scaled(policy, temperatures) for policy in tested]
    mean, upper = measured_risk(found.policy, logits[:, 1000:], targets[1000:])
    assert mean == found.risk
    assert mean < upper <= 0.05


def test_measured_risk_of_the_accuracy_gap():
    logits, targets = fake(1000)
    mean, upper = measured_risk(Confidence(0.6), logits, targets, loss="accuracy_gap", confidence=0.95)
    assert mean == pytest.approx(losses(Confidence(0.6), logits, targets, "accuracy_gap").mean().item())
    assert mean < upper < mean + 0.06


def test_candidates_run_from_strict_to_lax():
    logits, _ = fake(500)
    for kind in KINDS.values():
        shares = [(route(policy, logits) == 3).double().mean().item() for policy in candidates(kind, 4)]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0
    assert [len(candidates(kind, 4)) for kind in KINDS.values()] == [203, 203, 203, 3]


# ---- one goal solved


GOALS = {"cost": 0.7, "accuracy_drop": 3.0, "risk": 0.1}
COSTS = (40, 70, 104)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("goal", GOALS)
def test_solve_reaches_every_goal(kind, goal):
    logits, targets = fake(400, exits=3, classes=4)
    found = solve(logits, targets, COSTS, Goal(**{goal: GOALS[goal]}), kind=kind, static=100)
    one = found.calibration
    drop = 100 * (one.accuracy_last_exit - one.accuracy)
    assert {"cost": one.cost, "accuracy_drop": drop, "risk": one.lost}[goal] <= GOALS[goal] + 1e-9
    assert one.samples == found.cross_fitted.samples == 400
    assert agrees(one, found.found.policy, logits, targets, COSTS, 100)
    by_exit = thresholds(found.found.policy, 3)
    assert len(by_exit) == 3
    assert by_exit[-1] is None
    written = solution_data(found)
    assert restore(written["policy"], Policy) == found.found.policy
    assert written["cross_fitted"]["shares"] == list(found.cross_fitted.shares)
    rows = curve_rows(found.curve)
    assert rows[0] == ["policy", "threshold", "cost", "accuracy", "share_exit1", "share_exit2", "share_exit3"]
    assert [row[0] for row in rows[-3:]] == ["exit 1", "exit 2", "exit 3"]
    if kind is Confidence:
        assert policy_for(Goal(**{goal: GOALS[goal]}), logits, targets, COSTS, 100) == found.found.policy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "there is no goal; give one of goal.cost"),
        ({"cost": 0.5, "risk": 0.1}, "goal.cost and goal.risk are 2 goals"),
        ({"cost": 0.0}, "goal.cost=0.0 must be above 0"),
        ({"cost": -1.0}, "goal.cost=-1.0 must be above 0"),
        ({"cost": 50.0}, "goal.cost=50.0 must be above 0 and at most 1: a fraction of static, e.g. 0.5 for 50 %"),
        ({"cost": math.inf}, "goal.cost=inf must be above 0"),
        ({"cost": math.nan}, "goal.cost=nan must be above 0"),
        ({"accuracy_drop": math.nan}, "goal.accuracy_drop=nan must be percentage points"),
        ({"risk": 2.0}, "goal.risk=2.0 must be between 0 and 1"),
        ({"risk": 0.0}, "goal.risk=0.0 must be between 0 and 1"),
        ({"risk": math.nan}, "goal.risk=nan must be between 0 and 1"),
        ({"accuracy_drop": 101.0}, "goal.accuracy_drop=101.0 must be percentage points between -100 and 100"),
        ({"risk": 1.0}, "goal.risk=1.0 must be between 0 and 1"),
        ({"risk": 0.1, "confidence": math.nan}, "goal.confidence=nan must be between 0 and 1"),
        ({"cost": 0.5, "confidence": 0.9}, "goal.confidence belongs to goal.risk"),
    ],
)
def test_invalid_goal_raises(given, words):
    with pytest.raises(ValueError, match=words):
        Goal(**given)


@pytest.mark.parametrize(
    ("goal", "words"),
    [(Goal(cost=0.01), "goal.cost=0.01 cannot"), (Goal(accuracy_drop=-99), "goal.accuracy_drop=-99 cannot")],
)
def test_solve_unreachable_goal_raises(goal, words):
    with pytest.raises(ValueError, match=f"{words} be reached"):
        solve(*fake(100, exits=3), COSTS, goal)


# ---- halves, evaluate, bad input


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(2, 10), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_split_folds_properties(samples, folds, classes, seed, stratified):
    folds = min(folds, samples)
    targets = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    state = torch.get_rng_state()
    split = split_folds(samples, folds, seed, targets if stratified else None)
    assert torch.equal(state, torch.get_rng_state())
    assert len(split) == folds
    assert sorted(torch.cat(split).tolist()) == list(range(samples))
    sizes = [len(fold) for fold in split]
    assert max(sizes) - min(sizes) <= 1
    if stratified:
        counts = torch.stack([targets[fold].bincount(minlength=classes) for fold in split])
        assert (counts.amax(0) - counts.amin(0)).max() <= 1
    again = split_folds(samples, folds, seed, targets if stratified else None)
    assert all(map(torch.equal, split, again))


def test_split_folds_depend_on_the_seed():
    assert not torch.equal(split_folds(50, seed=0)[0], split_folds(50, seed=1)[0])


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([Confidence(0.7), Entropy(0.4), Margin(0.1), Patience(2), Never()]))
def test_evaluate_is_route(problem, policy):
    logits, targets, costs, static, temperatures, _ = problem
    for tried in (policy, Scaled(policy, tuple(temperatures))):
        assert agrees(evaluate(tried, logits, targets, costs, static=static), tried, logits, targets, costs, static)


def test_costs_are_exact():
    logits, targets = fake(7)
    assert evaluate(Never(), logits, targets, [4.4, 8.8, 13.3, 17.6]).cost == 1.0
    macs = torch.tensor([4_476_000_001, 8_838_000_003, 13_200_000_005, 17_583_000_007])
    assert evaluate(Patience(1), logits, targets, macs).cost == macs[0].item() / macs[-1].item()
    assert evaluate(Never(), logits, targets, macs, static=macs[-1].item() // 2).cost > 2


def test_single_exit_takes_every_goal():
    logits, targets = fake(9, exits=1)
    for kind in KINDS.values():
        assert to_cost(logits, targets, [5], 1.0, kind=kind).policy == Never()
        assert to_accuracy_drop(logits, targets, [5], 0.0, kind=kind).cost == 1
        assert [point.label for point in curve(logits, targets, [5], kind).routed] == ["exit 1"]
    assert to_cost(logits, targets, [5], 1.0, search="refined").cost == 1


def test_wrong_number_of_thresholds_raises():
    logits, targets = fake(9)
    with pytest.raises(ValueError, match="2 values"):
        evaluate(Confidence((0.1, 0.2)), logits, targets, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="2 values"):
        with_guarantee(logits, targets, [1, 2, 3, 4], policies=[Confidence((0.1, 0.2))])


LOGITS, TARGETS = fake(12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3], 0.5), "costs has 3 values"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 3, 3, 4], 0.5), "rise from exit to exit"),
        (lambda: to_cost(LOGITS, TARGETS, [0, 1, 2, 3], 0.5), "above 0"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, math.nan], 0.5), "rise"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], 0.5, static=0), "static=0"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], math.nan), "budget=nan"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], -1), "budget=-1"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], 0.5, kind=Never), "kind=Never cannot be calibrated"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], 0.5, search="hard"), "'shared' or 'refined'"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], 0.5, kind=Patience, search="refined"), "no thresholds"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], 0.5, temperatures=[1, 2]), "2 values, this network has 4"),
        (lambda: to_cost(LOGITS[:, :0], TARGETS[:0], [1, 2, 3, 4], 0.5), "at least one"),
        (lambda: to_accuracy_drop(LOGITS, TARGETS, [1, 2, 3, 4], math.nan), "points=nan"),
        (lambda: curve(LOGITS, TARGETS, [1, 2, 3, 4], points=1), "points=1"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], risk=0), "risk=0"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], confidence=90), "confidence=90"),
        (lambda: with_guarantee(LOGITS, None, [1, 2, 3, 4]), "use 'inconsistency'"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], loss="zero"), "loss='zero'"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], bound="none"), "choose one of"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], kind=Policy), "kind=Policy"),
        (lambda: split_folds(1), "samples=1"),
        (lambda: split_folds(3, 4), "folds=4"),
        (lambda: split_folds(4, targets=TARGETS), r"give \(4,\)"),
        (lambda: to_cost(LOGITS, TARGETS, [1, 2, 3, 4], 50), "budget=50 must be above 0 and at most 1: a fraction"),
        (lambda: geometric_shares(LOGITS, TARGETS, [1, 2, 3, 4], 50, static=3.2), "at most 1.25: a fraction of static"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_scores_keep_the_logits_dtype():
    logits, targets = fake(200)
    for dtype in (torch.float64, torch.bfloat16):
        found = to_cost(logits.to(dtype), targets, [1, 2, 3, 4], 0.5, temperatures=(1.3, 1.1, 1.0, 1.0))
        assert agrees(found, found.policy, logits.to(dtype), targets, [1, 2, 3, 4])
        assert found.cost == pytest.approx(0.5, abs=0.01)
    assert confidence(logits[0].bfloat16()).dtype == torch.float32
