"""Inject adapters: wrap the layers of a backbone whose names match a pattern."""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import singledispatch
from typing import Any

from timm.layers import RelPosMlp
from torch import nn

from dynadapter.adapters.base import AdapterLayer, Adapters, AdapterSpec, unwrapped
from dynadapter.adapters.places import blocks_without
from dynadapter.backbones import freeze as freeze_backbone
from dynadapter.spec import kinds, returned

Layers = Mapping[str, tuple[str, nn.Module]]
"""Layers, or their wrappers, by their names without adapters: each with its path in the model."""


def inject(model: nn.Module, spec: Adapters, freeze: bool = True) -> list[str]:
    """Wrap the layers that match the patterns of an adapter kind.

    The model's output does not change, except by :class:`VPT` and by :class:`SSF` with ``std`` above 0. Patterns match
    the names of the backbone without adapters, also after an earlier injection. The model is frozen except for its
    adapters and its classifier.

    Args:
        model: A timm model; it is changed in place.
        spec: The kind of adapter, or kinds :class:`ByBlocks`, or a method of :class:`Peft`.
        freeze: False leaves ``requires_grad`` of the model's own tensors as it is.

    Returns:
        The names of the wrappers in the order of the model, as in :func:`adapter_layers`.

    Raises:
        ValueError: If a pattern matches no layer, a wrapped layer, or a layer that the kind cannot wrap. The model is
            then unchanged.
        TypeError: If the spec is not an adapter kind, or returns no :class:`AdapterLayer`. The model is unchanged.
    """
    layers = {name: (path, layer) for name, path, layer in _layers(model)}
    wrappers = build_wrappers(spec, model, layers)
    both = [*adapter_layers(model).values(), *wrappers.values()]
    if any(layer.needs_grid for layer in both) and any(layer.adds_tokens for layer in both):
        raise ValueError(
            f"{spec.label} does not fit the other adapters: one adds tokens, another needs them in a "
            "grid; use only one of them"
        )
    ordered = [wrappers[name] for name in layers if name in wrappers]
    for wrapper in ordered:
        wrapper.share(ordered)
    depths = _depths(layers)
    # Inner layers first: wrapping a module changes the paths of the layers inside it
    for name in reversed([name for name in layers if name in wrappers]):
        path, wrapper = layers[name][0], wrappers[name]
        wrapper.depth = depths[name]
        wrapper.install(model, path)
        set_called(model, path, True)
    if freeze:
        freeze_backbone(model)
    added = set(map(id, wrappers.values()))
    return [name for name, layer in adapter_layers(model).items() if id(layer) in added]


@singledispatch
def build_wrappers(spec: Any, model: nn.Module, layers: Layers) -> dict[str, AdapterLayer]:
    """Build the wrappers of a configuration without changing the model.

    Args:
        spec: The configuration; each subclass of :class:`Adapters` registers this function.
        model: The backbone.
        layers: The layers among which to choose.

    Returns:
        The wrappers by the names of their layers.

    Raises:
        ValueError, TypeError: As :func:`inject`.
    """
    raise TypeError(f"{spec!r:.100} is not an adapter kind; give an object of AdapterSpec's, such as LoRA(rank=8)")


@build_wrappers.register
def _(spec: AdapterSpec, model: nn.Module, layers: Layers) -> dict[str, AdapterLayer]:
    kind = type(spec).__name__
    wrappers: dict[str, AdapterLayer] = {}
    for name in _chosen(model, spec, layers):
        path, layer = layers[name]
        require_bare(name, layer, kind)
        if not spec.fits(layer):
            raise ValueError(f"{kind} cannot wrap {name}, {_described(layer)}; it takes {spec.takes}")
        wrappers[name] = _wrapped(spec, model, path)
    return wrappers


def require_bare(name: str, layer: nn.Module, kind: str) -> None:
    """Raise a ValueError if a layer has an adapter already."""
    if isinstance(layer, AdapterLayer):
        raise ValueError(f"{name} has an adapter already, {layer.kind}; choose other targets for {kind}")


def set_called(model: nn.Module, path: str, called: bool) -> None:
    """Set whether timm's attention calls its qkv layer; some classes by default only read the layer's weight.

    Attentions with a bias for q and v only (EVA-02, Swin v2, BEiT) read the weight; a wrapper around the layer would
    have no effect.
    """
    attention: Any = model.get_submodule(path.rpartition(".")[0])
    if path.endswith("qkv") and hasattr(attention, "qkv_bias_separate"):
        attention.qkv_bias_separate = called


def _wrapped(spec: AdapterSpec, model: nn.Module, path: str) -> AdapterLayer:
    """Return the wrapper of one layer, checked."""
    wrapper = spec.wrap(model, path)
    if not isinstance(wrapper, AdapterLayer):
        raise TypeError(
            f"{type(spec).__name__}.wrap returned {returned(wrapper)}; return an AdapterLayer around {path}"
        )
    if wrapper.base_layer is not model.get_submodule(path):
        raise ValueError(
            f"{type(spec).__name__}.wrap returned a {type(wrapper).__name__} around another layer than {path}; give "
            "model.get_submodule(name) to it"
        )
    return wrapper


