"""The benchmark's report: it prints what the lines say, of a part of them, too, and always the same."""

import copy
import importlib
import json
import random
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import transfer_lines
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TASKS = ("cars", "birds", "dots")
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def program():
    """Imports a module of the folder of benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield importlib.import_module


@pytest.fixture(scope="module")
def maker(program):
    outcomes = program("outcomes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcomes, "RULES", {name: outcomes.RULES[name] for name in ("confidence", "margin")})
        yield transfer_lines.Maker(outcomes, program("recipes"))


@pytest.fixture(scope="module")
def lines(maker) -> Lines:
    found = list(maker.log(TASKS, ("probe", "lora", "full")))
    return [line for line in found if line["key"]["recipe"] not in ("late-to-early", "linear-in-depth")]


@pytest.fixture
def run(program, tmp_path, capsys):
    """Runs the program on lines; gives what it wrote."""

    def run(lines: Lines, *more: str, name: str = "RESULTS.md") -> str:
        log = transfer_lines.write(tmp_path / "transfer.jsonl", lines)
        program("report").main(["--lines", str(log), "--out", str(tmp_path / name), *more])
        return (tmp_path / name).read_text()

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made, but not written: that takes longest."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: None)


def rows(text: str, start: str) -> list[list[str]]:
    """The cells of the table rows that begin with this."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[0].startswith(start)]


def accuracy(line: dict[str, Any], goal: str | None) -> float:
    return line["routed"]["confidence"][goal]["accuracy"] if goal else line["exit_accuracy"][-1]


def finals(lines: Lines, recipe: str, goal: str | None = None) -> dict[str, dict[int, float]]:
    """Accuracy of LoRA by task and seed."""
    wanted = {"phase": "final", "method": "lora", "recipe": recipe}
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        if wanted.items() <= line["key"].items():
            found.setdefault(line["key"]["task"], {})[line["key"]["seed"]] = accuracy(line, goal)
    return found


def changed(lines: Lines, change: Callable[[dict[str, Any]], None], **key: Any) -> Lines:
    """Copies with a change in the lines of a key."""
    copies = copy.deepcopy(lines)
    for line in copies:
        if key.items() <= line["key"].items():
            change(line)
    return copies


# ---- numbers


def test_means_are_those_of_the_lines(run, lines, undrawn):
    text = run(lines)
    for recipe, goal, name in (("static", None, "**LoRA**"), ("base", "50", "Dyn-LoRA, at 50 %")):
        found = finals(lines, recipe, goal)
        by_seed = [{task: found[task][seed] for task in TASKS} for seed in (0, 1)]
        natural = [statistics.fmean([one["cars"], one["birds"]]) for one in by_seed]
        groups = [statistics.fmean([natural[seed], by_seed[seed]["dots"]]) for seed in (0, 1)]
        expected = [f"{100 * statistics.fmean(v):.1f} ± {100 * statistics.stdev(v):.1f}" for v in (natural, groups)]
        row = rows(text[text.index("### Means") :], name)[0]
        assert [row[1], row[3]] == expected


def test_what_compares_most_comes_first_and_of_equals_the_longest_training(program, lines):
    findings = program("findings")
    own = lines[0]["key"]["epochs"]
    longer = changed(lines, lambda line: line["key"].update(epochs=own + 1))
    part = [line for line in longer if line["key"]["task"] == "dots" or line["key"]["recipe"] != "static"]
    assert [one.epochs for one in findings.settings([*lines, *longer])] == [own + 1, own]
    assert [one.epochs for one in findings.settings([*part, *lines])] == [own, own + 1]


def test_scales_that_a_shorter_training_chose_are_named_with_it(run, lines, undrawn):
    assert "(seed 0; scales 1; for full" in run(lines)
    shorter = changed(lines, lambda line: line.update(scales_epochs=12), phase="final")
    assert "(seed 0; scales 0.1, 1, 10, chosen after 12 epochs; for full" in run(shorter)


def test_the_interval_is_students(run, lines, undrawn):
    one, other = finals(lines, "base", "50"), finals(lines, "static")
    apart = [100 * statistics.fmean(one[t][s] - other[t][s] for s in (0, 1)) for t in TASKS]
    low, high = scipy.stats.ttest_1samp(apart, 0).confidence_interval(0.95)
    row = rows(run(lines), "Dyn-LoRA at 50 %")[0]
    assert row[4] == f"**{statistics.fmean(apart):+.1f} ± {(high - low) / 2:.1f}**"
    assert row[1:4] == [f"{apart[TASKS.index(task)]:+.1f}" for task in ("birds", "cars", "dots")]


