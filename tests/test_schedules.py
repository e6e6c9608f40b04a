"""Schedules, the weightings of exits that follow them, and the loss weights of a training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import raises_one_line
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import QUIET, ByHand, SaveFirstEpoch, TinyModule, loader, trainer
from torch.utils.data import IterableDataset

from dynadapter.training.callbacks.loss_weights import ExitWeights
from dynadapter.training.schedules import Constant, Cosine, Cubic, Linear, Schedule, Step, Warmup
from dynadapter.training.weighting import EarlyToLate, LateToEarly, LinearInDepth, PerExit, Uniform, Weighting

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


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


def test_config_nests_schedules() -> None:
    parser = ArgumentParser()
    parser.add_argument("--schedule", type=Schedule)
    text = '{"class_path": "Warmup", "init_args": {"fraction": 0.1, "start": 0.0, "then": '
    text += '{"class_path": "Cosine", "init_args": {"start": 1.0, "end": 0.0}}}}'
    parsed = parser.parse_args([f"--schedule={text}"])
    assert instantiate(parser, parsed).schedule == Warmup(0.1, 0.0, Cosine(1.0, 0.0))


# ---- weightings


WEIGHTINGS = [
    EarlyToLate(),
    LateToEarly(),
    Uniform(),
    LinearInDepth(),
    EarlyToLate(0.0, Cosine(0.0, 1.0)),
    LateToEarly(last=0.25),
]


def test_every_weighting_is_tested() -> None:
    ours = {kind for kind in every_kind(Weighting) if kind.__module__ == Weighting.__module__}
    assert {type(kind) for kind in WEIGHTINGS} | {PerExit} == ours


@given(progress=st.floats(0, 1), exits=st.integers(1, 13), floor=st.floats(0, 1), values=st.data())
def test_weights_are_a_distribution(progress: float, exits: int, floor: float, values: st.DataObject) -> None:
    ends = values.draw(st.lists(st.tuples(st.floats(0.001, 1e6), st.floats(0, 1e6)), min_size=exits, max_size=exits))
    per_exit = PerExit(tuple(Linear(start, end + 0.001) for start, end in ends))
    for kind in (*WEIGHTINGS, EarlyToLate(floor), LateToEarly(floor), per_exit):
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


def test_weights_by_hand() -> None:
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
    "kind", [*WEIGHTINGS, PerExit((Constant(1.0),) * 3), PerExit((Linear(1.0, 0.0),) + (Constant(1.0),) * 2)]
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


# ---- in a training


def profile(weighting: Weighting, *progress: float) -> list[tuple[float, ...]]:
    return [pytest.approx(weighting(p, 3), abs=1e-6) for p in progress]


@pytest.mark.parametrize("weighting", [EarlyToLate(), LateToEarly(0.0, Cosine(0.0, 1.0)), LinearInDepth()])
def test_each_step_has_its_weights(weighting: Weighting) -> None:
    module = TinyModule()
    buffer = module.net.exit_weights
    trainer(ExitWeights(weighting)).fit(module, loader(3))
    assert module.seen == profile(weighting, *(step / 5 for step in range(6)))
    assert module.net.exit_weights is buffer  # written in place


def test_invalid_last_weights_end_before_training() -> None:
    module = TinyModule()
    with pytest.raises(ValueError, match=r"gives 2.0 at progress 1; it must stay in \[0, 1\]"):
        trainer(ExitWeights(EarlyToLate(ease=Linear(0.0, 2.0)))).fit(module, loader(3))
    assert module.trainer.global_step == 0


def test_weights_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(ExitWeights(EarlyToLate()), logger=logger).fit(TinyModule(), loader(3))
    names, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().split()]
    logged = [tuple(float(row[names.index(f"exit_weights/{k}")]) for k in (1, 2, 3)) for row in rows]
    assert logged == profile(EarlyToLate(), *(step / 5 for step in range(6)))


@pytest.mark.parametrize(
    ("options", "progress"),
    [
        ({"accumulate_grad_batches": 2}, (0, 0, 2 / 5, 3 / 5, 3 / 5, 1)),  # windows of 2 and 1 batches per epoch
        ({"max_steps": 1}, (0,)),
        *(({"precision": name, "max_epochs": 1}, (0, 0.5, 1)) for name in ("bf16-true", "16-true", "64-true")),
    ],
)
def test_weights_under_options(options: dict, progress: tuple[float, ...]) -> None:
    module = TinyModule()
    trainer(ExitWeights(EarlyToLate()), **options).fit(module, loader(3))
    assert module.seen == profile(EarlyToLate(), *progress)


def test_resume_continues_exactly(tmp_path: Path) -> None:
    straight, resumed = TinyModule(), TinyModule()
    trainer(ExitWeights(EarlyToLate()), SaveFirstEpoch(tmp_path / "0.ckpt")).fit(straight, loader(3))
    trainer(ExitWeights(EarlyToLate())).fit(resumed, loader(3), ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert resumed.seen == straight.seen[3:]


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


class Endless(IterableDataset):
    def __iter__(self):
        batches = list(loader(1))
        while True:
            yield from batches


ENDLESS = [({"max_epochs": -1}, lambda: loader(2)), ({"max_epochs": 1}, Endless)]


def endless(data) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(data, batch_size=None) if isinstance(data, Endless) else data


@pytest.mark.parametrize(("options", "data"), ENDLESS)
def test_endless_training_needs_constants(options: dict, data) -> None:
    with raises_one_line(ValueError, match="no known end; set max_steps"):
        trainer(ExitWeights(EarlyToLate()), **options).fit(TinyModule(), endless(data()))
    for weighting in (Uniform(), LinearInDepth(), EarlyToLate(ease=Constant(0.5)), PerExit((Constant(1.0),) * 3)):
        module = TinyModule()
        trainer(ExitWeights(weighting), StopAfter(3), min_epochs=0, **options).fit(module, endless(data()))
        assert module.seen == profile(weighting, 0, 0, 0)


@pytest.mark.parametrize(("options", "data"), ENDLESS)
def test_max_steps_is_an_end(options: dict, data) -> None:
    module = TinyModule()
    trainer(ExitWeights(EarlyToLate()), max_steps=5, **options).fit(module, endless(data()))
    assert module.seen == profile(EarlyToLate(), 0, 1 / 4, 2 / 4, 3 / 4, 1)


@pytest.mark.parametrize("options", [{}, {"max_steps": 6, "max_epochs": -1}])
def test_manual_optimisation(options: dict) -> None:
    module = ByHand()
    trainer(ExitWeights(EarlyToLate()), **options).fit(module, loader(3))
    batches = options.get("max_steps", 12) // 2
    assert module.seen == profile(EarlyToLate(), *(k / (batches - 1) for k in range(batches)))


def test_callback_serves_a_second_fit() -> None:
    callback, modules = ExitWeights(EarlyToLate()), [TinyModule(), TinyModule()]
    trainer(callback, max_epochs=1).fit(modules[0], loader(2))
    trainer(callback, max_epochs=1).fit(modules[1], loader(3))
    assert modules[0].seen == profile(EarlyToLate(), 0, 1)
    assert modules[1].seen == profile(EarlyToLate(), 0, 0.5, 1)


class NoNet(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net.backbone
        del self.net


class TwoNets(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.other = TinyModule().net


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoNet, "ExitWeights needs one ExitNet in NoNet and found none"),
        (TwoNets, "ExitWeights needs one ExitNet in TwoNets and found 2 of them"),
    ],
)
def test_module_needs_exactly_one_network(module: type[TinyModule], message: str) -> None:
    with raises_one_line(ValueError, match=message):
        trainer(ExitWeights(EarlyToLate())).fit(module(), loader())


def test_wrong_number_of_schedules() -> None:
    module = TinyModule()
    with pytest.raises(ValueError, match="gives 1 weights, this network has 3 exits"):
        trainer(ExitWeights(PerExit((Constant(1.0),)))).fit(module, loader())
    assert not module.seen
