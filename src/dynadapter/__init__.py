"""Dyn-Adapter on PyTorch Lightning: a frozen timm backbone, small adapters, and early exits that save compute."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dynadapter.adapters import (
        SSF,
        VPT,
        Adapter,
        AdapterLayer,
        AdapterPlus,
        Adapters,
        AdapterSpec,
        AdaptFormer,
        BitFit,
        ByBlocks,
        Convpass,
        DoRA,
        FacT,
        LoRA,
        Peft,
        RepAdapter,
        inject,
        merge,
        save_peft,
    )
    from dynadapter.backbones import create_backbone
    from dynadapter.backbones.layout import lay_out_for_cpu
    from dynadapter.calibrate import Calibrated, Goal, evaluate, with_guarantee
    from dynadapter.calibrate.solve import policy_for, solve
    from dynadapter.cost import ExitCosts, exit_costs
    from dynadapter.data import (
        Augment,
        HubDataset,
        ImageData,
        ImageFolder,
        ImageLists,
        ImageTable,
        Shapes,
        TorchVisionDataset,
        VideoLists,
        VTAB1k,
    )
    from dynadapter.exits.attentive import Attentive
    from dynadapter.exits.combining import Combined
    from dynadapter.exits.exit_tokens import ExitTokens
    from dynadapter.exits.heads import Balanced, Heads, LinearHeads, MLPHeads
    from dynadapter.exits.net import ExitNet
    from dynadapter.exits.policies import (
        AtExit,
        Confidence,
        Entropy,
        Margin,
        Never,
        Patience,
        Policy,
        Routed,
        Thresholded,
        read_off,
        route,
    )
    from dynadapter.exits.temperature import Scaled, fit_temperatures
    from dynadapter.exits.token_merging import TokenMerging
    from dynadapter.serve.bundle import (
        BackboneSource,
        Bundle,
        bundle_from_classifier,
        from_pretrained,
        load,
        push_to_hub,
        save_bundle,
    )
    from dynadapter.serve.engine import Engine
    from dynadapter.serve.requests import Limits
    from dynadapter.serve.stream import Stream
    from dynadapter.training.callbacks import (
        BidirectionalSparsity,
        EarlyExit,
        ExitWeights,
        FlopsReport,
        WeightAverage,
    )
    from dynadapter.training.losses import Distillation, joint_loss
    from dynadapter.training.metrics import ExitUse
    from dynadapter.training.mixing import Mixing
    from dynadapter.training.module import ExitClassifier
    from dynadapter.training.schedules import Constant, Cosine, Cubic, Linear, Schedule, Step, Warmup
    from dynadapter.training.weighting import EarlyToLate, LateToEarly, LinearInDepth, PerExit, Uniform, Weighting

_HOMES = {
    "adapters": "AdaptFormer Adapter AdapterLayer AdapterPlus AdapterSpec Adapters BitFit ByBlocks Convpass DoRA FacT "
    "LoRA Peft RepAdapter SSF VPT inject merge save_peft",
    "backbones": "create_backbone",
    "backbones.layout": "lay_out_for_cpu",
    "calibrate": "Calibrated Goal evaluate policy_for solve with_guarantee",
    "cost": "ExitCosts exit_costs",
    "data": "Augment Shapes ImageData ImageFolder ImageTable ImageLists VideoLists HubDataset TorchVisionDataset "
    "VTAB1k",
    "exits.attentive": "Attentive",
    "exits.combining": "Combined",
    "exits.exit_tokens": "ExitTokens",
    "exits.heads": "Balanced Heads LinearHeads MLPHeads",
    "exits.net": "ExitNet",
    "exits.policies": "AtExit Confidence Entropy Margin Never Patience Policy Routed Thresholded read_off route",
    "exits.temperature": "Scaled fit_temperatures",
    "exits.token_merging": "TokenMerging",
    "serve.bundle": "BackboneSource Bundle bundle_from_classifier from_pretrained load push_to_hub save_bundle",
    "serve.engine": "Engine",
    "serve.requests": "Limits",
    "serve.stream": "Stream",
    "training.callbacks": "BidirectionalSparsity EarlyExit ExitWeights FlopsReport WeightAverage",
    "training.losses": "Distillation joint_loss",
    "training.metrics": "ExitUse",
    "training.mixing": "Mixing",
    "training.module": "ExitClassifier",
    "training.schedules": "Constant Cosine Cubic Linear Schedule Step Warmup",
    "training.weighting": "EarlyToLate LateToEarly LinearInDepth PerExit Uniform Weighting",
}
_HOME = {name: f"dynadapter.{home}" for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that a part of the package does not load all of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'dynadapter' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
