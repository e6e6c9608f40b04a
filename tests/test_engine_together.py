"""Engines that share batches answer as each bundle by itself, and one disturbs no other."""

import functools
import threading
from collections import deque
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served import COSTS, Gate, photos, tensors, until
from test_together import bundle

from dynadapter import Adapter, Engine, FacT, LoRA, Patience
from dynadapter.exits.combining import Combined, decision, with_decision, with_threshold
from dynadapter.exits.policies import AtExit, Confidence, Never, Policy, Thresholded, route
from dynadapter.exits.temperature import Scaled
from dynadapter.images.reading import UnreadableImage
from dynadapter.serve.bundle import Bundle
from dynadapter.serve.requests import Closed, Failed, Full, Limits, Served
from dynadapter.serve.stages import Waiting, count
from dynadapter.serve.worker import Worker

IMAGES = tensors(40)
EXITS = len(COSTS.macs)
HEATS = (2.0, 1.5, 0.7)
NAMES = ("flowers", "birds", "cars")
POLICIES: dict[str, tuple[Policy, Policy, Policy]] = {
    "confidence": (Confidence(0.35), Confidence(0.57), Confidence(0.57)),
    "combined": (
        Scaled(Combined(Confidence(0.27), by="mean"), HEATS),
        Combined(Confidence(0.5)),
        Combined(Never(), by="mean"),
    ),
    "last exit": (Never(), Never(), Scaled(Never(), HEATS)),
    "other": (Patience(2), AtExit(1), AtExit(2)),
}


@functools.cache
def bundles(policies: str = "confidence") -> dict[str, Bundle]:
    """Three tasks with other classes, adapters and policies."""
    kinds, classes, parts = (LoRA(rank=2), FacT(rank=2), None), (5, 3, 8), {"costs": COSTS}
    made = zip(NAMES, kinds, classes, POLICIES[policies], strict=True)
    return {
        name: bundle(kind, number, "vit", seed, policy, parts=parts)
        for seed, (name, kind, number, policy) in enumerate(made)
    }


def engines_of(policies: str = "confidence", **options) -> dict[str, Engine]:
    return Engine.together(bundles(policies), **options)


class Serving:
    """Engines of three tasks, closed at the end."""

    def __init__(self, policies: str = "confidence", **options) -> None:
        self.engines = engines_of(policies, **options)

    def __enter__(self) -> dict[str, Engine]:
        return self.engines

    def __exit__(self, *_: object) -> None:
        for engine in self.engines.values():
            engine.close()


def worker(engines: dict[str, Engine]) -> Worker:
    [one] = {engine._worker for engine in engines.values()}
    return one


def waiting(engines: dict[str, Engine]) -> int:
    return sum(count(queue) for queues in worker(engines).queues for queue in queues)


def its_policy(policies: str, name: str, threshold: float | None) -> Policy:
    own = bundles(policies)[name].policy
    return own if threshold is None or not isinstance(decision(own), Thresholded) else with_threshold(own, threshold)


@functools.cache
def alone(policies: str, name: str, policy: Policy) -> tuple[list[int], torch.Tensor]:
    """The exits and the probabilities of all images by a bundle itself, one image at a time."""
    one = bundles(policies)[name]
    routed = [one.route(image, policy) for image in IMAGES.split(1)]
    return [int(each.exit_index) for each in routed], torch.cat([each.logits for each in routed]).softmax(-1)


@functools.cache
def clear(policies: str, name: str, policy: Policy) -> list[int]:
    """The images that are not on the threshold."""
    if not isinstance(now := decision(policy), Thresholded):
        return list(range(len(IMAGES)))
    with torch.no_grad():
        logits = bundles(policies)[name].net(IMAGES)
    near = [route(with_threshold(policy, now.threshold + step), logits) for step in (-1e-3, 1e-3)]
    return (near[0] == near[1]).nonzero()[:, 0].tolist()


def check(answer: Served, policies: str, name: str, image: int, limits: Limits = Limits()) -> None:  # noqa: B008
    """Compare an answer with that of the bundle by itself."""
    policy = its_policy(policies, name, limits.threshold)
    wanted = alone(policies, name, policy)[0][image]
    reached = min(wanted, sum(cost <= (limits.max_gmacs or 9) for cost in COSTS.gmacs) - 1)
    assert answer.exit_index == reached
    assert (answer.limited == "max_gmacs") == (reached < wanted)
    if reached < EXITS - 1:
        policy = with_decision(policy, AtExit(reached + 1))
    probabilities = alone(policies, name, policy)[1][image]
    torch.testing.assert_close(answer.probabilities, probabilities, rtol=1e-4, atol=1e-5)


