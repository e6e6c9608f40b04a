"""The examples run as they stand, and what they show is so."""

import runpy
from pathlib import Path

import pytest

from dynadapter.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "clips_by_direction.py",
        "exits_by_difficulty.py",
        "parts_in_your_own_module.py",
        "torchvision_vit.py",
    }


@pytest.mark.slow
def test_parts_in_your_own_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    measured = runpy.run_path(str(EXAMPLES / "parts_in_your_own_module.py"))["main"](max_epochs=1)
    out = capsys.readouterr().out
    assert out.count("Exits (test)") == 1
    macs = [float(count) for count in out.splitlines()[0].split(":")[1].split(",")]
    assert len(macs) == 4
    assert macs[0] <= 1e3 * measured["test/gmacs"] <= macs[3]
    assert measured["test/acc"] > 0.25  # eight classes
    assert list(tmp_path.iterdir()) == []  # leaves nothing behind


def test_torchvision_vit(capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(EXAMPLES / "torchvision_vit.py"))["main"]()
    assert capsys.readouterr().out == "True\n2\n"


def test_clips_by_direction(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("av")
    run = runpy.run_path(str(EXAMPLES / "clips_by_direction.py"))["main"]
    measured = run(str(tmp_path), max_epochs=1, counts={"train": 40, "val": 8, "test": 8})
    out = capsys.readouterr().out
    assert "Exits (test, shares under confidence_0.9)" in out
    assert 0 <= measured["test/confidence_0.9/acc"] <= 1


def test_exits_by_difficulty(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny = Path(__file__).parent / "conf" / "tiny.yaml"
    main(["fit", "-c", str(tiny), f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"])
    capsys.readouterr()
    run = runpy.run_path(str(EXAMPLES / "exits_by_difficulty.py"))["main"]
    for threshold, exit_index in ((0.0, 0), (1.0, 2)):  # all images at the first exit, all at the last
        rows = run(str(tmp_path / "version_0" / "checkpoints" / "last.ckpt"), threshold)
        assert len(rows) == 5
        for row in rows:
            assert row["share"][exit_index] == 1
            assert row["routed"] == pytest.approx(row["accuracy"][exit_index])
    assert len(capsys.readouterr().out.splitlines()) == 12
