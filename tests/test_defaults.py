"""One recipe under one name: class defaults of model and callbacks, and configs/vtab.yaml."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from dynadapter.adapters import AdapterSpec, LoRA
from dynadapter.training.callbacks import BidirectionalSparsity, EarlyExit, ExitWeights
from dynadapter.training.module import ExitClassifier

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "configs" / "vtab.yaml").read_text())
SECTIONS = {
    "model": ExitClassifier,
    "exit_weights": ExitWeights,
    "sparsity": BidirectionalSparsity,
    "early_exit": EarlyExit,
}


def built(section: str) -> Any:
    """Return the settings of a section in vtab.yaml, instantiated."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SECTIONS[section], section, skip={"num_classes", "optimizer"}, fail_untyped=False)
    settings = {name: value for name, value in CONFIG[section].items() if name != "optimizer"}
    config = parser.parse_object({section: settings})
    # Instantiates the settings, not the class: the model would fetch its weights.
    for name in settings:
        child = ArgumentParser(exit_on_error=False)
        child.add_argument("--value", type=inspect.signature(SECTIONS[section]).parameters[name].annotation)
        parsed = child.parse_object({"value": config[section][name]})
        settings[name] = (getattr(child, "instantiate", None) or child.instantiate_classes)(parsed).value
    return settings


@pytest.mark.parametrize("section", SECTIONS)
def test_class_defaults_are_vtab_yaml(section: str) -> None:
    parameters = inspect.signature(SECTIONS[section]).parameters
    for name, value in built(section).items():
        default = parameters[name].default
        if section == "early_exit":
            default = EarlyExit().policies
        assert value == default, name


def test_default_optimizer_is_vtab_yaml() -> None:
    factory = inspect.signature(ExitClassifier).parameters["optimizer"].default
    optimizer = factory([torch.nn.Parameter(torch.zeros(1))])
    given = CONFIG["model"]["optimizer"]
    assert given["class_path"] == f"torch.optim.{type(optimizer).__name__}"
    assert given["init_args"].items() <= optimizer.defaults.items()


def test_default_recipe_is_the_method() -> None:
    parameters = inspect.signature(ExitClassifier).parameters
    assert parameters["adapter"].default == LoRA(rank=8)
    assert isinstance(parameters["adapter"].default, AdapterSpec)
    assert parameters["token_merging"].default is None
    assert ExitWeights().weighting.varies
    sparsity = BidirectionalSparsity()
    assert sparsity.shallow is not None
    assert sparsity.shallow(0.0) > sparsity.deep(0.0)
    assert sparsity.keep(0.0) < 1
