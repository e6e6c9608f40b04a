"""The files of an adapter folder of the package peft, and where one may be written; this file does not load torch."""

import os
from pathlib import Path

from dynadapter.files import require_replaceable

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def check_place(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the absolute path of a folder to write adapters to, behind symbolic links.

    Raises:
        ValueError: It is in use by something else than an adapter folder, or must not be replaced.
    """
    place = Path(os.path.realpath(os.path.expanduser(folder)))
    require_replaceable(place, overwrite, "an adapter folder", (CONFIG, TENSORS))
    return place
