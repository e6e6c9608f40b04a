"""Checks a data set to its last image and says all that is wrong with it, without stopping at the first fault."""

import contextlib
import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dynadapter.data.folder import subfolders
from dynadapter.data.identity import row
from dynadapter.data.report import Fault, Report, SetReport, SplitFacts, compared, gone, in_order, names
from dynadapter.data.splits import hold_out
from dynadapter.data.vtab import (
    LISTS,
    VTAB_TASKS,
    Fence,
    Line,
    VTABTask,
    read_classes,
    scan_list,
    task_folder,
    vtab_task,
)
from dynadapter.images.reading import (
    MAX_BYTES,
    SUFFIXES,
    image_files,
    open_image,
    open_regular,
    reason,
    shown,
    to_rgb,
    upright,
)

USUAL_MODES = ("RGB", "L", "P", "RGBA")
Progress = Callable[[str, int, int], None]


def verify(
    data: Literal["VTAB1k", "ImageFolder"],
    root: str | Path,
    task: str | None = None,
    *,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    expected: Mapping[str, Any] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a data set: what it lacks, what is broken, doubled, or in a split where it should not be.

    Every image is decoded. Pillow's own warnings are silenced meanwhile.

    Args:
        data: The class that is to read it.
        root: Its folder.
        task: The task of VTAB-1k; None for all that are there.
        val_fraction: For an `ImageFolder` without ``val``: the share that is held out, as in training.
        split_seed: Decides which.
        expected: An earlier report as `Report.as_dict` gives it; other hashes than in it are errors.
        threads: How many images are decoded at once; None for some more than there are cores.
        progress: Called with the set's name, the images done and their number.

    Raises:
        ValueError: There is nothing to check: the root, the task or every list is missing.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"root {shown(root)} does not exist or is no folder")
    reader = _Reader(threads, progress or (lambda *_: None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if data == "VTAB1k":
            folders = [task_folder(root, task)] if task is not None else _task_folders(root)
            sets = [_check_task(root, folder, reader) for folder in folders]
        elif data == "ImageFolder":
            sets = [_check_folder(root, val_fraction, split_seed, reader)]
        else:
            raise ValueError(f"unknown data {data!r}; choose from: VTAB1k, ImageFolder")
    if expected is not None:
        sets = [compared(one, expected) for one in sets]
        sets += [gone(name) for name in names(expected) if task is None and name not in {one.name for one in sets}]
    there = {known.name for one in sets if (known := vtab_task(one.name))}
    missing = [name for name in VTAB_TASKS if name not in there] if data == "VTAB1k" and task is None else []
    return Report(data, str(root), tuple(sets), tuple(missing))


# ---- images ----------------------------------------------------------------------------------------------------------


class _Image(NamedTuple):
    """What a file is."""

    hash: str | None = None
    why: str | None = None  # it cannot be decoded
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    animated: bool = False


class _Reader:
    """Decodes files, several at once."""

    def __init__(self, threads: int | None, progress: Progress) -> None:
        self.threads = threads
        self.progress = progress

    def read(self, name: str, files: Sequence[Path]) -> dict[Path, _Image]:
        """Read each file once."""
        found: dict[Path, _Image] = {}
        self.progress(name, 0, len(files))
        pool = ThreadPoolExecutor(self.threads)  # Pillow decodes outside the interpreter lock
        try:
            for path, image in zip(files, pool.map(_look, files), strict=True):
                found[path] = image
                self.progress(name, len(found), len(files))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all that are left
        return found


def _look(path: Path) -> _Image:
    content = None
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size <= MAX_BYTES:
                content = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
            with open_image(file) as image:
                to_rgb(upright(image))
                animated = False
                with contextlib.suppress(Exception):  # frames after the first may be broken, nobody looks at them
                    animated = bool(getattr(image, "is_animated", False))
                return _Image(content, None, image.size, image.mode, animated)
    except Exception as error:  # decoders fail with many types on damaged bytes
        return _Image(content, reason(error))


class _Entry(NamedTuple):
    """An image of a split."""

    path: Path
    name: str  # for people
    label: int
    place: str  # the list's line that names it, or nothing


Splits = dict[str, list[_Entry]]


def _facts(name: str, entries: list[_Entry], images: Mapping[Path, _Image]) -> SplitFacts:
    found = [images[entry.path] for entry in entries if entry.path in images]
    sizes = sorted((image.size for image in found if not image.why), key=lambda size: (size[0] * size[1], size))
    whole = hashlib.sha256()
    for entry in entries:
        content = images[entry.path].hash if entry.path in images else None
        if content is None:
            break
        whole.update(row(content, entry.label))
    else:
        content = whole.hexdigest()
    return SplitFacts(
        name,
        images=len(entries),
        readable=len(sizes),
        classes=len({entry.label for entry in entries}),
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
        modes=dict(Counter(image.mode for image in found if not image.why).most_common()),
        hash=content if entries else None,
    )


def _image_faults(splits: Splits, images: Mapping[Path, _Image]) -> Iterator[Fault]:
    """Find what single images have."""
    for name, entries in splits.items():
        found = [(entry, images[entry.path]) for entry in entries if entry.path in images]
        if broken := [f"{entry.name}: {image.why}" for entry, image in found if image.why]:
            yield Fault("error", "unreadable", f"{name}: {_images(broken)} cannot be read", tuple(broken))
        for mode in sorted({image.mode for _, image in found if not image.why and image.mode not in USUAL_MODES}):
            odd = tuple(entry.name for entry, image in found if image.mode == mode and not image.why)
            yield Fault("warning", "mode", f"{name}: {_images(odd)} of mode {mode} will be converted to RGB", odd)
        if moving := tuple(entry.name for entry, image in found if image.animated and not image.why):
            yield Fault(
                "warning", "animated", f"{name}: {_images(moving)} with several frames, the first counts", moving
            )


def _doubles(splits: Splits, images: Mapping[Path, _Image], lenient: bool) -> Iterator[Fault]:
    """Find images of a split that are equal, byte by byte."""
    for name, entries in splits.items():
        groups: dict[str, dict[str, _Entry]] = defaultdict(dict)
        for entry in entries:
            if entry.path in images and (content := images[entry.path].hash):
                groups[content].setdefault(f"{entry.path}\0{entry.label}", entry)
        several = [list(group.values()) for group in groups.values() if len(group) > 1]
        torn = [group for group in several if len({entry.label for entry in group}) > 1]
        same = [group for group in several if len({entry.label for entry in group}) == 1]
        if torn:
            items = tuple(" = ".join(f"{entry.name} (class {entry.label})" for entry in group) for group in torn)
            text = f"{name}: {_images(torn)} in more than one class"
            yield Fault("warning" if lenient else "error", "contradiction", text, items)
        if same:
            items = tuple(" = ".join(entry.name for entry in group) for group in same)
            count = sum(len(group) - 1 for group in same)
            yield Fault("warning", "double", f"{name}: {_copies(count)} of others in it", items)


def _leaks(
    splits: Splits, images: Mapping[Path, _Image], pairs: Sequence[tuple[str, str]], lenient: bool
) -> Iterator[Fault]:
    """Find images that are in two splits.

    In the public tasks of VTAB-1k there are some that are equal, and no one can change that: they are warnings, unless
    a list names the other's very files, or half of a split is the other's.
    """
    for first, second in pairs:
        if not (splits.get(first) and splits.get(second)):
            continue
        known: dict[str, _Entry] = {}
        for entry in splits[first]:
            if entry.path in images and (content := images[entry.path].hash):
                known.setdefault(content, entry)
        both = [
            (entry, known[content])
            for entry in splits[second]
            if entry.path in images and (content := images[entry.path].hash) in known
        ]
        if not both:
            continue
        items = tuple(
            f"{entry.name} = {other.name} of {first}"
            + (f", class {entry.label} and {other.label}" if entry.label != other.label else "")
            for entry, other in both
        )
        torn = sum(entry.label != other.label for entry, other in both)
        files = sum(entry.path == other.path for entry, other in both)
        smaller = min(len(splits[first]), len(splits[second]))
        bad = not lenient or files or 2 * len(both) >= smaller
        text = f"{second}: {_images(both)} {'is' if len(both) == 1 else 'are'} in {first} too"
        text += f", {torn} in another class" if torn else ""
        yield Fault("error" if bad else "warning", "leak", text, items)


def _images(them: Sequence[Any]) -> str:
    return f"{len(them):,} image{'s' * (len(them) != 1)}"


def _copies(count: int) -> str:
    return f"{count:,} image{'s are copies' if count > 1 else ' is a copy'}"


# ---- VTAB-1k ---------------------------------------------------------------------------------------------------------


def _task_folders(root: Path) -> list[Path]:
    """Find the folders that hold lists, or have the name of a task."""
    if any((root / name).is_file() for name in LISTS):
        raise ValueError(
            f"{shown(root)} itself holds the lists of a task: set root to {shown(root.parent)} and task to "
            f"{shown(root.name)}"
        )
    folders = [root / name for name in subfolders(root)]
    found = [path for path in folders if vtab_task(path.name) or any((path / name).is_file() for name in LISTS)]
    if not found:
        advice = "; for train/CLASS/image.png give --data ImageFolder" if (root / "train").is_dir() else ""
        raise ValueError(f"no folder in {shown(root)} holds VTAB lists such as cifar/{LISTS[0]}{advice}")
    return found


def _check_task(root: Path, folder: Path, reader: _Reader) -> SetReport:
    task, fence, faults = vtab_task(folder.name), Fence(root, folder), []
    lists: dict[str, list[Line]] = {}
    for name in LISTS:
        split = name.removesuffix(".txt")
        if not os.path.lexists(folder / name):
            faults.append(Fault("error" if task else "warning", "list", f"{name} is missing"))
            continue
        try:
            lists[split], wrong = scan_list(folder / name)
        except (OSError, ValueError) as error:
            faults.append(Fault("error", "list", f"{name} cannot be read: {_without(folder, error)}"))
            continue
        wrong = [_without(folder, line) for line in wrong]
        if wrong:
            faults.append(Fault("error", "line", f"{name}: {len(wrong):,} of its lines cannot be used", tuple(wrong)))
        elif not lists[split]:
            faults.append(Fault("error", "count", f"{name} lists no image"))
    splits = {
        split: [_Entry(folder / os.path.normpath(line.path), line.path, line.label, _line(line)) for line in lines]
        for split, lines in lists.items()
    }
    classes, class_names, wrong_classes = _classes(folder, task, lists)
    faults += wrong_classes
    faults += _list_faults(splits, task, classes)
    states = {entry.path: fence.state(entry.path) for entries in splits.values() for entry in entries}
    for split, entries in splits.items():
        for state, text in (("missing", "listed, but no such file"), ("outside", "outside the root, behind a link")):
            if lost := tuple(f"{entry.place}: {entry.name}" for entry in entries if states[entry.path] == state):
                faults.append(Fault("error", state, f"{split}: {_images(lost)} {text}", lost))
    images = reader.read(folder.name, [path for path, state in states.items() if state == "file"])
    faults += _image_faults(splits, images)
    faults += _union(splits, images)
    faults += _doubles(splits, images, lenient=task is not None)
    trained = [split for split in ("train800", "val200") if splits.get(split)] or ["train800val200"]
    pairs = [("train800", "val200"), *((split, "test") for split in trained)]
    faults += _leaks(splits, images, pairs, lenient=task is not None)
    unlisted: list[str] = []
    try:
        unlisted = [str(path.relative_to(folder)) for path in image_files(folder) if path not in states]
    except OSError as error:
        faults.append(Fault("error", "unlisted", f"a folder cannot be read: {_without(folder, error)}"))
    if unlisted:
        text = f"{len(unlisted):,} image file{'s are' if len(unlisted) > 1 else ' is'} in no list"
        faults.append(Fault("warning", "unlisted", text, tuple(unlisted)))
    facts = tuple(_facts(split, entries, images) for split, entries in splits.items())
    return SetReport(folder.name, str(folder), classes, facts, len(unlisted), in_order(faults), class_names)


def _line(line: Line) -> str:
    return os.path.basename(line.place)


def _without(folder: Path, message: object) -> str:
    return " ".join(str(message).split()).replace(f"{folder}{os.sep}", "")


def _classes(
    folder: Path, task: VTABTask | None, lists: Mapping[str, list[Line]]
) -> tuple[int | None, tuple[str, ...], list[Fault]]:
    """Say how many classes a task has, by the benchmark, its classes.txt, or its labels; and how they are called."""
    faults = []
    named: tuple[str, ...] = ()
    if os.path.lexists(folder / "classes.txt"):
        try:
            named = tuple(read_classes(folder / "classes.txt", task))
        except (OSError, ValueError) as error:
            faults.append(Fault("error", "classes", _without(folder, error)))
    if task or named:
        return (task.classes if task else len(named)), named, faults
    highest = max((line.label for lines in lists.values() for line in lines), default=-1)
    if highest >= sum(map(len, lists.values())):
        text = f"label {highest} is higher than the number of listed images; if it is right, name them in classes.txt"
        faults.append(Fault("error", "label", text))
        return None, (), faults
    return (highest + 1 if highest >= 0 else None), (), faults


def _list_faults(splits: Splits, task: VTABTask | None, classes: int | None) -> Iterator[Fault]:
    """Find what the lists say wrongly, whatever the images are."""
    wanted = {"train800": 800, "val200": 200, "train800val200": 1000, "test": task.test} if task else {}
    for split, entries in splits.items():
        if split in wanted and len(entries) != wanted[split] and entries:
            text = f"{split}: {len(entries):,} images instead of {wanted[split]:,}"
            yield Fault("error", "count", text)
        low, high = 0, (classes - 1 if classes is not None else None)
        out = [entry for entry in entries if entry.label < low or (high is not None and entry.label > high)]
        if out:
            items = tuple(f"{entry.place}: {entry.name} {entry.label}" for entry in out)
            valid = f"0 to {high}" if high is not None else "0 and above"
            yield Fault(
                "error", "label", f"{split}: {_images(out)} with a label out of range, valid are {valid}", items
            )
        first: dict[Path, _Entry] = {}
        again = [(entry, first[entry.path]) for entry in entries if first.setdefault(entry.path, entry) is not entry]
        if again:
            items = tuple(f"{entry.place}: {entry.name}, as in {other.place}" for entry, other in again)
            torn = any(entry.label != other.label for entry, other in again)
            text = f"{split}: {_images(again)} listed again" + (", under another class" if torn else "")
            yield Fault("error" if torn else "warning", "listed_twice", text, items)
    yield from _class_faults(splits, classes, lenient=task is not None)


def _class_faults(splits: Splits, classes: int | None, lenient: bool) -> Iterator[Fault]:
    """Find classes that no training sees; in VTAB-1k, 800 images of up to 397 classes do not have all of them."""
    train = next((split for split in ("train800", "train800val200") if splits.get(split)), None)
    if train is None:
        return
    seen = {entry.label for entry in splits[train]}
    valid = range(classes or 0)
    unseen = set()
    for split in ("val200", "test"):
        here = sorted({entry.label for entry in splits.get(split, []) if entry.label in valid} - seen)
        unseen |= set(here)
        if here:
            count = f"{len(here)} class{'es' * (len(here) > 1)} of {split} ha{'ve' if len(here) > 1 else 's'}"
            items = tuple(map(str, here))
            yield Fault("warning" if lenient else "error", "unseen", f"{count} no image in {train}", items)
    if empty := [label for label in valid if label not in seen and label not in unseen]:
        text = f"{len(empty)} class{'es have' if len(empty) > 1 else ' has'} no image in {train}"
        yield Fault("warning", "unseen", text, tuple(map(str, empty)))


def _union(splits: Splits, images: Mapping[Path, _Image]) -> Iterator[Fault]:
    """Compare train800val200 with train800 and val200: by their names, or else by what the files hold."""
    if not all(split in splits for split in ("train800", "val200", "train800val200")):
        return
    parts, whole = [*splits["train800"], *splits["val200"]], splits["train800val200"]
    if Counter((e.path, e.label) for e in parts) == Counter((e.path, e.label) for e in whole):
        return

    def content(entry: _Entry) -> tuple[Any, int]:
        image = images.get(entry.path)
        return (image.hash if image and image.hash else entry.path), entry.label

    one, other = Counter(map(content, parts)), Counter(map(content, whole))
    if one == other:
        return
    here = [f"only in train800val200: {e.name} {e.label}" for e in whole if content(e) in other - one]
    there = [f"not in train800val200: {e.name} {e.label}" for e in parts if content(e) in one - other]
    text = f"train800val200 is not train800 and val200 together: {len(there)} missing, {len(here)} foreign"
    yield Fault("error", "union", text, (*there, *here))


# ---- a folder a class ------------------------------------------------------------------------------------------------


def _check_folder(root: Path, val_fraction: float, split_seed: int, reader: _Reader) -> SetReport:
    names = subfolders(root)
    if "train" not in names:
        there = ", ".join(map(shown, names)) or "no folder"
        lists = any((root / name / LISTS[0]).is_file() for name in names)
        advice = "; for lists such as train800.txt give --data VTAB1k" if lists else ""
        raise ValueError(
            f"{shown(root / 'train')} does not exist; expected train/CLASS/image.png, in root are: {there}{advice}"
        )
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), not {val_fraction}")
    index = {name: label for label, name in enumerate(subfolders(root / "train"))}
    faults: list[Fault] = []
    if not index:
        faults.append(Fault("error", "classes", "train holds no class folder; expected train/CLASS/image.png"))
    splits: Splits = {}
    unlisted: list[str] = []
    for split in ("train", "val", "test"):
        if split in names:
            splits[split], stray = _listed(root, split, index, faults)
            unlisted += stray
        elif split == "test":
            faults.append(Fault("warning", "count", "there is no folder test, so nothing to measure with in the end"))
    if unlisted:
        text = f"{len(unlisted):,} file{'s' * (len(unlisted) > 1)} will not be used"
        kinds = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in unlisted)
        text += f" ({', '.join(f'{count} {shown(kind)}' for kind, count in kinds.most_common(5))})"
        faults.append(Fault("warning", "unlisted", text, tuple(unlisted)))
    if "val" not in splits and "train" in splits:
        train = splits["train"]
        kept, held = hold_out([entry.label for entry in train], val_fraction, split_seed)
        splits["train"] = [train[i] for i in kept]
        if held:
            splits = {"train": splits["train"], "val": [train[i] for i in held], **splits}
    files = dict.fromkeys(entry.path for entries in splits.values() for entry in entries)
    images = reader.read(root.name or str(root), list(files))
    faults += _image_faults(splits, images)
    faults += _doubles(splits, images, lenient=False)
    faults += _leaks(splits, images, [("train", "val"), ("train", "test"), ("val", "test")], lenient=False)
    facts = tuple(_facts(split, entries, images) for split, entries in splits.items())
    name = root.name or str(root)
    return SetReport(name, str(root), len(index), facts, len(unlisted), in_order(faults), tuple(index))


