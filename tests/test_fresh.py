"""benchmarks/fresh.py: the folders that it writes, and that it writes them again."""

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynadapter.data import VTAB1k
from dynadapter.data.verify import verify

pytest.importorskip("sklearn")
SECOND = ["leaves", "cell_division", "chart_trend", "stacked_sheets"]
NAMES = ["pointer_direction", "scene_distance", "textures", "digits", "dev_symbols", "dev_view", *SECOND]
NATURAL = ["unseen10", "dev_unseen10"]
CLASSES = {"pointer_direction": 8, "textures": 12, "dev_symbols": 12, "dev_view": 12}
CLASSES |= dict.fromkeys(["scene_distance", *SECOND[1:]], 6)


@pytest.fixture(scope="module")
def fresh() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
        yield importlib.import_module("fresh")


@pytest.fixture(scope="module")
def written(fresh, tmp_path_factory) -> tuple[Path, Path]:
    """Return the folder of some images of each task, and a Tiny ImageNet of 22 classes with one image twice in each."""
    root = tmp_path_factory.mktemp("fresh")
    draw, source = np.random.default_rng(0), root / "tiny"
    names = [f"n{k:02d}" for k in range(22)]
    for split, count in (("train", 120), ("val", 4)):
        (source / split).mkdir(parents=True)
        for k, name in enumerate(names):
            pixels = draw.integers(0, 256, (count, 48, 48, 3), dtype=np.uint8)
            pixels[:, :8] = k  # the class
            pixels[-1] = pixels[0]
            grid = pixels.reshape(2, -1, 48, 48, 3).swapaxes(1, 2).reshape(96, -1, 3)
            Image.fromarray(grid).save(source / split / f"{name}.png", compress_level=0)
    (source / "classes.txt").write_text("".join(f"{name}\twords {name}\n" for name in names))
    fresh.main(["--out", str(root / "tasks"), "--tiny", "--tiny_imagenet", str(source)])
    return root / "tasks", source


@pytest.mark.parametrize("name", NAMES + NATURAL)
def test_folder_has_no_faults(written, name):
    """Every list has its images, classes are balanced, and no image is in two lists."""
    data = VTAB1k(written[0], name)
    report = verify(data)
    assert [finding.text for finding in report.findings if finding.kind != "count"] == []
    assert [split.images for split in report.splits] == [24, 24, 24]
    assert data.num_classes == CLASSES.get(name, 10)
    for split in report.splits if name in NAMES else ():
        assert max(split.classes.values()) - min([*split.classes.values()]) <= 1


def test_same_command_writes_same_bytes(fresh, written, tmp_path, capsys):
    fresh.main(
        ["--out", str(tmp_path), "--tiny", "--tiny_imagenet", str(written[1]), "--tasks", *NAMES[:1], *NAMES[2:5]]
    )
    for name in (*NAMES[:1], *NAMES[2:5]):
        files = sorted(path.relative_to(tmp_path) for path in (tmp_path / name).rglob("*") if path.is_file())
        assert len(files) == 3 * 24 + 5
        assert all((tmp_path / file).read_bytes() == (written[0] / file).read_bytes() for file in files)
    capsys.readouterr()
    fresh.main(["--out", str(tmp_path), "--tiny", "--tasks", "textures"])
    assert "is there" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fresh.main(["--out", str(tmp_path), "--tasks", "unseen10"])
    assert "needs --tiny_imagenet" in capsys.readouterr().err


def test_natural_tasks_share_no_class(written):
    """The last 20 classes, every other one in each task, and each image under its own class."""
    names = {task: (written[0] / task / "classes.txt").read_text().split("\n")[:-1] for task in NATURAL}
    assert names["dev_unseen10"] == [f"words n{k:02d}" for k in range(2, 22, 2)]
    assert names["unseen10"] == [f"words n{k:02d}" for k in range(3, 22, 2)]
    for task in NATURAL:
        for path, label in VTAB1k(written[0], task).samples("train"):
            assert f"words n{np.asarray(Image.open(path))[0, 0, 0]:02d}" == names[task][label]


def test_digits_are_each_in_one_list(fresh, monkeypatch):
    """Handwriting of the test images is not in those to train on."""
    held: dict[str, Counter[bytes]] = {}
    for split in ("train800", "val200", "test"):
        seen: Counter[bytes] = Counter()
        monkeypatch.setattr(fresh.drawing, "digit", lambda rng, picture, seen=seen: seen.update([picture.tobytes()]))
        list(fresh.digits("digits", split, 400))
        held[split] = seen
    assert not held["train800"].keys() & held["test"].keys()
    assert not held["val200"].keys() & (held["train800"].keys() | held["test"].keys())