# ---- the same answers


@pytest.mark.parametrize("policies", POLICIES)
@settings(max_examples=4, deadline=None)
@given(
    chosen=st.lists(
        st.tuples(
            st.sampled_from(NAMES),
            st.integers(0, 39),
            st.sampled_from([None, 0.25, 0.5, 0.9]),
            st.sampled_from([None, 1.0, 2.5]),
            st.booleans(),
        ),
        min_size=2,
        max_size=40,
    ),
    batch=st.integers(1, 12),
    wait=st.sampled_from([0.0, 0.02]),
    threads=st.integers(1, 4),
)
def test_answers_equal_each_bundle_alone(policies, chosen, batch, wait, threads):
    requests = []
    for name, number, threshold, gmacs, hurried in chosen:
        policy = its_policy(policies, name, threshold)
        threshold = threshold if isinstance(decision(policy), Thresholded) else None
        images = clear(policies, name, policy)
        requests.append((name, images[number % len(images)], Limits(threshold, gmacs, 60 if hurried else None)))
    options = {"batch": batch, "queue": 128, "wait": wait}
    with Serving(policies, **options) as engines, ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(lambda one: engines[one[0]].submit(IMAGES[one[1]], one[2]).result(60), requests))
        for (name, image, limits), answer in zip(requests, answers, strict=True):
            check(answer, policies, name, image, limits)
        for name, engine in engines.items():
            exits = [answer.exit_index for (one, *_), answer in zip(requests, answers, strict=True) if one == name]
            assert engine.counts.exits == [exits.count(k) for k in range(EXITS)]
            assert engine.counts.images[0] == len(exits)
            assert engine.counts.images == [sum(exit_index >= k for exit_index in exits) for k in range(EXITS)]
            assert engine.taken == 0


def test_the_tasks_stop_at_several_exits():
    """Otherwise the test above would compare little."""
    taken = [{*alone("confidence", name, one.policy)[0]} for name, one in bundles().items()]
    assert all(len(exits) > 1 for exits in taken)
    assert len(set.union(*taken)) == EXITS
    assert len({*alone("other", "flowers", Patience(2))[0]}) > 1


def test_a_batch_of_several_tasks_runs_once():
    gate, sizes = Gate(), {0: [], 2: [], 4: []}
    with Serving("last exit", batch=8, compute=gate, wait=60) as engines:
        blocks = worker(engines)._step.__self__.net.backbone.blocks
        for place, seen in sizes.items():  # the first block of each stage
            blocks[place].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
        with gate.closed():
            first = engines["flowers"].submit(IMAGES[0])
            gate.holds()
            jobs = [(name, k, engines[name].submit(IMAGES[k])) for k in range(4) for name in ("cars", "flowers")]
            until(lambda: waiting(engines) == 8)
        for name, k, job in [("flowers", 0, first), *jobs]:
            check(job.result(60), "last exit", name, k)
    assert sizes == {0: [1, 8], 2: [8, 1], 4: [8, 1]}
    assert engines["flowers"].counts.images == [5] * 3
    assert engines["cars"].counts.images == [4] * 3
    assert engines["flowers"].counts.runs[0] == 2
    assert engines["cars"].counts.runs == [1, 1, 1]
    assert engines["birds"].counts.runs == [0, 0, 0]
    assert engines["flowers"].counts.seconds > engines["cars"].counts.seconds > 0 == engines["birds"].counts.seconds


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=2, max_size=4), batch=st.integers(1, 12))
def test_tasks_share_a_batch_evenly(sizes, batch):
    made = Worker(lambda *_: ((), {}), 1, batch, 0.0, None, "test")
    for task, size in enumerate(sizes):
        made.queues[0].append(deque(Waiting([(task, k)], 0.0, (torch.zeros(1),)) for k in range(size)))
    taken = made._take(0)
    assert list(taken) == sorted(taken)
    numbers = [len(taken.get(task, [])) for task in range(len(sizes))]
    assert sum(numbers) == min(batch, sum(sizes))
    assert [[part.items[0][1] for part in taken.get(task, [])] for task in range(len(sizes))] == [
        list(range(number)) for number in numbers
    ]
    assert 0 not in numbers or batch < len(sizes) or 0 in sizes
    left_out = [number for number, size in zip(numbers, sizes, strict=True) if number < size]
    assert all(number + 1 >= max(numbers) for number in left_out)  # who gets more needs it no more than these


