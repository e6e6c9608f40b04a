"""The final table of a sweep: accuracy and cost of every arm by task, by group and over all tasks."""

import csv
import io
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dynadapter.calibrate.report import cap_accuracy
from dynadapter.sweep.baselines import ORACLE, SLACK, readings
from dynadapter.sweep.lines import right_of
from dynadapter.sweep.plan import FINAL, Arm, Line, Sweep, Unit

GROUPS = ("Natural", "Specialized", "Structured")
NAMES = ("adapter", "recipe", "reading", "what")
"""The columns of the CSV file that hold text."""


@dataclass(frozen=True)
class Value:
    """Mean and standard deviation over the seeds."""

    mean: float
    std: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """One line of the CSV file.

    Args:
        adapter: Name of the adapter.
        recipe: Name of the recipe.
        reading: ``exit 1`` to ``exit K``, the name of a goal, ``GOAL: all at one exit``, ``GOAL: random mixture``, or
            ``oracle``.
        what: A task, ``mean of Natural`` and so on, ``mean of groups``, ``mean of N fresh tasks``, or ``mean of N
            tasks``.
        scale: The chosen adapter scale, for a task.
        accuracy: Top-1 accuracy in %.
        percent_of_static: Cost in % of static.
    """

    adapter: str
    recipe: str
    reading: str
    what: str
    scale: float | None
    accuracy: Value
    percent_of_static: Value


Numbers = Mapping[int, tuple[float, float]]
"""Accuracy and cost, both in %, by seed."""


def rows(sweep: Sweep, done: Mapping[Unit, Line]) -> list[Row]:
    """Return all rows for which the runs are finished; a mean needs all of its parts."""
    found = []
    for adapter in sweep.adapters:
        for recipe in (*sweep.recipes, *sweep.choices):
            units = _units(sweep, done, adapter, recipe)
            scales = {task: unit.scale for task, by_seed in units.items() for unit in by_seed.values()}
            results = {
                task: {
                    seed: readings(_of_goals(sweep, done[unit]), done[sweep.twin(unit)], right_of(done[unit])[0])
                    for seed, unit in by_seed.items()
                }
                for task, by_seed in units.items()
            }
            for reading in _names(results, sweep):
                numbers = {
                    task: {seed: by_name[reading] for seed, by_name in by_seed.items() if reading in by_name}
                    for task, by_seed in results.items()
                }
                for what, values in _with_means(sweep, numbers):
                    accuracy, cost = (_value([pair[k] for pair in values.values()]) for k in (0, 1))
                    found.append(Row(adapter, recipe, reading, what, scales.get(what), accuracy, cost))
    return found


def _of_goals(sweep: Sweep, line: Line) -> Line:
    """Return a line with the policies of the sweep's goals alone; a former file may have had others."""
    names = [goal.name for goal in sweep.goals if goal.name in line["policies"]]
    return {**line, "policies": {name: line["policies"][name] for name in names}}


def _units(sweep: Sweep, done: Mapping[Unit, Line], adapter: str, recipe: str) -> dict[str, dict[int, Unit]]:
    """Return the measured runs of an adapter and a recipe, or of a choice among recipes, by task and seed."""
    units: dict[str, dict[int, Unit]] = {}
    for task in sweep.tasks:
        chosen = _chosen(sweep, done, Arm(task, adapter, recipe))
        scale = None if chosen is None else sweep.chosen_scale(chosen, done)
        if chosen is not None and scale is not None:
            several = [sweep.unit(chosen, scale, seed, sweep.split) for seed in sweep.measured_seeds(chosen)]
            ready = [unit for unit in several if {unit, sweep.twin(unit)} <= done.keys()]
            units[task] = {unit.seed: unit for unit in ready if "failed" not in done[unit]}
    return units


def _chosen(sweep: Sweep, done: Mapping[Unit, Line], arm: Arm) -> Arm | None:
    """Return the arm behind a name in the table; for a choice, the most accurate on val200 within its cost."""
    if arm.recipe not in sweep.choices:
        return arm if (arm.adapter, arm.recipe) in sweep.settings else None
    choice, goal = sweep.choices[arm.recipe], sweep.goals[0].name
    accuracy = {}
    for other in (replace(arm, recipe=recipe) for recipe in choice.among):
        scale = sweep.chosen_scale(other, done) if (other.adapter, other.recipe) in sweep.settings else None
        twins = [] if scale is None else sweep.twins(other, scale)
        if not twins or any(unit not in done or "failed" in done[unit] for unit in twins):
            return None
        found = [done[unit]["policies"][goal] for unit in twins]
        cost, mean = (statistics.fmean(one[key] for one in found) for key in ("percent_of_static", "accuracy"))
        if cost <= 100 * choice.cost + SLACK:
            accuracy[other] = mean
    return max(accuracy, key=lambda other: accuracy[other], default=None)


