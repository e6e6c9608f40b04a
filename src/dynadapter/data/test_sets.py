"""Further test sets: data modules like the first one, with another folder or file and a name for the metrics."""

import re
from collections.abc import Callable, Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from dynadapter.data.classes import match_classes

if TYPE_CHECKING:
    from dynadapter.data.base import ImageData

NAME = re.compile(r"[\w-][\w.-]*")


def check_test_sets(given: Mapping[str, str] | None) -> dict[str, str]:
    """Return the places of further test sets by name."""
    places: dict[str, str] = {}
    for name, place in (given or {}).items():
        text = str(name)  # YAML reads 2024 as a number
        if not NAME.fullmatch(text):
            raise ValueError(f"test_sets names {text!r:.40}; a name has letters, digits, dots, - and _ only")
        if text in places:
            raise ValueError(f"test_sets names {text} twice; give each set its own name")
        places[text] = place
    return places


def open_test_sets(
    data: "ImageData", places: Mapping[str, str], build: Callable[[dict[str, Any], str], "ImageData"]
) -> list["ImageData"]:
    """Return a data module for each further test set, with the settings of `data`.

    Raises:
        ValueError: A set cannot be read, or has a class that `data` does not have; the message names the set.
    """
    found: list[ImageData] = []
    settings = {name: value for name, value in data.hparams.items() if not name.startswith("_")}
    settings |= {"test_sets": None, "augment": "none", "on_error": data.on_error}
    for name, place in places.items():
        try:
            other = build(settings, place)
            match_classes(other.class_names, data.class_names)
            other.samples("test")
        except ValueError as error:
            raise ValueError(f"test_sets.{name}: {error}") from error
        other.test_label = f"test/{name}"
        found.append(other)
    return found


def with_one_test_set(data: "ImageData") -> list["ImageData"]:
    """Return a copy of a data module for each further test set, so that an error in one leaves the others readable."""
    copies = []
    places = getattr(data, "test_sets", None)
    for name, place in places.items() if isinstance(places, dict) else ():
        part: Any = copy(data)
        part.test_sets = {name: place}
        copies.append(part)
    return copies or [data]
