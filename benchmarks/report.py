"""Writes RESULTS.md and its figures from the lines that transfer.py left. It trains nothing and measures nothing.

    python benchmarks/report.py                      # results/transfer.jsonl -> RESULTS.md, figures/*.svg
    python benchmarks/report.py --readme README.md   # and the small table between the README's two markers

What a log does not have is named, and the rest is printed. The same lines give the same bytes. Text in
``results/notes.md``, beside the log, is taken over as it stands: what was learned, by whoever ran the benchmark. Where
``results/drawn.jsonl`` is there, searches on tasks that ``drawn.py`` draws, recipes are compared on those, too.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import figures
from findings import NAMES, dyn, settings
from recipes import DEFAULT, recipe
from runs import Line, read_lines
from sections import Section
from transfer import GOAL, OUT

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
DRAWN = "drawn.jsonl"


# ---- the documents ---------------------------------------------------------------------------------------------------


def document(
    lines: list[Line], name: str, folder: Path, link: str, shown: str, notes: str, drawn: Sequence[Line] = ()
) -> str:
    """Gives RESULTS.md; draws its figures on the way.

    Args:
        lines: Of the log.
        name: The log's, for the text.
        folder: For the figures.
        link: Of that folder, as the document sees it.
        shown: The recipe with exits that tables show.
        notes: Text on what was learned; empty leaves that section out.
        drawn: Lines of the phase search on drawn tasks.
    """
    parts = [
        "# Transfer to tasks, with early exits and without\n",
        f"Printed by `python benchmarks/report.py` from the {len(lines)} lines of `{name}`; nothing here is typed by "
        "hand"
        + (", but the last section" if notes else "")
        + ". X is a kind of adapter on the frozen backbone without exits, Dyn-X the same with them.\n",
    ]
    found = settings(lines, shown)
    apart = settings(drawn, found[0].recipe if found else shown)
    for number, setting in enumerate(found):
        prefix = "" if number == 0 else re.sub(r"[^\w]+", "-", f"{setting.backbone}-{setting.epochs}-{setting.batch}-")
        parts.append(f"## {setting.backbone.partition(':')[0]}, {setting.epochs} epochs\n")
        parts.append(Section(setting, folder, prefix, link, apart[0] if apart and number == 0 else None).text())
    for number, setting in enumerate(apart):
        images = max(line["samples"] for line in setting.lines)
        parts.append(f"## {setting.backbone.partition(':')[0]}, {setting.epochs} epochs, drawn tasks\n")
        parts.append(
            f"`drawn.py` draws these tasks, with {images:,} validation images each ({len(setting.lines)} lines of "
            f"`{DRAWN}`): enough to tell differences that 200 cannot. What is called val200 here are those.\n"
        )
        parts.append(Section(setting, folder, f"drawn-{number}-" if number else "drawn-", link).searched())
    if notes:
        parts.append(f"## What was tried, and what was learned\n\n{notes.strip()}\n")
    return "\n".join(parts)


def between(text: str, content: str, path: Path) -> str:
    """Puts text between the two markers of a document.

    Raises:
        ValueError: It has not exactly these two, in this order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{path} needs one line {BEGIN} and after it one line {END}; the table goes between them")
    return f"{text[: text.index(BEGIN) + len(BEGIN)]}\n{content}{text[text.index(END) :]}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, default=OUT, help="what transfer.py wrote")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="the document")
    parser.add_argument("--figures", type=Path, help="folder for the figures; by default figures/ beside --out")
    parser.add_argument("--recipe", default=DEFAULT, help="the recipe with exits that tables and figures show")
    parser.add_argument("--readme", type=Path, help=f"a file with {BEGIN} and {END}: puts the small table between them")
    group = parser.add_argument_group("a grid of images that leave first and last; mind the images' terms")
    group.add_argument("--leavers", type=Path, help="file to draw it to (.png or .svg)")
    group.add_argument("--data", type=Path, help="folder that holds the tasks")
    group.add_argument("--keep", type=Path, help="folder in which transfer.py --keep left its logits")
    group.add_argument("--method", default="lora", choices=[*NAMES], help="the kind that is shown")
    return parser.parse_args(argv)


def report(args: argparse.Namespace) -> None:
    """Writes what was asked for.

    Raises:
        ValueError: There are no lines, or something that was asked for cannot be made of them.
    """
    lines = read_lines(args.lines)
    if not lines:
        raise ValueError(f"{args.lines} has no lines; run transfer.py first, or give --lines")
    recipe(args.recipe)
    first = settings(lines, args.recipe)[0]
    small = Section(first, HERE, "", "").short()
    if args.readme and not small:
        raise ValueError(f"{args.lines} has no final runs of X and Dyn-X yet: there is no table for {args.readme}")
    folder = args.figures or args.out.parent / "figures"
    link = Path(os.path.relpath(folder, args.out.parent)).as_posix()
    notes = args.lines.parent / "notes.md"
    told_notes = notes.read_text(encoding="utf-8") if notes.is_file() else ""
    name = args.lines.resolve()
    shown = name.relative_to(HERE.parent).as_posix() if name.is_relative_to(HERE.parent) else name.name
    drawn = args.lines.with_name(DRAWN)
    text = document(lines, shown, folder, link, args.recipe, told_notes, read_lines(drawn) if drawn.is_file() else ())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"wrote {args.out} from {len(lines)} lines, and figures in {folder}")
    if args.readme:
        args.readme.write_text(between(args.readme.read_text(encoding="utf-8"), small, args.readme), encoding="utf-8")
        print(f"wrote the table in {args.readme}")
    if args.leavers:
        if args.data is None or args.keep is None:
            raise ValueError("--leavers needs --data, the tasks, and --keep, the logits of the final runs")
        shown_tasks = figures.leavers(args.leavers, first, args.method, GOAL, args.data, args.keep)
        if not shown_tasks:
            raise ValueError(
                f"{args.keep} has no logits of final runs of {dyn(args.method)} whose images are in {args.data}"
            )
        print(f"wrote {args.leavers}: {', '.join(shown_tasks)}; mind the images' terms before you pass it on")


def main(argv: list[str] | None = None) -> None:
    """Runs the program; a user's mistake is one line and exit code 2."""
    try:
        report(arguments(argv))
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
