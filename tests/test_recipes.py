"""The ablation of whatever recipe is shown, and which one that is."""

import importlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def program():
    """Imports a module of the folder of benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield importlib.import_module


@pytest.mark.parametrize("name", ["base", "merged", "merged-distilled"])
def test_an_exchange_differs_by_one_ingredient(program, name):
    recipes = program("recipes")
    whole, found = recipes.recipe(name), recipes.exchanges(name)
    for other in found:
        changed = recipes.recipe(other)
        apart = {one.name for one in fields(whole) if getattr(whole, one.name) != getattr(changed, one.name)}
        assert len(apart) == 1, (other, apart)
    assert len(set(found.values())) == len(found)


def test_an_ablation_takes_away_what_a_recipe_adds_and_nothing_else(program):
    exchanges = program("recipes").exchanges
    assert "linear-heads" in exchanges("base")
    assert not {"balanced-heads", "no-distillation", "every-token"} & set(exchanges("base"))
    assert {"merged+balanced-heads", "merged+every-token"} <= set(exchanges("merged"))
    assert not {"merged+linear-heads", "merged+no-distillation"} & set(exchanges("merged"))
    assert "merged-distilled+no-distillation" in exchanges("merged-distilled")


def line(backbone: str, recipe: str, phase: str = "final") -> dict[str, Any]:
    what = {"backbone": backbone, "task": "dots", "method": "lora", "recipe": recipe, "phase": phase}
    return {"key": what | {"epochs": 1, "batch": 1}}


def test_a_setting_shows_the_default_recipe_where_it_was_read_on_test(program):
    settings = program("findings").settings
    lines = [line("old", "base"), line("old", "merged", "search"), line("new", "merged"), line("new", "base")]
    assert {one.backbone: one.recipe for one in settings(lines, "merged")} == {"new": "merged", "old": "base"}
