"""Check where a bundle may be written."""

from pathlib import Path

from dynadapter.files import require_replaceable
from dynadapter.limits import read_json
from dynadapter.serve.bundle.config import CONFIG, FILES


def check_place(folder: Path, overwrite: bool) -> None:
    """Raise an error for a folder in use. An empty folder, or a folder with only a bundle, can be overwritten."""
    require_replaceable(folder, overwrite, "a bundle", FILES if _is_bundle(folder / CONFIG) else ())


def _is_bundle(config: Path) -> bool:
    try:
        return read_json(config).get("library") == "dynadapter"
    except (OSError, ValueError, AttributeError):
        return False
