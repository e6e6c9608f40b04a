"""Which runs a sweep has, and which of them can start now: a pure function of the runs that are finished."""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

from dynadapter.calibrate import Goal

Line = Mapping[str, Any]
"""What a finished run has appended to the results; see :func:`dynadapter.sweep.lines.append`."""

Split = Literal["train800", "train800val200"]
SEARCH: Split = "train800"
FINAL: Split = "train800val200"


@dataclass(frozen=True)
class Unit:
    """One run: everything that decides its outcome.

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
    """One combination of adapter and recipe on a task, whose scale is chosen on val200."""

    task: str
    adapter: str
    recipe: str


@dataclass(frozen=True)
class Sweep:
    """Every run of a sweep.

    Args:
        tasks: Groups by task; None for a task that is in none of the three groups of VTAB.
        adapters: Names of adapters.
        recipes: Names of recipes.
        settings: Fingerprint by adapter and recipe.
        scales: Scales to choose from, by task and adapter.
        seeds: Seeds of the final runs; none to stop before them.
        search_seeds: Seeds of the runs that the scale is chosen by.
        goal: What thresholds are calibrated to.
    """

    tasks: Mapping[str, str | None]
    adapters: Sequence[str]
    recipes: Sequence[str]
    settings: Mapping[tuple[str, str], str]
    scales: Mapping[tuple[str, str], Sequence[float]]
    seeds: Sequence[int] = (0,)
    search_seeds: Sequence[int] = (0,)
    goal: Goal = field(default_factory=lambda: Goal(accuracy_drop=0.0))

    @property
    def measured(self) -> tuple[Split, Sequence[int]]:
        """The split and the seeds of the runs in the table: the final ones, or without them those of the search."""
        return (FINAL, self.seeds) if self.seeds else (SEARCH, self.search_seeds)

    def arms(self) -> Iterator[Arm]:
        """Yield every combination of task, adapter and recipe."""
        for task, adapter, recipe in product(self.tasks, self.adapters, self.recipes):
            yield Arm(task, adapter, recipe)

    def unit(self, arm: Arm, scale: float, seed: int, split: Split) -> Unit:
        """Return one run of an arm."""
        settings = self.settings[arm.adapter, arm.recipe]
        return Unit(arm.task, arm.adapter, arm.recipe, float(scale), seed, split, settings)

    def search(self, arm: Arm) -> list[Unit]:
        """Return the runs that choose an arm's scale."""
        scales = self.scales[arm.task, arm.adapter]
        return [self.unit(arm, scale, seed, SEARCH) for seed in self.search_seeds for scale in scales]

    def chosen_scale(self, arm: Arm, done: Mapping[Unit, Line]) -> float | None:
        """Return the scale with the best mean score over the seeds on val200.

        The lower validation loss of the last exit decides between equal scores.

        Args:
            arm: The arm.
            done: The finished runs.

        Returns:
            The scale; None before all runs of the search are finished, or where the loss was finite at no scale.
        """
        if any(unit not in done for unit in self.search(arm)):
            return None
        scores = {}
        for scale in self.scales[arm.task, arm.adapter]:
            found = [score(done[self.unit(arm, scale, seed, SEARCH)]) for seed in self.search_seeds]
            scores[float(scale)] = tuple(statistics.fmean(values) for values in zip(*found, strict=True))
        best = max(scores, key=lambda scale: scores[scale])
        return None if scores[best][0] == -math.inf else best

    def diverged(self, done: Mapping[Unit, Line]) -> list[Arm]:
        """Return the arms whose loss was finite at no scale: they have no final runs."""
        return [
            arm
            for arm in self.arms()
            if all(unit in done for unit in self.search(arm)) and self.chosen_scale(arm, done) is None
        ]

    def twin(self, unit: Unit) -> Unit:
        """Return the train800 run whose thresholds a final run takes over."""
        return self.unit(Arm(unit.task, unit.adapter, unit.recipe), unit.scale, unit.seed, SEARCH)

    def final(self, arm: Arm, scale: float) -> list[Unit]:
        """Return the final runs of an arm."""
        return [self.unit(arm, scale, seed, FINAL) for seed in self.seeds]

    def ready(self, done: Mapping[Unit, Line]) -> list[Unit]:
        """Return the runs that are not finished and need no other run first; seeds vary slowest.

        Args:
            done: The finished runs.
        """
        search: list[Unit] = []
        final: list[Unit] = []
        for arm in self.arms():
            search += self.search(arm)
            scale = self.chosen_scale(arm, done)
            if scale is None:
                continue
            for unit in self.final(arm, scale):
                twin = self.twin(unit)
                (final if twin in done else search).append(unit if twin in done else twin)
        order = {seed: place for place, seed in enumerate(dict.fromkeys([*self.search_seeds, *self.seeds]))}
        left = [unit for unit in dict.fromkeys([*search, *final]) if unit not in done]
        return sorted(left, key=lambda unit: (unit.split == FINAL, order[unit.seed]))

    def remaining(self, done: Mapping[Unit, Line]) -> dict[Split, int]:
        """Count the runs that are still to do, by split, the ones that cannot start yet included."""
        left: dict[Split, int] = {SEARCH: 0, FINAL: 0}
        diverged = self.diverged(done)
        for arm in self.arms():
            if arm in diverged:
                continue
            left[SEARCH] += sum(unit not in done for unit in self.search(arm))
            scale = self.chosen_scale(arm, done)
            if scale is None:
                left[SEARCH] += len(set(self.seeds) - set(self.search_seeds))
                left[FINAL] += len(self.seeds)
                continue
            others = [self.unit(arm, scale, seed, SEARCH) for seed in self.seeds if seed not in self.search_seeds]
            left[SEARCH] += sum(unit not in done for unit in others)
            left[FINAL] += sum(unit not in done for unit in self.final(arm, scale))
        return left

    def planned(self, done: Mapping[Unit, Line]) -> set[Unit]:
        """Return the runs that belong to the sweep, as far as they are known."""
        units = {unit for arm in self.arms() for unit in self.search(arm)}
        for arm in self.arms():
            scale = self.chosen_scale(arm, done)
            if scale is not None:
                final = self.final(arm, scale)
                units |= {*final, *map(self.twin, final)}
        return units

    def lost(self, done: Mapping[Unit, Line]) -> list[Unit]:
        """Return the finished runs whose scale was not chosen; their checkpoints are not needed."""
        lost = []
        for arm in self.arms():
            scale = self.chosen_scale(arm, done)
            lost += [unit for unit in self.search(arm) if scale is not None and unit.scale != scale]
        return lost


def score(line: Line) -> tuple[float, float]:
    """Return how good a train800 run is on val200: its score, and minus the last exit's loss.

    The score is the accuracy of the last exit; with early exits, the mean of that and of the accuracy by the policy.
    """
    if "failed" in line:
        return -math.inf, -math.inf
    last = line["exits"][-1]
    accuracy = last["accuracy"]
    if len(line["exits"]) > 1:
        accuracy = (accuracy + line["policy"]["accuracy"]) / 2
    return accuracy, -math.inf if last["loss"] is None else -last["loss"]


def fingerprint(*contents: Any) -> str:
    """Return a short hash of parsed configs, the same for the same settings.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(contents, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def as_unit(line: Line) -> Unit:
    """Return the run that a line belongs to.

    Raises:
        ValueError: The line names none.
    """
    try:
        return Unit(**line["run"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a line of the results names no run of a sweep: {error}") from None


def as_dict(unit: Unit) -> dict[str, Any]:
    """Return a run as its line stores it."""
    return asdict(unit)
