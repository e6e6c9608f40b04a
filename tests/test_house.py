"""Limits of the source tree: size of files and functions, words, and imperative docstrings."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("src", "benchmarks", "tools", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]
DOCUMENTS = [
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "configs").glob("*.yaml")),
]
REPLACED = re.compile(r"\b(trunk|rival|who leaves|like tokens)\b", re.IGNORECASE)
INDIRECT = {"Says", "Gives", "Lets", "Asks", "Tells", "Makes", "Has", "Takes", "Puts"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_home_is_expanded_by_os_path(path):
    """``Path.expanduser`` raises an error for a file such as ``~a.png``, because there is no user of this name."""
    assert ".expanduser()" not in path.read_text()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_are_imperative(path):
    nodes = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)
    ]
    assert [text for node in nodes if (text := (ast.get_docstring(node) or "").partition(" ")[0]) in INDIRECT] == []


@pytest.mark.parametrize("path", [*SOURCES, *(p for p in DOCUMENTS if p.name != "CHANGELOG.md")], ids=name_of)
def test_words_have_one_meaning(path):
    assert REPLACED.findall(path.read_text()) == []
