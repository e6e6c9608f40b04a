"""Write a table of predictions as CSV, JSON lines or Parquet."""

import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dynadapter.files import replacing

COLUMNS = ("file", "class", "confidence", "exit")
PROBABILITY = "probability_"
"""Begins the name of the column with a class's probability; the class's name follows."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of what a spreadsheet takes for a formula."""
SPECIAL = re.compile(r'[",;\t\r\n]')
"""What a cell holds only in quotes."""

ENDINGS = "give a name that ends in .csv, .jsonl or .parquet"

Row = list[Any]
"""Values of a table's columns for one image: texts and finite numbers."""


class Unread(NamedTuple):
    """An image that could not be read, and why."""

    file: str
    reason: str


def write_table(file: BinaryIO, suffix: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a table into an open file."""
    _WRITERS[suffix.lower()](file, columns, rows)


def check_output(output: Path, overwrite: bool) -> None:
    """Check that an output can be written.

    Raises:
        ValueError: The suffix is not a known format, the format needs a missing package, or the file exists.
    """
    suffix = output.suffix.lower()
    if output.is_dir():
        raise ValueError(f"{output} is a folder; {ENDINGS}")
    if suffix not in _WRITERS:
        raise ValueError(f"{output} names no format; {ENDINGS}")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{output} needs pyarrow; install it by pip install 'dynadapter[parquet]', or name a .csv")
    if os.path.lexists(output) and not overwrite:
        raise ValueError(f"{output} exists; give another name, or overwrite it")


def write_unread(path: Path, found: Sequence[Unread]) -> None:
    """Write the list of images that could not be read, or remove an old list if there are none."""
    if not found:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as file:
        _write_csv(file, Unread._fields, found)


def _write_csv(file: BinaryIO, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    # Python reads file names that are not UTF-8 with surrogateescape; written so, they are the same bytes.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
    digits = [f".{6 if name.startswith(PROBABILITY) else 4}f" for name in columns]
    text.write(",".join(map(cell, columns)) + "\n")
    for row in rows:
        cells = [
            cell(_number(value, form), path=name == "file")
            for name, value, form in zip(columns, row, digits, strict=True)
        ]
        text.write(",".join(cells) + "\n")
    text.detach()


def _number(value: Any, form: str) -> Any:
    return format(value, form) if isinstance(value, float) else value


def cell(value: Any, path: bool = False) -> str:
    """Return a value as a cell of a CSV file that a spreadsheet reads as text and not as a formula.

    >>> print(cell("=1+1"), cell("-a.png", path=True), cell("a;b"))
    '=1+1 ./-a.png "a;b"
    """
    text = str(value)
    if isinstance(value, str) and text.startswith(FORMULA):
        text = f"./{text}" if path else f"'{text}"
    return '"' + text.replace('"', '""') + '"' if SPECIAL.search(text) else text


def _write_json_lines(file: BinaryIO, columns: Sequence[str], rows: Iterable[Row]) -> None:
    for row in rows:
        content = dict(zip(columns, row, strict=True))
        try:
            line = json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a file name that is not text in any encoding
            line = json.dumps(content).encode()
        file.write(line + b"\n")


def _write_parquet(file: BinaryIO, columns: Sequence[str], rows: Iterable[Row]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    def kind(name: str) -> Any:
        if name == "exit":
            return pyarrow.int32()
        return pyarrow.float64() if name.startswith(("confidence", PROBABILITY)) else pyarrow.string()

    def valid(value: Any) -> Any:  # Arrow takes UTF-8 alone
        return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value

    schema = pyarrow.schema([(valid(name), kind(name)) for name in columns])
    stream = iter(rows)
    with ParquetWriter(file, schema) as writer:
        while part := list(islice(stream, 10_000)):
            values = [[valid(value) for value in column] for column in zip(*part, strict=True)]
            arrays = [pyarrow.array(column, entry.type) for column, entry in zip(values, schema, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


_WRITERS: dict[str, Callable[[BinaryIO, Sequence[str], Iterable[Row]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}
