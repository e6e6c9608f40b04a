"""Images and classes on the command line: unreadable images are listed, and classes are matched by name."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, refused
from PIL import Image

from dynadapter.cli import main

NAMES = ("dark", "grey", "white")
OPTIONS = ["--data=VTAB1k", "--data.task=task", "--data.image_size=32", "--data.batch_size=8"]


def make(root: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Write a task of dark, grey and white images, with class indices in the order of the names."""
    (root / "task" / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for k in range(30):
        pixels = rng.integers(0, 60, (9, 9, 3), dtype=np.uint8) + np.uint8(90 * (k % 3))
        Image.fromarray(pixels).save(root / "task" / "images" / f"{k}.png")
        lines.append(f"images/{k}.png {names.index(NAMES[k % 3])}\n")
    for split, part in {"train800": lines[:18], "val200": lines[18:24], "test": lines[24:]}.items():
        (root / "task" / f"{split}.txt").write_text("".join(part))
    (root / "task" / "classes.txt").write_text("\n".join(names))
    return root


def listed(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on a set that holds one unreadable image."""
    folder = tmp_path_factory.mktemp("trained")
    make(folder / "data")
    (folder / "data" / "task" / "images" / "7.png").write_bytes(b"no image")
    where = [f"--data.root={folder / 'data'}", f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=4"]
    with pytest.warns(UserWarning, match=r"train: skipped 1 unreadable image"):
        main(["fit", "-c", TINY, *OPTIONS, *where, "--data.on_error=skip", "--trainer.limit_train_batches=null"])
    return folder / "version_0"


def test_images_skipped_in_fit_are_listed(trained):
    image = trained.parent / "data" / "task" / "images" / "7.png"
    reason = "not an image of a known format (PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM)"
    assert listed(trained / "skipped.csv") == [["file", "reason"], [str(image), reason]]
    record = json.loads((trained / "run.json").read_text())
    assert record["data"]["splits"]["train"]["images"] == 17
    assert record["data"]["class_names"] == list(NAMES)


def test_images_skipped_in_predict_are_listed(trained, tmp_path):
    shutil.copytree(trained.parent / "data" / "task" / "images", tmp_path / "images")
    ckpt = trained / "checkpoints" / "last.ckpt"
    args = ["predict", "--ckpt_path", str(ckpt), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "p.csv")]
    main(args)
    assert len(listed(tmp_path / "p.csv")) == 30
    assert [row[0] for row in listed(tmp_path / "p.csv.skipped.csv")] == ["file", str(tmp_path / "images" / "7.png")]
    (tmp_path / "images" / "7.png").unlink()
    main([*args, "--overwrite=true"])
    assert not (tmp_path / "p.csv.skipped.csv").exists()  # the old list does not belong to the new table


def test_too_many_unreadable_images(trained, capsys):
    data = trained.parent / "data"
    args = ["fit", "-c", TINY, *OPTIONS, f"--data.root={data}", "--data.on_error=skip", "--data.max_skipped=0"]
    line = refused(args, capsys)
    assert "error: 1 images cannot be read, more than max_skipped=0: " in line
    assert "7.png" in line


@pytest.mark.parametrize("command", ["test", "validate"])
def test_classes_are_matched_by_name(command, trained, tmp_path):
    def results(root: Path) -> dict[str, float]:
        args = [f"--data.root={root}", f"--trainer.default_root_dir={root}", "--trainer.limit_test_batches=null"]
        main([command, "--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), *OPTIONS, *args])
        found: dict[str, float] = json.loads((root / f"{command}_0" / "run.json").read_text())["results"]
        return found

    expected = results(make(tmp_path / "same"))
    assert results(make(tmp_path / "other", ("white", "dark", "grey"))) == expected
    wrong = make(tmp_path / "wrong", ("white", "dark", "grey"))
    (wrong / "task" / "classes.txt").write_text("\n".join(NAMES))
    assert results(wrong) != expected


def test_other_classes_are_refused(trained, tmp_path, capsys):
    root = make(tmp_path)
    (root / "task" / "classes.txt").write_text("dark\ngray\nwhite")
    ckpt = trained / "checkpoints" / "last.ckpt"
    line = refused(["test", "--ckpt_path", ckpt, *OPTIONS, f"--data.root={root}"], capsys)
    assert "classes that the model does not know: gray" in line
    assert "dark, grey, white; the data have dark, gray, white" in line
    assert "compute_fn" not in line


def test_resumed_fit_matches_classes_by_name(trained, tmp_path):
    """The class list was reordered before the run was resumed; the labels of the images are the same."""
    ends = []
    for order in (NAMES, ("white", "dark", "grey")):
        root = make(tmp_path / order[0], order)
        args = ["fit", "-c", TINY, *OPTIONS, f"--data.root={root}", f"--trainer.default_root_dir={root}"]
        ckpt = str(trained / "checkpoints" / "last.ckpt")
        main([*args, "--trainer.max_epochs=5", "--trainer.limit_train_batches=null", "--ckpt_path", ckpt])
        ends.append(torch.load(root / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
