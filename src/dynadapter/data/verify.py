"""Check a data set before a run: decode every image, count, and find duplicates."""

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from dynadapter.data.base import ImageData, Split
from dynadapter.data.classes import match_classes
from dynadapter.data.clips import Clip
from dynadapter.data.identity import Source, combine_hashes, image_hash
from dynadapter.data.library_images import LibraryImage
from dynadapter.data.splits import MissingSplit
from dynadapter.data.test_sets import with_one_test_set
from dynadapter.data.vtab import VTAB1k
from dynadapter.files import one_line
from dynadapter.images.accounting import Account
from dynadapter.images.reading import UnreadableImage, load_image
from dynadapter.images.values import Range

SPLITS: tuple[Split, ...] = ("train", "val", "test")
Level = Literal["error", "warning"]


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One finding about a data set.

    Args:
        level: ``error`` if a training or its results would be wrong, else ``warning``.
        kind: One word, for programs.
        text: One line, for readers.
        items: The images, classes or files that it concerns.
    """

    level: Level
    kind: str
    text: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitReport:
    """The contents of a split.

    Args:
        name: ``train``, ``val``, ``test``, or ``test/NAME`` for a further test set.
        images: Number of images.
        unreadable: Number of images that cannot be decoded.
        classes: Number of images of each class.
        smallest: Width and height of the smallest image in pixels; None if no image can be decoded.
        largest: The same for the largest image.
        hash: :func:`dynadapter.data.identity.data_hash`, as in a run's ``run.json``; None if there are unreadable
            images.
    """

    name: str
    images: int
    unreadable: int
    classes: dict[str, int]
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    hash: str | None


@dataclass(frozen=True)
class Report:
    """The result of :func:`verify`.

    Args:
        data: Name of the data module's class.
        folder: Folder of the images; empty for images in memory.
        class_names: In the order of their indices.
        splits: The splits that exist.
        findings: Errors first.
        account: Counts of all files of the folder in one line, by split or by the reason why they are not read.
    """

    data: str
    folder: str
    class_names: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    findings: tuple[Finding, ...]
    account: str = ""

    def count(self, level: Level) -> int:
        """Return the number of errors or warnings."""
        return sum(finding.level == level for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {"errors": self.count("error"), "warnings": self.count("warning"), **asdict(self)}


# ---- checking --------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """The result of decoding an image; `reason` is empty if it could be decoded."""

    split: str
    source: Source
    name: str
    label: int
    hash: str
    size: tuple[int, int]
    reason: str


def verify(
    data: ImageData, *, threads: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Decode every image of a data set and report what is missing, broken, duplicated, or in two splits.

    Images are equal if their bytes are equal. The public lists of VTAB-1k are fixed and contain a few duplicates; for
    these tasks duplicates are warnings, unless one split repeats half of another.

    Args:
        data: Any data module. Errors in its lists and folders are reported as findings.
        threads: Number of decoding threads; None for a few more than there are cores.
        progress: Called with the number of checked images and the number of all images.
    """
    data = copy(data)
    data.on_error = "skip"  # missing files are reported together with the unreadable ones
    folder: Path | None = getattr(data, "folder", None)
    findings: list[Finding] = []
    listed: list[tuple[str, Source, int]] = []
    for split in SPLITS:
        try:
            listed += [(split, source, int(label)) for source, label in data.used(split)]
        except (ValueError, OSError) as error:
            level: Level = "warning" if isinstance(error, MissingSplit) and split == "test" else "error"
            findings.append(Finding(level, "split", one_line(error)))
    for part in with_one_test_set(data):
        try:
            for other in part.further_tests():
                index = match_classes(other.class_names, data.class_names)
                listed += [(other.test_label, source, index[label]) for source, label in other.samples("test")]
        except (ValueError, OSError) as error:
            findings.append(Finding("error", "split", one_line(error)))
    entries = _look_at_all(listed, folder, threads, progress, data.preprocess.value_range)
    lenient = isinstance(data, VTAB1k) and data.task is not None
    findings += _find_unreadable(entries)
    findings += _find_duplicates(entries, data.class_names, lenient)
    findings += _find_missing_classes(entries, data.class_names, lenient)
    if isinstance(data, VTAB1k):
        findings += _check_lists(data)
    account = data.account()
    findings += _find_unused(account)
    splits = tuple(_summarise(split, entries, data.class_names) for split in _splits(entries))
    ordered = tuple(sorted(findings, key=lambda finding: finding.level != "error"))
    return Report(type(data).__name__, str(folder or ""), tuple(data.class_names), splits, ordered, str(account or ""))


