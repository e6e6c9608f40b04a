"""A request to the serving engine: its budget, its answer, and what can go wrong."""

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
    """The engine stops."""


class Late(RuntimeError):
    """The deadline passed before the first stage began."""


class Failed(RuntimeError):
    """A stage failed on the batch of the request."""


@dataclass(frozen=True)
class Limits:
    """The budget of one request.

    Args:
        threshold: Instead of the threshold of the bundle's policy, in [0, 1].
        max_gmacs: Stop at the last exit that costs no more.
        deadline: Seconds from the call of :meth:`Engine.submit` within which the answer is wanted: the sample stops at
            the last exit that it reaches in time, as far as the batches that run at that moment allow.
    """

    threshold: float | None = None
    max_gmacs: float | None = None
    deadline: float | None = None


UNLIMITED = Limits()


@dataclass(frozen=True)
class Served:
    """The answer to one request.

    Args:
        probabilities: Of the classes (classes,), on the CPU.
        exit_index: The exit at which the sample stopped, from 0.
        limited: Why it stopped there although its policy would have gone on; None if the policy decided.
    """

    probabilities: Tensor
    exit_index: int
    limited: Limit | None = None


class Job(Future[Served]):
    """A request on its way, which is its answer to come.

    Args:
        source: The image; None once it is decoded, or if nobody waits for it any more.
        policy: Decides where it stops.
        threshold: What makes its policy differ from that of others.
        last: The deepest exit that its budget pays for, from 0.
        deadline: By the engine's clock.
        plain: Whether nothing but the calibrated policy decides, so that its exit tells about the images.

    Attributes:
        ended: Whether its place in the queue was given back.
    """

    def __init__(
        self, source: Source | None, policy: Policy, threshold: float | None, last: int, deadline: float, plain: bool
    ) -> None:
        super().__init__()
        self.source, self.policy, self.threshold = source, policy, threshold
        self.last, self.deadline, self.plain = last, deadline, plain
        self.ended = False

    def cancel(self) -> bool:
        """Cancel the request and forget its image."""
        self.source = None
        return super().cancel()


@dataclass
class Counts:
    """What an engine has done so far.

    Args:
        exits: Answers by exit.
        limited: Answers by the reason why they stopped early.
        runs: Batches by stage.
        images: Images in these batches by stage.
        seconds: Time that the stages took.
    """

    exits: list[int]
    runs: list[int]
    images: list[int]
    limited: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
