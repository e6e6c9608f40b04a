"""Adapters of the package peft, built from one of its configuration objects."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import AdapterLayer, Adapters, unwrapped
from dynadapter.adapters.droprate import DropRate
from dynadapter.adapters.injection import Layers, build_wrappers, require_bare
from dynadapter.adapters.lora import LoRA
from dynadapter.adapters.peft_arguments import checked, described
from dynadapter.backbones import classifier
from dynadapter.files import one_line

ADAPTER = "default"
"""peft's name for the only adapter of a layer."""

NORMS = ("*blocks.*.norm", "*blocks.*.norm[12]")
"""Where LayerNorm tuning is without ``target_modules``."""

FEEDFORWARD = ("fc2",)
"""The layers whose input IA3 scales without ``feedforward_modules``; it scales the output of the others."""


class PeftLayer(AdapterLayer):
    """A layer of peft around a layer of the backbone.

    Args:
        tuner: peft's layer, with the backbone's in ``base_layer``.

    Attributes:
        tuner: As given. ``dropout`` is the dropout on its input, if it has one, so that a schedule can set the rate.
    """

    base_parts = ("tuner.base_layer",)

    def __init__(self, tuner: Any) -> None:
        nn.Module.__init__(self)
        self.tuner = tuner
        self.__dict__["base_layer"] = tuner.base_layer  # no second child, so that its tensors have one name
        self.depth = 0.0
        self.channels_first = "2d" in type(tuner.base_layer).__name__  # convolutions and norms of images
        drops: Any = getattr(tuner, "lora_dropout", getattr(tuner, "vera_dropout", {}))
        self.dropout = DropRate(getattr(drops[ADAPTER], "p", 0.0) if drops else 0.0)
        self.dropout.to(next(tuner.parameters()).device)
        if drops:
            drops[ADAPTER] = self.dropout
        self.train(tuner.base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map the base layer's input to its adapted output."""
        if x.ndim == 4 and isinstance(self.base_layer, nn.Linear):  # peft's OFT takes four dimensions for an image
            tokens: Tensor = self.tuner(x.flatten(1, 2))
            return tokens.unflatten(1, x.shape[1:3])
        y: Tensor = self.tuner(x)
        return y

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a frozen copy of the base layer with peft's update merged in, computed in float64."""
        like = next(self.base_layer.parameters())
        tuner = copy.deepcopy(self.tuner).to("cpu", torch.float64).eval()
        tuner.merge()
        merged: nn.Module = tuner.get_base_layer().to(like.device, like.dtype)
        return merged.train(self.base_layer.training).requires_grad_(False)

    def extra_repr(self) -> str:
        return f"depth={self.depth:.2f}"


@dataclass(frozen=True)
class Peft(Adapters):
    """Adapters of the package peft (extra ``peft``): LoRA and DoRA, IA3, OFT, VeRA, or LayerNorm tuning.

    >>> Peft("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}).label
    'LoraConfig of peft'

    In Python it takes peft's own object, ``Peft(peft.LoraConfig(r=4, target_modules=["qkv"]))``; files hold the name of
    its class and its arguments. The update starts at zero. As with other adapters the backbone's classifier is trained,
    so ``modules_to_save`` is refused. `BidirectionalSparsity` sets the rates of ``lora_dropout`` and ``vera_dropout``.

    Args:
        config: ``LoraConfig``, ``IA3Config``, ``OFTConfig``, ``VeraConfig`` or ``LNTuningConfig``; or an object of one
            of these classes.
        arguments: The arguments of that class, as in peft. Names of layers are endings in a list, not regular
            expressions; for ranges of blocks there is :class:`ByBlocks`. Without ``target_modules`` the layers are
            those of :class:`LoRA`, for ``IA3Config`` also the second matrix of each MLP, for ``VeraConfig`` only
            linear layers, and for ``LNTuningConfig`` the norms of the blocks.
    """

    config: Any
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, arguments = self.config, dict(self.arguments)
        if not isinstance(config, str):
            config, found = described(config)
            arguments = found | arguments
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "arguments", checked(config, arguments))

    @property
    def label(self) -> str:
        """Name of the class, with "of peft"."""
        return f"{self.config} of peft"

    def settings(self, model: nn.Module, layers: Mapping[str, nn.Module], leaves: Mapping[str, nn.Module]) -> Any:
        """Return a new configuration object of peft.

        Args:
            model: The backbone.
            layers: Its layers by name, without wrappers.
            leaves: Those that peft may change.

        Raises:
            ValueError: peft is missing, or refuses an argument.
        """
        try:
            import peft
        except ImportError as error:
            raise ValueError("Peft needs the package peft; install it by pip install 'dynadapter[peft]'") from error
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in self.arguments.items()}
        if not given.get("target_modules"):
            places = [] if self.config == "LNTuningConfig" else LoRA().defaults(model, layers)
            if self.config == "VeraConfig":  # which takes no convolution
                places = [name for name in places if isinstance(layers[name], nn.Linear)]
            patterns = {"LNTuningConfig": NORMS, "IA3Config": ("*blocks.*.mlp.fc2",)}.get(self.config, ())
            places += [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]
            given["target_modules"] = [name for name in places if name in leaves]
        if self.config == "IA3Config":
            chosen = [name for name in given["target_modules"] if name.endswith(FEEDFORWARD)]
            given.setdefault("feedforward_modules", chosen)
        return getattr(peft, self.config)(**given)


@build_wrappers.register
def _(spec: Peft, model: nn.Module, layers: Layers) -> dict[str, AdapterLayer]:
    own = classifier(model)
    bare = {name: unwrapped(layer) for name, (_, layer) in layers.items()}
    plain = {name: layer for name, layer in bare.items() if _is_leaf(layer) and layer not in own}
    trained = {p: p.requires_grad for layer in plain.values() for p in layer.parameters()}
    try:
        host = _injected(_tree(plain), spec.settings(model, bare, plain))
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
        reason = one_line(error)
        raise ValueError(reason if reason.startswith("Peft needs") else f"{spec.label}: {reason:.300}") from error
    finally:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
    found: dict[str, AdapterLayer] = {}
    for name, layer in plain.items():
        if (tuner := host.get_submodule(name)) is not layer:
            require_bare(name, layers[name][1], spec.label)
            found[name] = PeftLayer(tuner)
    return found


def _is_leaf(layer: nn.Module) -> bool:
    """Check whether a layer has parameters, no children, and no batch statistics, which must not change."""
    no_statistics = getattr(layer, "running_mean", None) is None
    return no_statistics and not list(layer.children()) and bool(list(layer.parameters()))


def _injected(host: nn.Module, settings: Any) -> nn.Module:
    """Replace layers of a module by peft; methods that share state among layers need `get_peft_model`."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what a model of transformers has and this module lacks
        peft.get_peft_model(host, settings, adapter_name=ADAPTER)
    return host


def _tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that holds only the given layers under their names, so that peft changes no other layer."""
    root = nn.Module()
    for name, layer in layers.items():
        place = root
        *parents, key = name.split(".")
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(key, layer)
    return root
