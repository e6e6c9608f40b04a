"""The layers of a configuration: defaults < checkpoint < config files < command line, as one list of arguments."""

import json
import os
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace, set_dumper

from dynadapter.cli.configs import find_config
from dynadapter.cli.errors import Mistake, mistakes
from dynadapter.cli.help import SHORT
from dynadapter.cli.safety import check_saved, check_sizes, data_class
from dynadapter.spec import Spec, kinds, plain, restore
from dynadapter.training.checkpoints import read
from dynadapter.training.contents import saved_contents
from dynadapter.training.loading import stored_settings
from dynadapter.training.module import ExitClassifier

LINKED = ("num_classes", "class_names", "image_size")
"""Arguments of the model that come from the data."""

OFF = ("", "null", "None", "none", "false", "False")
"""Values on the command line that switch a part off."""

TRAINING = ("resume", "init_from", "test_after")
"""Keys outside the sections that only ``fit`` has; it writes them into the config of a run."""

PATHS = ("ckpt_path", "init_from", "bundle", "out", "trainer.default_root_dir", "checkpoint.dirpath")
"""Keys of paths in which ``~`` is the home folder; other paths are expanded where they are read."""

Contents = Mapping[str, Mapping[str, Any]]
"""What the config files hold, by path."""


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes texts such as ``1e3``, which jsonargparse reads as numbers, but not PyYAML."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[\d_.]+[eE][-+]?\d+"), list("-+.0123456789"))


