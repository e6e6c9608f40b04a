"""Small research backbones that ship inside the package, for machines without internet access."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"
"""Folder with NAME.safetensors, NAME.json and the model card NAME.md, as tools/pretrain writes them."""


@dataclass(frozen=True)
class Packaged:
    """A backbone that ships with the package.

    Args:
        name: Name to give in place of a timm name.
        architecture: timm's name of the architecture.
        timm_args: Further arguments of ``timm.create_model``.
        preprocess: Size in pixels and normalization of its pre-training images.
        sha256: Hash of the weight file, in hexadecimal digits.
    """

    name: str
    architecture: str
    timm_args: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    sha256: str

    def settings(self, given: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
        """Return the arguments for timm: the backbone's own, overridden by those given.

        If ``image_size`` is given, the backbone's own ``img_size`` is left out.
        """
        own = {key: value for key, value in self.timm_args.items() if key != "img_size" or image_size is None}
        return own | dict(given)

    def weights(self) -> Path:
        """Return the path of the weight file.

        Raises:
            ValueError: If the file is missing or its hash differs.
        """
        path = FOLDER / f"{self.name}.safetensors"
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise ValueError(f"{str(path)!r} is missing or damaged; install dynadapter again")
        return path


def names() -> list[str]:
    """List the packaged backbones."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find(name: str) -> Packaged | None:
    """Return the packaged backbone with this name, or None."""
    if name not in names():
        return None
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Packaged(name, about["architecture"], about["timm_args"], about["preprocess"], about["sha256"])
