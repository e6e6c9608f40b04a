"""Sweeps: which runs there are and in which order, what they leave behind, and the table at the end."""

import base64
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import refused
from PIL import Image

from dynadapter.calibrate import Goal
from dynadapter.cli import main, sweep_estimate, sweep_file, sweep_unit
from dynadapter.data import VTAB1k
from dynadapter.data.identity import data_hash
from dynadapter.exits.policies import Confidence, Never
from dynadapter.sweep import lines
from dynadapter.sweep.checks import check_lines
from dynadapter.sweep.goals import SweepGoal
from dynadapter.sweep.measure import measure, measure_policy
from dynadapter.sweep.plan import FINAL, SEARCH, Arm, Choice, Sweep, Unit, as_dict, fingerprint, score
from dynadapter.sweep.table import as_csv, as_markdown, draw, from_csv, mean_of, rows
from dynadapter.training.callbacks import LearningCheck

GOAL = SweepGoal(Goal(accuracy_drop=0.0))
ARM = Arm("cifar", "lora", "dynamic")
STATIC = Arm("cifar", "lora", "static")

# ---- the plan


def make_sweep(**changes: Any) -> Sweep:
    seeds = changes.pop("seeds", [0, 1])
    options: dict[str, Any] = {
        "tasks": {"cifar": "Natural", "dtd": "Natural", "eurosat": "Specialized", "kitti": "Structured"},
        "adapters": ["lora"],
        "recipes": ["dynamic"],
        "search_seeds": [0],
    } | changes
    pairs = [(a, r) for a in options["adapters"] for r in options["recipes"]]
    options["settings"] = {pair: "-".join(pair) for pair in pairs}
    options["seeds"] = dict.fromkeys(pairs, seeds) | options.pop("seeds_of", {})
    options["scales"] = {(t, a): [1.0, 10.0] for t in options["tasks"] for a in options["adapters"]}
    return Sweep(**options)


def make_line(unit: Unit, accuracy: float, exits: int = 2, loss: float = 1.0, percent: float = 60.0) -> dict[str, Any]:
    """Return a line whose exits, and policy, all have one accuracy."""
    costs = [100 * (k + 1) / exits for k in range(exits)]
    same = {"accuracy": accuracy, "mean": accuracy, "geometric": accuracy, "loss": loss}
    entries = [{"exit": k + 1, "percent_of_static": costs[k], **same} for k in range(exits)]
    policy = {"accuracy": accuracy, "percent_of_static": percent, "target": {"cost": 0.5}}
    right = np.broadcast_to(np.arange(1000) < round(1000 * accuracy), (3, exits, 1000))
    images = {"images": 1000, "per_image": lines.as_text({"right": right, "routed": right[:1, -1]})}
    return {"run": as_dict(unit), "exits": entries, "policies": {GOAL.name: policy}, **images}


def finish(sweep: Sweep, accuracy: Any = lambda unit: 0.5) -> dict[Unit, dict[str, Any]]:
    """Return the lines of a sweep that ran to its end."""
    done: dict[Unit, dict[str, Any]] = {}
    while ready := sweep.ready(done):
        done |= {unit: make_line(unit, accuracy(unit)) for unit in ready}
    return done


def test_run_starts_after_what_it_needs():
    sweep, done, seen = make_sweep(), {}, []
    while ready := sweep.ready(done):
        unit = ready[0]
        if unit.split == FINAL:
            assert sweep.twin(unit) in done
            assert all(one in done for one in sweep.search(Arm(unit.task, unit.adapter, unit.recipe)))
        seen.append(unit)
        done[unit] = make_line(unit, 0.5)
    assert len(seen) == len(set(seen)) == 4 * (2 + 1 + 2)  # scales, the second seed's thresholds, final runs
    assert [unit.seed for unit in seen] == [0] * 12 + [1] * 8  # an interrupted sweep has whole seeds
    assert sum(sweep.remaining(done).values()) == 0
    assert set(seen) == sweep.planned(done)


def test_needed_runs_follow_scale_and_seed():
    sweep, other = make_sweep(), make_sweep(seeds=[1, 2], search_seeds=[3])
    open_runs, done = sweep.needed({}), finish(sweep)
    assert set(done) < open_runs  # final runs at both scales, of which one is chosen
    assert sweep.needed(done) == sweep.planned(done)
    both = open_runs & other.needed({})
    assert {(unit.seed, unit.split) for unit in both} == {(1, SEARCH), (1, FINAL)}


def test_remaining_counts_runs_that_wait():
    sweep, done = make_sweep(), {}
    assert sweep.remaining(done) == {SEARCH: 4 * 3, FINAL: 4 * 2}
    for unit in sweep.ready(done):
        done[unit] = make_line(unit, 0.5)
    assert sweep.remaining(done) == {SEARCH: 4, FINAL: 8}


@pytest.mark.parametrize(
    ("accuracy", "loss", "best"),
    [
        ({1.0: 0.6, 10.0: 0.5}, {1.0: 2.0, 10.0: 1.0}, 1.0),
        ({1.0: 0.5, 10.0: 0.6}, {1.0: 1.0, 10.0: 2.0}, 10.0),
        ({1.0: 0.5, 10.0: 0.5}, {1.0: 2.0, 10.0: 1.0}, 10.0),  # the loss decides
        ({1.0: 0.1, 10.0: None}, {1.0: 2.0}, 1.0),  # a loss that is not finite
        ({1.0: None, 10.0: None}, {}, None),
    ],
)
def test_chosen_scale(accuracy, loss, best):
    sweep = make_sweep(search_seeds=[0, 1])
    arm = Arm("cifar", "lora", "dynamic")
    done: dict[Unit, Any] = {}
    for unit in sweep.search(arm):
        assert sweep.chosen_scale(arm, done) is None
        value = accuracy[unit.scale]
        failed = {"run": as_dict(unit), "failed": "the training loss is not finite"}
        done[unit] = failed if value is None else make_line(unit, value, loss=loss[unit.scale])
    assert sweep.chosen_scale(arm, done) == best
    assert (arm in sweep.diverged(done)) == (best is None)
    losing = {unit.scale for unit in sweep.lost(done)}
    assert losing == (set() if best is None else {1.0, 10.0} - {best})


def test_scale_of_a_failed_final_run_loses():
    """Scale 10 is the best on val200, and its second final training fails: every seed is trained at scale 1 instead."""
    sweep, done, failed = make_sweep(tasks={"cifar": None}), {}, make_sweep().unit(ARM, 10, 1, FINAL)
    while ready := sweep.ready(done):
        unit = ready[0]
        done[unit] = make_line(unit, 0.5 + unit.scale / 100)
        if unit == failed:
            done[unit] = {"run": as_dict(unit), "failed": "the training learned nothing"}
    assert sweep.chosen_scale(ARM, done) == 1
    assert {(unit.scale, unit.seed) for unit in done if unit.split == FINAL} == {(10, 0), (10, 1), (1, 0), (1, 1)}
    assert set(done) - sweep.planned(done) == {replace(failed, seed=0), replace(failed, split=SEARCH)}
    assert set(sweep.lost(done)) == {unit for unit in done if unit.scale == 10}
    assert sum(sweep.remaining(done).values()) == 0
    assert not sweep.diverged(done)


