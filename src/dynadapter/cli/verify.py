"""``dynadapter verify``: checks a data set to its last image and says all that is wrong with it."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynadapter.cli.errors import Mistake, nearest, one_line
from dynadapter.cli.parser import CommandParser

if TYPE_CHECKING:  # Lightning takes seconds to load, and a slip of the pen is answered without it
    from rich.console import Console

    from dynadapter.data.report import Fault, Report, SetReport

CLASSES = ("VTAB1k", "ImageFolder")
ITEMS = 5
"""How many things a fault names on the screen; the report has all."""


def parser() -> CommandParser:
    """Makes the command's parser."""
    parser = CommandParser(
        "verify",
        "Decodes every image of a data set and says what is missing, broken, doubled, or in two splits. "
        "The exit code is 0 for data without an error, and 1 for others.",
        usage="dynadapter verify --data CLASS --data.root FOLDER [--KEY VALUE ...]",
    )
    words = "Config file whose data section says what to check; what the command line says wins."
    parser.add_argument("--config", "-c", type=str, action="append", help=words)
    words = "What reads the images: VTAB1k or ImageFolder; short: --data CLASS."
    parser.add_argument("--data.class_path", type=Literal["VTAB1k", "ImageFolder"] | None, help=words)
    parser.add_argument("--data.root", type=str | None, help="The folder of the tasks, or the one that holds train.")
    parser.add_argument("--data.task", type=str | None, help="The task for VTAB1k; by default all that are in root.")
    words = "For ImageFolder without val: the share that is held out, 0.2 by default."
    parser.add_argument("--data.val_fraction", type=float | None, help=words)
    parser.add_argument("--data.split_seed", type=int | None, help="Decides which images are held out, 0 by default.")
    words = "Where to write all that was found, as JSON; a second check compares itself with it by --expect."
    parser.add_argument("--out", type=str | None, help=words)
    parser.add_argument("--overwrite", type=bool, default=False, help="Whether a report at --out may be replaced.")
    words = "Report of an earlier check: other hashes than in it are errors."
    parser.add_argument("--expect", type=str | None, help=words)
    words = "Images that are decoded at once; some more than there are cores by default."
    parser.add_argument("--threads", type=int | None, help=words)
    return parser


def run(args: list[str]) -> None:
    """Runs the command.

    Raises:
        SystemExit: With code 1 if the data have errors.
        Mistake: If there is nothing to check.
    """
    try:
        given = parser().parse_args([_class_key(arg) for arg in args])
    except Mistake as mistake:  # the key as it was given
        raise Mistake(str(mistake).replace("data.class_path", "data")) from mistake
    data = _data(given)
    if given.threads is not None and given.threads < 1:
        raise Mistake(f"threads={given.threads} must be at least 1")
    if given.out is not None:
        _check_out(Path(given.out).expanduser(), given.overwrite)
    expected = _expected(given.expect) if given.expect is not None else None
    report = verify(data, expected, given.threads)
    show(report, given.out)
    if given.out is not None:
        _write(report, Path(given.out).expanduser())
    if report.errors:
        raise SystemExit(1)


def _class_key(arg: str) -> str:
    key, equals, value = arg.partition("=")
    return f"--data.class_path{equals}{value.rpartition('.')[2]}" if key == "--data" else arg


def _data(given: Any) -> dict[str, Any]:
    """Puts together what config files and the command line say of the data.

    Raises:
        Mistake: If that is not enough, or of other data.
    """
    settings: dict[str, Any] = {}
    for file in given.config or []:
        settings |= _section(file)
    settings |= {name: value for name, value in vars(given.data).items() if value is not None}
    if "class_path" not in settings:
        raise Mistake(
            "data is missing; give --data VTAB1k or --data ImageFolder, or --config, a file with a data section"
        )
    name = str(settings["class_path"]).rpartition(".")[2]
    if name not in CLASSES:
        hint = nearest(name, CLASSES)
        raise Mistake(f"data cannot be {settings['class_path']!r}{hint or ';'} verify checks VTAB1k and ImageFolder")
    if settings.get("root") is None:
        holds = "the tasks" if name == "VTAB1k" else "train"
        raise Mistake(f"data.root is missing; give --data.root, the folder that holds {holds}")
    takes = {"VTAB1k": ("task",), "ImageFolder": ("val_fraction", "split_seed")}
    for other in ("task", "val_fraction", "split_seed"):
        if getattr(given.data, other) is not None and other not in takes[name]:
            raise Mistake(f"{name} has no setting {other!r}; leave out --data.{other}")
    chosen = {"data": name, "root": settings["root"]}
    return chosen | {other: settings[other] for other in takes[name] if settings.get(other) is not None}


