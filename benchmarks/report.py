"""Write RESULTS.md and its figures from the JSON lines in results/. It trains nothing and measures nothing.

    python benchmarks/report.py

``--claims`` prints the claims alone, a line each, and writes nothing. Reads the lines of the timing programs, and the
lines and tables that transfer.py keeps. The same files give the same bytes. Needs pandas and matplotlib:
``pip install 'dynadapter[bench]'``.
"""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import claims
import margins
import matplotlib
import pandas as pd
from common import RESULTS, Line, cell, newest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from outcomes import Outcomes

from dynadapter.bench.timing import is_void
from dynadapter.sweep.table import draw, from_csv, mean_of

HERE = Path(__file__).parent
SECTIONS: list[tuple[str, str, str]] = [
    ("Training step", "training", "training.jsonl"),
    ("Training step on a GPU", "training", "gpu_step.jsonl"),
    ("Routing a batch", "latency", "latency.jsonl"),
    ("Routing a batch on a GPU", "latency", "gpu_routing.jsonl"),
    ("torch.compile by stage on a GPU", "stage_compile", "gpu_compile.jsonl"),
    ("Token merging", "token_merging", "token_merging.jsonl"),
    ("A block with an adapter", "adapters", "adapters.jsonl"),
    ("Serving", "serving", "serving.jsonl"),
    ("Servers under load", "load", "load.jsonl"),
    ("Several tasks on one backbone", "several_tasks", "several_tasks.jsonl"),
]
"""Title, program and file of each section on time."""


# ---- reading and printing


def read(path: Path) -> list[Line]:
    """Return the lines of a file; none where there is no file.

    Raises:
        ValueError: If a line is not JSON.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise ValueError(f"{path}:{number} is not JSON; a run was cut short: delete that line") from None
    return lines


def markdown(frame: pd.DataFrame) -> str:
    """Return a table as Markdown; numbers are right-aligned, missing values stay empty."""
    frame = frame.astype(object).where(frame.notna(), None)
    numeric = [frame[name].map(lambda value: isinstance(value, int | float)).any() for name in frame.columns]
    rows = [list(frame.columns), ["---:" if right else "---" for right in numeric]]
    rows += [[cell(value) for value in row] for row in frame.values.tolist()]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def protocol(program: ModuleType) -> str:
    """Return the paragraphs of a program's docstring behind its command, as Markdown."""
    first, *rest = inspect.cleandoc(program.__doc__ or "").split("\n\n")
    words = "\n\n".join([first, *(text for text in rest if not text.startswith("    python"))])
    return words.replace("``", "`") + "\n"


def place(line: Line) -> str:
    """Return the machine of a line in words."""
    found, memory = line["machine"], line.get("key", {}).get("memory")
    words = f"{found.get('gpu', found['cpu'])}, Python {found['python']}, torch {found['torch']}, timm {found['timm']}"
    return words + (f"; {', '.join(f'{name}={value}' for name, value in memory.items())}" if memory else "")


def by_machine(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Return the lines of each machine, in the order of the file."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(place(line), []).append(line)
    return groups


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "dynadapter"}):
        figure.savefig(path, metadata={"Date": None})


# ---- accuracy


def accuracy_section(results: Path, figures: Path) -> str:
    """Return the section on accuracy: the claims, and for each backbone the tables and the figure of its sweep."""
    tables = [
        (reading, path) for reading in margins.READINGS for path in sorted(results.glob(f"{reading.prefix}_*.md"))
    ]
    figures.mkdir(parents=True, exist_ok=True)
    parts = ["## Accuracy\n", protocol(claims), f"```\n{claims_text(results)}```\n"]
    for reading, path in tables:
        name = path.stem.removeprefix(f"{reading.prefix}_")
        figure = draw_accuracy(path.with_suffix(".csv"), reading, f"{reading.title}, {name}")
        figure.savefig(figures / f"accuracy-{path.stem}.png", dpi=150, metadata={"Software": None})
        text, picture = path.read_text(encoding="utf-8"), f"![accuracy over cost](figures/accuracy-{path.stem}.png)\n"
        parts += [f"### {reading.title}, {name}\n", text, picture]
    return "\n".join(parts)


def draw_accuracy(path: Path, reading: margins.Reading, title: str) -> Figure:
    """Draw accuracy over cost from the CSV table of a sweep: the mean of the tasks that decide."""
    rows = from_csv(path.read_text(encoding="utf-8"))
    means = reading.tasks if len(reading.tasks) == 1 else [mean_of(reading.tasks, "fresh task"), mean_of(reading.tasks)]
    known = {row.what for row in rows}
    figure: Figure = draw(rows, title, next((what for what in means if what in known), means[-1]))
    return figure


def claims_text(results: Path) -> str:
    """Return the claims of each reading, its failed trainings, and the aim behind the claims, a line each."""
    lines = []
    for reading in margins.READINGS:
        found = Outcomes.read_all(results, reading)
        lines += ["", f"{reading.title} ({', '.join(reading.tasks)})", *claims.failures(found)]
        lines += map(str, claims.claims(found, reading))
        aims = [str(claim) for claim in claims.aims(found, reading)]
        lines += ["The aim behind them:", *aims] if aims else []
    return "".join(line + "\n" for line in lines[1:])


# ---- time and cost


