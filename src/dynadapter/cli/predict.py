"""``dynadapter predict``: classify images by a bundle or a checkpoint into a resumable table."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dynadapter.cli.errors import Mistake, Stopped, Terminated, mistakes, one_line, stoppable
from dynadapter.cli.imports import import_own
from dynadapter.cli.networks import BACKEND, BUNDLE, POLICY, WEIGHTS, check_network, load_network
from dynadapter.cli.parser import CommandParser, Options
from dynadapter.images.accounting import account
from dynadapter.images.memory import usable_cores
from dynadapter.serve.formats import check_output
from dynadapter.serve.inputs import list_images
from dynadapter.serve.table import OtherRun, PredictionTable

if TYPE_CHECKING:  # torch takes seconds to load, and invalid input is answered without it
    from dynadapter.serve.bundle import Bundle

HOW_TO_CONTINUE = "give what it was begun with, delete it, or start over with --overwrite true"
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
OPTIONS: Options = {
    "bundle": (str | None, None, f"The network: {BUNDLE}."),
    "ckpt_path": (
        str | None,
        None,
        "Or a checkpoint that fit wrote, with its calibrated policy or the first policy of its training.",
    ),
    "path_column": (str | None, None, "The column of a CSV file with the paths; by default the first."),
    **POLICY,
    "policy_from": (str | None, None, "Use the policy of this calibration, calibrated checkpoint or run, or bundle."),
    "top_k": (int, 1, "Classes for each image: adds class_2, confidence_2 and so on."),
    "probabilities": (bool, False, "Whether to add a column with the probability of each class."),
    **WEIGHTS,
    "value_range": (list[float] | None, None, "Values [low, high] that become 0 and 255 in images of over 8 bits."),
    "batch_size": (int, 32, "Images that are computed at once."),
    "processes": (int, 1, "Processes that share the images, for example one for each GPU."),
    "engine": (Literal["local", "ray"], "local", "local, or Ray Data (RAY_ADDRESS names a cluster)."),
    "gpus": (float, 0.0, "GPUs of a process under Ray, such as 0.5."),
    "num_workers": (int | None, None, "Threads of a process that read images ahead; 0 reads in turn."),
    **BACKEND,
    "max_skipped": (int, 10, "More unreadable images are an error; OUT.skipped.csv lists them."),
    "overwrite": (bool, False, "Whether OUT, and an unfinished table of other images, may be replaced."),
}


def parser() -> CommandParser:
    """Return the parser of the command."""
    made = CommandParser(
        "predict",
        "Classify images into a table with the columns file, class, confidence and exit (1 ... K).",
        short=True,
    )
    words = "Folders, image files, lists with a path a line (.txt), and CSV files with a column of paths."
    made.add_argument("--images", nargs="+", required=True, help=words)
    words = "The table: .csv, .jsonl or .parquet. The folder OUT.partial keeps what is done if the run is stopped."
    made.add_argument("--out", "--output", type=str, required=True, help=words)
    made.add_options(OPTIONS)
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    if {"-h", "--help"} & set(args):  # also where another key has no value yet
        parser().print_help()
        return
    given = parser().parse_args(args)
    try:
        with stoppable():
            predict(given, args)
    except Terminated as stop:
        raise Stopped(str(stop), stop.code) from None


def predict(given: Any, args: list[str]) -> None:
    """Classify the images and write the table."""
    output = Path(os.path.expanduser(given.out))
    check(given, output)
    with prepared(given) as (bundle, table):
        if table.done:
            print(f"continuing after {table.done:,} of {len(table.files):,} images, from {table.folder}", flush=True)
        try:
            with helpers(given, args):
                speed = fill(bundle, table, given, args)
            with mistakes():
                table.finish()
        except (KeyboardInterrupt, Terminated) as stop:
            how, code = (stop, stop.code) if isinstance(stop, Terminated) else ("interrupted", 130)
            raise Stopped(f"{how} after {_so_far(table)}", code) from stop
        except (OSError, MemoryError) as error:  # not the fault of an image
            if isinstance(error, OSError) and error.errno in FULL:
                raise Mistake(f"the disk of {output} is full after {_so_far(table)} once there is room") from error
            raise Mistake(f"{one_line(error)}; stopped after {_so_far(table)}") from error
    _report(table, speed)


def check(given: Any, output: Path) -> None:
    """Refuse invalid input before anything heavy is loaded."""
    for name, least in (("batch_size", 1), ("num_workers", 0), ("max_skipped", 0), ("top_k", 1), ("processes", 1)):
        if given[name] is not None and given[name] < least:
            raise Mistake(f"{name}={given[name]} must be at least {least}")
    if given.gpus < 0:
        raise Mistake(f"gpus={given.gpus} must be at least 0")
    if given.gpus and given.engine != "ray":
        raise Mistake(f"gpus={given.gpus} belongs to --engine ray; use --device cuda, and --processes for several GPUs")
    if given.gpus and given.backend in ("onnx", "openvino"):
        raise Mistake(f"--backend {given.backend} runs on a CPU; leave out --gpus, or use --backend torch")
    if given.engine == "ray" and (given.backend == "auto" or given.device != "auto"):
        raise Mistake("--engine ray takes one --backend for all machines, and --gpus instead of --device")
    if (given.bundle is None) == (given.ckpt_path is None):
        raise Mistake("give --bundle FOLDER or --ckpt_path FILE, one of the two")
    unfinished = output.with_name(f"{output.name}.partial")
    with mistakes():
        check_output(output, given.overwrite or unfinished.exists())
    check_network(given.bundle, given.ckpt_path)


@contextmanager
def prepared(given: Any, number: int = 0) -> Iterator[tuple["Bundle", PredictionTable]]:
    """Load the network and open the table.

    Args:
        given: The settings.
        number: Index of this process; the first one begins and finishes the table.
    """
    with mistakes("--images: "):
        files = list_images(given.images, given.path_column)
    if number == 0:
        for line in accounts(given.images, files):
            print(line, flush=True)
    import torch

    from dynadapter.serve.predict import columns

    threads = torch.get_num_threads()
    if given.processes > 1:
        torch.set_num_threads(max(1, threads // given.processes))
    on_ray = given.engine == "ray"
    if on_ray:  # the first process describes the table, and only the workers compute
        given.device = "cuda" if given.gpus and number else "cpu"
    try:
        bundle = load_network(given, number, given.batch_size)
        _take_value_range(bundle, given.value_range)
        if given.top_k > len(bundle.class_names):
            raise Mistake(f"top_k={given.top_k} is more than the {len(bundle.class_names)} classes of the network")
        identity = {
            "network": hashlib.sha256(bundle.config.dumps().encode()).hexdigest(),
            "policy": repr(bundle.policy),
            "device": "cuda" if on_ray and given.gpus else bundle.device.type,
            "backend": bundle.backend,
        }
        names = columns(bundle.class_names, given.top_k, given.probabilities)
        output = Path(os.path.expanduser(given.out))
        try:
            with mistakes(), mistakes(after=f"; {HOW_TO_CONTINUE}", kinds=(OtherRun,)):
                table = PredictionTable(output, files, given.batch_size, identity, names, given.overwrite, number > 0)
        except OSError as error:
            what = f"{error.filename} cannot be read" if error.filename in files else f"{output} cannot be written"
            raise Mistake(f"{what}: {error.strerror}") from error
        with table:
            yield bundle, table
    finally:
        torch.set_num_threads(threads)


def _take_value_range(bundle: "Bundle", value_range: list[float] | None) -> None:
    """Read images of more than 8 bits with another range than in training."""
    if value_range is None:
        return
    assert bundle.preprocess is not None
    with mistakes():
        preprocess = replace(bundle.preprocess, value_range=value_range)  # type: ignore[arg-type]
    if preprocess != bundle.preprocess:
        before = bundle.preprocess.value_range or "all 16 bits"
        print(f"note: value_range={preprocess.value_range}, in training {before}", file=sys.stderr)
    bundle.config = replace(bundle.config, preprocessing=preprocess)


def accounts(places: list[str], files: list[str]) -> Iterator[str]:
    """Yield one line for each folder: the number of images, and of other files by reason."""
    for folder in (Path(os.path.expanduser(place)) for place in places):
        if folder.is_dir():
            yield str(account(folder, {"images": files}))


def fill(bundle: "Bundle", table: PredictionTable, given: Any, args: list[str]) -> float:
    """Fill the table, alone or with helpers, and return the speed in images per second."""
    from dynadapter.serve.predict import NonFinite, TooManyUnread, predict

    start, before, speed = time.monotonic(), table.done, 0.0
    cores = min(8, usable_cores())
    workers = max(1, cores // given.processes) if given.num_workers is None else given.num_workers
    with _bar(len(table.files), before) as bar:

        def show() -> None:
            nonlocal speed
            speed = (table.done - before) / (time.monotonic() - start)
            average = f"average exit {table.exits / table.answered:.2f}" if table.answered else ""
            bar.update(bar.task_ids[0], completed=table.done, speed=f"{speed:.1f} images/s", exit=average)

        try:
            if given.engine == "ray":
                from dynadapter.cli.predict_on_ray import fill_on_ray

                fill_on_ray(given, args, table, show)
            else:
                predict(
                    bundle,
                    table,
                    top_k=given.top_k,
                    probabilities=given.probabilities,
                    max_skipped=given.max_skipped,
                    workers=workers,
                    on_batch=show,
                )
        except NonFinite as error:
            raise Mistake(str(error)) from error
        except TooManyUnread as error:
            raise Mistake(
                f"{error}, listed in {table.unread_list}; stopped after {_so_far(table)} with a higher --max_skipped; "
                "if you change images, start over with --overwrite true"
            ) from error
    if not table.answered and table.done == len(table.files):
        table.list_unread()
        raise Mistake(f"none of the images can be read; {table.unread_list} gives the reasons")
    return speed


@contextmanager
def helpers(given: Any, args: list[str]) -> Iterator[None]:
    """Run further processes that share the images, and wait for them; a killed process loses at most one batch."""
    command = [sys.executable, "-P", "-m", "dynadapter.cli.predict"]  # -P: no modules of the current folder
    count = given.processes if given.engine == "local" else 1
    started = [subprocess.Popen([*command, str(number), *args]) for number in range(1, count)]
    try:
        yield
        for process in started:
            process.wait()
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def help_out(number: int, args: list[str]) -> None:
    """Fill a part of a table that another process has begun."""
    import_own()
    given = parser().parse_args(args)
    with suppress(KeyboardInterrupt, Terminated), stoppable(), prepared(given, number) as (bundle, table):
        fill(bundle, table, given, args)


# ---- what is printed


def _bar(total: int, done: int) -> Progress:
    """Return a progress bar, which prints nothing if stderr is not a terminal."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[exit]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    bar.add_task("", total=total, completed=done, speed="", exit="")
    return bar


def _so_far(table: PredictionTable) -> str:
    done = f"{table.done:,} of {len(table.files):,} images"
    return f"{done}, kept in {table.folder}; the same command continues from there"


def _report(table: PredictionTable, speed: float) -> None:
    words = [f"{table.answered:,} predictions in {table.output}", f"average exit {table.exits / table.answered:.2f}"]
    print(", ".join([*words, *([f"{speed:.1f} images/s"] if speed else [])]))
    if table.unread:
        print(f"{table.unread:,} images could not be read, listed in {table.unread_list}")


if __name__ == "__main__":
    try:
        help_out(int(sys.argv[1]), sys.argv[2:])
    except (Mistake, Stopped, OSError, MemoryError) as error:
        raise SystemExit(f"dynadapter: error: process {sys.argv[1]}: {error}") from None
