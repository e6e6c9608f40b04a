"""``dynadapter report``: figures of a run in one HTML page, or a page that compares runs."""

import contextlib
import csv
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dynadapter.cli.errors import Mistake, as_typed, nearest_place, one_line
from dynadapter.cli.networks import DEVICE, WEIGHTS, device_of
from dynadapter.cli.parser import CommandParser, Options
from dynadapter.files import read_bytes, write

if TYPE_CHECKING:  # torch takes seconds to load, and invalid input is answered without it
    from dynadapter.data import ImageData
    from dynadapter.report import Measured, Run

PAGE = "report.html"
MARK = b"<title>dynadapter: "
"""Every page has it; another file is not replaced."""
CHECKPOINTS = ("best.ckpt", "last.ckpt", "weights.ckpt")
"""The checkpoints that are measured first."""
OPTIONS: Options = {
    "split": (Literal["val", "test"], "val", "The images that are measured."),
    "out": (str | None, None, "Folder of the page and the figures, by default RUN/report; for several runs the page."),
    **WEIGHTS,
    **DEVICE,
}


class Given(NamedTuple):
    """A run on the command line.

    Args:
        folder: Folder of the run.
        checkpoint: Its checkpoint; None if it saved none.
    """

    folder: Path
    checkpoint: Path | None


def parser() -> CommandParser:
    """Return the parser of the command."""
    made = CommandParser(
        "report",
        "Measure the network of a run, draw its exits, and write an HTML page; or compare several runs on one page.",
        usage="dynadapter report RUN [RUN ...] [--KEY VALUE ...]",
        short=True,
    )
    words = "Folder of a run, such as runs/quickstart/version_0, or a checkpoint in it."
    made.add_argument("runs", nargs="+", type=str, help=words)
    made.add_options(OPTIONS)
    words = "Other settings of the images than in the training, such as --data.root FOLDER."
    made.add_argument("--data", type=dict[str, Any], default={}, help=words)
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    if {"-h", "--help"} & set(args):
        parser().print_help()
        return
    given = parser().parse_args(args)
    runs = [find_run(place) for place in given.runs]
    if len(runs) == 1:
        out = Path(os.path.expanduser(given.out)) if given.out else runs[0].folder / "report"
        check_page(out / PAGE)
        one_run(runs[0], out, given)
    else:
        out = Path(os.path.expanduser(given.out or PAGE))
        check_page(out)
        compare(runs, out, given)


def find_run(place: str) -> Given:
    """Return the run at a place: its folder, or a checkpoint in it."""
    path = Path(os.path.expanduser(place))
    if path.is_file() and path.suffix == ".ckpt":
        from dynadapter.cli.layers import with_folders

        folder = with_folders(path).parent
        return Given(folder.parent if folder.name == "checkpoints" else folder, path)
    if not path.is_dir():
        way = nearest_place(place) or "; give the folder of a run, such as runs/quickstart/version_0"
        raise Mistake(f"{place} does not exist{way}")
    if not any((path / name).is_file() for name in ("run.json", "config.yaml", "metrics.csv")):
        inside = sorted(one.name for one in path.glob("version_*") if one.is_dir())
        hint = f", such as {path / inside[-1]}" if inside else ""
        raise Mistake(f"{place} is not the folder of a run; give one that fit wrote{hint}")
    saved = _saved(path)
    return Given(path, _calibrated(saved) or next(iter(saved), None))


def _saved(run: Path) -> list[Path]:
    """Return the checkpoints of a run, in the order in which they are measured: the usual ones, then the newest."""
    from dynadapter.cli.resume import checkpoint_folder

    folder = run / "checkpoints"
    with contextlib.suppress(Mistake, OSError):  # a damaged config, or none
        folder = checkpoint_folder(run)
    files = [file for file in folder.glob("*.ckpt") if file.is_file()]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    return sorted(files, key=lambda file: (*CHECKPOINTS, file.name).index(file.name))


def _calibrated(checkpoints: Sequence[Path]) -> Path | None:
    """Return the checkpoint that was calibrated last; None if none was, or it has changed since."""
    saved = {file: file.with_suffix(".calibration.json") for file in checkpoints}
    written = {file: result.stat().st_mtime for file, result in saved.items() if result.is_file()}
    if not written:
        return None
    from dynadapter.calibrate.stored import calibration_of

    for file in sorted(written, key=lambda file: written[file], reverse=True):
        with contextlib.suppress(ValueError, OSError):  # a damaged one
            if calibration_of(file) is not None:
                return file
    return None


def check_page(page: Path) -> None:
    """Raise a :class:`Mistake` if the page's path exists and is not a report."""
    if page.is_dir() or (page.exists() and MARK not in read_bytes(page, 2**30)[:4000]):
        raise Mistake(f"{page} exists and is not a report; give another --out")
    if not page.parent.is_dir() and page.parent.exists():
        raise Mistake(f"{page.parent} is not a folder; give another --out")


