"""Dyn-Adapter on PyTorch Lightning: a frozen timm trunk, small adapters, and early exits that really save compute."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dynadapter.adapters import Adapter, AdapterSpec, AdaptFormer, LoRA, RepAdapter, inject, merge
    from dynadapter.bundle import (
        Bundle,
        TrunkSource,
        bundle_from_classifier,
        from_pretrained,
        load,
        push_to_hub,
        save_bundle,
    )
    from dynadapter.calibrate import Calibrated, evaluate, to_accuracy_drop, to_cost, with_guarantee
    from dynadapter.callbacks import (
        BidirectionalSparsity,
        EarlyExit,
        ExitWeights,
        FlopsReport,
        PredictionWriter,
        WeightAverage,
    )
    from dynadapter.compiled import CompiledNet
    from dynadapter.cost import ExitCosts, exit_costs
    from dynadapter.data import Digits, ImageData, ImageFolder, ImagesToPredict, VTAB1k
    from dynadapter.distillation import Distillation
    from dynadapter.heads import Balanced, Heads, LinearHeads, MLPHeads
    from dynadapter.layout import lay_out_for_cpu
    from dynadapter.losses import joint_loss
    from dynadapter.merging import TokenMerging
    from dynadapter.metrics import ExitUse
    from dynadapter.module import ExitClassifier, Mixing
    from dynadapter.net import ExitNet, Routed
    from dynadapter.policies import Confidence, Entropy, Margin, Never, Patience, Policy, route
    from dynadapter.schedules import Constant, Cosine, Cubic, Linear, Schedule, Step, Warmup
    from dynadapter.stream import Stream
    from dynadapter.temperature import Scaled, fit_temperatures
    from dynadapter.trunk import create_trunk
    from dynadapter.weighting import EarlyToLate, LateToEarly, LinearInDepth, PerExit, Uniform, Weighting

_HOMES = {
    "adapters": "AdaptFormer Adapter AdapterSpec LoRA RepAdapter inject merge",
    "bundle": "Bundle TrunkSource bundle_from_classifier from_pretrained load push_to_hub save_bundle",
    "calibrate": "Calibrated evaluate to_accuracy_drop to_cost with_guarantee",
    "callbacks": "BidirectionalSparsity EarlyExit ExitWeights FlopsReport PredictionWriter WeightAverage",
    "compiled": "CompiledNet",
    "cost": "ExitCosts exit_costs",
    "data": "Digits ImageData ImageFolder ImagesToPredict VTAB1k",
    "distillation": "Distillation",
    "heads": "Balanced Heads LinearHeads MLPHeads",
    "layout": "lay_out_for_cpu",
    "losses": "joint_loss",
    "merging": "TokenMerging",
    "metrics": "ExitUse",
    "module": "ExitClassifier Mixing",
    "net": "ExitNet Routed",
    "policies": "Confidence Entropy Margin Never Patience Policy route",
    "schedules": "Constant Cosine Cubic Linear Schedule Step Warmup",
    "stream": "Stream",
    "temperature": "Scaled fit_temperatures",
    "trunk": "create_trunk",
    "weighting": "EarlyToLate LateToEarly LinearInDepth PerExit Uniform Weighting",
}
_HOME = {name: f"dynadapter.{home}" for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that parts of the package do not load all of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'dynadapter' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
