"""What the lines of transfer.py say: means over tasks and seeds, paired differences, what is missing."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from outcomes import DEFAULT_RULE
from recipes import DEFAULT, METHODS, PAPER
from recipes import recipe as recipe_of
from runs import Line, matching
from scipy.stats import t as student
from transfer import GROUPS, chosen_scale, score

from dynadapter.bench.timing import is_void

NAMES = {
    "probe": "linear probe",
    "adapter": "Adapter",
    "lora": "LoRA",
    "repadapter": "RepAdapter",
    "full": "full fine-tuning",
}
"""How the kinds are called in tables."""

PETL = ("adapter", "lora", "repadapter")
"""The kinds that the goals are about."""

LAST = "last"
"""Every sample at the last exit; other readings are an exit's number from 0, or a goal of the calibration ("50")."""

Reading = str | int


def dyn(method: str) -> str:
    """Names a kind with exits."""
    return "Dyn-probe" if method == "probe" else f"Dyn-{NAMES[method]}"


# ---- one line --------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """What a network does when it is read in one way.

    ``accuracy`` and ``cost`` are shares; the cost is the average of the samples' multiply-adds, of those of the network
    without exits, by whole blocks; ``class_first`` the same as routing runs them; ``macs`` the average itself.
    ``shares`` leave at each exit.
    """

    accuracy: float
    cost: float
    class_first: float
    macs: float
    shares: tuple[float, ...]


def read(line: Line, reading: Reading, rule: str = DEFAULT_RULE) -> Point | None:
    """Reads a line of the log; None where it has no such reading."""
    exits, static = len(line["macs"]), line["macs_static"]
    if reading == LAST or isinstance(reading, int):
        at = exits - 1 if reading == LAST else int(reading)
        if at >= exits:
            return None
        accuracy, shares = line["exit_accuracy"][at], tuple(float(k == at) for k in range(exits))
    else:
        found = line.get("routed", {}).get(rule, {}).get(reading)
        if found is None:
            return None
        accuracy, shares = found["accuracy"], tuple(found["shares"])

    def average(macs: Sequence[int]) -> float:
        return sum(share * one for share, one in zip(shares, macs, strict=True)) / static

    if exits == 1:  # the yardstick itself; the class token's row alone would be cheaper for it, too
        return Point(accuracy, 1.0, 1.0, static, shares)
    cost = average(line["macs"])
    return Point(accuracy, cost, average(line["macs_class_first"]), cost * static, shares)


# ---- numbers ---------------------------------------------------------------------------------------------------------


class Mean(NamedTuple):
    """A mean, its deviation over seeds (None with one seed), and over how many."""

    value: float
    deviation: float | None
    seeds: int


class Difference(NamedTuple):
    """Differences between two arms by task, their mean, and half the width of its 95 % t interval over tasks."""

    by_task: dict[str, float]
    mean: float
    half: float | None

    @property
    def text(self) -> str:
        """The mean and its interval, in points."""
        around = "" if self.half is None else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:+.1f}{around}"


def half_width(values: Sequence[float]) -> float | None:
    """Gives half the width of a mean's 95 % t interval; None for a single value.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    if len(values) < 2:
        return None
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def difference(by_task: dict[str, float]) -> Difference | None:
    """Sums up differences by task; None where there is none."""
    if not by_task:
        return None
    return Difference(by_task, statistics.fmean(by_task.values()), half_width(list(by_task.values())))


# ---- a setting -------------------------------------------------------------------------------------------------------

Values = dict[str, dict[int, Point]]
"""By task and seed."""


