"""The examples run as they stand, and what they show is so."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"parts_in_your_own_module.py"}


def test_parts_in_your_own_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    measured = runpy.run_path(str(EXAMPLES / "parts_in_your_own_module.py"))["main"](max_epochs=3)
    out = capsys.readouterr().out
    assert out.count("Exits (test)") == 1
    macs = [
        float(count) for count in out.splitlines()[0].split(":")[1].removesuffix("million multiply-adds").split(",")
    ]
    assert len(macs) == 4
    assert macs[0] <= 1e3 * measured["test/gmacs"] <= macs[3]
    assert measured["test/acc"] > 0.7  # ten classes
    assert list(tmp_path.iterdir()) == []  # leaves nothing behind
