"""The thread that runs the stages of a network, for one bundle or for several in one batch."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynadapter.exits.combining import with_decision
from dynadapter.exits.policies import AtExit, combined, wide
from dynadapter.serve.requests import Failed, Job
from dynadapter.serve.stages import Waiting, count, joined, lengthened, pop, release_tensors

if TYPE_CHECKING:
    from dynadapter.serve.engine import Engine

LOG = logging.getLogger("dynadapter.serve")

DOUBT = 0.98
"""What remains of a stage's expected time where it is too long for a deadline. If all deadlines are alike, a stage that
needs 1.5 times what they allow then runs, with late answers, in about one of 20 times. If they differ, short deadlines
lower the expected time for all requests, and a larger share of those with longer deadlines is answered late."""

Step = Callable[[int, tuple[Tensor, ...], Sequence[int]], tuple[tuple[Tensor, ...], dict[int, Tensor]]]
"""Runs a stage: from its number, its inputs and the rows of each task to the inputs of the next stage and the logits of
each task that has rows. An input has one row for each sample; the rows of a task are neighbours."""


class ExitPredictions(NamedTuple):
    """The predictions of an exit for the samples of one task.

    ``probabilities`` (samples, classes) are on the CPU, ``finite`` tells which logits are finite, and ``stops`` which
    samples their policies stop there.
    """

    probabilities: Tensor
    finite: list[bool]
    stops: list[bool]


class Worker:
    """Run the stages of one network in one thread, for one engine or for several whose samples share batches.

    The deepest stage with a sample that has waited `wait` seconds runs, else the deepest with a full batch, else the
    first one with a sample. Engines share a batch evenly; places that one does not need are left to the others.

    Args:
        step: Runs a stage.
        exits: Number of exits.
        batch: Samples in a full batch.
        wait: Longest time in seconds that a sample waits for a full batch, at each stage.
        compute: Lock that is held while a stage runs; None for no lock.
        name: Name of the thread.

    Attributes:
        changed: Lock of the queues and of the owners' states; it wakes the thread.
        queues: The samples that wait for each stage, by task.
        seconds: Expected time of a run of each stage, by the binary digits of its number of images: a running mean
            without the first run, which may compile or allocate.
        turn: Time until `compute` is free, a running mean over the runs of all stages. Stage 0 runs whatever it is, so
            it cannot stay high after the load has passed; a mean for each stage could, because a deadline stops samples
            before a stage that seems slow.
        owners: The engines in the order of their tasks.
    """

    def __init__(
        self, step: Step, exits: int, batch: int, wait: float, compute: AbstractContextManager[Any] | None, name: str
    ) -> None:
        self.batch, self.wait = batch, wait
        self.changed = threading.Condition()
        self.queues: list[list[deque[Waiting[Job]]]] = [[] for _ in range(exits)]
        self.seconds: list[dict[int, float]] = [{} for _ in range(exits)]
        self._doubted: set[tuple[int, int]] = set()
        self.turn = 0.0
        self.owners: list[Engine] = []
        self._step, self._compute, self._name = step, compute or nullcontext(), name
        self.thread = self._new_thread()

    def register(self, owner: "Engine") -> int:
        """Add an engine, and return the number of its task."""
        with self.changed:
            self.owners.append(owner)
            for queues in self.queues:
                queues.append(deque())
            return len(self.owners) - 1

    def ensure(self) -> None:
        """Start the thread unless it runs; the caller holds the lock."""
        if not self.thread.is_alive():
            self.thread = self._new_thread()
            self.thread.start()

    def add(self, k: int, task: int, part: Waiting[Job]) -> None:
        """Add samples to the queue of a stage."""
        with self.changed:
            self.queues[k][task].append(replace(part, since=time.monotonic()))
            self.changed.notify_all()

    def expected(self, k: int, images: int, turn: bool = True) -> float:
        """Return the seconds that a run of stage ``k`` takes from now on; 0 for a size that is not known.

        Args:
            k: Exit index, from 0.
            images: Number of images in the run.
            turn: Whether to include the wait for `compute`.
        """
        return self.seconds[k].get(images.bit_length(), 0.0) + (self.turn if turn else 0.0)

    def doubt(self, k: int, images: int, stopped: Iterable[Job], turn: bool = True) -> None:
        """Lower the expected time of a stage if a deadline did not let it run.

        Only a run measures a stage. If it has become faster, requests with a deadline would else never find that out.
        Deadlines that have passed, or that the wait for `compute` alone exceeds, say nothing about the stage.

        Args:
            k: Exit index, from 0.
            images: Number of images in the run that did not take place.
            stopped: Requests that stopped before it.
            turn: Whether the run would have waited for `compute`, as in :meth:`expected`.
        """
        size, start = images.bit_length(), time.monotonic() + (self.turn if turn else 0.0)
        seconds = self.seconds[k].get(size, 0.0)
        if any(start < job.deadline <= start + seconds and not job.cancelled() for job in stopped):
            self.seconds[k][size] = DOUBT * seconds
            self._doubted.add((k, size))

    def finish(self, owner: "Engine") -> None:
        """Wait until the jobs of an engine that closes are ended; with the last engine the thread ends."""
        with self.changed:
            while owner.taken and self.thread.is_alive():
                self.changed.wait(0.1)  # a failed thread sends no notification
            last = all(one.closing and not one.taken for one in self.owners)
        while last and self.thread.is_alive():
            self.thread.join()

    # ---- the thread

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._work, name=f"run-{self._name}", daemon=True)

    def _work(self) -> None:
        try:
            while True:
                with self.changed:
                    while (k := self._next()) is None:
                        if all(owner.closing and not owner.taken for owner in self.owners):
                            return
                        self.changed.wait()
                    taken = self._take(k)
                for same in _by_shape(taken):
                    self._serve(k, same)
                del taken, same  # while the thread waits
        except BaseException:
            LOG.exception("%s: the thread that runs the network ended; the next request starts another", self._name)
            raise

    def _next(self) -> int | None:
        """Return the stage to run: the deepest that is due, the deepest that is full, or the first with a sample."""
        images = {k: sum(map(count, queues)) for k, queues in enumerate(self.queues) if any(queues)}
        due = [k for k, number in images.items() if self._is_due(k, min(self.batch, number))]
        full = [k for k, number in images.items() if number >= self.batch]
        return next(iter(due[-1:] or full[-1:] or list(images)[:1]), None)

    def _is_due(self, k: int, images: int) -> bool:
        """Check whether a sample has waited long enough, or its deadline leaves time for two runs of so many images."""
        now = time.monotonic()
        seconds = self.seconds[k].get(images.bit_length()) or max(self.seconds[k].values(), default=0.0)
        latest = now + 2 * (seconds + self.turn)
        return any(
            part.since + self.wait <= now or any(job.deadline <= latest for job in part.items)
            for queue in self.queues[k]
            for part in queue
        )

    def _take(self, k: int) -> dict[int, list[Waiting[Job]]]:
        """Remove the next batch of a stage from its queues, and return it by task; the tasks share it evenly."""
        queues = self.queues[k]
        waiting = {task: count(queue) for task, queue in enumerate(queues) if queue}
        turns = deque(sorted(waiting, key=lambda task: queues[task][0].since))  # the longest wait comes first
        shares = Counter[int]()
        while turns and shares.total() < self.batch:
            shares[task := turns.popleft()] += 1
            if shares[task] < waiting[task]:
                turns.append(task)
        with torch.inference_mode():
            return {task: pop(queues[task], shares[task]) for task in sorted(shares)}

    def _serve(self, k: int, taken: dict[int, list[Waiting[Job]]]) -> None:
        now, late = dict[int, Waiting[Job]](), dict[int, Waiting[Job]]()
        for task, parts in taken.items():
            with self._failing(k, task, [job for part in parts for job in part.items]), torch.inference_mode():
                stay, others = self._sorted(k, {task: joined(parts)}, turn=True)
                now, late = now | stay, late | others
        self._end_late(k, late)
        if now:
            self._run(k, now)

    def _sorted(
        self, k: int, now: dict[int, Waiting[Job]], turn: bool
    ) -> tuple[dict[int, Waiting[Job]], dict[int, Waiting[Job]]]:
        """Return the samples of each task that are in time if stage ``k`` runs on all of them, and the others."""
        stay, late = dict[int, Waiting[Job]](), dict[int, Waiting[Job]]()
        images = sum(len(part.items) for part in now.values())
        seconds = self.expected(k, images, turn)
        with torch.inference_mode():
            for task, part in now.items():
                rows = self.owners[task].late_rows(k, part, seconds)
                for some, kind in ((rows, late), (sorted(set(range(len(part.items))) - set(rows)), stay)):
                    if some:
                        kind[task] = part.chosen(some)
        self.doubt(k, images, (job for part in late.values() for job in part.items), turn)
        return stay, late

    def _end_late(self, k: int, late: dict[int, Waiting[Job]]) -> None:
        """End late samples; not under `compute`, because a callback of a future may wait for another bundle."""
        for task, part in late.items():
            with self._failing(k, task, part.items), torch.inference_mode():
                self.owners[task].end_late(k, part)

    def _run(self, k: int, now: dict[int, Waiting[Job]]) -> None:
        """Run a stage on the samples of some tasks; if it fails on several tasks, run each by itself."""
        found, seconds, asked = dict[int, tuple[Waiting[Job], ExitPredictions]](), 0.0, time.perf_counter()
        late = dict[int, Waiting[Job]]()
        try:
            with self._compute:
                self.turn = _running_mean(self.turn, time.perf_counter() - asked)
                now, late = self._sorted(k, now, turn=False)  # others may have held the lock for long
                if now:
                    found, seconds = self._computed(k, now)
        except BaseException as error:
            found = {}
            if len(now) > 1:
                LOG.warning("stage %d failed on several bundles, so each runs by itself: %s", k + 1, error)
            else:
                for task, part in now.items():
                    self._fail(k, task, part.items, error)
            release_tensors(error)
        self._end_late(k, late)
        if not found and len(now) > 1:
            for task, part in now.items():
                self._run(k, {task: part})
        samples = sum(len(part.items) for part in now.values())
        for task, (part, predictions) in found.items():
            with self._failing(k, task, part.items), torch.inference_mode():
                share = seconds * len(part.items) / samples
                if stay := self.owners[task].answer_stopped(k, part, predictions, share):
                    self.add(k + 1, task, part.chosen(stay))

    def _computed(
        self, k: int, now: dict[int, Waiting[Job]]
    ) -> tuple[dict[int, tuple[Waiting[Job], ExitPredictions]], float]:
        """Run a stage and its heads; return each task's samples with its predictions, and the seconds."""
        found, row = dict[int, tuple[Waiting[Job], ExitPredictions]](), 0
        with torch.inference_mode():
            start = time.perf_counter()
            device = self.owners[0].bundle.device
            parts = [part.inputs for part in now.values()]
            inputs = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
            counts = [len(now[task].items) if task in now else 0 for task in range(len(self.owners))]
            stage_state, logits = self._step(k, tuple(tensor.to(device) for tensor in inputs), counts)
            for task, part in now.items():
                rows = slice(row, row := row + counts[task])
                history = lengthened(part.history, logits[task])
                part = replace(part, inputs=tuple(tensor[rows] for tensor in stage_state), history=history)
                found[task] = part, predict_exit(part, k, last=k == len(self.queues) - 1)
            seconds = time.perf_counter() - start
        self._measured(k, sum(counts).bit_length(), seconds)
        return found, seconds

    def _measured(self, k: int, size: int, seconds: float) -> None:
        """Take the time of a run into account; after a doubt it replaces the expected time."""
        mean = self.seconds[k].get(size)
        if mean is None:
            self.seconds[k][size] = 0.0
        else:
            self.seconds[k][size] = seconds if (k, size) in self._doubted else _running_mean(mean, seconds)
            self._doubted.discard((k, size))

    @contextmanager
    def _failing(self, k: int, task: int, jobs: Sequence[Job]) -> Iterator[None]:
        """Answer the jobs by :class:`Failed` if the block raises an error."""
        try:
            yield
        except BaseException as error:
            self._fail(k, task, jobs, error)
            release_tensors(error)

    def _fail(self, k: int, task: int, jobs: Sequence[Job], error: BaseException) -> None:
        owner = self.owners[task]
        LOG.error("%s: stage %d failed on %d images", owner.name, k + 1, len(jobs), exc_info=error)
        why = f"stage {k + 1} failed on its batch ({type(error).__name__}: {' '.join(str(error).split())})"
        for job in jobs:
            owner.end(job, Failed(why))