def _chosen(model: nn.Module, spec: AdapterSpec, layers: Layers) -> list[str]:
    """Return the names of the layers to wrap, in the order of the model."""
    kind, name = type(spec).__name__, type(model).__name__
    plain = {name: unwrapped(layer) for name, (_, layer) in layers.items()}
    for pattern in spec.targets:
        if not any(fnmatchcase(name, pattern) for name in plain):
            fitting = _wrappable(model, spec, layers)
            way = f"set targets; the layers that it can wrap: {fitting}" if fitting else "choose another kind"
            raise ValueError(f"no layer of {name} matches the target {pattern!r} of {kind}; {way}")
    if spec.targets:
        return [name for name in plain if any(fnmatchcase(name, pattern) for pattern in spec.targets)]
    if chosen := spec.defaults(model, plain):
        _warn_of_blocks(model, kind, plain, chosen)
        return chosen
    fitting = _wrappable(model, spec, layers)
    way = f"; or set targets; the layers that it can wrap: {fitting}" if fitting else ""
    raise ValueError(f"{kind} has no default places in {name}; kinds that have: {_kinds_for(model, plain)}{way}")


def _wrappable(model: nn.Module, spec: AdapterSpec, layers: Layers) -> str:
    """Return the names of the layers that a kind can wrap in this model, as text; empty if there are none."""
    found: list[str] = []
    for name, (path, layer) in layers.items():
        if _collapsed(name) not in found and not isinstance(layer, AdapterLayer) and spec.fits(layer):
            with contextlib.suppress(Exception):  # some kinds refuse layers by the model around them
                spec.wrap(model, path)
                found.append(_collapsed(name))
    return ", ".join(found)


def _warn_of_blocks(model: nn.Module, kind: str, layers: Mapping[str, nn.Module], chosen: list[str]) -> None:
    """Warn of blocks in which a kind has no default place, where it has places in others."""
    bare, count = blocks_without(model, layers, chosen), len(blocks_without(model, layers, ()))
    if 0 < len(bare) < count:
        parts = [_described(layers[name]) for name in bare[0] if name]
        warnings.warn(
            f"{kind} has no default places in {len(bare)} of {count} blocks, {bare[0][-1]} ({parts[-1]}) among them; "
            "they stay as they are; set targets to choose other layers, or take a kind such as SSF",
            stacklevel=5,
        )


def _kinds_for(model: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    """Return the kinds that have default places in a model, as text."""
    found = []
    for cls in kinds(AdapterSpec):  # type: ignore[type-abstract]
        with contextlib.suppress(TypeError, ValueError):  # a kind with settings that must be given
            found += [cls.__name__] * bool(cls().defaults(model, layers))
    return ", ".join(sorted(found)) or "none"


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return the wrappers in a model by name, in the order of the model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}


def needs_grid(model: nn.Module) -> str | None:
    """Return the first kind of adapter that needs every token in its place; None if there is none."""
    return next((layer.kind for layer in adapter_layers(model).values() if layer.needs_grid), None)


def _layers(module: nn.Module, name: str = "", path: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Yield each layer, or its wrapper, with its name without adapters and its path in the model."""
    for key, child in module.named_children():
        if isinstance(child, RelPosMlp):  # maps pairs of positions to a bias and sees no token
            continue
        child_name, child_path = f"{name}{key}", f"{path}{key}"
        yield child_name, child_path, child
        inside = f"{child_path}.base_layer." if isinstance(child, AdapterLayer) else f"{child_path}."
        yield from _layers(unwrapped(child), f"{child_name}.", inside)


NUMBERED = re.compile(r"(layer|s|b)?(\d+)")
"""Parts of a name in which timm counts stages and blocks: 3, and in a ResNet layer3, in a RegNet s3 and b3."""


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(found[2]) for part in name.split(".") if (found := NUMBERED.fullmatch(part)))


def _collapsed(name: str) -> str:
    return ".".join(NUMBERED.sub(r"\1*", part) if NUMBERED.fullmatch(part) else part for part in name.split("."))


def _depths(names: Iterable[str]) -> dict[str, float]:
    """Return the relative depth (0 to 1) of each layer's block among blocks whose names differ only in numbers."""
    families: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        families.setdefault(_block(name), set()).add(_numbers(name))
    ranked = {block: sorted(family) for block, family in families.items()}
    return {name: ranked[_block(name)].index(_numbers(name)) / max(1, len(ranked[_block(name)]) - 1) for name in names}


def _block(name: str) -> str:
    """Return a layer's name up to its last number, with a star for each number."""
    head, star, _ = _collapsed(name).rpartition("*")
    return head + star


def _described(layer: nn.Module) -> str:
    """Return a layer's description in one line."""
    kind = type(layer).__name__
    return re.sub(r"\s+", " ", repr(layer)) if not list(layer.children()) else f"a module of type {kind}"
