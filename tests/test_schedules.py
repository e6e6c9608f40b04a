"""Schedules: their ends, their bounds, and that they are pure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, Namespace

from dynadapter.training.schedules import Constant, Cosine, Cubic, Linear, Schedule, Step, Warmup

KINDS = [Constant(0.3), Linear(1.0, 0.2), Cosine(0.0, 0.7), Cubic(0.0, 0.7), Step(0.1, 0.5, 0.25)]
KINDS.append(Warmup(0.1, 0.0, Cosine(1.0, 0.0)))

values = st.floats(-1e6, 1e6)
shares = st.floats(0, 1)


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)  # the new name came with 4.49


def every_kind(kind: type) -> set[type]:
    below = {kind for sub in kind.__subclasses__() for kind in every_kind(sub)}
    return below or {kind}


def test_every_kind_is_tested() -> None:
    assert {type(kind) for kind in KINDS} == every_kind(Schedule)


@given(start=values, end=values, progress=shares)
def test_ends_are_exact_and_bound_all_values(start: float, end: float, progress: float) -> None:
    for kind in (Linear(start, end), Cosine(start, end), Cubic(start, end), Step(start, end, 0.5)):
        assert kind(0.0) == start
        assert kind(1.0) == end
        assert min(start, end) <= kind(progress) <= max(start, end)


@given(start=values, end=values, a=shares, b=shares)
def test_schedules_are_monotonic(start: float, end: float, a: float, b: float) -> None:
    a, b = sorted((a, b))
    slack = 1e-9 * max(1.0, abs(start), abs(end))
    for kind in (Linear(start, end), Cosine(start, end), Cubic(start, end), Step(start, end, 0.5)):
        assert (kind(b) - kind(a)) * math.copysign(1, end - start) >= -slack


def test_values_by_hand() -> None:
    assert Constant(2.0)(0.7) == 2.0
    assert Linear(2.0, 4.0)(0.25) == 2.5
    assert Cosine(0.0, 1.0)(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert Cosine(0.0, 1.0)(0.5) == pytest.approx(0.5)
    assert Cubic(0.0, 1.0)(0.5) == 0.875
    assert [Step(1.0, 2.0, 0.5)(p) for p in (0.49, 0.5)] == [1.0, 2.0]


@given(fraction=st.floats(0, 0.99), progress=shares)
def test_warmup_joins_its_schedule(fraction: float, progress: float) -> None:
    warm = Warmup(fraction, 0.0, Linear(1.0, 0.5))
    assert warm(fraction) == 1.0
    assert warm(1.0) == 0.5
    assert 0.0 <= warm(progress) <= 1.0
    if progress < fraction:
        assert warm(progress) == pytest.approx(progress / fraction)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_are_pure(kind: Schedule) -> None:
    grid = [k / 16 for k in range(17)]
    first = [kind(p) for p in grid]
    assert first == [kind(p) for p in reversed(grid)][::-1]
    assert (len(set(first)) > 1) == kind.varies


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(math.nan), "value=nan must be a finite number"),
        (lambda: Linear(0.0, math.inf), "end=inf must be a finite number"),
        (lambda: Step(0.0, 1.0, 1.5), "at=1.5 must be a fraction of training"),
        (lambda: Step(math.nan, 1.0, 0.5), "start=nan must be a finite number"),
        (lambda: Warmup(1.0, 0.0, Constant(1.0)), "fraction=1.0 must be a fraction of training"),
        (lambda: Warmup(0.5, math.nan, Constant(1.0)), "start=nan must be a finite number"),
    ],
)
def test_invalid_settings_are_one_line(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_config_nests_schedules() -> None:
    parser = ArgumentParser()
    parser.add_argument("--schedule", type=Schedule)
    text = '{"class_path": "Warmup", "init_args": {"fraction": 0.1, "start": 0.0, "then": '
    text += '{"class_path": "Cosine", "init_args": {"start": 1.0, "end": 0.0}}}}'
    parsed = parser.parse_args([f"--schedule={text}"])
    assert instantiate(parser, parsed).schedule == Warmup(0.1, 0.0, Cosine(1.0, 0.0))
