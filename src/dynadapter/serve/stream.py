"""Route a stream of small batches: before each stage, samples wait for a full batch, up to a limit."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.backbones import fixed_size, input_shape
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy, combined
from dynadapter.serve.stages import Waiting, computed, count, joined, nonfinite, pop, release_tensors


class Answer(NamedTuple):
    """The result for one sample.

    ``ticket`` is the sample's number in the order of arrival, ``logits`` (classes,) are those of the exit at which it
    stopped, and ``exit_index`` is that exit, zero-based. If ``error`` is not None, there is no result: a stage failed
    on the sample's batch, or its logits are not finite.
    """

    ticket: int
    logits: Tensor | None
    exit_index: int | None
    error: Exception | None = None


class Stream:
    """Collect samples before each stage, so that deep stages run full batches although few samples reach them.

    A stage runs when `batch` samples wait for it, or when the first of them has waited long enough: for `wait` later
    arrivals, or for `seconds`. Time is checked only in :meth:`push` and :meth:`poll`; a server should call :meth:`poll`
    regularly. Answers are in the order of arrival and equal those of :meth:`ExitNet.early` up to rounding. If a stage
    fails, the samples of its batch get the error as answer; all others continue. Several threads may use one stream. On
    a CPU the first stages run with few images; prepare the network by
    :func:`~dynadapter.backbones.layout.lay_out_for_cpu`.

    >>> import torch
    >>> from dynadapter import ExitNet, Never, create_backbone
    >>> net = ExitNet(create_backbone("vit_tiny_patch16_224", 3, img_size=32, patch_size=16, depth=4), every=2).eval()
    >>> stream = Stream(net, Never(), batch=4, wait=8)
    >>> [stream.push(image)[0] for image in torch.zeros(6, 1, 3, 32, 32)]
    [0, 1, 2, 3, 4, 5]
    >>> [answer.ticket for answer in stream.flush()]
    [0, 1, 2, 3, 4, 5]

    Args:
        net: The network, in evaluation mode.
        policy: Decides at which exit a sample stops.
        batch: Samples in a full batch.
        wait: Greatest number of later arrivals for which a sample waits, at every stage; 0 runs every sample at once.
        seconds: Greatest time for which a sample waits, at every stage; None for no limit.
        clock: Returns the time in seconds.

    Raises:
        ValueError: The policy does not fit the network, or a number is out of range.
    """

    def __init__(
        self,
        net: ExitNet,
        policy: Policy,
        batch: int = 16,
        wait: int = 64,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        policy.check(net.num_exits)
        if batch < 1 or wait < 0 or (seconds is not None and not seconds >= 0):
            raise ValueError(f"batch={batch} must be at least 1, wait={wait} and seconds={seconds} at least 0")
        self.net = net
        self.policy = policy
        self.batch = batch
        self.wait = wait
        self.seconds = seconds
        self.clock = clock
        self.arrived = 0
        self.returned = 0
        self._queues: list[deque[Waiting[int]]] = [deque() for _ in range(net.num_exits)]
        self._answers: dict[int, Answer] = {}
        self._shape: torch.Size | None = None  # (channels, height, width) of the images that have no answer yet
        self._lock = threading.RLock()

    def push(self, images: Tensor) -> range:
        """Add images (batch, channels, height, width), which are copied, and run the stages that are due.

        Returns:
            Their tickets.

        Raises:
            ValueError: They do not fit the network, or have another size than images that still wait; none is added.
        """
        with self._lock:
            self._check(images)
            tickets = range(self.arrived, self.arrived + len(images))
            if tickets:
                self.arrived += len(images)
                self._shape = images.shape[1:]
                self._queues[0].append(Waiting(list(tickets), self.clock(), (images.detach().clone(),)))
                self.poll()
            return tickets

    def poll(self) -> None:
        """Run the stages that are due."""
        with self._lock:
            for k, queue in enumerate(self._queues):
                while queue and (count(queue) >= self.batch or self._overdue(queue[0])):
                    self._run(k)

    def pop(self) -> list[Answer]:
        """Return the answers that are ready, in the order of arrival, up to the first sample that still waits."""
        ready = []
        with self._lock:
            while self.returned in self._answers:
                ready.append(self._answers.pop(self.returned))
                self.returned += 1
        return ready

    def flush(self) -> list[Answer]:
        """Run all waiting samples now, and return the remaining answers."""
        with self._lock:
            for k, queue in enumerate(self._queues):
                while queue:
                    self._run(k)
            return self.pop()

    def _check(self, images: Tensor) -> None:
        """Raise a ValueError for images that do not fit the network or the waiting images."""
        like = next(self.net.backbone.parameters())
        size = fixed_size(self.net.backbone)
        waiting = self._shape if self.returned + len(self._answers) < self.arrived else None
        *first, _, _ = input_shape(self.net.backbone, 0, 0)
        if not isinstance(images, Tensor):
            given: str | None = type(images).__name__
        elif list(images.shape[1:-2]) != first or (size and images.shape[-2:] != (size, size)):
            given = f"shape {tuple(images.shape)}"
        elif waiting is not None and images.shape[1:] != waiting:
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])} cannot be in one batch with those that still wait, "
                f"of shape {tuple(waiting)}; use one stream for each size, or flush first"
            )
        else:
            differs = images.dtype != like.dtype or images.device != like.device
            given = f"{images.dtype} on {images.device}" if differs else None
        if given:
            allowed = f"({', '.join(map(str, ('batch', *first, size or 'height', size or 'width')))})"
            raise ValueError(f"images are {given}; give a tensor {allowed} of {like.dtype} on {like.device}")

    def _overdue(self, waiting: Waiting[int]) -> bool:
        if self.arrived - 1 - waiting.items[0] >= self.wait:
            return True
        return self.seconds is not None and self.clock() - waiting.since >= self.seconds

    def _run(self, k: int) -> None:
        """Run one stage on one batch, answer the samples that stop, and queue the others for the next stage."""
        now = joined(pop(self._queues[k], self.batch))
        try:
            answers, remaining = self._computed(k, now)
        except Exception as error:
            release_tensors(error)
            answers, remaining = [Answer(ticket, None, None, error) for ticket in now.items], None
            del now  # the frames of the error lead back to this one
        except BaseException:  # Ctrl-C: the samples wait again
            self._queues[k].appendleft(now)
            raise
        self._answers |= {answer.ticket: answer for answer in answers}
        if remaining is not None:
            self._queues[k + 1].append(remaining)

    def _step(self, k: int, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Run a stage, and its head if the policy or the last exit reads it."""
        if k == self.net.num_exits - 1 or self.policy.uses_early_exits:
            return self.net.step(k, inputs)
        return (self.net.stage(k, self.net.complete(k - 1, inputs) if k else self.net.embed(*inputs)),), None

    @torch.inference_mode()
    def _computed(self, k: int, now: Waiting[int]) -> tuple[list[Answer], Waiting[int] | None]:
        """Compute a stage; return the answers, and the samples that continue to the next stage."""
        last = k == self.net.num_exits - 1
        now = computed(self._step, k, now)
        if not last and not self.policy.uses_early_exits:
            return [], replace(now, since=self.clock())
        assert now.history is not None
        stops = [True] * len(now.items) if last else self.policy.should_exit(now.history).tolist()
        logits = combined(self.policy, now.history)[-1]
        finite = logits.isfinite().all(-1).tolist()
        answers = [
            Answer(ticket, logits[row], k) if good else Answer(ticket, None, None, nonfinite(k))
            for row, (ticket, stop, good) in enumerate(zip(now.items, stops, finite, strict=True))
            if stop
        ]
        stay = [row for row, stop in enumerate(stops) if not stop]
        return answers, replace(now.chosen(stay), since=self.clock()) if stay else None