def test_costs_are_the_meters(program, lines):
    read = program("findings").read
    for line in [line for line in lines if line["key"]["phase"] == "final" and line["arm"] == "dynamic"]:
        point = read(line, "50")
        assert point.cost == pytest.approx(line["routed"]["confidence"]["50"]["cost"])
        assert point.macs == pytest.approx(point.cost * line["macs_static"])
        assert sum(point.shares) == pytest.approx(1)
        assert read(line, "last").cost == line["macs"][-1] / line["macs_static"]
        assert read(line, "nothing") is None


def test_an_exit_alone_is_not_a_calibrated_one(program, lines):
    line = next(line for line in lines if line["arm"] == "dynamic" and line["key"]["phase"] == "final")
    read = program("findings").read
    assert [read(line, k).accuracy for k in range(4)] == line["exit_accuracy"]
    assert read(line, 4) is None


# ---- goals


@pytest.mark.parametrize(
    ("accuracies", "cost", "verdict"),
    [
        ((0.8, 0.8), 0.49, "**reached**"),
        ((0.79, 0.8), 0.49, "missed: accuracy by 1.00 points"),
        ((0.8, 0.8), 0.51, "missed: cost by 1.00 % of LoRA's"),
    ],
)
def test_a_goal_is_reached_or_missed_by_so_much(run, lines, undrawn, accuracies, cost, verdict):
    def routed(line: dict[str, Any]) -> None:
        line["exit_accuracy"][-1] = 0.8
        # two exits' costs mixed so that the average is this one
        low, high = (line["macs"][k] / line["macs_static"] for k in (0, 3))
        share = (high - cost) / (high - low)
        values = {"accuracy": accuracies[0], "cost": cost, "shares": [share, 0.0, 0.0, 1 - share]}
        line["routed"]["confidence"]["50"] |= values

    def static(line: dict[str, Any]) -> None:
        line["exit_accuracy"] = [accuracies[1]]

    edited = changed(lines, routed, phase="final", method="lora", recipe="base")
    text = run(changed(edited, static, phase="final", method="lora", recipe="static"))
    assert rows(text, "1: Dyn-LoRA, set for 50 %")[0][-1] == verdict
    assert rows(text, "2: Dyn-LoRA")[0][-1] == "**reached**"
    assert rows(text, "3: Dyn-LoRA")[0][-1] == "**reached**"


def test_an_ingredient_earns_its_place_where_all_tasks_say_so(run, lines, undrawn):
    def worse(line: dict[str, Any]) -> None:
        line["held_out"] = {"confidence": {"50": {"accuracy": 0.3 + len(line["key"]["task"]) / 100, "cost": 0.5}}}

    def base(line: dict[str, Any]) -> None:
        line["held_out"] = {"confidence": {"50": {"accuracy": 0.5 + len(line["key"]["task"]) / 100, "cost": 0.5}}}

    text = run(changed(changed(lines, worse, recipe="uniform"), base, phase="search", recipe="base"))
    assert rows(text, "4: equal loss weights")[0][-2:] == [
        "-20.0 ± 0.0 points at half the cost, on validation",
        "**it helps**",
    ]


def test_measurements_with_a_control_that_is_off_do_not_count(run, lines, undrawn):
    def off(line: dict[str, Any]) -> None:
        line["times"]["50"] |= {"control": 1.2, "efficiency": 0.1}

    text = run(changed(lines, off, phase="speed", task="cars"))
    assert rows(text, "3: Dyn-LoRA")[0][2] == "0.970 (1.94× of 2.00×), 2 tasks"
    assert "1 of 9 measurements left out" in text


# ---- what is not there


def test_a_part_of_a_log_is_printed_and_the_rest_is_named(run, lines, undrawn):
    order = random.Random(0)
    for count in (1, 2, 5, 20, len(lines) - 1):
        text = run(order.sample(lines, count))
        if "No final run yet" not in text:
            assert "**Not there yet**" in text
        assert "nan" not in text.lower()
    assert "No final run yet" in run([line for line in lines if line["key"]["phase"] == "search"])


def test_what_is_missing_stands_there(run, lines, undrawn):
    wanted = {"phase": "final", "task": "cars", "method": "lora", "recipe": "static"}
    text = run([line for line in lines if not wanted.items() <= line["key"].items()])
    assert "- LoRA: no final run on cars\n" in text
    assert "- Adapter: no final run at all\n" in text
    text = run([line for line in lines if not (wanted | {"seed": 1}).items() <= line["key"].items()])
    assert "- LoRA: cars without seed 1\n" in text
    # an arm that lacks a task has no mean over all tasks
    assert rows(run([x for x in lines if not wanted.items() <= x["key"].items()]), "**LoRA**")[0][1] == "–"


