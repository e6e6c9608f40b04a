"""Check that the entries of a checkpoint exist and have the right types, before anything is restored."""

from collections.abc import Mapping
from types import NoneType
from typing import Any

Kinds = Mapping[str, type | tuple[type, ...]]

MODEL: Kinds = {"state_dict": Mapping, "hyper_parameters": Mapping, "pytorch-lightning_version": str}
OURS: Kinds = {
    "backbone": str,
    "backbone_hash": str,
    "full": bool,
    "class_names": list,
    "preprocessing": Mapping,
    "data": (Mapping, NoneType),
    "images": Mapping,
    "batches": (int, float, NoneType),
    "policies": list,
}
"""What this package adds under the key ``dynadapter``."""

TRAINING: Kinds = {
    "global_step": int,
    "epoch": int,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": Mapping,
    "callbacks": Mapping,
}
"""What only a training needs that continues."""

WORDS = {Mapping: "a mapping", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
ADVICE = "the checkpoint is damaged: give another one of this run, or train again"


def require_entries(content: Mapping[str, Any], kinds: Kinds, where: str = "") -> None:
    """Check that entries exist and have the right types."""
    for name, kind in kinds.items():
        choices = kind if isinstance(kind, tuple) else (kind,)
        if name not in content:
            raise ValueError(f"its entry {where}{name} is missing; {ADVICE}")
        value = content[name]
        if not isinstance(value, choices) or (isinstance(value, bool) and bool not in choices):
            wanted = WORDS.get(choices[0], "a number")
            raise ValueError(f"its entry {where}{name} is a {type(value).__name__}, not {wanted}; {ADVICE}")
    if wrong := [name for name in content.get("class_names", ()) if not isinstance(name, str)]:
        raise ValueError(f"its entry {where}class_names holds {wrong[0]!r:.40}, which is not text; {ADVICE}")
