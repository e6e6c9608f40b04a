"""Print tables with names as they are: a folder may be called ``[red]``, or hold the codes of a terminal."""

import re
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class PlainConsole(Console):
    """A console that prints text unchanged: no markup, emoji names, terminal codes or change of writing direction."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as rich shows it."""
        shown = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        return super().render_str(shown, **options | {"markup": False, "emoji": False})


def print_tables(*tables: RenderableType, width: int = 100) -> None:
    """Print tables.

    Args:
        tables: Tables of rich.
        width: Least number of columns; a narrow pipe would wrap the names.
    """
    console = PlainConsole()
    console.width = max(console.width, width)
    for table in tables:
        console.print(table)
