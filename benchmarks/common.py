"""What the benchmark programs share: arms interleaved call by call, medians of ratios, one JSON line a run."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from dynadapter import Balanced, Confidence, ExitNet, lay_out_for_cpu
from dynadapter.bench import timing
from dynadapter.bench.timing import VOID, best_chunk, cpu_name, is_void, machine, ratio, share_thresholds

__all__ = ["RESULTS", "VOID", "Log", "arguments", "best_chunk", "build", "interleave", "is_void", "machine", "ratio"]
__all__ += ["BACKBONES", "IMAGES", "SHARES", "images_a_call", "mark", "shares_of", "thresholds"]

RESULTS = Path(__file__).parent / "results"

BACKBONES = {
    "ViT-Ti, 64 tokens": dict(name="vit_tiny_patch16_224", img_size=48, patch_size=6),
    "ViT-S/16, 224": dict(name="vit_small_patch16_224", img_size=224),
}
SHARES = {"50/30/15/5": (0.5, 0.3, 0.15, 0.05), "25/25/25/25": (0.25, 0.25, 0.25, 0.25)}
IMAGES = 20
"""Images a call at least: enough that the shares come out whole, or nearly."""


# ---- time


def interleave(
    arms: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Runs all arms once a round, in an order drawn anew for each; gives seconds.

    They are CPU seconds of the process, or on a GPU those between two events. See
    :func:`dynadapter.bench.timing.interleave`.
    """
    clock = timing.clock_of(torch.device(device), threads=1)
    times = timing.interleave(arms, rounds, warmup, device)
    return {name: taken.rounds(clock) for name, taken in times.items()}


def mark(control: float) -> str:
    """Prints the ratio of an arm to itself, and whether the run is void."""
    return f"{control:.3f}{' VOID' if is_void(control) else ''}"


# ---- networks and images


def build(name: str, laid_out: bool = True, **options: Any) -> tuple[torch.nn.Module, ExitNet]:
    """Makes a backbone and the network with four exits around it; both are laid out for a CPU unless told otherwise."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=10, **options).eval()
    net = ExitNet(backbone, Balanced(), every=max(len(backbone.blocks) // 4, 1)).eval()
    return backbone, lay_out_for_cpu(net) if laid_out else net


def images_a_call(batch: int) -> int:
    """Says how many images an arm's call has: whole batches, at least 20 images."""
    return batch * -(-IMAGES // batch)


def thresholds(net: ExitNet, images: torch.Tensor, shares: tuple[float, ...]) -> Confidence:
    """Finds per-exit thresholds with which the shares leave."""
    with torch.no_grad():
        return share_thresholds(torch.cat([net(part) for part in images.split(8)], dim=1), shares)


def shares_of(exits: torch.Tensor, count: int) -> list[float]:
    """Gives the share of samples that left at each exit."""
    return (exits.cpu().bincount(minlength=count).double() / len(exits)).tolist()


# ---- results


class Log:
    """A file with one JSON line a run; a run that is in it is not done again on the same machine.

    The line's ``key`` says which run it is, the processor included; delete the line (or the file) to run it once more.
    Lines from before the processor was in the key have it in ``machine``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if text and not text.endswith("\n"):
            raise SystemExit(f"{path} ends in the middle of a line: a run was cut short; take that line out")
        self.lines = [json.loads(line) for line in text.splitlines()]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Gives the line of a run that is done on this machine."""
        here = _where() | key
        return next((line for line in self.lines if {"cpu": line["machine"]["cpu"]} | line["key"] == here), None)

    def add(self, key: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Appends a run, with the machine and the time."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"key": _where() | key, **values, "machine": machine(), "time": now}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def _where() -> dict[str, Any]:
    """Names the processor, and how the C library is told to keep memory, where somebody has told it."""
    memory = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    return {"cpu": cpu_name()} | ({"memory": memory} if memory else {})


def arguments(description: str, log: str) -> argparse.ArgumentParser:
    """Makes a parser with the options that every program has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS / log), help="JSON lines; runs that are in it are not done again")
    parser.add_argument("--rounds", type=int, default=21, help="counted rounds of every arm")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    return parser