def one_run(place: Given, out: Path, given: Any) -> None:
    """Write the page and the figures of one run."""
    from dynadapter.report import figures_of, run_page
    from dynadapter.report.figures import png
    from dynadapter.report.page import CAPTIONS

    run, notes = read_run(place.folder), []
    measured, why = measure(place, given)
    if why and given.split == "test":  # asked for; a page without it would replace that of an earlier report
        raise Mistake(f"the network is not measured: {why}")
    if why:
        notes.append(f"the network is not measured: {why}")
    if not run.lines:
        notes.append("there are no learning curves: metrics.csv is missing, empty or damaged")
    figures = figures_of(run, measured)
    files = {name: png(figure) for name, figure in figures.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name in CAPTIONS:
        if name in files:
            write(out / f"{name}.png", files[name])
        else:
            (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
    write(out / PAGE, run_page(run, measured, files, notes).encode())
    for note in notes:
        print(note)
    _to_tensorboard(place.folder, figures, run.epochs)
    print(f"the report is in {out / PAGE}")


def compare(places: Sequence[Given], out: Path, given: Any) -> None:
    """Write the page that compares runs."""
    from dynadapter.report import comparison_page, on_one_scale
    from dynadapter.report.figures import compared, png

    runs, notes = [], []
    for place in places:
        measured, why = measure(place, given)
        run = replace(read_run(place.folder), name=str(place.folder))
        runs.append((run, measured))
        if why:
            notes.append(f"{run.name} is not measured: {why}")
        elif measured is not None and measured.chose_policy:
            notes.append(
                f"{run.name}: these images may have chosen the policy: quote calibrate's cross-fitted accuracy"
            )
    runs, remarks = on_one_scale(runs)
    known = [(run.name, one) for run, one in runs if one is not None]
    notes += [*remarks, *other_data(known)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, comparison_page(runs, png(compared(known)) if known else None, notes).encode())
    for note in notes:
        print(note)
    print(f"the comparison is in {out}")


def other_data(runs: "Sequence[tuple[str, Measured]]") -> list[str]:
    """Return a note for each run that was measured on other classes or images than the first one."""
    from dynadapter.cli.record import hash_of

    hashes = [hash_of(list(zip(one.sources, one.targets.tolist(), strict=True))) for _, one in runs]
    notes = []
    for (name, one), found in list(zip(runs, hashes, strict=True))[1:]:
        what = "classes" if one.class_names != runs[0][1].class_names else "images"
        if what == "classes" or (found != hashes[0] and None not in (found, hashes[0])):  # None: not known
            notes.append(f"{name} was measured on other {what} than {runs[0][0]}: do not compare their accuracies")
    return notes


def read_run(folder: Path) -> "Run":
    """Read a run folder; missing or damaged files are left out."""
    from dynadapter.cli.resume import read_record
    from dynadapter.cli.runs import read_lines
    from dynadapter.report import Run

    def text(name: str) -> str:
        try:
            return read_bytes(folder / name, 2**24).decode("utf-8", "replace")
        except (OSError, ValueError):
            return ""

    try:
        lines = read_lines(folder / "metrics.csv")
    except (OSError, ValueError, csv.Error):
        lines = []
    resolved = folder.resolve()
    return Run(f"{resolved.parent.name}/{resolved.name}", read_record(folder), text("config.yaml"), lines)


def measure(place: Given, given: Any) -> "tuple[Measured | None, str]":
    """Measure the network of a run on the images of a split; or return in one line why that is not possible."""
    from dynadapter.cli.networks import load_checkpoint, stacked
    from dynadapter.cost import exit_costs
    from dynadapter.report import Measured
    from dynadapter.serve.bundle.tensors import frozen_names

    if place.checkpoint is None:
        return None, "the run saved no checkpoint"
    try:
        bundle, origin = load_checkpoint(str(place.checkpoint), given.weights, given.pretrained)
        bundle.to(device_of(given.device))
        data = images(place.checkpoint, given.data)
        parts = list(stacked(bundle, data, given.split))
    except (Mistake, ValueError, OSError, RuntimeError, KeyError, TypeError, MemoryError) as error:
        return None, as_typed(one_line(error))
    import torch

    logits, targets = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
    costs, frozen = exit_costs(bundle.net, data.image_size), frozen_names(bundle.net)
    return (
        Measured(
            given.split,
            logits,
            targets,
            tuple(cost / costs.static for cost in costs.macs),
            bundle.policy,
            origin,
            tuple(bundle.class_names),
            [source for source, _ in data.dataset(given.split).samples],
            tuple(bundle.net.exit_depths),
            sum(p.numel() for name, p in bundle.net.named_parameters() if name not in frozen),
            costs.static / 1e9,
        ),
        "",
    )


def images(checkpoint: Path, changes: dict[str, Any]) -> "ImageData":
    """Build the data module of a training from its checkpoint."""
    from dynadapter.cli.layers import checkpoint_settings
    from dynadapter.cli.safety import check_config
    from dynadapter.data import ImageData

    section = checkpoint_settings(str(checkpoint))[0].get("data")
    if section is None:
        raise Mistake("the checkpoint names no data module of this package")
    section = {**section, "init_args": {**section.get("init_args", {}), **changes}}
    made = CommandParser("report")
    made.add_subclass_arguments(ImageData, "data", required=True)
    given = made.parse_object({"data": section})
    check_config(given)
    return made.instantiate(given).data


def _to_tensorboard(folder: Path, figures: dict[str, Any], step: int) -> None:
    """Add the figures to a run that logs to TensorBoard."""
    if not any(folder.rglob("events.out.tfevents.*")):
        return
    if importlib.util.find_spec("tensorboard") is None:
        print("the figures are not in TensorBoard, which is not installed: pip install 'dynadapter[tensorboard]'")
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"report/{name}", figure, step, close=False)
