"""The notebooks of the documentation run from top to bottom, offline, and are committed without outputs."""

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks need nbclient and ipykernel: pip install '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="the notebooks need nbclient: pip install '.[test]'")
pytest.importorskip("ipykernel", reason="the notebooks need ipykernel: pip install '.[test]'")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def test_both_notebooks_are_there() -> None:
    assert NAMES == ["in_lightning", "own_images"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_holds_no_output(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert path.stat().st_size < 20_000
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # !dynadapter
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=500, kernel_name="python3", resources=place).execute()
    printed = [out.text for cell in book.cells if cell.cell_type == "code" for out in cell.outputs if "text" in out]
    bundle = tmp_path / {"own_images": "runs/my_photos/bundle", "in_lightning": "shapes"}[path.stem]
    assert (bundle / "config.json").is_file()
    assert any(text.startswith("Bundle(micro, LoRA") for text in printed)
