"""Calibration against brute force over route(), and the coverage of the guarantee by simulation."""

import math
from itertools import pairwise, product

import pytest
import torch
from conftest import raises_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dynadapter.calibrate import (
    COMBINES,
    KINDS,
    Goal,
    Scaled,
    candidates,
    curve,
    curve_rows,
    evaluate,
    fit_temperatures,
    policy_for,
    solve,
    split_folds,
    with_guarantee,
)
from dynadapter.calibrate.choosing import Options, Samples, choose, levels
from dynadapter.calibrate.guarantee import binomial_cdf, p_value, samples_needed
from dynadapter.calibrate.ladder import ladder
from dynadapter.calibrate.report import solution_data, thresholds
from dynadapter.calibrate.scores import Scores
from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.combining import Combined, decision, predicting
from dynadapter.exits.policies import Confidence, Entropy, Margin, Never, Patience, Policy, confidence, route
from dynadapter.spec import restore

THRESHOLDED = [Confidence, Entropy, Margin]
ONE = ("one_threshold",)


def chosen(logits, targets, costs, goal, static=None, **options):
    return choose(Samples(logits, targets, costs, static, None, Options(**options)), goal).found


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
    taken, predicted = route(policy, logits).tolist(), policy.combine(logits)
    right = 0
    for i, k in enumerate(taken):
        row = predicted[k, i]
        right += row.isfinite().all().item() and row.argmax().item() == targets[i].item()
    cost = math.fsum(costs[k] for k in taken) / (samples * (static or costs[-1]))
    return cost, right / samples, tuple(taken.count(k) / samples for k in range(exits))


def agrees(outcome, policy, logits, targets, costs, static=None):
    cost, accuracy, shares = by_hand(policy, logits, targets, costs, static)
    return (outcome.cost, outcome.accuracy, outcome.shares) == (pytest.approx(cost, rel=1e-12), accuracy, shares)


def brute_force(kind, logits, temperatures):
    """Return every policy with one shared threshold that can make a difference on these logits, and Never."""
    if kind is Patience:
        return [Scaled(p, tuple(temperatures)) for p in (Never(), *map(Patience, range(1, len(logits) + 1)))]
    scores = Scores(kind, Stacked(logits, None, range(1, len(logits) + 1), prediction=predicting("own", temperatures)))
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
@given(problems(), st.integers(2, 12), st.sampled_from([0.0, 1.0, 2.0]))
def test_curve_is_what_routing_does(problem, points, slope):
    logits, targets, costs, static, temperatures, kind = problem
    own = predicting("own", temperatures)
    found = curve(logits, targets, costs, kind, prediction=own, slope=slope, static=static, points=points)
    assert 1 <= len(found.routed) <= points
    assert all(a.cost < b.cost for a, b in pairwise(found.routed))
    for point in found.routed:
        assert agrees(point, point.policy, logits, targets, costs, static)
    everything = [
        by_hand(policy, logits, targets, costs, static)[0] for policy in brute_force(kind, logits, temperatures)
    ]
    assert found.routed[0].cost == pytest.approx(min(everything))
    assert found.routed[-1].cost == found.anytime[-1].cost == pytest.approx(max(everything))
    assert decision(found.routed[-1].policy) == decision(found.anytime[-1].policy) == Never()
    for k, point in enumerate(found.anytime):
        assert point.shares == tuple(float(k == j) for j in range(len(logits)))
        assert point.cost == pytest.approx(costs[k] / (static or costs[-1]))
        assert point.label == f"exit {k + 1}"


@pytest.mark.parametrize("kind", THRESHOLDED)
def test_curve_of_overconfident_exits(kind):
    """Most certainties are so near 1 that thresholds by exit cannot tell them apart."""
    logits, targets = fake(200)
    found = curve(12 * logits, targets, [1, 2, 3, 4], kind, slope=2.0, points=1000)
    assert all(agrees(point, point.policy, 12 * logits, targets, [1, 2, 3, 4]) for point in found.routed)
    assert all(a.cost < b.cost for a, b in pairwise(found.routed))


