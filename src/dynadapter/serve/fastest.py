"""Measure once which backend runs a bundle fastest on this machine, and remember it."""

import json
import platform
import statistics
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynadapter.backbones import in_chans
from dynadapter.exits.stages import Step
from dynadapter.files import one_line, write
from dynadapter.limits import read_json
from dynadapter.serve.backends import NEEDED, Backend, cache_of, image_size, missing, open_graphs, version_of
from dynadapter.serve.drift import Reference

if TYPE_CHECKING:
    from dynadapter.serve.bundle import Bundle

ROUNDS = 7
"""Counted rounds; every backend runs each stage once in a round."""
FASTER = 0.97
"""Another backend than torch must need less than this fraction of its time: medians of a few rounds are not exact."""


def cpu_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def fastest(bundle: "Bundle", batch_size: int) -> tuple[Backend, str]:
    """Return the fastest backend for a bundle on the CPU, and a line with the times.

    The times are measured at the first use, in some seconds beside the export, and kept with the graphs; those of
    another processor, number of threads, batch size or version are measured anew. Each stage runs on noise, on as many
    images as reach it by the exit shares of the bundle's calibration; without those, every image reaches every stage.
    """
    offered: list[Backend] = [name for name in ("onnx", "openvino") if not missing(name)]
    lacking = [f"{name} not installed" for name in NEEDED if name not in offered]
    if not offered:
        return "torch", f"backend torch (auto: {', '.join(lacking)})"
    here = f"{cpu_name()}, {torch.get_num_threads()} threads, batch {batch_size}, " + ", ".join(
        f"{name} {version_of(name)}" for name in ("torch", *NEEDED[offered[-1]])
    )
    file = cache_of(bundle) / "measured.json"
    stored: dict[str, Any] = {}
    try:
        stored = dict(read_json(file))
        seconds: dict[Backend, float] = {name: float(stored[here][name]) for name in ("torch", *offered)}
    except (OSError, ValueError, KeyError, TypeError):
        try:
            seconds = measure(bundle, offered, batch_size)
        except Exception as error:  # not every network can be exported, and exporters fail in many ways
            reason = one_line(error)[:200]
            return "torch", f"backend torch (auto: the graphs of the others failed: {reason})"
        with suppress(OSError):  # a cache that cannot be written: measured again at the next start
            write(file, json.dumps({**stored, here: seconds}, indent=1).encode())
    best = min(seconds, key=lambda name: seconds[name] * (FASTER if name == "torch" else 1))
    times = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())
    where = f"an image at batch {batch_size}"
    return best, f"backend {best} (auto: {', '.join([f'{times} {where}', *lacking])})"


@torch.inference_mode()
def measure(bundle: "Bundle", backends: list[Backend], batch_size: int) -> dict[Backend, float]:
    """Return the median seconds an image, by backend, torch first; arms are interleaved."""
    net, size = bundle.net, image_size(bundle)
    images = torch.randn(batch_size, in_chans(net.backbone) or 3, size, size).to(next(net.backbone.parameters()))
    first = net.prefers_class_first(net.embed(images))
    steps: dict[Backend, Step] = {"torch": partial(net.step, class_first=first)}
    steps |= {name: open_graphs(bundle, name).step for name in backends}
    reached = _reached(bundle)
    taken: dict[Backend, list[float]] = {name: [] for name in steps}
    for turn in range(-1, ROUNDS):
        for name, step in steps.items():
            seconds = _once(step, images, reached)
            if turn >= 0:  # the round before warms up
                taken[name].append(seconds / batch_size)
    return {name: statistics.median(rounds) for name, rounds in taken.items()}


def _reached(bundle: "Bundle") -> list[float]:
    """Return the fraction of images that reach each stage."""
    exits, reference = bundle.net.num_exits, Reference.of(bundle.config)
    shares = reference.shares if reference else (*[0.0] * (exits - 1), 1.0)
    return [sum(shares[k:]) for k in range(exits)]


def _once(step: Step, images: Tensor, reached: list[float]) -> float:
    """Return the seconds of a batch: where less than one image is left, a stage counts for that fraction."""
    total = 0.0
    inputs: tuple[Tensor, ...] = (images,)
    for k, fraction in enumerate(reached):
        left = fraction * len(images)
        inputs = tuple(part[: max(1, round(left))] for part in inputs)
        start = time.perf_counter()
        inputs, _ = step(k, inputs)
        total += (time.perf_counter() - start) * left / max(1, round(left))
    return total