def draw_routing(lines: list[Line]) -> Figure:
    """Draw the speed-up of routing over what its GMACs promise, for every line that is not void."""

    def label(line: Line) -> str:
        memory = ", glibc keeps its memory" if line["key"].get("memory") else ""
        return f"{line['key']['backbone']}, batch {line['key']['batch']}{memory}"

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    lines = [line for line in lines if not is_void(line["control"])]
    names = list(dict.fromkeys(map(label, lines)))
    for number, name in enumerate(names):
        arms = [
            got
            for line in lines
            if label(line) == name
            for got in line.values()
            if isinstance(got, dict) and "efficiency" in got
        ]
        points = [(got["mac_speedup"], got["speedup"]) for got in arms]
        axes.plot(*zip(*points, strict=True), "os^vDP<>"[number % 8], color=f"C{number}", label=name, alpha=0.8)
    most = axes.get_xlim()[1]
    axes.plot([0.8, most], [0.8, most], color="grey", linewidth=1, label="as the GMACs promise")
    axes.set(xlabel="speed-up in GMACs over static", ylabel="speed-up in time over static")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    return figure


def time_section(title: str, name: str, lines: list[Line], figures: Path) -> str:
    """Return a section on time: what the program measures, and a table for each machine."""
    program = importlib.import_module(name)
    parts = [f"## {title}\n", protocol(program)]
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(line["key"].get("part", ""), []).append(line)
    for kind, some in kinds.items():
        parts += [f"### {title}: {kind}\n"] if kind else []
        for machine, own in by_machine(some).items():
            parts += [
                f"On {machine}:\n",
                markdown(pd.DataFrame([row for line in own for row in program.rows(line)], dtype=object)),
            ]
    if name == "latency":
        file = f"{title.lower().replace(' ', '-')}.svg"
        save(draw_routing(lines), figures / file)
        parts.append(f"![speed-up in time over speed-up in GMACs](figures/{file})\n")
    return "\n".join(parts)


def soak_section(results: Path) -> str:
    """Return the section on killed runs; empty where there are none."""
    lines = read(results / "soak.jsonl")
    if not lines:
        return ""
    import soak

    return "\n".join(["## Killed runs\n", protocol(soak), markdown(pd.DataFrame(soak.rows(lines), dtype=object))])


def kinds_section(results: Path) -> str:
    """Return the sections on adapter kinds: in each family, and trained on real weights; empty without lines."""
    import kinds

    parts = []
    if lines := read(results / "kinds.jsonl"):
        table, letters = kinds.rows(lines)
        notes = "".join(f"- {letter}: {note}\n" for letter, note in letters.items())
        parts += ["## Adapter kinds in every family\n", protocol(kinds), markdown(pd.DataFrame(table)), notes]
    for path in sorted(results.glob("kinds_*.jsonl")):
        words = (
            "Each kind with its default settings, trained by `python benchmarks/transfer.py --sweep kinds` "
            "(`kinds.yaml`) on real weights: the last exit's mean training loss of the first and of the last epoch, "
            "and accuracy and GMACs of each exit on val200, of the adapters as they are trained, not merged.\n"
        )
        for machine, some in by_machine(read(path)).items():
            parts += [f"## Trained kinds: {path.stem.removeprefix('kinds_')}\n", words, f"On {machine}:\n"]
            parts.append(markdown(pd.DataFrame([trained_row(line) for line in some])))
    return "\n".join(parts)


def trained_row(line: Line) -> dict[str, Any]:
    """Return the row of a run of a sweep of kinds."""
    row: dict[str, Any] = {"kind": line["run"]["adapter"]}
    if "failed" in line:
        return row | {"failed": line["failed"]}
    loss, giga = line["training_loss"], line["static_macs"] / 1e11
    row |= {"trained parameters": line["trainable"]}
    row |= {"loss, first epoch": loss["first_epoch"], "last epoch": loss["last_epoch"]}
    row |= {f"exit {entry['exit']}": f"{100 * entry['accuracy']:.1f} %" for entry in line["exits"]}
    return row | {f"GMACs {entry['exit']}": giga * entry["percent_of_static"] for entry in line["exits"]}


def cost_section(results: Path) -> str:
    """Return the section on counted GMACs; empty where nothing was counted."""
    path = results / "cost.json"
    if not path.exists():
        return ""
    import cost

    result = json.loads(path.read_text(encoding="utf-8"))
    return "\n".join(
        [
            "## Counting\n",
            protocol(cost),
            f"On {place(result)}:\n",
            markdown(pd.DataFrame(cost.rows(result), dtype=object)),
        ]
    )


# ---- the document


def document(results: Path, figures: Path) -> str:
    """Return RESULTS.md; write its figures."""
    parts = [
        "# Results\n",
        "`python benchmarks/report.py` prints this page from the files in `benchmarks/results`; none of it is typed. "
        "Where a case was timed several times, the newest time stands here.\n",
        accuracy_section(results, figures),
    ]
    for title, program, file in SECTIONS:
        if lines := newest(read(results / file)):
            parts.append(time_section(title, program, lines, figures))
    return "\n".join(
        part
        for part in [
            *parts,
            kinds_section(results),
            soak_section(results),
            cost_section(results),
        ]
        if part
    )


def main(argv: list[str] | None = None) -> None:
    """Write the document; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the JSON lines")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="the document; figures/ lies beside it")
    parser.add_argument("--claims", action="store_true", help="print the claims, with interval, margin and verdict")
    args: Any = parser.parse_args(argv)
    try:
        if args.claims:
            print(claims_text(args.results), end="")
            return
        text = document(args.results, args.out.parent / "figures")
        args.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
