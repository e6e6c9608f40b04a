"""VTAB-1k: the table of tasks, its lists, and messages for faults in them."""

import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data_folder import fails

from dynadapter.data import VTAB_TASKS, VTAB1k, vtab_task

SHARED = Path(__file__).parents[2] / "shared" / "data" / "tasks"


def make(root: Path, task: str = "toys", classes: int = 3, **lists: str) -> Path:
    """A task with 4 training images, 2 validation images and 3 test images, or with the given lists."""
    folder = root / task
    (folder / "images").mkdir(parents=True)
    for i in range(9):
        Image.new("RGB", (6, 4), (i * 20, 0, 0)).save(folder / "images" / f"{i}.png")
    lines = [f"images/{i}.png {i % classes}\n" for i in range(9)]
    default = {"train800": lines[:4], "val200": lines[4:6], "train800val200": lines[:6], "test": lines[6:]}
    for name, content in ({name: "".join(part) for name, part in default.items()} | lists).items():
        (folder / f"{name}.txt").write_text(content)
    return root


def labels(data: VTAB1k, split: str) -> list[int]:
    return [label for _, label in data.dataset(split).samples]


def names(data: VTAB1k, split: str) -> list[str]:
    return [path.name for path, _ in data.dataset(split).samples]


# ---- the table


def test_table_equals_the_benchmark():
    groups = [task.group for task in VTAB_TASKS.values()]
    assert (len(groups), len(set(VTAB_TASKS))) == (19, 19)
    assert [groups.count(group) for group in ("Natural", "Specialized", "Structured")] == [7, 4, 8]
    assert sum(task.classes for task in VTAB_TASKS.values()) == 940  # the mean of 49.5 that papers count heads with
    tested = {group: sum(task.test for task in VTAB_TASKS.values() if task.group == group) for group in set(groups)}
    assert tested == {"Natural": 75_564, "Specialized": 87_138, "Structured": 225_202}
    aliases = [name for task in VTAB_TASKS.values() for name in (task.name, *task.aliases)]
    assert len(aliases) == len(set(aliases))


def test_aliases_name_the_same_task():
    for alias, name in {"cifar100": "cifar", "pets": "oxford_iiit_pet", "flowers102": "oxford_flowers102"}.items():
        assert vtab_task(alias) == VTAB_TASKS[name]
    assert vtab_task("cifar10") is None


# ---- reading


def test_split_selects_the_lists(tmp_path):
    make(tmp_path)
    choose = VTAB1k(tmp_path, "toys")
    assert names(choose, "train") == ["0.png", "1.png", "2.png", "3.png"]
    assert names(choose, "val") == ["4.png", "5.png"]
    final = VTAB1k(tmp_path, "toys", split="train800val200")
    assert names(final, "train") == [f"{i}.png" for i in range(6)]
    assert final.val_dataloader() == []
    assert names(choose, "test") == names(final, "test") == ["6.png", "7.png", "8.png"]
    fails("VTAB1k has no image for val; set split: train800 (", lambda: final.setup("validate"))
    fails("unknown split 'all'; choose from: train800, train800val200", lambda: VTAB1k(tmp_path, "toys", split="all"))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_the_listed_images(tmp_path, workers):
    data = VTAB1k(make(tmp_path), "toys", image_size=8, normalization="none", num_workers=workers, batch_size=2)
    data.setup("test")
    batches = list(data.test_dataloader())
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert targets.tolist() == [0, 1, 2]
    red = torch.tensor([6, 7, 8]) * 20 / 255
    torch.testing.assert_close(images[:, 0], red[:, None, None].expand(3, 8, 8))
    assert not images[:, 1:].any()


def test_known_tasks_have_their_classes(tmp_path):
    make(tmp_path, "oxford_pet")
    for name in ("pets", "oxford_iiit_pet", "oxford_pet"):
        data = VTAB1k(tmp_path, name)
        assert data.folder == tmp_path / "oxford_pet"
        assert data.num_classes == 37
        assert data.class_names == [str(i) for i in range(37)]
    make(tmp_path, "pets", classes=2)
    assert VTAB1k(tmp_path, "pets").folder == tmp_path / "pets"  # what is there by its own name comes first


def test_other_tasks_number_their_classes(tmp_path):
    make(tmp_path, "counted", test="images/0.png 6\n")
    data = VTAB1k(tmp_path, "counted")
    assert data.num_classes == 7
    make(tmp_path, "named")
    (tmp_path / "named" / "classes.txt").write_text("red\r\ndark green\nblue\nnever seen\n")
    assert VTAB1k(tmp_path, "named").class_names == ["red", "dark green", "blue", "never seen"]