def _look_at_all(
    listed: list[tuple[str, Source, int]],
    folder: Path | None,
    threads: int | None,
    progress: Callable[[int, int], None],
    value_range: Range | None,
) -> list[_Entry]:
    entries: list[_Entry] = []
    pool = ThreadPoolExecutor(threads)  # Pillow decodes outside the interpreter lock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata and large images
        try:
            progress(0, len(listed))
            looks = pool.map(partial(_look, value_range=value_range), [source for _, source, _ in listed])
            for (split, source, label), look in zip(listed, looks, strict=True):
                entries.append(_Entry(split, source, _name(source, folder, len(entries)), label, *look))
                progress(len(entries), len(listed))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the images that are left
    return entries


def _look(source: Source, value_range: Range | None = None) -> tuple[str, tuple[int, int], str]:
    """Return an image's hash, its size, and why it cannot be decoded."""
    try:
        # First, because it refuses devices and files that are too large to read
        image = source.read()[0] if isinstance(source, Clip) else load_image(source, value_range)
        return image_hash(source), image.size, ""
    except UnreadableImage as error:
        return "", (0, 0), error.reason
    except OSError as error:
        return "", (0, 0), error.strerror or str(error)


def _name(source: Source, folder: Path | None, index: int) -> str:
    if isinstance(source, Image.Image):
        return f"image {index}"
    return str(source) if isinstance(source, LibraryImage) or not folder else os.path.relpath(source, folder)


def _splits(entries: list[_Entry]) -> list[str]:
    """Return the splits that have images: train, val and test, then the further test sets."""
    there = dict.fromkeys(entry.split for entry in entries)
    return sorted(there, key=lambda split: [*SPLITS, *there].index(split))


def _summarise(split: str, entries: list[_Entry], class_names: list[str]) -> SplitReport:
    here = [entry for entry in entries if entry.split == split]
    sizes = sorted((entry.size for entry in here if not entry.reason), key=lambda size: (size[0] * size[1], size))
    unreadable = len(here) - len(sizes)
    counts = Counter(entry.label for entry in here)
    return SplitReport(
        split,
        len(here),
        unreadable,
        {name: counts[label] for label, name in enumerate(class_names)},
        sizes[0] if sizes else None,
        sizes[-1] if sizes else None,
        None if unreadable else combine_hashes((entry.hash, entry.label) for entry in here),
    )


def _find_unreadable(entries: list[_Entry]) -> Iterator[Finding]:
    for split in _splits(entries):
        if bad := tuple(f"{e.name}: {e.reason}" for e in entries if e.split == split and e.reason):
            yield Finding("error", "unreadable", f"{split}: {_images(bad)} cannot be read", bad)


