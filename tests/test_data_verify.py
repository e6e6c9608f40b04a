"""Each fault of a data set is found and named, and nothing else is reported."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynadapter.data import ImageFolder, Shapes, VTAB1k
from dynadapter.data.identity import data_hash
from dynadapter.data.verify import Report, verify

KINDS = ("red", "green", "blue")
Damage = Callable[[Path], Any]


def picture(seed: int, size: tuple[int, int] = (7, 5)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_task(root: Path, name: str = "toys") -> Path:
    """A task without faults: nine images for training, three for validation, six for testing, in three classes."""
    folder = root / name
    (folder / "images").mkdir(parents=True)
    for k in range(18):
        picture(k, (7 + k % 3, 5)).save(folder / "images" / f"{k}.png")
    lines = [f"images/{k}.png {k % 3}\n" for k in range(18)]
    parts = {"train800": lines[:9], "val200": lines[9:12], "train800val200": lines[:12], "test": lines[12:]}
    for split, part in parts.items():
        (folder / f"{split}.txt").write_text("".join(part))
    (folder / "classes.txt").write_text("\n".join(KINDS))
    return folder


def make_folder(root: Path, **counts: int) -> Path:
    """An image folder without faults."""
    seed = 0
    for split, count in {"train": 4, "val": 2, "test": 2, **counts}.items():
        for name in KINDS:
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                picture(seed := seed + 1).save(root / split / name / f"{k}.png")
    return root


def found(report: Report) -> list[tuple[str, str, str]]:
    return [(finding.level, finding.kind, finding.text) for finding in report.findings]


def check(report: Report, expected: list[tuple[str, str, str]]) -> None:
    """Compare findings with (level, kind, words of the text), in any order but errors first."""
    assert sorted(one[:2] for one in found(report)) == sorted(one[:2] for one in expected), found(report)
    for level, kind, words in expected:
        assert any(one[:2] == (level, kind) and words in one[2] for one in found(report)), found(report)
    assert [one[0] for one in found(report)] == sorted(one[0] for one in found(report))
    assert not any("\n" in one[2] for one in found(report))


# ---- damages


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def line(split: str, number: int, content: str) -> Damage:
    def edit(folder: Path) -> None:
        lines = (folder / f"{split}.txt").read_text().splitlines()
        lines[number] = content
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")

    return edit


def copy(source: str, target: str) -> Damage:
    return lambda folder: shutil.copy(folder / source, folder / target)


def link(name: str, target: str) -> Damage:
    return lambda folder: ((folder / name).unlink(missing_ok=True), (folder / name).symlink_to(target))


def pipe(name: str) -> Damage:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def bomb(name: str) -> Damage:
    """A head that claims more pixels than are ever decoded, and a file with a hole that is larger than any image."""

    def make(folder: Path) -> None:
        head = b"P6 20000 20000 255\n"
        (folder / name).write_bytes(head)
        os.truncate(folder / name, 2**31 + 1)

    return make


TEST = "images/12.png"
UNREADABLE = [("error", "unreadable", "test: 1 image cannot be read")]
UNUSED = ("warning", "unused", "1 file(s) not used (1 .png)")
TASK: dict[str, tuple[Damage, list[tuple[str, str, str]]]] = {
    "nothing": (lambda f: None, []),
    "missing image": (lambda f: (f / TEST).unlink(), UNREADABLE),
    "pipe": (pipe(TEST), UNREADABLE),
    "dead link": (link(TEST, "nowhere.png"), UNREADABLE),
    "link to a device": (link(TEST, "/dev/zero"), [("error", "split", "leads out of")]),
    "link out of the root": (link(TEST, "/etc/hostname"), [("error", "split", "leads out of")]),
    "empty image": (write(TEST, b""), UNREADABLE),
    "not an image": (write(TEST, b"%!PS-Adobe"), UNREADABLE),
    "bomb": (bomb(TEST), UNREADABLE),
    "half an image": (lambda f: (f / TEST).write_bytes((f / TEST).read_bytes()[:70]), UNREADABLE),
    "missing test list": (
        lambda f: (f / "test.txt").unlink(),
        [("warning", "split", "no test.txt"), ("warning", "unused", "6 file(s)")],
    ),
    "missing train list": (lambda f: (f / "train800.txt").unlink(), [("error", "split", "no train800.txt")]),
    "copy": (copy(TEST, "images/15.png"), [("warning", "copy", "test: 1 image more than once")]),
    "listed twice": (
        line("test", 1, "images/12.png 0"),
        [("warning", "copy", "test: 1 image more than once"), UNUSED],
    ),
    "listed with two classes": (
        line("test", 1, "images/12.png 1"),
        [("error", "contradiction", "1 image with more than one class"), UNUSED],
    ),
    "copy in another class": (
        copy(TEST, "images/13.png"),
        [("error", "contradiction", "1 image with more than one class")],
    ),
    "train and test": (copy("images/0.png", TEST), [("error", "leak", "1 image of train also in test")]),
    "train and test, two classes": (
        copy("images/0.png", "images/13.png"),
        [("error", "leak", "1 image of train also in test"), ("error", "contradiction", "1 image")],
    ),
    "train and val": (copy("images/0.png", "images/9.png"), [("error", "leak", "1 image of train also in val")]),
    "val and test": (copy("images/9.png", TEST), [("error", "leak", "1 image of val also in test")]),
    "image that no list names": (copy("images/0.png", "images/99.png"), [UNUSED]),
    "class in test alone": (
        lambda f: [line(name, k, f"images/{k}.png 0")(f) for k in (2, 5, 8) for name in ("train800", "train800val200")],
        [("error", "unseen", f"1 class of {split} without an image in train") for split in ("val", "test")]
        + [("warning", "empty", "train: 1 class without an image")],
    ),
    "class without images": (
        write("classes.txt", b"a\nb\nc\nd"),
        [("warning", "empty", f"{split}: 1 class without an image") for split in ("train", "val", "test")],
    ),
    "train800val200 has another label": (
        line("train800val200", 0, "images/0.png 1"),
        [("error", "union", "train800val200.txt is not train800.txt and val200.txt together")],
    ),
}


@pytest.mark.parametrize("damage", TASK)
def test_faults_of_a_task(damage, tmp_path):
    edit, expected = TASK[damage]
    edit(make_task(tmp_path))
    check(verify(VTAB1k(tmp_path, "toys"), threads=2), expected)


FOLDER: dict[str, tuple[Damage, list[tuple[str, str, str]]]] = {
    "nothing": (lambda f: None, []),
    "no test": (lambda f: shutil.rmtree(f / "test"), [("warning", "split", "test does not exist; expected test/")]),
    "class that train lacks": (
        lambda f: (f / "test/red").rename(f / "test/Red"),
        [("error", "split", "classes that train does not have: Red"), ("warning", "unused", "6 file(s)")],
    ),
    "class that val lacks": (lambda f: shutil.rmtree(f / "val/red"), [("warning", "empty", "val: 1 class without")]),
    "broken link": (link("train/red/z.png", "nowhere"), [("warning", "unused", "1 file(s) not used (1 .png)")]),
    "other files": (
        lambda f: [(f / "train" / name).write_text("x") for name in ("a.heic", "red/more.doc", "red/.hidden")],
        [("warning", "unused", "2 file(s) not used (1 .heic, 1 .doc)")],
    ),
    "image beside the classes": (lambda f: picture(99).save(f / "train/z.png"), [UNUSED]),
    "empty image": (write("val/red/0.png", b""), [("error", "unreadable", "val: 1 image cannot be read")]),
    "train and test": (copy("train/red/0.png", "test/red/z.png"), [("error", "leak", "of train also in test")]),
    "two classes": (
        copy("train/red/0.png", "train/blue/z.png"),
        [("error", "contradiction", "1 image with more than one class")],
    ),
}


@pytest.mark.parametrize("damage", FOLDER)
def test_faults_of_a_folder(damage, tmp_path):
    edit, expected = FOLDER[damage]
    edit(make_folder(tmp_path))
    check(verify(ImageFolder(tmp_path)), expected)


# ---- the report


def test_report_of_a_task(tmp_path):
    folder, steps = make_task(tmp_path), []
    report = verify(VTAB1k(tmp_path, "toys"), progress=lambda *step: steps.append(step))
    assert (report.data, report.folder, report.class_names) == ("VTAB1k", str(folder), KINDS)
    assert [(s.name, s.images, s.unreadable, list(s.classes.values())) for s in report.splits] == [
        ("train", 9, 0, [3, 3, 3]),
        ("val", 3, 0, [1, 1, 1]),
        ("test", 6, 0, [2, 2, 2]),
    ]
    assert (report.splits[0].smallest, report.splits[0].largest) == ((7, 5), (9, 5))
    assert steps == [(done, 18) for done in range(19)]


def test_hashes_are_those_of_a_run(tmp_path):
    make_task(tmp_path)
    root = make_folder(tmp_path / "folders")
    shutil.rmtree(root / "val")
    for data in (VTAB1k(tmp_path, "toys"), ImageFolder(root, val_fraction=0.5, split_seed=3)):
        hashes = {split.name: split.hash for split in verify(data).splits}
        assert hashes == {split: data_hash(data.samples(split)) for split in ("train", "val", "test")}


def test_unreadable_images_leave_no_hash(tmp_path):
    (make_task(tmp_path) / TEST).unlink()
    report = verify(VTAB1k(tmp_path, "toys"))
    assert [split.hash is None for split in report.splits] == [False, False, True]
    assert report.splits[2].unreadable == 1


def test_items_name_every_image(tmp_path):
    folder = make_task(tmp_path)
    (folder / TEST).write_bytes(b"")
    (folder / "images/13.png").unlink()
    copy("images/0.png", "images/14.png")(folder)
    assert {finding.kind: finding.items for finding in verify(VTAB1k(tmp_path, "toys")).findings} == {
        "unreadable": ("images/12.png: the file is empty", "images/13.png: No such file or directory"),
        "leak": ("images/0.png = images/14.png",),
        "contradiction": ("images/0.png (red) = images/14.png (blue)",),
    }


def test_images_in_memory_are_checked():
    report = verify(Shapes(train_images=16, val_images=8, test_images=8, image_size=8))
    assert found(report) == []
    assert report.splits[0].smallest == (8, 8)


# ---- VTAB-1k


def test_public_tasks_have_known_counts(tmp_path):
    folder = make_task(tmp_path, "kitti")
    (folder / "classes.txt").unlink()
    copy("images/0.png", TEST)(folder)
    report = verify(VTAB1k(tmp_path, "kitti"))
    counts = [text for _, kind, text in found(report) if kind == "count"]
    assert counts[-1] == "test.txt lists 6 images instead of 711"
    assert len(counts) == 4
    assert ("warning", "leak") in {one[:2] for one in found(report)}  # nobody can change the public lists
    shutil.copy(folder / "train800.txt", folder / "test.txt")
    report = verify(VTAB1k(tmp_path, "kitti"))
    assert ("error", "leak") in {one[:2] for one in found(report)}  # half a split is no accident


def test_union_may_have_files_of_its_own(tmp_path):
    folder = make_task(tmp_path)
    (folder / "images" / "both").mkdir()
    for k in range(12):
        shutil.copy(folder / "images" / f"{k}.png", folder / "images" / "both")
    text = (folder / "train800val200.txt").read_text().replace("images/", "images/both/")
    (folder / "train800val200.txt").write_text("".join(sorted(text.splitlines(keepends=True))))
    check(verify(VTAB1k(tmp_path, "toys")), [])
    line("train800val200", 0, "images/both/0.png 2")(folder)
    assert found(verify(VTAB1k(tmp_path, "toys")))[0][1] == "union"


@pytest.mark.parametrize("root", [Path(__file__).parents[2] / "shared" / "data" / "tasks"])
def test_real_task_has_only_copies(root, tmp_path):
    if not (root / "flowers5.tar.xz").is_file():
        pytest.skip("no real tasks on this machine")
    shutil.unpack_archive(root / "flowers5.tar.xz", tmp_path, filter="data")
    report = verify(VTAB1k(tmp_path, "flowers5"))
    assert [(split.images, split.unreadable) for split in report.splits] == [(800, 0), (200, 0), (1997, 0)]
    assert {finding.kind for finding in report.findings} <= {"contradiction", "leak", "copy"}  # in the source itself