def test_final_runs_of_other_files_are_kept():
    """Files with other scales, or another first goal, may share a folder: their final checkpoints stay."""
    better = {1.0: 0.5, 10.0: 0.7, 30.0: 0.6}
    sweep = make_sweep(tasks={"cifar": None})
    done = finish(sweep, lambda unit: better[unit.scale])
    edited = replace(sweep, scales={("cifar", "lora"): [1.0, 30.0]})
    while ready := edited.ready(done):
        done |= {unit: make_line(unit, better[unit.scale]) for unit in ready}
    finals = {unit.scale for unit in done if unit.split == FINAL}
    assert finals == {10.0, 30.0}
    for one in (sweep, edited):
        assert {(unit.scale, unit.split) for unit in one.lost(done)} == {(1.0, SEARCH)}
    both = replace(sweep, scales={("cifar", "lora"): [10.0, 30.0]})  # as if another goal had chosen 30
    assert {(unit.scale, unit.split) for unit in both.lost(done)} == {(30.0, SEARCH)}


def test_score_counts_the_policy_with_exits():
    unit = make_sweep().search(Arm("cifar", "lora", "dynamic"))[0]
    line = make_line(unit, 0.5)
    line["policies"][GOAL.name]["accuracy"] = 0.7
    assert score(line, GOAL.name)[0] == pytest.approx(0.6)
    assert score({**line, "exits": line["exits"][-1:]}, GOAL.name)[0] == 0.5  # static


ARMS: dict[str, Any] = {
    "recipes": ["static", "cut", "dynamic"],
    "seeds_of": {("lora", "cut"): [1]},
    "scale_from": {"cut": "static"},
    "goals": [GOAL, SweepGoal(Goal(accuracy_drop=0.0), "static")],
    "choices": {"best": Choice(["static", "cut"], 0.5)},
    "fresh": ["kitti"],
}


def test_recipe_takes_the_scale_of_another():
    sweep = make_sweep(**ARMS)
    assert sweep.remaining({}) == {SEARCH: 4 * (3 + 1 + 3), FINAL: 4 * (2 + 1 + 2)}
    done: dict[Unit, Any] = {}
    while ready := sweep.ready(done):
        for unit in ready:
            if unit.split == FINAL and unit.recipe != "static":
                reference = sweep.reference(unit, "static", done)
                assert reference in done
                assert (reference.recipe, reference.seed, reference.scale) == ("static", unit.seed, 10.0)
        done |= {unit: make_line(unit, 0.5 + (unit.scale == 10 and unit.recipe == "static")) for unit in ready}
        assert sum(sweep.remaining(done).values()) + len(done) == 4 * 12
    cut = {(unit.split, unit.scale, unit.seed) for unit in done if unit.recipe == "cut"}
    assert cut == {(SEARCH, 10.0, 1), (FINAL, 10.0, 1)}
    assert {unit.scale for unit in done if (unit.recipe, unit.split) == ("dynamic", FINAL)} == {1.0}


def test_arms_without_a_scale_do_not_wait():
    """Where no loss of the reference was finite, neither the recipes with its scale run nor others wait for it."""
    sweep, done = make_sweep(tasks={"cifar": None}, **(ARMS | {"fresh": []})), {}
    while ready := sweep.ready(done):
        failed = {unit: {"run": as_dict(unit), "failed": "not finite"} for unit in ready if unit.recipe == "static"}
        done |= {unit: make_line(unit, 0.5) for unit in ready} | failed
    assert {arm.recipe for arm in sweep.diverged(done)} == {"static", "cut"}
    assert {unit.recipe for unit in done if unit.split == FINAL} == {"dynamic"}
    assert sum(sweep.remaining(done).values()) == 0


def test_line_without_a_policy_is_not_finished():
    sweep = make_sweep(**ARMS)
    unit = next(iter(sweep.search(Arm("cifar", "lora", "dynamic"))))
    other = replace(unit, split=FINAL)
    assert set(sweep.finished({one: make_line(one, 0.5) for one in (unit, other)})) == {unit}


def with_targets(sweep: Sweep, unit: Unit, accuracy: float, done: dict[Unit, Any]) -> dict[str, Any]:
    """Return a line with the policy of each goal; a reference gives the target of a final run."""
    line = make_line(unit, accuracy)
    for goal in sweep.goals[1:] if unit.split == FINAL else ():
        found = accuracy if goal.reference == unit.recipe else sweep.reference_accuracy(unit, goal, done)
        line["policies"][goal.name] = {"unreached": goal.untrained}
        if found is not None:
            line["policies"][goal.name] = line["policies"][GOAL.name] | {"target": goal.target(accuracy, found)}
    return line


REFERRING: dict[str, Any] = {"tasks": {"cifar": None}, "recipes": ["static", "dynamic"], "goals": ARMS["goals"]}


def test_target_follows_its_reference():
    """A final run of static fails at scale 10, at which dynamic has its target from: now scale 1 gives the target."""
    sweep, found = make_sweep(**REFERRING), {}
    failing, stale = sweep.unit(STATIC, 10, 1, FINAL), sweep.unit(ARM, 10, 0, FINAL)
    while ready := sweep.ready(done := sweep.finished(found)):
        unit = ready[0]
        found[unit] = with_targets(sweep, unit, 0.5 + unit.scale / 100, done)
        if unit == failing:
            assert found[stale]["policies"][sweep.goals[1].name]["target"] == {"accuracy": 0.6}
            found[unit] = {"run": as_dict(unit), "failed": "not finite"}
            assert stale not in sweep.finished(found)
    targets = [
        line["policies"][sweep.goals[1].name]["target"]
        for unit, line in done.items()
        if unit.split == FINAL and unit.recipe == "dynamic"
    ]
    assert targets == [{"accuracy": 0.51}] * 2


def test_repaired_reference_gives_a_target():
    """Static fails at both scales; its lines are deleted, and it is trained; deleted again, and it fails."""
    sweep, failing = make_sweep(**REFERRING), True

    def run(found: dict[Unit, Any]) -> list[Any]:
        while ready := sweep.ready(done := sweep.finished(found)):
            for unit in ready:
                failed = {"run": as_dict(unit), "failed": "not finite"}
                found[unit] = failed if failing and unit.recipe == "static" else with_targets(sweep, unit, 0.5, done)
        finals = [line for unit, line in done.items() if (unit.recipe, unit.split) == ("dynamic", FINAL)]
        return [line["policies"][sweep.goals[1].name].get("target") for line in finals]

    first: dict[Unit, Any] = {}
    assert run(first) == [None, None]
    failing = False
    repaired = {unit: line for unit, line in first.items() if unit.recipe != "static"}
    assert run(repaired) == [{"accuracy": 0.5}] * 2
    failing = True
    assert run({unit: line for unit, line in repaired.items() if unit.recipe != "static"}) == [None, None]


def test_search_in_the_table_needs_every_goal():
    goals = [GOAL, SweepGoal(Goal(cost=0.35)), SweepGoal(Goal(accuracy_drop=0.0), "static")]
    options: dict[str, Any] = {"tasks": {"cifar": None}, "recipes": ["static", "dynamic"], "goals": goals}
    sweep = make_sweep(seeds=[], **options)
    found = {unit: make_line(unit, 0.5) for unit in sweep.ready({})}
    assert not sweep.finished(found)
    for line in found.values():
        line["policies"][goals[1].name] = line["policies"][GOAL.name]
    assert sweep.finished(found) == found
    final = sweep.unit(ARM, 1, 0, FINAL)  # of an earlier file
    assert sweep.finished(found | {final: make_line(final, 0.5)}) == found
    with_finals = make_sweep(**options)  # their twins need the first goal alone
    assert set(with_finals.finished({unit: make_line(unit, 0.5) for unit in found})) == set(found)