def _find_duplicates(entries: list[_Entry], class_names: list[str], lenient: bool) -> Iterator[Finding]:
    """Find equal images in two classes, in two splits, and in one split."""
    groups: dict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        if not entry.reason:
            groups[entry.hash].append(entry)
    several = [group for group in groups.values() if len(group) > 1]
    torn = [group for group in several if len({entry.label for entry in group}) > 1]
    agreeing = [group for group in several if len({entry.label for entry in group}) == 1]
    level: Level = "warning" if lenient else "error"
    if torn:
        items = tuple(" = ".join(f"{e.name} ({class_names[e.label]})" for e in group) for group in torn)
        yield Finding(level, "contradiction", f"{_images(torn)} with more than one class", items)
    for first, second in combinations(_splits(entries), 2):
        if first not in SPLITS[:2] and second not in SPLITS:  # test sets may overlap
            continue
        if both := [group for group in several if {first, second} <= {entry.split for entry in group}]:
            items = tuple(" = ".join(e.name for e in group if e.split in (first, second)) for group in both)
            smaller = min(sum(entry.split == split for entry in entries) for split in (first, second))
            worse: Level = "error" if 2 * len(both) >= smaller else level
            yield Finding(worse, "leak", f"{_images(both)} of {first} also in {second}", items)
    for split in _splits(entries):
        same = [[entry.name for entry in group if entry.split == split] for group in agreeing]
        if copies := [names for names in same if len(names) > 1]:
            text = f"{split}: {_images(copies)} more than once"
            yield Finding("warning", "copy", text, tuple(" = ".join(names) for names in copies))


def _find_missing_classes(entries: list[_Entry], class_names: list[str], lenient: bool) -> Iterator[Finding]:
    """Find classes without images; a class that is only in val or test can never be predicted."""
    labels = {split: {entry.label for entry in entries if entry.split == split} for split in SPLITS}
    for split in SPLITS:
        if not labels[split] or not labels["train"]:
            continue
        if unseen := tuple(class_names[label] for label in sorted(labels[split] - labels["train"])):
            level: Level = "warning" if lenient else "error"
            yield Finding(level, "unseen", f"{_classes(unseen)} of {split} without an image in train", unseen)
        if empty := tuple(name for label, name in enumerate(class_names) if label not in labels[split]):
            yield Finding("warning", "empty", f"{split}: {_classes(empty)} without an image", empty)


def _check_lists(data: VTAB1k) -> Iterator[Finding]:
    """Compare the lengths of a public task's lists with the benchmark, and train800val200 with its parts."""
    lists = {name.removesuffix(".txt"): [(line.path, line.label) for line in part] for name, part in data.lists.items()}
    if data.task:
        expected = {"train800": 800, "val200": 200, "train800val200": 1000, "test": data.task.test}
        for name, count in expected.items():
            if name in lists and len(lists[name]) != count:
                yield Finding("error", "count", f"{name}.txt lists {len(lists[name]):,} images instead of {count:,}")
    if not all(name in lists for name in ("train800", "val200", "train800val200")):
        return
    parts, whole = lists["train800"] + lists["val200"], lists["train800val200"]
    if Counter(parts) == Counter(whole):
        return
    contents = [Counter((_content(data.folder / path), label) for path, label in part) for part in (parts, whole)]
    if contents[0] != contents[1]:  # else the list names copies of the same images
        missing = [f"missing: {path} {label}" for path, label in Counter(parts) - Counter(whole)]
        added = [f"added: {path} {label}" for path, label in Counter(whole) - Counter(parts)]
        text = "train800val200.txt is not train800.txt and val200.txt together"
        yield Finding("error", "union", text, (*missing, *added))


def _content(path: Path) -> str:
    try:
        return image_hash(path)
    except OSError:
        return str(path)


def _find_unused(account: Account | None) -> Iterator[Finding]:
    """Find files that no split uses, such as photographs in an unknown format."""
    unused = tuple(path for path in account.items if not path.endswith(".txt")) if account is not None else ()
    if unused:
        kinds = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in unused).most_common(5)
        text = f"{len(unused):,} file(s) not used ({', '.join(f'{count:,} {kind}' for kind, count in kinds)})"
        yield Finding("warning", "unused", text, unused)


def _images(items: tuple[Any, ...] | list[Any]) -> str:
    return f"{len(items):,} image{'s' * (len(items) != 1)}"


def _classes(items: tuple[Any, ...]) -> str:
    return f"{len(items):,} class{'es' * (len(items) != 1)}"