def test_no_line_is_one_clear_error(program, tmp_path, capsys):
    for name in ("absent.jsonl", "empty.jsonl"):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(SystemExit) as stopped:
            program("report").main(["--lines", str(tmp_path / name), "--out", str(tmp_path / "RESULTS.md")])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{name} has no lines; run transfer.py first" in error
    assert not (tmp_path / "RESULTS.md").exists()


def test_backbones_and_lengths_do_not_mix(run, lines, undrawn):
    def other(line: dict[str, Any]) -> None:
        line["key"] |= {"backbone": "large:89abcdef", "epochs": 30}

    searched = [line for line in lines if line["key"]["phase"] == "search"]
    text = run(lines + changed(searched, other))
    first, second = (re.sub(r"from the \d+ lines", "", part) for part in text.split("## large, 30 epochs"))
    assert first == re.sub(r"from the \d+ lines", "", run(lines)) + "\n"
    assert "No final run yet" in second


def test_any_tasks_are_taken(run, maker, undrawn):
    text = run([maker.line("final", "cars", "lora", recipe, group="Odd") for recipe in ("static", "base")])
    assert "1 tasks (Odd: cars)" in text
    assert "One seed: no deviation can be told." in text


def best_by_task(lines: list[dict[str, Any]]) -> float:
    """The accuracy of LoRA on test, where each task takes that of two recipes which did better in the search."""
    found = []
    for task in TASKS:
        about = {"task": task, "method": "lora", "scale": 1.0}
        own = [line for line in lines if about.items() <= line["key"].items()]
        scores = {}
        for line in own:
            recipe, phase = line["key"]["recipe"], line["key"]["phase"]
            if phase == "search" and recipe in ("base", "uniform"):
                scores[recipe] = line["exit_accuracy"][-1] + line["routed"]["confidence"]["50"]["accuracy"]
        best = max(("base", "uniform"), key=scores.__getitem__)
        read = [x for x in own if (x["key"]["phase"], x["key"]["recipe"]) == ("final", best)]
        found.append(statistics.fmean(line["exit_accuracy"][-1] for line in read))
    return 100 * statistics.fmean(found)


def test_other_recipes_on_test_are_told_and_do_not_count(run, maker, lines, undrawn):
    others = [maker.line("final", task, "lora", "uniform") for task in TASKS]
    text = run(lines + others)
    expected = 100 * statistics.fmean(line["exit_accuracy"][-1] for line in others)
    assert rows(text, "LoRA, `uniform`")[0][1] == f"{expected:.1f}"
    assert rows(text, "LoRA, *by task*")[0][1] == f"{best_by_task(lines + others):.1f}"
    assert rows(text, "**LoRA**") == rows(run(lines), "**LoRA**")


def test_where_the_shown_recipe_was_never_run_the_one_with_most_final_runs_stands_for_it(program, maker):
    finals = [maker.line("final", task, "lora", recipe) for task in TASKS for recipe in ("uniform", "static")]
    one = maker.line("final", "cars", "lora", "base")
    (setting,) = program("findings").settings([*finals, one], "late-to-early")
    assert setting.recipe == "uniform"
    searched = [maker.line("search", "cars", "lora", recipe) for recipe in ("static", "rescale")]
    (setting,) = program("findings").settings(searched, "late-to-early")
    assert setting.recipe == "rescale"


def test_drawn_tasks_compare_recipes_and_stand_in_for_an_ablation(run, maker, lines, tmp_path, undrawn):
    about = {"phase": "search", "method": "lora"}
    drawn = [line for line in lines if about.items() <= line["key"].items()]
    transfer_lines.write(tmp_path / "drawn.jsonl", drawn)
    whole = [line for line in lines if line["key"]["recipe"] in ("static", "base", "uniform")]
    text = run([line for line in whole if line["key"]["recipe"] != "uniform"])
    first, second = text.split("epochs, drawn tasks\n")
    own = [line["exit_accuracy"][-1] for line in drawn if line["key"]["recipe"] == "base"]
    row = rows(second, "LoRA, `base`")[0]
    assert row[1] == "all at the last exit"
    assert row[-1] == f"{100 * statistics.fmean(own):.1f}"
    assert "read on test" not in second
    (goal,) = rows(first, "4: equal loss weights")
    assert goal[2].endswith("on validation of drawn tasks")
    (its_own,) = rows(run(whole).split("epochs, drawn tasks\n")[0], "4: equal loss weights")
    assert its_own[2].endswith("on validation")