def _listed(root: Path, split: str, index: Mapping[str, int], faults: list[Fault]) -> tuple[list[_Entry], list[str]]:
    """List the images of a split, and the other files in it."""
    here = subfolders(root / split)
    if unknown := [name for name in here if name not in index]:
        faults.append(
            Fault("error", "classes", f"{split} has {_classes_that(unknown)} not in train", _meant(unknown, index))
        )
    entries: list[_Entry] = []
    for name in here:
        if name in index:
            files = image_files(root / split / name)
            entries += [_Entry(path, str(path.relative_to(root)), index[name], "") for path in files]
    with_images = {entry.label for entry in entries}
    if without := [name for name in here if name in index and index[name] not in with_images]:
        level: Literal["error", "warning"] = "error" if split == "train" else "warning"
        faults.append(Fault(level, "classes", f"{split}: {_classes_that(without)} without an image", tuple(without)))
    if split != "train" and (absent := [name for name in index if name not in here]):
        faults.append(Fault("warning", "classes", f"{split} lacks {_classes_that(absent)} in train", tuple(absent)))
    if not entries and index:
        faults.append(Fault("error", "count", f"{split} holds no image that can be used"))
    used = {entry.path for entry in entries}
    stray: list[str] = []
    dead: list[str] = []
    for path in _everything(root / split):
        if path in used or (path.parent != root / split and path.relative_to(root / split).parts[0] in unknown):
            continue
        ours = path.suffix.lower() in SUFFIXES and path.parent != root / split
        (dead if ours and not path.is_file() else stray).append(str(path.relative_to(root)))
    if dead:
        text = f"{split}: {_images(dead)} {'are' if len(dead) > 1 else 'is'} a broken link or no file"
        faults.append(Fault("error", "missing", text, tuple(dead)))
    return entries, stray


def _everything(folder: Path) -> Iterator[Path]:
    """Yield what is no folder, hidden things left out; links to class folders are followed, as in training."""
    folders = [folder]
    while folders:
        place = folders.pop()
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir() and (not path.is_symlink() or place == folder):
                folders.append(path)
            elif not path.is_dir():
                yield path


def _classes_that(names: Sequence[str]) -> str:
    return f"{len(names)} class{'es that are' if len(names) > 1 else ' that is'}"


def _meant(unknown: Sequence[str], index: Mapping[str, int]) -> tuple[str, ...]:
    """Say beside each unknown class which one of training may have been meant."""
    folded = {name.casefold().strip(): name for name in index}
    near = ((name, get_close_matches(name.casefold().strip(), folded, n=1)) for name in unknown)
    return tuple(f"{name}, train has {folded[match[0]]}" if match else name for name, match in near)
