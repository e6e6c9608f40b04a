"""Check where a bundle may be written."""

import os
from pathlib import Path

from dynadapter.limits import read_json
from dynadapter.serve.bundle.config import CONFIG, FILES


def check_place(folder: Path, overwrite: bool) -> None:
    """Raise an error for a folder in use. An empty folder, or a folder with only a bundle, can be overwritten."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} exists and is not a folder; give another place for the bundle")
    if not overwrite:
        raise ValueError(f"{folder} exists; give another folder, or overwrite=True to replace the bundle in it")
    inside = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in inside if name not in FILES]
    if inside and (foreign or not _is_bundle(folder / CONFIG)):
        what = f"holds {', '.join(foreign[:3])}" if foreign else "holds something else"
        raise ValueError(
            f"{folder} {what}; overwrite=True replaces a bundle and nothing more: move that away, or give another place"
        )


def _is_bundle(config: Path) -> bool:
    try:
        return read_json(config).get("library") == "dynadapter"
    except (OSError, ValueError, AttributeError):
        return False