def test_runs_on_other_images_are_refused():
    sweep = make_sweep(tasks={"cifar": None})
    done = {unit: line | {"images_hash": unit.split} for unit, line in finish(sweep).items()}
    check_lines(sweep, done)
    unit = next(unit for unit in done if unit.split == FINAL)
    with pytest.raises(ValueError, match=f"was measured on other images than {re.escape(unit.name)}; give the root"):
        check_lines(sweep, done | {unit: done[unit] | {"images_hash": "x"}})


def test_other_scale_from_is_refused():
    """The cost of cut was measured against its own blocks, and now counts against static, or the other way round."""
    sweep = make_sweep(tasks={"cifar": None}, **(ARMS | {"goals": [GOAL], "fresh": []}))
    done = {unit: line | {"static_macs": 12.0} for unit, line in finish(sweep).items()}
    check_lines(sweep, done)
    cut = next(unit for unit in done if unit.recipe == "cut")
    with pytest.raises(ValueError, match="than scale_from=static asks for; give the former scale_from of cut, or"):
        check_lines(sweep, done | {cut: done[cut] | {"static_macs": 6.0}})
    with pytest.raises(ValueError, match="than scale_from=null asks for"):
        check_lines(replace(sweep, scale_from={}), done | {cut: done[cut] | {"scale_from": "static"}})


def test_changed_settings_are_other_runs():
    first, second = make_sweep(), make_sweep(recipes=["static"])
    assert not set(first.ready({})) & set(second.ready({}))


# ---- what runs leave behind


def test_claim_holds_until_released(tmp_path):
    with lines.claim(tmp_path / "run") as first, lines.claim(tmp_path / "run") as second:
        assert (first, second) == (True, False)
    with lines.claim(tmp_path / "run") as again:
        assert again


def test_claim_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dynadapter.sweep import lines\n"
        "with lines.claim(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    with lines.claim(tmp_path) as mine:
        assert not mine
    process.kill()
    process.communicate()
    with lines.claim(tmp_path) as mine:
        assert mine


def test_half_a_line_is_dropped(tmp_path):
    units = make_sweep().ready({})[:2]
    lines.append(tmp_path, make_line(units[0], 0.5))
    with (tmp_path / lines.RESULTS).open("ab") as file:
        file.write(b'{"run": {"task": "cif')
    assert list(lines.read(tmp_path)) == units[:1]
    lines.append(tmp_path, make_line(units[1], 0.25))
    assert list(lines.read(tmp_path)) == units
    assert len((tmp_path / lines.RESULTS).read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"run": {"task": "cifar"}}', "7"])
def test_foreign_line_is_named(text, tmp_path):
    (tmp_path / lines.RESULTS).write_text(text + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 is not the line of a run"):
        lines.read(tmp_path)


@pytest.mark.parametrize(("classes", "bytes_an_image"), [(10, 16), (397, 24)])
def test_packed_predictions(classes, bytes_an_image, tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 2000, classes, generator=generator)
    targets = torch.randint(classes, (2000,), generator=generator)
    lines.pack(tmp_path, logits, targets, torch.arange(2000))
    with np.load(tmp_path / lines.PREDICTIONS) as packed:
        assert (packed["predictions"] == logits.argmax(-1).numpy()).all()
        assert np.abs(packed["confidences"] - logits.softmax(-1).amax(-1).numpy()).max() < 1e-3
        assert (packed["targets"] == targets.numpy()).all()
        assert (packed["files"] == np.arange(2000)).all()
    assert (tmp_path / lines.PREDICTIONS).stat().st_size < bytes_an_image * 2000
    with np.load(tmp_path / lines.LOGITS) as packed:
        assert packed["logits"].dtype == np.float16
    again, same = lines.unpack(tmp_path)
    assert torch.allclose(again, logits, rtol=1e-3, atol=1e-6)
    assert torch.equal(same, targets)
    assert {path.name for path in tmp_path.iterdir()} == {lines.PREDICTIONS, lines.LOGITS}


# ---- results of one run


def test_measures_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(3, 50, 5, generator=generator), torch.randint(5, (50,), generator=generator)
    policy, costs = Confidence((0.5, 0.4)), [2.0, 5.0, 8.5]
    results, images = measure({"a": Never(), "b": policy}, logits, targets, costs, 8.0, (1, 2, 3))
    exit_index, routed = images["exit_index"][1], results["policies"]["b"]
    taken, right, spent = [0, 0, 0], 0, 0.0
    for i in range(50):
        probabilities = [np.exp(x) / np.exp(x).sum() for x in logits[:, i].double().numpy()]
        k = 0 if probabilities[0].max() >= 0.5 else 1 if probabilities[1].max() >= 0.4 else 2
        assert exit_index[i] == k
        taken[k], right, spent = taken[k] + 1, right + (probabilities[k].argmax() == targets[i]), spent + costs[k]
    assert routed["accuracy"] == pytest.approx(right / 50) == images["routed"][1].mean()
    assert routed["percent_of_static"] == pytest.approx(100 * spent / 50 / 8, abs=1e-3)
    assert list(routed["exit_shares"].values()) == pytest.approx([count / 50 for count in taken])
    for k, entry in enumerate(results["exits"]):
        assert entry["exit"] == k + 1
        rows = [np.exp(x) / np.exp(x).sum() for x in logits[k].double().numpy()]
        assert entry["accuracy"] == pytest.approx(
            np.mean([r.argmax() == t for r, t in zip(rows, targets, strict=True)])
        )
        assert entry["loss"] == pytest.approx(-np.mean([math.log(r[t]) for r, t in zip(rows, targets, strict=True)]))


def test_logits_that_are_not_finite():
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 0] = math.nan
    results, images = measure({}, logits, torch.tensor([0, 0]), [1.0], 1.0, (4,))
    assert results["exits"][0]["accuracy"] == 0.5
    assert results["exits"][0]["loss"] is None
    json.dumps(results, allow_nan=False)
    assert images["routed"].shape == (0, 2)


