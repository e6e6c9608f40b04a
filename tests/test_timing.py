"""Timing: what is counted and in which order, shares that come out, and the benchmark programs on a small backbone."""

import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

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

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


# ---- clocks


def test_every_arm_runs_in_every_round_and_the_order_changes():
    seen: list[str] = []
    arms = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = interleave(arms, rounds=20, warmup=3)
    assert len(seen) == 3 * 23
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(round) == ["a", "b", "c"] for round in rounds)
    assert len(set(rounds)) > 3  # a before b, and b before a
    assert list(times) == ["a", "b", "c"]
    assert all(len(arm.cpu) == len(arm.wall) == 20 and not arm.device for arm in times.values())


def test_the_order_is_the_same_every_time():
    orders = []
    for _ in range(2):
        seen: list[str] = []
        interleave({name: (lambda name=name, seen=seen: seen.append(name)) for name in "abcd"}, rounds=5)
        orders.append(seen)
    assert orders[0] == orders[1]


def test_the_calls_of_an_arm_follow_each_other_and_are_timed_one_by_one():
    seen: list[int] = []
    ticks: list[None] = []
    times = interleave(
        {"one": [lambda k=k: seen.append(k) for k in range(3)]}, 2, warmup=1, after=lambda: ticks.append(None)
    )
    assert seen == [0, 1, 2] * 3
    assert len(ticks) == 3
    assert [len(calls) for calls in times["one"].wall] == [3, 3]
    assert len(times["one"].calls("cpu")) == 6


def test_sleep_takes_time_on_the_wall_and_none_of_the_processor():
    times = interleave({"sleep": lambda: time.sleep(0.02)}, 3)["sleep"]
    assert min(times.rounds("wall")) >= 0.02
    assert max(times.rounds("cpu")) < 0.02


def test_on_a_gpu_events_count_and_the_device_is_waited_for(monkeypatch):
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


def test_rounds_add_up_their_calls():
    times = Times([[1.0, 2.0], [3.0]], [[4.0], [5.0]], [])
    assert times.rounds("cpu") == [3.0, 3.0]
    assert times.calls("cpu") == [1.0, 2.0, 3.0]
    assert times.rounds("device") == []


def test_the_clock_that_counts():
    assert clock_of(CPU, 1) == "cpu"
    assert clock_of(CPU, 2) == "wall"
    assert clock_of(torch.device("cuda"), 1) == "device"


def test_a_ratio_is_the_median_round_by_round():
    assert ratio([2, 4, 30], [1, 2, 3]) == 2
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2], [1])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_the_middle_percentile_is_the_median(values):
    assert percentile(values, 0.5) == pytest.approx(statistics.median(values))
    assert percentile(values, 0) == min(values)
    assert percentile(values, 1) == max(values)


def test_void():
    assert not any(map(is_void, (1.0, 0.971, 1.029)))
    assert all(map(is_void, (0.96, 1.04, float("nan"))))


def test_the_best_chunk_is_the_fastest():
    def make(chunk: int):
        return lambda: time.sleep(0.001 if chunk == 16 else 0.02)

    assert best_chunk(make, 64, "wall") == 16
    assert best_chunk(make, 8, "wall") == 8  # nothing below it to try
    assert best_chunk(make, 17, "wall") == 16


def test_the_machine_has_a_name_and_what_is_not_installed_is_left_out():
    found = machine(("torch", "no-such-package"))
    assert found["cpu"] == cpu_name() != ""
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert "no-such-package" not in found


# ---- who leaves where


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=5).filter(lambda parts: sum(parts) > 0.1),
    st.integers(1, 60),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_the_wanted_shares_leave(parts, samples, seed):
    shares = [part / sum(parts) for part in parts]
    logits = torch.randn(len(shares), samples, 4, generator=torch.Generator().manual_seed(seed))
    exits = route(share_thresholds(logits, shares), logits)
    left = samples
    for k, share in enumerate(shares[:-1]):
        wanted = min(round(share * samples), left)
        assert int((exits == k).sum()) == wanted
        left -= wanted
    assert int((exits == len(shares) - 1).sum()) == left


