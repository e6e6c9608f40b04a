"""Allow-lists of the classes that a config, a run folder or a checkpoint may name: nothing else may run.

jsonargparse imports any class that a ``class_path`` names, and calls it where a setting takes a callable or any value:
``backbone_args``, the hooks of a LambdaCallback, the optimizer. A config could thus run any installed function. Hence a
configuration is checked after parsing and before anything in it is called. A checkpoint or a run folder may only name
classes that are known already: no module is imported for it.
"""

import dataclasses
import re
import sys
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.transforms.v2 import Transform

from dynadapter.backbones.stored import check_arguments, check_name
from dynadapter.cli.errors import Mistake
from dynadapter.data import ImageData
from dynadapter.limits import texts_read
from dynadapter.spec import Spec

HARMLESS = (Spec, LightningDataModule, Callback, Optimizer, LRScheduler, Strategy, Accelerator, Precision, Transform)
"""A run folder may name these classes and those derived from them, where they are loaded already."""
BASES = (*HARMLESS, Logger, CheckpointIO, ClusterEnvironment, LayerSync, Profiler)
"""A config may name these classes and those derived from them, of any package. Those added here write elsewhere or
send requests."""
REFUSED = (LambdaCallback,)
"""Classes that call any function."""
READ = ("ckpt_path", "init_from")
"""Keys of checkpoints, which are only read."""
LIBRARIES = ("torch", "lightning")
"""Packages whose dataclasses hold settings of strategies."""
PLACES = ("dirpath", "save_dir", "root_dir", "log_dir", "output_dir")
"""Keys of folders that classes of Lightning write into."""
WORKERS = 256
"""Largest number of worker processes that a file may name."""
LARGEST = 2**17
"""Largest whole number among the other settings of data in a file, without those of `UNBOUNDED`."""
UNBOUNDED = ("seed", "max_skipped")
"""Ends of the names of settings of data that cost nothing, however large they are."""
DIGITS = re.compile(r"[-+]?\d[\da-fA-FobxOBX_:]*")
"""What may be a whole number in YAML."""
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def check_config(config: Any, key: str = "") -> None:
    """Refuse a parsed configuration that names anything outside the allow-list."""
    if isinstance(config, Namespace | Mapping):
        parts: dict[str, Any] = (
            vars(config) if isinstance(config, Namespace) else {str(k): v for k, v in config.items()}
        )
        if "class_path" in parts:
            path = parts["class_path"]
            found = _imported(path) if isinstance(path, str) else None
            if not _is_allowed(found, BASES):
                _refuse(key, str(path))
        for name, part in parts.items():
            check_config(part, f"{key}.{name}".lstrip(".").removesuffix(".init_args"))
    elif isinstance(config, list | tuple | set):
        for part in config:
            check_config(part, key)
    elif callable(config):
        _refuse(key, f"{getattr(config, '__module__', '')}.{getattr(config, '__qualname__', config)}")


def check_run(file: Path, content: Mapping[str, Any], trusted: Iterable[Any], given: Collection[str]) -> None:
    """Refuse the config of an untrusted run folder if it names something that only a user may name.

    These are classes that are not loaded, loggers and other classes that write elsewhere, folders to write into, and
    backbones from outside timm. Nothing is imported.

    Args:
        file: The config of the run.
        content: Content of the file.
        trusted: Contents of the config files that the user gives; the run may name everything that they name.
        given: The result of :func:`~dynadapter.cli.layers.overridden`.
    """
    model = content.get("model") or {}
    named = {value for config in trusted for _, value in _texts(config)}
    try:
        sections = {name: section for name, section in content.items() if name not in READ}
        if any(isinstance(section, str) for section in sections.values()) or any("." in key for key in content):
            raise ValueError("fit does not write configs of this form")
        if "backbone" not in given and "backbone" in model:
            check_name(model["backbone"])
        if "backbone_args" not in given:
            check_arguments(model.get("backbone_args"))
        check_sizes(content.get("data"))
        for key, value in (pair for part in (_without_paths(sections), *texts_read(content)) for pair in _texts(part)):
            if value not in named and not _run_may_name(key, value):
                raise ValueError(f"{key} is {value!r:.200}")
        for key, value in _texts([section for name, section in sections.items() if name not in ("model", "data")]):
            if value not in named and key != "default_root_dir" and _leaves(value):
                raise ValueError(f"{key} is {value!r:.200}")
    except ValueError as error:
        raise Mistake(
            f"{file} cannot be used as it is: {error}; a run folder may name no class that is not loaded, no logger, "
            f"and no folder to write into: if you trust it, add -c {file}"
        ) from error


def require_loaded(content: Mapping[str, Any], modules: Container[str]) -> None:
    """Refuse a configuration with a class whose module is not among some loaded ones."""
    for key, name in _texts(content):
        if key == "class_path" and getattr(_imported(name), "__module__", None) not in modules:
            raise Mistake(f"{name} is of a module that is not loaded")


