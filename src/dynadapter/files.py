"""Write files and folders atomically, so that a stop at any time leaves no partial file; read, hash and name them.

This file imports the standard library alone: an exported folder holds a copy of it.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: there is no protection against other processes
    fcntl = None  # type: ignore[assignment]

_HELD: set[Path] = set()
"""The lock files that this process holds: the system's lock does not exclude other threads of it."""
_TURN = threading.Lock()
WAIT = 0.1
"""Seconds between two attempts to lock."""

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of a place where this process cannot write: by its permissions, or by its file system."""

PARTIAL = ".partial"
"""Ending of the hidden name of what is being written; nothing reads it."""


class Busy(ValueError):
    """Another process, or another thread, is writing to the same place."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that is renamed to `path` once it is complete on the disk; an error changes nothing."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with new.open("xb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


def append(path: Path, data: bytes) -> None:
    """Append to a file atomically: if the disk is full, the file keeps its length."""
    with path.open("ab", buffering=0) as file:
        end, left = file.seek(0, os.SEEK_END), memoryview(data)
        try:
            while left:  # a full disk takes a part of it, and then raises
                left = left[file.write(left) :]
        except BaseException:
            file.truncate(end)
            raise


@contextlib.contextmanager
def locked(place: Path, wait: bool = False) -> Iterator[None]:
    """Lock a path, which need not exist, against other processes and threads; the lock file is next to it.

    The system releases the lock when the process ends. On a file system without locks there is no protection.

    Raises:
        Busy: Another process or thread holds the lock, and `wait` is false.
    """
    real = Path(os.path.realpath(place))
    path = real.with_name(f".{real.name}.lock")
    while True:
        try:
            file = _hold(place, path)
            break
        except Busy:
            if not wait:
                raise
            time.sleep(WAIT)
    try:
        yield
    finally:
        with _TURN:
            _HELD.discard(path)
            if file is not None:
                with contextlib.suppress(OSError):
                    path.unlink()
                file.close()


def _hold(place: Path, path: Path) -> BinaryIO | None:
    """Hold a lock file for this thread; return None where there are no locks."""
    file = None
    with _TURN:
        if path in _HELD:
            raise Busy(f"{place} is being written by another thread; wait for it, or name another place")
        if fcntl is not None:
            try:
                file = _lock_file(place, path)
            except OSError as error:  # a folder in which nobody writes, or that does not exist
                if error.errno not in (*READ_ONLY, errno.ENOENT):
                    raise
        _HELD.add(path)
    return file


def _lock_file(place: Path, path: Path) -> BinaryIO:
    """Open and lock a lock file, and write into it which process holds it."""
    while True:
        file = path.open("a+b", buffering=0)
        try:
            # Not flock, which processes that read images would inherit and hold longer than this one lives.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = f" ({file.read(100).decode(errors='replace')})".replace(" ()", "")
            file.close()
            raise Busy(
                f"{place} is being written by another process{who}; wait for it, or name another place"
            ) from error
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                with contextlib.suppress(OSError):  # a full disk
                    file.write(f"process {os.getpid()} on {platform.node()}".encode())
                return file
        file.close()  # its holder has just removed it


@contextlib.contextmanager
def replacing_folder(folder: Path, overwrite: bool = True) -> Iterator[Path]:
    """Create a folder that is renamed to `folder` after the body and replaces an old one; an error changes nothing.

    If the process stops at any time, the name is unused or refers to the old or the new folder. Where the system cannot
    exchange two folders in one step, the old one can be left under a hidden name, see :func:`left_over`.

    Args:
        folder: The name; missing parent folders are created.
        overwrite: Whether an old folder may be replaced.

    Yields:
        The new folder, under a hidden name.

    Raises:
        Busy: Another process is writing it.
        ValueError: The folder exists and `overwrite` is false.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if os.path.lexists(folder) and not overwrite:  # since the caller looked
            raise ValueError(f"{folder} exists; name another folder")
        # Beside the target, where a rename is one step. Not by tempfile, whose folders are closed to other users.
        unfinished = folder.parent / f".{folder.name}.{secrets.token_hex(4)}{PARTIAL}"
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


def write_folder(
    folder: Path,
    files: Mapping[str, bytes],
    overwrite: bool = True,
    check_place: Callable[[Path, bool], object] = lambda *_: None,
) -> None:
    """Write files into a new folder, which gets its name once all of them are on the disk; see `replacing_folder`.

    Args:
        folder: The name.
        files: Contents by name.
        overwrite: Whether an old folder may be replaced.
        check_place: Raises an error if the name must not be used; it is called with folder and ``overwrite`` after the
            files are written, because a user may have put a file there meanwhile.
    """
    with replacing_folder(folder, overwrite) as unfinished:
        for name, data in files.items():
            write(unfinished / name, data)
        check_place(folder, overwrite)


def files_of(folder: Path) -> list[str]:
    """List the files and links to folders of a folder and its subfolders by name, without Python's bytecode."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder) for path in found)
    return sorted(name.as_posix() for name in names if "__pycache__" not in name.parts)


def require_replaceable(folder: Path, overwrite: bool, what: str, own: Collection[str]) -> None:
    """Raise an error for a folder in use. An empty folder, or one with only what is replaced, can be overwritten.

    Args:
        folder: The folder to write.
        overwrite: Whether what is in it may be replaced.
        what: What may be replaced, for messages, such as ``a bundle``.
        own: Names of the files of that; empty if the folder holds something else.

    Raises:
        ValueError: It exists, and is not a folder, may not be replaced, holds other files, or is the current folder or
            contains it.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} exists and is not a folder; give another folder")
    if not overwrite:
        raise ValueError(f"{folder} exists; give another folder, or overwrite=True to replace {what} in it")
    with contextlib.suppress(FileNotFoundError):  # the current folder may be missing
        if Path.cwd().is_relative_to(folder.resolve()):  # a process keeps the old folder, which is removed
            raise ValueError(f"{folder} is the current folder, or contains it; give another folder")
    tops = {"__pycache__", *(name.partition("/")[0] for name in own)}
    foreign = sorted(set(os.listdir(folder)) - tops) or [name for name in files_of(folder) if name not in own]
    if foreign:
        raise ValueError(
            f"{folder} holds {listed(foreign, 3)}; overwrite=True replaces {what} and nothing more: move that away, or "
            "give another folder"
        )


def left_over(folder: Path) -> Path | None:
    """Return the old folder that an interrupted :func:`replacing_folder` left under a hidden name, if there is one."""
    return next(folder.parent.glob(f".{folder.name}.*.previous"), None)


def shown(source: object) -> str:
    r"""Return a file name as one printable line.

    >>> shown("a\nb.png")
    'a\\nb.png'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(source))


