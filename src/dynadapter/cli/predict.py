"""``dynadapter predict --bundle``: from a folder of images to a table of classes, without losing what is done."""

import errno
import hashlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dynadapter.cli.errors import Mistake, Stopped, Terminated, one_line, sigterm
from dynadapter.cli.parser import CommandParser
from dynadapter.serve.predictions import Answer, Busy, Entry, Foreign, PredictionTable, Unread, check_output

if TYPE_CHECKING:  # torch takes seconds to load, and a slip of the pen is answered without it
    from numpy.typing import NDArray

    from dynadapter.serve.bundle import Bundle

    Read = tuple[str, NDArray[Any] | None, str]
    """A file, its pixels (3, size, size) uint8, or None and the reason."""

WAY_ON = "give what it was begun with, delete it, or start over with --overwrite true"
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def parser() -> CommandParser:
    """Makes the command's parser."""
    parser = CommandParser("predict", "Classifies the images of a folder by a bundle: file, class, confidence, exit.")
    parser.add_argument("--bundle", type=str, required=True, help="The bundle: what calibrate wrote.")
    parser.add_argument("--images", type=str, required=True, help="Folder of images, searched with its subfolders.")
    words = "The table: .csv, or .jsonl for JSON lines. Beside it grows OUT.partial, from which a killed run goes on."
    parser.add_argument("--out", "--output", type=str, required=True, help=words)
    parser.add_argument(
        "--weights", type=str | None, help="File of the backbone's weights, where the bundle needs one."
    )
    words = "Whether timm may fetch the backbone's weights; by default as the training did."
    parser.add_argument("--pretrained", type=bool | None, help=words)
    parser.add_argument("--batch_size", type=int, default=32, help="Images that are computed at once.")
    words = "Threads that read images ahead; 0 reads in turn. By default one a core, 8 at most."
    parser.add_argument("--num_workers", type=int | None, help=words)
    words = "Where the network runs; auto takes a GPU if there is one."
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help=words)
    words = "Images that cannot be read are listed in OUT.skipped.csv and left out; more of them are an error."
    parser.add_argument("--max_skipped", type=int, default=10, help=words)
    words = "Whether OUT, and an unfinished table of other images, may be replaced."
    parser.add_argument("--overwrite", type=bool, default=False, help=words)
    return parser


def run(args: list[str]) -> None:
    """Runs the command."""
    if {"-h", "--help"} & set(args):  # also where --bundle has no value yet
        parser().print_help()
        return
    if any(arg.partition("=")[0] == "--ckpt_path" for arg in args):
        raise Mistake("--bundle and --ckpt_path are two networks; give one of them")
    given = parser().parse_args(args)
    try:
        with sigterm():
            predict(given)
    except Terminated:
        raise Stopped("stopped by SIGTERM", 143) from None


def predict(given: Any) -> None:
    """Classifies the images and writes the table.

    Raises:
        Mistake: If something given cannot be used.
        Stopped: If somebody stopped it.
    """
    output = Path(given.out).expanduser()
    check(given, output)
    files = _images(given.images)
    bundle = _bundle(given)
    identity = {
        "bundle": hashlib.sha256(bundle.config.dumps().encode()).hexdigest(),
        "policy": bundle.policy.name,
        "device": bundle.device.type,
    }
    try:
        table = PredictionTable(output, files, given.batch_size, identity, given.overwrite)
    except Foreign as error:
        raise Mistake(f"{error}; {WAY_ON}") from error
    except (Busy, ValueError) as error:
        raise Mistake(one_line(error).replace("or overwrite it", "or --overwrite true")) from error
    except OSError as error:
        raise Mistake(f"{output} cannot be written: {error.strerror}") from error
    with table:
        if table.done:
            print(f"going on after {table.done:,} of {len(files):,} images, from {table.partial}", flush=True)
        try:
            speed = _classify(bundle, table, given)
            table.finish()
        except (KeyboardInterrupt, Terminated) as stop:
            how, code = ("interrupted", 130) if isinstance(stop, KeyboardInterrupt) else ("stopped by SIGTERM", 143)
            raise Stopped(f"{how} after {_so_far(table)}", code) from stop
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise Mistake(f"the disk of {output} is full after {_so_far(table)} once there is room") from error
    _report(table, speed)


