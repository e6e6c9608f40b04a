"""A request to the serving engine: its budget, its answer, and its errors."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dynadapter.exits.policies import Policy
from dynadapter.serve.bundle.loading import Source

Limit = Literal["max_gmacs", "deadline", "load"]
"""Why a sample stopped before its policy let it."""


class Refused(RuntimeError):
    """A request that was not accepted; it may be sent again after ``retry_after`` seconds."""

    retry_after = 1


class Full(Refused):
    """The queue is full."""


class Closed(Refused):
    """The engine is closed."""


class Late(RuntimeError):
    """The deadline passed before the first stage began."""


class Failed(RuntimeError):
    """A stage failed on the batch of the request."""


@dataclass(frozen=True)
class Limits:
    """The budget of one request.

    Args:
        threshold: Threshold in [0, 1] to use instead of the policy's own.
        max_gmacs: Stop at the last exit that costs no more.
        deadline: Seconds from the call of :meth:`Engine.submit` in which the answer is wanted. The sample stops at the
            last exit that it can reach in time; a batch that is already running is not interrupted.
    """

    threshold: float | None = None
    max_gmacs: float | None = None
    deadline: float | None = None


UNLIMITED = Limits()


@dataclass(frozen=True)
class Served:
    """The answer to one request.

    Args:
        probabilities: Probabilities of the classes (classes,), on the CPU.
        exit_index: The exit at which the sample stopped, from 0.
        limited: Why it stopped before its policy would have stopped it; None if the policy decided.
    """

    probabilities: Tensor
    exit_index: int
    limited: Limit | None = None


class Job(Future[Served]):
    """A request that is being processed, and the future of its answer.

    Args:
        source: The image; None after it is decoded or cancelled.
        policy: Decides at which exit the sample stops.
        threshold: The request's own threshold; requests with the same threshold share a policy.
        last: Index of the deepest exit that the budget allows.
        deadline: Time of the deadline by the engine's clock.
        plain: Whether only the calibrated policy decides, so that the exit counts for the drift.

    Attributes:
        ended: Whether its place in the queue is free again.
    """

    def __init__(
        self, source: Source | None, policy: Policy, threshold: float | None, last: int, deadline: float, plain: bool
    ) -> None:
        super().__init__()
        self.source, self.policy, self.threshold = source, policy, threshold
        self.last, self.deadline, self.plain = last, deadline, plain
        self.ended = False

    def cancel(self) -> bool:
        """Cancel the request and release its image."""
        self.source = None
        return super().cancel()


@dataclass
class Counts:
    """Counters of an engine since its start.

    Args:
        exits: Answers by exit.
        limited: Answers by the reason why they stopped early.
        runs: Batches by stage.
        images: Images in these batches by stage.
        seconds: Total time of the stages.
    """

    exits: list[int]
    runs: list[int]
    images: list[int]
    limited: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