def test_lists_may_have_spaces_and_blanks(tmp_path):
    make(tmp_path, test="\ufeffimages/my cat.png\t 2\r\n\r\nimages/0.png 0")
    Image.new("L", (2, 2)).save(tmp_path / "toys" / "images" / "my cat.png")
    data = VTAB1k(tmp_path, "toys")
    assert names(data, "test") == ["my cat.png", "0.png"]
    assert labels(data, "test") == [2, 0]


# ---- mistakes


def test_missing_folder_is_named(tmp_path):
    fails(f"root {tmp_path / 'no'} does not exist", lambda: VTAB1k(tmp_path / "no", "toys"))
    fails("no folder in it holds VTAB lists such as toys/train800.txt", lambda: VTAB1k(tmp_path, "toys"))
    make(make(tmp_path, "cats"), "toys")
    fails(f"no task toy in {tmp_path}; there are: cats, toys; did you mean toys?", lambda: VTAB1k(tmp_path, "toy"))
    fails(f"set root to {tmp_path} and task to toys", lambda: VTAB1k(tmp_path / "toys", "toys"))
    (tmp_path / "bare").mkdir()
    fails("has none of the lists train800.txt", lambda: VTAB1k(tmp_path, "bare"))


def test_missing_list_is_named(tmp_path):
    make(tmp_path)
    (tmp_path / "toys" / "val200.txt").unlink()
    data = VTAB1k(tmp_path, "toys")
    data.setup("test")
    fails(
        "has no val200.txt, which val needs; it has: train800.txt, train800val200.txt, test.txt",
        lambda: data.setup("fit"),
    )


@pytest.mark.parametrize(
    "line", ["images/0.png", "images/0.png one", "images/0.png 1_0", "images/0.png ١", "1", ",1", "a 1.0"]
)
def test_malformed_line_is_refused(tmp_path, line):
    make(tmp_path, val200=f"images/0.png 0\n{line}\n")
    fails(f"val200.txt:2: {line!r} is not 'PATH LABEL'", lambda: VTAB1k(tmp_path, "toys"))


def test_list_must_be_text(tmp_path):
    make(tmp_path)
    (tmp_path / "toys" / "test.txt").write_bytes(b"\xff\xfe\x00")
    fails("test.txt is not text in UTF-8", lambda: VTAB1k(tmp_path, "toys"))
    (tmp_path / "toys" / "test.txt").write_text(" \n")
    fails("test.txt lists no image", lambda: VTAB1k(tmp_path, "toys"))


@pytest.mark.parametrize(
    ("task", "label", "valid"), [("svhn", 10, "0 to 9"), ("toys", -1, "0 to 2"), ("toys", 3, "0 to 2")]
)
def test_label_out_of_range_is_refused(tmp_path, task, label, valid):
    make(tmp_path, task, test=f"images/0.png 0\nimages/1.png {label}\n")
    if label > 0 and task == "toys":
        (tmp_path / task / "classes.txt").write_text("a\nb\nc\n")
    fails(f"test.txt:2: label {label} is out of range; valid labels are {valid}", lambda: VTAB1k(tmp_path, task))


def test_huge_label_is_refused(tmp_path):
    make(tmp_path, test="images/0.png 999999999\n")
    fails("test.txt:1: label 999999999 is higher than the number of listed images", lambda: VTAB1k(tmp_path, "toys"))


def test_wrong_class_names_are_refused(tmp_path):
    make(tmp_path, "kitti")
    (tmp_path / "kitti" / "classes.txt").write_text("a\nb\nc\n")
    fails("classes.txt names 3 classes; the task has 4", lambda: VTAB1k(tmp_path, "kitti"))
    (tmp_path / "kitti" / "classes.txt").write_text("a\nb\na\nc\n")
    fails("classes.txt names a class twice: a", lambda: VTAB1k(tmp_path, "kitti"))


def test_missing_image_is_named(tmp_path):
    make(tmp_path, test="images/0.png 0\nimages/gone.png 1\nimages/too.png 1\n")
    data = VTAB1k(tmp_path, "toys")
    data.setup("fit")
    fails(
        f"test.txt:2: image images/gone.png does not exist in {tmp_path / 'toys'} (2 of the 3 listed images",
        lambda: data.setup("test"),
    )
    skipping = VTAB1k(tmp_path, "toys", on_error="skip")
    with pytest.warns(UserWarning, match=r"test: skipped 2 .*gone.png \(No such file or directory\)"):
        skipping.setup("test")
    assert names(skipping, "test") == ["0.png"]


def test_real_task_is_read(tmp_path):
    archive = SHARED / "shapes_count.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not on this machine")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    data = VTAB1k(tmp_path, "shapes_count", image_size=32, normalization="half")
    data.setup("fit")
    data.setup("test")
    assert data.num_classes == 8
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [800, 200, 2000]
    images, targets = next(iter(data.val_dataloader()))
    assert images.shape == (64, 3, 32, 32)
    assert (images.min() >= -1, images.max() <= 1, len(targets.unique())) == (True, True, 8)