# ---- documents


def test_the_same_lines_give_the_same_bytes(run, lines, tmp_path):
    files = []
    for name in ("one", "two"):
        run(lines, name=f"{name}/RESULTS.md")
        files.append({p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*")) if p.is_file()})
    assert files[0] == files[1]
    assert set(files[0]) == {"RESULTS.md", *(f"{n}.svg" for n in ("frontier", "differences", "exits", "ablation"))}
    linked = re.findall(r"\]\(figures/(.*?)\)", files[0]["RESULTS.md"].decode())
    assert set(linked) == set(files[0]) - {"RESULTS.md"}


def test_notes_beside_the_log_are_the_last_section(run, lines, tmp_path, undrawn):
    (tmp_path / "notes.md").write_text("Early exits were too weak at first.\n")
    assert run(lines).endswith("## What was tried, and what was learned\n\nEarly exits were too weak at first.\n")


def test_the_readmes_table_stands_between_its_markers(run, program, lines, tmp_path, undrawn, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    text = run(lines, "--readme", str(readme))
    written = readme.read_text()
    head, table, tail = re.split(r"<!-- /?results -->", written)
    assert (head, tail) == ("before\n", "\nafter\n")
    assert table.strip() in text  # no number that is not in the document
    run(lines, "--readme", str(readme))
    assert readme.read_text() == written
    for wrong in ("no markers", "<!-- /results --> <!-- results -->"):
        readme.write_text(wrong)
        with pytest.raises(SystemExit):
            run(lines, "--readme", str(readme))
        assert "needs one line <!-- results -->" in capsys.readouterr().err
        assert readme.read_text() == wrong


def test_images_that_leave_first_and_last_are_drawn_when_asked_for(run, program, maker, tmp_path, capsys):
    line = maker.line("final", "dots", "lora", "base")
    logits, targets = transfer_lines.drawn("lora", "dots", "base", 0, maker.samples, line["classes"])
    files = [f"images/{k}.png" for k in range(len(targets))]
    (tmp_path / "data" / "dots" / "images").mkdir(parents=True)
    for file in files:
        Image.new("RGB", (8, 8), "green").save(tmp_path / "data" / "dots" / file)
    kept = tmp_path / "kept" / f"{program('transfer').kept_name(line['key'])}.npz"
    kept.parent.mkdir()
    np.savez(kept, logits=logits.numpy(), targets=targets.numpy(), files=np.array(files))
    asked = ["--leavers", str(tmp_path / "leavers.png"), "--data", str(tmp_path / "data")]
    run([line], *asked, "--keep", str(kept.parent))
    with Image.open(tmp_path / "leavers.png") as image:
        assert np.asarray(image.convert("RGB")).reshape(-1, 3).tolist().count([0, 128, 0]) > 100
    with pytest.raises(SystemExit):
        run([line], *asked, "--keep", str(tmp_path))
    assert "has no logits of final runs of Dyn-LoRA" in capsys.readouterr().err


def test_results_are_what_the_program_prints_from_the_committed_lines(program, tmp_path):
    log = BENCHMARKS / "results" / "transfer.jsonl"
    if not log.exists():
        pytest.skip("no lines are committed yet")
    program("report").main(["--out", str(tmp_path / "RESULTS.md")])
    assert (tmp_path / "RESULTS.md").read_text() == (BENCHMARKS / "RESULTS.md").read_text()
    for figure in (tmp_path / "figures").iterdir():
        assert (BENCHMARKS / "figures" / figure.name).is_file()
    readme = (BENCHMARKS.parent / "README.md").read_text()
    if "<!-- results -->" in readme:
        table = re.split(r"<!-- /?results -->", readme)[1].strip()
        assert not table or table in (tmp_path / "RESULTS.md").read_text()


def test_made_lines_have_what_real_ones_have(lines):
    """Guards this file's own ground: numbers only, and a calibration that spends what it was given."""
    for line in lines:
        assert json.loads(json.dumps(line)) == line
    searched = [line for line in lines if line["key"]["phase"] == "search" and "routed" in line]
    routed = [line["routed"]["confidence"]["50"] for line in searched]
    assert all(one["cost"] <= 0.5 for one in routed)
    assert torch.tensor([one["accuracy"] for one in routed]).mean() > 0.3