def _names(results: Mapping[str, Mapping[int, Mapping[str, Any]]], sweep: Sweep) -> list[str]:
    """Return all readings in order: exits, then the goals, each with its baselines, then the oracle."""
    found = dict.fromkeys(name for by_seed in results.values() for named in by_seed.values() for name in named)
    goals = [goal.name for goal in sweep.goals]

    def order(name: str) -> tuple[int, int, str]:
        goal = name.partition(":")[0]
        return (1, goals.index(goal), name) if goal in goals else (2 * (name == ORACLE), len(name), name)

    return sorted(found, key=order)


def _with_means(sweep: Sweep, numbers: Mapping[str, Numbers]) -> Iterator[tuple[str, Numbers]]:
    """Yield each task's numbers, and those of the means over tasks and groups, computed seed by seed."""
    for task in sweep.tasks:
        if numbers.get(task):
            yield task, numbers[task]
    groups = []
    for group in GROUPS:
        members = [numbers.get(task, {}) for task, of in sweep.tasks.items() if of == group]
        if mean := _mean(members):
            yield f"mean of {group}", mean
        groups.append(mean)
    if mean := _mean(groups):
        yield "mean of groups", mean
    if 0 < len(sweep.fresh) < len(sweep.tasks) and (mean := _mean([numbers.get(task, {}) for task in sweep.fresh])):
        yield mean_of(sweep.fresh, "fresh task"), mean
    if mean := _mean([numbers.get(task, {}) for task in sweep.tasks]):
        yield mean_of(sweep.tasks), mean


def _mean(parts: Sequence[Numbers]) -> Numbers:
    """Return the mean of the parts for each seed that all of them have."""
    seeds = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {
        seed: tuple(statistics.fmean(part[seed][k] for part in parts) for k in (0, 1))  # type: ignore[misc]
        for seed in sorted(seeds)
    }


def _value(values: Sequence[float]) -> Value:
    return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


# ---- as text


