"""The lines of a sweep on one backbone, as claims.py reads them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import margins
import numpy as np
import yaml

from dynadapter.sweep.baselines import DECIMALS, accuracies
from dynadapter.sweep.goals import goals_of
from dynadapter.sweep.plan import FINAL, SEARCH

Line = dict[str, Any]
PROTOCOL = Path(__file__).parent / "transfer.yaml"
"""The recipes, goals and seeds of the search of every reading."""


class Missing(Exception):
    """A claim is open: a run that it needs is not finished."""


class Failed(Missing):
    """A run that a claim needs will never be finished: its arm failed at every scale."""

    def __init__(self, text: str, recipe: str) -> None:
        super().__init__(text)
        self.recipe = recipe


def by_policy(line: Line, goal: str) -> dict[str, Any]:
    """Return the result of a run by the policy of a goal.

    Raises:
        Missing: The goal could not be reached.
    """
    found: dict[str, Any] = line["policies"].get(goal, {})
    if "accuracy" not in found:
        run = line["run"]
        words = ", ".join(run[key] for key in ("task", "adapter", "recipe"))
        raise Missing(f"{words}, seed {run['seed']} has no policy for {goal}")
    return found


@dataclass(frozen=True)
class Outcomes:
    """What one backbone gave.

    Args:
        name: Of the backbone.
        sweep: The file of the sweep, which names the tasks, seeds and recipes that there should be.
        lines: By task, adapter, recipe, seed and split; a scale that was not chosen is left out.
        tasks: The tasks of the sweep.
        deciding: The tasks that decide.
        failures: The lines of the trainings that failed.
    """

    name: str
    sweep: dict[str, Any]
    lines: dict[tuple[str, str, str, int, str], Line]
    tasks: tuple[str, ...]
    deciding: tuple[str, ...]
    failures: tuple[Line, ...] = ()

    @classmethod
    def nothing(cls, name: str) -> "Outcomes":
        """Return the outcomes of a sweep that was not begun."""
        return cls(name, {}, {}, (), ())

    @classmethod
    def read_all(cls, folder: Path, reading: margins.Reading) -> dict[str, "Outcomes"]:
        """Read the sweeps of all backbones.

        Args:
            folder: Holds ``PREFIX_NAME.jsonl`` and ``PREFIX_NAME.yaml``.
            reading: Has the prefix, and the tasks that decide.
        """
        found = {}
        for path in sorted(folder.glob(f"{reading.prefix}_*.jsonl")):
            name = path.stem.removeprefix(f"{reading.prefix}_")
            sweep = yaml.safe_load(path.with_suffix(".yaml").read_text(encoding="utf-8"))
            lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
            found[name] = cls.of(name, sweep, lines, reading.tasks)
        return found

    @classmethod
    def of(cls, name: str, sweep: dict[str, Any], lines: Sequence[Line], deciding: Sequence[str]) -> "Outcomes":
        """Sort lines; of train800 only the twins of final runs count."""
        found: dict[tuple[str, str, str, int, str], Line] = {}
        scales = {}
        for split in (FINAL, SEARCH):
            for line in lines:
                run = line["run"]
                key = (run["task"], run["adapter"], run["recipe"], run["seed"])
                if run["split"] != split or "failed" in line:
                    continue
                if split == FINAL:
                    scales[key] = run["scale"]
                elif scales.get(key) != run["scale"]:
                    continue
                found[*key, split] = line
        failures = tuple(line for line in lines if "failed" in line)
        return cls(name, sweep, found, tuple(sweep["tasks"]), tuple(deciding), failures)

    # ---- what there should be

    @property
    def adapters(self) -> list[str]:
        """The adapters of the sweep."""
        return list(self.sweep.get("adapters", []))

    @property
    def goals(self) -> list[str]:
        """The names of the goals of the sweep; lines may have further ones of former files."""
        given = self.sweep.get("goal", {"accuracy_drop": 0.0})
        return [goal.name for goal in goals_of([given] if isinstance(given, dict) else given)]

    def departures(self, adapter: str, planned_seeds: Mapping[str, Sequence[int]] = margins.SEEDS) -> str:
        """Return in words where the sweep is not the protocol of margins.py; empty where it is.

        Args:
            adapter: The adapter whose seeds are compared.
            planned_seeds: Seeds of the final runs by adapter.
        """
        trainer = self.sweep.get("settings", {}).get("trainer", {})
        several = {
            "scales": (self._of(adapter, "scales"), margins.SCALES_OF.get(self.name, margins.SCALES)),
            "seeds": (self._of(adapter, "seeds"), planned_seeds[adapter]),
            "epochs": ([trainer.get("max_epochs")], [margins.EPOCHS]),
        }
        words = [
            f"{name} {', '.join(f'{one}' for one in found or ())} instead of {', '.join(f'{one:g}' for one in planned)}"
            for name, (found, planned) in several.items()
            if list(found or ()) != list(planned)
        ]
        protocol = yaml.safe_load(PROTOCOL.read_text(encoding="utf-8"))
        pairs = {name: (self.sweep.get(name), protocol[name]) for name in ("goal", "search_seeds")}
        pairs["trainer"] = (trainer | {"max_epochs": margins.EPOCHS}, protocol["settings"]["trainer"])
        words += [f"{name} not as planned" for name, (found, planned) in pairs.items() if found != planned]
        recipes, own = protocol["recipes"], self.sweep.get("recipes", {})
        words += [f"another recipe {name}" for name in recipes if own.get(name, recipes[name]) != recipes[name]]
        return "; ".join(words)

    def _of(self, adapter: str, name: str) -> Any:
        """Return the scales or the seeds of an adapter."""
        given = self.sweep.get(name)
        return given.get(adapter) if isinstance(given, dict) else given

    def group(self, name: str) -> tuple[str, ...]:
        """Return the tasks of a group.

        Raises:
            Missing: There is none.
        """
        given = self.sweep.get("tasks", {})
        groups = {task: one.get("group") if isinstance(one, dict) else one for task, one in given.items()}
        found = tuple(task for task in self.tasks if groups[task] == name)
        if not found:
            raise Missing(f"no task of the group {name}")
        return found

    def only(self, tasks: Sequence[str]) -> "Outcomes":
        """Return the outcomes of some tasks."""
        return replace(self, tasks=tuple(tasks))

    def seeds(self, adapter: str, recipe: str) -> list[int]:
        """Return the seeds of the final runs of an arm.

        Raises:
            Missing: The sweep has no such arm.
        """
        entry = self.sweep.get("recipes", {}).get(recipe)
        if entry is None or adapter not in self.adapters:
            raise Missing(f"{self.name}: there is no sweep with {adapter}, {recipe}")
        entry = entry if isinstance(entry, dict) else {}
        seeds = self._of(adapter, "seeds")
        if adapter not in entry.get("adapters", [adapter]):
            raise Missing(f"{self.name}: {adapter} has no arm {recipe}")
        return [seed for seed in seeds if seed in entry.get("seeds", seeds)]

    # ---- what there is

    def final(self, adapter: str, recipe: str, task: str, seed: int, split: str = FINAL) -> Line:
        """Return the line of a run, a final one by default.

        Raises:
            Missing: It is not finished.
            Failed: The training of its arm failed at every scale.
        """
        try:
            return self.lines[task, adapter, recipe, seed, split]
        except KeyError:
            arm = (task, adapter, recipe)
            runs = [line["run"] for line in self.failures]
            scales = {run["scale"] for run in runs if (run["task"], run["adapter"], run["recipe"]) == arm}
            entry = self.sweep["recipes"][recipe]
            planned = scales if "scale_from" in entry else set(self.sweep.get("scales") or ())
            if scales and scales >= planned:
                raise Failed(f"{self.name}: {', '.join(arm)} failed at every scale", recipe) from None
            raise Missing(f"{self.name}: {', '.join(arm)}, seed {seed} is not finished") from None

    def all_of(self, adapter: str, recipe: str, split: str = FINAL) -> list[list[Line]]:
        """Return the lines of an arm on the deciding tasks: for each task, one a seed.

        Raises:
            Missing: One is not finished.
        """
        seeds = self.seeds(adapter, recipe)
        return [[self.final(adapter, recipe, task, seed, split) for seed in seeds] for task in self.deciding]

    def exit_depths(self, adapter: str, recipe: str) -> list[int]:
        """Return the blocks before each exit of an arm."""
        return [entry["after_block"] for entry in self.all_of(adapter, recipe)[0][0]["exits"]]

    def depths(self, adapter: str, prefix: str) -> dict[int, str]:
        """Return the recipes without early exits whose name is this, or begins so, by the blocks that they have."""
        names = [name for name in self.sweep.get("recipes", {}) if name == prefix or name.startswith(f"{prefix} at ")]
        return {self.exit_depths(adapter, name)[-1]: name for name in names}

    def least_cost(self, adapter: str, recipe: str) -> float:
        """Return the cost of the first exit of an arm, in % of static."""
        return statistics.fmean(task[0]["exits"][0]["percent_of_static"] for task in self.all_of(adapter, recipe))

    # ---- choices on val200

    def best_goal(self, adapter: str, recipe: str, bound: float) -> str:
        """Return the goal of the best mean accuracy on val200 among those of a mean cost up to a bound there.

        Args:
            adapter: The adapter.
            recipe: The recipe.
            bound: In % of static.

        Raises:
            Missing: No goal is within the bound, or a run is not finished.
        """
        arm = self.all_of(adapter, recipe)
        found = {}
        for goal in self.goals:
            entries = [[line["policies"].get(goal, {}).get("val200") for line in task] for task in arm]
            if all(entry is not None for task in entries for entry in task):
                cost, accuracy = (
                    statistics.fmean(statistics.fmean(entry[name] for entry in task) for task in entries)
                    for name in ("percent_of_static", "accuracy")
                )
                if cost <= bound:
                    found[goal] = (accuracy, -cost)
        if not found:
            raise Missing(f"{self.name}: no goal of {recipe} costs at most {bound:.1f} % on val200")
        return max(found, key=lambda goal: found[goal])

    def best_way(self, adapter: str, recipe: str, exit: int) -> int:
        """Return the way to predict at an exit with the best mean accuracy on val200."""
        twins = self.all_of(adapter, recipe, SEARCH)
        found = [accuracies(line)[:, exit].round(DECIMALS) for task in twins for line in task]
        return int(np.mean(found, axis=0).argmax())

    def cost_goals(self, adapter: str, recipe: str, low: float, high: float) -> list[str]:
        """Return the goals of a cost between two fractions of static.

        Raises:
            Missing: There is none, or a run is not finished.
        """
        arm = self.all_of(adapter, recipe)
        goals = {
            goal: [line["policies"].get(goal, {}).get("target", {}).get("cost", -1) for task in arm for line in task]
            for goal in self.goals
        }
        found = [goal for goal, costs in goals.items() if all(low <= cost <= high for cost in costs)]
        if not found:
            raise Missing(f"{self.name}: no goal is a cost between {low:g} and {high:g}")
        return found

    # ---- measured

    def cost(self, adapter: str, recipe: str, goal: str) -> float:
        """Return the mean cost over the deciding tasks, in % of static on the test images.

        Raises:
            Missing: A run is not finished, or its goal could not be reached.
        """
        arm = self.all_of(adapter, recipe)
        return statistics.fmean(
            statistics.fmean(by_policy(line, goal)["percent_of_static"] for line in task) for task in arm
        )

    def epoch(self, adapter: str, some: Sequence[str], others: Sequence[str], task: str) -> float:
        """Return the time of an epoch of some recipes over that of others: medians over the seeds, on one machine.

        Raises:
            Missing: A run is not finished or not timed, or they ran on several machines.
        """
        machines = set()

        def time(recipe: str) -> float:
            lines = [self.final(adapter, recipe, task, seed) for seed in self.seeds(adapter, recipe)]
            machines.update(json.dumps(line["machine"], sort_keys=True) for line in lines)
            clock = "epoch_cpu" if lines[0]["device"] == "cpu" else "epoch"
            times = [line["seconds"][clock] for line in lines if clock in line["seconds"]]
            if not times:
                raise Missing(f"{self.name}: {task}, {adapter}, {recipe} was not timed")
            return statistics.median(times)

        ratio = sum(map(time, some)) / sum(map(time, others))
        if len(machines) > 1:
            raise Missing(f"{self.name}: {task} ran on several machines")
        return ratio
