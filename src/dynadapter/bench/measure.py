"""Time the arms of a bundle, interleaved, at several batch sizes, and count their costs."""

from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from dynadapter.bench.arms import Absent, Arm, Work, build
from dynadapter.bench.settings import Settings
from dynadapter.bench.subject import Subject, images_in_a_round
from dynadapter.bench.timing import VOID, Times, interleave, is_void, machine, percentile, ratio, representative
from dynadapter.cost import ExitCosts
from dynadapter.serve.bundle import Bundle, load
from dynadapter.spec import plain

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

CLOCKS = {"cpu": "CPU seconds of the process", "wall": "wall-clock seconds", "device": "seconds between device events"}
WARMUP = 2
"""Rounds before the counted ones."""


def measure(settings: Settings, bundle: Bundle | None = None) -> dict[str, Any]:
    """Time the arms that the settings name.

    Args:
        settings: What to time, and how.
        bundle: Instead of the one that the settings name; it is changed.

    Returns:
        All results as plain data.

    Raises:
        ValueError: If bundle, images and settings do not fit each other.
    """
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; leave --device out to time on the CPU")
    bundle = bundle or load(settings.bundle, settings.weights, settings.pretrained)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with ExitStack() as stack:
            return _all_batch_sizes(Subject(bundle, settings, device, stack))
    finally:
        torch.set_num_threads(threads)


def _all_batch_sizes(subject: Subject) -> dict[str, Any]:
    # Imported here: its annotations Union[float, int], if typing caches them before Lightning's Union[int, float], make
    # the command line read --trainer.limit_val_batches 1 as 1.0, which is all batches.
    from rich.progress import Progress

    settings, console = subject.settings, Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(settings.batch_sizes) * (settings.rounds + WARMUP))
        batches = [_one_batch_size(subject, batch, progress, task) for batch in settings.batch_sizes]
    return {
        "notes": list(dict.fromkeys(subject.notes)),
        "policy": plain(subject.policy),
        "shares_of_all_images": _shares(subject.exit_index, subject.net.num_exits),
        "images": "real" if settings.images else "noise",
        "clock": subject.clock,
        "clock_in_words": CLOCKS[subject.clock],
        "void_beyond": VOID,
        "batches": batches,
        "machine": machine(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _one_batch_size(subject: Subject, batch: int, progress: "Progress", task: "TaskID") -> dict[str, Any]:
    exits = subject.net.num_exits
    picked = representative(subject.exit_index, images_in_a_round(batch)).to(subject.pool.device)
    images, shares = subject.pool[picked], _shares(subject.exit_index[picked], exits)
    with torch.inference_mode():
        class_first = subject.net.prefers_class_first(subject.net.embed(images[:batch]))
    costs = subject.costs(True, class_first)
    work = Work(subject, batch, images, class_first, costs.average(shares))
    arms: dict[str, Arm] = {}
    reached: dict[str, list[float]] = {}
    for name in subject.settings.arms:
        progress.update(task, description=f"batch {batch}: preparing {name}")
        try:
            arm = build(name, work)
            with torch.inference_mode():  # the first call may compile, or fail
                results = [arm.serve(part) for part in work.batches(arm.arrays)]
        except Exception as error:
            if name == "static":
                raise
            if not isinstance(error, Absent) or str(error):
                subject.notes.append(f"{name} is not timed at batch {batch}: {_first_line(error)}")
            continue
        arms[name] = arm
        if isinstance(arm.cost, ExitCosts):
            reached[name] = _shares(torch.cat([torch.as_tensor(part) for part in results]), exits)
    progress.update(task, description=f"batch {batch}: timing")
    calls = {name: [partial(arm.serve, part) for part in work.batches(arm.arrays)] for name, arm in arms.items()}
    with torch.inference_mode():
        times = interleave(
            calls | {"control": calls["static"]},
            subject.settings.rounds,
            WARMUP,
            subject.device,
            after=lambda: progress.advance(task),
        )
    seconds = {name: taken.rounds(subject.clock) for name, taken in times.items()}
    control = ratio(seconds["control"], seconds["static"])
    return {
        "batch": batch,
        "images": len(images),
        "class_first": class_first,
        "shares": shares,
        "control": control,
        "void": is_void(control),
        "static_gmacs": costs.static / 1e9,
        "exit_gmacs": costs.gmacs,
        "exit_gmacs_run": [macs / 1e9 for macs in costs.class_first_macs or costs.macs],
        "arms": {name: _row(name, arms, reached.get(name), times, seconds, batch, costs.static) for name in arms},
        "seconds": {name: _rounded(taken) for name, taken in times.items()},
    }


def _row(
    name: str,
    arms: dict[str, Arm],
    shares: list[float] | None,
    times: dict[str, Times],
    seconds: dict[str, list[float]],
    batch: int,
    static: int,
) -> dict[str, Any]:
    """Return the numbers of one arm."""
    arm = arms[name]
    if isinstance(arm.cost, ExitCosts):
        assert shares is not None
        macs, run = arm.cost.average(shares), arm.cost.average_run(shares)
    else:
        macs = run = arm.cost
    baseline = arm.baseline if arm.baseline in arms else "static"
    speedup = ratio(seconds[baseline], seconds[name])
    milliseconds = [1000 * call for call in times[name].calls("wall")]
    return {
        "detail": arm.detail,
        "ms_p50": percentile(milliseconds, 0.5),
        "ms_p95": percentile(milliseconds, 0.95),
        "images_per_second": len(milliseconds) * batch / sum(milliseconds) * 1000,
        "gmacs": macs / 1e9,
        "gmacs_run": run / 1e9,
        "cost": macs / static,
        "shares": shares,
        "mac_speedup": static / macs,
        "speedup": ratio(seconds["static"], seconds[name]),
        "baseline": baseline,
        "speedup_over_baseline": speedup,
        "efficiency": speedup * macs / static,
    }


def _shares(exit_index: Tensor, exits: int) -> list[float]:
    counts: list[float] = exit_index.cpu().bincount(minlength=exits).double().tolist()
    return [count / len(exit_index) for count in counts]


def _rounded(times: Times) -> dict[str, list[list[float]]]:
    """Return the seconds of every call by clock, rounded to a tenth of a microsecond."""
    clocks = {clock: getattr(times, clock) for clock in CLOCKS}
    return {
        clock: [[round(call, 7) for call in calls] for calls in rounds] for clock, rounds in clocks.items() if rounds
    }


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
