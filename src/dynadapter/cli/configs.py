"""Find config files by name, and read them within limits. ``dynadapter configs`` lists the packaged ones."""

import argparse
import difflib
import os
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import dynadapter
from dynadapter.cli.errors import Mistake, mistakes, nearest
from dynadapter.limits import read_yaml


def run(args: list[str]) -> None:
    """Run ``dynadapter configs [NAME]``: print the names of the packaged configs, or one of them."""
    if any(arg.startswith("-") for arg in args) or len(args) > 1:
        print("usage: dynadapter configs [NAME]\n\nList the configs that come with the package, or print one of them.")
        if not {"-h", "--help"} & {*args}:
            raise Mistake(f"configs takes at most one name, not {' '.join(args)!r}")
        return
    if args:
        print(find_config(args[0]).read_text(encoding="utf-8"), end="")
        return
    files = packaged()
    width = max(map(len, files), default=0)
    for name, file in files.items():
        print(f"{name:{width}}  {_first_comment(file)}")


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip(":") for line in lines if line.startswith("#")), "")


def config_files(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the config files from the other arguments of a command, each of which is joined with its value.

    >>> config_files(["--model.every=2", "-c", "a.yaml", "--config=b.yaml", "--sparsity", "null"])
    (['a.yaml', 'b.yaml'], ['--model.every=2', '--sparsity=null'])
    """
    for name in (arg.partition("=")[0] for arg in args):
        if re.fullmatch("-c[a-z_]+", name) and not _is_config(name[2:]):  # argparse would read -config as -c onfig
            raise Mistake(f"there is no option {name}; long options begin with two dashes, as in -{name}")
    files, rest = take(args, "-c needs a file; give a config in YAML, such as -c quickstart", "-c", "--config")
    joined: list[str] = []
    for arg in rest:
        last = joined[-1] if joined else ""
        if last.startswith("--") and "=" not in last and not re.match("-[-a-z]", arg):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return files, joined


def _is_config(name: str) -> bool:
    try:
        find_config(name)
    except Mistake:
        return False
    return True


def take(args: Sequence[str], missing: str, *names: str) -> tuple[list[str], list[str]]:
    """Separate the values of an option from the other arguments; `missing` is the message if one has no value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*names, action="append", default=[], dest="values")
    try:
        given, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise Mistake(missing) from error
    if "" in given.values:
        raise Mistake(missing)
    return given.values, rest


def find_config(name: str) -> Path:
    """Return the file for ``-c NAME``: a local file, or else a packaged config, with or without ``.yaml``."""
    ours = packaged()
    name = os.path.expanduser(name)
    for path in (Path(name), Path(f"{name}.yaml"), ours.get(name.removesuffix(".yaml"))):
        if path is not None and path.is_file():
            return path
    if Path(name).exists():
        raise Mistake(f"config file {name!r} cannot be read: it is not a file; give a YAML file, or -c quickstart")
    folder = Path(name).parent
    beside = [str(path) for path in sorted(folder.glob("*.y*ml"))] if folder.is_dir() else []
    hint = nearest(name, beside) or nearest(name.removesuffix(".yaml"), ours)
    similarity = {key: difflib.SequenceMatcher(None, name, key).ratio() for key in ours}
    names = ", ".join(sorted(ours, key=lambda key: -similarity[key]))
    raise Mistake(f"there is no config file {name!r}{hint or ';'} configs that come with the package: {names}")


def packaged() -> dict[str, Path]:
    """Return the configs of the installed package, or of the source checkout, by name."""
    package = Path(dynadapter.__file__).parent
    for folder in (package / "configs", package.parents[1] / "configs"):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}


def require_no_file(content: Mapping[Any, Any], sections: Container[str], where: str) -> None:
    """Refuse a file as the value of a section: jsonargparse would not check it, and would wait forever for a pipe."""
    for key, value in content.items():
        if key in sections and isinstance(value, str) and os.path.exists(value) and not os.path.isdir(value):
            raise Mistake(f"{where}{key} is the file {value}; give the settings themselves, or a config by -c {value}")


def read_config(name: str, sections: Container[str]) -> dict[str, Any]:
    """Read a config file."""
    file = find_config(name)
    with mistakes():
        content = read_yaml(file)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise Mistake(f"config file {file} holds no keys; expected a mapping such as 'model: {{every: 3}}'")
    require_no_file(content, sections, f"config file {file}: ")
    for key, value in content.items():
        if key in sections and not (isinstance(value, dict | str) or value is None or value is False):
            raise Mistake(f"config file {file}: {key} must be a mapping, as in '{key}: {{NAME: VALUE}}', not {value!r}")
    return content
