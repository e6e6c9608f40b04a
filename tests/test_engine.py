"""The serving engine answers as the network alone does, whatever runs beside an image, and loses no request."""

import gc
import threading
import time
import weakref
from collections import deque
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served import COSTS, Gate, fails_at, make_bundle, make_net, photos, tensors, until
from test_together import bundle as task

from dynadapter.exits.combining import Combined, with_threshold
from dynadapter.exits.policies import Confidence, Entropy, Never, Patience, combined, route
from dynadapter.exits.temperature import Scaled
from dynadapter.images.reading import UnreadableImage
from dynadapter.serve.engine import Engine, _rounded_up
from dynadapter.serve.requests import Closed, Failed, Full, Job, Late, Limits
from dynadapter.serve.stages import Waiting, count, joined, pop
from dynadapter.serve.worker import DOUBT, ExitPredictions

NET = make_net()
IMAGES = tensors(40)
with torch.no_grad():
    LOGITS = torch.cat([NET(image) for image in IMAGES.split(1)], dim=1)  # (exits, images, classes), each alone
HEATS = (2.0, 1.5, 0.7)
POLICIES = [
    Confidence(0.6),
    Scaled(Combined(Confidence(0.5), by="mean"), HEATS),
    Entropy(0.5),
    Patience(2),
    Never(),
    Scaled(Never(), HEATS),
]
STRICT = Confidence(1.0)


def waiting(engine: Engine) -> int:
    return sum(count(queue) for queues in engine._worker.queues for queue in queues)


def engine_of(policy=STRICT, **options) -> Engine:
    return Engine(make_bundle(policy, NET), **options)


def expected(policy, image: int, limits: Limits) -> tuple[int, torch.Tensor]:
    """The exit and the probabilities of an image by the logits of all exits, without an engine."""
    if limits.threshold is not None:
        policy = with_threshold(policy, limits.threshold)
    logits = LOGITS[:, image : image + 1]
    exit_index = int(route(policy, logits))
    if limits.max_gmacs is not None:
        exit_index = min(exit_index, sum(cost <= limits.max_gmacs for cost in COSTS.gmacs) - 1)
    if isinstance(policy, Scaled) and isinstance(policy.policy, Never):
        return exit_index, (logits[exit_index, 0] / HEATS[exit_index]).softmax(-1)
    return exit_index, combined(policy, logits[: exit_index + 1])[-1, 0].softmax(-1)


# ---- the same answers


@settings(max_examples=12, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    chosen=st.lists(
        st.tuples(
            st.integers(0, 39), st.sampled_from([None, 0.3, 0.9]), st.sampled_from([None, 1.0, 2.5]), st.booleans()
        ),
        max_size=30,
    ),
    batch=st.integers(1, 9),
    wait=st.sampled_from([0.0, 0.02]),
    threads=st.integers(1, 4),
)
def test_answers_equal_routing_alone(policy, chosen, batch, wait, threads):
    thresholds = policy.__class__ in (Confidence, Entropy)
    requests = [(k, Limits(t if thresholds else None, g, 60 if d else None)) for k, t, g, d in chosen]
    with (
        Engine(make_bundle(policy, NET), batch=batch, queue=64 + 16, wait=wait) as engine,
        ThreadPoolExecutor(threads) as pool,
    ):
        answers = list(pool.map(lambda one: engine.submit(IMAGES[one[0]], one[1]).result(60), requests))
    for (image, limits), answer in zip(requests, answers, strict=True):
        exit_index, probabilities = expected(policy, image, limits)
        assert answer.exit_index == exit_index
        torch.testing.assert_close(answer.probabilities, probabilities, rtol=1e-4, atol=1e-5)
        assert (answer.limited == "max_gmacs") == (exit_index < int(route(_own(policy, limits), LOGITS[:, [image]])))
    assert engine.taken == 0


def _own(policy, limits):
    return policy if limits.threshold is None else with_threshold(policy, limits.threshold)


