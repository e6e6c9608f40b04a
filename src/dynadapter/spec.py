"""Configuration objects: frozen dataclasses that a config file names and a checkpoint stores, and their JSON form.

No name in a file is imported: a class that is not known already is an error.
"""

import difflib
import inspect
from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

import dynadapter

T = TypeVar("T")

IMPORT_FIRST = "a class of your own is known once its module is imported (--import MODULE on the command line)"
"""What a message about an unknown class advises."""


class Spec(ABC):
    """Base of every configuration object (an adapter kind, a policy, a schedule ...).

    A subclass is a frozen dataclass. A config names it by its class name alone, the command line can set its fields,
    and a checkpoint that holds it loads under ``torch.load(..., weights_only=True)``. The base is an ABC because
    jsonargparse offers no subclasses for a pure dataclass.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls):  # its settings would be lost in files
            raise TypeError(f"{cls.__name__} is not itself a dataclass; put @dataclass(frozen=True) above the class")
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])


def plain(value: Any) -> Any:
    """Convert a value to plain data, in the form of a config file.

    >>> from dynadapter.exits.policies import Confidence
    >>> plain(Confidence(0.9))
    {'class_path': 'dynadapter.Confidence', 'init_args': {'threshold': 0.9}}

    Args:
        value: Numbers, text or None. A :class:`Spec` becomes its class path and arguments, any other dataclass a
            mapping of its fields, a tuple a list. Values can be nested.

    Raises:
        ValueError: If a value has another type.
    """
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
        if not isinstance(value, Spec):
            return settings
        return {"class_path": _class_path(type(value)), "init_args": settings}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{value!r} cannot be written as JSON; give numbers, text, lists and mappings")


def _class_path(cls: type) -> str:
    """Return the name of a class in files; a public class keeps its name when its module moves."""
    public = _ours(cls.__module__) and cls.__qualname__ in dynadapter.__all__
    return f"{'dynadapter' if public else cls.__module__}.{cls.__qualname__}"


def returned(value: Any) -> str:
    """Describe what a method of a user's class returned, for a message.

    >>> returned(torch.zeros(2, 3))
    'torch.float32 (2, 3)'
    """
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def restore(value: Any, hint: Any, where: str = "") -> Any:
    """Rebuild the value that :func:`plain` converted, and check every type.

    >>> from dynadapter.exits.policies import Policy
    >>> restore({"class_path": "Confidence", "init_args": {"threshold": 0.8}}, Policy)
    Confidence(threshold=0.8)

    Args:
        value: As read from JSON. Lists become tuples, as the fields of configuration objects are.
        hint: The expected type: a dataclass, a base class of configuration objects, or a hint such as ``float | None``.
            A class of this package is found by its bare name, whatever module its path names.
        where: Path to the value, for messages.

    Raises:
        ValueError: If the value does not fit or names an unknown class.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return _frozen(value)
    if origin in (Union, UnionType):
        return _restore_union(value, inner, where)
    if origin is Literal:
        if value in inner:
            return value
        raise ValueError(_said(where, f"{value!r} is none of {', '.join(map(repr, inner))}"))
    if origin in (tuple, list):
        return _restore_sequence(value, origin, inner, where)
    if origin is dict:
        _expect(isinstance(value, Mapping), where, value, "a mapping")
        return {str(key): restore(part, inner[1], _inside(where, key)) for key, part in value.items()}
    if isinstance(hint, type) and issubclass(hint, Spec):
        return _restore_spec(value, hint, where)
    if is_dataclass(hint):
        _expect(isinstance(value, Mapping), where, value, "a mapping")
        return _built(hint, value, where)  # type: ignore[arg-type]
    return _restore_scalar(value, hint, where)


def kinds(base: type[T]) -> Iterator[type[T]]:
    """Yield the concrete dataclasses below a base class, the base included."""
    if not inspect.isabstract(base) and is_dataclass(base):
        yield base
    for child in base.__subclasses__():
        yield from kinds(child)


def _restore_spec(value: Any, base: type[Spec], where: str) -> Spec:
    if isinstance(value, base):
        return value
    named = isinstance(value, Mapping) and isinstance(value.get("class_path"), str)
    _expect(named and set(value) <= {"class_path", "init_args"}, where, value, "a mapping of class_path and init_args")
    path, settings = value["class_path"], value.get("init_args", {})
    _expect(isinstance(settings, Mapping), _inside(where, "init_args"), settings, "a mapping")
    known = {cls.__qualname__: cls for cls in kinds(base) if _ours(cls.__module__)}
    known |= {f"{cls.__module__}.{cls.__qualname__}": cls for cls in kinds(base) if not _ours(cls.__module__)}
    name = path.rpartition(".")[2] if "." not in path or _ours(path) else path
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}? There" if near else "; there"
        raise ValueError(
            _said(where, f"there is no {base.__name__} {path!r}{hint} are {', '.join(sorted(known))}; ") + IMPORT_FIRST
        )
    return _built(known[name], settings, where)


def _ours(path: str) -> bool:
    return path.partition(".")[0] == "dynadapter"


def _built(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from its fields."""
    accepted = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    unknown = [name for name in settings if name not in accepted]
    if unknown:
        raise ValueError(
            _said(where, f"{cls.__name__} has no {unknown[0]!r}; it has {', '.join(accepted) or 'nothing'}")
        )
    missing = [
        name
        for name, field in accepted.items()
        if name not in settings and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(_said(where, f"{cls.__name__} lacks {missing[0]!r}"))
    hints = get_type_hints(cls)
    values = {name: restore(value, hints[name], _inside(where, name)) for name, value in settings.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(_said(where, str(error))) from error


def _restore_union(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    if value is None and NoneType in choices:
        return None
    errors = []
    for choice in (choice for choice in choices if choice is not NoneType):
        try:
            return restore(value, choice, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0] if len(errors) == 1 else _said(where, f"{value!r} is of no type that fits"))


def _restore_sequence(value: Any, kind: type, inner: tuple[Any, ...], where: str) -> Any:
    _expect(isinstance(value, list | tuple), where, value, "a list")
    if kind is list or inner[1:] == (...,):
        hints = (inner[0],) * len(value)
    else:
        hints = inner
        _expect(len(value) == len(hints), where, value, f"a list of {len(hints)} values")
    return kind(restore(part, hint, f"{where}[{i}]") for i, (part, hint) in enumerate(zip(value, hints, strict=True)))


def _restore_scalar(value: Any, hint: Any, where: str) -> Any:
    types = {bool: (bool,), int: (int,), float: (int, float), str: (str,), NoneType: (NoneType,)}.get(hint)
    if types is None:
        raise ValueError(_said(where, f"a value of type {hint} cannot be read from JSON"))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    fits = isinstance(value, types) and (hint is bool or not isinstance(value, bool))
    _expect(fits, where, value, words[hint])
    return value


def _frozen(value: Any) -> Any:
    """Convert the lists in a value into tuples."""
    if isinstance(value, Mapping):
        return {str(key): _frozen(part) for key, part in value.items()}
    return tuple(_frozen(part) for part in value) if isinstance(value, list | tuple) else value


def _expect(fits: bool, where: str, value: Any, expected: str) -> None:
    if not fits:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(_said(where, f"{shown} is not {expected}"))


def _inside(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _said(where: str, text: str) -> str:
    return f"{where}: {text}" if where else text
