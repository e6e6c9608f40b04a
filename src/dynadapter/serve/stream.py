"""A router for a flow of small batches: survivors wait until a stage has a full batch, but never too long."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy


class Answer(NamedTuple):
    """What one sample got: ``ticket``, its number in order of arrival; ``logits`` (classes,); ``exit`` from zero."""

    ticket: int
    logits: Tensor
    exit: int


@dataclass
class _Waiting:
    """Samples that wait for one stage: each tensor has one row a sample."""

    tickets: list[int]
    since: float
    held: tuple[Tensor, ...]
    history: Tensor | None


class Stream:
    """Collects samples before each stage, so that deep stages run full although few samples reach them.

    A stage runs when ``batch`` samples wait for it, or when the one that has waited longest may wait no longer: after
    ``wait`` further arrivals, or after ``seconds``. Time passes only in :meth:`push` and :meth:`poll`; a server calls
    :meth:`poll` from time to time. Answers come in order of arrival, and are those of :meth:`ExitNet.early` up to
    rounding. Not safe to share between threads. On a CPU, where the first stages run with few images, give a network
    that :func:`~dynadapter.backbones.layout.lay_out_for_cpu` has laid out.

    >>> import torch
    >>> from dynadapter import ExitNet, Never, create_backbone
    >>> net = ExitNet(create_backbone("vit_tiny_patch16_224", 3, img_size=32, patch_size=16, depth=4), every=2).eval()
    >>> stream = Stream(net, Never(), batch=4, wait=8)
    >>> with torch.inference_mode():
    ...     for image in torch.zeros(6, 1, 3, 32, 32):
    ...         stream.push(image)
    ...     answers = stream.flush()
    >>> [answer.ticket for answer in answers]
    [0, 1, 2, 3, 4, 5]

    Args:
        net: The network, in evaluation mode.
        policy: Decides who leaves.
        batch: Samples with which a stage is full.
        wait: Arrivals after which a waiting sample is waited for no longer, at every stage; 0 lets nothing wait.
        seconds: Time after which the same holds, at every stage; None for no such bound.
        class_first: See :meth:`ExitNet.early`.
        clock: Tells the time in seconds.

    Raises:
        ValueError: If the policy does not fit the network, or a number is out of range.
    """

    def __init__(
        self,
        net: ExitNet,
        policy: Policy,
        batch: int = 16,
        wait: int = 64,
        seconds: float | None = None,
        class_first: bool = True,
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
        self.class_first = class_first
        self.clock = clock
        self.arrived = 0
        self.given = 0
        self._queues: list[deque[_Waiting]] = [deque() for _ in range(net.num_exits)]
        self._answers: dict[int, Answer] = {}

    def push(self, images: Tensor) -> None:
        """Takes images (batch, channels, height, width) and runs the stages that are due."""
        if not len(images):
            return
        tickets = list(range(self.arrived, self.arrived + len(images)))
        self.arrived += len(images)
        self._queues[0].append(_Waiting(tickets, self.clock(), (images,), None))
        self.poll()

    def poll(self) -> None:
        """Runs the stages that are due."""
        for k, queue in enumerate(self._queues):
            while queue and (sum(len(w.tickets) for w in queue) >= self.batch or self._overdue(queue[0])):
                self._run(k)

    def pop(self) -> list[Answer]:
        """Gives the answers that are ready, in order of arrival: up to the first sample that still waits."""
        ready = []
        while self.given in self._answers:
            ready.append(self._answers.pop(self.given))
            self.given += 1
        return ready

    def flush(self) -> list[Answer]:
        """Waits for nobody any more and gives all answers that are left."""
        for k, queue in enumerate(self._queues):
            while queue:
                self._run(k)
        return self.pop()

    def _overdue(self, waiting: _Waiting) -> bool:
        if self.arrived - 1 - waiting.tickets[0] >= self.wait:
            return True
        return self.seconds is not None and self.clock() - waiting.since >= self.seconds

    def _take(self, k: int) -> _Waiting:
        """Takes up to a full batch off a queue, the first to come first."""
        queue, taken, count = self._queues[k], [], 0
        while queue and count < self.batch:
            first = queue.popleft()
            room = self.batch - count
            if len(first.tickets) > room:
                cut = lambda t, first=first, room=room: _Waiting(  # noqa: E731
                    first.tickets[t], first.since, tuple(h[t] for h in first.held), _rows(first.history, t)
                )
                queue.appendleft(cut(slice(room, None)))
                first = cut(slice(room))
            taken.append(first)
            count += len(first.tickets)
        if len(taken) == 1:
            return taken[0]
        history = None if taken[0].history is None else torch.cat([w.history for w in taken], dim=1)  # type: ignore[misc]
        held = tuple(torch.cat(parts) for parts in zip(*(w.held for w in taken), strict=True))
        return _Waiting([t for w in taken for t in w.tickets], taken[0].since, held, history)

    def _run(self, k: int) -> None:
        """Runs one stage on one batch, answers who leaves and sends the others on."""
        now = self._take(k)
        x = self.net.complete(k - 1, now.held) if k else self.net.embed(now.held[0])
        last = k == self.net.num_exits - 1
        if not last and not self.policy.asks:
            self._queues[k + 1].append(_Waiting(now.tickets, self.clock(), (self.net.stage(k, x),), None))
            return
        seen, held = self.net.begin(k, x, self.class_first)
        logits = self.net.head(k, seen)
        history = logits[None] if now.history is None else torch.cat([now.history, logits[None]])
        leave = [True] * len(logits) if last else self.policy.leave(history).tolist()
        for row, (ticket, leaves) in enumerate(zip(now.tickets, leave, strict=True)):
            if leaves:
                self._answers[ticket] = Answer(ticket, logits[row], k)
        stay = [row for row, leaves in enumerate(leave) if not leaves]
        if stay:
            rows = torch.tensor(stay, device=logits.device)
            tickets = [now.tickets[row] for row in stay]
            waiting = _Waiting(tickets, self.clock(), tuple(part[rows] for part in held), history[:, rows])
            self._queues[k + 1].append(waiting)


def _rows(history: Tensor | None, rows: slice) -> Tensor | None:
    return None if history is None else history[:, rows]
