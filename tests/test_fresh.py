"""benchmarks/fresh.py: the folders that it writes, again the same, and what is drawn in them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import ndimage, signal

from dynadapter.cli import sweep_file
from dynadapter.data import VTAB1k
from dynadapter.data.verify import verify
from dynadapter.sweep.plan import as_dict

pytest.importorskip("sklearn")
SECOND = ["leaves", "cell_division", "chart_trend", "stacked_sheets"]
NAMES = ["pointer_direction", "scene_distance", "textures", "digits", "dev_symbols", "dev_view", *SECOND]
NATURAL = ["unseen10", "dev_unseen10"]
CLASSES = {"pointer_direction": 8, "textures": 12, "dev_symbols": 12, "dev_view": 12}
CLASSES |= dict.fromkeys(["scene_distance", *SECOND[1:]], 6)


@pytest.fixture(scope="module")
def fresh(program) -> Any:
    return program("fresh")


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


# ---- the second set of tasks


def pixels(task: Any, split: str) -> list[bytes]:
    return [image.tobytes() for image, _ in task.images(split, 4)]


def test_set_is_that_of_the_margins(program, written):
    margins, tasks = program("margins"), program("fresh").tasks(written[1])
    assert all(name in tasks for names in margins.SETS.values() for name in names)
    assert not set(margins.FIRST) & set(margins.SECOND) | set(margins.THIRD) & {*margins.FIRST, *margins.SECOND}
    for names in (margins.SECOND, margins.THIRD):
        assert {tasks[name].group for name in names} == {"Natural", "Specialized", "Structured"}


def test_sweep_of_the_set(program, tmp_path, monkeypatch):
    transfer, margins = program("transfer"), program("margins")
    monkeypatch.setattr(transfer, "dynadapter", lambda arguments: None)
    argv = ["--data", "TASKS", "--recipes", "static", "dynamic", "--adapters", "lora", "--dry_run"]
    monkeypatch.chdir(tmp_path)
    transfer.main([*argv, "--fresh", "second"])
    sweep = yaml.safe_load((tmp_path / "runs" / "second_micro" / "second_micro.yaml").read_text())
    assert tuple(sweep["tasks"]) == margins.SECOND
    assert sweep["tasks"]["chart_trend"] == {"group": "Structured", "fresh": True}
    assert (sweep["adapters"], list(sweep["recipes"])) == (["lora"], ["static", "dynamic"])
    outcomes = program("outcomes").Outcomes.of("micro", sweep, [], margins.SECOND)
    assert outcomes.departures("lora") == ""
    transfer.main([*argv, "--fresh", "first"])
    sweep = yaml.safe_load((tmp_path / "runs" / "transfer_micro" / "transfer_micro.yaml").read_text())
    assert [task for task in sweep["tasks"] if task in margins.FIRST] == list(margins.FIRST)
    assert sweep["tasks"]["gtsrb"] == "Specialized"
    transfer.main([*argv, "--fresh", "third"])
    sweep = yaml.safe_load((tmp_path / "runs" / "third_micro" / "third_micro.yaml").read_text())
    assert tuple(sweep["tasks"]) == margins.THIRD
    assert sweep["seeds"] == {adapter: [0, 1, 2] for adapter in margins.SEEDS}
    transfer.main([*argv, "--fresh", "photographs", "--tasks", "cifar10", "--backbone", "plain.safetensors"])
    sweep = yaml.safe_load((tmp_path / "runs" / "photographs_plain" / "photographs_plain.yaml").read_text())
    assert sweep["tasks"] == {"cifar10": "Natural", "unseen10": {"group": "Natural", "fresh": True}}


def planned(program: Any, tmp_path: Path, *argv: str) -> dict[str, Any]:
    """Return the file of the sweep of a call."""
    program("transfer").main(["--data", "TASKS", "--out", str(tmp_path), *argv])
    plan: dict[str, Any] = yaml.safe_load((tmp_path / "tiny_micro.yaml").read_text())
    return plan


def test_tiny_follows_other_options(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program("transfer"), "dynadapter", lambda arguments: None)
    plan = planned(program, tmp_path, "--tiny")
    assert (plan["adapters"], plan["scales"], plan["seeds"], len(plan["tasks"])) == (["lora"], [10], [0], 1)
    plan = planned(program, tmp_path, "--tiny", "--adapters", "repadapter", "--scales", "3")
    assert (plan["adapters"], plan["scales"]) == (["repadapter"], [3.0])
    plan = planned(program, tmp_path, "--tiny", "--validation")
    assert (plan["seeds"], plan["search_seeds"]) == ([], [0])  # no test image


def test_part_of_a_sweep_replaces_nothing(program, tmp_path):
    """The kept files stay if they have runs that a call lacks; a call without a table keeps the lines."""
    transfer, out = program("transfer"), tmp_path / "out"
    (tmp_path / "cifar10").mkdir()
    out.mkdir()
    recipes = {"static": ["vtab", "static"], "dynamic": ["vtab"]}

    def keep(*names: str, settings: dict[str, Any] | None = None) -> list[str]:
        sweep = {"tasks": {"cifar10": "Natural"}, "recipes": {name: recipes[name] for name in names}, "scales": [10]}
        sweep |= {"seeds": [], "search_seeds": [0], "settings": settings or {}}
        file = tmp_path / "transfer.yaml"
        file.write_text(yaml.safe_dump(sweep | {"root": str(tmp_path), "out": str(out)}))
        plan = sweep_file.read(str(file)).sweep
        goal = {plan.goals[0].name: {"accuracy": 0.5}}
        text = [
            {"run": as_dict(unit), "exits": [{"accuracy": 0.5, "loss": 1.0}], "policies": goal}
            for unit in plan.needed({})
        ]
        (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text))
        transfer.keep(file, sweep, tmp_path / "kept" / "transfer_vit.augreg")
        return (tmp_path / "kept" / "transfer_vit.augreg.jsonl").read_text().splitlines()

    both = keep("static", "dynamic")
    names = [path.name for path in sorted((tmp_path / "kept").iterdir())]
    assert names == ["transfer_vit.augreg.jsonl", "transfer_vit.augreg.yaml"]
    with pytest.raises(
        SystemExit, match="has runs that this sweep lacks, such as cifar10, lora, dynamic, seed 0, train800;"
    ):
        keep("static")
    assert (tmp_path / "kept" / "transfer_vit.augreg.jsonl").read_text().splitlines() == both
    changed = keep("static", "dynamic", settings={"trainer": {"max_epochs": 3}})
    assert len(changed) == 2
    assert not set(changed) & set(both)


def test_part_is_refused_before_training(program, tmp_path, monkeypatch):
    """Runs that the call cannot have are found at once; --dry_run and --tiny keep nothing."""
    transfer, calls = program("transfer"), []
    monkeypatch.setattr(transfer, "dynadapter", calls.append)
    run = {"task": "cifar10", "adapter": "adapter", "recipe": "static", "seed": 1, "split": "train800val200"}
    (tmp_path / "transfer_micro.jsonl").write_text(json.dumps({"run": run}) + "\n")
    argv = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--results", str(tmp_path), "--tasks", "cifar10"]
    words = "such as cifar10, adapter, static, seed 1, train800val200; name the tasks, adapters, recipes and seeds"
    with pytest.raises(SystemExit, match=words):
        transfer.main([*argv, "--adapters", "lora"])
    assert not calls
    transfer.main([*argv, "--adapters", "lora", "--dry_run"])
    with pytest.raises(SystemExit, match=words):  # at the end: the stand-in trained nothing
        transfer.main([*argv, "--adapters", "lora", "adapter"])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "extra",
    [
        ["--tasks", "cifar10"],
        ["--fresh", "leaves", "digits"],
        ["--fresh", "photographs", "digits"],
        ["--sweep", "recipes"],
    ],
)
def test_set_is_read_alone(extra, program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fresh = [] if "--fresh" in extra else ["--fresh", "second"]
    with pytest.raises(SystemExit):
        program("transfer").main(["--data", "TASKS", *fresh, *extra])
    assert "name no other task" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["leaves", "cell_division", "chart_trend", "stacked_sheets"])
def test_images_depend_on_list_and_drawing(name, program):
    """The same numbers draw the same images; every list and every drawing has others."""
    task, other = (program("fresh").tasks(drawing_of=k)[name] for k in (0, 1))
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


def test_trend_is_seen(program):
    second = program("second")
    names = list(second.TRENDS)
    right = 0
    for k in range(300):
        heights = second.heights(np.random.default_rng(k), k % 6)
        assert 0 < heights.min() < heights.max() <= 1
        right += trend(heights) == names[k % 6]
    assert right > 285


def test_order_of_sheets_is_seen(program, monkeypatch):
    """Where two sheets overlap, the colour of the upper one is seen."""
    second, seen = program("second"), []
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


def test_stage_is_seen(program):
    second = program("second")
    for k in range(60):
        bodies, solid, threads = second.division(np.random.default_rng(k), k % 6)
        masks = [np.max([np.zeros((64, 64)), *map(second.filled, some)], axis=0) > 0.5 for some in (bodies, solid)]
        assert stage(*masks, bool(threads)) == second.STAGES[k % 6]


def test_leaves_are_of_different_kinds(program):
    """Leaflets and lobes are as many as the plant has, and no two kinds have the same outline."""
    second = program("second")
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


# ---- the third set of tasks


def test_place_of_the_disc_is_seen(program):
    third = program("third")
    for k in range(100):
        frame, half, disc, radius = third.two_things(np.random.default_rng(k), k % 5)
        assert np.abs([frame - half, frame + half, disc - radius, disc + radius]).max() < 1.1
        way = disc - frame
        inside = np.abs(way).max() + radius < half
        across = np.abs(way[0]) > np.abs(way[1])
        names = ("left", "right") if across else ("above", "below")
        assert ("inside" if inside else names[int(way[0 if across else 1] > 0)]) == list(third.SIDES)[k % 5]


def test_largest_disc_is_seen(program):
    """It is the largest by far, and its centre is in the row and the column of the label."""
    third = program("third")
    for k in range(90):
        radii, centres = third.nine(np.random.default_rng(k), k % 9)
        smaller, largest = np.sort(radii)[-2:]
        assert radii.argmax() == k % 9
        assert largest > 1.7 * smaller
        rank = [(centres[:, axis] < centres[k % 9, axis] - 0.3).sum() // 3 for axis in (1, 0)]
        row, column = third.PLACES[k % 9].split()
        assert rank == [["upper", "middle", "lower"].index(row), ["left", "centre", "right"].index(column)]


def test_wings_and_land_are_of_different_kinds(program):
    """The tails are as far from the middle as they should be, and the uses of land differ in direction and scale."""
    third, far = program("third"), np.linspace(-0.97, 0.97, 200)
    radii = {name: wing(far) for name, wing in third.WINGS.items()}
    assert {name: round(float(far[radius.argmax()]), 1) for name, radius in radii.items() if name != "scalloped"} == {
        "round": -0.5,
        "pointed": -0.5,
        "tailed": 0.7,
    }
    assert len(signal.find_peaks(radii["scalloped"])[0]) == 9
    u, v = np.meshgrid(np.linspace(0, 8, 64), np.linspace(0, 8, 64))
    for name, use in third.LAND.items():
        height = np.asarray(use(u + 50, v + 50, np.random.default_rng(0)), dtype=float)
        assert height.shape == (64, 64), name
        assert height.std() > 0.1, name
        rows = np.abs(np.diff(height, axis=0)).mean() / np.abs(np.diff(height, axis=1)).mean()
        assert (rows < 0.01) == (name == "ploughed"), name
