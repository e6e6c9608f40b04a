"""What ``dynadapter train`` refuses before it trains, and the settings that it reads for that."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynadapter.cli.errors import Mistake, mistakes, nearest, nearest_place

if TYPE_CHECKING:  # Lightning takes seconds to import
    from dynadapter.data import ImageData
    from dynadapter.training.module import ExitClassifier

Layers = Sequence[Mapping[str, Any]]
"""What the config files hold, then the sections that the command line gives as a whole."""


def check_goal(goal: Sequence[str]) -> None:
    """Raise a :class:`Mistake` for a goal that calibrate would refuse, before hours of training."""
    from dynadapter.calibrate import Goal
    from dynadapter.cli.layers import OFF

    given: dict[str, Any] = {}
    for arg in goal:
        key, _, value = arg.removeprefix("--goal.").partition("=")
        if key not in Goal.__dataclass_fields__:
            hint = nearest(key, Goal.__dataclass_fields__)
            raise Mistake(f"there is no goal {key!r}{hint or ';'} choose from {', '.join(Goal.__dataclass_fields__)}")
        try:
            given[key] = value if key in ("reference", "metric") else float(value)
        except ValueError as error:
            raise Mistake(f"goal.{key}: expected a number, not {value!r:.40}") from error
    with mistakes():
        Goal(**given)
    if (place := given.get("reference")) not in (None, *OFF) and not Path(os.path.expanduser(place)).exists():
        raise Mistake(
            f"goal.reference={place} does not exist{nearest_place(place) or '; give a checkpoint or a bundle'}"
        )


def mappings(line: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the sections that the command line gives as a whole, as in ``--trainer '{max_epochs: 3}'``."""
    from dynadapter.cli.layers import assignments

    found: dict[str, dict[str, Any]] = {}
    for key, value in assignments(line):
        if value.startswith("{"):
            with suppress(yaml.YAMLError, ValueError):  # the parser explains it
                found[key] = found.get(key, {}) | yaml.safe_load(value)
    return found


def values_of(key: str, layers: Layers, line: Sequence[str]) -> list[str]:
    """Return the values of a setting, such as ``trainer.devices``, in all layers as text; the last one counts."""
    from dynadapter.cli.layers import assignments, expand_short

    section, _, name = key.partition(".")
    values = [str(part[name]) for one in layers if isinstance(part := one.get(section), dict) and name in part]
    return values + [value for given, value in assignments(expand_short(line, "fit")) if given == key]


def require_checkpoints(layers: Layers, line: Sequence[str]) -> None:
    """Refuse settings by which the training would save no checkpoint, or none that this command finds or continues.

    Raises:
        Mistake: Such a setting is given.
    """
    from dynadapter.cli.layers import OFF, assignments

    given = dict(assignments(line))
    sections = [one["checkpoint"] for one in layers if "checkpoint" in one]
    if given.get("checkpoint", "on") in OFF or any(section in (None, False) for section in sections):
        raise Mistake("checkpoint is off, and train calibrates and deploys a checkpoint; leave that setting out")
    folders = [section.get("dirpath") for section in sections if isinstance(section, dict)]
    if given.get("checkpoint.dirpath", "null") not in OFF or any(folder is not None for folder in folders):
        raise Mistake("train saves its checkpoints below --out; leave checkpoint.dirpath out, or use dynadapter fit")
    if "trainer.default_root_dir" in given or "default_root_dir" in mappings(line).get("trainer", {}):
        # In a config file it is the folder of another run, and --out overrides it.
        raise Mistake("train saves its runs in --out; give --out FOLDER instead of trainer.default_root_dir")
    if _switch("trainer.enable_checkpointing", layers, line) is False:
        raise Mistake(
            "trainer.enable_checkpointing is off, and train calibrates and deploys a checkpoint; leave that setting out"
        )
    if _switch("checkpoint.save_weights_only", layers, line) is True:
        raise Mistake(
            "checkpoint.save_weights_only leaves out what an interrupted training needs to continue; leave that "
            "setting out"
        )
    for key in ("trainer.fast_dev_run", "trainer.barebones"):
        if _switch(key, layers, line):
            raise Mistake(f"{key} saves no run, and train deploys one; leave that setting out, or use dynadapter fit")


