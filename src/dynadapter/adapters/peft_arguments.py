"""The configuration classes of peft and their arguments that a specification may name, and which values they may have.

They can come from an untrusted checkpoint or bundle. Hence they are plain values of limited size. No text is a regular
expression, a path or a name on the hub, and no argument makes peft change the backbone's own weights.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dynadapter.adapters.base import MAX_SIZE
from dynadapter.spec import restore

_NAMES, _NUMBERS = tuple[str, ...], dict[str, float]
VALUES: dict[str, tuple[Any, float]] = {
    "target_modules": (_NAMES, 0),
    "exclude_modules": (_NAMES, 0),
    "feedforward_modules": (_NAMES, 0),
    "r": (int, MAX_SIZE),
    "rank_pattern": (dict[str, int], MAX_SIZE),
    "alpha_pattern": (_NUMBERS, 1e6),
    "lora_alpha": (float, 1e6),
    "lora_dropout": (float, 1),
    "use_rslora": (bool, 1),
    "use_dora": (bool, 1),
    "oft_block_size": (int, MAX_SIZE),
    "module_dropout": (float, 1),
    "block_share": (bool, 1),
    "use_cayley_neumann": (bool, 1),
    "num_cayley_neumann_terms": (int, 100),
    "vera_dropout": (float, 1),
    "d_initial": (float, 1000),
    "projection_prng_key": (int, 2**31),
}
"""The type of each argument, and its largest number; each is at least 0."""

_LAYERS = ("target_modules", "exclude_modules")
_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_OFT = ("r", "oft_block_size", "module_dropout", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "LoraConfig": (*_LAYERS, *_LORA),
    "IA3Config": (*_LAYERS, "feedforward_modules"),
    "OFTConfig": (*_LAYERS, *_OFT),
    "VeraConfig": ("target_modules", "r", "vera_dropout", "d_initial", "projection_prng_key"),
    "LNTuningConfig": _LAYERS,
}
"""The arguments of each class."""

METADATA = {"peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"}
"""Fields of a configuration object that do not change the adapter here."""

WORD = re.compile(r"[A-Za-z0-9_.]{1,200}")
LONGEST = 1000


def described(config: Any) -> tuple[str, dict[str, Any]]:
    """Return the class name of a configuration object of peft, and its fields that differ from the defaults."""
    cls = type(config)
    if not cls.__module__.startswith("peft.") or cls.__name__ not in ARGUMENTS:
        raise ValueError(f"Peft has the config {config!r:.100}; give one of {', '.join(ARGUMENTS)}")
    default = cls()
    changed: dict[str, Any] = {}
    for name in (field.name for field in fields(config) if field.name not in METADATA):
        value = getattr(config, name)
        if value != getattr(default, name):
            changed[name] = sorted(value) if isinstance(value, set) else value
    return cls.__name__, changed


def checked(config: object, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class of peft, with lists as tuples.

    Raises:
        ValueError: The class, an argument or a value is not in the tables of this module.
    """
    if not isinstance(config, str) or config not in ARGUMENTS:
        raise ValueError(f"config={config!r:.100} is none of {', '.join(ARGUMENTS)}")
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in ARGUMENTS[config]:
            raise ValueError(f"{config} may not have {name!r:.100}; it may have {', '.join(ARGUMENTS[config])}")
        hint, largest = VALUES[name]
        found[name] = restore(value, hint, name)
        if not _fits(found[name], largest):
            allowed = ["names of layers out of letters, digits, '_' and '.'"] if "str" in str(hint) else []
            allowed += [f"numbers from 0 to {largest:g}"] if largest else []
            raise ValueError(f"{name}={value!r:.100}; give {' and '.join(allowed)}")
    return found


def _fits(value: Any, largest: float) -> bool:
    if isinstance(value, Mapping):
        return _fits(tuple(value), largest) and _fits(tuple(value.values()), largest)
    if isinstance(value, tuple):
        return len(value) <= LONGEST and all(_fits(one, largest) for one in value)
    return WORD.fullmatch(value) is not None if isinstance(value, str) else 0 <= value <= largest