def _section(file: str) -> dict[str, Any]:
    """Reads the data section of a config file.

    Raises:
        Mistake: If there is none, or its values are of no use.
    """
    from dynadapter.cli.layers import read_config

    section = read_config(file, ("data",)).get("data")
    if isinstance(section, str):
        return {"class_path": section}
    settings = {**section, **(section.get("init_args") or {})} if isinstance(section, dict) else {}
    types: dict[str, Any] = {
        "class_path": str,
        "root": str,
        "task": str,
        "val_fraction": int | float,
        "split_seed": int,
    }
    found = {name: settings[name] for name in types if settings.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, types[name]):
            raise Mistake(f"config file {file}: data.{name} cannot be {value!r}")
    if not found:
        raise Mistake(f"config file {file} has no data section; give another, or --data CLASS --data.root FOLDER")
    return found


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuses a place for the report before hours of work, not after."""
    if out.is_dir():
        raise Mistake(f"out={out} is a folder; give a file, such as {out / 'report.json'}")
    if os.path.lexists(out) and not overwrite:
        raise Mistake(f"{out} exists; give another --out, or --overwrite true to replace it")
    if not out.parent.is_dir():
        raise Mistake(f"out={out}: there is no folder {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise Mistake(f"out={out}: nothing can be written in {out.parent}; give another place")


def _expected(file: str) -> Any:
    from dynadapter.data.report import check_report

    try:
        return check_report(json.loads(Path(file).expanduser().read_text(encoding="utf-8")))
    except OSError as error:
        raise Mistake(f"expect={file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Mistake(f"expect={file} is no report of verify: {one_line(error)}") from error


def verify(data: dict[str, Any], expected: Any, threads: int | None) -> "Report":
    """Checks the data with a progress bar for each set."""
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dynadapter.data.verify import verify
    from dynadapter.images.reading import shown

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(escape(shown(name)), total=total)
            bar.update(tasks[name], completed=done)

        return verify(**data, expected=expected, threads=threads, progress=progress)


def error_console() -> "Console":
    """Makes a console for what is not the result: progress bars, and only where somebody sees them move."""
    from rich.console import Console

    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return console


# ---- what was found --------------------------------------------------------------------------------------------------


def show(report: "Report", out: str | None) -> None:
    """Prints a table for each set and its faults, and in the end what it comes to."""
    for one in report.sets:
        _show_set(one)
    if report.missing_tasks:
        told = f"{len(report.missing_tasks)} of the 19 tasks of VTAB-1k are missing: {', '.join(report.missing_tasks)}"
        print(told if len(report.missing_tasks) < 19 else "none of the 19 tasks of VTAB-1k is there")
    errors, warnings = len(report.errors), len(report.warnings)
    where = "" if out or not errors + warnings else "; --out report.json writes down all that they name"
    told = _count(errors, "error") if errors else "no error"
    print(f"{told}, {_count(warnings, 'warning')}{where}")


def _show_set(one: "SetReport") -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    classes = f", {_count(one.classes, 'class', 'classes')}" if one.classes is not None else ""
    table = Table(title=escape(f"{_text(one.name)}{classes}"), box=box.SIMPLE, title_justify="left")
    table.add_column("split")
    for name in ("images", "readable", "classes", "smallest", "largest"):
        table.add_column(name, justify="right")
    table.add_column("modes")
    table.add_column("hash")
    for split in one.splits:
        sizes = ["x".join(map(str, size)) if size else "–" for size in (split.smallest, split.largest)]
        modes = ", ".join(f"{mode} {count:,}" if len(split.modes) > 1 else mode for mode, count in split.modes.items())
        counts = [f"{n:,}" for n in (split.images, split.readable, split.classes)]
        table.add_row(split.name, *counts, *sizes, modes or "–", (split.hash or "–")[:12])
    console = Console()
    console.width = max(console.width, 120)  # a narrow pipe would fold the names
    console.print(table)
    for fault in one.faults:
        _show_fault(fault)
    if one.faults:
        print()


def _show_fault(fault: "Fault") -> None:
    print(f"  {fault.level}: {_text(fault.text)}")
    for item in fault.items[:ITEMS]:
        print(f"      {_text(item)[:300]}")
    if len(fault.items) > ITEMS:
        print(f"      and {len(fault.items) - ITEMS:,} more")


def _text(text: str) -> str:
    from dynadapter.images.reading import shown

    return shown(text)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _write(report: "Report", out: Path) -> None:
    from dynadapter.training.checkpoints import write

    write(out, json.dumps(report.as_dict(), indent=1).encode() + b"\n")
    print(f"report in {out}")
