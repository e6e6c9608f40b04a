"""Base classes of the adapter kinds: the configuration and the wrapper around a layer of the backbone."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from dynadapter.adapters.droprate import DropRate, check_rate
from dynadapter.adapters.places import blocks_without, convolutions
from dynadapter.backbones import classifier
from dynadapter.spec import Spec, kinds

MAX_SIZE = 4096
"""Largest rank or width of an adapter."""

MAX_COUNT = 64
"""Largest number of learned queries or exit tokens of a head."""


class AdapterLayer(nn.Module):
    """A wrapper around a layer of the backbone: that layer and the adapter's own tensors.

    A subclass defines ``forward``, which starts as the base layer's own (the update is zero) and treats each token by
    itself, and :meth:`merged` if the update can be merged.

    Args:
        base_layer: The layer of the backbone.
        spec: The adapter's configuration.

    Attributes:
        base_layer: The layer of the backbone, unchanged.
        scale: Factor of the update.
        dropout: Dropout in the adapter's bottleneck.
        depth: Relative depth of the layer's block, from 0 (first block) to 1 (last block).
        kind: Name of the :class:`AdapterSpec` that it belongs to; by default the class's own without ``Layer``.
        mergeable: Whether the class defines :meth:`merged`.
        base_parts: Names of the children that belong to the backbone.
        channels_first: Whether tokens are (batch, width, rows, columns), as a 1x1 convolution takes them.
        adds_tokens: Whether the wrapper passes more tokens to the base layer than it receives.
        needs_grid: Whether the update of a token reads its neighbours, so that all tokens must be present.
    """

    kind: ClassVar[str]
    base_parts: ClassVar[tuple[str, ...]] = ("base_layer",)
    mergeable: ClassVar[bool] = False
    adds_tokens: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    depth: float

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__dict__.get("kind", cls.__name__.removesuffix("Layer"))
        cls.mergeable = cls.merged is not AdapterLayer.merged

    def __init__(self, base_layer: nn.Module, spec: "AdapterSpec") -> None:
        super().__init__()
        last = next(reversed(matrices(base_layer)), None)
        first = next(base_layer.parameters(), None)
        self.base_layer = base_layer
        self.scale = spec.scale
        self.depth = 0.0
        self.channels_first = isinstance(last, nn.Conv2d)
        self.dropout = DropRate(spec.dropout).to(None if first is None else first.device)
        self.training = self.dropout.training = base_layer.training

    def install(self, model: nn.Module, name: str) -> None:
        """Replace the layer ``name`` of ``model`` with this wrapper."""
        model.set_submodule(name, self)

    def share(self, wrappers: Sequence["AdapterLayer"]) -> None:
        """Prepare to share tensors with the other wrappers of one injection, before any of them is installed.

        Args:
            wrappers: All wrappers of the injection in the order of the model, this one included.
        """

    @property
    def uses(self) -> Sequence["AdapterLayer"]:
        """Wrappers of other layers whose tensors this one uses."""
        return ()

    def merged(self) -> nn.Module:
        """Return a frozen copy of the base layer with the update merged in, computed in float64.

        Raises:
            ValueError: If the kind cannot be merged.
        """
        layers, found = list(AdapterLayer.__subclasses__()), set()
        for layer in layers:
            layers += layer.__subclasses__()  # the list grows while it is walked
            if layer.mergeable:
                found.add(layer.kind)
        found &= {cls.__name__ for cls in kinds(AdapterSpec)}  # type: ignore[type-abstract]  # not what several share
        raise ValueError(
            f"{self.kind} cannot be merged into the backbone; the kinds that can: {', '.join(sorted(found))}"
        )

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's own tensors by name, without those of the backbone."""
        of_backbone = tuple(f"{part}." for part in self.base_parts)
        return {name: p for name, p in self.named_parameters() if not name.startswith(of_backbone)}

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, depth={self.depth:.2f}"


