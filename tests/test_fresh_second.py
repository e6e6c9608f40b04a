"""The second set of fresh tasks: drawn again from its random numbers, and labels read off the drawings another way."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import ndimage, signal


@pytest.fixture(scope="module")
def programs() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
        yield importlib.import_module


def pixels(task: Any, split: str) -> list[bytes]:
    return [image.tobytes() for image, _ in task.images(split, 4)]


def test_set_is_that_of_the_margins(programs):
    margins, tasks = programs("margins"), programs("fresh").tasks()
    assert all(name in tasks for names in margins.SETS.values() for name in names)
    assert not set(margins.FIRST) & set(margins.SECOND)
    assert {tasks[name].group for name in margins.SECOND} == {"Natural", "Specialized", "Structured"}


def test_sweep_of_the_set(programs, tmp_path, monkeypatch):
    transfer, margins = programs("transfer"), programs("margins")
    monkeypatch.setattr(transfer, "dynadapter", lambda arguments: None)
    argv = ["--data", "TASKS", "--recipes", "static", "dynamic", "--adapters", "lora", "--dry_run"]
    monkeypatch.chdir(tmp_path)
    transfer.main([*argv, "--fresh", "second"])
    sweep = yaml.safe_load((tmp_path / "runs" / "second_micro" / "transfer.yaml").read_text())
    assert tuple(sweep["tasks"]) == margins.SECOND
    assert sweep["tasks"]["chart_trend"] == {"group": "Structured", "fresh": True}
    assert (sweep["adapters"], list(sweep["recipes"])) == (["lora"], ["static", "dynamic"])
    outcomes = programs("outcomes").Outcomes.of("micro", sweep, [], margins.SECOND)
    assert outcomes.departures("lora") == ""
    transfer.main([*argv, "--fresh", "first"])
    sweep = yaml.safe_load((tmp_path / "runs" / "transfer_micro" / "transfer.yaml").read_text())
    assert [task for task in sweep["tasks"] if task in margins.FIRST] == list(margins.FIRST)
    assert sweep["tasks"]["gtsrb"] == "Specialized"


@pytest.mark.parametrize("extra", [["--tasks", "cifar10"], ["--fresh", "leaves", "digits"], ["--sweep", "recipes"]])
def test_set_is_read_alone(extra, programs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fresh = [] if "--fresh" in extra else ["--fresh", "second"]
    with pytest.raises(SystemExit):
        programs("transfer").main(["--data", "TASKS", *fresh, *extra])
    assert "name no other task" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["leaves", "cell_division", "chart_trend", "stacked_sheets"])
def test_images_depend_on_list_and_drawing(name, programs):
    """The same numbers draw the same images; every list and every drawing has others."""
    task, other = (programs("fresh").tasks(drawing_of=k)[name] for k in (0, 1))
    assert pixels(task, "train800") == pixels(task, "train800")
    lists = [pixels(one, split) for one in (task, other) for split in ("train800", "val200", "test")]
    assert len({image for images in lists for image in images}) == 6 * 4


def trend(heights: np.ndarray) -> str:
    """Return the trend of values from the polynomials that fit them."""
    _, line, parabola, cubic = np.polynomial.legendre.legfit(np.linspace(-1, 1, len(heights)), heights, 3)
    if max(abs(line), abs(parabola), abs(cubic)) < 0.13:
        return "level"
    if abs(cubic) > 0.6 * max(abs(line), abs(parabola)):
        return "wave"
    if abs(parabola) > 0.7 * abs(line):
        return "valley" if parabola > 0 else "peak"
    return "rising" if line > 0 else "falling"


def test_trend_is_seen(programs):
    second = programs("second")
    names = list(second.TRENDS)
    right = 0
    for k in range(300):
        heights = second.heights(np.random.default_rng(k), k % 6)
        assert 0 < heights.min() < heights.max() <= 1
        right += trend(heights) == names[k % 6]
    assert right > 285


def test_order_of_sheets_is_seen(programs, monkeypatch):
    """Where two sheets overlap, the colour of the upper one is seen."""
    second, seen = programs("second"), []
    plain = second.sheets
    monkeypatch.setattr(second, "sheets", lambda rng: seen.append(plain(rng)) or seen[-1])
    for k in range(24):
        image = np.asarray(second.stack(np.random.default_rng(k), k % 6), dtype=float)
        masks = seen[-1] > 0.99  # from the lowest up
        upper = {}
        for low, high, other in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
            overlap = masks[low] & masks[high] & ~masks[other]
            upper[low, high] = ["red", "green", "blue"][np.median(image[overlap], axis=0).argmax()]
        assert upper[0, 2] == upper[1, 2]
        left = {"red", "green", "blue"} - {upper[1, 2], upper[0, 1]}
        assert (upper[1, 2], upper[0, 1], *left) == second.ORDERS[k % 6]


def stage(bodies: np.ndarray, solid: np.ndarray, threads: bool) -> str:
    """Return the stage of division from masks of the cells and of the chromatin, whose axis is x."""
    cells, parts = ndimage.label(bodies)[1], ndimage.label(solid)[1]
    if threads:
        return "prophase"
    high, wide = (np.ptp(np.nonzero(ndimage.label(solid)[0] == 1)[axis]) + 1 for axis in (0, 1))
    if cells == 2:
        return "divided"
    if parts == 1:
        return "metaphase" if high > 2 * wide else "interphase"
    waist = bodies[:, 32].sum() < 0.9 * bodies.sum(0).max()
    return "telophase" if waist else "anaphase"


def test_stage_is_seen(programs):
    second = programs("second")
    for k in range(60):
        bodies, solid, threads = second.division(np.random.default_rng(k), k % 6)
        masks = [np.max([np.zeros((64, 64)), *map(second.filled, some)], axis=0) > 0.5 for some in (bodies, solid)]
        assert stage(*masks, bool(threads)) == second.STAGES[k % 6]


def test_leaves_are_of_different_kinds(programs):
    """Leaflets and lobes are as many as the plant has, and no two kinds have the same outline."""
    second = programs("second")
    outlines = {name: draw() for name, draw in second.LEAVES.items()}
    leaflets = {name: len(parts) for name, parts in outlines.items() if len(parts) > 1}
    assert leaflets == {"chestnut": 5, "clover": 3, "rowan": 11}
    lobes = {}
    for name in ("beech", "elm", "oak", "willow"):
        half = outlines[name][0][:40, 1]
        lobes[name] = len(signal.find_peaks(np.append(half, 0), prominence=0.02)[0])
    assert lobes == {"beech": 1, "elm": 6, "oak": 4, "willow": 1}
    masks = [np.max([second.filled(0.8 * part) for part in parts], axis=0) > 0.5 for parts in outlines.values()]
    for a, one in enumerate(masks):
        for other in masks[:a]:
            assert (one & other).sum() < 0.92 * (one | other).sum()
