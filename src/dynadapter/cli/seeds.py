"""``dynadapter fit --seeds [0, 1, 2]``: a training for each seed, and the mean and deviation of what they give.

Loads nothing heavy before it runs: the command line asks it first whether several seeds are wanted.
"""

import contextlib
import csv
import ctypes
import io
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dynadapter.cli.errors import Failed, Mistake, Stopped, one_line

try:
    import fcntl
except ImportError:  # Windows: nobody is kept from working on the same seeds twice
    fcntl = None  # type: ignore[assignment]

PLAN, SUMMARY, TABLE = "seeds.json", "summary.json", "summary.csv"
OFF = ("", "null", "None", "none", "false", "False", "[]")


def asked(args: Sequence[str]) -> bool:
    """Says whether a command line, or the last config file that says so, asks for several seeds.

    >>> asked(["fit", "--seeds", "[0, 1]"]), asked(["fit", "--seeds=null"]), asked(["fit"])
    (True, False, False)
    """
    if any(arg in ("-h", "--help") or arg.endswith(".help") or arg.startswith("--print_config") for arg in args):
        return False
    given = _given(args, "--seeds")
    return given not in OFF if given is not None else bool(_in_files(args))


def run(args: list[str]) -> None:
    """Trains once a seed, each in a process and a run folder of its own, and writes what all of them give.

    Args:
        args: The command line of fit, without ``fit``.
    """
    given = _given(args, "--seeds")
    seeds = _seeds(_parsed(given) if given is not None else _in_files(args))
    for option, why in (
        ("--resume", "a seed that was interrupted is taken up by giving the same command again"),
        ("--ckpt_path", "each seed begins anew"),
        ("--seed_everything", "it takes the seeds one by one"),
    ):
        if _given(args, option) is not None:
            raise Mistake(f"--seeds goes without {option}: {why}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Mistake("--seeds starts the processes of each training itself; start it without a launcher")
    common = _without(args, "--seeds")
    settings, root = _settings(common)
    with _folder(root, seeds, settings) as folder, _handed_on() as children:
        failed = {}
        for place, seed in enumerate(seeds, start=1):
            home = folder / f"seed_{seed}"
            if done := _finished(home):
                print(f"seed {seed} ({place} of {len(seeds)}) is done: {done}", flush=True)
                continue
            command = _command(home, seed, common)
            print(f"seed {seed} ({place} of {len(seeds)}): {shlex.join(['dynadapter', *command])}", flush=True)
            code = children.run([sys.executable, "-m", "dynadapter.cli", *command])
            if children.asked or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                number = children.asked or code - 128
                what = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
                raise Stopped(f"{what}; give the same command again to go on", 128 + number)
            if code:
                failed[seed] = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
                print(f"seed {seed} failed: {failed[seed]}", flush=True)
        _report(folder, seeds, failed)
    if failed:
        which = ", ".join(f"seed {seed} ({why})" for seed, why in failed.items())
        raise Failed(f"{len(failed)} of {len(seeds)} trainings failed: {which}; the same command runs them again")


# ---- the command line ------------------------------------------------------------------------------------------------


def _given(args: Sequence[str], option: str) -> str | None:
    """Gives the value of an option, the last one that stands there."""
    value = None
    for arg, following in pairwise([*args, ""]):
        if arg == option:
            value = following
        elif arg.startswith(f"{option}="):
            value = arg.partition("=")[2]
    return value


def _without(args: Sequence[str], option: str) -> list[str]:
    left, skip = [], False
    for arg in args:
        if skip or arg == option or arg.startswith(f"{option}="):
            skip = arg == option and not skip
        else:
            left.append(arg)
    return left


def _in_files(args: Sequence[str]) -> Any:
    """Gives the ``seeds`` of the config files; what is wrong with a file is said where it is read in earnest."""
    found = None
    for arg, following in pairwise([*args, ""]):
        file = following if arg in ("-c", "--config") else arg.partition("=")[2] if arg.startswith("--config=") else ""
        file = file or (arg[2:].removeprefix("=") if arg.startswith("-c") and not arg.startswith("--") else "")
        with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else None
            if isinstance(content, dict) and "seeds" in content:
                found = content["seeds"]
    return found


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text if text.startswith("[") else f"[{text}]")
    except yaml.YAMLError:
        return text


def _seeds(value: Any) -> list[int]:
    whole = isinstance(value, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in value)
    if not whole or not value or min(value) < 0 or max(value) >= 2**32:
        raise Mistake(f"seeds must be a list of whole numbers from 0 to 4294967295, such as [0, 1, 2], not {value!r}")
    if len(set(value)) < len(value):
        raise Mistake(f"seeds {value} name a seed twice, which would give the same training twice")
    return list(value)