def as_csv(table: Sequence[Row]) -> str:
    """Return all rows as CSV, numbers with three decimals."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    measured = ["accuracy", "accuracy_std", "percent_of_static", "percent_of_static_std"]
    writer.writerow([*NAMES, "scale", "seeds", *measured])
    for row in table:
        values = [number for value in (row.accuracy, row.percent_of_static) for number in (value.mean, value.std)]
        shown = ["" if number is None else f"{number:.3f}" for number in values]
        scale = "" if row.scale is None else f"{row.scale:g}"
        writer.writerow([row.adapter, row.recipe, row.reading, row.what, scale, row.accuracy.seeds, *shown])
    return text.getvalue()


def from_csv(text: str) -> list[Row]:
    """Return the rows of :func:`as_csv`."""
    found = []
    for row in csv.DictReader(io.StringIO(text)):
        numbers = {key: float(value) for key, value in row.items() if key not in NAMES and value}
        accuracy, cost = (
            Value(numbers[name], numbers.get(f"{name}_std"), int(numbers["seeds"]))
            for name in ("accuracy", "percent_of_static")
        )
        adapter, recipe, reading, what = (row[name] for name in NAMES)
        found.append(Row(adapter, recipe, reading, what, numbers.get("scale"), accuracy, cost))
    return found


def as_markdown(table: Sequence[Row], sweep: Sweep) -> str:
    """Return two tables: one column per adapter and recipe (first policy), and one row per reading."""
    policy = [row for row in table if row.reading == sweep.goals[0].name]
    arms = list(dict.fromkeys((row.adapter, row.recipe) for row in policy))
    cells = {(row.what, row.adapter, row.recipe): _cell(row) for row in policy}
    images = "the test images" if sweep.split == FINAL else "val200, on which scale and thresholds were chosen"
    lines = [
        f"Top-1 accuracy in % on {images} (cost in % of static), mean ± sample deviation over {_seeds(table)}.",
        f"Scale and thresholds were chosen on val200 ({sweep.goals[0].name}); the last epoch counts.",
        "",
        "| | " + " | ".join(f"{adapter}, {recipe}" for adapter, recipe in arms) + " |",
        "|---|" + "---:|" * len(arms),
    ]
    for what in dict.fromkeys(sorted((row.what for row in policy), key=_order(sweep))):
        name = f"**{what}**" if what.startswith("mean of ") else what
        lines.append(f"| {name} | " + " | ".join(cells.get((what, *arm), "") for arm in arms) + " |")
    return "\n".join([*lines, "", *_by_reading(table, sweep)]) + "\n"


def _seeds(table: Sequence[Row]) -> str:
    """Return a text with the number of seeds of the tasks."""
    found = sorted({row.accuracy.seeds for row in table if row.scale is not None})
    return _count(found[0], "seed") if len(found) == 1 else f"{found[0]} to {found[-1]} seeds"


def _by_reading(table: Sequence[Row], sweep: Sweep) -> list[str]:
    """Return a Markdown table with a row for each reading, and a column for each task and their mean.

    A network with one exit has one row, because every goal reads that exit.
    """
    mean = mean_of(sweep.tasks)
    columns = [what for what in (*sweep.tasks, mean) if any(row.what == what for row in table)]
    cells = {(row.adapter, row.recipe, row.reading, row.what): _cell(row) for row in table}
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    several = {(row.adapter, row.recipe) for row in table if row.reading == "exit 2"}
    for arm in dict.fromkeys((row.adapter, row.recipe, row.reading) for row in table):
        if arm[2] != "exit 1" and arm[:2] not in several:
            continue
        lines.append(f"| {', '.join(arm)} | " + " | ".join(cells.get((*arm, what), "") for what in columns) + " |")
    return lines


def _cell(row: Row) -> str:
    accuracy, cost = row.accuracy, row.percent_of_static
    deviation = "" if accuracy.std is None else f" ± {accuracy.std:.1f}"
    return f"{accuracy.mean:.1f}{deviation} ({cost.mean:.0f} %)"


def _order(sweep: Sweep) -> Callable[[str], tuple[int, str]]:
    """Return the sort key: tasks in the order of the sweep, then means."""
    means = [*(f"mean of {group}" for group in GROUPS), "mean of groups", mean_of(sweep.fresh, "fresh task")]
    means.append(mean_of(sweep.tasks))
    places = {what: place for place, what in enumerate([*sweep.tasks, *means])}
    return lambda what: (places[what], what)


def _count(number: int, one: str) -> str:
    return f"{number} {one}{'' if number == 1 else 's'}"


# ---- as a picture

COLOURS = {"lora": "C0", "adapter": "C1", "repadapter": "C2"}
"""Colours of adapters that are the same in every figure; others take the next ones."""
MARKERS = {"static": "o", "dynamic": "X"}
"""Markers of recipes that are the same in every figure; others take the next ones."""


def mean_of(tasks: Collection[str], one: str = "task") -> str:
    """Return what :class:`Row` calls the mean of some tasks.

    >>> mean_of(["cifar", "dtd"])
    'mean of 2 tasks'
    """
    return f"mean of {_count(len(tasks), one)}"


def draw(table: Sequence[Row], title: str, what: str, images: str = "test") -> Any:
    """Draw accuracy over % of static: a line through the exits of each arm, and a star for each policy.

    Args:
        table: The rows of a sweep.
        title: Of the figure.
        what: The task, or the mean, whose rows are drawn.
        images: On which the accuracies were measured.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    arms: dict[tuple[str, str], list[Row]] = {}
    for row in table:
        if row.what == what:
            arms.setdefault((row.adapter, row.recipe), []).append(row)
    colours = _styles((adapter for adapter, _ in arms), COLOURS, [f"C{k}" for k in range(3, 10)])
    markers = _styles((recipe for _, recipe in arms), MARKERS, list("s^vDPph<>"))
    for (adapter, recipe), here in arms.items():
        exits = [row for row in here if row.reading.startswith("exit ")]
        policies = [row for row in here if row not in exits and ":" not in row.reading and row.reading != ORACLE]
        style: dict[str, Any] = {"color": colours[adapter], "marker": markers[recipe]}
        label = f"{adapter}, {recipe} ({_count(here[0].accuracy.seeds, 'seed')})"
        axes.plot(*_places(exits), linestyle="-" if len(exits) > 1 else "", linewidth=1.2, label=label, **style)
        if len(exits) > 1:
            axes.plot(*_places(policies), "*", color=style["color"], markersize=13, markeredgecolor="black", zorder=3)
            axes.plot(*_places(policies), style["marker"], color="white", markersize=4, markeredgewidth=0, zorder=4)
    handles, labels = axes.get_legend_handles_labels()
    star = Line2D([], [], marker="*", linestyle="", color="white", markersize=13, markeredgecolor="black")
    words = [*labels, "by a policy, with the recipe's mark"]
    figure.legend([*handles, star], words, fontsize="small", loc="outside right upper")
    cap_accuracy(axes, 100)
    cut = ", axis cut" if axes.get_ylim()[0] > 0 else ""
    axes.set(xlabel="cost in % of static", ylabel=f"{images} accuracy in %, {what}{cut}", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    return figure


def _places(several: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.percent_of_static.mean for row in several], [row.accuracy.mean for row in several]


def _styles(names: Iterable[str], known: Mapping[str, str], others: Sequence[str]) -> dict[str, str]:
    """Return a style for each name: the known one, or in their order the next of the others."""
    unknown = [name for name in dict.fromkeys(names) if name not in known]
    return {**known, **{name: others[k % len(others)] for k, name in enumerate(unknown)}}
