"""P-values against scipy, against formulas by hand, and their error rates by simulation."""

import math

import pytest
import torch
from scipy import stats

from dynadapter.calibrate.risk import binomial_cdf, p_value, samples_needed, upper_bound

BOUNDS = ["binomial", "betting", "hoeffding_bentkus"]


def binary(losses, samples):
    return (torch.arange(samples) < losses).double()


@pytest.mark.parametrize("samples", [1, 10, 137, 20000])
@pytest.mark.parametrize("p", [0.001, 0.02, 0.5, 0.97])
def test_binomial_cdf_is_scipys(samples, p):
    k = torch.arange(samples + 1)
    expected = torch.from_numpy(stats.binom.cdf(k.numpy(), samples, p))
    torch.testing.assert_close(binomial_cdf(samples, p), expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(("losses", "samples", "limit"), [(0, 200, 0.02), (3, 200, 0.02), (9, 50, 0.3), (60, 100, 0.5)])
def test_p_values_by_hand(losses, samples, limit):
    values = binary(losses, samples)
    mean = losses / samples
    exact = stats.binom.cdf(losses, samples, limit)
    assert p_value(values, limit, 0.1, "binomial").item() == pytest.approx(exact, rel=1e-9)

    a = min(mean, limit)
    h1 = (1 - a) * math.log((1 - a) / (1 - limit)) + (a * math.log(a / limit) if a else 0)
    hoeffding = math.exp(-samples * h1)
    bentkus = math.e * stats.binom.cdf(math.ceil(samples * mean), samples, limit)
    expected = min(1.0, hoeffding, bentkus)
    assert p_value(values, limit, 0.1, "hoeffding_bentkus").item() == pytest.approx(expected, rel=1e-9)

    capital = richest = 1.0
    past: list[float] = []
    spread = 0.25
    for i in torch.randperm(samples, generator=torch.Generator().manual_seed(0)).tolist():
        bet = math.sqrt(2 * math.log(1 / 0.1) / (samples * spread / (len(past) + 1)))
        capital *= 1 + min(bet, 0.99 / (1 - limit)) * (limit - values[i].item())
        richest = max(richest, capital)
        past.append(values[i].item())
        spread += (past[-1] - (0.5 + sum(past)) / (len(past) + 1)) ** 2
    expected = 1 / richest if mean < limit else 1
    assert p_value(values, limit, 0.1, "betting").item() == pytest.approx(expected, rel=1e-9)


def test_bentkus_rounds_the_sum_up():
    values = torch.full((40,), 0.26, dtype=torch.float64)  # sum 10.4
    bentkus = math.e * stats.binom.cdf(11, 40, 0.5)
    hoeffding = math.exp(-40 * (0.26 * math.log(0.26 / 0.5) + 0.74 * math.log(0.74 / 0.5)))
    assert p_value(values, 0.5, 0.1, "hoeffding_bentkus").item() == pytest.approx(min(bentkus, hoeffding), rel=1e-9)
    tenths = torch.full((70,), 0.1, dtype=torch.float64)  # its sum is 7.000000000000001
    expected = min(
        math.e * stats.binom.cdf(7, 70, 0.3), math.exp(-70 * (0.1 * math.log(0.1 / 0.3) + 0.9 * math.log(0.9 / 0.7)))
    )
    assert p_value(tenths, 0.3, 0.1, "hoeffding_bentkus").item() == pytest.approx(expected, rel=1e-9)


DISTRIBUTIONS = {  # losses and their probabilities; the expected loss is the limit, where a test errs most
    "rare": ([0.0, 1.0], [0.95, 0.05]),
    "even": ([0.0, 1.0], [0.5, 0.5]),
    "gap": ([0.0, 0.5, 1.0], [0.02, 0.94, 0.04]),
    "wide gap": ([0.0, 0.5, 1.0], [0.38, 0.22, 0.40]),
    "skewed": ([0.0, 0.1, 1.0], [0.49, 0.5, 0.01]),
}


CASES = [
    (bound, case)
    for bound in BOUNDS
    for case, (values, _) in DISTRIBUTIONS.items()
    if bound != "binomial" or values == [0.0, 1.0]
]


@pytest.mark.parametrize(("bound", "case"), CASES)
@pytest.mark.parametrize("samples", [30, 400])
def test_false_rejections_are_within_level(bound, case, samples):
    values, probabilities = (torch.tensor(x, dtype=torch.float64) for x in DISTRIBUTIONS[case])
    draws, level = 4000, 0.1
    g = torch.Generator().manual_seed(1)
    picked = probabilities.expand(draws, -1).multinomial(samples, replacement=True, generator=g)
    p = p_value(values[picked], (values * probabilities).sum().item(), level, bound)
    assert p.shape == (draws,)
    for tried in (level, 0.02):  # also at another level than that of the bets
        rejected = (p <= tried).double().mean().item()
        assert rejected <= tried + 3 * math.sqrt(tried * (1 - tried) / draws)


def test_betting_is_sharper_for_low_variance():
    gap = torch.full((1000,), 0.5, dtype=torch.float64)  # routing changes nothing
    gap[:5] = 1.0
    assert p_value(gap, 0.51, 0.1, "betting") < 0.01
    assert p_value(gap, 0.51, 0.1, "hoeffding_bentkus") > 0.5


@pytest.mark.parametrize("bound", BOUNDS)
def test_p_values_are_monotonic(bound):
    limits = torch.linspace(0.01, 0.99, 50).tolist()
    p = torch.stack([p_value(binary(8, 100), limit, 0.1, bound) for limit in limits])
    assert (p.diff() <= 1e-12).all()
    assert ((p >= 0) & (p <= 1)).all()
    if bound != "betting":  # one loss less changes the bets too, so betting is not monotonic
        p = torch.stack([p_value(binary(losses, 100), 0.2, 0.1, bound) for losses in range(101)])
        assert (p.diff() >= -1e-12).all()
        assert ((p >= 0) & (p <= 1)).all()


@pytest.mark.parametrize("losses", [0, 1, 7, 99, 100])
def test_upper_bound_is_clopper_pearson(losses):
    interval = stats.binomtest(losses, 100, alternative="less").proportion_ci(0.9, method="exact")
    assert upper_bound(binary(losses, 100), 0.9, "binomial") == pytest.approx(interval.high, abs=1e-9)
    for bound in BOUNDS[1:]:
        assert losses / 100 <= upper_bound(binary(losses, 100), 0.9, bound) <= 1


@pytest.mark.parametrize("bound", BOUNDS)
def test_samples_needed_is_the_smallest(bound):
    for limit, level in ((0.02, 0.1), (0.05, 0.05), (0.3, 0.2)):
        needed = samples_needed(limit, level, bound)
        assert p_value(torch.zeros(needed), limit, level, bound) <= level
        assert p_value(torch.zeros(needed - 1), limit, level, bound) > level
    assert samples_needed(0.02, 0.1, "binomial") == math.ceil(math.log(0.1) / math.log(0.98))
    with pytest.raises(ValueError, match="below limit"):
        samples_needed(0.2, 0.1, bound, loss=0.2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"limit": 0.0}, "limit=0.0"),
        ({"limit": 1.0}, "limit=1.0"),
        ({"level": math.nan}, "level=nan"),
        ({"losses": torch.tensor([])}, "at least one"),
        ({"losses": torch.tensor([0.0, 1.1])}, r"\[0, 1\]"),
        ({"losses": torch.tensor([0.0, math.nan])}, r"\[0, 1\]"),
        ({"losses": torch.tensor([0.0, 0.5]), "bound": "binomial"}, "0 or 1"),
        ({"bound": "chebyshev"}, "choose one of"),
    ],
)
def test_bad_input_raises(arguments, words):
    with pytest.raises(ValueError, match=words):
        p_value(**({"losses": torch.zeros(3), "limit": 0.1, "level": 0.1} | arguments))