def rising_logits(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of three exits, each more often right than the one before, and the targets."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(4, (samples,), generator=generator)
    noise, right = torch.randn(3, samples, 4, generator=generator), torch.nn.functional.one_hot(targets, 4)
    return torch.tensor([1, 2, 3])[:, None, None] * right + noise, targets


@pytest.mark.parametrize(("goal", "bound"), [(Goal(cost=0.5), 0.5), (Goal(accuracy_drop=2.0), None)])
def test_goal_holds_where_it_was_calibrated(goal, bound):
    (logits, targets), costs = rising_logits(200), [0.25, 0.6, 1.0]
    found = measure_policy(SweepGoal(goal).policy(logits, targets, costs, 1.0), logits, targets, costs, 1.0)
    if bound is not None:
        assert found["percent_of_static"] <= 100 * bound
    else:
        assert found["accuracy"] >= (logits[-1].argmax(-1) == targets).double().mean() - 0.02
        assert found["percent_of_static"] < 100


@pytest.mark.parametrize(("reference", "reached"), [(0.7, True), (1.0, False)])
def test_goal_from_a_reference(reference, reached):
    logits, targets = rising_logits(400)
    goal, costs = SweepGoal(Goal(accuracy_drop=0.0), "static"), [0.25, 0.6, 1.0]
    found = measure_policy(goal.policy(logits, targets, costs, 1.0, reference), logits, targets, costs, 1.0)
    assert (found["accuracy"] >= reference) == reached
    assert (found["percent_of_static"] < 60) == reached  # the cheapest that is enough, or the best accuracy
    assert goal.target(0.9, reference) == {"accuracy": reference}


def test_best_accuracy_may_be_the_full_depth():
    """Only the last exit is accurate, and costs more than static by its heads."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (200,), generator=generator)
    logits = 2 * torch.randn(4, 200, 5, generator=generator)
    logits[-1] += 8 * torch.nn.functional.one_hot(targets, 5)
    goal, costs = SweepGoal(Goal(accuracy_drop=0.0), "static"), [26.0, 51.0, 76.0, 101.5]
    found = measure_policy(goal.policy(logits, targets, costs, 100.0, 0.9999), logits, targets, costs, 100.0)
    assert found["accuracy"] == (logits[-1].argmax(-1) == targets).double().mean()


# ---- the table


def test_means_are_taken_seed_by_seed():
    sweep = make_sweep()
    accuracy = {"cifar": 0.5, "dtd": 0.7, "eurosat": 0.9, "kitti": 0.3}
    done = finish(sweep, lambda unit: accuracy[unit.task] + 0.02 * unit.seed * (unit.task == "dtd"))
    found = {row.what: row for row in rows(sweep, done) if row.reading == GOAL.name}
    natural = [60.0, 61.0]
    groups = [statistics.fmean([value, 90.0, 30.0]) for value in natural]
    tasks = [statistics.fmean([50.0, dtd, 90.0, 30.0]) for dtd in (70.0, 72.0)]
    for what, values in (("mean of Natural", natural), ("mean of groups", groups), ("mean of 4 tasks", tasks)):
        assert found[what].accuracy.mean == pytest.approx(statistics.fmean(values))
        assert found[what].accuracy.std == pytest.approx(statistics.stdev(values))
        assert found[what].percent_of_static.mean == pytest.approx(60.0)
    assert found["cifar"].accuracy.std == pytest.approx(0.0, abs=1e-9)
    assert found["cifar"].scale == 1.0


def test_mean_needs_all_of_its_parts():
    sweep = make_sweep(seeds=[0])
    done = {unit: line for unit, line in finish(sweep).items() if (unit.task, unit.split) != ("dtd", FINAL)}
    found = {row.what for row in rows(sweep, done)}
    assert found == {"cifar", "eurosat", "kitti", "mean of Specialized", "mean of Structured"}


def test_table_as_text():
    sweep = make_sweep(recipes=["dynamic", "static"])
    table = rows(sweep, finish(sweep, lambda unit: 0.5 + 0.01 * unit.seed))
    text = as_markdown(table, sweep)
    assert "| | lora, dynamic | lora, static |" in text
    assert "| **mean of groups** | 50.5 ± 0.7 (60 %) | 50.5 ± 0.7 (60 %) |" in text
    assert text.index("| cifar |") < text.index("| kitti |") < text.index("mean of Natural") < text.index("4 tasks")
    read = list(csv.DictReader(io.StringIO(as_csv(table))))
    baselines = {f"{GOAL.name}: all at one exit", f"{GOAL.name}: random mixture", "oracle"}
    assert {row["reading"] for row in read} == {"exit 1", "exit 2", GOAL.name, *baselines}
    row = next(row for row in read if (row["what"], row["recipe"], row["reading"]) == ("dtd", "static", "exit 2"))
    assert (row["accuracy"], row["accuracy_std"], row["percent_of_static"]) == ("50.500", "0.707", "100.000")
    assert as_csv(from_csv(as_csv(table))) == as_csv(table)


def test_figure_names_arms_alike_in_any_order():
    """Colour and marker are those of adapter and recipe; a star has the mark of its recipe."""
    drawn = []
    for changes in ({"recipes": ["dynamic", "static"]}, {"recipes": ["other", "static", "dynamic"]}):
        sweep = make_sweep(**changes)
        table = rows(sweep, finish(sweep, lambda unit: 0.5 + 0.01 * unit.seed))
        axes = draw(table, "title", mean_of(sweep.tasks)).axes[0]
        assert axes.get_ylabel() == "test accuracy in %, mean of 4 tasks, axis cut"
        drawn.append({line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines})
        stars = [(line.get_marker(), after.get_marker()) for line, after in pairwise(axes.lines)]
        assert {after for marker, after in stars if marker == "*"} == {look[1] for look in drawn[-1].values()} - {"*"}
    for label, look in (("lora, static (2 seeds)", ("C0", "o")), ("lora, dynamic (2 seeds)", ("C0", "X"))):
        assert [one[label] for one in drawn] == [look, look]
    assert drawn[1]["lora, other (2 seeds)"] == ("C0", "s")
    assert draw([], "title", "cifar", "val200").axes[0].get_ylabel() == "val200 accuracy in %, cifar"


def test_table_leaves_out_a_run_without_its_twin():
    """The train800 run of a seed was deleted to be trained again, and failed without a line."""
    sweep = make_sweep(tasks={"cifar": None})
    done = finish(sweep)
    del done[sweep.twin(sweep.unit(ARM, sweep.chosen_scale(ARM, done), 1, FINAL))]
    assert {row.accuracy.seeds for row in rows(sweep, done)} == {1}


@pytest.mark.parametrize(("cost", "best"), [(100.0, "static"), (51.0, "cut")])
def test_choice_among_recipes(cost, best):
    choices = {"best": Choice(["static", "cut"], cost / 100)}
    sweep = make_sweep(**(ARMS | {"seeds": [0], "seeds_of": {}, "choices": choices}))
    accuracy, percent = {"static": 0.7, "cut": 0.6, "dynamic": 0.5}, {"static": 100.0, "cut": 51.5, "dynamic": 60.0}
    done: dict[Unit, Any] = {}
    while ready := sweep.ready(done):
        new = {one: make_line(one, accuracy[one.recipe], 1, percent=percent[one.recipe]) for one in ready}
        for line in new.values():
            line["policies"] |= {sweep.goals[1].name: {"unreached": "too much"}}
        done |= new
    found = {(row.recipe, row.what): row.accuracy.mean for row in rows(sweep, done) if row.reading == GOAL.name}
    assert found["best", "cifar"] == pytest.approx(100 * accuracy[best])
    assert found["best", "mean of 1 fresh task"] == found["best", "kitti"]


def test_choice_reads_the_cost_of_every_seed():
    choices = {"best": Choice(["large", "small"], 0.5)}
    sweep = make_sweep(recipes=["large", "small"], seeds=[0, 1, 2], choices=choices)
    accuracy, percent = {"large": 0.7, "small": 0.6}, {"large": [48.0, 70.0, 75.0], "small": [45.0] * 3}
    done: dict[Unit, Any] = {}
    while ready := sweep.ready(done):
        done |= {one: make_line(one, accuracy[one.recipe], 1, percent=percent[one.recipe][one.seed]) for one in ready}
    found = {(row.recipe, row.what): row.accuracy.mean for row in rows(sweep, done) if row.reading == GOAL.name}
    assert found["best", "cifar"] == pytest.approx(60)


def test_table_of_a_sweep_without_final_runs():
    sweep = make_sweep(seeds=[], search_seeds=[0, 1])
    done = finish(sweep, lambda unit: 0.5 + 0.1 * (unit.scale == 10) + 0.02 * unit.seed)
    assert {unit.split for unit in done} == {SEARCH}
    assert sum(sweep.remaining(done).values()) == 0
    text = as_markdown(rows(sweep, done), sweep)
    assert "on val200, on which" in text
    assert "| lora, dynamic, exit 1 | 61.0 ± 1.4 (50 %) |" in text  # scale 10 won


# ---- the file of a sweep


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a task of three colours in the layout of VTAB-1k."""
    root = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(0)
    (root / "colours" / "images").mkdir(parents=True)
    written: dict[str, list[str]] = {}
    for name, count in (("train800", 24), ("val200", 20), ("test", 30)):
        for k in range(count):
            pixels = generator.integers(0, 160, (16, 16, 3), dtype=np.uint8)
            pixels[..., k % 3] += 80
            Image.fromarray(pixels).save(root / "colours" / "images" / f"{name}_{k}.png")
        written[name] = [f"images/{name}_{k}.png {k % 3}" for k in range(count)]
    written["train800val200"] = written["train800"] + written["val200"]
    for name, entries in written.items():
        (root / "colours" / f"{name}.txt").write_text("\n".join(entries) + "\n")
    return root


def write_sweep(folder: Path, data: Path, epochs: int = 2, **changes: Any) -> Path:
    model = {
        "backbone": "vit_tiny_patch16_224",
        "pretrained": False,
        "backbone_args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "every": 1,
    }
    content = {
        "root": str(data),
        "tasks": {"colours": "Natural"},
        "recipes": {"dynamic": ["vtab"], "static": ["vtab", "static"]},
        "scales": [1, 10],
        "settings": {
            "model": model,
            "data": {"init_args": {"image_size": 16, "batch_size": 8}},
            "trainer": {"max_epochs": epochs, "accelerator": "cpu"},
        },
        "out": str(folder / "out"),
    } | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["colours", "colours"]}, "names one of them twice"),
        ({"adapters": ["lora", "mine/lora.yaml"]}, "has two files of one name"),
        ({"tasks": {"colours": "Nature"}}, "'Nature'; give one of Natural, Specialized, Structured"),
        ({"recipes": {"dynamic": ["vtba"]}}, "'vtba'; did you mean 'vtab'?"),
        ({"scales": None}, "give either scales"),
        ({"scale_factors": [1]}, "give either scales"),
        ({"scales": [1, -1]}, "give different ones above 0"),
        ({"scales": {"adapter": [1]}}, "not the adapter lora; add its scales"),
        ({"scales": None, "scale_factors": [1]}, "no scale for the adapter lora on the task colours"),
        ({"goal": {"cost": 0.5, "accuracy_drop": 1.0}}, "give {accuracy_drop: POINTS} or"),
        ({"goal": [{"cost": 0.5}, {"cost": 0.5}]}, "give each once"),
        ({"goal": {"accuracy_drop": 0, "reference": "static"}}, "the first goal chooses the scale"),
        ({"goal": [{"cost": 0.5}, {"accuracy_drop": 0, "reference": "x"}]}, "needs the recipe x for the adapter lora"),
        ({"recipes": {"x": {"layers": ["vtab"], "scale_from": "y"}}}, "scale_from=y has no search of its own"),
        ({"recipes": {"x": {"layers": ["vtab"], "adapters": ["ia3"]}}}, "recipe x names the adapter ia3; choose from"),
        ({"recipes": {"x": {"layers": ["vtab"], "seeds": [7]}}}, "recipe x has seeds=[7], lora has [0]"),
        ({"recipes": {"x": {"layer": ["vtab"]}}}, "layer"),
        ({"seeds": {"adapter": [0]}}, "names adapter and not the adapter lora"),
        ({"choices": {"best": {"among": ["static", "x"]}}}, "recipes among dynamic, static"),
        ({"tasks": {"colours": {"fresh": 1}}}, "give {group: Natural, fresh: true}"),
        ({"goal": {"cots": 0.5}}, "give {accuracy_drop: POINTS} or"),
        ({"root": "/nowhere"}, "root=/nowhere is not a folder"),
        ({"sedes": [1]}, "sedes"),
        ({"seeds": ["a"]}, "seeds"),
        ({"seeds": []}, "give seeds, or search_seeds alone"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, dict) else "",
)
def test_mistakes(changes, words, data, tmp_path, capsys):
    path = write_sweep(tmp_path, data, **changes)
    assert words in refused(["sweep", path], capsys)
    assert not (tmp_path / "out").exists()


