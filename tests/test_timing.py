"""Timing: clocks, order of the arms, ratios, thresholds for given shares."""

import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynadapter.bench import timing
from dynadapter.bench.timing import (
    Times,
    best_chunk,
    clock_of,
    cpu_name,
    interleave,
    is_void,
    machine,
    percentile,
    ratio,
    representative,
    share_thresholds,
)
from dynadapter.exits.policies import route

CPU = torch.device("cpu")


# ---- clocks


def test_arms_run_once_a_round_in_new_order():
    seen: list[str] = []
    arms = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = interleave(arms, rounds=20, warmup=3)
    assert len(seen) == 3 * 23
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(round) == ["a", "b", "c"] for round in rounds)
    assert len(set(rounds)) > 3  # a before b, and b before a
    assert list(times) == ["a", "b", "c"]
    assert all(len(arm.cpu) == len(arm.wall) == 20 and not arm.device for arm in times.values())


def test_order_is_reproducible():
    orders = []
    for _ in range(2):
        seen: list[str] = []
        interleave({name: (lambda name=name, seen=seen: seen.append(name)) for name in "abcd"}, rounds=5)
        orders.append(seen)
    assert orders[0] == orders[1]


def test_calls_are_timed_one_by_one():
    seen: list[int] = []
    ticks: list[None] = []
    times = interleave(
        {"one": [lambda k=k: seen.append(k) for k in range(3)]}, 2, warmup=1, after=lambda: ticks.append(None)
    )
    assert seen == [0, 1, 2] * 3
    assert len(ticks) == 3
    assert [len(calls) for calls in times["one"].wall] == [3, 3]
    assert len(times["one"].calls("cpu")) == 6


def test_sleep_counts_on_wall_clock_alone():
    times = interleave({"sleep": lambda: time.sleep(0.02)}, 3)["sleep"]
    assert min(times.rounds("wall")) >= 0.02
    assert max(times.rounds("cpu")) < 0.02


def test_gpu_times_are_between_two_events(monkeypatch):
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            done.append(f"record on {stream}")

        def elapsed_time(self, end: "Event") -> float:
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    times = interleave({"arm": lambda: done.append("call")}, 2, warmup=0, device="cuda")["arm"]
    assert done == ["wait", "record on stream", "call", "record on stream", "wait"] * 2
    assert times.rounds("device") == [0.25, 0.25]
    assert len(times.cpu) == len(times.wall) == 2


def test_rounds_sum_their_calls():
    times = Times([[1.0, 2.0], [3.0]], [[4.0], [5.0]], [])
    assert times.rounds("cpu") == [3.0, 3.0]
    assert times.calls("cpu") == [1.0, 2.0, 3.0]
    assert times.rounds("device") == []


def test_clock_by_device_and_threads():
    assert clock_of(CPU, 1) == "cpu"
    assert clock_of(CPU, 2) == "wall"
    assert clock_of(torch.device("cuda"), 1) == "device"


def test_ratio_is_the_median_of_rounds():
    assert ratio([2, 4, 30], [1, 2, 3]) == 2
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2], [1])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_percentiles_of_a_list(values):
    assert percentile(values, 0.5) == pytest.approx(statistics.median(values))
    assert percentile(values, 0) == min(values)
    assert percentile(values, 1) == max(values)


def test_void_beyond_three_percent():
    assert not any(map(is_void, (1.0, 0.971, 1.029)))
    assert all(map(is_void, (0.96, 1.04, float("nan"))))


def test_best_chunk_is_the_fastest():
    def make(chunk: int):
        return lambda: time.sleep(0.001 if chunk == 16 else 0.02)

    assert best_chunk(make, 64, "wall") == 16
    assert best_chunk(make, 8, "wall") == 8  # nothing below it to try
    assert best_chunk(make, 17, "wall") == 16


def test_machine_names_installed_packages():
    found = machine(("torch", "no-such-package"))
    assert found["cpu"] == cpu_name() != ""
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert "no-such-package" not in found


# ---- exit shares


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=5).filter(lambda parts: sum(parts) > 0.1),
    st.integers(1, 60),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_thresholds_give_the_wanted_shares(parts, samples, seed):
    shares = [part / sum(parts) for part in parts]
    logits = torch.randn(len(shares), samples, 4, generator=torch.Generator().manual_seed(seed))
    exits = route(share_thresholds(logits, shares), logits)
    left = samples
    for k, share in enumerate(shares[:-1]):
        wanted = min(round(share * samples), left)
        assert int((exits == k).sum()) == wanted
        left -= wanted
    assert int((exits == len(shares) - 1).sum()) == left


def test_equal_confidences_exit_together():
    logits = torch.zeros(2, 6, 3)
    assert route(share_thresholds(logits, (0.5, 0.5)), logits).unique().numel() == 1


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.4, 0.2), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)])
def test_invalid_shares_are_refused(shares):
    with pytest.raises(ValueError, match="must be 3 numbers, one for each exit"):
        share_thresholds(torch.zeros(3, 4, 2), shares)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.integers(1, 70))
@settings(deadline=None, max_examples=60)
def test_picked_samples_keep_the_exit_shares(exits, count):
    exits = torch.tensor(exits)
    picked = representative(exits, count)
    assert len(picked) == count
    for k in range(4):
        share, reached = (exits == k).double().mean(), (exits[picked] == k).double().mean()
        assert abs(share - reached) <= 1 / count + 1e-9
    if count <= len(exits):
        assert len(picked.unique()) == count


def test_clocks_are_the_fields_of_times():
    assert set(timing.Clock.__args__) == set(Times.__dataclass_fields__)  # type: ignore[attr-defined]
