"""``dynadapter --print_shtab=SHELL``: print a script that completes commands, keys, class names and files."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from dynadapter.cli import OWN, TRAINER, USAGE, quiet
from dynadapter.cli.configs import packaged
from dynadapter.cli.errors import Mistake
from dynadapter.cli.help import SHORT

if TYPE_CHECKING:
    import jsonargparse

OPTION = "--print_shtab"
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
CONFIGS = dict.fromkeys(FILES, "_dynadapter_config_file")
"""Functions of a shell that complete a value; the last one is ours: packaged configs, and files."""
PLACES = {"train": FOLDERS, "report": FOLDERS, "sweep": FILES}
"""Commands with arguments without a key, and what these are."""


def run(args: Sequence[str]) -> None:
    """Print the script for the shell that ``--print_shtab=SHELL`` names."""
    try:
        import shtab
    except ImportError as error:
        raise Mistake(f"{OPTION} needs shtab; install it: pip install 'dynadapter[complete]'") from error
    place = next(index for index, arg in enumerate(args) if arg.partition("=")[0] == OPTION)
    shell = args[place].partition("=")[2] or next(iter(args[place + 1 :]), "")
    if shell not in FILES:
        raise Mistake(f"{OPTION} cannot be {shell!r}; choose from {', '.join(FILES)}, as in {OPTION}=bash")
    name, configs = CONFIGS["bash"], " ".join(packaged())
    preamble = {
        "bash": f'{name}() {{ compgen -W "{configs}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{name}() {{ _alternative 'configs:config:({configs})' 'files:file:_files' }}",
    }
    with quiet():
        print(shtab.complete(program(), shell, preamble=preamble[shell]))


def program() -> argparse.ArgumentParser:
    """Return a parser of the whole program for completion: every option, with the values to choose from."""
    made = argparse.ArgumentParser("dynadapter", add_help=False)
    for name in ("--help", "--version", "--debug"):
        made.add_argument(name, action="store_true")
    commands = made.add_subparsers()
    for command in (*TRAINER, *OWN):
        words = next(line.split(maxsplit=1)[1] for line in USAGE.splitlines() if line.startswith(f"  {command} "))
        into = commands.add_parser(command, help=words, add_help=False)
        _add(into, ["--help"], "Show the keys.", nargs=0)
        if command in PLACES:
            into.add_argument("place", nargs="*").complete = PLACES[command]  # type: ignore[attr-defined]
        if command == "configs":
            into.add_argument("name", nargs="?", choices=list(packaged()))
        for parser in _parsers(command):
            for action in parser._actions:
                _add_action(into, action)
        for name, (_, those) in SHORT.items():
            if command in those or (command == "train" and "fit" in those):
                _add(into, [f"--{name}"], f"See dynadapter {command} --help.")
    return made


def _parsers(command: str) -> "Iterator[jsonargparse.ArgumentParser]":
    """Yield the parsers that know the options of a command."""
    if command == "test":
        yield import_module("dynadapter.cli.test_bundle").parser()
    if command in (*TRAINER, "train"):
        yield import_module("dynadapter.cli.arguments").full_parser("fit" if command == "train" else command)
    if command in OWN and command != "configs":
        yield import_module(f"dynadapter.cli.{command}").parser()


def _add_action(into: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Add an option of jsonargparse; for a key that takes a class, also the keys of its settings."""
    from dynadapter.cli.explain import classes_in, parameters, subclasses

    names, hint = action.option_strings, getattr(action, "_typehint", None)
    if not names or action.help == argparse.SUPPRESS or action.dest == "print_shtab":
        return
    if names[0].endswith(".help"):
        _add(into, names, "Show the settings of a class.", _names(hint))
        return
    _add(into, names, action.help, [*map(str, action.choices or ()), *_values(hint)], action.nargs)
    kind = get_origin(hint)
    if names[0].startswith("--trainer.") or (isinstance(kind, type) and issubclass(kind, Sequence)):
        return
    for cls in (below for base in classes_in(hint) for below in subclasses(base)):
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]  # of this very class
        for name in parameters(cls):
            _add(into, [f"{names[0]}.{name}"], f"Of {cls.__name__}.", _values(hints.get(name)))


def _add(
    into: argparse.ArgumentParser,
    names: Sequence[str],
    words: str | None,
    values: Iterable[str] = (),
    nargs: int | str | None = None,
) -> None:
    """Add an option unless it exists; its value is one of `values`, or a file."""
    names, values = [name for name in names if name not in into._option_string_actions], list(dict.fromkeys(values))
    if not names:
        return
    words = " ".join((words or "").split())
    if nargs == 0:
        into.add_argument(*names, action="store_true", help=words)
        return
    action = into.add_argument(*names, nargs=nargs, help=words)
    if values:
        action.choices = values
    else:
        action.complete = CONFIGS if "--config" in names else FILES  # type: ignore[attr-defined]


def _values(hint: Any) -> Iterator[str]:
    """Yield the possible values that the type names: literals, true and false, class names."""
    if hint is bool:
        yield from ("true", "false")
    elif get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif not get_args(hint):
        yield from _names(hint)
    else:
        parts = [part for part in get_args(hint) if not isinstance(part, list)]
        for part in parts:
            if str not in parts or get_origin(part) is Literal:  # else a class is the rare case, such as a strategy
                yield from _values(part)


def _names(hint: Any) -> Iterator[str]:
    from dynadapter.cli.explain import classes_in, subclasses

    for cls in classes_in(hint):
        yield from (below.__name__ for below in subclasses(cls))