PARTS = {"1": "LoRA", "2": {"class_path": "Adapter"}}


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        ({"class_path": "ByBlocks", "init_args": {"ranges": PARTS}}, "ByBlocks"),
        ({"class_path": "dynadapter.Peft", "init_args": {"config": "IA3Config"}}, "dynadapter.Peft"),
        ("Peft", "Peft"),
        (None, "null"),  # a run's scale would turn it into the default adapter
    ],
)
def test_adapter_without_scale_is_refused(adapter, name, data, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"adapter": adapter}}))
    path = write_sweep(tmp_path, data, adapters=["lora", str(tmp_path / "own.yaml")])
    error = refused(["sweep", path], capsys)
    words = (
        f"recipe dynamic with the adapter own has model.adapter {name}, which has no model.adapter.scale for a sweep"
    )
    assert words in error
    assert "train this recipe with dynadapter fit" in error
    assert not (tmp_path / "out").exists()


def test_later_layer_names_the_adapter(data, tmp_path):
    changes = {"recipes": {"x": ["vtab", {"model": {"adapter": {"class_path": "ByBlocks"}}}]}, "adapters": ["lora"]}
    assert sweep_file.read(str(write_sweep(tmp_path, data, **changes))).sweep.adapters == ["lora"]


def test_published_scales_are_the_start(tmp_path):
    (tmp_path / "kitti").mkdir()
    changes = {"tasks": ["kitti", "svhn"], "adapters": ["lora", "repadapter"], "scales": None}
    file = sweep_file.read(str(write_sweep(tmp_path, tmp_path, scale_factors=[0.1, 1], **changes)))
    assert file.sweep.scales["kitti", "lora"] == pytest.approx([1.0, 10.0])
    assert file.sweep.scales["kitti", "repadapter"] == pytest.approx([0.5, 5.0])
    assert file.sweep.tasks == {"kitti": "Structured", "svhn": "Natural"}


def test_settings_decide_which_runs_they_are(data, tmp_path):
    first = sweep_file.read(str(write_sweep(tmp_path, data)))
    same = sweep_file.read(str(write_sweep(tmp_path, data, out="elsewhere")))
    other = sweep_file.read(str(write_sweep(tmp_path, data, settings={"trainer": {"max_epochs": 3}})))
    assert first.sweep.settings == same.sweep.settings
    assert not set(first.sweep.settings.values()) & set(other.sweep.settings.values())
    assert (first.steps(first.sweep.ready({})[0], 5), other.steps(other.sweep.ready({})[0], 5)) == (10, 15)


# ---- whole sweeps


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """Return the folder of a sweep that ran without interruption."""
    folder = tmp_path_factory.mktemp("sweep")
    main(["sweep", str(write_sweep(folder, data))])
    return folder / "out"


def table_of(out: Path) -> str:
    return (out / "table.csv").read_text()


