"""Read and check the YAML file of a sweep, and build the plan of its runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dynadapter.cli.configs import find_config, read_config
from dynadapter.cli.errors import Mistake, mistakes
from dynadapter.cli.parser import CommandParser
from dynadapter.sweep import lines
from dynadapter.sweep.checks import check_lines
from dynadapter.sweep.goals import SweepGoal, goals_of
from dynadapter.sweep.plan import Choice, Line, Sweep, Unit, fingerprint
from dynadapter.sweep.table import GROUPS

PUBLISHED = "vtab_scales"

Layer = str | dict[str, Any]
"""A config file, by its name or path, or settings written as in one."""


@dataclass
class Settings:
    """The keys of the file of a sweep.

    Args:
        root: Folder that holds the tasks, in the layout of VTAB-1k.
        tasks: Folders of the tasks. A mapping names the group of each: Natural, Specialized, Structured, or null; or
            ``{group: Natural, fresh: true}`` for a task that took no part in any choice.
        recipes: Config files by the name of the recipe, as in ``{dynamic: [vtab], static: [vtab, static]}``. An entry
            of the list may also be a mapping with settings as in a config file. Instead of a list, a recipe may be a
            mapping as :class:`Recipe` describes.
        adapters: Config files of the adapters, applied after each recipe.
        scales: Adapter scales to choose from: a list, or a list for each adapter.
        scale_factors: Instead of ``scales``: factors on the published scales of vtab_scales.yaml.
        seeds: Seeds of the final runs, a list, or a list for each adapter; none to stop before them, so that no test
            image is read.
        search_seeds: Seeds of the runs that choose the scale; by default those of ``seeds``.
        choices: Choices among recipes by name; the table has the most accurate one on val200: ``{best: {among: [small,
            large], cost: 0.5}}``, with the greatest cost as a fraction of static.
        settings: Settings as in a config file, applied after all recipes and adapters.
        goal: Goal of the exit policies on val200: ``{accuracy_drop: POINTS}``, with ``reference: RECIPE`` relative to
            that recipe's accuracy, or ``{cost: FRACTION}``; or a list of goals, of which the first chooses the scale.
        out: Folder of the sweep.
    """

    root: str
    tasks: list[str] | dict[str, str | dict[str, Any] | None]
    recipes: dict[str, list[Layer] | dict[str, Any]]
    adapters: list[str] = field(default_factory=lambda: ["lora"])
    scales: list[float] | dict[str, list[float]] | None = None
    scale_factors: list[float] | None = None
    seeds: list[int] | dict[str, list[int]] = field(default_factory=lambda: [0])
    search_seeds: list[int] | None = None
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    goal: dict[str, Any] | list[dict[str, Any]] = field(default_factory=lambda: {"accuracy_drop": 0.0})
    out: str = "runs/sweep"


@dataclass
class Recipe:
    """The keys of a recipe.

    Args:
        layers: Config files and settings.
        scale_from: Recipe whose chosen scale this recipe takes instead of its own search; costs are relative to the
            static network of that recipe.
        adapters: Adapters that have this recipe; by default all.
        seeds: Seeds of its final runs, a subset of the sweep's seeds for the adapter; by default all.
    """

    layers: list[Layer]
    scale_from: str | None = None
    adapters: list[str] | None = None
    seeds: list[int] | None = None


@dataclass(frozen=True)
class SweepFile:
    """A sweep that was read.

    Args:
        path: The file.
        out: Folder of the sweep, absolute.
        root: Folder of the tasks, absolute.
        layers: Layers of the configuration by adapter and recipe: paths of config files, and settings.
        sweep: The plan.
    """

    path: Path
    out: Path
    root: Path
    layers: Mapping[tuple[str, str], list[Path | dict[str, Any]]]
    sweep: Sweep

    def done(self) -> dict[Unit, Line]:
        """Return the finished runs of the sweep; see :meth:`Sweep.finished`."""
        done = self.sweep.finished(lines.read(self.out))
        self.check(done)
        return done

    def check(self, done: Mapping[Unit, Line]) -> None:
        """Refuse runs that cannot stand in one table; see :func:`check_lines`."""
        with mistakes():
            check_lines(self.sweep, done)

    def trained(self) -> dict[Unit, Line]:
        """Return the runs that are trained but not finished; the logits in their folders give the policies."""
        found = lines.read(self.out)
        done = self.sweep.finished(found)
        return {
            unit: line
            for unit, line in found.items()
            if unit not in done
            and line.keys() >= {"static_macs", "per_image"}  # lines of the first version do not have them
            and lines.has_logits(self.run_folder(unit))
        }

    def run_folder(self, unit: Unit) -> Path:
        """Return the folder of a run."""
        return self.out / "runs" / unit.name

    def steps(self, unit: Unit, of_epoch: float) -> float:
        """Return the number of optimiser steps in the configs of a run; 100 epochs if none names a length.

        Args:
            unit: The run.
            of_epoch: Steps of an epoch.
        """
        trainer: dict[str, Any] = {"max_epochs": 100, "max_steps": -1}
        for layer in self.layers[unit.adapter, unit.recipe]:
            content = layer if isinstance(layer, dict) else read_config(str(layer), ())
            trainer |= content.get("trainer") or {}
        epochs, steps = trainer["max_epochs"], trainer["max_steps"]
        limits = [] if epochs in (None, -1) else [epochs * of_epoch]
        limits += [] if steps == -1 else [steps]
        return min(limits, default=1000 * of_epoch)  # Lightning's limit for max_epochs null


def read(path: str) -> SweepFile:
    """Read the file of a sweep."""
    settings: Settings = _parsed(Settings, read_config(path, ()))
    _check_lists(settings)
    goals = _goals(settings.goal)
    adapters = {_label(adapter): adapter for adapter in settings.adapters}
    recipes = {name: _recipe(name, entry, settings, list(adapters)) for name, entry in settings.recipes.items()}
    layers = {
        (label, name): [
            layer if isinstance(layer, dict) else find_config(layer)
            for layer in [*recipe.layers, adapter, *([settings.settings] if settings.settings else [])]
        ]
        for label, adapter in adapters.items()
        for name, recipe in recipes.items()
        if recipe.adapters is None or label in recipe.adapters
    }
    read_layers = {
        key: [one if isinstance(one, dict) else read_config(str(one), ()) for one in several]
        for key, several in layers.items()
    }
    for (adapter, recipe), several in read_layers.items():
        _check_scale(adapter, recipe, several)
    contents = {key: fingerprint(*several) for key, several in read_layers.items()}
    seeds = {(adapter, name): _seeds(settings, adapter, name, recipes[name]) for adapter, name in layers}
    sweep = Sweep(
        tasks=_groups(settings.tasks),
        adapters=list(adapters),
        recipes=list(recipes),
        settings=contents,
        scales={(t, a): _scales(settings, t, a) for t in settings.tasks for a in adapters},
        seeds=seeds,
        search_seeds=settings.search_seeds or list(dict.fromkeys(chain.from_iterable(seeds.values()))),
        goals=goals,
        scale_from={name: recipe.scale_from for name, recipe in recipes.items() if recipe.scale_from is not None},
        fresh=_fresh(settings.tasks),
        choices={name: _choice(name, given, list(recipes)) for name, given in settings.choices.items()},
    )
    _check_references(sweep)
    out, root = (Path(os.path.expanduser(folder)).absolute() for folder in (settings.out, settings.root))
    return SweepFile(Path(path), out, root, layers, sweep)


def _parsed(kind: type[Any], content: dict[str, Any]) -> Any:
    """Return a dataclass filled with the keys of a mapping, each checked."""
    parser = CommandParser("sweep")
    parser.add_class_arguments(kind, None)
    return kind(**parser.parse_object(content).as_dict())


# ---- checks


def _check_lists(settings: Settings) -> None:
    """Refuse empty and repeated entries, and both or neither of ``scales`` and ``scale_factors``."""
    by_adapter = settings.seeds if isinstance(settings.seeds, dict) else {"": settings.seeds}
    needed = ("tasks", "recipes", "adapters")
    lists = {name: list(getattr(settings, name) or ()) for name in (*needed, "search_seeds")}
    lists |= {f"seeds {adapter}".strip(): list(seeds) for adapter, seeds in by_adapter.items()}
    for name, values in lists.items():
        if not values and name in needed:
            raise Mistake(f"{name} is empty; give one at least")
        if len(set(values)) < len(values):
            raise Mistake(f"{name}={values} names one of them twice; give each once")
    if len({_label(adapter) for adapter in settings.adapters}) < len(settings.adapters):
        raise Mistake(f"adapters={settings.adapters} has two files of one name; rename one, which the table shows")
    if not any(by_adapter.values()) and not settings.search_seeds:
        raise Mistake("seeds and search_seeds are empty; give seeds, or search_seeds alone for no final runs")
    if (settings.scales is None) == (settings.scale_factors is None):
        raise Mistake("give either scales, such as [1, 10], or scale_factors on the published scales, such as [1]")
    if not Path(os.path.expanduser(settings.root)).is_dir():
        raise Mistake(f"root={settings.root} is not a folder; give the one that holds the tasks")


def _recipe(name: str, entry: list[Layer] | dict[str, Any], settings: Settings, adapters: list[str]) -> Recipe:
    """Return a recipe; refuse names in it that the sweep does not have."""
    recipe: Recipe = _parsed(Recipe, entry) if isinstance(entry, dict) else Recipe(entry)
    source = recipe.scale_from
    if source is not None:
        other = settings.recipes.get(source)
        if other is None or (isinstance(other, dict) and "scale_from" in other):
            raise Mistake(f"recipe {name}: scale_from={source} has no search of its own; give a recipe that has one")
        theirs = other.get("adapters") if isinstance(other, dict) else None
        ours = adapters if recipe.adapters is None else recipe.adapters
        recipe.adapters = [one for one in ours if theirs is None or one in theirs]
    if unknown := [one for one in recipe.adapters or () if one not in adapters]:
        raise Mistake(f"recipe {name} names the adapter {unknown[0]}; choose from: {', '.join(adapters)}")
    return recipe


def _seeds(settings: Settings, adapter: str, name: str, recipe: Recipe) -> list[int]:
    """Return the seeds of the final runs of an adapter with a recipe."""
    seeds = settings.seeds
    if isinstance(seeds, dict):
        if adapter not in seeds:
            raise Mistake(f"seeds names {', '.join(seeds)} and not the adapter {adapter}; add its seeds")
        seeds = seeds[adapter]
    found = [seed for seed in seeds if recipe.seeds is None or seed in recipe.seeds]
    if seeds and not found:
        raise Mistake(f"recipe {name} has seeds={recipe.seeds}, {adapter} has {seeds}; give one of these at least")
    return found


def _choice(name: str, given: dict[str, Any], recipes: list[str]) -> Choice:
    choice: Choice = _parsed(Choice, given)
    if name in recipes or not choice.among or not set(choice.among) <= set(recipes):
        raise Mistake(f"choices: {name} is {given}; give it a name of its own and recipes among {', '.join(recipes)}")
    return choice


def _goals(given: dict[str, Any] | list[dict[str, Any]]) -> tuple[SweepGoal, ...]:
    with mistakes(after="; give {accuracy_drop: POINTS} or {cost: FRACTION OF STATIC}"):
        return goals_of([given] if isinstance(given, dict) else given)


def _check_references(sweep: Sweep) -> None:
    """Refuse a reference recipe that lacks the run of a task, adapter or seed that refers to it."""
    for goal in sweep.goals:
        for (adapter, recipe), seeds in sweep.seeds.items():
            theirs = sweep.seeds.get((adapter, goal.reference or recipe))
            if theirs is None or not set(seeds) <= set(theirs):
                raise Mistake(
                    f"goal {goal.name} needs the recipe {goal.reference} for the adapter {adapter} and the seeds "
                    f"{list(seeds)} of {recipe}; add them"
                )


def _check_scale(adapter: str, recipe: str, contents: list[dict[str, Any]]) -> None:
    """Refuse configs whose adapter has no scale; the runs of a sweep set `model.adapter.scale`."""
    from dynadapter.adapters.base import Adapters
    from dynadapter.spec import kinds

    named: Any = "LoRA"  # the model's default
    for content in contents:
        given = (content.get("model") or {}).get("adapter", named)
        named = given.get("class_path", named) if isinstance(given, dict) else given
    name = str(named).rpartition(".")[2]
    found = next((cls for cls in kinds(Adapters) if cls.__name__ == name), None)  # type: ignore[type-abstract]
    if named is None or (found is not None and not hasattr(found, "scale")):
        raise Mistake(
            f"recipe {recipe} with the adapter {adapter} has model.adapter {named or 'null'}, which has no "
            "model.adapter.scale for a sweep to set; give one kind with a scale, such as LoRA, or train this recipe "
            "with dynadapter fit"
        )


def _label(config: str) -> str:
    """Return the name of a config file without folder and ending."""
    return Path(config).stem if config.endswith((".yaml", ".yml")) else config


def _groups(tasks: list[str] | dict[str, Any]) -> dict[str, str | None]:
    from dynadapter.data.vtab import vtab_task  # imports torch and Lightning

    if isinstance(tasks, dict):
        groups = {name: given.get("group") if isinstance(given, dict) else given for name, given in tasks.items()}
        if unknown := [group for group in groups.values() if group is not None and group not in GROUPS]:
            raise Mistake(f"tasks has the group {unknown[0]!r}; give one of {', '.join(GROUPS)}, or null")
        return groups
    known = {task: vtab_task(task) for task in tasks}
    return {task: found.group if found else None for task, found in known.items()}


def _fresh(tasks: list[str] | dict[str, Any]) -> list[str]:
    """Return the tasks that are marked as fresh."""
    given = {name: one for name, one in tasks.items() if isinstance(one, dict)} if isinstance(tasks, dict) else {}
    for name, one in given.items():
        if not set(one) <= {"group", "fresh"} or not isinstance(one.get("fresh", False), bool):
            raise Mistake(f"tasks: {name} is {one}; give {{group: Natural, fresh: true}}")
    return [name for name, one in given.items() if one.get("fresh")]


def _scales(settings: Settings, task: str, adapter: str) -> list[float]:
    """Return the scales that a task and an adapter choose from."""
    if settings.scale_factors is not None:
        start = _published(task, adapter)
        scales = [factor * start for factor in settings.scale_factors]
    elif isinstance(settings.scales, dict):
        if adapter not in settings.scales:
            raise Mistake(f"scales names {', '.join(settings.scales)} and not the adapter {adapter}; add its scales")
        scales = settings.scales[adapter]
    else:
        scales = settings.scales or []
    if not scales or min(scales) <= 0 or len(set(scales)) < len(scales):
        raise Mistake(f"the scales of {adapter} are {scales}; give different ones above 0, such as [1, 10]")
    return scales


def _published(task: str, adapter: str) -> float:
    from dynadapter.data.vtab import vtab_task

    table = read_config(PUBLISHED, ())
    known = vtab_task(task)
    if adapter not in table or known is None or known.name not in table[adapter]:
        raise Mistake(
            f"{PUBLISHED}.yaml has no scale for the adapter {adapter} on the task {task}; give scales instead of "
            "scale_factors"
        )
    return float(table[adapter][known.name])
