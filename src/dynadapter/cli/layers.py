"""The layers of a configuration: defaults < checkpoint < config files < command line, as one list of arguments."""

import json
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dynadapter.cli.errors import Mistake, mistakes
from dynadapter.cli.help import SHORT
from dynadapter.cli.safety import check_saved, check_sizes, data_class
from dynadapter.spec import plain, restore
from dynadapter.training.checkpoints import read
from dynadapter.training.contents import saved_contents
from dynadapter.training.loading import stored_settings
from dynadapter.training.module import ExitClassifier

LINKED = ("num_classes", "class_names", "image_size")
"""Arguments of the model that come from the data."""

OFF = ("", "null", "None", "none", "false", "False")
"""Values on the command line that switch a part off."""

Contents = Mapping[str, Mapping[str, Any]]
"""What the config files hold, by path."""


def inline(config: Mapping[str, Any]) -> str:
    """Return a configuration as text; the parser reads ``--config`` as a file or as YAML."""
    return yaml.safe_dump(dict(config))


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
    except yaml.YAMLError:
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
    return None if path in (None, *OFF) else str(path)


def switched_off(rest: Sequence[str], keys: Container[str]) -> tuple[set[str], list[str]]:
    """Return the parts that are switched off, such as by ``--sparsity null``, and the other arguments.

    >>> switched_off(["--sparsity=null", "--model.every=2"], ["sparsity"])
    ({'sparsity'}, ['--model.every=2'])
    """
    off = {key for key, value in assignments(rest) if key in keys and value in OFF}
    parts = [(arg, *arg.removeprefix("--").partition("=")) for arg in rest]
    return off, [arg for arg, key, _, value in parts if key not in off or value not in OFF]


def with_fresh_adapters(args: Sequence[str], contents: Contents) -> list[str]:
    """Reset ``model.adapter`` before an argument that names another kind than the layers below.

    Otherwise jsonargparse would keep the arguments that both kinds have: a RepAdapter would wrap the targets of a LoRA.

    >>> with_fresh_adapters(["--config=a", "--model.adapter=RepAdapter"], {"a": {"model": {"adapter": "LoRA"}}})
    ['--model.adapter=null', '--config=a', '--model.adapter=null', '--model.adapter=RepAdapter']
    """
    fresh: list[str] = []
    below = None  # the kind of the class default is not looked up: any kind replaces it
    for arg in args:
        key, _, value = arg.partition("=")
        adapter: Any = None
        if key == "--config":
            section = contents[value].get("model")
            adapter = section.get("adapter") if isinstance(section, dict) else None
        elif key == "--model.adapter":
            adapter = value
        name = adapter.get("class_path") if isinstance(adapter, dict) else adapter
        if isinstance(name, str) and name not in OFF:
            kind = name.rpartition(".")[2]
            if below != kind:
                fresh.append("--model.adapter=null")
            below = kind
        fresh.append(arg)
    return fresh


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
    folder = checkpoint.parent
    return folder.parent.parent if folder.name == "checkpoints" and folder.parent.name.startswith("version_") else None


def _newest(path: str) -> str:
    """Return the newest checkpoint in or near a folder, or the usual path if there is none."""
    folder = next((p for p in (Path(path), *Path(path).parents) if p.is_dir()), Path())
    near = ("*.ckpt", "checkpoints/*.ckpt", "version_*/checkpoints/*.ckpt", "*/version_*/checkpoints/*.ckpt")
    found = sorted((file for pattern in near for file in folder.glob(pattern)), key=lambda file: file.stat().st_mtime)
    return str(found[-1]) if found else "runs/version_0/checkpoints/last.ckpt"
