"""Run the tests that need a GPU, and write one JSON line a test.

    python benchmarks/gpu_tests.py --out results/gpu_tests.jsonl

A test that passed with the same sources is not run again. ``--device cpu`` runs the same tests on the CPU.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import pytest
from common import RESULTS, Log

ROOT = Path(__file__).parents[1]


def source_hash() -> str:
    """Return a hash of the package and its tests."""
    found = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").glob("*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Recorder:
    """A pytest plugin that logs each test's outcome and leaves out those that passed before."""

    def __init__(self, log: Log) -> None:
        self.log, self.source = log, source_hash()
        self.counts: dict[str, int] = {}

    def key(self, test: str) -> dict[str, Any]:
        """Return the key of a test's line."""
        return {"test": test, "source": self.source}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what is done."""
        items[:] = [item for item in items if self.log.find(self.key(item.nodeid)) is None]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Log a test when it ends; a failed one is run again next time."""
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.failed:
            print(f"{report.nodeid}: {report.longrepr}")
        else:
            self.log.add(self.key(report.nodeid), outcome=report.outcome, seconds=round(report.duration, 3))


def main(argv: list[str] | None = None) -> int:
    """Run the tests and return pytest's exit code; nothing left to run counts as success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS / "gpu_tests.jsonl"), help="JSON lines, one a test")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    recorder = Recorder(Log(args.out))
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text()]
    chosen = ["-m", "cuda", *files] if args.device == "cuda" else ["-k", "cpu", str(ROOT / "tests" / "test_device.py")]
    code = pytest.main(
        [
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",  # one process: the recorder is a plugin of it
            "-W",
            "default",  # the versions of that machine may warn of other things
            f"--rootdir={ROOT}",
            *chosen,
        ],
        plugins=[recorder],
    )
    print(", ".join(f"{count} {outcome}" for outcome, count in recorder.counts.items()) or "nothing left to run")
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)


if __name__ == "__main__":
    raise SystemExit(main())