def _settings(args: list[str]) -> tuple[dict[str, Any], Path]:
    """Reads all settings, so that a slip shows before anything runs.

    Returns:
        The settings but the seed, and where the runs go.
    """
    from dynadapter.cli import quiet
    from dynadapter.cli.app import DynCLI

    class Settings(DynCLI):
        whole: dict[str, Any]

        def _set_seed(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            self.whole = yaml.safe_load(self.parser.dump(self.config, skip_none=False))

        def run(self) -> None:
            pass

    with quiet():
        settings = Settings(["fit", *args, "--seeds=null"]).whole
    trainer = settings["trainer"]
    if trainer["fast_dev_run"] or trainer["barebones"]:
        raise Mistake("--seeds compares what runs leave behind, and fast_dev_run and barebones leave nothing")
    return {name: value for name, value in settings.items() if name != "seed_everything"}, Path(
        trainer["default_root_dir"]
    )


# ---- the folder ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(root: Path, seeds: list[int], settings: dict[str, Any]) -> Iterator[Path]:
    """Gives the folder of the same seeds with the same settings that are not all done yet, or a new one."""
    from dynadapter.cli.runs import next_folder
    from dynadapter.training.checkpoints import write

    plan = {"seeds": seeds, "settings": settings}
    for folder in sorted(root.glob("seeds_*")):
        if _read(folder / PLAN) == plan and set(map(str, seeds)) != set(_read(folder / SUMMARY).get("runs", ())):
            with _locked(folder):
                print(f"going on with {folder}", flush=True)
                yield folder
            return
    folder = next_folder(root, "seeds")
    with _locked(folder):
        write(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps others from working on the same seeds, as long as this process or a training of it lives."""
    if fcntl is None:
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f"{folder} is being worked on by another process; wait for it, or give other seeds") from None
        except OSError:  # a file system without locks
            pass
        os.set_inheritable(file.fileno(), True)
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _runs(home: Path) -> list[Path]:
    """Gives the runs of a seed, the newest first."""
    numbered = [path for path in home.glob("version_*") if path.name.removeprefix("version_").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("version_")), reverse=True)


def _finished(home: Path) -> Path | None:
    return next((run for run in _runs(home) if _read(run / "run.json").get("how") == "finished"), None)


def _command(home: Path, seed: int, common: list[str]) -> list[str]:
    """Goes on with a seed's training where there is something to go on from, or begins it."""
    from dynadapter.cli.resume import to_resume

    for run in _runs(home):
        with contextlib.suppress(Mistake):
            to_resume(str(run), nothing_new=True)
            return ["fit", "--resume", str(run)]
    own = [f"--trainer.default_root_dir={home}", f"--seed_everything={seed}", "--seeds=null"]
    return ["fit", *common, *own]


# ---- the trainings ---------------------------------------------------------------------------------------------------


class _Children:
    """Runs one process at a time, and hands on to it what asks this one to stop."""

    def __init__(self) -> None:
        self.asked = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

    def hand_on(self, number: int, frame: Any) -> None:
        self.asked = number
        if self._child is not None:
            with contextlib.suppress(OSError):
                self._child.send_signal(number)

    def _before(self) -> None:
        if self._libc is not None:
            self._libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: nobody would know of a training left alone

    def run(self, command: list[str]) -> int:
        if self.asked:
            return 128 + self.asked
        # A session of its own: Ctrl-C comes from here alone, once. Descriptors stay open for the lock.
        self._child = subprocess.Popen(command, start_new_session=True, close_fds=False, preexec_fn=self._before)
        if self.asked:  # just now
            self.hand_on(self.asked, None)
        code = self._child.wait()
        self._child = None
        return code


@contextlib.contextmanager
def _handed_on() -> Iterator[_Children]:
    children = _Children()
    before = {number: signal.signal(number, children.hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what they give --------------------------------------------------------------------------------------------------


def summarised(results: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Gives mean and standard deviation (n - 1) of every metric over the seeds that have it.

    >>> summarised({0: {"acc": 0.5}, 1: {"acc": 0.75}})["acc"]["mean"]
    0.625

    Args:
        results: By seed, then by metric.
    """
    names = list(dict.fromkeys(name for values in results.values() for name in values))
    table = {}
    for name in names:
        values = {seed: float(of[name]) for seed, of in results.items() if name in of}
        finite = all(map(math.isfinite, values.values()))
        table[name] = {
            "mean": statistics.fmean(values.values()) if finite else math.nan,
            "std": statistics.stdev(values.values()) if finite and len(values) > 1 else None,
            "n": len(values),
            "values": {str(seed): value for seed, value in values.items()},
        }
    return table


def _report(folder: Path, seeds: list[int], failed: dict[int, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from dynadapter.cli.record import plain
    from dynadapter.training.checkpoints import write

    runs = {seed: run for seed in seeds if (run := _finished(folder / f"seed_{seed}"))}
    table = summarised({seed: _read(run / "run.json").get("results", {}) for seed, run in runs.items()})
    content = {
        "seeds": seeds,
        "runs": {str(seed): str(run) for seed, run in runs.items()},
        "failed": {str(seed): _why(folder / f"seed_{seed}", why) for seed, why in failed.items()},
        "metrics": table,
    }
    write(folder / SUMMARY, (json.dumps(plain(content), indent=2) + "\n").encode())
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "mean", "std", "n", *(f"seed_{seed}" for seed in runs)])
    for name, row in table.items():
        std = "" if row["std"] is None else row["std"]
        writer.writerow([name, row["mean"], std, row["n"], *(row["values"].get(str(seed), "") for seed in runs)])
    write(folder / TABLE, text.getvalue().encode())
    shown = Table(title=f"{len(runs)} of {len(seeds)} seeds: {', '.join(map(str, runs))}")
    for name, side in (("metric", "left"), ("mean", "right"), ("± deviation", "right"), ("n", "right")):
        shown.add_column(name, justify=side)  # type: ignore[arg-type]
    for name, row in table.items():
        std = "–" if row["std"] is None else f"{row['std']:.2g}"
        shown.add_row(name, f"{row['mean']:.5g}", std, str(row["n"]))
    console = Console()
    console.width = max(console.width, 80)
    console.print(shown)
    print(f"mean and deviation in {folder / SUMMARY} and {folder / TABLE}", flush=True)


def _why(home: Path, why: str) -> str:
    """Says how a training failed, in its own words where it has left any."""
    message = next((_read(run / "run.json").get("message") for run in _runs(home)), None)
    return one_line(message) if message else why
