"""VTAB-1k, and any other task in its layout of lists."""

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple

from dynadapter.data.base import ImageData, Sample, Split
from dynadapter.images.reading import open_regular, shown

Group = Literal["Natural", "Specialized", "Structured"]

LABEL = re.compile("-?[0-9]{1,9}")  # int() alone would also take '1_0' and digits of other scripts
CONTROL = re.compile("[\x00-\x1f\x7f]")
LISTS = ("train800.txt", "val200.txt", "train800val200.txt", "test.txt")
MAX_LIST = 2**28
"""A list of more bytes than this is refused; that of a million images has a tenth."""


@dataclass(frozen=True)
class VTABTask:
    """One of the 19 tasks.

    Args:
        name: The folder that the public copies of VTAB-1k use.
        classes: Number of classes.
        test: Number of test images.
        group: The group whose mean it enters.
        aliases: Other names in use.
    """

    name: str
    classes: int
    test: int
    group: Group
    aliases: tuple[str, ...] = ()


# Figures of the public VTAB-1k lists (Zhai et al., "A Large-scale Study of Representation Learning", arXiv 1910.04867).
VTAB_TASKS: dict[str, VTABTask] = {
    task.name: task
    for task in (
        VTABTask("cifar", 100, 10_000, "Natural", ("cifar100",)),
        VTABTask("caltech101", 102, 6_084, "Natural"),
        VTABTask("dtd", 47, 1_880, "Natural"),
        VTABTask("oxford_flowers102", 102, 6_149, "Natural", ("flowers102",)),
        VTABTask("oxford_iiit_pet", 37, 3_669, "Natural", ("oxford_pet", "pets")),
        VTABTask("svhn", 10, 26_032, "Natural"),
        VTABTask("sun397", 397, 21_750, "Natural"),
        VTABTask("patch_camelyon", 2, 32_768, "Specialized"),
        VTABTask("eurosat", 10, 5_400, "Specialized"),
        VTABTask("resisc45", 45, 6_300, "Specialized"),
        VTABTask("diabetic_retinopathy", 5, 42_670, "Specialized"),
        VTABTask("clevr_count", 8, 15_000, "Structured"),
        VTABTask("clevr_dist", 6, 15_000, "Structured"),
        VTABTask("dmlab", 6, 22_735, "Structured"),
        VTABTask("kitti", 4, 711, "Structured"),
        VTABTask("dsprites_loc", 16, 73_728, "Structured"),
        VTABTask("dsprites_ori", 16, 73_728, "Structured"),
        VTABTask("smallnorb_azi", 18, 12_150, "Structured"),
        VTABTask("smallnorb_ele", 9, 12_150, "Structured"),
    )
}


def vtab_task(name: str) -> VTABTask | None:
    """Return the VTAB-1k task of that name or alias, None for any other.

    >>> vtab_task("pets").name
    'oxford_iiit_pet'
    """
    return next((task for task in VTAB_TASKS.values() if name in (task.name, *task.aliases)), None)


class Line(NamedTuple):
    """A line of a list: the image's path inside the task's folder, its class, and where that stands."""

    path: str
    label: int
    place: str


def read_list(file: Path) -> list[Line]:
    """Read a list, one ``path label`` a line, the path relative to the list's folder.

    Raises:
        ValueError: A line is malformed, or its path leaves the folder.
    """
    lines, faults = scan_list(file)
    if faults:
        raise ValueError(faults[0])
    if not lines:
        raise ValueError(f"{file} lists no image")
    return lines


def scan_list(file: Path) -> tuple[list[Line], list[str]]:
    """Read a list as far as it can be read.

    Returns:
        The lines that can be used, and what is wrong with each of the others.

    Raises:
        ValueError: It is no text.
    """
    lines, faults = [], []
    for number, content in enumerate(read_text(file).split("\n"), start=1):
        if not content.strip():
            continue
        place = f"{file}:{number}"
        path, *label = content.strip().rsplit(maxsplit=1)  # a path may hold spaces
        if not label or not LABEL.fullmatch(label[0]) or CONTROL.search(path):
            given = content.strip()[:100]
            faults.append(f"{place}: {given!r} is not 'PATH LABEL', for example 'images/train800/000000.jpg 12'")
        elif _leaves(path):
            faults.append(
                f"{place}: path {path[:100]!r} leaves the task's folder; paths are relative to {shown(file.parent)}"
            )
        else:
            lines.append(Line(path, int(label[0]), place))
    return lines, faults


def _leaves(path: str) -> bool:
    windows = PureWindowsPath(path) if path.startswith("/") or ":" in path or "\\" in path or ".." in path else None
    return windows is not None and bool(windows.anchor or ".." in windows.parts)  # knows both separators, and drives


def read_text(file: Path) -> str:
    """Read a list or the names of classes.

    Raises:
        ValueError: It is not in UTF-8, or is absurdly large.
    """
    with open_regular(file) as opened:
        content = opened.read(MAX_LIST + 1)
    if len(content) > MAX_LIST:
        raise ValueError(f"{file} has more than {MAX_LIST:,} bytes, which no list has")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error.reason} at byte {error.start}") from None


