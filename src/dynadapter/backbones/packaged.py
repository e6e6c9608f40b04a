"""Small research backbones that ship inside the package, for machines without a network."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"
"""NAME.safetensors with NAME.json and the model card NAME.md beside it, as tools/pretrain writes them."""


@dataclass(frozen=True)
class Packaged:
    """A backbone that ships with the package.

    Args:
        name: What stands where a timm name would.
        architecture: The timm name of its shape.
        timm_args: Further arguments of timm's model.
        sha256: Of the weight file.
    """

    name: str
    architecture: str
    timm_args: Mapping[str, Any]
    sha256: str

    def settings(self, given: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
        """Gives the arguments of timm's model: its own, over them what is given; another image size takes its place."""
        own = {key: value for key, value in self.timm_args.items() if key != "img_size" or image_size is None}
        return own | dict(given)

    def weights(self) -> Path:
        """Gives the weight file.

        Raises:
            ValueError: If it is not the one that was packaged.
        """
        path = FOLDER / f"{self.name}.safetensors"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise ValueError(f"{str(path)!r} is missing or damaged; install dynadapter again")
        return path


def names() -> list[str]:
    """Lists the packaged backbones."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find(name: str) -> Packaged | None:
    """Gives the packaged backbone of a name; None where it names none."""
    if name not in names():
        return None
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Packaged(name, about["architecture"], about["timm_args"], about["sha256"])
