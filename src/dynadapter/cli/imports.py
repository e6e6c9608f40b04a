"""``--import MODULE``: import a user's module before a command, so that files may name its classes.

Checkpoints, run folders and bundles may name classes that are loaded already, and import none. With this option, which
only the command line or the environment can give, a user names the modules to trust.
"""

import os
import sys
from importlib import import_module

from dynadapter.cli.configs import take
from dynadapter.cli.errors import Mistake, one_line

OPTION = "--import"
VARIABLE = "DYNADAPTER_IMPORT"
"""The same for all commands: names with commas between them. Further processes of a command find them here."""


def take_imports(args: list[str]) -> list[str]:
    """Move the modules that ``--import`` names into the environment, and return the other arguments."""
    given, left = take(args, f"{OPTION} needs the name of a module, as in {OPTION} my_parts", OPTION)
    names = [name for part in (os.environ.get(VARIABLE, ""), *given) for name in part.split(",") if name]
    if names:
        os.environ[VARIABLE] = ",".join(dict.fromkeys(names))
    return left


def import_own() -> None:
    """Import the modules; the working folder is searched last."""
    names = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # the module can raise anything
            hint = "; give its name without .py" if name.endswith(".py") or "/" in name else ""
            raise Mistake(f"{OPTION} {name}: {type(error).__name__}: {one_line(error)}{hint}") from error


def given() -> list[str]:
    """Return the arguments by which another command line imports the same modules."""
    names = os.environ.get(VARIABLE, "")
    return [f"{OPTION}={names}"] if names else []
