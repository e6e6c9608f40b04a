"""Samples that wait for a stage of a network, and the computation of the stage, for the stream and the engine."""

import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dynadapter.exits.stages import Step

T = TypeVar("T")


@dataclass
class Waiting(Generic[T]):
    """Samples that wait for one stage.

    Args:
        items: The caller's object for each sample.
        since: When the first of them began to wait, in seconds.
        inputs: Inputs of :meth:`ExitNet.step`; one row per sample.
        history: Logits of the exits so far (exits, samples, classes); None before the first exit.
    """

    items: list[T]
    since: float
    inputs: tuple[Tensor, ...]
    history: Tensor | None = None

    def part(self, rows: slice) -> "Waiting[T]":
        """Return a range of samples; the tensors are views."""
        history = None if self.history is None else self.history[:, rows]
        return replace(self, items=self.items[rows], inputs=tuple(part[rows] for part in self.inputs), history=history)

    def chosen(self, rows: Sequence[int]) -> "Waiting[T]":
        """Return some samples; the tensors are copies unless all are chosen."""
        if len(rows) == len(self.items):
            return self
        index = torch.tensor(rows, dtype=torch.int64, device=self.inputs[0].device)
        inputs = tuple(part.index_select(0, index) for part in self.inputs)
        history = None if self.history is None else self.history.index_select(1, index)
        return replace(self, items=[self.items[row] for row in rows], inputs=inputs, history=history)


def count(queue: deque[Waiting[T]]) -> int:
    """Return the number of waiting samples."""
    return sum(len(part.items) for part in queue)


def pop(queue: deque[Waiting[T]], most: int) -> list[Waiting[T]]:
    """Remove up to the given number of samples from a queue, and return them in order of arrival, not yet joined."""
    taken, number = list[Waiting[T]](), 0
    while queue and number < most:
        first, room = queue.popleft(), most - number
        if len(first.items) > room:
            queue.appendleft(first.part(slice(room, None)))
            first = first.part(slice(room))
        taken.append(first)
        number += len(first.items)
    return taken


def joined(parts: Sequence[Waiting[T]]) -> Waiting[T]:
    """Join samples that wait for the same stage, at least one part."""
    if len(parts) == 1:
        return parts[0]
    histories = [part.history for part in parts if part.history is not None]
    history = torch.cat(histories, dim=1) if histories else None
    inputs = tuple(torch.cat(tensors) for tensors in zip(*(part.inputs for part in parts), strict=True))
    return Waiting([item for part in parts for item in part.items], parts[0].since, inputs, history)


def lengthened(history: Tensor | None, logits: Tensor) -> Tensor:
    """Return a history (exits so far, samples, classes) with the logits (samples, classes) of one more exit."""
    return logits[None] if history is None else torch.cat([history, logits[None]])


def computed(step: Step, k: int, now: Waiting[T]) -> Waiting[T]:
    """Run stage ``k`` and its head.

    Returns:
        The same samples, waiting for the next stage; if a head ran, the new exit is the last one in their history.
    """
    stage_state, logits = step(k, now.inputs)
    if logits is None:
        return replace(now, inputs=stage_state)
    return replace(now, inputs=stage_state, history=lengthened(now.history, logits))


def nonfinite(k: int) -> ValueError:
    """Return the error of a sample whose logits at exit ``k`` are not finite."""
    return ValueError(f"the logits of exit {k + 1} are not finite; check the image for NaN, and the network's weights")


def release_tensors(error: BaseException | None) -> None:
    """Clear the frames in the tracebacks of an error and its causes, because they would keep the batch in memory."""
    if error is not None:
        ended = error.__traceback__ and error.__traceback__.tb_next  # the first frame, of the caller, still runs
        error.__traceback__ = ended
        traceback.clear_frames(ended)
        release_tensors(error.__cause__ or error.__context__)
