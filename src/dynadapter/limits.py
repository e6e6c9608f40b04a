"""Read settings from files within limits: regular files of limited size, without aliases that expand to billions.

This file loads neither torch nor numpy, so that commands answer quickly.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from dynadapter.files import read_bytes

MAX_CLASSES = 100_000
"""Largest number of classes that a file may name."""
MAX_VALUES = 200_000
"""Largest number of values in a file: a name for each class, and some more."""
MAX_JSON = 2**26
"""Largest size of a JSON file in bytes."""
MAX_YAML = 2**20
"""Largest size of a YAML file in bytes."""
MAX_CONFIG = 20_000
"""Largest number of values in a YAML file, which names no classes."""
MAX_NESTING = 50


def read_json(file: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large.
        ValueError: The content is not JSON, or holds too many values.
    """
    try:
        content = json.loads(read_bytes(file, MAX_JSON).decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    require_bounded(content, "the file")
    return content


def require_bounded(content: Any, where: str, most: int = MAX_VALUES) -> None:
    """Refuse settings of a file that hold too many values or are nested too deeply.

    Each value counts as often as it is repeated: a few aliases of YAML or references of pickle can expand to billions.

    Args:
        content: Mappings, lists, dataclasses and values.
        where: The file, for messages.
        most: Largest number of values.

    Raises:
        ValueError: The content exceeds a limit.
    """
    left, count = [(content, 0)], 0
    while left:
        part, depth = left.pop()
        count += 1
        if count + len(left) > most:
            raise ValueError(f"{where} holds more than {most:,} values; repeat less of it")
        if depth > MAX_NESTING:
            raise ValueError(f"{where} is nested more than {MAX_NESTING} deep; give it in fewer levels")
        if isinstance(part, Mapping):
            left += [(one, depth + 1) for pair in part.items() for one in pair]
        elif isinstance(part, list | tuple | set):
            left += [(one, depth + 1) for one in part]
        elif is_dataclass(part) and not isinstance(part, type):
            left += [(one, depth + 1) for one in vars(part).values()]


def require_few_classes(count: Any) -> None:
    """Refuse a number of classes above the limit."""
    if not isinstance(count, int) or count > MAX_CLASSES:
        raise ValueError(f"the file has {count!r:.40} classes; at most {MAX_CLASSES:,} are read from a file")


class _TooLarge(ValueError):
    """A mapping grew beyond the limit."""


class _Guarded(yaml.SafeLoader):
    """Refuse mappings that grow beyond the limit by merge keys (``<<``)."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_CONFIG:
            raise _TooLarge(f"merges more than {MAX_CONFIG:,} values; repeat less of it")


class _Loader(_Guarded):
    """Also refuse a repeated key, because YAML would drop the first one and everything below it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is not text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


MISFITS = (ArithmeticError, LookupError, AttributeError, TypeError)
"""What YAML raises, beside ValueError, for a value that does not fit its type, such as ``!!bool maybe``."""


def _load(text: str) -> Any:
    """Load YAML; a value that does not fit its type, such as 2024-13-45, is invalid YAML too."""
    try:
        return yaml.load(text, _Loader)
    except _TooLarge:
        raise
    except (ValueError, *MISFITS) as error:
        raise yaml.YAMLError(f"a value does not fit its type: {error}") from error


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: The file cannot be read, is not valid, or is too large.
    """
    where = f"config file {file}"
    try:
        content = _load(read_bytes(file, MAX_YAML).decode("utf-8-sig"))
        require_bounded(content, where, MAX_CONFIG)
        for _ in texts_read(content):  # each is checked
            pass
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"{where} is not valid YAML{line}: {' '.join(str(reason).split())}") from error
    except _TooLarge as error:
        raise ValueError(f"{where} {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except MISFITS as error:
        raise ValueError(f"{where} has a text that is not valid YAML: {error}") from error
    return content


def texts_read(content: Any) -> Iterator[Any]:
    """Yield the mappings and lists in the texts of a config, at any depth: jsonargparse parses such texts as YAML.

    Raises:
        ValueError: The aliases of a text expand beyond the limit.
    """
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
        elif isinstance(part, str) and not part.isalnum():
            try:
                inside = yaml.load(part, _Guarded)
            except _TooLarge as error:
                raise _TooLarge(f"in a text {error}") from None
            except (yaml.YAMLError, ValueError, RecursionError):  # a plain text
                continue
            if isinstance(inside, dict | list):
                require_bounded(inside, "a text in the config", MAX_CONFIG)
                yield inside
                left.append(inside)