@pytest.mark.parametrize("slope", [0.5, -1.0])
@pytest.mark.parametrize("kind", THRESHOLDED)
def test_ladder_of_a_slope_is_routing(kind, slope):
    logits, targets = fake(40)
    logits[1, 3] = math.nan
    data = Stacked(logits, targets, [1, 2, 3, 4], None, predicting("geometric", (2.0, 1.5, 1.0, 1.2)))
    steps = ladder(kind, data, slope)
    for step in range(len(steps.cost)):
        policy = steps.policy(step)
        cost, accuracy, shares = by_hand(data.complete(policy), logits, targets, [1, 2, 3, 4])
        assert steps.cost[step].item() == pytest.approx(cost)
        assert steps.right[step].item() == pytest.approx(accuracy * 40)
        assert steps.counts[step].tolist() == pytest.approx([share * 40 for share in shares])
        if 0 < step < len(steps.cost) - 1:  # log-odds of the certainties that the thresholds ask for
            certain = [1 - t if kind is Entropy else t for t in policy.threshold]
            odds = [math.log(u / (1 - u)) for u in certain]
            assert [a - b for a, b in pairwise(odds)] == pytest.approx([slope, slope], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.05, 1.0))
def test_one_threshold_spends_the_budget(problem, budget):
    """Of all policies with one threshold, the candidate that spends the budget is the dearest within it."""
    logits, targets, costs, static, temperatures, kind = problem
    reached = [by_hand(policy, logits, targets, costs, static)[0] for policy in brute_force(kind, logits, temperatures)]
    data = Stacked(logits, targets, costs, static, predicting("own", temperatures))
    policy = data.complete(levels(ladder(kind, data), budget)[-1])
    expected = max((cost for cost in reached if cost <= budget), default=min(reached))
    assert by_hand(policy, logits, targets, costs, static)[0] == pytest.approx(expected)


def test_policy_includes_temperatures():
    logits, targets = fake(500)
    logits = logits * torch.tensor([4.0, 2.0, 1.0, 1.0]).view(4, 1, 1)
    heat = fit_temperatures(logits, targets)
    found = chosen(logits, targets, [1, 2, 3, 4], Goal(cost=0.5), searches=ONE, combines=("own",))
    assert isinstance(found.policy, Scaled)
    assert found.policy.temperatures == heat
    assert found.accuracy == evaluate(found.policy, logits, targets, [1, 2, 3, 4]).accuracy
    raw = chosen(logits, targets, [1, 2, 3, 4], Goal(cost=0.5), searches=ONE, combines=("own",), temperatures=False)
    assert isinstance(raw.policy, Confidence)
    patient = chosen(logits, targets, [1, 2, 3, 4], Goal(cost=0.9), kind=Patience, combines=("own",))
    assert isinstance(decision(patient.policy), Patience)
    both = chosen(logits, targets, [1, 2, 3, 4], Goal(cost=0.5), searches=ONE, combines=("mean",)).policy
    assert both == Scaled(Combined(decision(both), "mean"), heat)


def test_last_bit_changes_no_exit():
    """Scores that differ in the last bit, as on another machine, take the same exits."""
    logits, targets = fake(300)
    for kind, combine in product(THRESHOLDED, COMBINES):
        for goal in (Goal(cost=0.5), Goal(accuracy_drop=1.0)):
            policy = chosen(logits, targets, [1, 2, 3, 4], goal, kind=kind, combines=(combine,)).policy
            taken = route(policy, logits)
            assert torch.equal(taken, route(policy, logits * (1 + 1e-7)))
            assert torch.equal(taken, route(policy, logits * (1 - 1e-7)))