def _without_paths(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that are texts or paths: nothing is imported for them, and ``test.csv`` looks like a class."""
    names = {"model": {"weights"}, "trainer": {"default_root_dir"}, "data": _text_settings()}
    return {
        name: _less(section, names[name]) if name in names and isinstance(section, Mapping) else section
        for name, section in sections.items()
    }


def _less(section: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    left = {name: part for name, part in section.items() if name not in names}
    if isinstance(given := left.get("init_args"), Mapping):
        left["init_args"] = {name: part for name, part in given.items() if name not in names}
    return left


def _values(part: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested settings, each with the key that it stands under."""
    if isinstance(part, Mapping):
        for name, value in part.items():
            yield from _values(value, str(name))
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _values(value, key)
    else:
        yield key, part


def _texts(part: Any) -> Iterator[tuple[str, str]]:
    return ((key, value) for key, value in _values(part) if isinstance(value, str))


def _run_may_name(key: str, value: str) -> bool:
    if key in PLACES or key in ("logger", "plugins"):
        return False
    if key == "class_path" and "." not in value:
        loaded = [cls for base in HARMLESS for cls in _below(base) if cls.__qualname__ == value]
        return bool(loaded) and all(_is_allowed(cls, HARMLESS) for cls in loaded)
    if key != "class_path" and (key == "backbone" or not NAME.fullmatch(value)):
        return True
    found = _imported(value)
    if found is None and key != "class_path":
        return find_spec(value.partition(".")[0]) is None  # a text that looks like a class, such as a file's name
    return _is_allowed(found, HARMLESS)


def _leaves(value: str) -> bool:
    """Check whether a text can be a path that leads out of its folder."""
    path = PureWindowsPath(value)  # understands both separators, and drives
    return bool(path.anchor) or ".." in path.parts or value.startswith("~") or "://" in value or "::" in value


def _is_allowed(found: Any, bases: tuple[type, ...]) -> bool:
    if not isinstance(found, type) or issubclass(found, REFUSED):
        return False
    of_library = found.__module__.partition(".")[0] in LIBRARIES
    return issubclass(found, bases) or (dataclasses.is_dataclass(found) and of_library)


def check_saved(settings: Any) -> None:
    """Refuse settings from a checkpoint that name a class which is not loaded already."""
    known = {path for base in (Spec, ImageData) for cls in _below(base) for path in _paths(cls)}
    for key, name in _values(settings):
        if key == "class_path" and name not in known:
            raise ValueError(f"it names the class {name!r:.200}")


def check_sizes(data: Any) -> None:
    """Refuse settings of data in a file with a number that is too large, such as a million processes."""
    left: list[Mapping[str, Any]] = []
    if isinstance(data, Mapping):
        left.append(_less(data, _text_settings()))  # a folder may have the name 20261129
    while left:
        for name, part in left.pop().items():
            most = WORKERS if name == "num_workers" else LARGEST
            if not str(name).endswith(UNBOUNDED) and _number(part) > most:
                raise ValueError(f"it has {name}={part!r:.20}; a file may name at most {most:,}")
            left += [part] if isinstance(part, Mapping) else []


def _number(value: Any) -> int:
    """Return the whole number that the parser reads, also from a text such as ``0x3e8``; 0 for anything else."""
    if isinstance(value, str) and DIGITS.fullmatch(value):
        try:
            value = yaml.safe_load(value)
        except ValueError:  # thousands of digits
            return LARGEST + 1
    return value if isinstance(value, int) else 0


def _text_settings() -> set[str]:
    """Return the arguments of the loaded data modules that are only texts or paths, such as ``root``."""
    hints = [pair for cls in _below(ImageData) for pair in _hints(cls).items()]
    return {name for name, hint in hints if _is_text(hint)} - {name for name, hint in hints if not _is_text(hint)}


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)
    except (NameError, TypeError):  # a user's class can name types that are not imported
        return {}


def _is_text(hint: Any) -> bool:
    parts = get_args(hint)
    return all(map(_is_text, parts)) if parts else hint in (str, Path, type(None))


def data_class(class_path: str) -> type[ImageData] | None:
    """Return the loaded class of image data with this name, or None; a user's own class must be given again."""
    return next((cls for cls in _below(ImageData) if class_path in _paths(cls)), None)


def _below(cls: type) -> Iterator[type]:
    children: list[type] = cls.__subclasses__()
    for child in children:
        yield child
        yield from _below(child)


def _paths(cls: type) -> set[str]:
    """Return the dotted names of a class in configs: by its module, and by its package if that exports it."""
    package = cls.__module__.partition(".")[0]
    exported = getattr(sys.modules.get(package), cls.__qualname__, None) is cls
    return {f"{cls.__module__}.{cls.__qualname__}", *([f"{package}.{cls.__qualname__}"] if exported else [])}


def _imported(path: str) -> Any:
    """Return the object of a dotted path in the loaded modules; parsing has loaded the modules of a valid path."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        if (found := sys.modules.get(".".join(parts[:split]))) is not None:
            for name in parts[split:]:
                found = getattr(found, name, None)
            return found
    return None


def _refuse(key: str, name: str) -> None:
    raise Mistake(
        f"{key} cannot be {name!r}: a config may name adapters, policies, callbacks, optimizers and the like, and no "
        "functions; derive a class from one of these, or write a program"
    )
