"""Tables on the terminal show names as they are."""

import pytest
from rich.table import Table

from dynadapter.printing import print_tables


@pytest.mark.parametrize("name", ["[red]", "[/]", "[link=http://a]b[/link]", ":smile:", "[bold]x[/bold]", "a\\[b"])
def test_names_are_no_markup(name, capsys):
    table = Table(title=f"title {name}", caption=f"caption {name}")
    table.add_column(f"column {name}")
    table.add_row(f"cell {name}")
    print_tables(table)
    printed = capsys.readouterr().out
    for part in ("title", "column", "cell", "caption"):
        assert f"{part} {name}" in printed


@pytest.mark.parametrize("name", ["\x1b[31mred", "\x9b31m", "a\rb", "right\u202eleft", "\u2066x", "a\u2028b", "\udce9"])
def test_codes_are_not_sent_to_the_terminal(name, capsys):
    table = Table()
    table.add_column("name")
    table.add_row(name)
    print_tables(table)
    printed = capsys.readouterr().out
    assert not set(printed) & set("\x1b\x9b\r\u202e\u2066\u2028\udce9")
    assert name.encode("unicode_escape").decode() in printed