def test_files_are_read_as_by_the_bundle():
    bundle, files = make_bundle(Confidence(0.6), NET), photos(6)
    with Engine(bundle) as engine:
        answers = [engine.submit(file).result(60) for file in files]
    for answer, prediction in zip(answers, bundle.predict(files, batch_size=1), strict=True):
        assert bundle.class_names[int(answer.probabilities.argmax())] == prediction.label
        assert answer.exit_index == prediction.exit_index
        assert float(answer.probabilities.max()) == pytest.approx(prediction.confidence, abs=1e-5)


def test_deep_stages_run_full():
    gate = Gate()
    with engine_of(batch=8, queue=64, compute=gate, wait=60) as engine:
        with gate.closed():
            futures = [engine.submit(image) for image in IMAGES[:32]]
            until(lambda: waiting(engine) >= 24)
        for future in futures:
            future.result(60)
    assert engine.counts.images == [32] * 3
    assert engine.counts.runs[1:] == [4, 4]


@pytest.mark.parametrize("deadline", [None, 500])
def test_choice_of_a_stage_counts_its_images_once(deadline, monkeypatch):
    calls = []
    monkeypatch.setattr("dynadapter.serve.worker.count", lambda queue: calls.append(queue) or count(queue))
    with engine_of(batch=64, queue=100, wait=60) as engine:
        parts = [Waiting([engine._job(image, Limits(deadline=deadline))], time.monotonic(), ()) for image in IMAGES]
        engine._worker.queues[0][0].extend(parts)
        assert engine._worker._next() == 0
        assert len(calls) == 1
        engine._worker.queues[0][0].clear()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), most=st.integers(1, 12))
def test_queue_keeps_order_and_rows(sizes, most):
    rows = torch.arange(sum(sizes))
    queue, start = deque(), 0
    for size in sizes:
        part = rows[start : start + size]
        queue.append(Waiting(part.tolist(), float(start), (part, part[:, None]), torch.stack([part, part])))
        start += size
    seen: list[int] = []
    while queue:
        left = count(queue)
        now = joined(pop(queue, most))
        assert len(now.items) == min(most, left)
        assert count(queue) == left - len(now.items)
        assert now.inputs[0].tolist() == now.inputs[1][:, 0].tolist() == now.history[1].tolist() == now.items
        odd = now.chosen([row for row, item in enumerate(now.items) if item % 2])
        assert odd.inputs[0].tolist() == odd.history[0].tolist() == odd.items == [k for k in now.items if k % 2]
        seen += now.items
    assert seen == rows.tolist()


# ---- budgets and load


def test_full_queue_refuses():
    gate = Gate()
    with engine_of(batch=2, queue=5, compute=gate) as engine:
        with gate.closed():
            futures = [engine.submit(image) for image in IMAGES[:5]]
            assert engine.is_full()
            with pytest.raises(Full, match="5 images wait already") as error:
                engine.submit(IMAGES[5])
            assert error.value.retry_after >= 1
        assert all(future.result(60).exit_index < 3 for future in futures)
        until(lambda: engine.taken == 0)
        assert engine.submit(IMAGES[5]).result(60).exit_index == 2


def test_exits_close_before_any_is_refused():
    gate = Gate()
    with engine_of(batch=2, queue=20, compute=gate, window=1) as engine:
        assert engine.open_exits() == 3
        with gate.closed():
            futures, open_exits = [], []
            for image in IMAGES[:20]:
                futures.append(engine.submit(image))
                open_exits.append(engine.open_exits())
        answers = [future.result(60) for future in futures]
    assert open_exits == sorted(open_exits, reverse=True)
    assert {*open_exits} == {3, 2, 1}
    assert open_exits[10:12] == [3, 2]  # half of the places to wait, a batch left out, and one more
    limited = [answer for answer in answers if answer.limited == "load"]  # the first may be read before the others come
    assert 0 in {answer.exit_index for answer in limited}
    assert (answers[-1].exit_index, answers[-1].limited) == (2, None)
    assert engine.counts.limited["load"] + engine.counts.exits[2] == 20


