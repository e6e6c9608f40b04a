"""Shared by the timing programs: networks to time, one JSON line a case, options, and tables on the terminal."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

from dynadapter import Balanced, Confidence, ExitNet, lay_out_for_cpu
from dynadapter.bench import timing
from dynadapter.bench.timing import cpu_name, is_void, machine, share_thresholds

RESULTS = Path(__file__).parent / "results"

BACKBONES: dict[str, dict[str, Any]] = {
    "ViT-Ti, 64 tokens": dict(name="vit_tiny_patch16_224", img_size=48, patch_size=6),
    "ViT-S/16, 224": dict(name="vit_small_patch16_224", img_size=224),
}
GPU_BACKBONES: dict[str, dict[str, Any]] = {"ViT-B/16, 224": dict(name="vit_base_patch16_224", img_size=224)}
TINY: dict[str, dict[str, Any]] = {
    "tiny": dict(name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)
}
SHARES = {"50/30/15/5": (0.5, 0.3, 0.15, 0.05), "25/25/25/25": (0.25, 0.25, 0.25, 0.25)}
IMAGES = 20
"""Images in a timed call, at least: enough for the shares to come out exactly, or nearly."""

Line = dict[str, Any]
Row = dict[str, Any]


# ---- networks and images


def build(name: str, laid_out: bool = True, **options: Any) -> tuple[torch.nn.Module, ExitNet]:
    """Return a backbone and the network with four exits around it, with random weights, laid out for a CPU."""
    torch.manual_seed(0)
    backbone: Any = timm.create_model(name, num_classes=10, **options).eval()
    net = ExitNet(backbone, Balanced(), every=max(len(backbone.blocks) // 4, 1)).eval()
    return backbone, lay_out_for_cpu(net) if laid_out else net


def noise(count: int, size: int) -> torch.Tensor:
    """Return random images (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def images_a_call(batch: int) -> int:
    """Return the number of images in a timed call: whole batches, at least ``IMAGES``."""
    return batch * -(-IMAGES // batch)


def thresholds(net: ExitNet, images: torch.Tensor, shares: tuple[float, ...]) -> Confidence:
    """Return thresholds per exit with which these shares of the images exit."""
    with torch.no_grad():
        return share_thresholds(torch.cat([net(part) for part in images.split(8)], dim=1), shares)


def shares_of(exit_index: torch.Tensor, count: int) -> list[float]:
    """Return the share of samples at each of ``count`` exits."""
    return (exit_index.cpu().bincount(minlength=count).double() / len(exit_index)).tolist()


# ---- time


def interleave(
    arms: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time all arms once a round, in a new random order for each; see :func:`dynadapter.bench.timing.interleave`.

    Returns:
        For each arm the seconds of each round: CPU seconds of the process, or on a GPU those between two events.
    """
    clock = timing.clock_of(torch.device(device), threads=1)
    times = timing.interleave(arms, rounds, warmup, device)
    return {name: taken.rounds(clock) for name, taken in times.items()}


# ---- results


LIBRARIES = ("torch", "timm")
"""The libraries whose version changes a time."""


def newest(lines: Sequence[Line]) -> list[Line]:
    """Return the newest line of each case, with one torch and one timm, in the order of the file."""
    found = {}
    for line in sorted(lines, key=lambda line: line["time"]):
        found[json.dumps([line["key"], *(line["machine"][name] for name in LIBRARIES)], sort_keys=True)] = line
    return [line for line in lines if any(line is one for one in found.values())]


class Log:
    """A file with one JSON line a case. A case that is in the file is not run again on the same machine with
    the same versions of torch and timm.

    The ``key`` of a line names the case, with the processor, the GPU and the settings of the memory allocator. Delete
    a line to run its case again.

    Args:
        path: The file; it is created with its folder.

    Raises:
        SystemExit: If the last line was cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if text and not text.endswith("\n"):
            raise SystemExit(f"{path} ends in the middle of a line; delete that line and start again")
        self.lines: list[Line] = [json.loads(line) for line in text.splitlines()]

    def find(self, key: dict[str, Any]) -> Line | None:
        """Return the newest line of a case that was run on this machine with the same libraries, or None."""
        own, here = _here() | key, machine()
        found = newest([line for line in self.lines if line["key"] == own])
        return next((line for line in found if all(line["machine"][name] == here[name] for name in LIBRARIES)), None)

    def add(self, key: dict[str, Any], **values: Any) -> Line:
        """Append a case with the machine and the time, and return its line."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"key": _here() | key, **values, "machine": machine(), "time": now}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def _here() -> dict[str, Any]:
    """Return the processor, and how the C library keeps memory where the environment says so."""
    memory = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    return {"cpu": cpu_name()} | ({"memory": memory} if memory else {})


def control(line: Line) -> str:
    """Return the ratio of an arm to itself, marked where the run is void."""
    return f"{line['control']:.3f}{' VOID' if is_void(line['control']) else ''}"


def show(rows: Iterable[Row], title: str = "") -> None:
    """Print rows as a table; floats get three digits, missing values stay empty."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title or None)
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in names))
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


# ---- options


def arguments(description: str, log: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every program."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS / log), help="JSON lines; cases that are in it are not run again")
    parser.add_argument("--rounds", type=int, default=21, help="counted rounds of every arm (default: 21)")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="time a tiny network, to try the program")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs that also run on a GPU."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--batches", type=int, nargs="+", help="images in a batch; default: those of the device")


def place(args: argparse.Namespace) -> dict[str, str]:
    """Check the device, set one thread, and return what the key of a line says of the device.

    Raises:
        SystemExit: If there is no such device.
    """
    torch.set_num_threads(1)
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but torch finds no CUDA device; leave --device out to time on the CPU")
    key = {} if args.precision == "fp32" else {"precision": args.precision}
    return key if args.device == "cpu" else key | {"device": "cuda", "gpu": torch.cuda.get_device_name()}


def backbones(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the backbones to time, by name."""
    found = TINY if args.tiny else GPU_BACKBONES if args.device == "cuda" else BACKBONES
    return {name: options for name, options in found.items() if args.only in name}
