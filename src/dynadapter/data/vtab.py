"""VTAB-1k, and any other task in its layout of lists."""

import re
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple

from dynadapter.data.base import ImageData, Sample, Split

Group = Literal["Natural", "Specialized", "Structured"]

LABEL = re.compile("-?[0-9]{1,9}")  # int() alone would also take '1_0' and digits of other scripts
LISTS = ("train800.txt", "val200.txt", "train800val200.txt", "test.txt")


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
    lines = []
    for number, content in enumerate(_text(file).split("\n"), start=1):
        if not content.strip():
            continue
        place = f"{file}:{number}"
        path, *label = content.strip().rsplit(maxsplit=1)  # a path may hold spaces
        if not label or not LABEL.fullmatch(label[0]):
            given = content.strip()[:100]
            raise ValueError(f"{place}: {given!r} is not 'PATH LABEL', for example 'images/train800/000000.jpg 12'")
        windows = PureWindowsPath(path)  # knows both kinds of separators, and drives
        if windows.anchor or ".." in windows.parts:
            raise ValueError(f"{place}: path {path!r} leaves the task's folder; paths are relative to {file.parent}")
        lines.append(Line(path, int(label[0]), place))
    if not lines:
        raise ValueError(f"{file} lists no image")
    return lines


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error.reason} at byte {error.start}") from None


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
        self.folder = _task_folder(Path(root).expanduser(), task)
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
        if self.on_error == "raise":
            missing = [line for line in lines if not (self.folder / line.path).is_file()]
            if missing:
                first = missing[0]
                raise ValueError(
                    f"{first.place}: image {first.path} does not exist in {self.folder} "
                    f"({len(missing)} of the {len(lines)} listed images are missing)"
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
        names = [name.strip() for name in _text(file).split("\n") if name.strip()]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{file} names a class twice: {', '.join(twice)}")
        if self.task and len(names) != self.task.classes:
            raise ValueError(f"{file} names {len(names)} classes, but {self.task.name} has {self.task.classes}")
        return names


def _task_folder(root: Path, name: str) -> Path:
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
