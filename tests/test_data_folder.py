"""Image folders: classes, splits, and messages for missing parts."""

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dynadapter.data import ImageFolder


def make(root: Path, **splits: dict[str, int]) -> Path:
    """Write ``root/split/CLASS/0.png`` and so on."""
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 3), (i, i, i)).save(folder / f"{i}.png")
    return root


def listed(data: ImageFolder, split: str) -> list[tuple[str, int]]:
    return [(str(path.relative_to(data.root)), label) for path, label in data.dataset(split).samples]


def fails(words: str, make_data) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        make_data()
    assert "\n" not in str(caught.value)


def test_classes_are_matched_by_name(tmp_path):
    make(tmp_path, train={"cat": 2, "ant": 1, "bee": 1}, val={"cat": 1}, test={"cat": 1, "bee": 2})
    data = ImageFolder(tmp_path)
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.num_classes == 3
    assert listed(data, "train") == [
        ("train/ant/0.png", 0),
        ("train/bee/0.png", 1),
        ("train/cat/0.png", 2),
        ("train/cat/1.png", 2),
    ]
    assert listed(data, "val") == [("val/cat/0.png", 2)]
    assert listed(data, "test") == [("test/bee/0.png", 1), ("test/bee/1.png", 1), ("test/cat/0.png", 2)]


def test_train_is_split_without_val(tmp_path):
    make(tmp_path, train={"a": 10, "b": 20, "c": 1})
    data = ImageFolder(tmp_path, val_fraction=0.3)
    train, val = listed(data, "train"), listed(data, "val")
    assert set(Counter(label for _, label in val)) == {0, 1}
    assert 4 <= len(val) <= 14
    assert not set(train) & set(val)
    assert len(set(train) | set(val)) == 31
    assert listed(ImageFolder(str(tmp_path), val_fraction=0.3), "val") == val
    assert listed(ImageFolder(tmp_path, val_fraction=0.3, split_seed=1), "val") != val


def test_val_fraction_0_means_no_validation(tmp_path):
    make(tmp_path, train={"a": 3, "b": 3})
    data = ImageFolder(tmp_path, val_fraction=0, image_size=4)
    data.setup("fit")
    assert len(data.dataset("train")) == 6
    assert data.val_dataloader() == []
    fails("ImageFolder has no image for val; set val_fraction above 0", lambda: data.setup("validate"))


def test_images_are_found_at_any_depth(tmp_path):
    make(tmp_path, train={"a": 1, "b/deep/er": 2, ".cache": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "._0.png").write_text("not an image")
    data = ImageFolder(tmp_path, val_fraction=0)
    assert data.class_names == ["a", "b"]
    assert [label for _, label in listed(data, "train")] == [0, 1, 1]


def test_unknown_class_lists_both_splits(tmp_path):
    make(tmp_path, train={"a": 1, "b": 1}, test={"a": 1, "z": 1})
    fails("test has classes that train does not have: z; train has: a, b", lambda: ImageFolder(tmp_path).setup("test"))


def test_missing_folder_is_named(tmp_path):
    fails(f"root {tmp_path / 'no'} does not exist", lambda: ImageFolder(tmp_path / "no"))
    fails(
        f"{tmp_path / 'train'} does not exist; expected train/CLASS/image.png or {tmp_path.name}/CLASS/image.png, "
        "but root contains: no folder",
        lambda: ImageFolder(tmp_path),
    )
    make(tmp_path, cats={"a": 1}, dogs={"b": 1})
    fails("but root contains: cats, dogs", lambda: ImageFolder(tmp_path))
    (tmp_path / "train").mkdir()
    fails("holds no class folder", lambda: ImageFolder(tmp_path))
    make(tmp_path, train={"a": 1})
    fails("test does not exist; expected test/CLASS/image.png", lambda: ImageFolder(tmp_path).setup("test"))


def test_class_without_images_is_named(tmp_path):
    make(tmp_path, train={"a": 1, "b": 0}, val={"a": 0})
    fails("train for: b; looked for files ending in .png", lambda: ImageFolder(tmp_path).setup("fit"))
    fails("val for: a; looked for files", lambda: ImageFolder(tmp_path).setup("validate"))


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_val_fraction_out_of_range(tmp_path, fraction):
    fails("val_fraction must lie in [0, 1)", lambda: ImageFolder(make(tmp_path, train={"a": 1}), val_fraction=fraction))


def test_root_of_classes_is_train(tmp_path):
    flat = make(tmp_path / "one", **{".": {"a": 10, "b": 20}})
    split = make(tmp_path / "two", train={"a": 10, "b": 20})
    one, two = ImageFolder(flat), ImageFolder(split)
    assert one.class_names == ["a", "b"]
    for name in ("train", "val"):  # the same images are held out
        assert listed(one, name) == [(path.removeprefix("train/"), label) for path, label in listed(two, name)]
    fails("test does not exist; expected test/CLASS/image.png", lambda: ImageFolder(flat).setup("test"))
    make(flat, c={"deep": 1})  # a folder without an image of its own: this may be a folder of data sets
    fails(f"expected train/CLASS/image.png or {flat.name}/CLASS/image.png", lambda: ImageFolder(flat))
    fails("root contains: a, b, c; no image in: c", lambda: ImageFolder(flat))


def test_test_alone_can_be_measured(tmp_path):
    data = ImageFolder(make(tmp_path, test={"b": 2, "d": 1}), image_size=4)
    data.take_classes(["a", "b", "c", "d"])
    assert listed(data, "test") == [("test/b/0.png", 1), ("test/b/1.png", 1), ("test/d/0.png", 3)]
    fails("train does not exist; expected train/CLASS/image.png, but root contains: test", lambda: data.setup("fit"))
    fails("train does not exist", lambda: data.setup("validate"))
