"""benchmarks/report.py: what it prints of the lines of a sweep and of the timing programs."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def report() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield importlib.import_module("report")


def sweep_line(task: str, seed: int, accuracy: float, recipe: str = "exits", **changes: Any) -> dict[str, Any]:
    """A line as ``dynadapter sweep`` writes it."""
    run = {"task": task, "adapter": "lora", "recipe": recipe, "scale": 1.0, "seed": seed, "settings": "0"}
    exits = [{"exit": k + 1, "accuracy": accuracy - 0.1 * (1 - k), "percent_of_static": 50.0 * (k + 1)} for k in (0, 1)]
    policy = {"accuracy": accuracy, "percent_of_static": 60.0, "exit_shares": {"exit 1": 0.8, "exit 2": 0.2}}
    return {"run": run | {"split": "train800val200"} | changes, "exits": exits, "policy": policy}


@pytest.fixture
def results(tmp_path) -> Callable[..., Path]:
    """Write lines of a sweep into a folder of results and return it."""

    def write(*lines: dict[str, Any]) -> Path:
        folder = tmp_path / "results"
        folder.mkdir()
        (folder / "transfer.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


LINES = [
    sweep_line("cars", 0, 0.70),
    sweep_line("cars", 1, 0.80),
    sweep_line("birds", 0, 0.50),
    sweep_line("birds", 1, 0.64),
    sweep_line("birds", 2, 0.99),  # no other task has this seed
    sweep_line("cars", 0, 0.10, split="train800"),  # a search run
    sweep_line("cars", 5, 0.10) | {"failed": "out of memory"},
]


def test_sweep_means_over_tasks_then_seeds(report):
    means = report.over_seeds(report.transfer_frame(LINES)).set_index("reading")
    policy = means.loc["policy"]
    assert policy["accuracy"] == pytest.approx((60 + 72) / 2)
    assert policy["deviation"] == pytest.approx(12 / 2**0.5)
    assert (policy["seeds"], policy["cost"]) == (2, 60)
    assert means.loc["exit 1", "accuracy"] == pytest.approx(56)


def test_sweep_table_has_a_column_a_task(report):
    (row,) = report.transfer_table(report.transfer_frame(LINES)).to_dict("records")
    assert (row["cars"], row["mean"], row["seeds"], row["% of static"]) == (75, 66, 2, 60)


def test_document_of_a_sweep(report, results, tmp_path):
    folder = results(*LINES, sweep_line("cars", 0, 0.5, "static"))
    texts = []
    for name in ("one", "two"):
        out = tmp_path / name / "RESULTS.md"
        out.parent.mkdir()
        report.main(["--results", str(folder), "--out", str(out)])
        texts.append((out.read_bytes(), (out.parent / "figures" / "accuracy.svg").read_bytes()))
    assert texts[0] == texts[1]  # the same lines give the same bytes
    text = texts[0][0].decode()
    assert "| lora | exits | 75.0" in text
    assert "second trainer" not in text


def test_committed_document_is_current(report, tmp_path):
    out = tmp_path / "RESULTS.md"
    report.main(["--out", str(out)])
    assert out.read_text() == (BENCHMARKS / "RESULTS.md").read_text(), "run python benchmarks/report.py"
    for figure in (tmp_path / "figures").iterdir():
        assert (BENCHMARKS / "figures" / figure.name).exists()


@pytest.mark.parametrize("content", ["", "{}\n{"])
def test_broken_results(report, tmp_path, capsys, content):
    (tmp_path / "latency.jsonl").write_text(content)
    out = tmp_path / "RESULTS.md"
    if content:
        with pytest.raises(SystemExit):
            report.main(["--results", str(tmp_path), "--out", str(out)])
        assert "latency.jsonl:2 is not JSON" in capsys.readouterr().err
    else:
        report.main(["--results", str(tmp_path), "--out", str(out)])
        assert report.NO_ACCURACY in out.read_text()
        assert "## Routing" not in out.read_text()


def test_markdown_keeps_integers_and_gaps(report):
    frame = pd.DataFrame([{"batch": 8, "time": 1.25}, {"arm": "a"}], dtype=object)
    assert report.markdown(frame) == "| batch | time | arm |\n| ---: | ---: | --- |\n| 8 | 1.250 |  |\n|  |  | a |\n"


def test_machines_get_their_own_tables(report, tmp_path):
    shutil.copy(BENCHMARKS / "results" / "token_merging.jsonl", tmp_path)
    lines = report.read(tmp_path / "token_merging.jsonl")
    lines[0]["machine"]["cpu"] = "another"
    text = report.time_section("Token merging", "token_merging", lines, tmp_path)
    assert text.count("On another, Python") == 1
    assert sum(line.startswith("On ") for line in text.splitlines()) == len(report.by_machine(lines)) > 1