class Adapters(Spec):
    """Configuration of the adapters of a backbone: one kind, a kind for each range of blocks, or a method of peft.

    :func:`~dynadapter.adapters.injection.build_wrappers` is registered for each subclass.
    """

    @property
    @abstractmethod
    def label(self) -> str:
        """Name to print."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec(Adapters):
    """Configuration of an adapter kind: its size and the layers that it wraps.

    A new kind is one subclass of this and one of :class:`AdapterLayer`.

    Args:
        scale: Factor s of the update, above 0.
        dropout: Fraction of the bottleneck's activations dropped in training, in [0, 1).
        targets: Shell patterns on the full names of the backbone's layers, such as ``*.qkv``; each must match a layer.
            Empty means the kind's default places.

    Attributes:
        takes: Description of the layers that the kind can wrap (:meth:`fits`), for messages.
        once_a_block: Whether the kind by default wraps only the last convolution of a convolutional block.
    """

    scale: float = 1.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    takes: ClassVar[str] = "an nn.Linear or an nn.Conv2d in one group"
    once_a_block: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale={self.scale} must be a finite number above 0")
        check_rate(self.dropout)
        check_names("targets", self.targets, "*.qkv")

    @property
    def label(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @property
    @abstractmethod
    def places(self) -> tuple[str, ...]:
        """The default patterns of the layers that the kind wraps."""

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the kind can wrap this layer; ``takes`` describes such layers in words."""
        return is_dense(layer)

    def defaults(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
        """Return the names of the layers to wrap without ``targets``: those of ``places`` that fit.

        A block of a convolutional network has none of these places; its default places are the layers that
        :func:`~dynadapter.adapters.places.convolutions` returns.

        Args:
            model: The backbone.
            layers: Its layers by name, without wrappers.
        """
        found = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in self.places)]
        own = classifier(model)
        found = [name for name in found if self.fits(layers[name]) and layers[name] not in own]
        for parts in blocks_without(model, layers, found):
            found += convolutions(layers, parts, self.fits, self.once_a_block)
        return [name for name in layers if name in {*found}]

    @abstractmethod
    def wrap(self, model: nn.Module, name: str) -> AdapterLayer:
        """Build the wrapper of one layer without changing the model.

        Args:
            model: The backbone.
            name: Full name of a layer that :meth:`fits`.

        Returns:
            A wrapper whose output equals the layer's own; create its tensors with :func:`parameter`.

        Raises:
            ValueError: If this layer cannot be wrapped; the message names it.
        """


def is_matrix(layer: nn.Module) -> bool:
    """Check whether a layer multiplies each token by one matrix: a linear layer or a 1x1 convolution."""
    if isinstance(layer, nn.Conv2d):
        small = layer.kernel_size == layer.stride == (1, 1) and layer.padding in ((0, 0), "valid")
        return small and is_dense(layer)
    return isinstance(layer, nn.Linear)


def is_dense(layer: nn.Module) -> bool:
    """Check whether each output channel reads every input channel: a linear layer or a convolution in one group."""
    if isinstance(layer, nn.Conv2d):
        plain = type(layer).forward is nn.Conv2d.forward  # timm's StdConv2d changes the weight, Conv2dSame the padding
        return plain and layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def matrices(layer: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """List the layer if it is dense, and its direct children that are matrices, without wrappers."""
    layer, *children = (unwrapped(member) for member in (layer, *layer.children()))
    return [layer] * is_dense(layer) + [child for child in children if is_matrix(child)]  # type: ignore[return-value]


def keeps_grid(layer: nn.Module) -> bool:
    """Check whether a layer holds a matrix or is a dense convolution, and returns as many tokens as it receives."""
    if not isinstance(layer, nn.Conv2d):
        return bool(matrices(layer))
    if isinstance(layer.padding, str):
        return layer.padding == "same" and is_dense(layer)
    sizes = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    same = all(2 * padding == dilation * (size - 1) for size, padding, dilation in sizes)
    return same and layer.stride == (1, 1) and is_dense(layer)


def channels(layer: nn.Module) -> tuple[int, int]:
    """Return the input channels of a layer's first matrix and the output channels of its last matrix."""
    found = matrices(layer)
    return found[0].weight.shape[1], found[-1].weight.shape[0]


def unwrapped(layer: nn.Module) -> nn.Module:
    """Return the backbone's own layer, without its wrapper."""
    return layer.base_layer if isinstance(layer, AdapterLayer) else layer


def parameter(like: Tensor, *shape: int) -> nn.Parameter:
    """Return a trainable float32 tensor of zeros on the device of another tensor."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=like.device))


def check_size(name: str, value: int, most: int = MAX_SIZE) -> None:
    """Raise a ValueError if a field is not a whole number from 1 to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name}={value!r:.40} must be a whole number of at least 1 and at most {most}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise a ValueError if a field is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_names(name: str, value: tuple[str, ...], example: str) -> None:
    """Raise a ValueError if a field is not a tuple of strings; a single string is a common mistake."""
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name}={value!r} must be a tuple of names, such as ({example!r},)")
