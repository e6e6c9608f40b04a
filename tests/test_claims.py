"""The claims, judged from synthetic lines whose truth is known, and the interval behind them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from dynadapter.sweep.lines import as_text, right_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IMAGES = 400
COSTS = {4: [25.0, 50.0, 75.0, 100.0], 1: [100.0]}
PROTOCOL = yaml.safe_load((BENCHMARKS / "transfer.yaml").read_text())
SWEEP: dict[str, Any] = {
    "tasks": {"leaves": "Natural", "cell_division": "Specialized", "chart_trend": None, "stacked_sheets": None},
    "recipes": PROTOCOL["recipes"],
    "goal": PROTOCOL["goal"],
    "search_seeds": [0],
    "adapters": ["lora"],
    "seeds": {"lora": [0, 1, 2]},
    "scales": [10.0, 30.0, 100.0],
    "settings": {"trainer": {"max_epochs": 24}},
}
WORLD: dict[str, Any] = {
    "X": 60.0,  # accuracy in % of the static network, at every depth and with merged tokens
    "exits": [58.0, 60.0, 62.0, 62.0],  # of the dynamic ones
    "policy": {"cost 0.45": (62.0, 45.0), "cost 0.25": (61.0, 24.0), "accuracy_drop -1 from static": (63.0, 55.0)},
    "val_cost": 0.0,  # added on val200
    "epoch": 1.1,  # seconds; those of X take 1, less where it is cut
    "extra": {},  # points added to the policies of a task
    "without": None,  # a run that is missing: task, recipe, seed
    "failed": [],  # trainings that failed: task, recipe, scale
}


def first(accuracy: float) -> np.ndarray:
    """Return images (images,) of which the first so many % are right."""
    return np.arange(IMAGES) < round(accuracy * IMAGES / 100)


def make_line(world: dict[str, Any], task: str, recipe: str, seed: int, split: str) -> dict[str, Any]:
    dynamic = recipe.startswith("dynamic")
    depths = [3, 6, 9, 12] if dynamic else [int(recipe[-1]) if "cut" in recipe else 12]
    accuracy = world["exits"] if dynamic else [world["X"]]
    costs = COSTS[len(depths)] if len(depths) > 1 else [49.0 if "merged" in recipe else 100 * depths[0] / 12]
    exits = [
        {"exit": k + 1, "after_block": depths[k], "percent_of_static": costs[k], "accuracy": a / 100}
        | {"mean": a / 100, "geometric": a / 100}
        for k, a in enumerate(accuracy)
    ]
    extra = world["extra"].get(task, 0.0)
    policies = {
        goal: {
            "accuracy": (a + extra) / 100,
            "percent_of_static": cost,
            "target": {"cost": float(goal.split()[1])},
            "val200": {"accuracy": a / 100, "percent_of_static": cost + world["val_cost"]},
        }
        for goal, (a, cost) in (world["policy"].items() if dynamic else {})
    }
    images = {
        "right": np.stack([np.stack([first(a) for a in accuracy])] * 3),
        "routed": np.array([first(100 * entry["accuracy"]) for entry in policies.values()], dtype=bool).reshape(
            -1, IMAGES
        ),
    }
    return {
        "run": {"task": task, "adapter": "lora", "recipe": recipe, "scale": 10.0, "seed": seed, "split": split},
        "exits": exits,
        "policies": policies,
        "images": IMAGES,
        "images_hash": task,
        "per_image": as_text(images),
        "machine": {"cpu": "one"},
        "device": "cpu",
        "seconds": {"epoch_cpu": world["epoch"] if dynamic else depths[0] / 12},
    }


def failed_line(task: str, recipe: str, scale: float) -> dict[str, Any]:
    run = {"task": task, "adapter": "lora", "recipe": recipe, "scale": scale, "seed": 1, "split": "train800val200"}
    return {"run": run, "failed": "the training learned nothing"}


def write(
    folder: Path, name: str = "micro", prefix: str = "second", sweep: dict[str, Any] | None = None, **changes: Any
) -> None:
    world = WORLD | changes
    sweep = SWEEP | (sweep or {})
    lines = [
        make_line(world, task, recipe, seed, split)
        for task in sweep["tasks"]
        for recipe in sweep["recipes"]
        for seed in ([0] if "cut" in recipe else [0, 1, 2])
        for split in ("train800", "train800val200")
        if (task, recipe, seed) != world["without"] and (task, recipe, 10.0) not in world["failed"]
    ]
    lines += [failed_line(*run) for run in world["failed"]]
    (folder / f"{prefix}_{name}.yaml").write_text(yaml.safe_dump(sweep))
    (folder / f"{prefix}_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def verdicts(program: Any, folder: Path, reading: int = 0) -> dict[str, Any]:
    claims, reading = program("claims"), program("margins").READINGS[reading]
    found = program("outcomes").Outcomes.read_all(folder, reading)
    return {claim.name: claim for claim in (*claims.claims(found, reading), *claims.aims(found, reading))}


def test_goals_of_former_files_do_not_count(program, tmp_path):
    policy = WORLD["policy"] | {"cost 0.55": (63.0, 55.0)}
    write(tmp_path, sweep={"goal": [{"cost": 0.45}, {"cost": 0.55}]}, policy=policy)  # lines have cost 0.25, too
    found = program("outcomes").Outcomes.read_all(tmp_path, program("margins").READINGS[0])["micro"]
    assert found.best_goal("lora", "dynamic", 50.0) == "cost 0.45"
    assert found.cost_goals("lora", "dynamic", 0.2, 0.6) == ["cost 0.45", "cost 0.55"]
    with pytest.raises(program("outcomes").Missing):
        found.best_goal("lora", "dynamic", 40.0)


@pytest.mark.parametrize(
    ("task", "verdict", "words"),
    [("cars", "held", "; cars, lora, dynamic, seed 1 has no policy for cost 0.45"), ("leaves", "open", "no goal")],
)
def test_unreached_goal_is_named(task, verdict, words, program, tmp_path):
    """Beside the deciding tasks it leaves out the words on these; on one that decides the claim is open."""
    write(tmp_path, sweep={"tasks": SWEEP["tasks"] | {"cars": "Natural"}}, policy={"cost 0.45": (62.0, 45.0)})
    path = tmp_path / "second_micro.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        if (line["run"]["task"], line["run"]["recipe"], line["run"]["seed"]) == (task, "dynamic", 1):
            right, _ = right_of(line)
            line["policies"] = {"cost 0.45": {"unreached": "exit 1 costs more"}}
            line["per_image"] = as_text({"right": right, "routed": np.zeros((0, IMAGES), dtype=bool)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verdicts(program, tmp_path)
    for name in ("seed, lora", "routing"):
        assert (found[name].verdict, words in found[name].note) == (verdict, True), found[name]
    outcomes = program("outcomes")
    found = outcomes.Outcomes.read_all(tmp_path, program("margins").READINGS[0])["micro"]
    if task == "leaves":
        with pytest.raises(outcomes.Missing, match="leaves, lora, dynamic, seed 1 has no policy"):
            found.cost("lora", "dynamic", "cost 0.45")


ALL = {
    "seed, lora": "held",
    "seed, adapter": "open",
    "seed, repadapter": "open",
    "elastic, accuracy": "missed",  # 58 % at exit 1
    "elastic, time over X": "held",
    "elastic, time over all depths": "held",
    "routing": "held",
    "beyond, X": "held",
    "beyond, token-merged X": "held",
    "ordinary, no such backbone": "open",
    "X at 33 %, exits": "held",
    "X +1 at 45 %, exits": "held",
    "X at 20 %, tokens": "missed",  # exit 1 alone costs 25 %
    "X +1 at 30 %, tokens": "held",
}


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({}, {}),
        ({"exits": [60.0, 60.0, 62.0, 62.0]}, {"elastic, accuracy": "held"}),
        (
            {"without": ("leaves", "static, cut at 6", 0)},
            {"elastic, accuracy": "open", "elastic, time over all depths": "open"},
        ),
        ({"epoch": 1.3}, {"elastic, time over X": "missed", "elastic, time over all depths": "missed"}),
        (
            {"policy": {"cost 0.45": (59.0, 45.0), "cost 0.25": (58.0, 24.0)}},
            dict.fromkeys(
                ("seed, lora", "routing", "beyond, X", "beyond, token-merged X", "X at 33 %, exits"), "missed"
            )
            | dict.fromkeys(("X +1 at 45 %, exits", "X +1 at 30 %, tokens"), "missed"),
        ),
        (
            {"policy": {"cost 0.45": (62.0, 50.5), "cost 0.25": (61.0, 24.0)}, "val_cost": -2.0},
            {"seed, lora": "missed", "routing": "held", "beyond, token-merged X": "missed"}
            | {"X +1 at 45 %, exits": "held"},
        ),
    ],
    ids=["", "exits", "cut", "epoch", "worse", "dearer"],
)
def test_verdicts(changes, others, program, tmp_path):
    write(tmp_path, **changes)
    found = verdicts(program, tmp_path)
    expected = ALL | others
    assert {name: found[name].verdict for name in expected} == expected


def test_estimates(program, tmp_path):
    write(tmp_path)
    found = verdicts(program, tmp_path)
    assert found["seed, lora"].estimate == pytest.approx(2.0)
    assert "45.0 % by cost 0.45" in found["seed, lora"].note
    assert found["elastic, accuracy"].estimate == pytest.approx(-2.0)
    assert found["elastic, time over all depths"].estimate == pytest.approx(1.1 / 2.5)
    mixed = 58 + 2 * (45 - 25) / (50 - 25)  # of exits 1 and 2; between 2 and 3 the hull is lower
    hull = max(mixed, 58 + 4 * (45 - 25) / (75 - 25))
    assert found["routing"].estimate == pytest.approx(62 - hull)


def test_other_tasks_stand_beside(program, tmp_path):
    tasks = SWEEP["tasks"] | {"cars": "Natural", "birds": None}
    write(tmp_path, sweep={"tasks": tasks}, extra={"leaves": -8.0, "chart_trend": -4.0})
    claim = verdicts(program, tmp_path)["seed, lora"]
    assert claim.verdict == "missed"
    assert claim.estimate == pytest.approx(-1.0)
    assert "other 2 tasks +2.00" in claim.note


def test_ordinary_backbone(program, tmp_path):
    write(tmp_path)
    write(tmp_path, "plain", policy={"cost 0.45": (59.0, 45.0)})
    found = verdicts(program, tmp_path)
    assert (found["seed, lora"].verdict, found["ordinary, plain"].verdict) == ("held", "missed")
    assert found["no natural task below X, plain"].verdict == "missed"


def test_backbone_has_scales_of_its_own(program, tmp_path):
    write(tmp_path)
    write(tmp_path, "vit_small_14", sweep={"scales": [1.0, 3.0, 10.0]})
    assert verdicts(program, tmp_path)["ordinary, vit_small_14"].verdict == "held"
    write(tmp_path, "vit_small_14")
    assert verdicts(program, tmp_path)["ordinary, vit_small_14"].verdict == "open"


@pytest.mark.parametrize("run", [("leaves", "static", 1), ("chart_trend", "dynamic", 0)])
def test_missing_run_leaves_a_claim_open(run, program, tmp_path):
    write(tmp_path, without=run)
    claim = verdicts(program, tmp_path)["seed, lora"]
    assert (claim.verdict, claim.estimate) == ("open", None)
    assert claim.note == f"micro: {run[0]}, lora, {run[1]}, seed {run[2]} is not finished"


def test_missing_task_leaves_claims_open(program, tmp_path):
    write(tmp_path, sweep={"tasks": {"leaves": "Natural", "cell_division": "Specialized", "chart_trend": None}})
    assert verdicts(program, tmp_path)["routing"].note.startswith("micro: stacked_sheets, lora, dynamic, seed 0 is not")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": [10.0, 30.0]}, "scales 10.0, 30.0 instead of 10, 30, 100"),
        ({"seeds": {"lora": [0, 1]}}, "seeds 0, 1 instead of 0, 1, 2"),
        ({"scales": {"lora": [10, 30]}}, "scales 10, 30 instead of 10, 30, 100"),
        ({"settings": {"trainer": {"max_epochs": 10}}}, "epochs 10 instead of 24"),
        ({"settings": {"trainer": {"max_epochs": 24, "max_steps": 50}}}, "trainer not as planned"),
        ({"goal": [{"cost": 0.45}, {"cost": 0.5}]}, "goal not as planned"),
        ({"search_seeds": [0, 1]}, "search_seeds not as planned"),
        (
            {"recipes": SWEEP["recipes"] | {"static": {"layers": ["vtab", "static"], "seeds": [0, 1]}}},
            "another recipe static",
        ),
    ],
)
def test_other_protocol_leaves_claims_open(change, words, program, tmp_path):
    write(tmp_path, sweep=change)
    claim = verdicts(program, tmp_path)["seed, lora"]
    assert claim.verdict == "open"
    assert claim.note.startswith(f"{words}; otherwise held; 45.0 % by cost 0.45")
    assert claim.estimate == pytest.approx(2.0)


def test_protocol_is_that_of_the_sweep(program):
    margins, sweep = program("margins"), PROTOCOL
    assert list(margins.SCALES) == sweep["scales"]
    assert {adapter: list(seeds) for adapter, seeds in margins.SEEDS.items()} == sweep["seeds"]
    assert list(margins.SEEDS) == sweep["adapters"]
    assert sweep["settings"]["trainer"]["max_epochs"] == margins.EPOCHS


def test_reading_of_each_set(program, tmp_path):
    """A file is read under one rule: the later rule gives the first four no verdict."""
    readings = program("margins").READINGS
    for reading in readings:
        seeds = {adapter: list(seeds) for adapter, seeds in reading.seeds.items()}
        write(tmp_path, prefix=reading.prefix, sweep={"tasks": dict.fromkeys(reading.tasks), "seeds": seeds})
    read_all, claims = program("outcomes").Outcomes.read_all, program("claims").claims
    found = [next(claims(read_all(tmp_path, reading), reading)) for reading in readings if reading.judges != "ordinary"]
    assert [claim.verdict for claim in found] == ["held", "held", "shown", "held"]
    assert len({claim.estimate for claim in found}) == 1


def place_of(program: Any, prefix: str) -> int:
    """Return the place of a reading in the list of them."""
    return [reading.prefix for reading in program("margins").READINGS].index(prefix)


def test_third_set_judges_seed_alone(program, tmp_path):
    """With two seeds of an adapter instead of three it is open."""
    third = place_of(program, "third")
    tasks = dict.fromkeys(program("margins").THIRD)
    for seeds, verdict in (([0, 1, 2], "held"), ([0, 1], "open")):
        write(tmp_path, prefix="third", sweep={"tasks": tasks, "seeds": {"lora": seeds}})
        found = verdicts(program, tmp_path, third)
        assert {name: claim.verdict for name, claim in found.items()} == {
            "seed, lora": verdict,
            "seed, adapter": "open",
            "seed, repadapter": "open",
        }


def test_photographs_judge_an_ordinary_backbone_alone(program, tmp_path):
    """Other tasks of their sweep stand beside them."""
    tasks = {"unseen10": {"group": "Natural", "fresh": True}, "cifar10": "Natural"}
    write(tmp_path, name="plain", prefix="photographs", sweep={"tasks": tasks}, extra={"cifar10": -5.0})
    found = verdicts(program, tmp_path, place_of(program, "photographs"))
    assert list(found) == ["ordinary, plain", "no natural task below X, plain"]
    ordinary, below = found.values()
    assert (ordinary.verdict, below.verdict) == ("held", "missed")
    assert ordinary.note.startswith("45.0 % by cost 0.45; 1 tasks")
    assert "other 1 tasks -3.00" in ordinary.note
    assert below.note.startswith("cifar10, the worst of 2")


def test_failed_training_is_printed(program, tmp_path):
    write(tmp_path, failed=[("leaves", "dynamic", 100.0)])
    found = program("outcomes").Outcomes.read_all(tmp_path, program("margins").VERDICT)
    claim = next(program("claims").claims(found, program("margins").VERDICT))
    assert (claim.name, claim.verdict) == ("seed, lora", "held")
    assert list(program("claims").failures(found)) == [
        "scale dropped: micro: leaves, lora, dynamic, scale 100, seed 1, train800val200: the training learned nothing"
    ]


@pytest.mark.parametrize(
    ("recipe", "scales", "verdict"),
    [
        ("dynamic", (10.0, 30.0), "open"),
        ("dynamic", (10.0, 30.0, 100.0), "missed"),
        ("static", (10.0, 30.0, 100.0), "open"),
    ],
)
def test_failure_at_every_scale(recipe, scales, verdict, program, tmp_path):
    write(tmp_path, failed=[("leaves", recipe, scale) for scale in scales])
    claim = verdicts(program, tmp_path)["seed, lora"]
    words = "failed at every scale" if len(scales) == 3 else "seed 0 is not finished"
    assert (claim.verdict, claim.note) == (
        verdict,
        f"micro: leaves, lora, {recipe}{' ' if len(scales) == 3 else ', '}{words}",
    )


def test_other_images_are_refused(program, tmp_path):
    write(tmp_path)
    path = tmp_path / "second_micro.jsonl"
    path.write_text(path.read_text().replace('"images_hash": "leaves"', '"images_hash": "cars"', 3))
    with pytest.raises(ValueError, match="were tested on other images"):
        verdicts(program, tmp_path)


# ---- the interval


def draw_tasks(
    generator: np.random.Generator, tasks: int, seeds: int, spread: float, first: float = 1.0
) -> list[np.ndarray]:
    """Return right minus right of two networks; images differ in difficulty, seeds in skill, most on the first task."""
    found = []
    for k in range(tasks):
        difficulty, skill = generator.normal(size=600), spread * generator.normal(size=(seeds, 1))
        skill *= first if k == 0 else 1
        ours, theirs = (difficulty + 0.7 * generator.normal(size=(seeds, 600)) for _ in range(2))
        found.append((ours + skill > -0.55).astype(float) - (theirs > -0.5))
    return found


@pytest.mark.parametrize(
    ("seeds", "spread", "first"), [(1, 0.0, 1.0), (3, 0.0, 1.0), (2, 0.1, 1.0), (3, 0.1, 1.0), (3, 0.02, 20.0)]
)
def test_interval_covers_the_truth(seeds, spread, first, program):
    compare, generator = program("paired").compare, np.random.default_rng(0)
    many = [draw_tasks(generator, 4, 300, spread, first) for _ in range(3)]
    truth = 100 * np.mean([task.mean() for tasks in many for task in tasks])
    found = [compare(draw_tasks(generator, 4, seeds, spread, first), draws=400, seed=k) for k in range(80)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert covered > 0.87  # of 80 intervals at 95 %, 69 or fewer come once in 300
    if first == 1:
        width = np.median([one.high - one.low for one in found]) / (2 * 1.96)
        assert width < (2.2 if seeds == 2 else 1.6) * np.std(
            [one.estimate for one in found]
        )  # and no wider than it must be


def test_interval_of_seeds_is_welchs(program):
    """Where images are alike, the mean over two tasks is a difference of two means of unequal variance."""
    generator = np.random.default_rng(2)
    for sizes, spreads in (((10, 10), (0.1, 0.1)), ((10, 10), (0.2, 0.01)), ((12, 8), (0.05, 0.2))):
        seeds = [spread * generator.normal(size=size) for size, spread in zip(sizes, spreads, strict=True)]
        found = program("paired").compare([np.repeat(one[:, None], 50, axis=1) for one in seeds])
        welch = stats.ttest_ind(seeds[0], -seeds[1], equal_var=False).confidence_interval()
        expected = [50 * welch.low, 50 * welch.high]
        assert (found.low, found.high) == pytest.approx(expected, abs=0.06 * (expected[1] - expected[0]))


def test_interval_against_a_loop(program):
    """With one seed: draw the images of each task again and again."""
    generator = np.random.default_rng(1)
    tasks = draw_tasks(generator, 2, 1, 0.0)
    means = [np.mean([task[0][generator.integers(600, size=600)].mean() for task in tasks]) * 100 for _ in range(4000)]
    found = program("paired").compare(tasks)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.25)
    assert found.estimate == pytest.approx(100 * np.mean([task.mean() for task in tasks]))
