"""Temperatures: the fit against another optimiser, its limits, and a policy that sees tempered logits."""

import io

import pytest
import torch
from conftest import raises_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from dynadapter.exits.policies import Confidence, Entropy, Margin, Never, Patience, route
from dynadapter.exits.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE, Scaled, fit_temperatures


def draw(exits=3, samples=200, classes=5, sharpness=(1.0, 3.0, 0.4), seed=0):
    """Logits whose exits are calibrated up to a known factor: targets are drawn from their softmax."""
    g = torch.Generator().manual_seed(seed)
    honest = 2 * torch.randn(samples, classes, generator=g)
    targets = honest.softmax(-1).multinomial(1, generator=g)[:, 0]
    return torch.stack([s * honest for s in sharpness[:exits]]), targets


def nll(logits, targets, temperature):
    return cross_entropy(logits.double() / temperature, targets).item()


@pytest.mark.parametrize("seed", range(3))
def test_fit_agrees_with_a_bounded_minimiser(seed):
    logits, targets = draw(seed=seed)
    for exit_logits, found in zip(logits, fit_temperatures(logits, targets), strict=True):
        other = minimize_scalar(
            lambda t, z=exit_logits: nll(z, targets, t),
            bounds=(MIN_TEMPERATURE, MAX_TEMPERATURE),
            options={"xatol": 1e-9},
        )
        assert found == pytest.approx(other.x, rel=1e-4)
        assert nll(exit_logits, targets, found) <= other.fun + 1e-12


def test_fit_recovers_known_factor():
    logits, targets = draw(samples=20000)
    assert fit_temperatures(logits, targets) == pytest.approx((1.0, 3.0, 0.4), rel=0.05)


numbers = st.one_of(st.floats(-5, 5, width=32), st.sampled_from([0.0, 1.0, -1.0, 1e4, 3e38, -3e38, 1e-40]))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_fit_in_range_and_never_worse(data, samples, classes):
    values = data.draw(st.lists(numbers, min_size=samples * classes, max_size=samples * classes))
    targets = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples)))
    logits = torch.tensor(values).view(1, samples, classes)
    [found] = fit_temperatures(logits, targets)
    assert MIN_TEMPERATURE <= found <= MAX_TEMPERATURE
    assert nll(logits[0], targets, found) <= nll(logits[0], targets, 1.0) * (1 + 1e-12)


def test_degenerate_exits_keep_or_clip():
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (50,), generator=g)
    right = torch.nn.functional.one_hot(targets, 4).float() * 3
    logits = torch.stack([right, -right, torch.full_like(right, torch.nan), torch.zeros_like(right)])
    assert fit_temperatures(logits, targets) == (1.0, MAX_TEMPERATURE, 1.0, 1.0)
    assert fit_temperatures(torch.randn(2, 9, 1, generator=g), torch.zeros(9, dtype=torch.int64)) == (1.0, 1.0)


def test_fit_ignores_nonfinite_rows():
    logits, targets = draw(samples=60)
    spoilt = torch.cat([logits, torch.full((3, 2, 5), torch.nan), torch.full((3, 1, 5), torch.inf)], 1)
    spoilt[:, -1, 1:] = 0
    longer = torch.cat([targets, torch.tensor([0, 1, 2])])
    assert fit_temperatures(spoilt, longer) == pytest.approx(fit_temperatures(logits, targets), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "words"),
    [
        (torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.int64), ValueError, "at least one"),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), ValueError, "exits, samples, classes"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), TypeError, "floating"),
        (torch.zeros(2, 4, 3), torch.zeros(5, dtype=torch.int64), ValueError, r"\(4,\)"),
        (torch.zeros(2, 4, 3), torch.zeros(4), TypeError, "integer"),
        (torch.zeros(2, 4, 3), torch.tensor([0, 1, 2, 3]), ValueError, "0 to 2"),
        (torch.zeros(2, 4, 3), torch.tensor([0, 1, 2, -1]), ValueError, "0 to 2"),
    ],
)
def test_bad_input_is_one_clear_line(logits, targets, error, words):
    with raises_one_line(error, match=words):
        fit_temperatures(logits, targets)


INNER = [Confidence(0.6), Confidence((0.5, 0.8)), Entropy(0.5), Margin((0.3, 0.1)), Patience(2), Never()]


@pytest.mark.parametrize("inner", INNER, ids=lambda policy: policy.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scaled_equals_policy_on_divided(inner, dtype):
    logits = draw()[0].to(dtype)
    temperatures = (2.0, 0.5, 3.0)
    wide = logits.float() if dtype == torch.bfloat16 else logits
    divided = wide / torch.tensor(temperatures, dtype=wide.dtype).view(3, 1, 1)
    assert torch.equal(route(Scaled(inner, temperatures), logits), route(inner, divided))
    assert torch.equal(route(Scaled(inner), logits), route(inner, wide))


def test_scaled_nonfinite_never_exits():
    logits = torch.zeros(2, 3, 2)
    logits[0, 0] = torch.tensor([torch.inf, 0])
    logits[0, 1] = torch.tensor([3e38, 0])  # overflows when divided by 0.1
    logits[0, 2] = torch.tensor([9.0, 0])
    assert route(Scaled(Confidence(0.0), 0.1), logits).tolist() == [1, 1, 0]


def test_scaled_checked_and_saved():
    with pytest.raises(ValueError, match="temperatures has 2 values, this network has 3 exits"):
        Scaled(Confidence(), (1.0, 2.0)).check(3)
    with pytest.raises(ValueError, match="threshold has 3 values"):
        Scaled(Confidence((0.1, 0.2, 0.3)), 2.0).check(3)
    for wrong in (0.0, -1.0, float("nan"), float("inf"), (1.0, 0.0)):
        with pytest.raises(ValueError, match="above 0"):
            Scaled(Confidence(), wrong)
    with pytest.raises(TypeError, match="number"):
        Scaled(Confidence(), "warm")
    policy = Scaled(Entropy((0.1, 0.2)), (1.5, 1, 2))
    file = io.BytesIO()
    torch.save(policy, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == policy
    assert policy.name != policy.policy.name  # two policies of one run are logged apart
