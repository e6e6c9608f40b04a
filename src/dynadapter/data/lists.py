"""Read lists of images and labels, and check that the files they name lie inside the data's folders."""

import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple

from dynadapter.files import open_regular, shown

LISTS = ("train800.txt", "val200.txt", "train800val200.txt", "test.txt")
LABEL = re.compile("-?[0-9]{1,9}")  # int() alone also accepts '1_0' and digits of other scripts
CONTROL = re.compile("[\x00-\x1f\x7f]")
MAX_LIST = 2**28
"""Lists of more bytes are refused; a million lines need a tenth of this."""


class Line(NamedTuple):
    """A line of a list.

    Attributes:
        path: Path of the image, relative to the folder of the images.
        label: Class index.
        place: List and line number, for messages.
    """

    path: str
    label: int
    place: str


def read_list(file: Path, folder: Path) -> list[Line]:
    """Read a list of lines ``PATH LABEL`` or ``PATH,LABEL``, with paths relative to a folder."""
    lines = []
    whole, relative = f"{os.path.abspath(folder)}/", f"{folder}/"  # lists of some data sets name files from the root
    for number, content in enumerate(read_text(file).split("\n"), start=1):
        if not content.strip():
            continue
        place = f"{file}:{number}"
        path, label = _split(content.strip())
        path = path.removeprefix(whole)
        if path.startswith(relative) and (relative == "./" or not os.path.lexists(folder / path)):
            path = path.removeprefix(relative)
        if not path or not LABEL.fullmatch(label) or CONTROL.search(path):
            given = content.strip()[:100]
            raise ValueError(f"{place}: {given!r} is not 'PATH LABEL', for example 'images/train800/000000.jpg 12'")
        if _leaves_folder(path):
            raise ValueError(f"{place}: path {path[:100]!r} leaves the folder of the images, {shown(folder)}")
        lines.append(Line(path, int(label), place))
    if not lines:
        raise ValueError(f"{file} lists no image")
    return lines


def _split(line: str) -> tuple[str, str]:
    """Split a line at its last space or comma; a path may contain both."""
    path, *label = line.rsplit(maxsplit=1)
    if label and LABEL.fullmatch(label[0]):
        return path.removesuffix(","), label[0]
    path, _, last = line.rpartition(",")
    return path, last


def _leaves_folder(path: str) -> bool:
    if not (path.startswith("/") or ":" in path or "\\" in path or ".." in path):
        return False  # the usual case, without the slow parsing below
    windows = PureWindowsPath(path)  # understands both separators, and drives
    return bool(windows.anchor) or ".." in windows.parts


def listed_classes(lines: Sequence[Line], file: Path | None, expected: int | None = None) -> list[str]:
    """Return the class names of lists: from a file, or numbers up to the expected or the highest label.

    Args:
        lines: The lines of all lists.
        file: File of the class names; None or a missing file for numbers.
        expected: Number of classes, if known.

    Raises:
        ValueError: The file is not valid, or a label is out of range.
    """
    if file is not None and file.is_file():
        names = read_classes(file, expected)
    else:
        highest = max(lines, key=lambda line: line.label)
        if expected is None and highest.label >= len(lines):  # a typing error would create a head of a billion classes
            raise ValueError(
                f"{highest.place}: label {highest.label} is higher than the number of listed images; "
                f"if it is right, name the classes in {file or 'a file, and give it as classes'}"
            )
        names = [str(label) for label in range(expected or max(highest.label, 0) + 1)]
    for line in lines:
        if not 0 <= line.label < len(names):
            raise ValueError(
                f"{line.place}: label {line.label} is out of range; valid labels are 0 to {len(names) - 1}"
            )
    return names


def read_classes(file: Path, expected: int | None = None) -> list[str]:
    """Read class names, one per line.

    Raises:
        ValueError: A name occurs twice, or the number of names is not the expected one.
    """
    names = [name.strip() for name in read_text(file).split("\n") if name.strip()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file} names a class twice: {', '.join(map(shown, twice))}")
    if expected is not None and len(names) != expected:
        raise ValueError(f"{file} names {len(names)} classes; the task has {expected}")
    return names


def read_text(file: Path) -> str:
    """Read a text file in UTF-8 with line breaks of any system."""
    with open_regular(file) as opened:
        content = opened.read(MAX_LIST + 1)
    if len(content) > MAX_LIST:
        raise ValueError(f"{file} has more than {MAX_LIST:,} bytes, too many for a list")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def listed_files(lines: Sequence[Any], folder: Path, root: Path | None = None, missing: bool = False) -> list[Path]:
    """Return the files that the lines of a list or the rows of a table name.

    Args:
        lines: Objects with `path`, and `place` for messages.
        folder: Folder to which paths are relative.
        root: Another folder into which links may lead; None for only `folder`.
        missing: Whether files may be missing.

    Raises:
        ValueError: A path leads out of the folders, or a file is missing.
    """
    check = PathCheck(folder, root or folder)
    files = [folder / line.path for line in lines]
    states = [check.state(file) for file in files]
    if "outside" in states:
        k = states.index("outside")
        raise ValueError(
            f"{lines[k].place}: image {shown(lines[k].path)} leads out of {shown(root or folder)}, to "
            f"{shown(os.path.realpath(files[k]))}; copy the images there, or set root to a folder that holds all images"
        )
    if "missing" in states and not missing:
        k = states.index("missing")
        raise ValueError(
            f"{lines[k].place}: image {shown(lines[k].path)} does not exist in {folder} ({states.count('missing')} of "
            f"the {len(lines)} listed images are missing); paths are relative to that folder"
        )
    return files


class PathCheck:
    """Check whether files lie inside some folders after all links are followed.

    Args:
        folders: A file may lie in any of these.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = [os.path.realpath(folder) for folder in folders]
        self._parents: dict[str, bool] = {}  # most images share a few folders, whose links are followed once

    def state(self, path: Path) -> Literal["file", "missing", "outside"]:
        """Return ``file`` for a regular file inside, ``outside`` for a path that leads out, else ``missing``."""
        parent = os.path.dirname(path)
        if parent not in self._parents:
            self._parents[parent] = self._contains(parent)
        if not self._parents[parent]:
            return "outside"
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                if not self._contains(path):
                    return "outside"
                mode = os.stat(path).st_mode
        except OSError:
            return "missing"
        return "file" if stat.S_ISREG(mode) else "missing"

    def _contains(self, path: str | Path) -> bool:
        real = os.path.realpath(path)
        return any(real == folder or real.startswith(os.path.join(folder, "")) for folder in self.folders)
