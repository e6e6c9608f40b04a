"""The YAML file of a sweep: read, checked, and turned into the plan of its runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynadapter.calibrate import Goal
from dynadapter.cli.configs import find_config, read_config
from dynadapter.cli.errors import Mistake
from dynadapter.cli.parser import CommandParser
from dynadapter.sweep.plan import Sweep, Unit, fingerprint
from dynadapter.sweep.table import GROUPS

PUBLISHED = "vtab_scales"

Layer = str | dict[str, Any]
"""A config file, by its name or path, or settings written as in one."""


@dataclass
class Settings:
    """The keys of the file of a sweep.

    Args:
        root: Folder that holds the tasks, in the layout of VTAB-1k.
        tasks: Folders of the tasks. A mapping names the group of each: Natural, Specialized, Structured, or null.
        recipes: Config files by the name of the recipe, as in ``{dynamic: [vtab], static: [vtab, static]}``. An entry
            may also be a mapping with settings as in a config file.
        adapters: Config files of the adapters, laid over each recipe.
        scales: Adapter scales to choose from: a list, or a list for each adapter.
        scale_factors: Instead of ``scales``: factors on the published scales of vtab_scales.yaml.
        seeds: Seeds of the final runs; none to stop before them, so that no test image is read.
        search_seeds: Seeds of the runs that choose the scale; by default those of ``seeds``.
        settings: Settings as in a config file, laid over all recipes and adapters.
        goal: What thresholds are calibrated to on val200: ``{accuracy_drop: POINTS}`` or ``{cost: FRACTION}``.
        out: Folder of the sweep.
    """

    root: str
    tasks: list[str] | dict[str, str | None]
    recipes: dict[str, list[Layer]]
    adapters: list[str] = field(default_factory=lambda: ["lora"])
    scales: list[float] | dict[str, list[float]] | None = None
    scale_factors: list[float] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    search_seeds: list[int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    goal: dict[str, float] = field(default_factory=lambda: {"accuracy_drop": 0.0})
    out: str = "runs/sweep"


@dataclass(frozen=True)
class SweepFile:
    """A sweep that was read.

    Args:
        path: The file.
        out: Folder of the sweep, absolute.
        root: Folder of the tasks, absolute.
        layers: What is laid over each other, by adapter and recipe: paths of config files, and settings.
        sweep: The plan.
    """

    path: Path
    out: Path
    root: Path
    layers: Mapping[tuple[str, str], list[Path | dict[str, Any]]]
    sweep: Sweep

    def epochs(self, unit: Unit) -> int:
        """Return how many epochs the configs of a run name, 100 where none does."""
        epochs = 100
        for layer in self.layers[unit.adapter, unit.recipe]:
            content = layer if isinstance(layer, dict) else read_config(str(layer), ())
            epochs = (content.get("trainer") or {}).get("max_epochs", epochs)
        return epochs


def read(path: str) -> SweepFile:
    """Read the file of a sweep.

    Raises:
        Mistake: A key, a value or a config file that it names is wrong.
    """
    parser = CommandParser()
    parser.add_class_arguments(Settings, None)
    settings = Settings(**parser.parse_object(read_config(path, ())).as_dict())
    _check_lists(settings)
    goal = _goal(settings.goal)
    layers = {
        (_label(adapter), recipe): [
            layer if isinstance(layer, dict) else find_config(layer)
            for layer in [*entries, adapter, *([settings.settings] if settings.settings else [])]
        ]
        for adapter in settings.adapters
        for recipe, entries in settings.recipes.items()
    }
    contents = {
        key: fingerprint(
            settings.goal, *(one if isinstance(one, dict) else read_config(str(one), ()) for one in several)
        )
        for key, several in layers.items()
    }
    adapters = [_label(adapter) for adapter in settings.adapters]
    sweep = Sweep(
        tasks=_groups(settings.tasks),
        adapters=adapters,
        recipes=list(settings.recipes),
        settings=contents,
        scales={(t, a): _scales(settings, t, a) for t in settings.tasks for a in adapters},
        seeds=settings.seeds,
        search_seeds=settings.search_seeds or settings.seeds,
        goal=goal,
    )
    out, root = (Path(folder).expanduser().absolute() for folder in (settings.out, settings.root))
    return SweepFile(Path(path), out, root, layers, sweep)


def _check_lists(settings: Settings) -> None:
    """Refuse empty and repeated entries, and scales in two ways or none."""
    for name in ("tasks", "recipes", "adapters", "seeds", "search_seeds"):
        values = list(getattr(settings, name) or ())
        if not values and name not in ("seeds", "search_seeds"):
            raise Mistake(f"{name} is empty; give one at least")
        if len(set(values)) < len(values):
            raise Mistake(f"{name}={values} names one of them twice; give each once")
    if not settings.seeds and not settings.search_seeds:
        raise Mistake("seeds and search_seeds are empty; give seeds, or search_seeds alone for no final runs")
    if (settings.scales is None) == (settings.scale_factors is None):
        raise Mistake("give either scales, such as [1, 10], or scale_factors on the published scales, such as [1]")
    if not Path(settings.root).expanduser().is_dir():
        raise Mistake(f"root={settings.root} is no folder; give the one that holds the tasks")


def _goal(given: dict[str, float]) -> Goal:
    try:
        goal = Goal(**given)
    except (TypeError, ValueError) as error:
        raise Mistake(f"goal={given}: give {{accuracy_drop: POINTS}} or {{cost: FRACTION OF STATIC}}") from error
    if goal.risk is not None:
        raise Mistake("a sweep calibrates to accuracy_drop or cost; for a risk use dynadapter calibrate on one run")
    return goal


def _label(config: str) -> str:
    """Return the name of a config file without folder and ending."""
    return Path(config).stem if config.endswith((".yaml", ".yml")) else config


def _groups(tasks: list[str] | dict[str, str | None]) -> dict[str, str | None]:
    from dynadapter.data.vtab import vtab_task  # imports torch and Lightning

    if isinstance(tasks, dict):
        if unknown := [group for group in tasks.values() if group is not None and group not in GROUPS]:
            raise Mistake(f"tasks has the group {unknown[0]!r}; give one of {', '.join(GROUPS)}, or null")
        return tasks
    known = {task: vtab_task(task) for task in tasks}
    return {task: found.group if found else None for task, found in known.items()}


def _scales(settings: Settings, task: str, adapter: str) -> list[float]:
    """Return the scales that a task and an adapter choose from.

    Raises:
        Mistake: None are given, or one is not above 0.
    """
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
