"""benchmarks/report.py: what it prints of the lines of a sweep and of the timing programs."""

import importlib
import shutil
import sys
from collections.abc import Iterator
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


def write_sweep(folder: Path) -> None:
    """Write the tables of a sweep as transfer.py keeps them."""
    folder.mkdir()
    (folder / "transfer.md").write_text("| | lora, exits |\n|---|---:|\n| cars | 75.0 (60 %) |\n")
    head = "adapter,recipe,reading,what,scale,seeds,accuracy,accuracy_std,percent_of_static,percent_of_static_std"
    rows = [
        "exit 1,mean of 2 tasks,,2,56.04,1.0,50,0",
        "exit 1,cars,1,2,70,1.0,50,0",
        "policy,mean of 2 tasks,,2,66,1,60,0",
    ]
    (folder / "transfer.csv").write_text("\n".join([head, *(f"lora,exits,{row}" for row in rows)]) + "\n")
    (folder / "transfer.png").write_bytes(b"a picture")


def test_document_of_a_sweep(report, tmp_path):
    write_sweep(tmp_path / "results")
    out = tmp_path / "RESULTS.md"
    report.main(["--results", str(tmp_path / "results"), "--out", str(out)])
    text = out.read_text()
    assert "| cars | 75.0 (60 %) |" in text
    exits = text.partition("Every exit")[2].splitlines()
    assert [line for line in exits if "exit 1" in line] == ["| lora | exits | exit 1 | 2 | 56.000 | 1.000 | 50 | 0 |"]
    assert "policy" not in text.partition("Every exit")[2]
    assert (tmp_path / "figures" / "accuracy.png").read_bytes() == b"a picture"
    assert "second trainer" not in text.partition("## An epoch")[0]


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