def _by_shape(taken: dict[int, list[Waiting[Job]]]) -> list[dict[int, list[Waiting[Job]]]]:
    """Return the samples of a batch, by task, apart for each shape: some backbones take images of any size."""
    found = dict[tuple[torch.Size, ...], dict[int, list[Waiting[Job]]]]()
    for task, parts in taken.items():
        for part in parts:
            shapes = tuple(tensor.shape[1:] for tensor in part.inputs)
            found.setdefault(shapes, {}).setdefault(task, []).append(part)
    return list(found.values())


def _running_mean(mean: float, seconds: float) -> float:
    return 0.9 * mean + 0.1 * seconds if mean else seconds


def predict_exit(now: Waiting[Job], k: int, last: bool) -> ExitPredictions:
    """Return the predictions of exit ``k``, whose logits are the newest in the history, and which samples stop there.

    Args:
        now: Samples of one bundle; those with the same threshold share a policy.
        k: Exit index, from 0.
        last: Whether it is the last exit, at which every sample stops.
    """
    assert now.history is not None
    groups = dict[float | None, list[int]]()
    for row, job in enumerate(now.items):
        groups.setdefault(job.threshold, []).append(row)
    found, stops = list[Tensor](), [last] * len(now.items)
    for rows in groups.values():
        policy, history = now.items[rows[0]].policy, now.history if len(groups) == 1 else now.history[:, rows]
        # A policy without early exits knows the temperature of the last exit alone, unless it is told the exit.
        prediction = policy if last or policy.uses_early_exits else with_decision(policy, AtExit(k + 1))
        found.append(combined(prediction, history)[-1])
        if not last:
            for row, stop in zip(rows, policy.should_exit(history).tolist(), strict=True):
                stops[row] = stop
    order = [row for rows in groups.values() for row in rows]
    logits = found[0] if len(found) == 1 else torch.cat(found)[torch.tensor(order).argsort()]
    return ExitPredictions(wide(logits).softmax(-1).cpu(), logits.isfinite().all(-1).tolist(), stops)
