"""Serve a bundle to many threads: a bounded queue, and batches in which deep stages run full."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from decimal import ROUND_CEILING, Context
from typing import Any

import numpy as np
from torch import Tensor

from dynadapter.cost import exit_costs
from dynadapter.exits.combining import with_threshold
from dynadapter.serve.bundle import Bundle
from dynadapter.serve.bundle.loading import Source
from dynadapter.serve.drift import Drift, Reference
from dynadapter.serve.requests import UNLIMITED, Closed, Counts, Failed, Full, Job, Late, Limit, Limits, Served
from dynadapter.serve.stages import Waiting, nonfinite
from dynadapter.serve.together import Together
from dynadapter.serve.worker import ExitPredictions, Worker, predict_exit

LOG = logging.getLogger("dynadapter.serve")


class Engine:
    """Answer images from many threads.

    One thread runs the network, and other threads decode images. The deepest stage with a sample runs first, on at most
    `batch` samples, so that samples are answered before others begin. With `wait` above 0 a stage runs when `batch`
    samples wait for it or one has waited that long; otherwise the first stage with a sample runs. Deep batches are then
    fuller and slow answers slower. No sample waits while the network is idle. Answers equal those of
    :meth:`Bundle.route` up to rounding. Of the `queue` requests a batch runs and the others wait. When more than half
    of the places to wait are taken, the deepest exit is closed, then the next one, in even steps; only exit 1 is open
    before any request is refused.

    >>> with Engine(bundle) as engine:                                        # doctest: +SKIP
    ...     answer = engine.submit("photo.jpg", Limits(max_gmacs=1.2)).result()

    Args:
        bundle: The network, its policy and its preprocessing. On a CPU lay the network out first
            (:func:`~dynadapter.backbones.layout.lay_out_for_cpu`).
        batch: Samples in a full batch.
        queue: Most requests that are accepted and not yet answered.
        wait: Longest time in seconds that a sample waits for a full batch, at each stage.
        readers: Threads that decode images.
        window: Number of images after which exits and confidence are compared with the calibration.
        compute: Lock that is held while a stage runs; give several engines on one CPU the same lock.
        name: Name of the engine in messages.
        worker: The thread that runs the network, with the same `batch` and `wait`, where :meth:`together` shares it
            among engines; None for one of its own.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        bundle: Bundle,
        batch: int = 16,
        queue: int = 128,
        wait: float = 0.0,
        readers: int = 2,
        window: int = 500,
        compute: AbstractContextManager[Any] | None = None,
        name: str = "bundle",
        worker: Worker | None = None,
    ) -> None:
        if min(batch, readers) < 1 or not wait >= 0:
            raise ValueError(f"batch={batch} and readers={readers} must be at least 1, wait={wait} at least 0")
        if queue <= batch:
            raise ValueError(f"queue={queue} must be above batch={batch}, or no full batch can wait while one runs")
        self.bundle, self.name = bundle, name
        self.batch, self.queue = batch, queue
        self.exits = bundle.net.num_exits
        size = bundle.preprocess.image_size if bundle.preprocess else None
        self.costs = bundle.costs or exit_costs(bundle.net, size)
        self.drift = Drift(Reference.of(bundle.config), window)
        self.counts = Counts([0] * self.exits, [0] * self.exits, [0] * self.exits)
        self.taken = 0
        self.closing = False
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix=f"read-{name}")
        self._worker = worker or Worker(self._step, self.exits, batch, wait, compute, name)
        self._task = self._worker.register(self)

    @classmethod
    def together(
        cls,
        bundles: Mapping[str, Bundle],
        batch: int = 16,
        wait: float = 0.0,
        compute: AbstractContextManager[Any] | None = None,
        **options: Any,
    ) -> dict[str, "Engine"]:
        """Return an engine for each bundle; all use one thread, and their images share batches.

        Frozen layers run once for a batch, and LoRA, or another low-rank kind, acts on the rows of its own task. Heads,
        policies, queues, budgets, counts and drift are those of each engine. The engines share a batch evenly, and
        places that one does not need are left to the others. If a stage fails on images of several bundles, those of
        each bundle run again by themselves.

        >>> engines = Engine.together({"flowers": load("flowers"), "birds": load("birds")})       # doctest: +SKIP
        >>> answer = engines["birds"].submit("robin.jpg").result()                                # doctest: +SKIP

        Args:
            bundles: At least two, by name. They are changed in place: they hold the frozen tensors once.
            batch: Samples in a full batch, of all bundles.
            wait: As of :class:`Engine`.
            compute: As of :class:`Engine`.
            options: `queue`, `readers` and `window` of each engine.

        Raises:
            ValueError: Two bundles cannot be in one batch, or a number is out of range.
        """
        net = Together(list(bundles.values()), list(bundles))
        worker = Worker(net.step, net.net.num_exits, batch, wait, compute, " and ".join(bundles))
        return {
            name: cls(bundle, batch, wait=wait, name=name, worker=worker, **options) for name, bundle in bundles.items()
        }

    # ---- from outside

    def submit(self, image: Source, limits: Limits = UNLIMITED) -> "Future[Served]":
        """Accept an image, and return a future of its answer; cancel the future if the answer is no longer needed.

        The answer can be an error: `UnreadableImage` or another ValueError of the image, :class:`Late`,
        :class:`Failed`.

        Args:
            image: As in :meth:`Bundle.read`; a tensor or an array is copied.
            limits: The budget.

        Raises:
            Full: `queue` requests are waiting.
            Closed: The engine is closed.
            ValueError: The budget fits no exit, or the policy has no threshold.
            RuntimeError: The system starts no more threads.
        """
        if isinstance(image, Tensor):  # the caller may reuse its memory
            image = image.detach().clone()
        elif isinstance(image, np.ndarray):
            image = image.copy()
        job = self._job(image, limits)
        with self._worker.changed:
            if self.closing:
                raise Closed(f"{self.name} stops and accepts no image")
            if self.taken >= self.queue:
                raise self._full()
            self._worker.ensure()
            self.taken += 1
            try:
                self._readers.submit(self._read, job)
            except RuntimeError:  # it may be in their queue all the same
                job.cancel()
                self.end(job, None)
                raise
        return job

    def ready(self) -> bool:
        """Check whether images are accepted; start the thread that runs the network again if it ended."""
        with self._worker.changed, suppress(RuntimeError):  # the system starts no more threads
            if not self.closing:
                self._worker.ensure()
                return True
        return False

    def is_full(self) -> bool:
        """Check whether the queue is full at this moment."""
        return self.taken >= self.queue

    def open_exits(self) -> int:
        """Return the number of exits that are open under the present load."""
        free, places = self.queue - self.taken, self.queue - self.batch  # a batch runs and does not wait
        return min(self.exits, 1 + 2 * (self.exits - 1) * free // places)

    def close(self) -> None:
        """Accept no more requests, answer the accepted ones, and end the threads that no other engine uses."""
        try:
            with self._worker.changed:
                self.closing = True
                if self.taken:
                    self._worker.ensure()
                self._worker.changed.notify_all()
        finally:  # also if the system starts no thread
            self._readers.shutdown()
            self._worker.finish(self)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- a request

    def _full(self) -> Full:
        error = Full(f"{self.queue} images wait already; send this one again later")
        sharing = self._worker.owners
        answered = max(1, sum(sum(engine.counts.exits) for engine in sharing))
        seconds = sum(engine.counts.seconds for engine in sharing) / answered
        error.retry_after = max(1, math.ceil(sum(engine.taken for engine in sharing) * seconds))
        return error

    def _job(self, image: Source, limits: Limits) -> Job:
        policy, last, gmacs = self.bundle.policy, self.exits - 1, self.costs.gmacs
        if limits.threshold is not None:
            policy = with_threshold(policy, limits.threshold)
        if limits.max_gmacs is not None:
            if not limits.max_gmacs >= gmacs[0]:
                raise ValueError(f"max_gmacs={limits.max_gmacs} is below exit 1; give at least {_rounded_up(gmacs[0])}")
            last = max(k for k, cost in enumerate(gmacs) if cost <= limits.max_gmacs)
        if limits.deadline is not None and not limits.deadline > 0:
            raise ValueError(f"deadline={limits.deadline:g} must be above 0 seconds")
        deadline = math.inf if limits.deadline is None else time.monotonic() + limits.deadline
        return Job(image, policy, limits.threshold, last, deadline, limits == UNLIMITED)

    def _read(self, job: Job) -> None:
        source, job.source = job.source, None
        try:
            if source is None or job.cancelled():
                return self.end(job, None)
            if time.monotonic() > job.deadline:
                return self.end(job, _late())
            like = next(self.bundle.net.backbone.parameters())
            image = self.bundle.read(source).to(like.dtype)
        except BaseException as error:
            return self.end(job, error)
        return self._worker.add(0, self._task, Waiting([job], time.monotonic(), (image[None],)))

    # ---- for the worker

    def _step(
        self, k: int, inputs: tuple[Tensor, ...], counts: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Run a stage of a bundle by itself."""
        stage_state, logits = self.bundle.runs.step(k, inputs)
        return stage_state, {0: logits}

    def end(self, job: Job, answer: Served | BaseException | None) -> None:
        """Free a job's place in the queue and answer it, unless it was cancelled."""
        with self._worker.changed:
            if job.ended:
                return
            job.ended = True
            self.taken -= 1
            self._worker.changed.notify_all()
        with suppress(InvalidStateError):
            if isinstance(answer, BaseException):
                job.set_exception(answer)
            elif answer is not None:
                job.set_result(answer)

    def late_rows(self, k: int, now: Waiting[Job], seconds: float) -> list[int]:
        """Return the rows of samples that are cancelled, or would be late.

        Args:
            k: Exit index, from 0.
            now: The samples before the stage.
            seconds: When the stage will end, from now on; before stage 0, which has no earlier exit, only a deadline
                that has passed counts.
        """
        ends = time.monotonic() + (seconds if k else 0)
        return [row for row, job in enumerate(now.items) if job.cancelled() or ends >= job.deadline]

    def end_late(self, k: int, late: Waiting[Job]) -> None:
        """End samples before stage ``k``: cancelled ones, and late ones with the prediction of their last exit."""
        found = predict_exit(late, k - 1, last=False) if k else None
        for row, job in enumerate(late.items):
            if found is None or job.cancelled():
                self.end(job, _late())
            elif found.finite[row]:
                self._answer(job, Served(found.probabilities[row], k - 1, "deadline"))
            else:
                self._answer(job, Failed(str(nonfinite(k - 1))))

    def answer_stopped(self, k: int, now: Waiting[Job], predictions: ExitPredictions, seconds: float) -> list[int]:
        """Answer the samples that stop at exit ``k``.

        Args:
            k: Exit index, from 0.
            now: The samples after the stage.
            predictions: Their predictions.
            seconds: Their part of the time of the stage.

        Returns:
            The rows of the samples that continue.
        """
        self.counts.runs[k] += 1
        self.counts.images[k] += len(now.items)
        self.counts.seconds += seconds
        open_exits, stay, going = self.open_exits(), list[int](), predictions.stops.count(False)
        ends = time.monotonic() + (self._worker.expected(k + 1, going) if going else 0)  # of the next stage
        limits = [
            None if stop else self._limit(job, k, open_exits, ends)
            for job, stop in zip(now.items, predictions.stops, strict=True)
        ]
        if going:  # before an answer, whose callbacks may take long
            slow = [job for job, limit in zip(now.items, limits, strict=True) if limit == "deadline"]
            self._worker.doubt(k + 1, going, slow)
        results = zip(now.items, predictions.stops, limits, predictions.finite, strict=True)
        for row, (job, stop, limit, good) in enumerate(results):
            if k == 0:  # later, those that exited before the load came would count alone
                job.plain = job.plain and open_exits == self.exits
            if stop or limit:
                answer = Served(predictions.probabilities[row], k, limit) if good else Failed(str(nonfinite(k)))
                self._answer(job, answer)
            else:
                stay.append(row)
        return stay

    def _limit(self, job: Job, k: int, open_exits: int, ends: float) -> Limit | None:
        """Return why a sample must stop at exit ``k``, which is not the last; None if it continues."""
        if k >= job.last:
            return "max_gmacs"
        if k + 1 >= open_exits:
            return "load"
        return "deadline" if ends >= job.deadline else None

    def _answer(self, job: Job, answer: Served | Exception) -> None:
        if isinstance(answer, Served):
            self.counts.exits[answer.exit_index] += 1
            if answer.limited is not None:
                self.counts.limited[answer.limited] += 1
                if job.plain:  # by load: the window lacks its exit
                    self.drift.leave_out()
            elif job.plain:
                for line in self.drift.add(answer.exit_index, answer.probabilities.max().item()):
                    LOG.warning("%s: %s", self.name, line)
        self.end(job, answer)


def _rounded_up(value: float) -> str:
    """Return a number as text of six digits that is not below it."""
    return f"{Context(prec=6, rounding=ROUND_CEILING).create_decimal(value).normalize():f}"


def _late() -> Late:
    return Late("the deadline passed before the first stage began; give a longer one, or send fewer images at a time")
