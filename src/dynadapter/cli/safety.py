"""Allow-lists of the classes that a config or a checkpoint may name: nothing else may run.

jsonargparse imports whatever a ``class_path`` names. It calls it wherever a setting takes a callable or any value:
``backbone_args``, the hooks of a LambdaCallback, the optimizer. An untrusted config could run any installed function.
Hence a configuration is checked after parsing and before anything in it is called. A checkpoint may name only classes
that are known already: no module is imported for it.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dynadapter.cli.errors import Mistake
from dynadapter.data import ImageData
from dynadapter.spec import Spec

BASES = (
    Spec,
    LightningDataModule,
    Callback,
    Logger,
    Optimizer,
    LRScheduler,
    Strategy,
    Accelerator,
    Precision,
    CheckpointIO,
    ClusterEnvironment,
    LayerSync,
    Profiler,
)
"""A config may name these classes and those derived from them, of any package."""

LIBRARIES = ("torch", "lightning")
"""Packages whose functions a config may name, such as a communication hook of DDP, and whose dataclasses hold settings
of strategies."""


def check_config(config: Any, key: str = "") -> None:
    """Refuse a parsed configuration that names anything outside the allow-list.

    Args:
        config: The parsed configuration, before anything of it is built.
        key: The key of this part of it.

    Raises:
        Mistake: In one line, with the key and the name.
    """
    if isinstance(config, Namespace | Mapping):
        parts: dict[str, Any] = (
            vars(config) if isinstance(config, Namespace) else {str(k): v for k, v in config.items()}
        )
        if "class_path" in parts:
            path = parts["class_path"]
            found = _imported(path) if isinstance(path, str) else None
            if not isinstance(found, type) or not (issubclass(found, BASES) or _holds_settings(found)):
                _refuse(key, str(path))
        for name, part in parts.items():
            check_config(part, f"{key}.{name}".lstrip(".").removesuffix(".init_args"))
    elif isinstance(config, list | tuple | set):
        for part in config:
            check_config(part, key)
    elif callable(config) and not _from_library(config):
        _refuse(key, f"{getattr(config, '__module__', '')}.{getattr(config, '__qualname__', config)}")


def check_saved(settings: Any) -> None:
    """Refuse settings from a checkpoint that name a class which is not loaded already.

    Raises:
        ValueError: If they do.
    """
    if isinstance(settings, Mapping):
        if "class_path" in settings and settings["class_path"] not in _known():
            raise ValueError(f"it names the class {settings['class_path']!r:.200}")
        for part in settings.values():
            check_saved(part)
    elif isinstance(settings, list | tuple):
        for part in settings:
            check_saved(part)


def data_class(class_path: str) -> type[ImageData] | None:
    """Return the loaded class of image data with this name, or None. A class of your own must be named again."""
    return next((cls for cls in _below(ImageData) if class_path in _paths(cls)), None)


def _known() -> set[str]:
    return {path for base in (Spec, ImageData) for cls in _below(base) for path in _paths(cls)}


def _below(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


def _paths(cls: type) -> set[str]:
    """Return the names of a class: in its module, and in its package if that exports it, as configs name it."""
    package = cls.__module__.partition(".")[0]
    exported = getattr(sys.modules.get(package), cls.__qualname__, None) is cls
    return {f"{cls.__module__}.{cls.__qualname__}", *([f"{package}.{cls.__qualname__}"] if exported else [])}


def _imported(path: str) -> Any:
    """Return what a dotted path names in the loaded modules; parsing has loaded those of a valid one."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        if (found := sys.modules.get(".".join(parts[:split]))) is not None:
            for name in parts[split:]:
                found = getattr(found, name, None)
            return found
    return None


def _from_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] in LIBRARIES


def _holds_settings(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) and _from_library(cls)


def _refuse(key: str, name: str) -> None:
    raise Mistake(
        f"{key} cannot be {name!r}: a config may name adapters, policies, callbacks, optimizers and the like, and no "
        "functions; derive a class from one of these, or write a program"
    )
