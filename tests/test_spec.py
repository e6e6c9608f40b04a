"""Configuration objects as JSON: every one comes back, and nothing that a file names is imported."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dynadapter.adapters import AdapterSpec, LoRA
from dynadapter.exits.heads import Balanced, Heads
from dynadapter.exits.policies import Confidence, Policy
from dynadapter.exits.temperature import Scaled
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle import BackboneSource
from dynadapter.spec import Spec, kinds, plain, restore


@dataclass(frozen=True)
class Own(Policy):
    """A policy from outside the package."""

    strict: bool = False

    @property
    def name(self) -> str:
        return "own"

    def meets_condition(self, history: Tensor) -> Tensor:
        return torch.full(history.shape[1:2], not self.strict)


EXAMPLES: dict[str, dict] = {
    "ByBlocks": {"ranges": {"1-3": LoRA(), "4": None}},
    "Peft": {"config": "LoraConfig", "arguments": {"r": 4}},
    "Constant": {"value": 1.0},
    "Linear": {"start": 0.0, "end": 1},
    "Cosine": {"start": 0.0, "end": 1.0},
    "Cubic": {"start": 0.0, "end": 1.0},
    "Step": {"start": 0.0, "end": 1.0, "at": 0.5},
}


def test_every_spec_comes_back():
    import dynadapter.training.mixing
    import dynadapter.training.schedules as schedules
    import dynadapter.training.weighting as weighting

    found = [cls for cls in kinds(Spec) if cls.__module__.startswith("dynadapter.")]
    for cls in found:
        if cls.__name__ == "Warmup":
            spec = cls(fraction=0.1, start=0.0, then=schedules.Linear(0.0, 1.0))
        elif cls.__name__ == "PerExit":
            spec = weighting.PerExit([schedules.Linear(0.0, 1.0), schedules.Constant(1.0)])
        else:
            spec = cls(**EXAMPLES.get(cls.__name__, {}))
        written = json.dumps(plain(spec))
        back = restore(json.loads(written), Spec)
        assert type(back) is cls
        assert json.dumps(plain(back)) == written
    assert {LoRA, Balanced, Confidence, Scaled, dynadapter.training.mixing.Mixing} <= set(found)


def test_class_is_found_wherever_it_is():
    for path in ("LoRA", "dynadapter.LoRA", "dynadapter.adapters.lora.LoRA", "dynadapter.elsewhere.LoRA"):
        assert restore({"class_path": path}, AdapterSpec) == LoRA()
    assert restore({"class_path": f"{__name__}.Own", "init_args": {"strict": True}}, Policy) == Own(strict=True)
    with pytest.raises(ValueError, match=r"there is no Policy 'elsewhere\.Own'"):
        restore({"class_path": "elsewhere.Own"}, Policy)
    assert restore(LoRA(rank=2), AdapterSpec | None) == LoRA(rank=2)
    assert restore(None, AdapterSpec | None) is None


def test_nothing_named_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("evil.Policy", "evil", "evil.LoRA", ""):
        with pytest.raises(ValueError, match="there is no"):
            restore({"class_path": path}, Spec)
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (1, bool),
        (1.5, int),
        ("1", float),
        (None, str),
        ([1], dict[str, int]),
        ({"a": "b"}, dict[str, int]),
        ([1, 2, 3], tuple[int, int]),
        (3, tuple[int, ...]),
        ("c", Heads),
        ({"class_path": "LoRA", "init_args": [1]}, AdapterSpec),
        ({"class_path": "LoRA", "more": 1}, AdapterSpec),
        ({}, BackboneSource),
        (3, Preprocess),
        (3, complex),
    ],
)
def test_values_of_another_type(value, hint):
    with pytest.raises(ValueError, match=r"^here"):
        restore(value, hint, "here")


def test_files_name_public_classes_by_the_root():
    assert plain(Confidence(0.9)) == {"class_path": "dynadapter.Confidence", "init_args": {"threshold": 0.9}}
    assert plain(Own())["class_path"] == f"{__name__}.Own"
