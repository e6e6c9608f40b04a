"""List the images to predict for: from folders, lists, CSV files and single files."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path

from dynadapter.files import read_bytes
from dynadapter.images.reading import find_images

LISTS = (".txt", ".lst", ".list")
"""Suffixes of files that hold one path per line."""
MAX_LIST = 2**28
"""Largest size of a list in bytes; a million lines need a tenth of this."""


def list_images(places: Iterable[str], path_column: str | None = None) -> list[str]:
    """List the images in folders, lists and CSV files, and single images.

    Args:
        places: Folders (searched with their subfolders), text files with one path per line, CSV files, image files.
            Paths in a list are absolute, or relative to its folder; ``~`` is a name like any other. They are only read
            as images.
        path_column: The column of a CSV file that holds the paths; None for the first.
    """
    found: list[str] = []
    for place in (Path(os.path.expanduser(place)) for place in places):
        if not place.exists():
            raise ValueError(f"{place} does not exist; give a folder, a list, a CSV file or an image")
        if place.is_dir():
            found += map(str, find_images(place))
            continue
        if place.suffix.lower() == ".csv":
            names = _column(place, path_column)
        elif place.suffix.lower() in LISTS:
            names = [line.removesuffix("\r") for line in _text(place).split("\n") if line.strip()]
        else:
            found += map(str, find_images(place))
            continue
        if not names:
            raise ValueError(f"{place} lists no image; give a file with one path per line, or a CSV file with a header")
        found += [str(place.parent / name) for name in names]
    return found


def _column(place: Path, name: str | None) -> list[str]:
    try:
        reader = csv.DictReader(io.StringIO(_text(place)))
        columns = list(reader.fieldnames or [])
        wanted = name or next(iter(columns), "")
        if wanted not in columns:
            raise ValueError(f"{place} has no column {wanted!r}; its columns are: {', '.join(columns) or 'none'}")
        return [row[wanted] for row in reader if row[wanted]]
    except csv.Error as error:
        raise ValueError(f"{place} is not a CSV file: {error}") from error


def _text(place: Path) -> str:
    try:
        text = read_bytes(place, MAX_LIST).decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"{place} cannot be read: {error.strerror}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