class Fence:
    """Tell whether listed images lie below the data's root, wherever links lead.

    Args:
        folders: They may lie in any of these.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = [os.path.realpath(folder) for folder in folders]
        self._around: dict[str, bool] = {}  # most images share a few folders, whose links are followed once

    def state(self, path: Path) -> Literal["file", "missing", "outside"]:
        """Say whether a path is a file inside, leads outside, or is no file at all."""
        folder = os.path.dirname(path)
        if folder not in self._around:
            self._around[folder] = self._holds(folder)
        if not self._around[folder]:
            return "outside"
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                if not self._holds(path):
                    return "outside"
                mode = os.stat(path).st_mode
        except OSError:
            return "missing"
        return "file" if stat.S_ISREG(mode) else "missing"

    def _holds(self, path: str | Path) -> bool:
        real = os.path.realpath(path)
        return any(real == folder or real.startswith(os.path.join(folder, "")) for folder in self.folders)


class VTAB1k(ImageData):
    """A task of VTAB-1k, or any folder in its layout: ``root/task/`` with `LISTS` and the images that they name.

    The protocol: choose everything with ``split: train800``, which trains on 800 images and validates on 200 others;
    then train once with ``split: train800val200`` on all 1000, without validation, and test on ``test.txt``.
    The number of classes is known for the 19 tasks; elsewhere ``classes.txt`` (a name a line) gives it,
    or the labels do.

    Args:
        root: Folder that holds the tasks.
        task: Folder of the task in `root`, or another name in use for it, such as ``cifar100`` for ``cifar``.
        split: ``train800`` keeps ``val200.txt`` for validation, ``train800val200`` trains on it too.
    """

    validation_switch = "split: train800 (train800val200 trains on the validation images too)"

    def __init__(
        self,
        root: str | Path,
        task: str,
        split: Literal["train800", "train800val200"] = "train800",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if split not in ("train800", "train800val200"):
            raise ValueError(f"unknown split {split!r}; choose from: train800, train800val200")
        self.split = split
        self.task = vtab_task(task)
        self.root = Path(root).expanduser()
        self.folder = task_folder(self.root, task)
        self._lists = {name: read_list(self.folder / name) for name in LISTS if (self.folder / name).is_file()}
        if not self._lists:
            raise ValueError(f"{self.folder} has none of the lists {', '.join(LISTS)}")
        self.class_names = self._classes()
        for line in self._lines():
            if not 0 <= line.label < self.num_classes:
                valid = f"0 to {self.num_classes - 1}"
                raise ValueError(f"{line.place}: label {line.label} is out of range, valid are {valid}")

    @property
    def group(self) -> Group | None:
        """The group of the task, None when it is not one of the 19."""
        return self.task.group if self.task else None

    def samples(self, split: Split) -> list[Sample]:
        if split == "val" and self.split == "train800val200":
            return []
        name = {"train": f"{self.split}.txt", "val": "val200.txt", "test": "test.txt"}[split]
        if name not in self._lists:
            raise ValueError(f"{self.folder} has no {name}, which {split} needs; it has: {', '.join(self._lists)}")
        lines = self._lists[name]
        fence = Fence(self.root, self.folder)
        states = [fence.state(self.folder / line.path) for line in lines]
        if "outside" in states:
            raise ValueError(outside(lines[states.index("outside")], self.folder, self.root))
        if self.on_error == "raise" and "missing" in states:
            first = lines[states.index("missing")]
            raise ValueError(
                f"{first.place}: image {first.path} does not exist in {self.folder} "
                f"({states.count('missing')} of the {len(lines)} listed images are missing)"
            )
        return [(self.folder / line.path, line.label) for line in lines]

    def _lines(self) -> list[Line]:
        return [line for lines in self._lists.values() for line in lines]

    def _classes(self) -> list[str]:
        file = self.folder / "classes.txt"
        if not file.is_file():
            if self.task:
                return [str(label) for label in range(self.task.classes)]
            highest = max(self._lines(), key=lambda line: line.label)
            if highest.label >= len(self._lines()):  # a slip of the pen would make a head of a billion classes
                raise ValueError(
                    f"{highest.place}: label {highest.label} is higher than the number of listed images; "
                    f"if it is right, name the classes in {file}"
                )
            return [str(label) for label in range(max(highest.label, 0) + 1)]
        return read_classes(file, self.task)


def read_classes(file: Path, task: VTABTask | None) -> list[str]:
    """Read the names of a task's classes, one a line.

    Raises:
        ValueError: A name stands there twice, or they are not as many as the task has classes.
    """
    names = [name.strip() for name in read_text(file).split("\n") if name.strip()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file} names a class twice: {', '.join(map(shown, twice))}")
    if task and len(names) != task.classes:
        raise ValueError(f"{file} names {len(names)} classes, but {task.name} has {task.classes}")
    return names


def outside(line: Line, folder: Path, root: Path) -> str:
    """Say in one line that a listed image lies elsewhere."""
    real = shown(os.path.realpath(folder / line.path))
    return (
        f"{line.place}: image {shown(line.path)} leads by a link to {real}, out of {shown(root)}; copy the images "
        "there, or give a root that holds both"
    )


def task_folder(root: Path, name: str) -> Path:
    """Find a task's folder under its own or another name."""
    if not root.is_dir():
        raise ValueError(f"root {root} does not exist or is no folder")
    known = vtab_task(name)
    names = (name, known.name, *known.aliases) if known else (name,)
    for folder in (root / other for other in names):
        if folder.is_dir():
            return folder
    there = sorted(path.name for path in root.iterdir() if any((path / file).is_file() for file in LISTS))
    if any((root / file).is_file() for file in LISTS):
        advice = f"{root} itself holds the lists of a task: set root to {root.parent} and task to {root.name}"
    elif there:
        near = get_close_matches(name, there, n=1)
        advice = f"there are: {', '.join(there)}" + (f"; did you mean {near[0]}?" if near else "")
    else:
        advice = f"no folder in it holds VTAB lists such as {name}/{LISTS[0]}"
    raise ValueError(f"no task {name} in {root}; {advice}")