def check(given: Any, output: Path) -> None:
    """Refuses what cannot be, before anything heavy is loaded."""
    for name, least in (("batch_size", 1), ("num_workers", 0), ("max_skipped", 0)):
        if given[name] is not None and given[name] < least:
            raise Mistake(f"{name}={given[name]} must be at least {least}")
    try:
        check_output(output, overwrite=True)
    except ValueError as error:
        raise Mistake(str(error)) from error
    unfinished = output.with_name(f"{output.name}.partial")  # a kill may have come just after the output had its name
    if os.path.lexists(output) and not given.overwrite and not unfinished.exists():
        raise Mistake(f"{output} exists; give another --out, or --overwrite true to replace it")
    check_bundle(given.bundle)


def check_bundle(place: str) -> None:
    """Refuses a folder that is no bundle but something like it."""
    folder = Path(place).expanduser()
    if (folder / "config.json").exists() or not folder.exists():
        return  # what is wrong with that, load says
    if (folder / "manifest.json").is_file():
        raise Mistake(
            f"{place} is an exported folder, not a bundle; run it with python -m dynadapter.serve.runtime "
            f"{place} IMAGES "
            "(or dynadapter.serve.export.load_programs, if it holds programs)"
        )
    if folder.is_file() and folder.suffix == ".ckpt":
        raise Mistake(
            f"{place} is a checkpoint, not a bundle; make one with dynadapter calibrate --ckpt_path {place} "
            "--goal.cost 0.5 --bundle FOLDER"
        )


def _images(place: str) -> list[str]:
    """Lists the images.

    Raises:
        Mistake: If there is none.
    """
    from dynadapter.images.reading import find_images

    if not Path(place).expanduser().exists():
        raise Mistake(f"--images {place} does not exist; give a folder of images")
    try:
        return [str(path) for path in find_images(place)]
    except ValueError as error:
        raise Mistake(str(error)) from error


def _bundle(given: Any) -> "Bundle":
    """Loads the bundle where it is to run."""
    import torch

    from dynadapter.backbones.layout import lay_out_for_cpu

    there = torch.cuda.is_available()
    if given.device == "cuda" and not there:
        raise Mistake("--device cuda, but torch finds no GPU here; give --device cpu, or leave it out")
    device = "cuda" if there and given.device != "cpu" else "cpu"
    bundle = load_bundle(given.bundle, given.weights, given.pretrained)
    if bundle.preprocess is None:
        raise Mistake(f"{given.bundle} has no preprocessing and takes tensors alone, no image files")
    bundle.to(device)
    lay_out_for_cpu(bundle.net)
    return bundle


def load_bundle(place: str, weights: str | None, pretrained: bool | None) -> "Bundle":
    """Loads a bundle; what is wrong with it is a :class:`Mistake`, with settings as the command line spells them."""
    from dynadapter.serve.bundle import load

    if weights is not None and not Path(weights).expanduser().is_file():
        raise Mistake(f"--weights {weights} does not exist; give a file of weights")
    try:
        return load(place, weights and Path(weights).expanduser(), pretrained)
    except ValueError as error:
        line = str(error).replace("weights='...'", "--weights FILE").replace("pretrained=True", "--pretrained true")
        raise Mistake(one_line(line)) from error


# ---- the run


