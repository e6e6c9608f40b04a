"""The programs of docs/benchmarks.md turn the lists of fine-grained sets into tables that can be trained on."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynadapter.data import ImageTable

PAGE = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
PROGRAMS = dict(re.findall(r"^```python\n# (\w+)\.py: [^\n]*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def run(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> ImageTable:
    """Run a program of the page on a folder, and open the table that it writes."""
    (root / "program.py").write_text(PROGRAMS[name])
    monkeypatch.setattr(sys, "argv", ["program.py", str(root)])
    runpy.run_path(str(root / "program.py"), run_name="__main__")
    return ImageTable(root / "table.csv", val_fraction=0)


def save(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


def listed(data: ImageTable, split: str) -> list[tuple[str, str]]:
    return [(f"{file.parent.name}/{file.name}", data.class_names[label]) for file, label in data.samples(split)]


def test_lists_of_birds(tmp_path, monkeypatch):
    images = {"7": ("02.Gull/a.jpg", "10", "1"), "3": ("01.Wren/b.jpg", "9", "0"), "x-5": ("01.Wren/c.jpg", "9", "1")}
    for place, name in enumerate(("images", "image_class_labels", "train_test_split")):
        lines = [f"{key} {row[place]}\n" for key, row in sorted(images.items(), reverse=place == 0)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    for path, *_ in images.values():
        save(tmp_path / "images" / path)
    data = run("birds", tmp_path, monkeypatch)
    assert data.class_names == ["9", "10"]
    assert sorted(listed(data, "train")) == [("01.Wren/c.jpg", "9"), ("02.Gull/a.jpg", "10")]
    assert listed(data, "test") == [("01.Wren/b.jpg", "9")]


def test_lists_of_dogs(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    parts = {"train": ["n1-Pug/a.jpg", "n2-Boxer/b.jpg"], "test": ["n1-Pug/c.jpg", "n2-Boxer/d.jpg"]}
    for split, paths in parts.items():
        io.savemat(tmp_path / f"{split}_list.mat", {"file_list": np.array(paths, dtype=object)[:, None]})
        for path in paths:
            save(tmp_path / "Images" / path)
    data = run("dogs", tmp_path, monkeypatch)
    assert {split: listed(data, split) for split in parts} == {
        split: [(path, path.split("/")[0]) for path in paths] for split, paths in parts.items()
    }