@settings(max_examples=100, deadline=None)
@given(exits=st.integers(1, 12), batch=st.integers(1, 20), places=st.integers(1, 300))
def test_exits_close_in_even_steps(exits, batch, places):
    def opened(taken):
        return Engine.open_exits(SimpleNamespace(exits=exits, batch=batch, queue=batch + places, taken=taken))

    found = [opened(taken) for taken in range(batch + places + 1)]
    waiting = [max(0, taken - batch) for taken in range(len(found))]
    assert found == sorted(found, reverse=True)
    assert [number == exits for number in found] == [exits == 1 or 2 * one <= places for one in waiting]
    assert found[-1] == 1
    closed = [found.count(number) for number in range(2, exits)]
    assert not closed or max(closed) - min(closed) <= 1


def test_deadline_stops_at_the_exit_in_reach():
    with engine_of() as engine:
        engine._worker.seconds = [{}, {}, {1: 1000.0}]
        answer = engine.submit(IMAGES[0], Limits(deadline=500)).result(60)
        assert (answer.exit_index, answer.limited) == (1, "deadline")
        assert engine.submit(IMAGES[0]).result(60).exit_index == 2


def test_deadline_passed_in_a_queue():
    gate = Gate()
    with engine_of(compute=gate) as engine:
        with gate.closed():
            first = engine.submit(IMAGES[0])
            gate.holds()
            late = engine.submit(IMAGES[1], Limits(deadline=1e-3))
            time.sleep(0.01)
        with pytest.raises(Late, match="deadline passed"):
            late.result(60)
        assert first.result(60).exit_index == 2
        job = engine._job(IMAGES[1], Limits(deadline=100))  # as one that waits before the last stage
        engine.taken += 1
        waiting = Waiting([job], 0.0, (IMAGES[1:2],), LOGITS[:2, 1:2])
        assert engine.late_rows(2, waiting, 1000.0) == [0]
        engine.end_late(2, waiting)
        answer = job.result(0)
        assert (answer.exit_index, answer.limited) == (1, "deadline")
        torch.testing.assert_close(answer.probabilities, LOGITS[1, 1].softmax(-1))


@pytest.mark.parametrize(("sizes", "seconds"), [([1], 0.7), ([1, 1], 0.7), ([16, 16], 0.05)])
def test_deadline_after_slow_runs(sizes, seconds, monkeypatch):
    """Requests with a deadline that a stage meets again are not stopped before it for ever."""
    real, wait = NET.step, [seconds]

    def step(k, inputs, *args):
        time.sleep(wait[0] * len(inputs[0]) if k == 1 else 0)
        return real(k, inputs, *args)

    monkeypatch.setattr(NET, "step", step)
    gate = Gate()
    with engine_of(compute=gate) as engine:
        for size in sizes:
            with gate.closed():
                before = gate.came
                jobs = [engine.submit(IMAGES[0])]
                gate.holds(before)
                jobs += [engine.submit(image) for image in IMAGES[1:size]]
                until(lambda size=size: waiting(engine) == size - 1)
            for job in jobs:
                job.result(60)
        wait[0] = 0.0 if sizes[0] == 1 else seconds
        answers = [engine.submit(IMAGES[0], Limits(deadline=0.5)).result(60) for _ in range(80)]
    assert [answer.exit_index for answer in answers[-20:]] == [2] * 20
    if sizes != [1, 1]:  # the first run and other sizes do not count
        assert sum(answer.limited == "deadline" for answer in answers) <= 4


def test_stage_too_slow_for_its_deadline():
    """It runs, and its answers are late, now and then alone."""
    with engine_of() as engine:
        worker, runs = engine._worker, 0
        worker.seconds[1][1] = 1.5
        for _ in range(200):
            if worker.expected(1, 1) >= 1:
                worker.doubt(1, 1, [Job(None, STRICT, None, 2, time.monotonic() + 1, False)])
            else:
                worker._measured(1, 1, 1.5)
                runs += 1
    assert 8 <= runs <= 10