def test_nonfinite_logits_take_the_last_exit():
    logits, targets = fake(40)
    logits[:-1, :10] = math.nan
    for kind in KINDS.values():
        found = chosen(logits, targets, [1, 2, 3, 4], Goal(cost=0.5), kind=kind)
        assert found.shares[-1] >= 0.25
        assert "10 of 40 samples" in found.notes[0]
    with pytest.raises(ValueError, match=r"10, whose logits there are not finite.*0\.4375 of static"):
        chosen(logits, targets, [1, 2, 3, 4], Goal(cost=0.3))
    nothing = torch.full((4, 5, 3), math.nan)
    labels = torch.zeros(5, dtype=torch.int64)
    for kind in KINDS.values():
        found = chosen(nothing, labels, [1, 2, 3, 4], Goal(cost=1.0), kind=kind)
        assert (found.shares, found.accuracy, found.cost) == ((0, 0, 0, 1), 0.0, 1.0)
        assert len(curve(nothing, labels, [1, 2, 3, 4], kind).routed) == 1
    assert with_guarantee(nothing, labels, [1, 2, 3, 4]).shares == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="the average cost is 1 of"):
        chosen(nothing, labels, [1, 2, 3, 4], Goal(cost=0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_logits_count_as_wrong(value):
    logits, targets = fake(40)
    logits[:, torch.arange(10), targets[:10]] = value  # of the class that is right
    right = (logits[-1, 10:].argmax(-1) == targets[10:]).sum().item()
    assert evaluate(Never(), logits, targets, [1, 2, 3, 4]).accuracy == right / 40


def test_lowest_named_budget_is_reachable():
    logits, targets = fake(77)
    costs = [4.476, 8.838, 13.2, 17.583]
    with raises_one_line(ValueError, match=r"is 0\.2546 of static"):
        chosen(logits, targets, costs, Goal(cost=0.1))
    assert chosen(logits, targets, costs, Goal(cost=0.2546)).shares[0] == 1
    assert chosen(logits, targets, costs, Goal(cost=costs[0] / costs[-1])).shares[0] == 1


def test_best_named_gain_is_reachable():
    logits, targets = fake(90)
    logits[-1] = logits[-1].roll(1, -1)  # the last exit is mostly wrong
    with pytest.raises(ValueError, match="give at least") as caught:
        chosen(logits, targets, [1, 2, 3, 4], Goal(accuracy_drop=-100))
    points = float(str(caught.value).rsplit(" ", 1)[1])
    assert points < -10
    assert chosen(logits, targets, [1, 2, 3, 4], Goal(accuracy_drop=points)).accuracy > 0.1


# ---- the guarantee


def lost(policy, logits, targets):
    """Return which samples routing gets wrong and the last exit right."""
    routed = policy.combine(logits)[route(policy, logits), torch.arange(len(targets))].argmax(-1)
    return ((logits[-1].argmax(-1) == targets) & (routed != targets)).double()


def test_guarantee_holds_at_its_confidence():
    """Calibrate on many draws of a known population and count how often the true risk exceeds the limit."""
    population, answers = fake(20000, exits=3)
    risk, level, draws, samples = 0.05, 0.8, 250, 250
    tried = [Confidence(t.item()) for t in torch.linspace(2.5, -0.5, 31, dtype=torch.float64).sigmoid()]
    table = torch.stack([lost(policy, population, answers) for policy in tried])
    truth = dict(zip(tried, table.mean(-1).tolist(), strict=True)) | {Never(): 0.0}
    assert min(truth.values()) < risk < max(truth.values())  # otherwise nothing is tested

    g = torch.Generator().manual_seed(5)
    broken, careless, costs = 0, 0, []
    for _ in range(draws):
        i = torch.randint(len(answers), (samples,), generator=g)
        found = with_guarantee(population[:, i], answers[i], [1, 2, 3], risk, level, policies=tried)
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
    prediction = predicting("own", temperatures)
    found = with_guarantee(logits, targets, [1, 2, 3, 4], 0.05, 0.9, kind=kind, prediction=prediction)
    counts = [int(lost(Scaled(policy, temperatures), logits, targets).sum()) for policy in candidates(kind, 4)]
    most = max(n for n in range(75) if stats.binom.cdf(n, 1500, 0.05) <= 0.1)
    run = next((i for i, n in enumerate(counts) if n > most), len(counts))
    chosen = candidates(kind, 4)[run - 1]
    assert found.policy == Scaled(chosen, temperatures)
    assert found.risk == counts[run - 1] / 1500
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
        policy = chosen(logits[:, :1000], targets[:1000], costs, Goal(cost=budget), searches=("thresholds",)).policy
        tested.append(decision(policy))
    prediction = predicting("own", temperatures)
    found = with_guarantee(logits[:, 1000:], targets[1000:], costs, 0.05, policies=tested, prediction=prediction)
    assert found.policy in [Scaled(policy, temperatures) for policy in tested]
    assert lost(found.policy, logits[:, 1000:], targets[1000:]).mean().item() == pytest.approx(found.risk)


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
    if goal != "accuracy_drop":
        assert {"cost": one.cost, "risk": one.lost}[goal] <= GOALS[goal] + 1e-9
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
        for goal in (Goal(cost=1.0), Goal(accuracy_drop=0.0)):
            assert decision(chosen(logits, targets, [5], goal, kind=kind).policy) == Never()
        assert [point.label for point in curve(logits, targets, [5], kind).routed] == ["exit 1"]


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
        (lambda: evaluate(Never(), LOGITS, TARGETS, [1, 2, 3]), "costs has 3 values"),
        (lambda: evaluate(Never(), LOGITS, TARGETS, [1, 3, 3, 4]), "rise from exit to exit"),
        (lambda: evaluate(Never(), LOGITS, TARGETS, [0, 1, 2, 3]), "above 0"),
        (lambda: evaluate(Never(), LOGITS, TARGETS, [1, 2, 3, math.nan]), "rise"),
        (lambda: evaluate(Never(), LOGITS, TARGETS, [1, 2, 3, 4], static=0), "static=0"),
        (lambda: chosen(LOGITS, TARGETS, [1, 2, 3, 4], Goal(cost=0.5), kind=Never), "kind=Never cannot be calibrated"),
        (lambda: evaluate(Scaled(Never(), (1, 2)), LOGITS, TARGETS, [1, 2, 3, 4]), "2 values, this network has 4"),
        (lambda: chosen(LOGITS[:, :0], TARGETS[:0], [1, 2, 3, 4], Goal(cost=0.5)), "at least one"),
        (lambda: curve(LOGITS, TARGETS, [1, 2, 3, 4], points=1), "points=1"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], risk=0), "risk=0"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], confidence=90), "confidence=90"),
        (lambda: with_guarantee(LOGITS, None, [1, 2, 3, 4]), "needs targets"),
        (lambda: with_guarantee(LOGITS, TARGETS, [1, 2, 3, 4], kind=Policy), "kind=Policy"),
        (lambda: split_folds(1), "samples=1"),
        (lambda: solve(LOGITS[:, :1], TARGETS[:1], [1, 2, 3, 4], Goal(cost=0.5)), "too few; calibrate on at least 2"),
        (lambda: split_folds(3, 4), "folds=4"),
        (lambda: split_folds(4, targets=TARGETS), r"give \(4,\)"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with raises_one_line(ValueError, match=words):
        call()


def test_scores_keep_the_logits_dtype():
    logits, targets = fake(200)
    for dtype in (torch.float64, torch.bfloat16):
        found = chosen(logits.to(dtype), targets, [1, 2, 3, 4], Goal(cost=0.5), searches=ONE)
        assert agrees(found, found.policy, logits.to(dtype), targets, [1, 2, 3, 4])
        assert found.cost == pytest.approx(0.5, abs=0.01)
    assert confidence(logits[0].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("samples", [1, 10, 137, 20000])
@pytest.mark.parametrize("p", [0.001, 0.02, 0.5, 0.97])
def test_binomial_cdf_is_scipys(samples, p):
    k = torch.arange(samples + 1)
    expected = torch.from_numpy(stats.binom.cdf(k.numpy(), samples, p))
    torch.testing.assert_close(binomial_cdf(samples, p), expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("limit", [0.05, 0.5])
@pytest.mark.parametrize("samples", [30, 400])
def test_false_rejections_are_within_level(limit, samples):
    """At the limit, where a test errs most."""
    draws = 4000
    lost = torch.rand(draws, samples, generator=torch.Generator().manual_seed(1)) < limit
    p = torch.tensor([p_value(count, samples, limit) for count in lost.sum(1).tolist()])
    for level in (0.1, 0.02):
        rejected = (p <= level).double().mean().item()
        assert rejected <= level + 3 * math.sqrt(level * (1 - level) / draws)


@pytest.mark.parametrize(("limit", "level"), [(0.02, 0.1), (0.05, 0.05), (0.3, 0.2)])
def test_samples_needed_is_the_smallest(limit, level):
    needed = samples_needed(limit, level)
    assert p_value(0, needed, limit) <= level < p_value(0, needed - 1, limit)