def test_samples_with_one_confidence_leave_together():
    logits = torch.zeros(2, 6, 3)
    assert route(share_thresholds(logits, (0.5, 0.5)), logits).unique().numel() == 1


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.4, 0.2), (1.5, -0.5, 0.0), (float("nan"), 0.5, 0.5)])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match="must be 3 numbers, one for each exit"):
        share_thresholds(torch.zeros(3, 4, 2), shares)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=50), st.integers(1, 70))
@settings(deadline=None, max_examples=60)
def test_the_samples_picked_stand_for_all(exits, count):
    exits = torch.tensor(exits)
    picked = representative(exits, count)
    assert len(picked) == count
    for k in range(4):
        share, reached = (exits == k).double().mean(), (exits[picked] == k).double().mean()
        assert abs(share - reached) <= 1 / count + 1e-9
    if count <= len(exits):
        assert len(picked.unique()) == count


# ---- the benchmark programs


@pytest.fixture(scope="module")
def program():
    """Imports a program of the folder of benchmarks."""
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    yield lambda name: __import__(name)
    sys.path.remove(str(BENCHMARKS))
    for name in {"common", "latency", "serving", "adapters"} & (set(sys.modules) - before):
        del sys.modules[name]


TINY: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
}


def test_a_run_is_found_on_its_own_machine_alone(program, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)  # it would be in the key
    common: ModuleType = program("common")
    file = tmp_path / "log.jsonl"
    key = {"backbone": "tiny", "batch": 1}
    old = {"key": key, "value": 1, "machine": {"cpu": cpu_name()}}  # from before the processor was in the key
    other = {"key": {"cpu": "another"} | key, "value": 2, "machine": {"cpu": "another"}}
    older = {"key": {"backbone": "big"}, "value": 3, "machine": {"cpu": "another"}}
    file.write_text("".join(json.dumps(line) + "\n" for line in (other, older, old)))
    log = common.Log(file)
    assert log.find(key)["value"] == 1
    assert log.find({"backbone": "big"}) is None
    log.add({"backbone": "big"}, value=4)
    lines = file.read_text().splitlines()
    assert lines[:3] == [json.dumps(line) for line in (other, older, old)]
    assert json.loads(lines[3])["key"] == {"cpu": cpu_name(), "backbone": "big"}
    assert common.Log(file).find({"backbone": "big"})["value"] == 4


