"""Plan the runs of a sweep, and which can start now: a pure function of the finished runs.

A final run (train800val200) takes its policies from its twin: the train800 run of the same arm, scale and seed.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal

from dynadapter.calibrate import Goal
from dynadapter.sweep.goals import SweepGoal

Line = Mapping[str, Any]
"""What a finished run has appended to the results; see :func:`dynadapter.sweep.lines.append`."""

Split = Literal["train800", "train800val200"]
SEARCH: Split = "train800"
FINAL: Split = "train800val200"


@dataclass(frozen=True)
class Unit:
    """One run: everything that determines its result.

    Args:
        task: Folder of the task.
        adapter: Name of the adapter's config file.
        recipe: Name of the recipe.
        scale: Adapter scale.
        seed: Random seed.
        split: ``train800`` is measured on val200, ``train800val200`` on the test images.
        settings: Fingerprint of the config files and settings, from :func:`fingerprint`.
    """

    task: str
    adapter: str
    recipe: str
    scale: float
    seed: int
    split: Split
    settings: str

    @property
    def name(self) -> str:
        """Name of its run folder."""
        parts = (self.task, self.adapter, self.recipe, f"scale{self.scale:g}", f"seed{self.seed}", self.split)
        return re.sub(r"[^\w.+-]", "-", "_".join((*parts, self.settings)))


@dataclass(frozen=True)
class Arm:
    """One combination of task, adapter and recipe; its scale is chosen on val200."""

    task: str
    adapter: str
    recipe: str


@dataclass(frozen=True)
class Choice:
    """A choice among recipes: for each task the table has the most accurate on val200 within a cost.

    Args:
        among: Names of the recipes.
        cost: Greatest cost, as a fraction of static.
    """

    among: Sequence[str]
    cost: float = 1.0


@dataclass(frozen=True)
class Sweep:
    """Every run of a sweep.

    Args:
        tasks: Groups by task; None for a task that is in none of the three groups of VTAB.
        adapters: Names of adapters.
        recipes: Names of recipes.
        settings: Fingerprint by adapter and recipe; a pair without one is not an arm.
        scales: Scales to choose from, by task and adapter.
        seeds: Seeds of the final runs, by adapter and recipe; all empty to stop before the final runs.
        search_seeds: Seeds of the runs that choose the scale.
        goals: Goals of the exit policies; the first one counts in the choice of the scale.
        scale_from: For a recipe without its own search, the recipe whose scale it takes.
        fresh: Tasks that took no part in any choice.
        choices: Choices among recipes by their name in the table.
    """

    tasks: Mapping[str, str | None]
    adapters: Sequence[str]
    recipes: Sequence[str]
    settings: Mapping[tuple[str, str], str]
    scales: Mapping[tuple[str, str], Sequence[float]]
    seeds: Mapping[tuple[str, str], Sequence[int]]
    search_seeds: Sequence[int] = (0,)
    goals: Sequence[SweepGoal] = (SweepGoal(Goal(accuracy_drop=0.0)),)
    scale_from: Mapping[str, str] = field(default_factory=dict)
    fresh: Collection[str] = ()
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """The split of the runs in the table: that of the final runs, or without these of the search."""
        return FINAL if any(self.seeds.values()) else SEARCH

    def measured_seeds(self, arm: Arm) -> Sequence[int]:
        """Return the seeds of an arm's runs in the table."""
        return self.seeds[arm.adapter, arm.recipe] if self.split == FINAL else self.search_seeds

    def arms(self) -> Iterator[Arm]:
        """Yield every combination of task, adapter and recipe that the sweep has."""
        for task, adapter, recipe in product(self.tasks, self.adapters, self.recipes):
            if (adapter, recipe) in self.settings:
                yield Arm(task, adapter, recipe)

    def unit(self, arm: Arm, scale: float, seed: int, split: Split) -> Unit:
        """Return one run of an arm."""
        settings = self.settings[arm.adapter, arm.recipe]
        return Unit(arm.task, arm.adapter, arm.recipe, float(scale), seed, split, settings)

    def source(self, arm: Arm) -> Arm:
        """Return the arm whose search chooses this arm's scale."""
        return replace(arm, recipe=self.scale_from.get(arm.recipe, arm.recipe))

    # ---- the scale

    def search(self, arm: Arm) -> list[Unit]:
        """Return the runs that choose an arm's scale; empty if another recipe chooses it."""
        if arm.recipe in self.scale_from:
            return []
        scales = self.scales[arm.task, arm.adapter]
        return [self.unit(arm, scale, seed, SEARCH) for seed in self.search_seeds for scale in scales]

    def chosen_scale(self, arm: Arm, done: Mapping[Unit, Line]) -> float | None:
        """Return the scale with the best mean score over the seeds on val200.

        Of equal scores, the one with the lower validation loss of the last exit wins. A scale is not chosen if one of
        the arm's runs failed, also a final one: near the limit of stable training, seeds differ much.

        Returns:
            The scale; None before all runs of the search are finished, or if a run failed at every scale.
        """
        arm = self.source(arm)
        if any(unit not in done for unit in self.search(arm)):
            return None
        scores = {}
        failed = {unit.scale for unit in self._failed(arm, done)}
        for scale in self.scales[arm.task, arm.adapter]:
            if float(scale) in failed:
                continue
            found = [score(done[self.unit(arm, scale, seed, SEARCH)], self.goals[0].name) for seed in self.search_seeds]
            scores[float(scale)] = tuple(round(statistics.fmean(values), 9) for values in zip(*found, strict=True))
        return max(scores, key=lambda scale: scores[scale]) if scores else None

    def _failed(self, arm: Arm, done: Mapping[Unit, Line]) -> list[Unit]:
        """Return the runs of an arm, at any scale and of any split, whose training failed."""
        return [unit for unit, line in done.items() if "failed" in line and self._is_of(arm, unit)]

    def _is_of(self, arm: Arm, unit: Unit) -> bool:
        """Check whether a run belongs to an arm and has the settings of this sweep."""
        settings = self.settings[arm.adapter, arm.recipe]
        return Arm(unit.task, unit.adapter, unit.recipe) == arm and unit.settings == settings

    def has_diverged(self, arm: Arm, done: Mapping[Unit, Line]) -> bool:
        """Check whether a run failed at every scale: such an arm has no final runs."""
        searched = all(unit in done for unit in self.search(self.source(arm)))
        return searched and self.chosen_scale(arm, done) is None

    def diverged(self, done: Mapping[Unit, Line]) -> list[Arm]:
        """Return the arms for which a run failed at every scale."""
        return [arm for arm in self.arms() if self.has_diverged(arm, done)]

    # ---- the runs at the chosen scale

    def twin(self, unit: Unit) -> Unit:
        """Return the train800 run whose logits calibrate the policies of a final run."""
        return replace(unit, split=SEARCH)

    def reference(self, unit: Unit, recipe: str, done: Mapping[Unit, Line]) -> Unit | None:
        """Return the train800 run of another recipe, at its own scale, to which a goal of this run refers.

        None before its scale is chosen, if a run of it failed at every scale, and for a run of that recipe itself.
        """
        arm = Arm(unit.task, unit.adapter, recipe)
        scale = self.chosen_scale(arm, done)
        return None if scale is None or recipe == unit.recipe else self.unit(arm, scale, unit.seed, SEARCH)

    def _is_ready(self, unit: Unit, done: Mapping[Unit, Line]) -> bool:
        """Check whether everything that a final run needs is finished."""
        if self.twin(unit) not in done:
            return False
        for recipe in {goal.reference for goal in self.goals if goal.reference not in (None, unit.recipe)}:
            assert recipe is not None
            if not self.has_diverged(Arm(unit.task, unit.adapter, recipe), done):
                found = self.reference(unit, recipe, done)
                if found is None or found not in done:
                    return False
        return True

    def twins(self, arm: Arm, scale: float) -> list[Unit]:
        """Return the train800 runs of an arm at its scale, one for each run in the table."""
        return [self.unit(arm, scale, seed, SEARCH) for seed in self.measured_seeds(arm)]

    def final(self, arm: Arm, scale: float) -> list[Unit]:
        """Return the final runs of an arm."""
        return [self.unit(arm, scale, seed, FINAL) for seed in self.seeds[arm.adapter, arm.recipe]]

    # ---- all of them

    def ready(self, done: Mapping[Unit, Line]) -> list[Unit]:
        """Return the unfinished runs that can start now; seeds vary slowest."""
        found: list[Unit] = []
        for arm in self.arms():
            found += self.search(arm)
            scale = self.chosen_scale(arm, done)
            if scale is not None:
                found += self.twins(arm, scale)
                found += [unit for unit in self.final(arm, scale) if self._is_ready(unit, done)]
        seeds = dict.fromkeys([*self.search_seeds, *(seed for several in self.seeds.values() for seed in several)])
        order = {seed: place for place, seed in enumerate(seeds)}
        left = [unit for unit in dict.fromkeys(found) if unit not in done]
        return sorted(left, key=lambda unit: (order[unit.seed], unit.split == FINAL))

    def remaining(self, done: Mapping[Unit, Line]) -> dict[Split, int]:
        """Count the remaining runs by split, including those that cannot start yet."""
        left: dict[Split, int] = {SEARCH: 0, FINAL: 0}
        for arm in self.arms():
            if self.has_diverged(arm, done):
                continue
            search, scale = self.search(arm), self.chosen_scale(arm, done)
            if scale is None:
                searched = {unit.seed for unit in search}
                left[SEARCH] += sum(unit not in done for unit in search)
                left[SEARCH] += len(set(self.measured_seeds(arm)) - searched)
                left[FINAL] += len(self.seeds[arm.adapter, arm.recipe])
                continue
            left[SEARCH] += sum(unit not in done for unit in {*search, *self.twins(arm, scale)})
            left[FINAL] += sum(unit not in done for unit in self.final(arm, scale))
        return left

    def planned(self, done: Mapping[Unit, Line]) -> set[Unit]:
        """Return the runs of the sweep that are known so far, including failed ones."""
        units = {unit for arm in self.arms() for unit in [*self.search(arm), *self._failed(arm, done)]}
        for arm in self.arms():
            scale = self.chosen_scale(arm, done)
            if scale is not None:
                units |= {*self.twins(arm, scale), *self.final(arm, scale)}
        return units

    def needed(self, done: Mapping[Unit, Line]) -> set[Unit]:
        """Return the runs that the sweep may need, finished or not; at every scale where none is chosen yet."""
        units: set[Unit] = set()
        for arm in self.arms():
            units |= {*self.search(arm)}
            scale = self.chosen_scale(arm, done)
            for one in self.scales[arm.task, arm.adapter] if scale is None else [scale]:
                units |= {*self.twins(arm, one), *self.final(arm, one)}
        return units

    def lost(self, done: Mapping[Unit, Line]) -> list[Unit]:
        """Return the finished runs at scales that this sweep searched and rejected; their checkpoints are not needed.

        A final run is only among them if a run at its scale failed: another goal may have chosen this scale.
        """
        lost = []
        for arm in self.arms():
            scale = self.chosen_scale(arm, done)
            if scale is None:
                continue
            rejected = {float(one) for one in self.scales[arm.task, arm.adapter]} - {scale}
            failed = {unit.scale for unit in self._failed(self.source(arm), done)}
            at = {SEARCH: rejected, FINAL: rejected & failed}
            lost += [unit for unit in done if self._is_of(arm, unit) and unit.scale in at[unit.split]]
        return lost

    # ---- finished runs

    def finished(self, lines: Mapping[Unit, Line]) -> dict[Unit, Line]:
        """Return the lines of this sweep's arms that have the policies of its goals, with their present targets.

        Other runs need policies, which the logits in their folders give.
        """
        arms = {(arm.task, arm.adapter, arm.recipe, self.settings[arm.adapter, arm.recipe]) for arm in self.arms()}
        done = {
            unit: line
            for unit, line in lines.items()
            if (unit.task, unit.adapter, unit.recipe, unit.settings) in arms and self._has_policies(unit, line)
        }
        return {unit: line for unit, line in done.items() if self._follows_references(unit, line, done)}

    def _has_policies(self, unit: Unit, line: Line) -> bool:
        """Check whether a line has a policy for each goal that it needs, or says why not.

        Final runs need all goals, and so do runs of the search if they are in the table; else the one that chooses the
        scale is enough.
        """
        goals = self.goals if unit.split in (FINAL, self.split) else self.goals[:1]
        names = [goal.name for goal in goals if unit.split == FINAL or goal.reference is None]
        return "failed" in line or all(name in line["policies"] for name in names)

    def _follows_references(self, unit: Unit, line: Line, done: Mapping[Unit, Line]) -> bool:
        """Check whether the targets of a final run are those of its references, whose scale may have changed."""
        if unit.split == SEARCH or "failed" in line:
            return True
        goals = [goal for goal in self.goals if goal.reference not in (None, unit.recipe)]
        if goals and not self._is_ready(unit, done):
            return False
        for goal in goals:
            entry, accuracy = line["policies"][goal.name], self.reference_accuracy(unit, goal, done)
            if (entry.get("unreached") == goal.untrained) != (accuracy is None):
                return False
            if accuracy is not None and "target" in entry and entry["target"] != goal.target(accuracy, accuracy):
                return False
        return True

    def reference_accuracy(self, unit: Unit, goal: SweepGoal, done: Mapping[Unit, Line]) -> float | None:
        """Return the accuracy on val200 of another recipe to which a goal refers; None if that could not be trained."""
        reference = self.reference(unit, goal.reference or unit.recipe, done)
        if reference is None or "failed" in done[reference]:
            return None
        accuracy: float = done[reference]["exits"][-1]["accuracy"]
        return accuracy


def score(line: Line, goal: str) -> tuple[float, float]:
    """Return the score of a train800 run on val200, and the negative loss of its last exit.

    The score is the accuracy of the last exit; with early exits, the mean of this and of the accuracy by the policy.
    """
    if "failed" in line:
        return -math.inf, -math.inf
    last = line["exits"][-1]
    accuracy = last["accuracy"]
    if len(line["exits"]) > 1:
        accuracy = round((accuracy + line["policies"][goal]["accuracy"]) / 2, 9)  # equal scores shall compare so
    return accuracy, -math.inf if last["loss"] is None else -last["loss"]


def fingerprint(*contents: Any) -> str:
    """Return a short hash of parsed configs, the same for the same settings.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(contents, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def as_unit(line: Line) -> Unit:
    """Return the run that a line belongs to."""
    try:
        return Unit(**line["run"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a line of the results names no run of a sweep: {error}") from None


def as_dict(unit: Unit) -> dict[str, Any]:
    """Return a run as its line stores it."""
    return asdict(unit)