def listed(names: Iterable[object], most: int = 10) -> str:
    """Return the first names as text, and the number of the others."""
    named = [shown(name) for name in names]
    return ", ".join(named[:most]) + (f" and {len(named) - most:,} more" if len(named) > most else "")


def one_line(error: BaseException | str) -> str:
    """Return a message without line breaks; the name of the error's class where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object; whitespace and the order of the keys do not change it.

    >>> checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; opening a pipe could block forever.

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
        OSError: The file cannot be read, is not a regular file, or has more than `most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content


def machine_memory() -> int:
    """Return the bytes of memory of this machine; 64 GiB where the system does not tell, as on Windows."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 2**36


def require_room(path: str | os.PathLike[str], size: int, copies: int = 1) -> None:
    """Check that the content of a file fits into the memory of this machine; a sparse file costs nothing to make.

    Args:
        path: The file, for the message.
        size: Bytes of its content, not packed.
        copies: How often the content is in memory while it is loaded.

    Raises:
        ValueError: It does not fit.
    """
    if (needed := size * copies) > (there := machine_memory()):
        raise ValueError(
            f"loading {path} takes {needed / 1e9:,.1f} GB, this machine has {there / 1e9:,.1f} GB; the file is "
            "damaged, or needs a larger machine"
        )


def read_whole(path: str | os.PathLike[str], copies: int = 1) -> bytes:
    """Read a regular file after :func:`require_room`.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: Its content does not fit into the memory of this machine.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        require_room(path, size, copies)
        return file.read(size)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk. Windows offers no such call and needs none."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system does not support it
            raise


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
