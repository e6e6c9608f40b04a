"""What the check of a data set found, and whether the data are still the same as in an earlier report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Literal

from dynadapter.images.reading import shown

FORMAT = 1
"""Version of the report's layout."""


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with the data.

    Args:
        level: ``error`` for what spoils a training or its numbers, ``warning`` for what one should know.
        kind: What it is, in a word for programs.
        text: What it is, in a line for people.
        items: All that it concerns.
    """

    level: Literal["error", "warning"]
    kind: str
    text: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Args:
        name: Of the split.
        images: Number of images that it names.
        readable: Number of those that can be decoded.
        classes: Number of classes that occur.
        smallest: Width and height of the smallest image, by area; None where none can be read.
        largest: Of the largest.
        modes: How many images there are of each of Pillow's modes.
        hash: :func:`dynadapter.data.identity.data_hash` of it; None where a file cannot be read.
    """

    name: str
    images: int
    readable: int
    classes: int
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    modes: dict[str, int]
    hash: str | None


@dataclass(frozen=True)
class SetReport:
    """What was found in one set of images: a task, or a folder with its splits.

    Args:
        name: Of the set.
        folder: Where it is.
        classes: Number of its classes; None where nothing says it.
        splits: What they hold.
        unlisted: Number of image files that belong to no split.
        faults: What is wrong, errors first.
        class_names: As ``classes.txt`` or the folders give them; empty where nothing does.
    """

    name: str
    folder: str
    classes: int | None
    splits: tuple[SplitFacts, ...]
    unlisted: int
    faults: tuple[Fault, ...]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found in a data set.

    Args:
        data: The class that reads it: ``VTAB1k`` or ``ImageFolder``.
        root: Where it is.
        sets: What was found, a task or the whole folder each.
        missing_tasks: Which of the 19 tasks of VTAB-1k are not there.
    """

    data: str
    root: str
    sets: tuple[SetReport, ...]
    missing_tasks: tuple[str, ...] = ()

    @property
    def errors(self) -> list[Fault]:
        """All errors."""
        return [fault for one in self.sets for fault in one.faults if fault.level == "error"]

    @property
    def warnings(self) -> list[Fault]:
        """All warnings."""
        return [fault for one in self.sets for fault in one.faults if fault.level == "warning"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        counts = {"errors": len(self.errors), "warnings": len(self.warnings)}
        return {"library": "dynadapter", "format": FORMAT, **counts, **asdict(self)}


def in_order(faults: list[Fault]) -> tuple[Fault, ...]:
    return tuple(sorted(faults, key=lambda fault: fault.level != "error"))


def check_report(content: Any) -> Mapping[str, Any]:
    """Take what was read from a report's file.

    Raises:
        ValueError: It is no report, or a newer one.
    """
    try:
        if content["library"] != "dynadapter" or not content["sets"]:
            raise ValueError("it is empty, or of something else")
        if content["format"] > FORMAT:
            raise ValueError(f"it has format {content['format']}, this dynadapter reads up to {FORMAT}")
        _hashes(content)
        for one in content["sets"]:
            _class_names(content, one["name"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("it was not written by dynadapter verify") from error
    return content


def names(report: Mapping[str, Any]) -> list[str]:
    return [str(one["name"]) for one in report["sets"]]


def _hashes(report: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    return {
        (str(one["name"]), str(split["name"])): str(split["hash"])
        for one in report["sets"]
        for split in one["splits"]
        if split["hash"] is not None
    }


def _class_names(report: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return next(tuple(map(str, one["class_names"])) for one in report["sets"] if one["name"] == name)


def _first(then: tuple[str, ...], now: tuple[str, ...]) -> str:
    """Say what is the first to differ."""
    k, was, is_now = next((k, *pair) for k, pair in enumerate(zip_longest(then, now)) if pair[0] != pair[1])
    told = ["none" if name is None else repr(shown(name)) for name in (is_now, was)]
    return f"class {k} is {told[0]}, was {told[1]}"


def compared(one: SetReport, expected: Mapping[str, Any]) -> SetReport:
    then = {split: value for (name, split), value in _hashes(expected).items() if name == one.name}
    now = {split.name: split.hash for split in one.splits}
    faults = []
    if not then:
        faults.append(Fault("error", "changed", f"the earlier report says nothing of {shown(one.name)}"))
    elif (names_then := _class_names(expected, one.name)) != one.class_names:
        faults.append(Fault("error", "changed", f"the classes have other names: {_first(names_then, one.class_names)}"))
    for split, value in then.items():
        if split not in now:
            faults.append(Fault("error", "changed", f"{split}: was in the earlier report, and is missing now"))
        elif now[split] != value:
            is_now = (now[split] or "not known")[:12]
            faults.append(Fault("error", "changed", f"{split}: not the data as then, hash {is_now}, was {value[:12]}"))
    return SetReport(**{**vars(one), "faults": in_order([*faults, *one.faults])})


def gone(name: str) -> SetReport:
    fault = Fault("error", "changed", f"{shown(name)} was in the earlier report, and is missing now")
    return SetReport(name, "", None, (), 0, (fault,))