def test_a_log_that_was_cut_short_is_said_to_be(program, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"key": {}}\n{"ke')
    with pytest.raises(SystemExit, match="ends in the middle of a line"):
        program("common").Log(file)


def test_the_results_that_are_there_can_be_read(program):
    common = program("common")
    for file in common.RESULTS.glob("*.jsonl"):
        for line in common.Log(file).lines:
            assert {"key", "machine", "time"} <= line.keys()


def test_latency(program):
    latency = program("latency")
    backbone, net = program("common").build(**TINY)
    assert net.exit_depths == (1, 2, 3, 4)
    line = latency.case(backbone, net, copy.deepcopy(backbone), batch=5, size=32, rounds=2)
    assert line["static_chunk"] == 5
    assert json.loads(json.dumps(line)) == line
    got = line["50/30/15/5 plain"]
    assert got["shares"] == [0.5, 0.3, 0.15, 0.05]
    assert got["efficiency"] == pytest.approx(got["speedup"] / got["mac_speedup"])
    assert line["25/25/25/25 class first"]["shares"] == [0.25] * 4
    assert line["all last plain"]["shares"] == [0, 0, 0, 1]
    assert line["50/30/15/5 class first"]["mac_speedup"] > got["mac_speedup"] > 1
    assert set(line["milliseconds"]) == set(line["seconds"])
    alone = zip(line["seconds"]["50/30/15/5 stages alone"], line["seconds"]["50/30/15/5 plain"], strict=True)
    assert got["of_stages_alone"] == pytest.approx(statistics.median(a / b for a, b in alone))
    assert {"backbone, our blocks", "control"} < set(line["seconds"])
    # As slow as the machine may be at this moment, the sums are these.
    lines = {batch: {"one": {"speedup": s}} for batch, s in {1: 1.2, 8: 0.9, 64: 1.1, 256: 1.5}.items()}
    assert latency.pays_from(lines, "one") == 64
    assert latency.pays_from({1: {"one": {"speedup": 0.5}}}, "one") is None


def test_latency_prints_what_is_done(program, tmp_path, monkeypatch, capsys):
    latency = program("latency")
    monkeypatch.setattr(latency, "CASES", {"cpu": ({"tiny": TINY}, (2,), torch.float32), "cuda": ({}, (), None)})
    argv = ["latency.py", "--rounds", "2", "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", argv)
    latency.main()
    first = capsys.readouterr().out
    assert "50/30/15/5 class first" in first
    monkeypatch.setattr(latency, "case", None)  # is not called again
    latency.main()
    assert capsys.readouterr().out == first
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", [*argv, "--device", "cuda"])
        with pytest.raises(SystemExit, match="no CUDA device"):
            latency.main()


def test_serving_a_flow(program):
    _, net = program("common").build(**TINY)
    line = program("serving").stream_case(net, size=32, flow=20, rounds=2)
    plain, stream = line["50/30/15/5 plain"], line["50/30/15/5 Stream of 8"]
    assert plain["shares"] == stream["shares"] == [0.5, 0.3, 0.15, 0.05]
    assert stream["same_exits"] == 1
    assert plain["over_plain"] == 1
    assert 0 < stream["waits_for"]["mean"] <= stream["waits_for"]["most"] < 20
    assert json.loads(json.dumps(line)) == line


@pytest.mark.slow
def test_serving_with_onnx(program, tmp_path):
    pytest.importorskip("onnxscript")
    serving = program("serving")
    _, net = program("common").build(**TINY)
    line = serving.onnx_case(net, serving.Exported(net, 32, tmp_path), size=32, batch=2, rounds=2)
    got = line["50/30/15/5 class first"]
    assert got["shares"] == [0.5, 0.3, 0.15, 0.05]
    assert got["efficiency"] == pytest.approx(got["speedup"] / got["mac_speedup"])
    assert line["torch static"]["speedup"] > 0
    assert json.loads(json.dumps(line)) == line


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning", "ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.parametrize("batch", [1, 4])
def test_serving_beside_rivals(program, monkeypatch, batch):
    serving = program("serving")
    monkeypatch.setattr(serving, "COMPILE", {"backend": "eager"})
    line = serving.rivals_case(TINY, batch, rounds=2)
    wanted = [0.5, 0.3, 0.15, 0.05]
    assert line["routing"]["shares"] == wanted
    assert line["routing, LoRA unmerged"]["mac_speedup"] < line["routing"]["mac_speedup"]
    for arm, package in (("peft LoRA merged", "peft"), ("earlyon", "earlyon")):
        if arm in line:
            assert line[arm]["speedup"] > 0
        else:
            assert any(
                note.startswith(f"{arm}: ModuleNotFoundError: No module named '{package}") for note in line["notes"]
            )
    if "earlyon" in line and batch == 1:
        assert line["earlyon"]["shares"] == wanted
    assert json.loads(json.dumps(line)) == line


def test_adapters_on_a_block(program):
    adapters = program("adapters")
    line = adapters.case(
        "vit_tiny_patch16_224", 2, 2, rows=100, tokens=17, embed_dim=48, num_heads=3, img_size=32, patch_size=8
    )
    assert line["repeats"] == 2
    assert {"LoRA merged", "RepAdapter", "Adapter", "AdaptFormer", "RepAdapter as conv1d"} <= line["ratios"].keys()
    assert ("peft LoRA" in line["ratios"]) == (not line["notes"])
    assert json.loads(json.dumps(line)) == line


def test_the_convolutional_form_is_repadapter(program):
    adapters = program("adapters")
    base = torch.nn.Linear(16, 24)
    layer = adapters.Convolutions(base).eval()
    backbone = torch.nn.ModuleDict({"qkv": base})
    from dynadapter.adapters import RepAdapter

    own = RepAdapter(targets=("qkv",)).wrap(backbone, "qkv")
    with torch.no_grad():
        own.down.copy_(layer.down.weight[..., 0])
        own.down_bias.copy_(layer.down.bias)
        own.up.copy_(layer.up.weight[..., 0])
        own.up_bias.copy_(layer.up.bias)
        x = torch.randn(2, 7, 16)
        torch.testing.assert_close(own.eval()(x), layer(x))


def test_the_clocks_are_the_fields_of_times():
    assert set(timing.Clock.__args__) == set(Times.__dataclass_fields__)  # type: ignore[attr-defined]