def test_no_task_waits_for_ever():
    made = Worker(lambda *_: ((), {}), 1, 1, 0.0, None, "test")
    made.queues[0] = [deque(Waiting([0], 1.0, (torch.zeros(1),)) for _ in range(9)), deque()]
    served = []
    for now in range(2, 7):  # a new sample of task 1 each time
        made.queues[0][1].append(Waiting([1], float(now), (torch.zeros(1),)))
        served += made._take(0)
    assert 0 in served


# ---- one disturbs no other


def test_load_of_one_task_is_its_own():
    gate = Gate()
    with Serving("last exit", batch=2, queue=12, compute=gate, window=1) as engines:
        flowers, birds = engines["flowers"], engines["birds"]
        with gate.closed():
            many = [flowers.submit(image) for image in IMAGES[:12]]
            with pytest.raises(Full, match="12 images wait already"):
                flowers.submit(IMAGES[0])
            assert (flowers.open_exits(), birds.open_exits()) == (1, EXITS)
            until(lambda: waiting(engines) >= 10)
            one = birds.submit(IMAGES[1])
            until(lambda: waiting(engines) >= 11)
        check(one.result(60), "last exit", "birds", 1)
        assert not birds.counts.limited
        assert "load" in {job.result(60).limited for job in many}


def test_retry_after_counts_the_images_of_all_tasks():
    gate = Gate()
    with Serving("last exit", batch=2, queue=12, compute=gate) as engines:
        with gate.closed():
            many = [engine.submit(image) for engine in engines.values() for image in IMAGES[:12]]
            for engine in engines.values():
                engine.counts.seconds, engine.counts.exits = 30.0, [10, *[0] * (EXITS - 1)]
            with pytest.raises(Full) as error:
                engines["flowers"].submit(IMAGES[0])
            assert error.value.retry_after == 3 * 12 * len(engines)
        for job in many:
            job.result(60)


@pytest.mark.parametrize("broken", [b"?", photos(1)[0][:60], torch.full((3, 32, 32), float("nan"))])
def test_bad_image_of_one_task(broken):
    gate = Gate()
    with Serving("last exit", batch=8, compute=gate) as engines:
        with gate.closed():
            first = engines["cars"].submit(IMAGES[0])
            gate.holds()
            bad, good = engines["flowers"].submit(broken), engines["birds"].submit(IMAGES[1])
            own = engines["flowers"].submit(IMAGES[2])
            until(lambda: waiting(engines) + sum(job.done() for job in (bad, good, own)) >= 3)
        error = bad.exception(60)
        assert isinstance(error, Failed if isinstance(broken, torch.Tensor) else UnreadableImage)
        for name, k, job in (("cars", 0, first), ("birds", 1, good), ("flowers", 2, own)):
            check(job.result(60), "last exit", name, k)


def test_failed_head_of_one_task(monkeypatch, caplog):
    gate = Gate()
    with Serving("last exit", batch=8, compute=gate) as engines, monkeypatch.context() as patch:
        net, real = engines["flowers"].bundle.net, engines["flowers"].bundle.net.head
        patch.setattr(net, "head", lambda k, x: exec("raise RuntimeError('broken')") if k == 1 else real(k, x))
        with gate.closed():
            first = engines["cars"].submit(IMAGES[0])
            gate.holds()
            jobs = [(name, k, engines[name].submit(IMAGES[k])) for k in range(3) for name in NAMES]
            until(lambda: waiting(engines) == 9)
        for name, k, job in [("cars", 0, first), *jobs]:
            if name == "flowers":
                with pytest.raises(Failed, match=r"stage 2 failed on its batch \(RuntimeError: broken\)"):
                    job.result(60)
            else:
                check(job.result(60), "last exit", name, k)
        assert all(engine.taken == 0 for engine in engines.values())
    assert "flowers: stage 2 failed on" in caplog.text
    assert "birds: stage" not in caplog.text


def test_cancelled_request_of_one_task():
    gate = Gate()
    with Serving("last exit", batch=8, compute=gate) as engines:
        with gate.closed():
            first = engines["cars"].submit(IMAGES[0])
            gate.holds()
            gone, stays = engines["flowers"].submit(IMAGES[1]), engines["birds"].submit(IMAGES[1])
            until(lambda: waiting(engines) == 2)
            assert gone.cancel()
        check(first.result(60), "last exit", "cars", 0)
        check(stays.result(60), "last exit", "birds", 1)
        with pytest.raises(CancelledError):
            gone.result(0)
        until(lambda: engines["flowers"].taken == 0)
        assert engines["flowers"].counts.runs == [0, 0, 0]


