"""The content of a run folder: record, configuration and logged numbers."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Run:
    """The content of a run folder. It is not trusted: a value of an unexpected type counts as missing.

    Args:
        name: Name of the run to print.
        record: Content of ``run.json``; empty if there is none.
        config: Text of ``config.yaml``; empty if there is none.
        lines: The lines of ``metrics.csv``, without empty cells.
    """

    name: str
    record: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    lines: Sequence[Mapping[str, str]] = ()

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Return the epochs at which a metric was logged (fractions for steps within an epoch) and its values."""
        rows = [line for line in self.lines if _finite(line.get(metric)) is not None and "epoch" in line]
        by_epoch: dict[str, list[Mapping[str, str]]] = {}
        for line in rows:
            by_epoch.setdefault(line["epoch"], []).append(line)
        epochs, values = [], []
        for epoch, members in by_epoch.items():
            for place, line in enumerate(members, start=1):
                start = _finite(epoch)
                if start is not None:
                    epochs.append(start + place / len(members))
                    values.append(float(line[metric]))
        return epochs, values

    @property
    def exits(self) -> int:
        """Number of exits measured in validation; 0 if there was no validation."""
        found = [re.fullmatch(r"val/acc_exit(\d{1,2})", key) for line in self.lines for key in line]
        return max((int(one[1]) for one in found if one), default=0)

    @property
    def epochs(self) -> int:
        """Number of epochs that were logged."""
        found = [_finite(line.get("epoch")) for line in self.lines]
        return int(max((one for one in found if one is not None), default=-1)) + 1

    @property
    def seconds(self) -> float | None:
        """Time from the start to the end of the run; None if it did not end."""
        try:
            start, end = (datetime.fromisoformat(str(self.record.get(key))) for key in ("started", "ended"))
            return (end - start).total_seconds()
        except (ValueError, TypeError):  # TypeError: only one of them has a time zone
            return None

    def described(self) -> list[tuple[str, str]]:
        """Return the record of the run as pairs of a name and a text."""
        record = self.record
        machine, data = _mapping(record.get("machine")), _mapping(record.get("data"))
        splits = _mapping(data.get("splits"))
        counts = [f"{name}: {_mapping(split).get('images')}" for name, split in splits.items()]
        packages = [f"{name} {version}" for name, version in _mapping(record.get("packages")).items() if version]
        pairs = {
            "command": record.get("command_line"),
            "started": record.get("started"),
            "ended": record.get("ended"),
            "how it ended": " ".join(str(record.get(key)) for key in ("how", "message") if record.get(key)),
            "seed": record.get("seed"),
            "backbone": _mapping(record.get("backbone")).get("name"),
            "data": " ".join(
                str(part) for part in (data.get("class"), _mapping(data.get("settings")).get("root")) if part
            ),
            "images": ", ".join(counts),
            "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
            "versions": ", ".join(packages),
        }
        return [(key, str(value)) for key, value in pairs.items() if value not in (None, "", "None")]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
