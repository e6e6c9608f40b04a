"""Serve a bundle to many threads: a bounded queue, and batches in which deep stages run full."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dynadapter.cost import exit_costs
from dynadapter.exits.combining import with_decision, with_threshold
from dynadapter.exits.policies import AtExit, combined, wide
from dynadapter.serve.bundle import Bundle
from dynadapter.serve.bundle.loading import Source
from dynadapter.serve.drift import Drift, Reference
from dynadapter.serve.requests import UNLIMITED, Closed, Counts, Failed, Full, Job, Late, Limit, Limits, Served
from dynadapter.serve.stages import Waiting, computed, count, nonfinite, release_tensors, take

LOG = logging.getLogger("dynadapter.serve")
EASE = 0.5
"""From this fraction of the queue on (a batch that runs left out), deep exits are closed, one after the other."""


class Engine:
    """Answer images from many threads.

    One thread runs the network, and other threads decode images. A stage runs when `batch` samples wait for it;
    otherwise the first stage with a sample runs. So samples are collected before deep stages, and no sample waits while
    the network is idle. A sample waits at most `wait` seconds for a full batch at each stage. Answers equal those of
    :meth:`Bundle.route` up to rounding. When more than half of the queue is taken, the deepest exits are closed one
    after the other, so that samples stop earlier before any is refused.

    >>> with Engine(bundle) as engine:                                        # doctest: +SKIP
    ...     answer = engine.submit("photo.jpg", Limits(max_gmacs=1.2)).result()

    Args:
        bundle: The network, its policy and its preprocessing. On a CPU lay the network out first
            (:func:`~dynadapter.backbones.layout.lay_out_for_cpu`).
        batch: Samples in a full batch.
        queue: Most requests that are accepted and not yet answered.
        wait: Seconds after which a sample waits no longer for a full batch, at each stage.
        readers: Threads that decode images.
        window: Number of images after which exits and confidence are compared with the calibration.
        compute: Lock that is held while a stage runs; give several engines on one CPU the same lock.
        name: Name of the engine in messages.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        batch: int = 16,
        queue: int = 128,
        wait: float = 0.1,
        readers: int = 2,
        window: int = 500,
        compute: AbstractContextManager[Any] | None = None,
        name: str = "bundle",
    ) -> None:
        if min(batch, readers) < 1 or not wait >= 0:
            raise ValueError(f"batch={batch} and readers={readers} must be at least 1, wait={wait} at least 0")
        if queue <= batch:
            raise ValueError(f"queue={queue} must be above batch={batch}, or no full batch can wait while one runs")
        self.bundle, self.name = bundle, name
        self.batch, self.queue, self.wait = batch, queue, wait
        self.exits = bundle.net.num_exits
        size = bundle.preprocess.image_size if bundle.preprocess else None
        self.costs = bundle.costs or exit_costs(bundle.net, size)
        self.drift = Drift(Reference.of(bundle.config), window)
        self.counts = Counts([0] * self.exits, [0] * self.exits, [0] * self.exits)
        self.taken = 0
        self.closing = False
        self._clock: Callable[[], float] = time.monotonic
        self._compute = compute or nullcontext()
        self._queues: list[deque[Waiting[Job]]] = [deque() for _ in range(self.exits)]
        self._seconds = [0.0] * self.exits  # of a run of each stage, a running mean
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix=f"read-{name}")
        self._worker = self._started()

    # ---- from outside

    def submit(self, image: Source, limits: Limits = UNLIMITED) -> "Future[Served]":
        """Accept an image, and return a future of its answer; cancel the future if the answer is no longer needed.

        The answer can be an error: `UnreadableImage` or another ValueError of the image, :class:`Late`,
        :class:`Failed`.

        Args:
            image: As in :meth:`Bundle.read`.
            limits: The budget.

        Raises:
            Full: `queue` requests are waiting.
            Closed: The engine is closed.
            ValueError: The budget fits no exit, or the policy has no threshold.
        """
        job = self._job(image, limits)
        with self._changed:
            if self.closing:
                raise Closed(f"{self.name} stops and accepts no image")
            if self.taken >= self.queue:
                raise self._full()
            self.taken += 1
            if not self._worker.is_alive():
                self._worker = self._started()
            self._readers.submit(self._read, job)
        return job

    def ready(self) -> bool:
        """Check whether images are accepted; start the thread that runs the network again if it ended."""
        with self._changed:
            if not self.closing and not self._worker.is_alive():
                self._worker = self._started()
            return not self.closing

    def is_full(self) -> bool:
        """Check whether the queue is full at this moment."""
        return self.taken >= self.queue

    def open_exits(self) -> int:
        """Return the number of exits that are open under the present load."""
        load = (self.taken - self.batch) / (self.queue - self.batch)
        return min(self.exits, max(1, math.ceil(self.exits * (1 - load) / (1 - EASE))))

    def close(self) -> None:
        """Accept no more requests, answer the accepted ones, and end the threads."""
        with self._changed:
            self.closing = True
            self._changed.notify_all()
        self._readers.shutdown()
        while self._worker.is_alive():
            self._worker.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- a request

    def _full(self) -> Full:
        error = Full(f"{self.queue} images wait already; send this one again later")
        answered = max(1, sum(self.counts.exits))
        error.retry_after = max(1, math.ceil(self.taken * self.counts.seconds / answered))
        return error

    def _job(self, image: Source, limits: Limits) -> Job:
        policy, last, gmacs = self.bundle.policy, self.exits - 1, self.costs.gmacs
        if limits.threshold is not None:
            policy = with_threshold(policy, limits.threshold)
        if limits.max_gmacs is not None:
            if not limits.max_gmacs >= gmacs[0]:
                raise ValueError(f"max_gmacs={limits.max_gmacs:g} is below exit 1; give at least {gmacs[0]:g}")
            last = max(k for k, cost in enumerate(gmacs) if cost <= limits.max_gmacs)
        if limits.deadline is not None and not limits.deadline > 0:
            raise ValueError(f"deadline={limits.deadline:g} must be above 0 seconds")
        deadline = math.inf if limits.deadline is None else self._clock() + limits.deadline
        return Job(image, policy, limits.threshold, last, deadline, limits == UNLIMITED)

    def _read(self, job: Job) -> None:
        source, job.source = job.source, None
        try:
            if source is None or job.cancelled():
                return self._end(job, None)
            if self._clock() > job.deadline:
                return self._end(job, _late())
            like = next(self.bundle.net.backbone.parameters())
            image = self.bundle.read(source).to(like.dtype)
        except BaseException as error:
            return self._end(job, error)
        with self._changed:
            self._queues[0].append(Waiting([job], self._clock(), (image[None],)))
            self._changed.notify_all()
        return None

    def _end(self, job: Job, answer: Served | BaseException | None) -> None:
        """Free a job's place in the queue and answer it, unless it was cancelled."""
        with self._changed:
            if job.ended:
                return
            job.ended = True
            self.taken -= 1
            self._changed.notify_all()
        with suppress(InvalidStateError):
            if isinstance(answer, BaseException):
                job.set_exception(answer)
            elif answer is not None:
                job.set_result(answer)

    # ---- the thread that runs the network

    def _started(self) -> threading.Thread:
        worker = threading.Thread(target=self._work, name=f"run-{self.name}", daemon=True)
        worker.start()
        return worker

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while (k := self._next()) is None:
                        if self.closing and not self.taken:
                            return
                        self._changed.wait()
                    with torch.inference_mode():
                        now = take(self._queues[k], self.batch)
                try:
                    self._run(k, now)
                except BaseException as error:
                    LOG.exception("%s: stage %d failed on %d images", self.name, k + 1, len(now.items))
                    release_tensors(error)
                    why = f"stage {k + 1} failed on its batch ({type(error).__name__}: {' '.join(str(error).split())})"
                    for job in now.items:
                        self._end(job, Failed(why))
                del now  # while the thread waits
        except BaseException:
            LOG.exception("%s: the thread that runs the network ended; the next request starts another", self.name)
            raise

    def _next(self) -> int | None:
        """Return the stage to run: the deepest that is due, the deepest that is full, or the first with a sample."""
        now = self._clock()
        some = [k for k, queue in enumerate(self._queues) if queue]
        due = [k for k in some if any(self._due(k, part) <= now for part in self._queues[k])]
        full = [k for k in some if count(self._queues[k]) >= self.batch]
        return next(iter(due[-1:] or full[-1:] or some[:1]), None)

    def _due(self, k: int, part: Waiting[Job]) -> float:
        return min(part.since + self.wait, min(job.deadline for job in part.items) - 2 * self._seconds[k])

    def _run(self, k: int, now: Waiting[Job]) -> None:
        now = self._sorted_out(k, now)
        if not now.items:
            return
        with self._compute, torch.inference_mode():
            start = time.perf_counter()
            now.inputs = tuple(part.to(self.bundle.device) for part in now.inputs)
            now = computed(self.bundle.runs.step, k, now)
            logits, stops = self._judged(now, k)
            probabilities, finite = wide(logits).softmax(-1).cpu(), logits.isfinite().all(-1).tolist()
            seconds = time.perf_counter() - start
        self._count(k, len(now.items), seconds)
        open_exits, clock, stay = self.open_exits(), self._clock(), []
        for row, (job, stop, good) in enumerate(zip(now.items, stops, finite, strict=True)):
            job.plain = job.plain and open_exits == self.exits
            limit = None if stop else self._limit(job, k, open_exits, clock)
            if stop or limit:
                self._answer(job, Served(probabilities[row], k, limit) if good else Failed(str(nonfinite(k))))
            else:
                stay.append(row)
        if stay:
            with self._changed, torch.inference_mode():
                self._queues[k + 1].append(replace(now.chosen(stay), since=self._clock()))

    def _sorted_out(self, k: int, now: Waiting[Job]) -> Waiting[Job]:
        """Drop cancelled samples, and answer samples that would be late with the prediction of their last exit."""
        clock, stay, late = self._clock(), [], []
        for row, job in enumerate(now.items):
            if job.cancelled():
                self._end(job, None)
            elif clock + (self._seconds[k] if k else 0) >= job.deadline:
                late.append(row)
            else:
                stay.append(row)
        if late and not k:
            for row in late:
                self._end(now.items[row], _late())
        elif late:
            with torch.inference_mode():
                part = now.chosen(late)
                logits, _ = self._judged(part, k - 1)
            for job, row, good in zip(
                part.items, wide(logits).softmax(-1).cpu(), logits.isfinite().all(-1), strict=True
            ):
                self._answer(job, Served(row, k - 1, "deadline") if good else Failed(str(nonfinite(k - 1))))
        with torch.inference_mode():
            return now.chosen(stay)

    def _judged(self, now: Waiting[Job], k: int) -> tuple[Tensor, list[bool]]:
        """Return the predictions of exit ``k`` (samples, classes), and which samples their policies stop there."""
        assert now.history is not None
        last, groups = k == self.exits - 1, dict[float | None, list[int]]()
        for row, job in enumerate(now.items):
            groups.setdefault(job.threshold, []).append(row)
        found, stops = None, [last] * len(now.items)
        for rows in groups.values():
            policy, history = now.items[rows[0]].policy, now.history if len(groups) == 1 else now.history[:, rows]
            # A policy without early exits knows the temperature of the last exit alone, unless it is told the exit.
            view = policy if last or policy.uses_early_exits else with_decision(policy, AtExit(k + 1))
            logits = combined(view, history)[-1]
            if not last:
                for row, stop in zip(rows, policy.should_exit(history).tolist(), strict=True):
                    stops[row] = stop
            if len(groups) == 1:
                return logits, stops
            found = logits.new_empty(len(now.items), logits.shape[1]) if found is None else found
            found[rows] = logits
        assert found is not None
        return found, stops

    def _limit(self, job: Job, k: int, open_exits: int, clock: float) -> Limit | None:
        """Return why a sample must stop at exit ``k``, which is not the last; None if it continues."""
        if k >= job.last:
            return "max_gmacs"
        if k + 1 >= open_exits:
            return "load"
        return "deadline" if clock + self._seconds[k + 1] >= job.deadline else None

    def _count(self, k: int, images: int, seconds: float) -> None:
        self._seconds[k] = seconds if not self.counts.runs[k] else 0.9 * self._seconds[k] + 0.1 * seconds
        self.counts.runs[k] += 1
        self.counts.images[k] += images
        self.counts.seconds += seconds

    def _answer(self, job: Job, answer: Served | Exception) -> None:
        if isinstance(answer, Served):
            self.counts.exits[answer.exit_index] += 1
            if answer.limited is not None:
                self.counts.limited[answer.limited] += 1
            elif job.plain:
                for line in self.drift.add(answer.exit_index, answer.probabilities.max().item()):
                    LOG.warning("%s: %s", self.name, line)
        self._end(job, answer)


def _late() -> Late:
    return Late("the deadline passed before the first stage began; give a longer one, or send fewer images at a time")
