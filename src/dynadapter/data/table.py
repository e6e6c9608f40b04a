"""Read images from a CSV or Parquet file with paths and labels."""

import csv
import importlib.util
import io
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dynadapter.data.base import ImageData, Split
from dynadapter.data.classes import sorted_names
from dynadapter.data.dataset import Sample
from dynadapter.data.folder import SPLITS
from dynadapter.data.held_out import HeldOutData
from dynadapter.data.lists import CONTROL, listed_files, read_text
from dynadapter.data.splits import MissingSplit
from dynadapter.data.test_sets import check_test_sets, open_test_sets
from dynadapter.files import shown

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path"),
    "label": ("label", "class", "category", "target"),
    "split": ("split", "set", "subset"),
}
"""The names of columns that are found without being given; case does not matter."""
SEPARATORS = "|;,"
"""What stands between the labels of an image that has several."""
ONE_LABEL = "an image has one label, multi-label data cannot be used"
Table = tuple[list[str], Callable[[list[str]], Iterator[tuple[int, dict[str, Any]]]]]
"""The names of the columns, and a function that reads some of them as rows with their numbers."""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        path: Path of the image, as in the table.
        label: Class of the image.
        split: ``train``, ``val`` or ``test``.
        place: File and number of the row, for messages. The header of a CSV file is row 1.
    """

    path: str
    label: str
    split: Split
    place: str


class ImageTable(HeldOutData):
    """Images in a CSV or Parquet file, one per row, with paths and labels.

    A column of splits has ``train``, ``val`` (or ``valid``, ``validation``) and ``test``; case does not matter. Without
    this column all images are for training. Without images of ``val``, a fraction of each class of ``train`` is held
    out, each image by a hash of its path in the table. Added rows therefore do not change the split of the others.

    Classes are the labels sorted alphabetically, or by value if all are whole numbers. An image has one label.

    Args:
        file: ``.csv`` with a header, or ``.parquet`` (needs the extra ``parquet``).
        root: Folder of all images, to which paths are relative; None for the folder of the table.
        path_column: Name of the column of paths; None finds ``path``, ``file``, ``filename``, ``image`` and the like.
        label_column: Name of the column of labels; None finds ``label``, ``class``, ``category`` or ``target``.
        split_column: Name of the column of splits; None finds ``split``, ``set`` or ``subset``, if there is one.
        test_sets: Further test sets by name: tables in their folders. Each is measured after the first as
            ``test/NAME/...``, by its test split, or by all of its images if it has none. Its classes must be among
            those of the training.
        kwargs: As for :class:`~dynadapter.data.held_out.HeldOutData`.
    """

    validation_switch = "val_fraction above 0, or add rows for val"

    def __init__(
        self,
        file: str | Path,
        root: str | Path | None = None,
        path_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
        test_sets: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.file = Path(os.path.expanduser(file))
        self.folder = self.file.parent if root is None else Path(os.path.expanduser(root))
        self.test_sets = check_test_sets(test_sets)
        if not self.file.is_file():
            raise ValueError(f"{self.file} does not exist or is not a file; give a .csv or .parquet file")
        if not self.folder.is_dir():
            raise ValueError(f"root {self.folder} does not exist or is not a folder")
        given = {"path": path_column, "label": label_column, "split": split_column}
        self.rows = read_rows(self.file, given)
        self.class_names = sorted_names({row.label for row in self.rows})
        _require_one_label(self.rows, self.class_names)

    def samples(self, split: Split) -> list[Sample]:
        rows = [row for row in self.rows if row.split == split]
        if split != "test" and not any(row.split == "val" for row in self.rows):
            train = [row for row in self.rows if row.split == "train"]
            rows = self.half(split, train, [(row.label, os.path.normpath(row.path)) for row in train])
        if not rows and split != "val":
            there = ", ".join(sorted({row.split for row in self.rows}))
            raise MissingSplit(f"{self.file} has no row for {split}; it has rows for: {there}")
        index = {name: label for label, name in enumerate(self.class_names)}
        files = listed_files(rows, self.folder, missing=self.on_error == "skip")
        return [(file, index[row.label]) for file, row in zip(files, rows, strict=True)]

    def further_tests(self) -> list[ImageData]:
        def build(settings: dict[str, Any], place: str) -> ImageTable:
            other = ImageTable(**{**settings, "file": place, "root": None})
            if not any(row.split == "test" for row in other.rows):
                other.rows = [row._replace(split="test") for row in other.rows]
            return other

        return open_test_sets(self, self.test_sets, build)

    def listed(self) -> list[Path]:
        return [self.folder / row.path for row in self.rows]


def read_rows(file: Path, given: dict[str, str | None]) -> list[Row]:
    """Read the rows of a table.

    Args:
        file: ``.csv`` or ``.parquet``.
        given: The names of the columns ``path``, ``label`` and ``split``; None finds them by :data:`COLUMNS`.

    Raises:
        ValueError: The file is not a table, a column is missing, or a row lacks a value, has an unknown split or a
            control character.
    """
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"{file} is not a table; give a file that ends in .csv or .parquet")
    names, read = _open_csv(file) if suffix == ".csv" else _open_parquet(file)
    columns = {part: _column(file, part, name, names) for part, name in given.items()}
    _require_distinct(file, names, columns.values())
    rows = []
    for number, row in read([column for column in columns.values() if column is not None]):
        place = f"{file}:{number}"
        texts = {part: _text(row[column], place, column) for part, column in columns.items() if column is not None}
        if lacking := [str(columns[part]) for part in ("path", "label") if not texts[part]]:
            raise ValueError(f"{place}: there is nothing in column {lacking[0]!r}")
        for part in ("path", "label"):
            if CONTROL.search(texts[part]):
                raise ValueError(f"{place}: {texts[part][:80]!r} in column {columns[part]!r} has a control character")
        label = unicodedata.normalize("NFC", texts["label"])  # macOS and Linux encode accents differently
        rows.append(Row(texts["path"], label, _split(texts.get("split", "train"), place), place))
    if not rows:
        raise ValueError(f"{file} lists no image")
    return rows


def _open_csv(file: Path) -> Table:
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True, skipinitialspace=True)

    @contextmanager
    def checked() -> Iterator[None]:
        try:
            yield
        except csv.Error as error:
            raise ValueError(f"{file}:{reader.line_num + 1}: {error}; check the quotes") from error

    def rows(columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        with checked():
            for row in reader:
                more = row.get(None) or []
                if any(cell.strip() for cell in more):  # a blank one is a comma at the end
                    raise ValueError(
                        f"{file}:{reader.line_num}: {len(names) + len(more)} cells under a header of {len(names)}; "
                        "quote values with commas"
                    )
                yield reader.line_num, row

    with checked():
        names = list(reader.fieldnames or [])
    return names, rows


def _open_parquet(file: Path) -> Table:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{file} needs pyarrow; install it by pip install 'dynadapter[parquet]', or give a .csv")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema, read_table

    def rows(columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        return iter(enumerate(read_table(file, columns=columns).to_pylist(), start=1))

    try:
        names = read_schema(file).names
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file: {str(error).splitlines()[0]}") from error
    return names, rows


def _require_distinct(file: Path, names: Sequence[str], wanted: Iterable[str | None]) -> None:
    """Raise a ValueError if several columns have a wanted name, because only the last would be read."""
    if twice := [name for name in wanted if name is not None and names.count(name) > 1]:
        raise ValueError(f"{file}: several columns are called {twice[0]!r:.80}; rename or remove all but one")


def _column(file: Path, part: str, given: str | None, names: Sequence[str]) -> str | None:
    """Return the name of a column; None if there is no column of splits."""
    there = ", ".join(names) or "none"
    if given is not None:
        if given not in names:
            raise ValueError(f"{file} has no column {given!r}; its columns are: {there}")
        return given
    spelled = ([name for name in names if name.strip().lower() == word] for word in COLUMNS[part])
    found = next((list(dict.fromkeys(here)) for here in spelled if here), [])
    if len(found) > 1:
        both = ", ".join(map(repr, found))
        raise ValueError(f"{file} has several columns for the {part}: {both}; set {part}_column to one of them")
    if not found and part != "split":
        raise ValueError(
            f"{file} has no column called {' or '.join(COLUMNS[part][:2])}; set {part}_column to one of: {there}"
        )
    return found[0] if found else None


def _text(value: Any, place: str, column: str) -> str:
    if isinstance(value, list | tuple | dict):
        raise ValueError(f"{place}: {column} holds several values; {ONE_LABEL}")
    return "" if value is None else str(value).strip()


def _split(word: str, place: str) -> Split:
    for split, names in SPLITS.items():
        if word.lower() in names:
            return split  # type: ignore[return-value]
    raise ValueError(f"{place}: unknown split {word!r:.40}; use train, val or test")


def _require_one_label(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raise a ValueError for an image with several labels, or in several splits."""
    known = set(names)
    for row in rows:
        for separator in SEPARATORS:
            parts = [part.strip() for part in row.label.split(separator)]
            if len(parts) > 1 and known.issuperset(parts):
                raise ValueError(f"{row.place}: {row.label!r:.100} names {len(parts)} classes; {ONE_LABEL}")
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(os.path.normpath(row.path), row)
        if other.label != row.label:
            raise ValueError(
                f"{row.place}: image {shown(row.path)} is {shown(row.label)} here and {shown(other.label)} in "
                f"{other.place}; {ONE_LABEL}"
            )
        if other.split != row.split:
            raise ValueError(
                f"{row.place}: image {shown(row.path)} is for {row.split} here and for {other.split} in {other.place}; "
                "an image belongs to one split"
            )