def _dump(content: Any) -> str:
    """Return settings as YAML; this is the dumper of the parsers, which write the configs of runs."""
    return str(yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


set_dumper("yaml", _dump)


def inline(config: Mapping[str, Any]) -> str:
    """Return a configuration as text; the parser reads ``--config`` as a file or as YAML."""
    return str(yaml.dump(dict(config), Dumper=_Dumper))


def assignments(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the keys of arguments with their values.

    >>> list(assignments(["--seed=1", "stray", "--model=a.yaml"]))
    [('seed', '1'), ('model', 'a.yaml')]
    """
    for key, _, value in (arg.removeprefix("--").partition("=") for arg in args if arg.startswith("--")):
        yield key, value


def expand_short(args: Sequence[str], command: str) -> list[str]:
    """Replace short options by their full keys.

    >>> expand_short(["--lr=1e-3", "--threshold=0.8"], "fit")[:1]
    ['--model.optimizer.lr=1e-3']
    """
    long: list[str] = []
    for arg in args:
        name, equals, value = arg.removeprefix("--").partition("=")
        key, commands = SHORT.get(name, ("", ()))
        if name == "threshold" and equals:
            value = _one_policy(value)
        long.append(f"--{key}{equals}{value}" if command in commands and arg.startswith("--") else arg)
    return long


def _one_policy(threshold: str) -> str:
    try:
        value = yaml.safe_load(threshold)
    except (yaml.YAMLError, ValueError):
        value = threshold
    return json.dumps([{"class_path": "Confidence", "init_args": {"threshold": value}}])


def checkpoint_path(contents: Iterable[Mapping[str, Any]], rest: Sequence[str]) -> str | None:
    """Return the checkpoint that the command line names, or else the last config file that names one.

    >>> checkpoint_path([{"ckpt_path": "a.ckpt"}], ["--ckpt_path=b.ckpt"])
    'b.ckpt'
    """
    path = None
    for content in contents:
        path = content.get("ckpt_path", path)
    path = dict(assignments(rest)).get("ckpt_path", path)
    return None if path in (None, *OFF) else os.path.expanduser(str(path))


def expand_home(config: Namespace) -> None:
    """Replace ``~`` in the paths of a parsed configuration, before anything uses them or they are saved with the run.

    >>> config = Namespace(out="~/a")
    >>> expand_home(config)
    >>> config.out == os.path.expanduser("~/a")
    True
    """
    for key in PATHS:
        if isinstance(path := config.get(key), str):
            config[key] = os.path.expanduser(path)


def without_training(files: Sequence[str], contents: Contents) -> tuple[list[str], dict[str, Mapping[str, Any]]]:
    """Return the layers without the keys of ``fit`` alone, so that other commands take the ``config.yaml`` of a run."""
    layers: list[str] = []
    found: dict[str, Mapping[str, Any]] = {}
    for file in files:
        content = contents[file]
        if any(key in content for key in TRAINING):
            content = {key: value for key, value in content.items() if key not in TRAINING}
            tree = yaml.compose(find_config(file).read_text("utf-8-sig"), Loader=yaml.SafeLoader)
            assert isinstance(tree, yaml.MappingNode)
            tree.value = [(key, value) for key, value in tree.value if key.value not in TRAINING]
            file = yaml.serialize(tree)  # quotes as in the file: jsonargparse reads 1e3 as a number, and '1e3' as text
        layers.append(file)
        found[file] = content
    return layers, found


def class_of_data(line: Sequence[str], sections: Sequence[Any] = ()) -> list[str]:
    """Return the argument that names the class of the data, for config files whose data section has none.

    Args:
        line: The arguments of the command line.
        sections: The data sections of the config files. If the first one has no class and the command line names none,
            the next class in a section counts.

    >>> class_of_data(["--data=ImageFolder", "--data.root=photos"])
    ['--data=ImageFolder']
    >>> class_of_data(["--data.class_path=ImageFolder"]), class_of_data(['--data={"class_path": "ImageFolder"}'])
    (['--data=ImageFolder'], ['--data=ImageFolder'])
    >>> class_of_data([], [{"init_args": {"cache": False}}, {"class_path": "ImageFolder"}])
    ['--data=ImageFolder']
    """
    given: list[Any] = []
    for key, value in assignments(line):
        if key == "data.class_path" or (key == "data" and not value.startswith("{")):
            given.append(value)
        elif key == "data":
            with suppress(yaml.YAMLError, ValueError):  # the parser explains it
                section = yaml.safe_load(value)
                given.append(section.get("class_path"))
    named = [name for name in given if isinstance(name, str)]
    classes = [section.get("class_path") if isinstance(section, dict) else section for section in sections]
    if not named and classes and classes[0] is None:
        named = [name for name in classes if isinstance(name, str)][:1]
    return [f"--data={name}" for name in named[-1:]]


def switched_off(rest: Sequence[str], keys: Container[str]) -> tuple[dict[str, None], list[str]]:
    """Return the parts that are switched off, such as by ``--sparsity null``, as a config, and the other arguments.

    >>> switched_off(["--sparsity=null", "--model.every=2"], ["sparsity"])
    ({'sparsity': None}, ['--model.every=2'])
    """
    off = {key: None for key, value in assignments(rest) if key in keys and value in OFF}
    parts = [(arg, *arg.removeprefix("--").partition("=")) for arg in rest]
    return off, [arg for arg, key, _, value in parts if key not in off or value not in OFF]


def with_fresh_classes(args: Sequence[str], contents: Contents, defaults: Mapping[str, Any]) -> list[str]:
    """Reset a setting before an argument that names another class for it than the layers below.

    Otherwise jsonargparse would keep the arguments that both classes have: a RepAdapter would wrap the targets of a
    LoRA. Optimizers and image data keep them, for their rates, sizes and folders are meant for any class. Arguments
    that the command line gives before it first names the class stay.

    >>> with_fresh_classes(["--config=a", "--model.adapter=SSF"], {"a": {"model": {"adapter": "LoRA"}}}, {})
    ['--model.adapter=ByBlocks', '--config=a', '--model.adapter=ByBlocks', '--model.adapter=SSF']
    """
    fresh: list[str] = []
    line: list[str] = []  # the arguments of the command line so far
    named: set[str] = set()  # the places whose class it has named
    below = dict(_classes(defaults))
    for arg in args:
        key, _, value = arg.removeprefix("--").partition("=")
        changed: list[str] = []
        again: list[str] = []
        for place, name in _classes(contents[value]) if key == "config" else _classes_of(key, value):
            before = below.get(place, "")
            if name != before:
                if not any(place.startswith(f"{other}.") for other in changed) and (other := _unlike(before, name)):
                    fresh.append(f"--{place}={other}")
                    again += [one for one in line if one.startswith(f"--{place}.") and place not in named]
                changed.append(place)
                below = {known: cls for known, cls in below.items() if not known.startswith(f"{place}.")}
                below[place] = name
            named |= {place} if key != "config" else set()
        fresh += [arg, *again]
        line += [arg] if key != "config" else []
    return fresh


def _classes(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the places of a configuration that may name a class, each with the name."""
    for key, section in content.items():
        named = isinstance(section, dict) and "class_path" in section
        if isinstance(section, dict) and not named:
            for name, value in section.items():
                yield from _named(f"{key}.{name}", value)
        else:
            yield from _named(key, section)


def _classes_of(key: str, value: str) -> Iterator[tuple[str, str]]:
    """Yield the same for an argument of the command line."""
    read: Any = value
    if value.startswith("{"):
        try:
            read = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # the parser explains it
            return
    if key.endswith(".help"):  # it names a class to describe
        return
    place = key.removesuffix(".class_path").replace(".init_args.", ".")
    yield from _named(place, read) if "." in place else _classes({place: read})


def _named(place: str, value: Any) -> Iterator[tuple[str, str]]:
    name = value.get("class_path") if isinstance(value, dict) else value
    if isinstance(name, str) and name not in OFF:
        yield place, name.rpartition(".")[2]
    arguments = value.get("init_args") if isinstance(value, dict) else None
    for inner, part in arguments.items() if isinstance(arguments, dict) else ():
        yield from _named(f"{place}.{inner}", part)


def _unlike(*names: str) -> str | None:
    """Return a class of the same family as the first known one that shares no argument with it; None without any."""
    for name in names:
        for cls in kinds(Spec):
            if cls.__qualname__ == name:
                family = next(base for base in cls.__mro__ if issubclass(base, Spec) and Spec in base.__bases__)
                others = (one for one in kinds(family) if not _arguments(cls) & _arguments(one))
                return next((one.__qualname__ for one in others), None)
    return None


def _arguments(cls: Any) -> set[str]:
    return {field.name for field in fields(cls)}


def overridden(contents: Iterable[Mapping[str, Any]], rest: Sequence[str]) -> set[str]:
    """Return the backbone settings that the user gives, so that those of an untrusted file are not read.

    >>> overridden([{"model": {"backbone_args": {}}}], ["--model.backbone=micro"]) == {"backbone", "backbone_args"}
    True
    """
    sections = [section for content in contents if isinstance(section := content.get("model"), dict)]
    keys = {key for section in sections for key in section}
    keys |= {key.removeprefix("model.") for key, _ in assignments(rest) if key.startswith("model.")}
    return keys & {"backbone", "backbone_args"}


class Trained(NamedTuple):
    """The information of a checkpoint about its training, apart from the settings.

    Args:
        class_names: Class names in the order of the model's class indices.
        preprocessing: Preprocessing of the training; empty if unknown.
        image_size: The model's argument ``image_size``.
    """

    class_names: list[str]
    preprocessing: dict[str, Any]
    image_size: int | None


def checkpoint_settings(path: str, given: Collection[str] = ()) -> tuple[dict[str, Any], Trained]:
    """Return the settings of model and data in a checkpoint, which config files override, and :class:`Trained`."""
    if not Path(path).is_file():
        there = "is a folder" if Path(path).is_dir() else "does not exist"
        raise Mistake(f"checkpoint {path} {there}; give --ckpt_path the file that fit wrote, such as {_newest(path)}")
    with mistakes(after="; give --ckpt_path a file that fit wrote"):
        checkpoint = read(path)
    try:
        with mistakes(f"{path}: "):
            return _settings(checkpoint, Path(path), given)
    except (KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{path} was not written by dynadapter fit; give --ckpt_path a file that was") from error


def _settings(checkpoint: dict[str, Any], path: Path, given: Collection[str]) -> tuple[dict[str, Any], Trained]:
    ours = saved_contents(checkpoint)
    stored = stored_settings(ExitClassifier, checkpoint, given)
    model = {name: plain(value) for name, value in stored.items() if name not in LINKED}
    check_saved(ours.get("preprocessing"))
    settings: dict[str, Any] = {"model": model}
    if root := run_root(path):
        settings["trainer"] = {"default_root_dir": str(root)}
    data = ours.get("data")
    if data is not None and data_class(data["class_path"]):
        check_saved(data)
        check_sizes(data)
        if "download" in data["init_args"]:  # only the user lets data be fetched
            data = {**data, "init_args": {**data["init_args"], "download": False}}
        settings["data"] = plain(data)
    names = restore(ours["class_names"], list[str], "class_names")
    return settings, Trained(names, dict(ours["preprocessing"]), stored.get("image_size"))


def run_root(checkpoint: Path) -> Path | None:
    """Return the parent folder of the run of a checkpoint; results of other commands are written next to the run.

    >>> run_root(Path("runs/digits/version_3/checkpoints/last.ckpt")).as_posix()
    'runs/digits'
    """
    folder = with_folders(checkpoint).parent
    return folder.parent.parent if folder.name == "checkpoints" and folder.parent.name.startswith("version_") else None


def with_folders(checkpoint: Path) -> Path:
    """Return a path that names the folder of the run, as that of ``last.ckpt`` in the current folder does not.

    >>> with_folders(Path("version_3/checkpoints/last.ckpt")).as_posix()
    'version_3/checkpoints/last.ckpt'
    >>> with_folders(Path("last.ckpt")).parent == Path.cwd()
    True
    """
    named = len(checkpoint.parts) > 2 and ".." not in checkpoint.parts
    return checkpoint if named else Path(os.path.abspath(checkpoint))


def _newest(path: str) -> str:
    """Return the newest checkpoint in or near a folder, or the usual path if there is none."""
    folder = next((p for p in (Path(path), *Path(path).parents) if p.is_dir()), Path())
    near = ("*.ckpt", "checkpoints/*.ckpt", "version_*/checkpoints/*.ckpt", "*/version_*/checkpoints/*.ckpt")
    found = sorted((file for pattern in near for file in folder.glob(pattern)), key=lambda file: file.stat().st_mtime)
    return str(found[-1]) if found else "runs/version_0/checkpoints/last.ckpt"