@dataclass(frozen=True)
class Setting:
    """The lines of one backbone and one length of training: what can be compared.

    Args:
        backbone: Name and beginning of the hash.
        epochs: As trained.
        batch: Images a step.
        lines: All of them, in the log's order.
        recipe: The one that tables show for the networks with exits.
    """

    backbone: str
    epochs: int
    batch: int
    lines: list[Line]
    recipe: str = DEFAULT

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The tasks by group."""
        named = {line["key"]["task"]: line["group"] for line in self.lines if "group" in line}
        order = list(dict.fromkeys(GROUPS.values()))
        ranked = sorted(set(named.values()), key=lambda g: (order.index(g) if g in order else len(order), g))
        return {group: sorted(task for task in named if named[task] == group) for group in ranked}

    @property
    def tasks(self) -> list[str]:
        """All tasks, group by group."""
        return [task for tasks in self.groups.values() for task in tasks]

    @cached_property
    def methods(self) -> list[str]:
        """The kinds that the log has."""
        return [method for method in METHODS if any(line["key"]["method"] == method for line in self.lines)]

    @property
    def petl(self) -> list[str]:
        """Those of them that the goals are about."""
        return [method for method in self.methods if method in PETL]

    def phase(self, name: str, **key: Any) -> list[Line]:
        """The lines of a phase."""
        return matching(self.lines, phase=name, **key)

    @cached_property
    def compared(self) -> int:
        """In how many cells of task and kind both X and Dyn-X were read on test."""
        arms = [
            {(line["key"]["task"], line["key"]["method"]) for line in self.phase("final", recipe=recipe)}
            for recipe in ("static", self.recipe)
        ]
        return sum(method in PETL for _, method in set.intersection(*arms))

    @cached_property
    def seeds(self) -> list[int]:
        """All seeds of final runs."""
        return sorted({line["key"]["seed"] for line in self.phase("final")})

    def scale(self, method: str, recipe: str, task: str) -> float | None:
        """The scale that counts: of the final runs', the one that the search prefers, else the last that was run."""
        done = self.phase("final", method=method, recipe=recipe, task=task)
        found = [line["key"]["scale"] for line in done]
        best = chosen_scale(self.phase("search", method=method, recipe=recipe, task=task))
        return best if best in found or not found else found[-1]

    def finals(self, method: str, recipe: str, task: str) -> dict[int, Line]:
        """The final runs of an arm on a task, by seed."""
        scale = self.scale(method, recipe, task)
        lines = self.phase("final", method=method, recipe=recipe, task=task, scale=scale)
        return {line["key"]["seed"]: line for line in sorted(lines, key=lambda line: line["key"]["seed"])}

    def values(self, method: str, recipe: str, reading: Reading = LAST, rule: str = DEFAULT_RULE) -> Values:
        """What an arm does on test."""
        found: Values = {}
        for task in self.tasks:
            lines = self.finals(method, recipe, task)
            points = {seed: point for seed, line in lines.items() if (point := read(line, reading, rule))}
            if points:
                found[task] = points
        return found

    def preferred(self, method: str) -> dict[str, str]:
        """By task the recipe with exits that the search prefers, of those read on test; of equals the shown one."""
        found = {}
        for task in self.tasks:
            done = self.phase("final", method=method, task=task)
            names = sorted({line["key"]["recipe"] for line in done if line["arm"] != "static"})
            scores = {}
            for name in sorted(names, key=lambda name: name != self.recipe):
                lines = self.phase(
                    "search", method=method, task=task, recipe=name, scale=self.scale(method, name, task)
                )
                if lines:
                    scores[name] = statistics.fmean(map(score, lines))
            if scores:
                found[task] = max(scores, key=lambda name: scores[name])
        return found

    def preferred_values(self, method: str, reading: Reading = LAST) -> Values:
        """What an arm does on test where each task has the recipe that the search prefers."""
        names = self.preferred(method)
        arms = {name: self.values(method, name, reading) for name in set(names.values())}
        return {task: arms[name][task] for task, name in names.items() if task in arms[name]}

    def goals(self) -> list[str]:
        """The targets that thresholds were set for, as the lines have them."""
        routed = [line["routed"][DEFAULT_RULE] for line in self.phase("final") if "routed" in line]
        return list(dict.fromkeys(goal for one in routed for goal in one))

    @cached_property
    def missing(self) -> list[str]:
        """What a whole log would have, and this one has not: final runs of an arm, seeds of a final run."""
        gone, short = {}, {}
        for method in METHODS:
            for recipe in ("static",) if method == "full" else ("static", self.recipe):
                done = {task: set(self.finals(method, recipe, task)) for task in self.tasks}
                name = NAMES[method] if recipe == "static" else dyn(method)
                gone[name] = [task for task in self.tasks if not done[task]]
                short[name] = [
                    f"{task} without seed {', '.join(map(str, sorted(set(self.seeds) - seeds)))}"
                    for task, seeds in done.items()
                    if seeds and seeds < set(self.seeds)
                ]
        whole = [f"{name}: no final run at all" for name, tasks in gone.items() if len(tasks) == len(self.tasks)]
        some = [f"{name}: no final run on {', '.join(t)}" for name, t in gone.items() if 0 < len(t) < len(self.tasks)]
        return [*whole, *some, *(f"{name}: {', '.join(parts)}" for name, parts in short.items() if parts)]


