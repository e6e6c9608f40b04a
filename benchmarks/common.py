"""What the benchmark programs share: arms interleaved call by call, medians of ratios, one JSON line a run."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "lightning", "fvcore", "dynadapter")


def machine() -> dict[str, Any]:
    """Names the machine and the versions that a number belongs to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    found: dict[str, Any] = {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        found[package] = version(package)
    return found


def interleave(arms: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Runs all arms once a round, in an order that turns from round to round; gives CPU seconds of the process.

    The arms stand side by side in time, so a machine that slows down slows them all; the order turns, so that no arm
    always runs on the caches which the same other arm has left.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round in range(-warmup, rounds):
        turn = round % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.process_time()
            arms[name]()
            spent = time.process_time() - start
            if round >= 0:
                seconds[name].append(spent)
    return seconds


def ratio(numerator: Iterable[float], denominator: Iterable[float]) -> float:
    """Gives the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class Log:
    """A file with one JSON line a run; a run that is in it is not done again.

    The line's ``key`` says which run it is; delete the line (or the file) to run it once more.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Gives the line of a run that is done."""
        return next((line for line in self.lines if line["key"] == key), None)

    def add(self, key: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Appends a run, with the machine and the time."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"key": key, **values, "machine": machine(), "time": now}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def arguments(description: str, log: str) -> argparse.ArgumentParser:
    """Makes a parser with the options that every program has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS / log), help="JSON lines; runs that are in it are not done again")
    parser.add_argument("--rounds", type=int, default=21, help="counted rounds of every arm")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    return parser
