"""Write files and folders whole or not at all, whenever the process or the machine stops; read and hash regular files.

This file imports the standard library alone: an exported folder holds a copy of it.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the name `path` in one step once it is on the disk; an error changes nothing."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # a killed process can have left it
    try:
        with new.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_folder(path.parent)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Create a folder that takes the name `folder` after the body and replaces an old one; an error changes nothing.

    If the process stops at any time, the name is unused or refers to the old or the new folder. Where the system cannot
    exchange two folders in one step, the old one can be left under a hidden name, see :func:`left_over`.

    Args:
        folder: The name; missing parent folders are created.

    Yields:
        The new folder, under a hidden name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is one step only inside one file system. Not by tempfile, because its folders
    # are closed to other users.
    unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    unfinished.mkdir()
    try:
        yield unfinished
        sync_folder(unfinished)
        if not os.path.lexists(folder):
            os.rename(unfinished, folder)
        elif not _exchange(unfinished, folder):
            _replace(unfinished, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a new folder, which takes its name once all of them are on the disk; see `replacing_folder`.

    Args:
        folder: Where to write; an old folder is replaced.
        files: Content by name, in the order of writing.
    """
    with replacing_folder(folder) as unfinished:
        for name, data in files.items():
            _write(unfinished / name, data)


def left_over(folder: Path) -> Path | None:
    """Return the old folder that an interrupted :func:`replacing_folder` left under a hidden name, if there is one."""
    return next(folder.parent.glob(f".{folder.name}.*.previous"), None)


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, independent of its layout and of the order of its keys.

    >>> checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; opening a pipe could block for ever.

    Raises:
        OSError: The path cannot be read, or is a folder, a pipe, a socket or a device.
    """
    _check_regular(os.stat(path).st_mode, path)  # before opening, because opening some devices has effects
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle).st_mode, path)  # again, because the file may have been exchanged meanwhile
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file", str(path))


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a regular file of limited size.

    Raises:
        OSError: It cannot be read, is no regular file, or has more than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk. Windows offers no such call and needs none."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _exchange(new: Path, old: Path) -> bool:
    """Exchange two folders in one step, on Linux, and return whether that worked."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.6
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0


def _replace(new: Path, old: Path) -> None:
    """Exchange two folders in two steps."""
    aside = old.parent / f".{old.name}.{secrets.token_hex(4)}.previous"
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
