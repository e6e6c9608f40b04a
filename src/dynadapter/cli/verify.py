"""``dynadapter verify``: check a data set before a run."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadapter.cli.configs import config_files, read_config
from dynadapter.cli.errors import Mistake
from dynadapter.cli.help import ESSENTIAL, TITLES
from dynadapter.cli.parser import CommandParser
from dynadapter.files import shown, write

if TYPE_CHECKING:  # Lightning takes seconds to import
    from dynadapter.data.verify import Finding, Report, SplitReport

ITEMS = 5
"""Number of items that a finding names on the screen; the file of ``--out`` names all."""
CLASSES = 20
"""With more classes than this, the screen shows no table of images per class."""


def parser() -> CommandParser:
    """Create the command's parser; its keys ``data.*`` are those of every other command."""
    from dynadapter.data import ImageData

    made = CommandParser(
        "verify",
        "Decode every image of a data set, count images and classes, and find duplicates. "
        "The exit code is 0 for data without errors, 1 for errors in the data, and 2 for invalid input.",
        {"data": ImageData},
        short=True,
        usage="dynadapter verify --data CLASS --data.root FOLDER [--KEY VALUE ...]",
    )
    words = "Config file whose data section is checked, or its name; the command line wins over it."
    made.add_argument("--config", "-c", type=str | None, help=words)  # read by `config_files`, here for the help
    made.add_subclass_arguments(ImageData, "data", required=True)
    (made.groups or {})["data"].title = TITLES["data"]
    one = next(action for action in made._actions if action.dest == "data")
    one.help, one.metavar = f"{ESSENTIAL['data'].rpartition(';')[0]}; their settings are --data.NAME VALUE.", "CLASS"
    made.add_argument("--out", type=str | None, help="File for the whole report, as JSON.")
    words = "Images decoded at once; by default a few more than there are cores."
    made.add_argument("--threads", type=int | None, help=words)
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    from dynadapter.cli.safety import check_config
    from dynadapter.data.verify import verify

    files, rest = config_files(args)
    made = parser()
    given = made.parse_args([*data_sections(files, rest), *rest])
    check_config(given)
    if given.threads is not None and given.threads < 1:
        raise Mistake(f"threads={given.threads} must be at least 1")
    out = Path(os.path.expanduser(given.out)) if given.out is not None else None
    if out is not None:
        _check_out(out)
    data = made.instantiate(given).data
    with progress_bar() as progress:
        report = verify(data, threads=given.threads, progress=progress)
    print_report(report)
    if out is not None:
        write(out, (json.dumps(report.as_dict(), indent=1) + "\n").encode())
        print(f"report in {out}")
    if report.count("error"):
        raise SystemExit(1)


def data_sections(files: Sequence[str], line: Sequence[str]) -> list[str]:
    """Return the data sections of config files as arguments, as the parser reads them: JSON, or the name of a class.

    A section without a class, such as that of ``augment``, needs one before it: that of the command line, or of another
    section.
    """
    from dynadapter.cli.layers import class_of_data

    sections = [_data_section(file) for file in files]
    texts = [section if isinstance(section, str) else json.dumps(section, default=str) for section in sections]
    return [*class_of_data(line, sections), *(f"--data={text}" for text in texts)] if files else []


def _data_section(file: str) -> Any:
    """Return the data section of a config file: a mapping, or the name of a class."""
    section = read_config(file, ("data",)).get("data")
    if not section:
        raise Mistake(f"config file {file} has no data section; give another, or --data CLASS --data.root FOLDER")
    return section


def _check_out(out: Path) -> None:
    """Check the path of the report before the work."""
    if os.path.lexists(out):
        raise Mistake(f"out={out} exists; give a new file, such as {out.with_suffix('')}-2.json")
    if not out.parent.is_dir():
        raise Mistake(f"out={out}: folder {out.parent} does not exist; create it first")
    if not os.access(out.parent, os.W_OK):
        raise Mistake(f"out={out}: folder {out.parent} is not writable; give another place")


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal; yield the function that updates it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns, console = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()), Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ---- the printed report ----------------------------------------------------------------------------------------------


def print_report(report: "Report") -> None:
    """Print a table of the splits, a table of the classes if there are few, the findings, and a summary."""
    names = report.class_names
    print(shown(f"{report.data}, {len(names)} class{'es' * (len(names) != 1)}, {report.folder or 'in memory'}"))
    columns = ["split", "images", "unreadable", "images per class", "smallest", "largest", "hash"]
    _print_table(columns, [_split_row(split) for split in report.splits])
    if len(names) <= CLASSES and report.splits:
        rows = [[name, *(f"{split.classes[name]:,}" for split in report.splits)] for name in names]
        _print_table(["class", *(split.name for split in report.splits)], rows)
    if report.account:
        print(report.account)
    for finding in report.findings:
        _print_finding(finding)
    errors, warnings = report.count("error"), report.count("warning")
    print(f"{errors:,} error{'s' * (errors != 1)}, {warnings:,} warning{'s' * (warnings != 1)}")


def _split_row(split: "SplitReport") -> list[str]:
    counts = split.classes.values()
    sizes = ["x".join(map(str, size)) if size else "–" for size in (split.smallest, split.largest)]
    per_class = f"{min(counts):,} to {max(counts):,}"
    return [split.name, f"{split.images:,}", f"{split.unreadable:,}", per_class, *sizes, (split.hash or "–")[:12]]


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table

    from dynadapter.printing import print_tables

    table = Table(box=box.SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(shown, row))
    print_tables(table, width=120)


def _print_finding(finding: "Finding") -> None:
    print(f"  {finding.level}: {shown(finding.text)}")
    for item in finding.items[:ITEMS]:
        print(f"      {shown(item)[:300]}")
    if len(finding.items) > ITEMS:
        print(f"      and {len(finding.items) - ITEMS:,} more; --out report.json lists all")
