"""The layers of a configuration: a checkpoint's settings lie below the config files, those below the command line."""

import inspect
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dynadapter.cli.errors import Mistake, one_line
from dynadapter.cli.safety import check_saved, data_class
from dynadapter.spec import plain
from dynadapter.training.checkpoints import read
from dynadapter.training.contents import saved_contents
from dynadapter.training.module import ExitClassifier

LINKED = ("num_classes", "class_names", "image_size")
"""What the model takes from the data."""

MAX_VALUES = 100_000
"""No config has more; a few lines of aliases can stand for billions."""

OFF = ("", "null", "None", "none", "false", "False")
"""Ways to say on the command line that there is to be none."""


def config_files(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the config files from the other arguments, so that those win wherever they stand.

    >>> config_files(["--model.every=2", "-c", "a.yaml", "--config=b.yaml"])
    (['a.yaml', 'b.yaml'], ['--model.every=2'])

    Args:
        args: The command line without the command.

    Returns:
        The config files, and all that is left.
    """
    files, rest = [], []
    left = iter(args)
    for arg in left:
        if arg in ("-c", "--config"):
            if (file := next(left, None)) is None:
                raise Mistake(f"{arg} needs a file; give a config in YAML, such as configs/quickstart.yaml")
            files.append(file)
        elif arg.startswith("--config="):
            files.append(arg.partition("=")[2])
        elif arg.startswith("-c") and not arg.startswith("--"):
            files.append(arg[2:].removeprefix("="))
        else:
            rest.append(arg)
    return files, rest


def checkpoint_path(contents: Iterable[Mapping[str, Any]], rest: Sequence[str]) -> str | None:
    """Finds the checkpoint that the command line or else the last of the config files names."""
    path = None
    for content in contents:
        path = content.get("ckpt_path", path)
    for arg, following in pairwise([*rest, ""]):
        if arg == "--ckpt_path":
            path = following
        elif arg.startswith("--ckpt_path="):
            path = arg.partition("=")[2]
    return None if path in (None, *OFF) else str(path)


def switched_off(rest: Sequence[str], keys: Container[str]) -> tuple[set[str], list[str]]:
    """Finds the parts that the command line switches off, such as ``--sparsity null``, as config files may, too.

    >>> switched_off(["--sparsity=null", "--model.every=2"], ["sparsity"])
    ({'sparsity'}, ['--model.every=2'])

    Returns:
        Their keys, and the other arguments.
    """
    off, left = set(), []
    arguments = iter(rest)
    for arg in arguments:
        key, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or key not in keys:
            left.append(arg)
            continue
        value = value if equals else next(arguments, "")
        if value in OFF:
            off.add(key)
        else:
            left += [f"--{key}={value}"] if value else [f"--{key}"]
    return off, left


def with_fresh_adapters(args: Sequence[str], contents: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Clears ``model.adapter`` before an argument that names another kind than the one below.

    jsonargparse would hand on what both kinds know: the layers that a LoRA wraps, to a RepAdapter that wraps others.

    >>> with_fresh_adapters(["--config=a", "--model.adapter=RepAdapter"], {"a": {"model": {"adapter": "LoRA"}}})
    ['--config=a', '--model.adapter=null', '--model.adapter=RepAdapter']

    Args:
        args: The command line without the command, in the order in which it is read.
        contents: Of the config files among them.
    """
    fresh, below = [], None
    for arg, following in pairwise([*args, ""]):
        key, equals, value = arg.partition("=")
        adapter: Any = None
        if key == "--config":
            section = contents[value].get("model")
            adapter = section.get("adapter") if isinstance(section, dict) else None
        elif key == "--model.adapter":
            adapter = value if equals else following
        name = adapter.get("class_path") if isinstance(adapter, dict) else adapter
        if isinstance(name, str) and name not in OFF:
            kind = name.rpartition(".")[2]
            if below not in (None, kind):
                fresh.append("--model.adapter=null")
            below = kind
        fresh.append(arg)
    return fresh


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would drop the first one and all below it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(file: str, sections: Container[str]) -> dict[str, Any]:
    """Reads a config file.

    Raises:
        Mistake: If it cannot be read, is no YAML, or holds no keys, or a section of it holds none.
    """
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise Mistake(f"there is no config file {file!r}{_beside(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"config file {file} cannot be read: {one_line(error)}") from error
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise Mistake(f"config file {file} is not valid YAML{where}: {one_line(error.problem or error)}") from error
    except yaml.YAMLError as error:
        raise Mistake(f"config file {file} is not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise Mistake(f"config file {file} is nested too deeply") from error
    if _is_huge(content):
        raise Mistake(
            f"config file {file} stands for more than {MAX_VALUES:,} values; aliases may repeat too much of it"
        )
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise Mistake(f"config file {file} holds no keys; expected a mapping such as 'model: {{every: 3}}'")
    for key, value in content.items():
        if key in sections and not (isinstance(value, dict | str) or value is None or value is False):
            raise Mistake(f"config file {file}: {key} must be a mapping, as in '{key}: {{NAME: VALUE}}', not {value!r}")
    return content


def _is_huge(content: Any) -> bool:
    """Says whether all values, repeated ones as often as they are repeated, are too many; also those without end."""
    left, count = [content], 0
    while left and count <= MAX_VALUES:
        part = left.pop()
        count += 1
        if isinstance(part, dict | list):
            left += part.values() if isinstance(part, dict) else part
    return bool(left)


def _beside(file: str) -> str:
    from dynadapter.cli.errors import nearest

    folder = Path(file).parent
    there = [str(path) for path in sorted(folder.glob("*.y*ml"))] if folder.is_dir() else []
    return nearest(file, there) or (f"; in {folder} are: {', '.join(there)}" if there else "")


def checkpoint_settings(path: str, command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads from a checkpoint what a config would say of its model and its data.

    Args:
        path: The file.
        command: Of the command line. All take the data of the training; ``predict`` takes only how it read images.

    Returns:
        What lies below the config files, and what lies above them: how images are read for ``predict``, since what a
        config says of another task's data must not change that.

    Raises:
        Mistake: If there is no such file, or it is not one that fit wrote.
    """
    if not Path(path).is_file():
        there = "is a folder" if Path(path).is_dir() else "does not exist"
        raise Mistake(f"checkpoint {path} {there}; give --ckpt_path the file that fit wrote, such as {_newest(path)}")
    try:
        checkpoint = read(path)
    except ValueError as error:
        raise Mistake(f"{error}; give --ckpt_path a file that fit wrote") from error
    try:
        return _layers(checkpoint, command, Path(path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Mistake(f"{path} was not written by dynadapter fit; give --ckpt_path a file that was") from error


def _layers(checkpoint: dict[str, Any], command: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        ours = saved_contents({"dynadapter": dict(checkpoint["dynadapter"])})
    except ValueError as error:
        raise Mistake(f"{path}: {error}") from error
    known = set(inspect.signature(ExitClassifier).parameters) - {*LINKED, "optimizer"}  # which no checkpoint holds
    model = {name: plain(value) for name, value in checkpoint["hyper_parameters"].items() if name in known}
    check_saved([model, ours.get("preprocessing")])
    settings: dict[str, Any] = {"model": model}
    if root := run_root(path):
        settings["trainer"] = {"default_root_dir": str(root)}
    if command != "predict":
        data = ours.get("data")
        if data is not None and data_class(data["class_path"]):
            check_saved(data)
            settings["data"] = plain(data)
        return settings, {}
    if not ours["preprocessing"]:
        return settings, {}
    reading = {**plain(ours["preprocessing"]), "class_names": ours["class_names"]}
    return settings, {"data": {"class_path": "dynadapter.ImagesToPredict", "init_args": reading}}


def run_root(checkpoint: Path) -> Path | None:
    """Gives the folder that holds the run of a checkpoint, so that what is measured lies beside it.

    >>> run_root(Path("runs/digits/version_3/checkpoints/last.ckpt")).as_posix()
    'runs/digits'
    """
    folder = checkpoint.parent
    return folder.parent.parent if folder.name == "checkpoints" and folder.parent.name.startswith("version_") else None


def _newest(path: str) -> str:
    """Names the newest checkpoint in or near a folder, or the usual place where there is none."""
    folder = next((p for p in (Path(path), *Path(path).parents) if p.is_dir()), Path())
    near = ("*.ckpt", "checkpoints/*.ckpt", "version_*/checkpoints/*.ckpt", "*/version_*/checkpoints/*.ckpt")
    found = sorted((file for pattern in near for file in folder.glob(pattern)), key=lambda file: file.stat().st_mtime)
    return str(found[-1]) if found else "runs/version_0/checkpoints/last.ckpt"