@pytest.mark.parametrize("place", ["after a stage", "before a stage"])
@pytest.mark.parametrize(
    ("left", "turn", "seconds", "doubted"),
    [
        (500, 0, 1000, True),
        (-1, 0, 1000, False),
        (500, 1000, 1, False),
        (300, 1000, 500, False),
        (120, 50, 100, True),  # between the stage's time alone and that with the wait
    ],
)
def test_deadline_that_doubts_a_stage(place, left, turn, seconds, doubted):
    """One that has passed, or that the wait for the lock alone exceeds, does not; nor does a cancelled request."""
    with engine_of() as engine:
        worker = engine._worker
        worker.seconds[1][1], worker.turn = seconds, turn
        job = engine._job(IMAGES[0], Limits(deadline=1))
        job.deadline = time.monotonic() + left
        job.add_done_callback(lambda done: setattr(done, "deadline", 0.0))  # as one that takes long
        engine.taken += 1
        now = Waiting([job], 0.0, (IMAGES[:1],), LOGITS[:1, :1])
        if place == "after a stage":
            assert not engine.answer_stopped(0, now, ExitPredictions(LOGITS[0, :1].softmax(-1), [True], [False]), 0.0)
            assert job.result(0).limited == "deadline"
        else:
            assert not worker._sorted(1, {0: now}, turn=True)[0]
            engine.end(job, None)
        assert worker.seconds[1][1] == (DOUBT * seconds if doubted else seconds)
        worker.seconds[1][1] = 1000.0
        job = Job(None, STRICT, None, 2, time.monotonic() + 500, False)
        job.cancel()
        worker.doubt(1, 1, [job])
        assert worker.seconds[1][1] == 1000.0


def test_deadline_with_a_wait_for_the_lock():
    """The expected time falls until the deadline allows stage and wait; under the lock, no wait counts."""
    with engine_of() as engine:
        worker = engine._worker

        def runs(turn: bool) -> bool:
            job = Job(None, STRICT, None, 2, time.monotonic() + 100, False)
            now = Waiting([job], 0.0, (IMAGES[:1],), LOGITS[:1, :1])
            return 0 in worker._sorted(1, {0: now}, turn)[0]

        worker.seconds[1][1], worker.turn = 150.0, 50.0
        assert not runs(turn=True)
        assert any(runs(turn=True) for _ in range(60))
        assert 40 < worker.seconds[1][1] < 50
        worker.seconds[1][1], worker.turn = 150.0, 1000.0
        assert not runs(turn=False)
        assert worker.seconds[1][1] == DOUBT * 150


class Turns:
    """Runs a function before each stage, in place of the lock that bundles share."""

    def __init__(self, comes) -> None:
        self.comes, self.runs = comes, 0

    def __enter__(self) -> None:
        self.runs += 1
        self.comes(self.runs)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deadline_passed_at_the_lock(stage):
    jobs = []

    def comes(run):
        if run == stage:
            until(lambda: jobs)
            jobs[0].deadline = time.monotonic()

    with engine_of(compute=Turns(comes)) as engine:
        jobs.append(engine.submit(IMAGES[0], Limits(deadline=500)))
        if stage == 1:
            with pytest.raises(Late, match="deadline passed"):
                jobs[0].result(60)
        else:
            answer = jobs[0].result(60)
            assert (answer.exit_index, answer.limited) == (stage - 2, "deadline")
            torch.testing.assert_close(answer.probabilities, LOGITS[stage - 2, 0].softmax(-1), rtol=1e-4, atol=1e-5)
    assert sum(engine.counts.images) == stage - 1
    assert engine.taken == 0


def test_callback_of_a_late_answer_may_wait_for_another_bundle():
    """It runs without the lock that the bundles share."""
    lock, jobs, answers = threading.Lock(), [], []

    class Shared(Turns):
        def __enter__(self):
            lock.acquire()
            super().__enter__()

        def __exit__(self, *_):
            lock.release()

    def comes(_):
        until(lambda: jobs)
        jobs[0].deadline = time.monotonic()

    with engine_of(compute=lock) as other, engine_of(compute=Shared(comes)) as engine:
        job = engine.submit(IMAGES[0], Limits(deadline=500))
        job.add_done_callback(lambda _: answers.append(other.submit(IMAGES[0]).result(20).exit_index))
        jobs.append(job)
        until(lambda: answers)
    assert answers == [2]


def test_cancelled_at_the_lock():
    jobs = []

    def comes(run):
        until(lambda: jobs)
        jobs[0].cancel()

    with engine_of(compute=Turns(comes)) as engine:
        jobs.append(engine.submit(IMAGES[0]))
        until(lambda: engine.taken == 0)
    assert engine.counts.images == [0, 0, 0]