def test_line_holds_what_a_number_needs(finished, data):
    done = lines.read(finished)
    assert len(done) == 2 * (2 + 1)
    for unit, line in done.items():
        assert line["measured_on"] == ("test" if unit.split == FINAL else "val200")
        assert line["images"] == (30 if unit.split == FINAL else 20)
        assert line["group"] == "Natural"
        assert line["configs"][0] == "vtab"
        assert {"cpu", "dynadapter", "torch"} <= line["machine"].keys()
        static = unit.recipe == "static"
        assert [entry["after_block"] for entry in line["exits"]] == ([2] if static else [1, 2])
        cost = line["exits"][-1]["percent_of_static"]
        assert cost == 100 if static else 100 < cost < 140  # heads beside few patches
        policy = line["policies"][GOAL.name]
        right, routed = lines.right_of(line)
        for way, key in enumerate(("accuracy", "mean", "geometric")):
            assert right[way].mean(1) == pytest.approx([entry[key] for entry in line["exits"]], abs=1e-5)
        with np.load(finished / "runs" / unit.name / lines.PREDICTIONS) as packed:
            assert (right[0] == (packed["predictions"] == packed["targets"])).all()
            assert (packed["files"] == np.arange(line["images"])).all()
            labels = packed["targets"].tolist()
        samples = VTAB1k(data, task="colours").samples("test" if unit.split == FINAL else "val")
        assert line["images_hash"] == fingerprint(data_hash(samples), list(range(len(labels))), labels)
        with np.load(io.BytesIO(base64.b64decode(line["per_image"]))) as packed:
            shares = np.bincount(packed["exit_index"][0], minlength=len(line["exits"])) / line["images"]
        assert shares == pytest.approx(list(policy["exit_shares"].values()), abs=1e-5)
        assert routed[GOAL.name].mean() == pytest.approx(policy["accuracy"])
        assert 0 < line["seconds"]["epoch"] < line["seconds"]["training"]
        assert 0 < line["training_loss"]["last_epoch"] < line["training_loss"]["first_epoch"] < 2


def test_sweep_without_seeds_reads_no_test(data, tmp_path, capsys):
    root = shutil.copytree(data, tmp_path / "tasks")
    (root / "colours" / "test.txt").unlink()
    recipes = {"dynamic": ["vtab", {"data": {"init_args": {"shots": 4}}}]}
    changes = {"scales": [1], "seeds": [], "search_seeds": [3], "recipes": recipes}
    main(["sweep", str(write_sweep(tmp_path, root, epochs=1, **changes))])
    (unit,) = lines.read(tmp_path / "out")
    assert (unit.split, unit.seed) == (SEARCH, 3)
    assert "| lora, dynamic, exit 2 |" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "runs" / unit.name / lines.LOGITS) as packed:
        assert packed["logits"].shape == (2, 20, 3)
    record = json.loads(next((tmp_path / "out" / "runs" / unit.name).glob("version_*/run.json")).read_text())
    drawn = VTAB1k(root, task="colours", shots=4, shots_seed=3).used("train")  # the shots are those of the seed
    assert record["data"]["splits"]["train"]["hash"] == data_hash(drawn)


def test_thresholds_are_carried_over(finished):
    done = lines.read(finished)
    finals = [unit for unit in done if unit.split == FINAL]
    assert len(finals) == 2
    for unit in finals:
        policy = done[unit]["policies"][GOAL.name]
        name = policy["calibrated_on"]
        twin = next(one for one in done if one.name == name)
        assert (twin.split, twin.scale, twin.seed, twin.recipe) == (SEARCH, unit.scale, unit.seed, unit.recipe)
        assert policy["policy"] == done[twin]["policies"][GOAL.name]["policy"]
        assert policy["val200"]["accuracy"] == pytest.approx(done[twin]["policies"][GOAL.name]["accuracy"])


def test_checkpoints_of_lost_scales_are_gone(finished):
    done = lines.read(finished)
    chosen = {(unit.recipe, unit.scale) for unit in done if unit.split == FINAL}
    for unit in done:
        kept = bool(list((finished / "runs" / unit.name).glob("version_*/checkpoints/*.ckpt")))
        assert kept == ((unit.recipe, unit.scale) in chosen)


def test_finished_sweep_does_nothing_again(finished, capsys):
    before = (finished / lines.RESULTS).read_bytes(), table_of(finished)
    main(["sweep", str(finished.parent / "sweep.yaml")])
    assert ((finished / lines.RESULTS).read_bytes(), table_of(finished)) == before
    out = capsys.readouterr().out
    assert "| colours |" in out
    assert (finished / "table.md").read_text() in out
    assert (finished / "table.png").read_bytes().startswith(b"\x89PNG")


def test_dry_run_of_a_finished_sweep(finished, capsys):
    main(["sweep", str(finished.parent / "sweep.yaml"), "--dry_run"])
    assert "6 runs are finished, 0 are left" in capsys.readouterr().out


def test_dry_run_measures_one_training(data, tmp_path, capsys):
    main(["sweep", str(write_sweep(tmp_path, data)), "--dry_run"])
    out = capsys.readouterr().out
    assert "4 runs on train800 choose scales and thresholds, 2 final runs" in out
    assert "measured by a short training" in out
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("trainer", "steps", "final"),
    [
        ({"max_epochs": -1, "max_steps": 500}, 500, 500),
        ({"max_epochs": None, "max_steps": 500}, 500, 500),
        ({"max_epochs": 3, "max_steps": 500}, 60, 75),
        ({"max_epochs": 30, "max_steps": 500}, 500, 500),
        ({"max_epochs": None}, 20000, 25000),
        ({}, 2000, 2500),
    ],
)
def test_steps_of_a_run(trainer, steps, final, data, tmp_path):
    """A final run has a quarter more images, and more steps where their number follows from the epochs."""
    recipes = {"dynamic": ["vtab", {"trainer": trainer}]}
    file = sweep_file.read(str(write_sweep(tmp_path, data, recipes=recipes, settings={})))
    unit = file.sweep.ready({})[0]
    assert file.steps(unit, 20) == steps
    line = {"run": as_dict(unit), "images": 10, "seconds": {"training": 8.0, "all": 9.0}}
    for more, longer in (({"steps_of_epoch": 20}, final / steps), ({}, 1.25)):
        assert sweep_estimate.seconds_of(file, FINAL, [line | more], 10) == pytest.approx(8 * longer + 1)


def test_estimate_counts_steps_as_trained(data, tmp_path, monkeypatch):
    """Few shots and accumulated batches shorten an epoch; a step of the measured training takes a second."""
    measured = sweep_unit.measured

    def timed(*arguments: Any) -> dict[str, Any]:
        line = measured(*arguments)
        return line | {"seconds": {"training": 10.0 + line["steps"], "all": 12.0 + line["steps"]}}

    monkeypatch.setattr(sweep_unit, "measured", timed)
    trainer = {"max_epochs": 50, "accelerator": "cpu", "accumulate_grad_batches": 2}
    path = write_sweep(tmp_path, data)
    settings = yaml.safe_load(path.read_text())["settings"] | {"trainer": trainer}
    settings["data"]["init_args"] |= {"batch_size": 2, "shots": 4}
    line = sweep_estimate.probe(sweep_file.read(str(write_sweep(tmp_path, data, settings=settings))))
    assert line["steps_of_epoch"] == 3  # of 12 images
    assert line["seconds"] == {"training": 11.0 + 50 * 3, "all": 13.0 + 50 * 3}


@pytest.mark.parametrize("timed", [True, False])
def test_training_without_a_line_is_not_repeated(timed, data, finished, tmp_path):
    """A process may be killed after training and before its line is written; older checkpoints have no times."""
    shutil.copytree(finished, tmp_path / "out")
    results = tmp_path / "out" / lines.RESULTS
    *kept, last = results.read_text().splitlines(keepends=True)
    results.write_text("".join(kept))
    before, [file] = (
        json.loads(last),
        (tmp_path / "out").glob(f"runs/{Unit(**json.loads(last)['run']).name}/*/*/last.ckpt"),
    )
    checkpoint = torch.load(file, weights_only=True)
    saved = checkpoint["callbacks"].pop("EpochSeconds")
    if not timed:
        torch.save(checkpoint, file)
    main(["sweep", str(write_sweep(tmp_path, data))])
    again = json.loads(results.read_text().splitlines()[-1])
    assert {key: again[key] for key in ("run", "exits", "policies", "per_image")} == {
        key: before[key] for key in ("run", "exits", "policies", "per_image")
    }
    assert table_of(tmp_path / "out") == table_of(finished)
    if timed:
        assert again["seconds"]["epoch"] == before["seconds"]["epoch"]
        assert sum(saved["wall"]) < saved["training"] < again["seconds"]["training"]
        assert again["seconds"]["training"] < again["seconds"]["all"]


