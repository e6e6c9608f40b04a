"""benchmarks/report.py: what it prints of the lines of a sweep and of the timing programs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def report(program) -> Any:
    return program("report")


def test_document_of_a_sweep(report, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "transfer_micro.md").write_text("| | lora, exits |\n|---|---:|\n| cars | 75.0 (60 %) |\n")
    head = "adapter,recipe,reading,what,scale,seeds,accuracy,accuracy_std,percent_of_static,percent_of_static_std"
    line = "lora,dynamic,exit 1,mean of 4 fresh tasks,,3,70.000,0.500,25.000,0.000"
    (results / "transfer_micro.csv").write_text(f"{head}\n{line}\n")
    out = tmp_path / "RESULTS.md"
    report.main(["--results", str(results), "--out", str(out)])
    text = out.read_text()
    assert "| cars | 75.0 (60 %) |" in text
    assert "seed, lora" in text
    assert (tmp_path / "figures" / "accuracy-transfer_micro.png").read_bytes().startswith(b"\x89PNG")
    first = next(reading for reading in report.margins.READINGS if reading.prefix == "transfer")
    [axes] = report.draw_accuracy(results / "transfer_micro.csv", first, "title").axes
    assert axes.get_ylabel() == "test accuracy in %, mean of 4 fresh tasks, axis cut"
    assert axes.lines[0].get_label() == "lora, dynamic (3 seeds)"


def test_claims_without_runs_are_open(report, tmp_path, capsys):
    report.main(["--results", str(tmp_path), "--claims"])
    readings = capsys.readouterr().out.split("\n\n")
    assert [title.partition(" (")[0] for title in readings] == [one.title for one in report.margins.READINGS]
    for reading, of in zip(readings, report.margins.READINGS, strict=True):
        lines = [line for line in reading.splitlines()[1:] if not line.startswith("The aim")]
        assert len(lines) == {"all": 15, "seed": 3, "ordinary": 2}[of.judges]
        assert all(" open " in line for line in lines)
    assert list(tmp_path.iterdir()) == []


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
        assert "seed, lora" in out.read_text()
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
