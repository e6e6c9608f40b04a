"""Measure accuracy with ``dynadapter sweep``: every arm of ``transfer.yaml`` on one backbone.

    python benchmarks/transfer.py --data TASKS --processes 2
    python benchmarks/transfer.py --data TASKS --fresh second --processes 2
    python benchmarks/transfer.py --data TASKS --sweep recipes --processes 2

The second command reads the second set of fresh tasks alone (``margins.py``); its files are named ``second_NAME``, and
with ``--fresh third`` or ``--fresh photographs`` ``third_NAME`` and ``photographs_NAME``. The third command compares
the recipes of ``recipes.yaml`` on development tasks (``fresh.py``).

Scale and policies are chosen on val200 with networks trained on train800; the final networks are trained on
train800val200 and measured on the test images once. The same command continues an interrupted sweep.

``--backbone`` takes ``micro``, which ships with the package; a file of weights for the same architecture; or a YAML
file with the settings of another one, such as ``{model: {backbone: NAME, weights: FILE}, data: {init_args:
{image_size: 70}}}``. The lines and tables are kept as ``results/transfer_NAME.*``, NAME without folder and ending, and
``report.py --claims`` reads them. ``--tiny`` tries every arm on 64 images of one task and keeps nothing. Further
arguments, such as ``--dry_run`` or ``--engine ray``, go to ``dynadapter sweep``.
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fresh
import margins
import yaml

from dynadapter.cli import main as dynadapter
from dynadapter.cli import sweep_file
from dynadapter.cli.errors import Mistake
from dynadapter.sweep.plan import as_dict

HERE = Path(__file__).parent
MICRO: dict[str, Any] = {
    "model": {"backbone": "micro", "pretrained": True},
    "data": {"init_args": {"image_size": 48, "normalization": "half"}},  # as it was trained
}


def main(argv: list[str] | None = None) -> None:
    """Run the sweep and keep its lines and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds the tasks, in the layout of VTAB-1k")
    parser.add_argument(
        "--sweep",
        default="transfer",
        choices=["transfer", "recipes", "parts", "epochs", "kinds"],
        help="the file of the sweep",
    )
    parser.add_argument("--backbone", default="micro", help="micro, a file of weights for it, or a YAML file")
    parser.add_argument("--tasks", nargs="*", help="by default those of the file")
    sets = ", ".join(margins.SETS)
    parser.add_argument(
        "--fresh", nargs="*", default=[], help=f"further tasks that nothing was chosen on, or sets: {sets}"
    )
    parser.add_argument("--adapters", nargs="+", help="by default those of the file")
    parser.add_argument("--recipes", nargs="+", help="by default those of the file")
    parser.add_argument("--scales", nargs="+", type=float, help="by default those of the file")
    parser.add_argument("--validation", action="store_true", help="compare on val200, and read no test image")
    parser.add_argument("--out", help="folder of the sweep, by default runs/transfer_NAME")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder that keeps lines and tables")
    parser.add_argument("--tiny", action="store_true", help="every arm, once, for an epoch of 64 images")
    args, others = parser.parse_known_args(argv)
    args.fresh = [task for one in args.fresh for task in margins.SETS.get(one, [one])]
    kind = args.sweep
    for own in margins.OWN_SWEEPS:
        tasks = set(margins.SETS[own])
        if set(args.fresh) & tasks:
            if set(args.fresh) - tasks or args.sweep != "transfer" or (own != "photographs" and args.tasks):
                parser.error(f"{own} is read in a sweep of its own: name no other task")
            args.tasks, kind = args.tasks or [], own
    name = Path(args.backbone).stem
    out = Path(args.out or f"runs/{'tiny' if args.tiny else kind}_{name}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{'tiny' if args.tiny else kind}_{name}.yaml"  # names the experiment in the title of the figure
    sweep = plan(args)
    root = shorten(Path(args.data), out / "tasks", sweep["tasks"]) if args.tiny else args.data
    file.write_text(yaml.safe_dump(sweep | {"root": str(root), "out": str(out)}, sort_keys=False), encoding="utf-8")
    place = None if args.tiny or "--dry_run" in others else args.results / f"{kind}_{name}"
    if place is not None and kept_lines(place).exists():
        with contextlib.suppress(Mistake):  # the sweep says what is wrong with its file
            check_kept(place, (as_dict(unit) for unit in sweep_file.read(str(file)).sweep.needed({})))
    dynadapter(["sweep", str(file), *others])
    if place is not None:
        keep(file, sweep, place)


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return the file of the sweep without the folders of this machine."""
    sweep: dict[str, Any] = yaml.safe_load((HERE / f"{args.sweep}.yaml").read_text(encoding="utf-8"))
    known = sweep["tasks"]
    names = list(known) if args.tasks is None else args.tasks
    drawn = {task: one.group for task, one in fresh.tasks().items()} | dict.fromkeys(margins.PHOTOGRAPHS, "Natural")
    decide = {task: {"group": known.get(task, drawn.get(task)), "fresh": True} for task in args.fresh}
    sweep["tasks"] = {task: known.get(task) for task in names} | decide
    settings = sweep["settings"]
    if args.backbone.endswith((".yaml", ".yml")):
        settings |= yaml.safe_load(Path(args.backbone).read_text(encoding="utf-8"))
    else:
        settings |= MICRO
        if args.backbone != "micro":
            settings["model"] = MICRO["model"] | {"weights": args.backbone}
    if set(args.fresh) & set(margins.THIRD):
        sweep["seeds"] = {adapter: list(seeds) for adapter, seeds in margins.THIRD_SEEDS.items()}
    if args.tiny:
        sweep |= {"tasks": dict(list(sweep["tasks"].items())[:1]), "adapters": ["lora"], "scales": [10], "seeds": [0]}
        settings["trainer"] = settings["trainer"] | {"max_epochs": 1}
    if args.adapters:
        sweep["adapters"] = args.adapters
    if args.scales:
        sweep["scales"] = args.scales
    if args.recipes:
        sweep["recipes"] = {recipe: sweep["recipes"][recipe] for recipe in args.recipes}
    if args.validation:
        sweep |= {"seeds": [], "search_seeds": sweep.get("search_seeds", [0])}
    _fit(sweep)
    return sweep


def shorten(root: Path, place: Path, tasks: Iterable[str]) -> Path:
    """Copy the first 64 images of each split; return the folder of these short tasks."""
    for task in tasks:
        for path in (root / task).glob("*.txt"):
            lines = path.read_text().splitlines()
            (place / task).mkdir(parents=True, exist_ok=True)
            if path.name != "classes.txt":
                lines = lines[:64]
                for image in (line.rpartition(" ")[0] for line in lines):
                    (place / task / image).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(root / task / image, place / task / image)
            (place / task / path.name).write_text("\n".join(lines) + "\n")
    return place


def _fit(sweep: dict[str, Any]) -> None:
    """Leave out what names recipes or adapters that were left out."""
    kept = {}
    for name, recipe in sweep["recipes"].items():
        if isinstance(recipe, dict) and "adapters" in recipe:
            recipe["adapters"] = [one for one in recipe["adapters"] if one in sweep["adapters"]]
        if isinstance(recipe, list) or recipe.get("adapters", True):
            kept[name] = recipe
    sweep["recipes"] = kept
    sweep["choices"] = {
        name: choice
        for name, choice in sweep.get("choices", {}).items()
        if set(choice["among"]) <= set(sweep["recipes"])
    }


def keep(file: Path, sweep: dict[str, Any], place: Path) -> None:
    """Copy the file of the sweep, the lines that belong to it, and the tables that there are.

    Raises:
        SystemExit: The place has lines of runs that the sweep lacks.
    """
    plan = sweep_file.read(str(file))
    done = plan.done()
    planned = plan.sweep.planned(done)
    lines = [line for unit, line in done.items() if unit in planned]
    check_kept(place, (line["run"] for line in lines))
    place.parent.mkdir(parents=True, exist_ok=True)
    kept_lines(place).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    place.with_name(f"{place.name}.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    for ending in ("md", "csv"):
        if (table := plan.out / f"table.{ending}").exists():
            shutil.copy(table, place.with_name(f"{place.name}.{ending}"))


def kept_lines(place: Path) -> Path:
    """Return the file of the kept lines."""
    return place.with_name(f"{place.name}.jsonl")  # the name of a backbone may have dots


def check_kept(place: Path, runs: Iterable[dict[str, Any]]) -> None:
    """Refuse a sweep with these runs if others are kept at its place.

    Raises:
        SystemExit: The place has lines of runs that the sweep lacks.
    """
    kept = kept_lines(place)
    former = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    if lacking := {run_of(json.loads(text)["run"]) for text in former} - {run_of(run) for run in runs}:
        raise SystemExit(
            f"{kept} has runs that this sweep lacks, such as {', '.join(min(lacking))}; name the tasks, adapters, "
            "recipes and seeds of that file too, or give another --results"
        )


def run_of(run: dict[str, Any]) -> tuple[str, ...]:
    """Return a run in words, without its scale and settings, which a new sweep may change."""
    return (run["task"], run["adapter"], run["recipe"], f"seed {run['seed']}", run["split"])


if __name__ == "__main__":
    main()
