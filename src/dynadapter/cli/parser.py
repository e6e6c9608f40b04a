"""A parser for the commands that take a handful of settings and no Lightning."""

from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from dynadapter.cli.errors import Mistake, explain


class CommandParser(ArgumentParser):
    """Reads ``--KEY VALUE`` settings, and says in one line what is wrong with them.

    Args:
        command: Its name on the command line.
        description: What it does, in a sentence.
    """

    def __init__(self, command: str = "", description: str = "", **kwargs: Any) -> None:
        # jsonargparse makes parsers of this class for its own use, too.
        own = {"prog": f"dynadapter {command}", "usage": f"dynadapter {command} [--KEY VALUE ...]"} if command else {}
        # A key cut short would be taken for the long one, and a slip of the pen go unnoticed.
        super().__init__(**{**own, "description": description, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises a :class:`Mistake`."""
        no_keys = ("help", "print_shtab", "==SUPPRESS==")
        keys = [action.dest for action in self._actions if action.dest not in no_keys]
        raise Mistake(explain(message, {}, keys)) from ex
