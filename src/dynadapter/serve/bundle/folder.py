"""A folder that is there whole or not at all."""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path


def check_place(folder: Path, names: tuple[str, ...], overwrite: bool) -> None:
    """Refuses a place that is taken; only a bundle with nothing else in it, or an empty folder, can be overwritten.

    Args:
        folder: Where to write.
        names: The files of a bundle, its configuration last.
        overwrite: Whether a bundle that is there may be replaced.

    Raises:
        ValueError: If the place is taken.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} exists and is no folder; give another place for the bundle")
    if not overwrite:
        raise ValueError(f"{folder} exists; give another folder, or overwrite=True to replace the bundle in it")
    inside = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in inside if name not in names]
    if inside and (foreign or not _is_bundle(folder / names[-1])):
        what = f"holds {', '.join(foreign[:3])}" if foreign else "holds something else"
        raise ValueError(
            f"{folder} {what}; overwrite=True replaces a bundle and nothing more: move that away, or give another place"
        )


def _is_bundle(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("library") == "dynadapter"
    except (OSError, ValueError, AttributeError):
        return False


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a new folder, which takes its name when all are on the disk; one that is there is replaced.

    Whenever the process ends, under that name is nothing, or the old folder, or the new one. Where the system cannot
    exchange two folders in one step, the old one can be left under a hidden name, see :func:`left_over`.

    Args:
        folder: Where to write; the folders above are made.
        files: Content by name, in the order of writing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because only inside one file system a rename is one step. Not by tempfile, whose folders nobody
    # else may read.
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    unfinished.mkdir()
    try:
        for name, data in files.items():
            _write(unfinished / name, data)
        _sync(unfinished)
        if not os.path.lexists(folder):
            os.rename(unfinished, folder)
        elif not _exchange(unfinished, folder):
            _replace(unfinished, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def left_over(folder: Path) -> Path | None:
    """Finds the old folder that an interrupted overwriting has left under a hidden name."""
    return next(folder.parent.glob(f".{folder.name}.*.previous"), None)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Puts the names in a folder on the disk; Windows cannot, and needs not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _exchange(new: Path, old: Path) -> bool:
    """Exchanges two folders in one step (Linux), and says whether that could be done."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.6
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0


def _replace(new: Path, old: Path) -> None:
    """Exchanges two folders in two steps."""
    aside = old.parent / f".{old.name}.{secrets.token_hex(4)}.previous"
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