def _classify(bundle: "Bundle", table: PredictionTable, given: Any) -> float:
    """Fills the table.

    Returns:
        Images a second.

    Raises:
        Mistake: If too many images cannot be read, or none can.
    """
    total, before, start = len(table.files), table.done, time.monotonic()
    workers = min(8, os.cpu_count() or 1) if given.num_workers is None else given.num_workers
    batches = read_batches(bundle, table.files[before:], given.batch_size, workers)
    speed = 0.0
    with closing(batches), _bar(total, before) as bar:
        for batch in batches:
            unread = [Unread(file, reason) for file, pixels, reason in batch if pixels is None]
            if table.unread + len(unread) > given.max_skipped:
                table.list_unread(unread)
                raise Mistake(
                    f"{table.unread + len(unread)} images cannot be read, more than max_skipped={given.max_skipped}, "
                    f"listed in {table.listed}; stopped after {_so_far(table)} with a higher --max_skipped; if you "
                    "change images, start over with --overwrite true"
                )
            table.add(_answers(bundle, batch))
            speed = (table.done - before) / (time.monotonic() - start)
            answered = table.done - table.unread
            bar.update(
                bar.task_ids[0],
                completed=table.done,
                speed=f"{speed:.1f} images/s",
                exit=f"average exit {1 + table.exits / answered:.2f}" if answered else "",
            )
    if table.unread == total:
        table.list_unread()
        raise Mistake(f"none of the images can be read; {table.listed} says why")
    return speed


def _answers(bundle: "Bundle", batch: "Sequence[Read]") -> list[Entry]:
    """Computes a batch, those who cannot be read aside."""
    import numpy as np
    import torch

    read = [pixels for _, pixels, _ in batch if pixels is not None]
    assert bundle.preprocess is not None
    images = torch.from_numpy(bundle.preprocess.normalize(np.stack(read))) if read else torch.empty(0)
    predictions = iter(bundle.predict(images, batch_size=len(batch)))
    entries: list[Entry] = []
    for file, pixels, reason in batch:
        entries.append(Unread(file, reason) if pixels is None else Answer(file, *next(predictions)))
    return entries


def read_batches(bundle: "Bundle", files: Sequence[str], batch_size: int, workers: int) -> "Generator[Sequence[Read]]":
    """Reads images in batches, ahead of whoever takes them.

    Args:
        bundle: Says how large the pixels are to be.
        files: The images.
        batch_size: Images in a batch, those that cannot be read included.
        workers: Threads; 0 reads a batch when it is asked for.

    Yields:
        For each file its name, its pixels or None, and the reason.
    """
    from dynadapter.images.reading import UnreadableImage, load_image

    preprocess = bundle.preprocess
    assert preprocess is not None

    def read(file: str) -> "Read":
        try:
            return file, preprocess.pixels(load_image(Path(file))), ""
        except UnreadableImage as error:
            return file, None, error.reason

    batches = (files[start : start + batch_size] for start in range(0, len(files), batch_size))
    if not workers:
        yield from ([read(file) for file in batch] for batch in batches)
        return
    pool = ThreadPoolExecutor(workers)  # Pillow decodes outside the interpreter lock
    try:
        pending: deque[list[Future[Read]]] = deque()
        ahead = max(2, math.ceil(2 * workers / batch_size))
        for batch in batches:
            pending.append([pool.submit(read, file) for file in batch])
            if len(pending) > ahead:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---- what is said of it


def _bar(total: int, done: int) -> Progress:
    """Makes a progress bar, which is quiet where nobody looks."""
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
    """Says how to go on."""
    done = f"{table.done:,} of {len(table.files):,} images"
    return f"{done}, kept in {table.partial}; the same command goes on from there"


def _report(table: PredictionTable, speed: float) -> None:
    answered = table.done - table.unread
    words = [f"{answered:,} predictions in {table.output}", f"average exit {1 + table.exits / answered:.2f}"]
    print(", ".join([*words, *([f"{speed:.1f} images/s"] if speed else [])]))
    if table.nonfinite:
        print(f"{table.nonfinite:,} of them have logits that are not finite; what is said of these means nothing")
    if table.unread:
        print(f"{table.unread:,} images could not be read, listed in {table.listed}")