@pytest.mark.parametrize("exact", [True, False])
def test_new_first_goal_trains_nothing(exact, data, finished, tmp_path, monkeypatch, capsys):
    """From lines without policies follow the same lines, out of logits alone; checkpoints of lost scales are gone.

    Lines of older versions have costs with three decimals, with which another of equally good policies may win.
    """
    shutil.copytree(finished, tmp_path / "out")
    results, path = tmp_path / "out" / lines.RESULTS, str(write_sweep(tmp_path, data))
    former = lines.read(finished)
    for line in lines.read(finished).values():
        none = {
            name: np.zeros((0, line["images"]), kind) for name, kind in (("routed", bool), ("exit_index", np.uint8))
        }
        bare = lines.as_text({"right": lines.right_of(line)[0], **none})
        lines.append(tmp_path / "out", line | {"policies": {}, "per_image": bare, **({} if exact else {"macs": None})})
    monkeypatch.setattr(sweep_unit, "_fit", lambda *_: pytest.fail("it was trained"))
    main(["sweep", path, "--dry_run"])
    printed = capsys.readouterr().out
    assert "6 runs are trained; their logits give the policies of new goals within seconds" in printed
    assert "measured by" not in printed
    main(["sweep", path])
    again = lines.read(tmp_path / "out")
    assert len(results.read_text().splitlines()) == 18
    for unit, line in former.items():
        changing = {"policies": {}, "per_image": "", "macs": None}
        assert again[unit] | changing == line | changing
        policy, expected = (one["policies"][GOAL.name] for one in (again[unit], line))
        right, routed = lines.right_of(again[unit])
        assert (right == lines.right_of(line)[0]).all()
        assert routed[GOAL.name].mean() == pytest.approx(policy["accuracy"])
        assert policy["target"] == expected["target"]
        assert policy["val200"]["accuracy"] >= policy["target"]["accuracy"]
        if exact:
            assert policy["policy"] == expected["policy"]
            assert policy["val200"] == expected["val200"]
            # the stored logits are rounded to 16 bits, by which an image may change its exit
            assert abs(policy["accuracy"] - expected["accuracy"]) < 1.5 / line["images"]


def test_dry_run_counts_needed_runs_alone(data, finished, tmp_path, capsys):
    """Of six trained runs without policies, the two final ones have a seed that the sweep no longer has."""
    shutil.copytree(finished, tmp_path / "out")
    for line in lines.read(finished).values():
        lines.append(tmp_path / "out", line | {"policies": {}})
    main(["sweep", str(write_sweep(tmp_path, data, seeds=[1], search_seeds=[0])), "--dry_run"])
    printed = capsys.readouterr().out
    assert "6 runs on train800 choose scales and thresholds, 2 final runs" in printed
    assert "4 runs are trained;" in printed
    assert "measured by 4 finished runs" in printed
    done = lines.read(finished)
    each = statistics.fmean(line["bytes"] for unit, line in done.items() if unit.split == SEARCH)
    assert f"about {4 * each / 1e6:,.0f} MB" in printed


def test_changed_reference_trains_nothing(data, finished, tmp_path, monkeypatch):
    """The accuracy of static on val200 has changed: the final run of dynamic takes the new target from its logits."""
    shutil.copytree(finished, tmp_path / "out")
    goal = SweepGoal(Goal(accuracy_drop=0), "static").name
    path = write_sweep(tmp_path, data, goal=[{"accuracy_drop": 0}, {"accuracy_drop": 0, "reference": "static"}])
    monkeypatch.setattr(sweep_unit, "_fit", lambda *_: pytest.fail("it was trained"))
    main(["sweep", str(path)])
    done = lines.read(tmp_path / "out")
    final = next(unit for unit in done if (unit.split, unit.recipe) == (FINAL, "dynamic"))
    reference = sweep_file.read(str(path)).sweep.reference(final, "static", done)
    *others, last = done[reference]["exits"]
    accuracy = last["accuracy"] - 0.05
    lines.append(tmp_path / "out", done[reference] | {"exits": [*others, last | {"accuracy": accuracy}]})
    main(["sweep", str(path)])
    again = lines.read(tmp_path / "out")[final]["policies"]
    assert again[goal]["target"] == {"accuracy": accuracy} != done[final]["policies"][goal]["target"]
    assert again[GOAL.name] == done[final]["policies"][GOAL.name]


@pytest.mark.parametrize("drop", [0, 1])
def test_new_goal_keeps_former_results(drop, data, finished, tmp_path):
    """Results of a former goal stay as they are, here marked ones, unless its target has changed."""
    shutil.copytree(finished, tmp_path / "out")
    new, old = {"cost": 1.0}, {"accuracy_drop": 0}
    file = sweep_file.read(str(write_sweep(tmp_path, data, goal=[new, old])))
    for unit, line in lines.read(finished).items():
        entry = line["policies"][GOAL.name]
        target = {"accuracy": entry["target"]["accuracy"] - drop}
        marked = entry | {"accuracy": 0.123, "target": target}
        rows = {
            "routed": ~lines.right_of(line)[1][GOAL.name][None],
            "exit_index": np.full((1, line["images"]), 7, np.uint8),
        }
        former = line | {"policies": {GOAL.name: marked}, "macs": None}
        former["per_image"] = lines.as_text({"right": lines.right_of(line)[0], **rows})
        again = sweep_unit.remeasured(file, unit, file.run_folder(unit), former, {})
        assert list(again["policies"]) == ["cost 1", GOAL.name]
        (right, routed), exit_index = lines.right_of(again), lines.exit_index_of(again)
        assert (right == lines.right_of(line)[0]).all()
        for goal, policy in again["policies"].items():
            kept = goal == GOAL.name and not drop
            assert (policy == marked) == kept
            assert (routed[goal] == rows["routed"]).all() == kept
            assert (exit_index[goal] == 7).all() == kept
            assert kept or routed[goal].mean() == pytest.approx(policy["accuracy"])


def test_files_with_other_goals_share_a_folder(data, finished, tmp_path, monkeypatch):
    """Each keeps the results of the other; both ends are where they were, and a removed goal has no rows."""
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.setattr(sweep_unit, "_fit", lambda *_: pytest.fail("it was trained"))
    first, path = lines.read(finished), tmp_path / "sweep.yaml"
    for goal in ({"cost": 1.0}, {"accuracy_drop": 0}):
        main(["sweep", str(write_sweep(tmp_path, data, goal=goal))])
        found = table_of(tmp_path / "out")
        assert (GOAL.name in found, "cost 1" in found) == (goal != {"cost": 1.0}, goal == {"cost": 1.0})
        if goal == {"cost": 1.0}:
            written = (tmp_path / "out" / lines.RESULTS).read_bytes()
    assert (tmp_path / "out" / lines.RESULTS).read_bytes() == written
    assert sweep_file.read(str(path)).done().keys() == first.keys()
    for unit, line in lines.read(tmp_path / "out").items():
        assert line["policies"][GOAL.name] == first[unit]["policies"][GOAL.name]
        assert set(lines.right_of(line)[1]) == {GOAL.name, "cost 1"}
    assert table_of(tmp_path / "out") == table_of(finished)