def test_deadline_of_one_task():
    with Serving("last exit") as engines:
        worker(engines).seconds = [{}, {}, {1: 1000.0, 2: 1000.0}]
        hurried = engines["flowers"].submit(IMAGES[0], Limits(deadline=500))
        free = engines["cars"].submit(IMAGES[0])
        answer = hurried.result(60)
        assert (answer.exit_index, answer.limited) == (1, "deadline")
        expected = alone("last exit", "flowers", AtExit(2))[1][0]
        torch.testing.assert_close(answer.probabilities, expected, rtol=1e-4, atol=1e-5)
        check(free.result(60), "last exit", "cars", 0)


def test_drift_is_that_of_each_task(caplog):
    measured = {"shares": [0.0, 0.0, 1.0], "samples": 1000}
    pair = {
        name: bundle(seed=seed, policy=policy, parts={"costs": COSTS, "measured": measured})
        for seed, (name, policy) in enumerate({"old": AtExit(1), "new": Never()}.items())
    }
    engines = Engine.together(pair, window=100, queue=1000)
    with engines["old"], engines["new"]:
        jobs = [engine.submit(IMAGES[k % 40]) for k in range(100) for engine in engines.values()]
        for job in jobs:
            job.result(60)
    assert engines["old"].drift.live["exit 1"] == engines["new"].drift.live["exit 3"] == 1
    assert "old: exit 1 has a share of 1.000" in caplog.text
    assert "new: " not in caplog.text


# ---- the end


def test_close_of_one_while_others_go_on():
    gate = Gate()
    with Serving("last exit", batch=4, compute=gate) as engines:
        with gate.closed():
            jobs = [(name, k, engines[name].submit(IMAGES[k])) for k in range(4) for name in NAMES]
            closing = threading.Thread(target=engines["flowers"].close)
            closing.start()
            until(lambda: engines["flowers"].closing)
            with pytest.raises(Closed, match="flowers stops and accepts no image"):
                engines["flowers"].submit(IMAGES[0])
            assert [engine.ready() for engine in engines.values()] == [False, True, True]
        closing.join(60)
        assert not closing.is_alive()
        assert all(job.done() for name, _, job in jobs if name == "flowers")
        jobs.append(("birds", 5, engines["birds"].submit(IMAGES[5])))
        for name, k, job in jobs:
            check(job.result(60), "last exit", name, k)
        assert worker(engines).thread.is_alive()
    assert not worker(engines).thread.is_alive()
    assert waiting(engines) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("by", ["submit", "ready", "close"])
def test_dead_thread_is_started_by_another(monkeypatch, by):
    with Serving("last exit") as engines:
        with monkeypatch.context() as patch:
            patch.setattr(worker(engines), "_next", lambda: exec("raise SystemExit"))
            first = engines["flowers"].submit(IMAGES[0])
            until(lambda: not worker(engines).thread.is_alive() and waiting(engines) == 1)
        if by == "submit":
            check(engines["birds"].submit(IMAGES[1]).result(60), "last exit", "birds", 1)
        elif by == "ready":
            assert engines["birds"].ready()
        else:
            engines["flowers"].close()
            assert first.done()
        check(first.result(60), "last exit", "flowers", 0)


def test_bundles_that_do_not_fit():
    one, other = bundle(), bundle(Adapter(bottleneck=2), seed=1)
    with pytest.raises(ValueError, match=r"birds cannot be in one batch with flowers: its adapter is Adapter"):
        Engine.together({"flowers": one, "birds": other})
    with pytest.raises(ValueError, match=r"birds cannot be in one batch with flowers: its adapter is Adapter"):
        Engine.together({"birds": other, "flowers": one})
    half = bundle()
    half.net.bfloat16()
    with pytest.raises(ValueError, match="differs, because a bundle is merged, on another device or of another type"):
        Engine.together({"flowers": one, "birds": half})
    with pytest.raises(ValueError, match="give at least two"):
        Engine.together({"flowers": one})
    with pytest.raises(ValueError, match="queue=16 must be above batch=16"):
        Engine.together({"flowers": one, "birds": bundle(seed=1)}, queue=16)