def test_wait_for_the_lock_counts():
    with engine_of(compute=Turns(lambda _: time.sleep(0.02))) as engine:
        engine.submit(IMAGES[0]).result(60)
        first = engine.counts.seconds  # left out of the times of the stages
        engine.submit(IMAGES[0]).result(60)
        assert engine._worker.turn >= 0.02
        seconds = sum(times[1] for times in engine._worker.seconds)
        assert engine.counts.seconds - first == pytest.approx(seconds)  # the network alone
        engine._worker.turn = 1000.0
        answer = engine.submit(IMAGES[0], Limits(deadline=500)).result(60)
        assert (answer.exit_index, answer.limited) == (0, "deadline")


def test_wait_for_the_lock_is_forgotten():
    """Although its deadlines end every request before the second stage."""
    with engine_of() as engine:
        engine._worker.turn = 1000.0
        exits = [engine.submit(IMAGES[0], Limits(deadline=500)).result(60).exit_index for _ in range(10)]
    assert exits[0] == 0
    assert exits[-1] == 2


@pytest.mark.parametrize("name", ["run-", "read-"])
def test_thread_that_cannot_start(name, monkeypatch):
    real = threading.Thread.start

    def start(thread):
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        real(thread)

    with engine_of(batch=2, queue=4) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            for _ in range(6):
                with pytest.raises(RuntimeError, match="can't start"):
                    engine.submit(IMAGES[0])
            assert engine.taken == 0
            assert engine.ready() == (name == "read-")
        answers = [engine.submit(image).result(60).exit_index for image in IMAGES[:6]]
    assert answers == [2] * 6
    assert engine.counts.images == [6] * 3
    assert engine.taken == 0


@settings(max_examples=200, deadline=None)
@given(value=st.floats(1e-9, 1e9))
def test_least_budget_is_accepted(value):
    text = _rounded_up(value)
    assert value <= float(text) <= value * 1.00001
    assert "e" not in text.lower()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_gmacs=0.5), "max_gmacs=0.5 is below exit 1; give at least 1"),
        (Limits(max_gmacs=float("nan")), "give at least 1"),
        (Limits(deadline=0), "deadline=0 must be above 0 seconds"),
        (Limits(threshold=1.5), "threshold"),
    ],
)
def test_wrong_budget_is_refused(limits, words):
    with engine_of() as engine:
        with pytest.raises(ValueError, match=words):
            engine.submit(IMAGES[0], limits)
        assert engine.taken == 0
    with engine_of(Patience(2)) as engine, pytest.raises(ValueError, match="patience_2 has none"):
        engine.submit(IMAGES[0], Limits(threshold=0.5))


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"readers": 0}, {"wait": -1.0}, {"queue": 16}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be"):
        engine_of(**wrong)


# ---- what goes wrong


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_failed_stage_answers_its_batch_only(kind, monkeypatch, caplog):
    fails = fails_at(NET.begin, 3, kind)
    with engine_of(batch=4) as engine, monkeypatch.context() as patch:
        patch.setattr(NET, "begin", fails)
        futures = [engine.submit(image) for image in IMAGES[:20]]
        errors = [future.exception(60) for future in futures]
    failed = [error for error in errors if error is not None]
    assert 1 <= len(failed) <= 4
    assert all(isinstance(error, Failed) and f"({kind.__name__}: broken)" in str(error) for error in failed)
    for image, future in enumerate(futures):
        if future.exception() is None:
            torch.testing.assert_close(future.result().probabilities, expected(STRICT, image, Limits())[1])
    assert engine.taken == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_thread_is_started_again(monkeypatch):
    with engine_of() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._worker, "_next", lambda: exec("raise SystemExit"))
            first = engine.submit(IMAGES[0])
            until(lambda: not engine._worker.thread.is_alive())
        assert engine.ready()
        assert first.result(60).exit_index == 2
        assert engine.submit(IMAGES[1]).result(60).exit_index == 2


