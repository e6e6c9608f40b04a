"""The tasks that benchmarks draw for themselves."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dynadapter import VTAB1k

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def drawn() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield importlib.import_module("drawn")


def test_as_many_shapes_are_seen_as_the_label_says(drawn, monkeypatch):
    gray = (128, 128, 128)
    monkeypatch.setattr(drawn, "ground", lambda rng: (Image.new("RGB", (drawn.SIDE, drawn.SIDE), gray), gray))
    for k in range(40):
        image, label = drawn.count(Random(k))
        assert ndimage.label((np.asarray(image) != gray).any(-1), np.ones((3, 3)))[1] == label + 1


def test_the_label_says_how_low_the_shape_lies(drawn, monkeypatch):
    gray = (128, 128, 128)
    monkeypatch.setattr(drawn, "ground", lambda rng, rough: (Image.new("RGB", (drawn.SIDE, drawn.SIDE), gray), gray))
    for k in range(40):
        image, label = drawn.position(Random(k))
        rows = np.nonzero((np.asarray(image) != gray).any(-1))[0]
        low = rows.mean() / drawn.FINER  # 9 to 55 of 64 pixels, in 12 steps
        assert abs((low - 9) / 46 * 12 - (label + 0.5)) < 1


def test_a_picture_is_the_same_every_time_and_every_class_turns_up(drawn):
    for name, classes in (("drawn_count", 7), ("drawn_position", 12), ("drawn_direction", 12), ("drawn_letter", 35)):
        pictures = [drawn.TASKS[name](Random(k)) for k in range(2)]
        again = [drawn.TASKS[name](Random(k)) for k in range(2)]
        assert [label for _, label in pictures] == [label for _, label in again]
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(pictures, again, strict=True))
        labels = {drawn.TASKS[name](Random(k))[1] for k in range(4 * classes)}
        assert labels <= set(range(classes))
        assert len(labels) >= 0.8 * classes


def test_the_loader_reads_what_was_drawn_and_nothing_is_in_two_splits(drawn, tmp_path, monkeypatch, capsys):
    white = Image.new("RGB", (8, 8), "white")
    monkeypatch.setitem(drawn.TASKS, "drawn_count", lambda rng: (white, rng.randrange(7)))
    command = ["--out", str(tmp_path), "--tasks", "drawn_count", "--validation", "300", "--test", "20"]
    drawn.main(command)
    assert "1120 images" in capsys.readouterr().out
    data = VTAB1k(tmp_path, "drawn_count", image_size=8)
    assert [len(data.samples(part)) for part in ("train", "val", "test")] == [800, 300, 20]
    assert data.num_classes == 7
    lists = {
        part: (tmp_path / "drawn_count" / f"{part}.txt").read_text().splitlines() for part in ("train800", "val200")
    }
    both = (tmp_path / "drawn_count" / "train800val200.txt").read_text().splitlines()
    assert both == [*lists["train800"], *lists["val200"][:200]]
    assert not set(lists["train800"]) & set(lists["val200"])
    with pytest.raises(SystemExit):
        drawn.main(command)
    assert "is there already" in capsys.readouterr().err


def test_too_few_validation_images_are_refused(drawn, tmp_path, capsys):
    with pytest.raises(SystemExit):
        drawn.main(["--out", str(tmp_path), "--validation", "100"])
    assert "--validation must be at least 200" in capsys.readouterr().err
