"""Count the files of a folder of images by split, or by the reason why they are not read."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dynadapter.files import shown
from dynadapter.images.reading import SUFFIXES

HIDDEN, BROKEN, LINKED, OUTSIDE = "hidden", "broken links", "behind links to folders", "images in no split"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Account:
    """The files of a folder.

    Args:
        folder: The folder.
        read: Number of files of each split.
        left_out: Number of other files by the reason why they are not read, such as ``.heic`` or ``hidden``.
        items: Paths of the files that no list names and that are not hidden.
        missing: Files of the splits that do not exist.
    """

    folder: Path
    read: Mapping[str, int]
    left_out: Mapping[str, int]
    items: tuple[str, ...] = ()
    missing: int = 0

    def __str__(self) -> str:
        parts = [f"{count:,} {name}" for name, count in (*self.read.items(), *self.left_out.items()) if count]
        total = sum(self.read.values()) + sum(self.left_out.values())
        more = f"; {self.missing:,} more are listed and missing" if self.missing else ""
        return f"{total:,} files in {shown(self.folder)} = {' + '.join(parts) or '0'}{more}"


def account(
    folder: Path,
    splits: Mapping[str, Iterable[str | Path]],
    unread: Iterable[str] = (),
    unused: Mapping[str, Iterable[str | Path]] | None = None,
) -> Account:
    """Count the files of a folder and its subfolders.

    Args:
        folder: The folder.
        splits: The files that are read, by the name of their split.
        unread: Files of ``splits`` that cannot be decoded.
        unused: Other known files by the reason why they are not read; files of a split among them are ignored.
    """
    groups = {**(unused or {}), **dict(reversed(list(splits.items()))), UNREADABLE: unread}
    place = {os.path.normpath(path): group for group, paths in groups.items() for path in paths}
    top = os.path.normpath(folder)
    followed = {parent for path in place for parent in _parents(path, top)}
    read, left_out, items = Counter(dict.fromkeys(splits, 0)), Counter[str](), []
    for path, reason in _walk(top, followed):
        if (group := place.pop(path, None)) is not None:
            (read if group in read else left_out)[group] += 1
            continue
        suffix = os.path.splitext(path)[1].lower()
        why = reason or (OUTSIDE if suffix in SUFFIXES else suffix or "without suffix")
        left_out[why] += 1
        if why != HIDDEN:
            items.append(os.path.relpath(path, folder))
    missing = sum(not os.path.exists(path) for path in place)
    return Account(folder, read, dict(left_out.most_common()), tuple(sorted(items)), missing)


def _parents(path: str, folder: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) != path and len(parent) >= len(folder):
        yield (path := parent)


def _walk(folder: str, followed: set[str]) -> Iterator[tuple[str, str]]:
    """Yield every file below a folder, with the reason why it cannot be read by a data set; "" without one.

    A link to a folder is followed if files behind it are read, such as a class folder that is a link. Files behind
    other links are counted. A link back into the folder is not followed twice.
    """
    root, folders = os.path.realpath(folder), [("" if folder == "." else folder, "")]  # paths in "." have no "./"
    while folders:
        place, reason = folders.pop()
        with os.scandir(place or ".") as entries:
            for entry in entries:
                path, why = os.path.join(place, entry.name), reason or HIDDEN * entry.name.startswith(".")
                if entry.is_dir(follow_symlinks=False) or (entry.is_dir() and path in followed):
                    folders.append((path, why))
                elif entry.is_dir():
                    target = os.path.realpath(path)
                    inside = (target + os.sep).startswith(root + os.sep) or (root + os.sep).startswith(target + os.sep)
                    if not inside:
                        yield from ((file, why or LINKED) for file in _files(path))
                elif entry.is_symlink() and not entry.is_file():
                    yield path, why or BROKEN
                else:
                    yield path, why


def _files(folder: str) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        yield from (os.path.join(place, name) for name in names)
