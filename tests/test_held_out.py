"""Which images are held out, and whether a calibration knows the images of the training."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import raises_one_line
from PIL import Image
from test_data_vtab import make as make_vtab
from tiny import make_classifier, trainer

from dynadapter.cli.calibration_images import check_images
from dynadapter.cli.errors import Mistake
from dynadapter.data import ImageData, ImageFolder, Shapes, VTAB1k
from dynadapter.data.identity import image_keys
from dynadapter.data.splits import hold_out


def fill(root: Path, start: int, count: int, classes: str = "ab", split: str = "train") -> Path:
    generator = np.random.default_rng(start)
    for name in classes:
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for k in range(start, start + count):
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{k}.png")
    return root


def names(data: ImageData, split: str) -> set[str]:
    return {str(path) for path, _ in data.dataset(split).samples}


# ---- the rule


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_hold_out_keeps_classes_on_both_sides(fraction: float) -> None:
    images = [(name, f"{k}.png") for name, count in {"a": 600, "b": 40, "c": 2, "d": 1}.items() for k in range(count)]
    kept, held = hold_out(images, fraction, seed=3)
    assert sorted(kept + held) == list(range(643))
    assert (kept, held) == (sorted(kept), sorted(held))
    out = {name: sum(images[i][0] == name for i in held) for name in "abcd"}
    if not fraction:
        assert held == []
        return
    assert out["d"] == 0
    assert out["c"] == 1
    assert 1 <= out["b"] <= 39
    deviation = (600 * fraction * (1 - fraction)) ** 0.5
    assert abs(out["a"] - 600 * fraction) < 4 * deviation
    assert hold_out(images, fraction, seed=4)[1] != held


@pytest.mark.parametrize("seed", range(5))
def test_added_images_move_no_trained_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    images = [("ab"[k % 2], f"{generator.integers(10**9)}/{k}.png") for k in range(120)]
    for before in (20, 60, 119):
        kept = {images[i] for i in hold_out(images[:before], 0.2, seed)[0]}
        order = generator.permutation(120)
        later = [images[i] for i in order]
        held = {later[i] for i in hold_out(later, 0.2, seed)[1]}
        assert not kept & held


def test_new_files_move_no_trained_one(tmp_path: Path) -> None:
    one = ImageFolder(fill(tmp_path, 10, 20))
    trained, held = names(one, "train"), names(one, "val")
    fill(tmp_path, 0, 10)  # sorted before and among the others
    fill(tmp_path, 100, 10)
    two = ImageFolder(tmp_path)
    assert trained <= names(two, "train")
    assert held <= names(two, "val")
    shutil.move(tmp_path, tmp_path.parent / "elsewhere")
    moved = ImageFolder(tmp_path.parent / "elsewhere")
    assert {Path(path).name for path in names(moved, "val")} == {Path(path).name for path in names(two, "val")}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Valid"])
def test_names_of_the_validation_folder(name: str, tmp_path: Path) -> None:
    fill(fill(tmp_path, 0, 10), 10, 3, split=name)
    data = ImageFolder(tmp_path)
    assert len(data.dataset("train")) == 20
    assert {Path(path).parent.parent.name for path in names(data, "val")} == {name}
    fill(tmp_path, 0, 1, split="val" if name == "valid" else "valid")
    with pytest.raises(ValueError, match=r"two folders for val: .*; keep one of them"):
        ImageFolder(tmp_path)


# ---- calibrate


def trained_on(data: ImageData, path: Path) -> str:
    """Save what a checkpoint keeps of the images of a training."""
    module, fitting = make_classifier(num_classes=data.num_classes), trainer(max_steps=1, limit_val_batches=1)
    fitting.fit(module, datamodule=data)
    fitting.save_checkpoint(path, weights_only=True)
    return str(path)


def few(cls: type[ImageData], *args: Any, **options: Any) -> ImageData:
    return cls(*args, batch_size=2, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path / "set", 0, 20)


def test_calibration_on_held_out_images(root, tmp_path):
    file = trained_on(few(ImageFolder, root), tmp_path / "a.ckpt")
    assert check_images(ImageFolder(root), "val", file, guarantee=True) == ()
    moved = shutil.copytree(root, tmp_path / "moved")
    assert check_images(ImageFolder(moved), "val", file) == ()
    fill(root, 50, 20)
    [note] = check_images(ImageFolder(root), "val", file, guarantee=True)
    assert "were not held out in the training, and 0 that were are missing" in note


@pytest.mark.parametrize("guarantee", [False, True])
@pytest.mark.parametrize("change", [{"split_seed": 1}, {"val_fraction": 0.9}])
def test_calibration_on_trained_images_raises(change, guarantee, root, tmp_path):
    file = trained_on(few(ImageFolder, root), tmp_path / "a.ckpt")
    with raises_one_line(Mistake, match=r"the network was trained on \d+ of the \d+ validation images"):
        check_images(ImageFolder(root, **change), "val", file, guarantee)


@pytest.mark.parametrize("split", ["val", "test"])
def test_copies_of_trained_images_are_known(split, root, tmp_path):
    file = trained_on(few(ImageFolder, root), tmp_path / "a.ckpt")
    other = fill(tmp_path / "other", 1000, 30)
    fill(other, 2000, 30, split=split)
    source = next(iter(names(ImageFolder(root), "train")))
    shutil.copy(source, other / split / "a" / "another_name.png")
    with pytest.raises(Mistake, match=r"trained on 1 of the 61 .* images, and a guarantee for future images"):
        check_images(ImageFolder(other), split, file, guarantee=True)
    data = ImageFolder(other)
    notes = check_images(data, split, file)
    assert "1 of the 61" in notes[0]
    assert len(data.dataset(split)) == (60 if split == "val" else 61)  # it is left out


def test_guarantee_on_training_images_raises(root, tmp_path):
    file = trained_on(few(ImageFolder, root), tmp_path / "a.ckpt")
    with pytest.raises(Mistake, match="a guarantee for future images needs others"):
        check_images(ImageFolder(root), "train", file, guarantee=True)
    assert check_images(ImageFolder(root), "train", file) == ()


def test_calibration_of_lists_and_drawn_images(tmp_path):
    make_vtab(tmp_path)
    whole = few(VTAB1k, str(tmp_path), "toys", split="train800val200", on_error="skip")
    file = trained_on(whole, tmp_path / "all.ckpt")
    now = VTAB1k(str(tmp_path), "toys", split="train800")
    with pytest.raises(Mistake, match="trained on 2 of the 2 validation images"):
        check_images(now, "val", file)
    file = trained_on(few(Shapes, 8, 4, 4), tmp_path / "b.ckpt")
    drawn = Shapes(8, 4, 4)
    drawn.take_preprocessing({"image_size": 32}, trained=False)
    assert check_images(drawn, "val", file, guarantee=True) == ()
    with pytest.raises(Mistake, match="trained on 8 of the 8 training images"):
        check_images(drawn, "train", file, guarantee=True)


@pytest.mark.parametrize("images", [{}, {"by": "name"}, {"by": "path", "train": 1, "val": "x"}])
def test_unknown_training_images_are_a_note(images, tmp_path):
    file = trained_on(few(Shapes, 8, 4, 4), tmp_path / "a.ckpt")
    content = torch.load(file, weights_only=True)
    torch.save(content | {"dynadapter": content["dynadapter"] | {"images": images}}, file)
    [note] = check_images(Shapes(8, 4, 4), "val", file)
    assert "the images of the training are unknown" in note


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, {"dynadapter": {"images": {}}}, None])
def test_foreign_checkpoint_is_one_line(content, tmp_path):
    """Also one that is cut off."""
    file = tmp_path / "a.ckpt"
    torch.save(content, file)
    if content is None:
        file.write_bytes(file.read_bytes()[:-20])
    with raises_one_line(Mistake, match=r"a\.ckpt"):
        check_images(Shapes(8, 4, 4), "val", str(file))


def test_large_sets_are_compared_by_path(root, tmp_path, monkeypatch):
    monkeypatch.setattr("dynadapter.data.identity.HASHED_BYTES", 100)
    file = trained_on(few(ImageFolder, root), tmp_path / "a.ckpt")
    moved = shutil.copytree(root, tmp_path / "moved")
    assert check_images(ImageFolder(moved), "val", file) == ()
    with pytest.raises(Mistake, match="was trained on"):
        check_images(ImageFolder(moved, split_seed=1), "val", file)


def test_keys_of_equal_images_are_equal(root):
    paths = sorted((root / "train" / "a").iterdir())
    by, keys = image_keys([*paths, paths[0], root / "missing.png"])
    assert by == "content"
    assert len(keys.unique()) == len(paths) + 1
    assert (keys[0] == keys[-2]).item()
    assert keys[-1] == 0
