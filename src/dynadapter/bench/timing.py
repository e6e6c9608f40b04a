"""Timing on a busy machine: interleaved arms, three clocks, medians of ratios, and one arm timed twice."""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from dynadapter.exits.policies import Confidence, confidence
from dynadapter.serve.backends import version_of
from dynadapter.serve.fastest import cpu_name

Call = Callable[[], Any]
Clock = Literal["cpu", "wall", "device"]

VOID = 0.03
"""A run is void if the same arm, timed twice, differs from itself by more than this fraction."""

CHUNKS = (8, 16, 32, 64)
"""Images at a time that are tried for an arm that may cut its batch."""

PACKAGES = ("torch", "timm", "lightning", "fvcore", "onnxruntime", "openvino", "dynadapter")


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Return the machine and the versions of packages; those that are not installed are left out."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for package in packages:
        try:
            found[package] = version_of(package)
        except ImportError:
            continue
    return found


# ---- clocks ----------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """The times of an arm by three clocks: for each round the seconds of each call.

    Args:
        cpu: CPU seconds of all threads of the process; other programs disturb this clock least.
        wall: Wall-clock seconds.
        device: Seconds between two events on the device; empty on a CPU.
    """

    cpu: list[list[float]]
    wall: list[list[float]]
    device: list[list[float]]

    def rounds(self, clock: Clock) -> list[float]:
        """Return the seconds of each round, its calls added up."""
        return [sum(calls) for calls in getattr(self, clock)]

    def calls(self, clock: Clock) -> list[float]:
        """Return the seconds of each call of all rounds."""
        return list(chain.from_iterable(getattr(self, clock)))


def clock_of(device: torch.device, threads: int) -> Clock:
    """Return the clock for comparing arms.

    It is the device's own clock on a device. On a CPU it is CPU seconds for one thread, and the wall clock for several
    threads, because CPU seconds add up over threads.
    """
    if device.type != "cpu":
        return "device"
    return "cpu" if threads == 1 else "wall"


def timed(call: Call, device: torch.device) -> tuple[float, float, float | None]:
    """Run a call and wait for the device before and after it.

    Returns:
        CPU seconds of the process, wall-clock seconds, and seconds between two CUDA events (None on a CPU).
    """
    if device.type != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return time.process_time() - cpu, time.perf_counter() - wall, None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    start.record(stream)
    call()
    end.record(stream)
    torch.cuda.synchronize(device)
    return time.process_time() - cpu, time.perf_counter() - wall, start.elapsed_time(end) / 1000


def interleave(
    arms: Mapping[str, Call | Sequence[Call]],
    rounds: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    after: Call = lambda: None,
) -> dict[str, Times]:
    """Run all arms once a round, in a new random order each time.

    If the machine slows down, all arms slow down, and no arm always runs after the same other arm.

    Args:
        arms: By name, one call, or several calls that run in turn and are timed separately.
        rounds: Number of counted rounds.
        warmup: Number of rounds before them that do not count.
        device: Device of the arms.
        after: Called after each round, to show progress.
    """
    device, names, order = torch.device(device), list(arms), random.Random(0)
    calls = {name: [arm] if callable(arm) else list(arm) for name, arm in arms.items()}
    times = {name: Times([], [], []) for name in names}
    for round in range(-warmup, rounds):
        order.shuffle(names)
        for name in names:
            cpu, wall, event = zip(*(timed(call, device) for call in calls[name]), strict=True)
            if round >= 0:
                times[name].cpu.append(list(cpu))
                times[name].wall.append(list(wall))
                if None not in event:
                    times[name].device.append(list(event))
        after()
    return {name: times[name] for name in arms}


def ratio(numerator: Iterable[float], denominator: Iterable[float]) -> float:
    """Return the median of the ratios round by round.

    >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a fraction of all values lies, interpolated between neighbours.

    >>> percentile([1.0, 2.0, 3.0], 0.5)
    2.0
    """
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def is_void(control: float) -> bool:
    """Check whether the ratio of an arm to itself is too far from 1 for a valid run; NaN is."""
    return not abs(control - 1) <= VOID


def best_chunk(
    make: Callable[[int], Call], batch: int, clock: Clock = "cpu", device: torch.device | str = "cpu"
) -> int:
    """Return the chunk size with which an arm is fastest; a large batch may exceed a CPU's caches."""
    chunks = [*(chunk for chunk in CHUNKS if chunk < batch), batch]
    if len(chunks) == 1:
        return batch
    times = interleave({str(chunk): make(chunk) for chunk in chunks}, 3, 1, device)
    return min(chunks, key=lambda chunk: statistics.median(times[str(chunk)].rounds(clock)))


# ---- exit shares ------------------------------------------------------------------------------------------------


def share_thresholds(logits: Tensor, shares: Sequence[float]) -> Confidence:
    """Find one confidence threshold per early exit that gives the wanted exit shares on these samples.

    Each threshold lies between the confidences of two samples. Samples with equal confidence exit together, so the
    reached shares can differ. Source: MSDNet's walk over the exits (Huang et al. 2018).

    Args:
        logits: (exits, samples, classes).
        shares: (exits,), the wanted exit shares; all remaining samples take the last exit.

    Raises:
        ValueError: If there is not one share for each exit, or they do not sum to 1.
    """
    exits, samples, _ = logits.shape
    if len(shares) != exits or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-3:
        raise ValueError(f"shares={list(shares)} must be {exits} numbers, one for each exit, at least 0, with sum 1")
    scores = confidence(logits).double()
    remaining = torch.ones(samples, dtype=torch.bool, device=logits.device)
    found: list[float] = []
    for k, share in enumerate(shares[:-1]):
        ranked = scores[k][remaining].sort(descending=True).values.tolist()
        count = min(round(share * samples), len(ranked))
        above = ranked[count - 1] if count else 1.0
        below = ranked[count] if count < len(ranked) else 0.0
        found.append((above + below) / 2)
        remaining &= scores[k] < found[-1]
    return Confidence(tuple(found))


def representative(exit_index: Tensor, count: int) -> Tensor:
    """Choose samples with the same exit shares as all samples, in random order.

    Args:
        exit_index: (samples,), the exit of each sample, from 0.
        count: Number of samples to choose; if it exceeds the number of samples, some are repeated.

    Returns:
        Indices (count,).

    >>> exit_index = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    >>> exit_index[representative(exit_index, 5)].sort().values
    tensor([0, 0, 0, 1, 1])
    """
    ranked = exit_index.cpu().argsort(stable=True)
    places = ((torch.arange(count) + 0.5) * len(ranked) / count).long()
    return ranked[places][torch.randperm(count, generator=torch.Generator().manual_seed(0))]
