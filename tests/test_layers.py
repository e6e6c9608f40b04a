"""Each package imports only the packages that BELOW allows, and no import goes in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dynadapter

SOURCE = Path(dynadapter.__file__).parent
BELOW = {
    "files": set(),
    "limits": {"files"},
    "peft_place": {"files"},
    "printing": set(),
    "spec": set(),
    "backbones": {"files"},
    "adapters": {"files", "peft_place", "spec", "backbones"},
    "exits": {"spec", "backbones", "adapters"},
    "cost": {"backbones", "adapters", "exits"},
    "images": {"files"},
    "calibrate": {"files", "spec", "exits"},
    "sweep": {"files", "spec", "exits", "calibrate"},
    "serve": {"files", "limits", "spec", "backbones", "adapters", "exits", "cost", "images"},
    "report": {"exits", "images", "calibrate"},
    "bench": {"spec", "backbones", "adapters", "exits", "cost", "images", "serve"},
    # ---- above this line nothing imports lightning
    "training": {"files", "limits", "printing", "spec", "backbones", "adapters", "exits", "cost", "calibrate", "serve"},
    "data": {"files", "images", "spec", "training"},
}
LIGHTNING = {"training", "data", "cli"}


def imports_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names} if not node.level else {"relative import"}
    return set()


def imports(path: Path) -> set[str]:
    found = {name for node in ast.walk(ast.parse(path.read_text())) for name in imports_of(node)}
    assert "relative import" not in found, path
    return found


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_downwards(path):
    me = room(path)
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("dynadapter.")}
    if me in BELOW:
        assert ours - {me} <= BELOW[me]
    else:
        assert me in {"cli", "__init__"}, f"{me} is a new room: add it to this table"
    if me not in LIGHTNING:
        assert not any(name.startswith(("lightning", "pytorch_lightning")) for name in imports(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_goes_in_a_circle():
    modules = {module_of(path): path for path in SOURCE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for node in body for name in imports_of(node)}
        parents = {name.rpartition(".")[0] for name in names}
        graph[module] = (names | parents) & set(modules) - {module, "dynadapter"}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_every_public_name_is_there():
    for name in dynadapter.__all__:
        assert getattr(dynadapter, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        dynadapter.Nope  # noqa: B018
