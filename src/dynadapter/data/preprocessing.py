"""The preprocessing of a data module: the user's settings, and for ``auto`` those of the model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from dynadapter.images.preprocess import STATISTICS, Interpolation, Normalization, Preprocess, Resize
from dynadapter.images.values import Range

Auto = Literal["auto"]


@dataclass(frozen=True)
class Wanted:
    """Settings of :class:`~dynadapter.images.preprocess.Preprocess`, each of which may be ``auto``.

    >>> Wanted(image_size=32).resolve({"image_size": 48, "normalization": "half"}).normalization
    'half'
    """

    image_size: int | Auto = "auto"
    interpolation: Interpolation | Auto = "auto"
    resize: Resize | Auto = "auto"
    normalization: Normalization | Auto = "auto"
    value_range: Range | Auto | None = "auto"

    def resolve(self, own: Mapping[str, Any]) -> Preprocess:
        """Return the settings with the model's own for ``auto``, or the defaults of `Preprocess` if there are none."""
        known = {field.name for field in fields(Preprocess)}
        given = {name: value for name, value in vars(self).items() if value != "auto"}
        done = Preprocess(**{name: value for name, value in own.items() if name in known} | given)
        named: list[Any] = [name for name, values in STATISTICS.items() if values == done.statistics]
        return replace(done, normalization=(named or [done.normalization])[0])


def differences(now: Preprocess, training: Preprocess) -> str:
    """Return the settings that differ from those of the training, as text; empty if none differ."""
    names = [field.name for field in fields(Preprocess)]
    parts = ((name, getattr(now, name), getattr(training, name)) for name in names)
    return ", ".join(f"{name}={ours} instead of {theirs}" for name, ours, theirs in parts if ours != theirs)