def settings(lines: Iterable[Line], recipe: str = DEFAULT) -> list[Setting]:
    """Sorts lines by backbone, epochs and batch; first comes what compares most tasks and kinds, of equals the longest.

    Where no final run has the recipe that is to be shown (nor a search, where there are no final runs), the one with
    exits that most of them have takes its place, of equals the one that the log has last; without any the paper's.
    """
    parts: dict[tuple[str, int, int], list[Line]] = {}
    for line in lines:
        parts.setdefault((line["key"]["backbone"], line["key"]["epochs"], line["key"]["batch"]), []).append(line)
    found = [
        Setting(*about, part, _shown(matching(part, phase="final") or part, recipe)) for about, part in parts.items()
    ]
    return sorted(
        found,
        key=lambda s: (-s.compared, -s.epochs, -len(s.phase("final")), -len(s.lines), s.backbone, s.batch),
    )


def _shown(lines: list[Line], wanted: str) -> str:
    names = [name for line in lines if not recipe_of(name := line["key"]["recipe"]).static]
    if wanted in names or not names:
        return wanted if wanted in names else PAPER
    return max(reversed(names), key=names.count)


# ---- means and differences -------------------------------------------------------------------------------------------


def mean(values: Values, pick: Callable[[Point], float], tasks: Sequence[str]) -> Mean | None:
    """Gives the mean over tasks of the means over seeds; None where a task is missing.

    The deviation is that of the mean over tasks from seed to seed, over the seeds that all tasks have.
    """
    if not tasks or any(task not in values for task in tasks):
        return None
    value = statistics.fmean(statistics.fmean(map(pick, values[task].values())) for task in tasks)
    seeds = sorted(set.intersection(*(set(values[task]) for task in tasks)))
    each = [statistics.fmean(pick(values[task][seed]) for task in tasks) for seed in seeds]
    return Mean(value, statistics.stdev(each) if len(each) > 1 else None, len(seeds))


def grouped(values: Values, pick: Callable[[Point], float], groups: dict[str, list[str]]) -> list[Mean | None]:
    """Gives the mean of each group, and at the end the mean of these means."""
    found = [mean(values, pick, tasks) for tasks in groups.values()]
    if not found or None in found:
        return [*found, None]
    parts = [one for one in found if one is not None]
    seeds = sorted(set.intersection(*(set(points) for points in values.values())))
    each = [
        statistics.fmean(statistics.fmean(pick(values[task][seed]) for task in tasks) for tasks in groups.values())
        for seed in seeds
    ]
    deviation = statistics.stdev(each) if len(each) > 1 else None
    return [*found, Mean(statistics.fmean(one.value for one in parts), deviation, len(seeds))]


def paired(one: Values, other: Values, pick: Callable[[Point], float]) -> Difference | None:
    """Compares two arms on the tasks and seeds that both have: one minus the other."""
    by_task = {}
    for task in one:
        seeds = sorted(set(one[task]) & set(other.get(task, {})))
        if seeds:
            by_task[task] = statistics.fmean(pick(one[task][s]) - pick(other[task][s]) for s in seeds)
    return difference(by_task)


def share_of(one: Values, tasks: Iterable[str]) -> float | None:
    """The mean cost of an arm over tasks, as a share of the network without exits."""
    costs = [statistics.fmean(point.cost for point in one[task].values()) for task in tasks if task in one]
    return statistics.fmean(costs) if costs else None


# ---- the search ------------------------------------------------------------------------------------------------------


def at_goal(line: Line, goal: str) -> float | None:
    """A search run's accuracy at a goal, by thresholds from the other half of the validation images."""
    found = line.get("held_out", {}).get(DEFAULT_RULE, {}).get(goal)
    return found["accuracy"] if found else None


READINGS: dict[str, Callable[[Line], float | None]] = {
    "first": lambda line: line["exit_accuracy"][0] if len(line["exit_accuracy"]) > 1 else None,
    "35": lambda line: at_goal(line, "35"),
    "50": lambda line: at_goal(line, "50"),
    LAST: lambda line: line["exit_accuracy"][-1],
    "score": lambda line: score(line) if len(line["exit_accuracy"]) > 1 else None,
}
"""What recipes are compared by, on the validation images."""


@dataclass(frozen=True)
class Compared:
    """A recipe against another, on the validation images.

    Args:
        cells: Pairs of task and kind that both were run on.
        differences: By reading, and there by kind or ``all``: differences by task.
    """

    recipe: str
    cells: int
    differences: dict[str, dict[str, Difference | None]]