@pytest.mark.parametrize("broken", [b"?", b"", photos(1)[0][:60], "/nowhere.png", torch.zeros(3, 8, 8)])
def test_broken_image_disturbs_no_other(broken):
    with engine_of() as engine:
        futures = [engine.submit(one) for one in (IMAGES[0], broken, IMAGES[1])]
        with pytest.raises(ValueError, match="image") as error:
            futures[1].result(60)
        assert isinstance(error.value, UnreadableImage) or isinstance(broken, torch.Tensor)
        assert [futures[k].result(60).exit_index for k in (0, 2)] == [2, 2]


def test_nonfinite_logits_are_an_error():
    with engine_of() as engine:
        bad = engine.submit(torch.full((3, 32, 32), float("nan")))
        good = engine.submit(IMAGES[0])
        with pytest.raises(Failed, match="logits of exit 3 are not finite"):
            bad.result(60)
        assert good.result(60).exit_index == 2


def test_sizes_in_one_batch_run_apart():
    gate, parts = Gate(), {"costs": COSTS, "preprocessing": None}
    with Engine(task(family="convnext", parts=parts), compute=gate) as engine:
        with gate.closed():
            first = engine.submit(IMAGES[0])
            gate.holds()
            others = [engine.submit(image) for image in (IMAGES[1], torch.zeros(3, 64, 64))]
            until(lambda: waiting(engine) == 2)
        assert all(job.result(60) for job in (first, *others))
        assert engine.submit(torch.zeros(3, 64, 64)).result(60)


@pytest.mark.parametrize("image", [IMAGES[0].clone(), np.zeros((32, 32, 3), np.uint8)])
def test_image_is_copied(image, monkeypatch):
    with engine_of() as engine:
        monkeypatch.setattr(engine._readers, "submit", lambda *_: None)
        job = engine.submit(image)
        image += 1
        assert (job.source != image).all()
        engine.end(job, None)


def test_load_begins_a_new_window(monkeypatch):
    """It does so once it has stopped more than 1 % of a window after their first stage."""
    measured = {"shares": [0.2, 0.3, 0.5], "samples": 1000}
    with Engine(make_bundle(STRICT, NET, measured=measured)) as engine:
        engine.drift.window = 100
        cases = (([3, 3, 3], 1), ([3, 1, 1], 1), ([3, 3, 3], 2), ([3, 1, 1], 0), ([1], 0), ([3, 3, 1], 1))
        for opened, counted in cases:
            monkeypatch.setattr(engine, "open_exits", iter(opened).__next__)
            engine.submit(IMAGES[0]).result(60)
            assert sum(engine.drift._counts) == counted


def test_cancelled_request_is_not_computed():
    gate = Gate()
    with engine_of(batch=4, compute=gate) as engine:
        with gate.closed():
            first = engine.submit(IMAGES[0])
            gate.holds()
            others = [engine.submit(image) for image in IMAGES[1:4]]
            until(lambda: waiting(engine) == 3)
            assert others[1].cancel()
        assert [future.result(60).exit_index for future in (first, others[0], others[2])] == [2, 2, 2]
        with pytest.raises(CancelledError):
            others[1].result(0)
        until(lambda: engine.taken == 0)
    assert engine.counts.images == [3, 3, 3]


def test_close_answers_what_waits():
    gate, results = Gate(), []
    engine = engine_of(batch=4, compute=gate)
    with gate.closed():
        futures = [engine.submit(image) for image in IMAGES[:10]]
        closing = threading.Thread(target=lambda: results.append(engine.close()))
        closing.start()
        until(lambda: engine.closing)
        with pytest.raises(Closed, match="accepts no image"):
            engine.submit(IMAGES[0])
        assert not engine.ready()
    closing.join(60)
    assert results == [None]
    assert [future.result(0).exit_index for future in futures] == [2] * 10
    assert not engine._worker.thread.is_alive()


def test_nothing_is_kept():
    with engine_of(batch=4) as engine:
        jobs = [weakref.ref(engine.submit(file)) for file in [*photos(10), b"?"]]
        until(lambda: engine.taken == 0)
        engine.submit(IMAGES[0]).result(60)  # the threads hold the last one until the next comes
        gc.collect()
        assert [job for job in jobs if job() is not None and job().source is not None] == []
        assert sum(job() is not None for job in jobs) <= 3
        assert waiting(engine) == 0