def _switch(key: str, layers: Layers, line: Sequence[str]) -> Any:
    """Return the value of a setting that may be on, off or a number; None if it is not given."""
    value = next(reversed(values_of(key, layers, line)), "null")
    with suppress(yaml.YAMLError, ValueError):  # the parser explains it
        return None if value == "None" else yaml.safe_load(value)
    return None


def require_outside(data: "ImageData", out: Path, setting: str) -> None:
    """Refuse results among the class folders, where they would be another class.

    Args:
        data: The images.
        out: The folder of the results.
        setting: The setting that names it.

    Raises:
        Mistake: It lies in a folder that holds class folders, and not in a hidden one.
    """
    from dynadapter.data import ImageFolder

    for folder in data.class_folders if isinstance(data, ImageFolder) else ():
        place, root = Path(os.path.realpath(out)), Path(os.path.realpath(folder))
        if place == root or (place.is_relative_to(root) and not place.relative_to(root).parts[0].startswith(".")):
            raise Mistake(f"{setting}={out} lies among the class folders of {folder}; give a folder elsewhere")


def require_steps(layers: Layers, line: Sequence[str]) -> None:
    """Refuse a training without a step, which would deploy untrained heads, and one without an end.

    Raises:
        Mistake: The epochs, steps or batches are 0 or less, and not the -1 that leaves the end to another setting.
    """
    from dynadapter.cli.layers import assignments

    given = {
        key: next(reversed(values_of(f"trainer.{key}", layers, line)), "")
        for key in ("max_epochs", "max_steps", "limit_train_batches", "max_time")
    }
    ends = given["max_steps"] not in ("", "-1", "None", "null") or given["max_time"] not in ("", "None", "null")
    ends |= any(key.startswith(("trainer.max_time.", "trainer.callbacks")) for key, _ in assignments(line))
    ends |= any(isinstance(one.get("trainer"), dict) and one["trainer"].get("callbacks") for one in layers)
    for key, value in given.items():
        if re.fullmatch(r"[-+]?0+(\.0*)?|-[\d.]+", value) and (value != "-1" or key == "limit_train_batches"):
            raise Mistake(f"trainer.{key}={value} trains nothing; give more than 0")
    if given["max_epochs"] == "-1" and not ends:
        raise Mistake("trainer.max_epochs=-1 has no end; give more than 0, or also trainer.max_steps or max_time")


def require_reachable(model: "ExitClassifier", image_size: int, goal: Sequence[str]) -> None:
    """Refuse a goal below the cost of exit 1, which is known before the training.

    Args:
        model: The network.
        image_size: Height and width in pixels.
        goal: Arguments ``--goal...`` of calibrate.

    Raises:
        Mistake: No exit is as cheap.
    """
    from dynadapter.calibrate.choosing import reachable
    from dynadapter.cli.layers import assignments
    from dynadapter.cost import exit_costs

    if (cost := dict(assignments(goal)).get("goal.cost")) is not None:
        with mistakes():
            reachable(float(cost), exit_costs(model.net, image_size).relative[0])


def device_arguments(layers: Layers, line: Sequence[str]) -> list[str]:
    """Return the arguments by which calibrate runs where the training ran, on one device."""
    found = [f"--trainer.accelerator={name}" for name in values_of("trainer.accelerator", layers, line)[-1:]]
    for devices in values_of("trainer.devices", layers, line)[-1:]:
        numbers = re.findall(r"\d+", devices) if "," in devices or "[" in devices else []  # else it is a count
        found += [f"--trainer.devices=[{number}]" for number in numbers[:1]]
    return found


def require_trained(checkpoint: Path) -> None:
    """Refuse a checkpoint of a training that ended before its first step, such as by ``trainer.max_time``.

    Raises:
        Mistake: The checkpoint counts no step.
    """
    from dynadapter.training.checkpoints import read

    if not read(checkpoint).get("global_step"):
        run = checkpoint.parent.parent
        raise Mistake(f"the training in {run} made no step; give another --out, and more time or steps")