def compare(setting: Setting, recipe: str, base: str) -> Compared:
    """Compares the search runs of a recipe with those of another.

    In each cell of task and kind both take the best of the scales that both were run with, and the mean over the seeds
    that both have.
    """
    cells: dict[tuple[str, str], tuple[list[Line], list[Line]]] = {}
    for method in setting.petl:
        for task in setting.tasks:
            pair = [setting.phase("search", method=method, task=task, recipe=name) for name in (recipe, base)]
            both = set.intersection(*({(x["key"]["scale"], x["key"]["seed"]) for x in lines} for lines in pair))
            if not both:
                continue
            pair = [[x for x in lines if (x["key"]["scale"], x["key"]["seed"]) in both] for lines in pair]
            best = [matching(lines, scale=chosen_scale(lines)) for lines in pair]
            cells[method, task] = (best[0], best[1])
    found: dict[str, dict[str, Difference | None]] = {}
    for name, value in READINGS.items():
        apart: dict[str, dict[str, float]] = {}
        for (method, task), (own, rival) in cells.items():
            mine, theirs = ([v for line in lines if (v := value(line)) is not None] for lines in (own, rival))
            if mine and theirs:
                apart.setdefault(method, {})[task] = statistics.fmean(mine) - statistics.fmean(theirs)
        tasks = [task for task in setting.tasks if any(task in by_task for by_task in apart.values())]
        over = {task: statistics.fmean(one[task] for one in apart.values() if task in one) for task in tasks}
        found[name] = {method: difference(by_task) for method, by_task in apart.items()} | {"all": difference(over)}
    return Compared(recipe, len(cells), found)


def tried(setting: Setting) -> list[str]:
    """The recipes of the search, but the one that tables show, in the order of the log."""
    petl = [line["key"] for line in setting.phase("search") if line["key"]["method"] in PETL]
    return [name for name in dict.fromkeys(key["recipe"] for key in petl) if name != setting.recipe]


def rules(setting: Setting, goal: str) -> dict[str, tuple[float, float, Difference | None]]:
    """Compares the rules for thresholds on held-out halves of the validation images, at the shown recipe.

    Returns:
        By rule: mean accuracy and cost over all tasks and kinds, and the difference from the default rule.
    """
    sums: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for method in setting.petl:
        for task in setting.tasks:
            lines = setting.phase("search", method=method, task=task, recipe=setting.recipe)
            for line in matching(lines, scale=chosen_scale(lines)):
                for rule, goals in line.get("held_out", {}).items():
                    if goals.get(goal):
                        values = (goals[goal]["accuracy"], goals[goal]["cost"])
                        sums.setdefault(rule, {}).setdefault(task, []).append(values)
    means = {
        rule: {task: tuple(map(statistics.fmean, zip(*pairs, strict=True))) for task, pairs in tasks.items()}
        for rule, tasks in sums.items()
    }
    reference = means.get(DEFAULT_RULE, {})
    return {
        rule: (
            statistics.fmean(value[0] for value in tasks.values()),
            statistics.fmean(value[1] for value in tasks.values()),
            difference({task: value[0] - reference[task][0] for task, value in tasks.items() if task in reference}),
        )
        for rule, tasks in means.items()
    }


# ---- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Measured routing of a kind at a goal, means over tasks; the control is an arm against itself."""

    tasks: int
    static: float
    routed: float
    promise: float
    speedup: float
    efficiency: float
    lowest: float


def speeds(setting: Setting, method: str, goal: str, machine: str) -> Speed | None:
    """Sums up the measured times of a kind on a machine; those whose control is off do not count."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for line in setting.phase("speed", method=method, recipe=setting.recipe, machine=machine):
        one = line["times"].get(goal)
        if one and not is_void(one["control"]):
            by_task.setdefault(line["key"]["task"], []).append(one)
    if not by_task:
        return None

    def over(pick: Callable[[dict[str, Any]], float]) -> float:
        return statistics.fmean(statistics.fmean(map(pick, ones)) for ones in by_task.values())

    counted = [one for ones in by_task.values() for one in ones]
    return Speed(
        tasks=len(by_task),
        static=over(lambda one: one["images_per_second"]["static"]),
        routed=over(lambda one: one["images_per_second"]["routed"]),
        promise=over(lambda one: one["promise"]),
        speedup=over(lambda one: one["speedup"]),
        efficiency=over(lambda one: one["efficiency"]),
        lowest=min(one["efficiency"] for one in counted),
    )
