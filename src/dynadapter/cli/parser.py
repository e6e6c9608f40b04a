"""The parser of the commands with few settings and no trainer."""

from argparse import HelpFormatter
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from dynadapter.cli.errors import Mistake
from dynadapter.cli.explain import Sections, explain

Options = Mapping[str, tuple[Any, Any, str]]
"""Options of a command by name: type, default, help."""


class CommandParser(ArgumentParser):
    """A parser of ``--KEY VALUE`` settings that explains a mistake in one line.

    Args:
        command: The name on the command line.
        description: What the command does, in one sentence.
        sections: The class behind each key that takes a class.
        short: Print the help without types, and a default only where one is worth a word.
        **kwargs: Passed to jsonargparse.
    """

    def __init__(
        self,
        command: str = "",
        description: str = "",
        sections: Sections = MappingProxyType({}),
        short: bool = False,
        **kwargs: Any,
    ) -> None:
        if short:
            kwargs["formatter_class"] = partial(HelpFormatter, max_help_position=22, width=100)
        # jsonargparse creates parsers of this class for its own use, without a command.
        own = {"prog": f"dynadapter {command}", "usage": f"dynadapter {command} [--KEY VALUE ...]"} if command else {}
        # An abbreviated key would be read as the long one, and a typing error would pass unnoticed.
        super().__init__(**{**own, "description": description, "allow_abbrev": False, **kwargs})
        self.command, self.sections, self.short = command, sections, short

    def add_options(self, options: Options) -> None:
        """Add options; the short help names defaults other than none and false."""
        for name, (kind, default, words) in options.items():
            if self.short and default is not None and default is not False:
                words = f"{words.rstrip('.')} (default: {default})."
            self.add_argument(f"--{name}", type=kind, default=default, help=words)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a :class:`Mistake`."""
        if not self.command:  # the parser of a class inside: the parser outside knows the key
            super().error(message, ex)
        hidden = ("help", "print_shtab", "==SUPPRESS==")
        keys = [action.dest for action in self._actions if action.option_strings and action.dest not in hidden]
        places = [action.dest for action in self._actions if not action.option_strings]
        usage = f", as in: {self.usage}" if places and message.startswith("the following arguments are req") else ""
        raise Mistake(explain(message, self.sections, keys) + usage) from ex
