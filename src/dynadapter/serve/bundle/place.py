"""Check where a bundle may be written."""

import os
from pathlib import Path

from dynadapter.files import require_replaceable
from dynadapter.limits import read_json
from dynadapter.serve.bundle.config import CONFIG, FILES


def check_place(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the absolute path of a folder to write a bundle to, behind symbolic links.

    Raises:
        ValueError: It is in use by something else than a bundle, or must not be replaced.
    """
    place = Path(os.path.realpath(os.path.expanduser(folder)))
    require_replaceable(place, overwrite, "a bundle", FILES if is_bundle(place / CONFIG) else ())
    return place


def is_bundle(config: Path) -> bool:
    """Check whether a file is the ``config.json`` of a bundle, of any version."""
    try:
        return read_json(config).get("library") == "dynadapter"
    except (OSError, ValueError, AttributeError):
        return False
