"""List timm's architectures and weight tags, by family, and which are accepted, without building a model."""

from typing import Any, NamedTuple

import timm
from timm.models import model_entrypoint
from torch import nn

from dynadapter.backbones.cut import blocks


class Architecture(NamedTuple):
    """An architecture of timm.

    Args:
        name: As in :func:`timm.list_models`.
        family: Name of the class; empty if it is not known without building the model, which is then not accepted.
        tags: The names of its pretrained weights, such as ``augreg_in21k``.
        accepted: Whether :func:`~dynadapter.backbones.create_backbone` takes it.
    """

    name: str
    family: str
    tags: tuple[str, ...]
    accepted: bool


def architectures() -> list[Architecture]:
    """List timm's architectures in timm's order, without those that others have registered there."""
    tags: dict[str, list[str]] = {}
    for full in timm.list_pretrained():
        name, _, tag = full.partition(".")
        tags.setdefault(name, []).append(tag)
    own = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm.")]
    classes = {name: model_class(name) for name in own}
    accepted = {kind for kind in set(classes.values()) if kind is not None and is_accepted(kind)}
    return [
        Architecture(name, kind.__name__ if kind else "", tuple(tags.get(name, ())), kind in accepted)
        for name, kind in classes.items()
    ]


def model_class(name: str) -> type[nn.Module] | None:
    """Return the class of an architecture, from the annotation of timm's function.

    A few functions have no annotation; in the module of a known family they build that family.
    """
    function = model_entrypoint(name)
    annotated = function.__annotations__.get("return")
    if isinstance(annotated, type):
        return annotated
    return next((known for known in blocks.registry if known.__module__ == function.__module__), None)


def is_accepted(kind: type[nn.Module]) -> bool:
    """Check whether the models of a class can be cut into blocks."""
    uninitialised: Any = kind.__new__(kind)  # without layers: only the check of its class can succeed
    try:
        blocks(uninitialised)
    except TypeError:
        return False
    except AttributeError:  # the class is known, and the layers are missing
        return True
    return True
