"""Read VTAB-1k, and any other task in its layout."""

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from dynadapter.data.base import ImageData, Split
from dynadapter.data.dataset import Sample
from dynadapter.data.lists import LISTS, Line, listed_classes, listed_files, read_list
from dynadapter.data.splits import MissingSplit

Group = Literal["Natural", "Specialized", "Structured"]


@dataclass(frozen=True)
class VTABTask:
    """One of the 19 tasks.

    Args:
        name: Folder name in the public copies of VTAB-1k.
        classes: Number of classes.
        test: Number of test images.
        group: Group of tasks.
        aliases: Other names in use.
    """

    name: str
    classes: int
    test: int
    group: Group
    aliases: tuple[str, ...] = ()


# Counts of the public VTAB-1k lists (Zhai et al., "A Large-scale Study of Representation Learning", arXiv 1910.04867).
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
    """Return the VTAB-1k task with this name or alias; None for any other name.

    >>> vtab_task("pets").name
    'oxford_iiit_pet'
    """
    return next((task for task in VTAB_TASKS.values() if name in (task.name, *task.aliases)), None)


class VTAB1k(ImageData):
    """A task of VTAB-1k, or any folder in its layout: ``root/task/`` with four lists and the images that they name.

    The protocol: choose all settings with ``split: train800``, which trains on 800 images and validates on 200 others.
    Then train once with ``split: train800val200`` on all 1000 images, without validation, and test on ``test.txt``.

    The number of classes is known for the 19 tasks. For other tasks it follows from ``classes.txt`` (one name per
    line), or from the highest label if that file is missing.

    Args:
        root: Folder that holds the tasks.
        task: Folder of the task in `root`, or another name of it, such as ``cifar100`` for ``cifar``.
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
        self.root = Path(os.path.expanduser(root))
        self.folder = find_task(self.root, task)
        self.lists = {
            name: read_list(self.folder / name, self.folder) for name in LISTS if (self.folder / name).is_file()
        }
        if not self.lists:
            raise ValueError(f"{self.folder} has none of the lists {', '.join(LISTS)}")
        known = self.task.classes if self.task else None
        self.class_names = listed_classes(self._lines(), self.folder / "classes.txt", known)

    def samples(self, split: Split) -> list[Sample]:
        if split == "val" and self.split == "train800val200":
            return []
        name = {"train": f"{self.split}.txt", "val": "val200.txt", "test": "test.txt"}[split]
        if name not in self.lists:
            raise MissingSplit(f"{self.folder} has no {name}, which {split} needs; it has: {', '.join(self.lists)}")
        lines = self.lists[name]
        files = listed_files(lines, self.folder, self.root, missing=self.on_error == "skip")
        return [(file, line.label) for file, line in zip(files, lines, strict=True)]

    def listed(self) -> list[Path]:
        return [self.folder / line.path for line in self._lines()]

    def _lines(self) -> list[Line]:
        return [line for lines in self.lists.values() for line in lines]


def find_task(root: Path, name: str) -> Path:
    """Return the folder of a task, under its own or another name."""
    if not root.is_dir():
        raise ValueError(f"root {root} does not exist or is not a folder")
    known = vtab_task(name)
    names = (name, known.name, *known.aliases) if known else (name,)
    for folder in (root / other for other in names):
        if folder.is_dir():
            return folder
    if any((root / file).is_file() for file in LISTS):
        raise ValueError(
            f"no task {name} in {root}; {root} itself holds the lists of a task: "
            f"set root to {root.parent} and task to {root.name}"
        )
    there = sorted(path.name for path in root.iterdir() if any((path / file).is_file() for file in LISTS))
    if not there:
        raise ValueError(f"no task {name} in {root}; no folder in it holds VTAB lists such as {name}/{LISTS[0]}")
    near = get_close_matches(name, there, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no task {name} in {root}; there are: {', '.join(there)}{hint}")
