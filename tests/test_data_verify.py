"""Each thing that can be wrong with a data set is found, named and counted, and nothing else is."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynadapter.data import ImageFolder, VTAB1k
from dynadapter.data.identity import data_hash
from dynadapter.data.report import Report, check_report
from dynadapter.data.verify import verify
from dynadapter.data.vtab import LISTS

KINDS = ("red", "green", "blue")


def picture(seed: int, size: tuple[int, int] = (7, 5)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_task(root: Path, name: str = "toys") -> Path:
    """A task without fault: nine images for training, three for validation, six for the test, of three classes."""
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
    """A folder a class without fault, in train, val and test."""
    seed = 0
    for split, count in {"train": 4, "val": 2, "test": 2, **counts}.items():
        for name in KINDS:
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                picture(seed := seed + 1).save(root / split / name / f"{k}.png")
    return root


def faults(report: Report) -> list[tuple[str, str]]:
    return [(fault.level, fault.kind) for one in report.sets for fault in one.faults]


def rewrite(path: Path, edit: Callable[[list[str]], Any]) -> None:
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("\n".join(lines) + "\n")


# ---- a task of lists


def test_a_task_without_fault(tmp_path):
    folder = make_task(tmp_path)
    said: list[tuple[str, int, int]] = []
    report = verify("VTAB1k", tmp_path, progress=lambda *step: said.append(step), threads=2)
    assert faults(report) == []
    (one,) = report.sets
    assert (one.name, one.folder, one.classes, one.class_names, one.unlisted) == ("toys", str(folder), 3, KINDS, 0)
    assert [(s.name, s.images, s.readable, s.classes) for s in one.splits] == [
        ("train800", 9, 9, 3),
        ("val200", 3, 3, 3),
        ("train800val200", 12, 12, 3),
        ("test", 6, 6, 3),
    ]
    assert one.splits[0].smallest == (7, 5)
    assert one.splits[0].largest == (9, 5)
    assert one.splits[0].modes == {"RGB": 9}
    assert said == [("toys", done, 18) for done in range(19)]
    assert len(report.missing_tasks) == 19


def test_hashes_are_those_of_the_data_modules(tmp_path):
    make_task(tmp_path)
    (one,) = verify("VTAB1k", tmp_path, "toys").sets
    hashes = {split.name: split.hash for split in one.splits}
    data = VTAB1k(tmp_path, "toys")
    for split, name in (("train", "train800"), ("val", "val200"), ("test", "test")):
        assert data_hash(data.samples(split)) == hashes[name]
    root = make_folder(tmp_path / "folders")
    for name in ("val", "test"):
        shutil.rmtree(root / name)
    (one,) = verify("ImageFolder", root, val_fraction=0.5, split_seed=3).sets
    data = ImageFolder(root, val_fraction=0.5, split_seed=3)
    assert {s.name: s.hash for s in one.splits} == {s: data_hash(data.samples(s)) for s in ("train", "val")}


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def line(split: str, number: int, content: str) -> Callable[[Path], Any]:
    return lambda folder: rewrite(folder / f"{split}.txt", lambda lines: lines.__setitem__(number, content))


def copy(one: int, other: int) -> Callable[[Path], Any]:
    return lambda folder: shutil.copy(folder / "images" / f"{one}.png", folder / "images" / f"{other}.png")


def link(number: int, target: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        path = folder / "images" / f"{number}.png"
        path.unlink()
        path.symlink_to(target)

    return make


def pipe(folder: Path) -> None:
    (folder / "images" / "12.png").unlink()
    os.mkfifo(folder / "images" / "12.png")


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str, str]]]] = {
    "a list is missing": (lambda f: (f / "val200.txt").unlink(), [("warning", "list", "val200.txt is missing")]),
    "a list is no text": (write("val200.txt", b"\xff\xfe"), [("error", "list", "val200.txt cannot be read: val200.")]),
    "a list is empty": (
        write("test.txt", b"\n"),
        [("error", "count", "test.txt lists no image"), ("warning", "unlisted", "6 image files are in no list")],
    ),
    "a line is no line": (
        line("test", 0, "images/12.png"),
        [("error", "line", "test.txt: 1 of its lines cannot be used"), ("warning", "unlisted", "1 image file is in")],
    ),
    "a path leads out": (
        line("test", 0, "../secret.png 0"),
        [("error", "line", "test.txt: 1 of its lines"), ("warning", "unlisted", "1 image file is in no list")],
    ),
    "a label is out of range": (line("test", 0, "images/12.png 3"), [("error", "label", "test: 1 image with a label")]),
    "an image is listed twice": (
        line("test", 1, "images/12.png 0"),
        [("warning", "listed_twice", "test: 1 image listed again"), ("warning", "unlisted", "1 image file")],
    ),
    "with two classes": (
        line("test", 1, "images/12.png 1"),
        [
            ("error", "listed_twice", "listed again, under another class"),
            ("error", "contradiction", "test: 1 image in more than one class"),
            ("warning", "unlisted", "1 image file is in no list"),
        ],
    ),
    "a class is in the test alone": (
        lambda f: (
            [line("train800", k, f"images/{k}.png 0")(f) for k in (2, 5, 8)]
            + [line("train800val200", k, f"images/{k}.png 0")(f) for k in (2, 5, 8)]
        ),
        [("error", "unseen", "1 class of val200 has no image"), ("error", "unseen", "1 class of test has no image")],
    ),
    "a class is nowhere": (
        write("classes.txt", b"a\nb\nc\nd"),
        [("warning", "unseen", "1 class has no image in train")],
    ),
    "a class stands twice": (write("classes.txt", b"a\nb\na"), [("error", "classes", "names a class twice: a")]),
    "the union is none": (
        line("train800val200", 0, "images/0.png 1"),
        [("error", "union", "1 missing, 1 foreign")],
    ),
    "an image is missing": (
        lambda f: (f / "images/12.png").unlink(),
        [("error", "missing", "test: 1 image listed, but no such file")],
    ),
    "a pipe": (pipe, [("error", "missing", "test: 1 image listed, but no such file")]),
    "a dead link": (link(12, "nowhere.png"), [("error", "missing", "test: 1 image listed, but no such file")]),
    "a link out of the root": (link(12, "/etc/hostname"), [("error", "outside", "test: 1 image outside the root")]),
    "an empty image": (write("images/12.png", b""), [("error", "unreadable", "test: 1 image cannot be read")]),
    "no image": (write("images/12.png", b"%!PS-Adobe"), [("error", "unreadable", "test: 1 image cannot be read")]),
    "half an image": (
        lambda f: (f / "images/12.png").write_bytes((f / "images/12.png").read_bytes()[:70]),
        [("error", "unreadable", "test: 1 image cannot be read")],
    ),
    "an image twice": (copy(12, 15), [("warning", "double", "test: 1 image is a copy of others in it")]),
    "under two classes": (copy(12, 13), [("error", "contradiction", "test: 1 image in more than one class")]),
    "in training and test": (copy(0, 12), [("error", "leak", "test: 1 image is in train800 too")]),
    "under another class": (copy(0, 13), [("error", "leak", "is in train800 too, 1 in another class")]),
    "in training and validation": (
        copy(0, 9),
        [
            ("error", "leak", "val200: 1 image is in train800 too"),
            ("warning", "double", "train800val200: 1 image is a copy of others in it"),
        ],
    ),
    "in validation and test": (copy(9, 12), [("error", "leak", "test: 1 image is in val200 too")]),
    "what no list names": (copy(0, 99), [("warning", "unlisted", "1 image file is in no list")]),
    "an odd mode": (
        lambda f: picture(50).convert("CMYK").save(f / "images/12.png", "JPEG"),
        [("warning", "mode", "test: 1 image of mode CMYK will be converted to RGB")],
    ),
    "a film": (
        lambda f: picture(50).save(f / "images/12.png", "GIF", save_all=True, append_images=[picture(51)]),
        [("warning", "animated", "test: 1 image with several frames, the first counts")],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_fault_of_a_task_is_found(damage, tmp_path):
    edit, expected = DAMAGES[damage]
    edit(make_task(tmp_path))
    (one,) = verify("VTAB1k", tmp_path, threads=2).sets
    told = sorted((fault.level, fault.kind, fault.text) for fault in one.faults)
    assert [(level, kind) for level, kind, _ in told] == sorted((level, kind) for level, kind, _ in expected)
    for level, kind, words in expected:
        assert any(fault[:2] == (level, kind) and words in fault[2] for fault in told), told
    assert [fault.level for fault in one.faults] == sorted(fault.level for fault in one.faults)  # errors first
    for fault in one.faults:
        assert "\n" not in fault.text


def test_what_is_wrong_is_named(tmp_path):
    folder = make_task(tmp_path)
    (folder / "images" / "12.png").write_bytes(b"")
    (folder / "images" / "13.png").unlink()
    copy(0, 14)(folder)
    found = {fault.kind: fault.items for fault in verify("VTAB1k", tmp_path).sets[0].faults}
    assert found == {
        "unreadable": ("images/12.png: the file is empty",),
        "missing": ("test.txt:2: images/13.png",),
        "leak": ("images/14.png = images/0.png of train800, class 2 and 0",),
    }


def test_a_split_with_a_missing_image_has_no_hash(tmp_path):
    folder = make_task(tmp_path)
    (folder / "images" / "12.png").unlink()
    hashes = {split.name: split.hash for split in verify("VTAB1k", tmp_path).sets[0].splits}
    assert hashes["test"] is None
    assert all(hashes[name] for name in ("train800", "val200", "train800val200"))


def test_the_public_tasks_are_measured_by_their_own_figures(tmp_path):
    folder = make_task(tmp_path, "kitti")
    (folder / "classes.txt").unlink()
    copy(0, 12)(folder)
    report = verify("VTAB1k", tmp_path)
    (one,) = report.sets
    assert (one.classes, one.class_names) == (4, ())
    texts = [fault.text for fault in one.faults if fault.kind == "count"]
    assert [text.partition(":")[0] for text in texts] == ["train800", "val200", "train800val200", "test"]
    assert texts[-1] == "test: 6 images instead of 711"
    assert ("warning", "leak") in faults(report)  # nobody can change the public lists
    assert "kitti" not in report.missing_tasks
    for split in ("val200", "test"):
        shutil.copy(folder / "train800.txt", folder / f"{split}.txt")
    assert ("error", "leak") in faults(verify("VTAB1k", tmp_path))  # but whole splits do not leak by chance
    (folder / "train800.txt").unlink()
    assert ("error", "list") in faults(verify("VTAB1k", tmp_path))


def test_all_tasks_of_a_root_or_one(tmp_path):
    for name in ("toys", "svhn", "games"):
        make_task(tmp_path, name)
    (tmp_path / "notes").mkdir()
    assert [one.name for one in verify("VTAB1k", tmp_path).sets] == ["games", "svhn", "toys"]
    assert [one.name for one in verify("VTAB1k", tmp_path, "toys").sets] == ["toys"]
    assert verify("VTAB1k", tmp_path, "toys").missing_tasks == ()


def test_labels_number_the_classes_where_nothing_names_them(tmp_path):
    folder = make_task(tmp_path)
    (folder / "classes.txt").unlink()
    assert verify("VTAB1k", tmp_path).sets[0].classes == 3
    line("test", 0, "images/12.png 999999999")(folder)
    (one,) = verify("VTAB1k", tmp_path).sets
    assert one.classes is None
    assert "999999999 is higher than the number of listed images" in one.faults[0].text


def test_several_lists_of_one_kind_of_image(tmp_path):
    """A union by what the files hold, where train800val200 has copies of its own."""
    folder = make_task(tmp_path)
    (folder / "images" / "both").mkdir()
    for k in range(12):
        shutil.copy(folder / "images" / f"{k}.png", folder / "images" / "both")
    rewrite(folder / "train800val200.txt", lambda lines: lines.sort(reverse=True))
    text = (folder / "train800val200.txt").read_text().replace("images/", "images/both/")
    (folder / "train800val200.txt").write_text(text)
    assert faults(verify("VTAB1k", tmp_path)) == []


# ---- a folder a class


def test_a_folder_without_fault(tmp_path):
    (one,) = verify("ImageFolder", make_folder(tmp_path / "set")).sets
    assert one.faults == ()
    assert (one.name, one.classes, one.class_names) == ("set", 3, tuple(sorted(KINDS)))
    assert [(s.name, s.images, s.classes) for s in one.splits] == [("train", 12, 3), ("val", 6, 3), ("test", 6, 3)]


FOLDER_DAMAGES: dict[str, tuple[Callable[[Path], Any], list[tuple[str, str, str]]]] = {
    "no test": (lambda f: shutil.rmtree(f / "test"), [("warning", "count", "there is no folder test")]),
    "a foreign class": (
        lambda f: (f / "test" / "red").rename(f / "test" / "Red "),
        [("error", "classes", "test has 1 class that is not in train"), ("warning", "classes", "test lacks 1 class")],
    ),
    "an empty class": (
        lambda f: (f / "train" / "white").mkdir(),
        [("error", "classes", "train: 1 class that is without an image")]
        + [("warning", "classes", f"{split} lacks 1 class that is in train") for split in ("val", "test")],
    ),
    "a broken link": (
        lambda f: (f / "train" / "red" / "z.png").symlink_to("nowhere"),
        [("error", "missing", "train: 1 image is a broken link or no file")],
    ),
    "other files": (
        lambda f: [(f / "train" / name).write_text("x") for name in ("notes.txt", "red/more.doc", "red/.hidden")],
        [("warning", "unlisted", "2 files will not be used (1 .txt, 1 .doc)")],
    ),
    "an image beside the classes": (
        lambda f: picture(99).save(f / "train" / "z.png"),
        [("warning", "unlisted", "1 file will not be used (1 .png)")],
    ),
    "an empty image": (
        lambda f: (f / "val" / "red" / "0.png").write_bytes(b""),
        [("error", "unreadable", "val: 1 image cannot be read")],
    ),
    "in training and test": (
        lambda f: shutil.copy(f / "train/red/0.png", f / "test/red/z.png"),
        [("error", "leak", "test: 1 image is in train too")],
    ),
    "in two classes": (
        lambda f: shutil.copy(f / "train/red/0.png", f / "train/blue/z.png"),
        [("error", "contradiction", "train: 1 image in more than one class")],
    ),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_a_fault_of_a_folder_is_found(damage, tmp_path):
    edit, expected = FOLDER_DAMAGES[damage]
    edit(make_folder(tmp_path))
    (one,) = verify("ImageFolder", tmp_path).sets
    told = [(fault.level, fault.kind, fault.text) for fault in one.faults]
    assert sorted(fault[:2] for fault in told) == sorted(fault[:2] for fault in expected)
    for level, kind, words in expected:
        assert any(fault[:2] == (level, kind) and words in fault[2] for fault in told), told


def test_the_class_that_was_meant_is_said(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "Red")
    (fault, _) = verify("ImageFolder", tmp_path).sets[0].faults
    assert fault.items == ("Red, train has red",)


# ---- against an earlier report


def test_an_earlier_report_finds_every_change(tmp_path):
    folder = make_task(tmp_path)
    before = check_report(verify("VTAB1k", tmp_path).as_dict())
    assert faults(verify("VTAB1k", tmp_path, expected=before)) == []
    pixels = np.asarray(Image.open(folder / "images" / "12.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(folder / "images" / "12.png")
    (fault,) = verify("VTAB1k", tmp_path, expected=before).errors
    assert fault.kind == "changed"
    assert fault.text.startswith("test: not the data as then, hash ")

    picture(12, (7, 5)).save(folder / "images" / "12.png")
    (folder / "classes.txt").write_text("red\ngreem\nblue")
    (fault,) = verify("VTAB1k", tmp_path, expected=before).errors
    assert fault.text == "the classes have other names: class 1 is 'greem', was 'green'"
    (folder / "classes.txt").write_text("red\ngreen")
    assert "class 2 is none, was 'blue'" in verify("VTAB1k", tmp_path, expected=before).errors[0].text

    make_task(tmp_path, "more")
    shutil.rmtree(folder)
    texts = [fault.text for fault in verify("VTAB1k", tmp_path, expected=before).errors]
    assert texts == ["the earlier report says nothing of more", "toys was in the earlier report, and is missing now"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "was not written by dynadapter verify"),
        ({}, "was not written by dynadapter verify"),
        ({"library": "other", "sets": [1]}, "it is empty, or of something else"),
        ({"library": "dynadapter", "format": 99, "sets": [{}]}, "it has format 99"),
        ({"library": "dynadapter", "format": 1, "sets": [{"name": "x"}]}, "was not written by dynadapter verify"),
        ({"library": "dynadapter", "format": "x", "sets": [{"name": "x"}]}, "was not written by dynadapter verify"),
    ],
)
def test_what_is_no_report(content, words):
    with pytest.raises(ValueError, match=words):
        check_report(content)


# ---- nothing to check


def test_nothing_to_check(tmp_path):
    def fails(words: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=words) as error:
            verify(*args, **options)
        assert "\n" not in str(error.value)

    fails("does not exist or is no folder", "VTAB1k", tmp_path / "nowhere")
    fails(f"no folder in .* holds VTAB lists such as cifar/{LISTS[0]}$", "VTAB1k", tmp_path)
    fails("unknown data 'Shapes'; choose from: VTAB1k, ImageFolder", "Shapes", tmp_path)
    folder = make_task(tmp_path)
    fails("itself holds the lists of a task: set root to .* and task to toys", "VTAB1k", folder)
    fails("no task toy in .*; did you mean toys?", "VTAB1k", tmp_path, "toy")
    fails("for lists such as train800.txt give --data VTAB1k", "ImageFolder", tmp_path)
    root = make_folder(tmp_path / "folders")
    fails("for train/CLASS/image.png give --data ImageFolder", "VTAB1k", root)
    fails(r"val_fraction must lie in \[0, 1\)", "ImageFolder", root, val_fraction=1.0)


def test_real_tasks(tmp_path):
    """The tasks that come with the project's development, where they are: nothing in them is missing or broken."""
    root = Path(__file__).parents[2] / "shared" / "data" / "tasks"
    if not root.is_dir():
        pytest.skip("no real tasks on this machine")
    with tarfile.open(root / "flowers5.tar.xz") as archive:
        archive.extractall(tmp_path / "set", filter="data")
    (one,) = verify("VTAB1k", tmp_path / "set").sets
    assert [(split.images, split.readable) for split in one.splits] == [
        (800, 800),
        (200, 200),
        (1000, 1000),
        (1997, 1997),
    ]
    assert {fault.kind for fault in one.faults} == {"contradiction", "leak", "double"}  # in the source itself
