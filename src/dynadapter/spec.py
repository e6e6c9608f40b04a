"""Configuration objects: frozen dataclasses that a checkpoint may hold and a config file may name."""

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

import torch


class Spec(ABC):
    """Base of every configuration object (an adapter kind, a policy, a schedule ...).

    A subclass is a frozen dataclass. It can be named in a config by its class name alone, its fields can be set on the
    command line, and a checkpoint that holds it loads under ``torch.load(..., weights_only=True)``.
    The class is not a pure dataclass itself: jsonargparse offers subclasses only for those that are not.
    """

    BEFORE: ClassVar[Mapping[str, Any]] = {}
    """What was done before a field existed, for files that do not name it; where the field's default is another."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update({**self.BEFORE, **state})
