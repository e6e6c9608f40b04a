"""Weightings: a distribution over exits that shifts in the documented direction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, Namespace

from dynadapter.training.schedules import Constant, Cosine, Linear
from dynadapter.training.weighting import EarlyToLate, LateToEarly, LinearInDepth, PerExit, Uniform, Weighting

KINDS = [
    EarlyToLate(),
    LateToEarly(),
    Uniform(),
    LinearInDepth(),
    EarlyToLate(0.0, Cosine(0.0, 1.0)),
    LateToEarly(last=0.25),
]


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)  # the new name came with 4.49


def every_kind(kind: type) -> set[type]:
    below = {kind for sub in kind.__subclasses__() for kind in every_kind(sub)}
    return below or {kind}


def test_every_kind_is_tested() -> None:
    ours = {kind for kind in every_kind(Weighting) if kind.__module__ == Weighting.__module__}
    assert {type(kind) for kind in KINDS} | {PerExit} == ours


@given(progress=st.floats(0, 1), exits=st.integers(1, 13), floor=st.floats(0, 1), values=st.data())
def test_weights_are_a_distribution(progress: float, exits: int, floor: float, values: st.DataObject) -> None:
    ends = values.draw(st.lists(st.tuples(st.floats(0.001, 1e6), st.floats(0, 1e6)), min_size=exits, max_size=exits))
    per_exit = PerExit(tuple(Linear(start, end + 0.001) for start, end in ends))
    for kind in (*KINDS, EarlyToLate(floor), LateToEarly(floor), per_exit):
        weights = kind(progress, exits)
        assert len(weights) == exits
        assert all(math.isfinite(w) and 0 <= w <= 1 for w in weights)
        assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
        if exits == 1:
            assert weights == (1.0,)


@pytest.mark.parametrize("exits", [2, 3, 4, 12])
def test_early_to_late_falls_then_rises(exits: int) -> None:
    kind = EarlyToLate(floor=0.1)
    start, middle, end = kind(0.0, exits), kind(0.5, exits), kind(1.0, exits)
    assert list(start) == sorted(start, reverse=True)
    assert list(end) == sorted(end)
    assert start == pytest.approx(end[::-1])
    assert middle == pytest.approx([1 / exits] * exits)
    assert start[-1] / start[0] == pytest.approx(0.1)
    steps = [kind(p / 10, exits) for p in range(11)]
    assert all(a[0] > b[0] and a[-1] < b[-1] for a, b in pairwise(steps))


@given(progress=st.floats(0, 1), exits=st.integers(1, 12))
def test_late_to_early_is_the_reverse(progress: float, exits: int) -> None:
    assert LateToEarly()(progress, exits) == pytest.approx(EarlyToLate()(progress, exits)[::-1])


@given(progress=st.floats(0, 1), exits=st.integers(2, 12), last=st.floats(0.01, 0.99))
def test_last_exit_keeps_its_weight(progress: float, exits: int, last: float) -> None:
    for kind in (EarlyToLate, LateToEarly):
        *early, own = kind(last=last)(progress, exits)
        assert own == pytest.approx(last)
        assert early == pytest.approx([(1 - last) * weight for weight in kind()(progress, exits - 1)])


def test_values_by_hand() -> None:
    assert Uniform()(0.3, 4) == (0.25,) * 4
    assert LinearInDepth()(0.3, 4) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert EarlyToLate(floor=0.0)(0.0, 3) == pytest.approx((2 / 3, 1 / 3, 0))
    assert PerExit((Constant(1.0), Linear(3.0, 1.0)))(0.0, 2) == (0.25, 0.75)


def test_ease_sets_the_progress_of_the_shift() -> None:
    slow = EarlyToLate(ease=Cosine(0.0, 1.0))
    assert slow(0.0, 4) == EarlyToLate()(0.0, 4)
    assert slow(1.0, 4) == EarlyToLate()(1.0, 4)
    assert slow(0.1, 4)[0] > EarlyToLate()(0.1, 4)[0]


@pytest.mark.parametrize(
    "kind", [*KINDS, PerExit((Constant(1.0),) * 3), PerExit((Linear(1.0, 0.0),) + (Constant(1.0),) * 2)]
)
def test_varies_tells_the_truth(kind: Weighting) -> None:
    assert (len({kind(p / 8, 3) for p in range(9)}) > 1) == kind.varies


@dataclass(frozen=True)
class Broken(Weighting):
    values: tuple[float, ...]

    def profile(self, progress: float, exits: int) -> Sequence[float]:
        return self.values


@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 1.0), (-1.0, 2.0), (0.0, 0.0), (1e308, 1e308)])
def test_invalid_weights_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"Broken.* at progress 0.5; weights must be finite"):
        Broken(values)(0.5, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerExit((Constant(1.0),))(0.0, 4), "gives 1 weights, this network has 4 exits; give one per exit"),
        (lambda: EarlyToLate(ease=Linear(0.0, 2.0))(1.0, 4), r"gives 2.0 at progress 1; it must stay in \[0, 1\]"),
        (lambda: EarlyToLate(floor=1.5), r"floor=1.5 must be in \[0, 1\]"),
        (lambda: LateToEarly(last=1.0), "last=1.0 must be above 0 and below 1"),
        (lambda: EarlyToLate(last=math.nan), "last=nan must be above 0 and below 1"),
        (lambda: LateToEarly(floor=math.nan), r"floor=nan must be in \[0, 1\]"),
    ],
)
def test_invalid_settings_are_one_line(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_config_holds_a_schedule_per_exit() -> None:
    parser = ArgumentParser()
    parser.add_argument("--weighting", type=Weighting, default=EarlyToLate())
    assert instantiate(parser, parser.parse_args(["--weighting.floor=0.2"])).weighting == EarlyToLate(0.2)
    text = (
        '{"class_path": "PerExit", "init_args": {"schedules": [{"class_path": "Constant", "init_args": {"value": 1}},'
    )
    text += '{"class_path": "Linear", "init_args": {"start": 0, "end": 1}}]}}'
    parsed = parser.parse_args([f"--weighting={text}"])
    assert instantiate(parser, parsed).weighting == PerExit((Constant(1), Linear(0, 1)))