def test_run_on_other_images_gets_no_line(data, finished, tmp_path, monkeypatch, capsys):
    """The root was changed before the last run."""
    shutil.copytree(finished, tmp_path / "out")
    results = tmp_path / "out" / lines.RESULTS
    *kept, last = results.read_text().splitlines(keepends=True)
    other = json.loads(kept[-1]) | {"images_hash": "x", "run": json.loads(last)["run"]}
    results.write_text("".join(kept))
    monkeypatch.setattr(sweep_unit, "measured", lambda *_: other)
    command = ["sweep", write_sweep(tmp_path, data)]
    assert "was measured on other images than" in refused(command, capsys)
    assert results.read_text() == "".join(kept)
    lines.append(tmp_path / "out", other)  # as an older version did
    assert "give the root of the former runs, or another out" in refused(command, capsys)


def test_terminated_within_an_epoch(data, finished, tmp_path, monkeypatch, capsys):
    """The checkpoint lies within an epoch, whose start the resumed process does not see."""

    def terminate(self, trainer, *_):
        if trainer.global_step == 1:
            signal.raise_signal(signal.SIGTERM)

    def offline(self):
        raise ValueError("offline")

    command = ["sweep", str(write_sweep(tmp_path, data))]
    with monkeypatch.context() as patch:
        patch.setattr(sweep_unit.EpochSeconds, "on_train_batch_end", terminate)
        with pytest.raises(SystemExit):
            main(command)
    assert not lines.read(tmp_path / "out")
    [saved] = (tmp_path / "out").glob("runs/*/version_0/checkpoints/last.ckpt")
    before = saved.read_bytes()
    with monkeypatch.context() as patch:  # an error that passes keeps what was trained
        patch.setattr(sweep_unit.TimedCLI, "run", offline)
        assert "offline" in refused(command, capsys, code=1)
    assert saved.read_bytes() == before
    main(command)
    assert table_of(tmp_path / "out") == table_of(finished)


@pytest.mark.parametrize(
    ("seconds", "text"), [(59, "59 seconds"), (90, "1.5 minutes"), (7200, "2.0 hours"), (2e5, "2.3 days")]
)
def test_durations(seconds, text):
    assert sweep_estimate.as_duration(seconds) == text


def test_run_that_diverges_loses(data, tmp_path, monkeypatch):
    train = sweep_unit._fit

    def diverge(file, unit, folder):
        if unit.scale == 10:
            raise ValueError("the training loss is not finite at step 3")
        return train(file, unit, folder)

    monkeypatch.setattr(sweep_unit, "_fit", diverge)
    main(["sweep", str(write_sweep(tmp_path, data, epochs=1, recipes={"static": ["vtab", "static"]}))])
    done = lines.read(tmp_path / "out")
    assert [unit.scale for unit, line in done.items() if "failed" in line] == [10]
    assert {unit.scale for unit in done if unit.split == FINAL} == {1}


@pytest.mark.filterwarnings("ignore:it learned nothing")  # the warning of the callback
def test_final_run_that_learned_nothing(data, tmp_path, monkeypatch):
    """It fails at scale 10 alone, after which scale 1 is trained."""
    at = []
    train = sweep_unit._fit
    monkeypatch.setattr(sweep_unit, "_fit", lambda file, unit, folder: at.append(unit) or train(file, unit, folder))
    nothing = property(lambda self: "it learned nothing" if at[-1].scale == 10 and at[-1].split == FINAL else None)
    monkeypatch.setattr(LearningCheck, "finding", nothing)
    monkeypatch.setattr("dynadapter.sweep.plan.score", lambda line, goal: (line["run"]["scale"], 0.0))
    main(["sweep", str(write_sweep(tmp_path, data, epochs=1, recipes={"static": ["vtab", "static"]}))])
    done = lines.read(tmp_path / "out")
    assert {unit.scale: line.get("failed") for unit, line in done.items() if unit.split == FINAL} == {
        10: "it learned nothing",
        1: None,
    }


def test_failed_run_does_not_stop_the_others(data, tmp_path, capsys):
    """A goal out of reach fails every dynamic run; the static ones are finished."""
    path = write_sweep(tmp_path, data, epochs=1, goal={"cost": 0.01}, scales=[1])
    error = refused(["sweep", path], capsys, code=1)
    assert {unit.recipe for unit in lines.read(tmp_path / "out")} == {"static"}
    assert "1 run failed" in error


def test_final_run_without_logits_is_not_trained(data, finished, tmp_path, capsys, monkeypatch):
    """Only the lines of a sweep were kept: the run folder with the logits for thresholds is missing."""
    out = tmp_path / "out"
    out.mkdir()
    searched = [line for line in (finished / lines.RESULTS).read_text().splitlines() if '"train800"' in line]
    (out / lines.RESULTS).write_text("\n".join(searched) + "\n")
    monkeypatch.setattr(sweep_unit, "_fit", lambda *_: pytest.fail("it was trained"))
    error = refused(["sweep", write_sweep(tmp_path, data)], capsys, code=1)
    assert "predictions.npz is missing, and thresholds come from it" in error
    assert "delete the run's line in results.jsonl" in error


def test_lost_train800_run_is_trained_again(data, finished, tmp_path, capsys):
    """For a further goal a final run needs its train800 run, whose line has to go, too."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    final = next(unit for unit in lines.read(out) if unit.split == FINAL and unit.recipe == "static")
    twin = replace(final, split=SEARCH)
    shutil.rmtree(out / "runs" / twin.name)
    command = ["sweep", write_sweep(tmp_path, data, goal=[{"accuracy_drop": 0}, {"cost": 1.0}])]
    assert "delete the run's line in results.jsonl" in refused(command, capsys, code=1)
    results = out / lines.RESULTS
    kept = [line for line in results.read_text().splitlines(keepends=True) if json.loads(line)["run"] != as_dict(twin)]
    results.write_text("".join(kept))
    main([str(arg) for arg in command])
    assert list(lines.read(out)[final]["policies"]) == [GOAL.name, "cost 1"]
    assert (out / "runs" / twin.name / lines.LOGITS).exists()


@pytest.mark.slow
def test_killed_sweep_ends_with_the_same_table(data, finished, tmp_path):
    """Killed in the middle of a training, then finished by two processes."""
    path = write_sweep(tmp_path, data)
    command = [sys.executable, "-m", "dynadapter.cli", "sweep", str(path)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads add up in another order
    process = subprocess.Popen(command, env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out"
    while len(list(out.glob("runs/*/version_0/checkpoints/last.ckpt"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(lines.read(out)) < 6
    done = subprocess.run([*command, "--processes", "2"], env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((out / lines.RESULTS).read_text().splitlines()) == 6
    assert table_of(out) == table_of(finished)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus=1"], "--cpus and --gpus belong to --engine ray"),
        (["--cpus=2"], "--cpus and --gpus belong to --engine ray"),
        (["--engine=ray", "--processes=2"], "--processes belongs to --engine local"),
    ],
)
def test_options_of_another_engine(options, words, capsys):
    assert words in refused(["sweep", "sweep.yaml", *options], capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_does_the_same_runs(data, finished, tmp_path, alone_on_ray):
    main(["sweep", str(write_sweep(tmp_path, data)), "--engine", "ray"])
    assert table_of(tmp_path / "out") == table_of(finished)
