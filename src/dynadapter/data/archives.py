"""Archives from elsewhere, extracted so that nothing of them lands outside, and whole or not at all."""

import bz2
import lzma
import os
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from dynadapter.data.images import open_regular, shown

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_BYTES = 200 * 10**9
MAX_FILES = 5_000_000
MAX_RATIO = 200.0

CHUNK = 2**20
HEADERS = 2**20
"""What a tar file may say about one member, its long name included; Python's reader would keep any amount."""
SMALL = 2**26
"""So much may come out of any archive: a ratio says nothing of a small one."""
SPARE = 2**26
"""So much is left free on the disk."""

Progress = Callable[[int, int], None]


class BadArchive(ValueError):
    """An archive that is not extracted: one line with its path and the reason."""


@dataclass(frozen=True)
class Extracted:
    """What came out of an archive.

    Args:
        folder: Where it is.
        files: Number of files.
        bytes: Their bytes.
    """

    folder: Path
    files: int
    bytes: int


def extract(
    archive: str | Path,
    folder: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
    max_ratio: float = MAX_RATIO,
    progress: Progress | None = None,
) -> Extracted:
    """Extract a .zip or .tar archive, plain or compressed, into a new folder.

    Refused are members that would land outside the folder, links, devices, a name that stands there twice or in two
    spellings, encrypted and damaged archives, and those that unpack to more than the limits, counted while reading
    whatever they declare. Permissions, owners and times of the archive are not taken over.

    The folder appears when all is in it; until then it is called ``FOLDER.partial``, which is removed after an error.

    Args:
        archive: The file; its suffix says what it is.
        folder: Where to; must not exist.
        max_bytes: More bytes than this are refused.
        max_files: More files and folders than this are refused.
        max_ratio: So many times the archive's own size are refused, once 64 MiB have come out.
        progress: Called with the bytes of the archive that are read, and all that there are.

    Raises:
        BadArchive: The archive is refused; nothing of it is left.
        ValueError: The folder exists, a limit is not positive, or the archive is of no known kind.
        OSError: The archive cannot be read, or the folder not written.
    """
    archive, folder = Path(archive).expanduser(), Path(folder).expanduser()
    for name, limit in (("max_bytes", max_bytes), ("max_files", max_files), ("max_ratio", max_ratio)):
        if not limit > 0:
            raise ValueError(f"{name} must be above 0, not {limit}")
    if not archive.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{shown(archive)} is no archive by its name; expected one ending in {', '.join(SUFFIXES)}")
    with open_regular(archive) as file:
        partial = _free_place(folder)
        size = os.fstat(file.fileno()).st_size
        write = _Writer(archive, partial, max_bytes, max_files, min(max_bytes, max(SMALL, max_ratio * size)))
        told = (lambda done: progress(done, size)) if progress else (lambda done: None)
        try:
            partial.mkdir(parents=True)
            if archive.suffix.lower() == ".zip":
                _zip(file, write, told)
            else:
                _tar(file, write, told)
            if not write.files:
                write.refuse("holds no file")
            os.rename(partial, folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if why := _damage(error):
                raise BadArchive(f"{shown(archive)} {why}") from error
            raise
    return Extracted(folder, write.files, write.bytes)


def _damage(error: BaseException) -> str:
    """Say what is wrong with an archive whose reader tripped; nothing where it was no fault of the archive's."""
    if not isinstance(error, Exception) or isinstance(error, BadArchive | MemoryError):
        return ""
    if isinstance(error, OSError) and error.errno is not None:  # of the disk; bz2 raises one without a number
        return ""
    told = shown(" ".join(str(error).split()) or type(error).__name__)
    if isinstance(error, NotImplementedError):
        return f"cannot be read here ({told}); pack it anew as .zip or .tar.gz"
    return f"is damaged or cut short ({told}); fetch it again"


def _free_place(folder: Path) -> Path:
    """Give the folder's name while it is not complete, and refuse a place that is taken."""
    if not folder.name:
        raise ValueError(f"{str(folder)!r} is no name for a new folder")
    if os.path.lexists(folder):
        raise ValueError(f"{shown(folder)} exists; give a folder that does not")
    partial = folder.with_name(f"{folder.name}.partial")
    if os.path.lexists(partial):
        raise ValueError(
            f"{shown(partial)} exists: an extraction is going on or was cut off; remove it, or give another folder"
        )
    return partial


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes:
        """Read so many bytes, fewer at the end."""


class _Writer:
    """Writes members below a folder, and keeps to the limits.

    Args:
        archive: Named in errors.
        folder: Where to write.
        max_bytes: Of all files; named in errors.
        max_files: Files and folders.
        most: The bytes that really may come out, by `max_bytes` and by the ratio.
    """

    def __init__(self, archive: Path, folder: Path, max_bytes: int, max_files: int, most: float) -> None:
        self.archive = archive
        self.folder = folder
        self.max_bytes = max_bytes
        self.max_files = max_files
        self.most = most
        self.files = 0
        self.bytes = 0
        self.members = 0
        self._names: dict[str, tuple[str, bool]] = {}  # by folded path: the path as first written, whether a folder
        self._checked = 0

    def refuse(self, why: str) -> NoReturn:
        """Raise one line with the archive's name."""
        raise BadArchive(f"{shown(self.archive)} {why}") from None

    def expect(self, amount: int) -> None:
        """Refuse so many more bytes where they pass a limit or the disk."""
        if self.bytes + amount > self.most:
            name = "max_bytes" if self.most >= self.max_bytes else "max_ratio"
            why = "" if name == "max_bytes" else ", too many for its size"
            self.refuse(f"unpacks to more than {self.most:,.0f} bytes{why}; if it is to be trusted, raise {name}")
        if self.bytes + amount > self._checked:  # the disk is asked every now and then
            free = shutil.disk_usage(self.folder).free
            if amount + SPARE > free:
                self.refuse(f"does not fit on the disk: {free:,} bytes are free at {shown(self.folder.parent)}")
            self._checked = self.bytes + SPARE // 2

    def make_folder(self, name: str) -> None:
        """Make a folder and those above it; one that is there is taken."""
        parts = self._parts(name)
        if parts:
            self._claim(parts, is_folder=True)
            self.folder.joinpath(*parts).mkdir(parents=True, exist_ok=True)

    def write_file(self, name: str, source: _Reader, size: int) -> None:
        """Write a file of a declared size."""
        parts = self._parts(name)
        if not parts:
            self.refuse(f"has a file with the name {name!r}")
        self._claim(parts, is_folder=False)
        if size < 0:
            self.refuse(f"says that {shown(name)!r} has {size} bytes")
        self.expect(size)
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        done = 0
        with open(handle, "wb", closefd=True) as file:
            while chunk := source.read(CHUNK):
                done += len(chunk)
                if done > size:
                    break
                self.expect(len(chunk))
                self.bytes += len(chunk)
                file.write(chunk)
        if done != size:
            self.refuse(f"is damaged or cut short: {shown(name)!r} has not its {size:,} bytes; fetch it again")
        self.files += 1

    def _parts(self, name: str) -> list[str]:
        """Split a member's name, and refuse one that is not plainly below the folder on every system."""
        self.members += 1
        if re.search(r"[\\\x00-\x1f\x7f]", name) or any("\ud800" <= c <= "\udfff" for c in name):
            self.refuse(f"has a member with the name {shown(name)!r}: a backslash, a control character or no UTF-8")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or re.match("[A-Za-z]:", name):
            self.refuse(f"has a member that would land outside the folder: {shown(name)[:200]!r}")
        if len(parts) > 64:
            self.refuse(f"has a member {len(parts)} folders deep: {shown(name)[:200]!r}")
        return parts

    def _claim(self, parts: list[str], is_folder: bool) -> None:
        """Refuse a path that is taken, by its own spelling or by one that some systems do not tell apart."""
        for depth in range(1, len(parts) + 1):
            path, last = "/".join(parts[:depth]), depth == len(parts)
            folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
            known = self._names.get(folded)
            if known is None:
                self._names[folded] = (path, is_folder or not last)
                if len(self._names) > self.max_files:
                    self.refuse(
                        f"holds more than {self.max_files:,} files and folders; if it is to be trusted, raise max_files"
                    )
            elif known[0] != path:
                self.refuse(f"has two members that differ in spelling only: {shown(known[0])!r} and {shown(path)!r}")
            elif not known[1] or (last and not is_folder):
                self.refuse(f"has two members with the name {shown(path)!r}")


# ---- zip -------------------------------------------------------------------------------------------------------------


def _zip(file: BinaryIO, write: _Writer, told: Callable[[int], None]) -> None:
    with zipfile.ZipFile(file) as source:
        members = source.infolist()
        declared = 0
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                write.refuse(f"has a member that is a link or a device: {shown(member.orig_filename)!r}")
            if member.flag_bits & 1:
                write.refuse("is encrypted; decrypt it first")
            declared += member.file_size
        write.expect(declared)
        done = 0
        for member in members:
            name = member.orig_filename  # zipfile's own `filename` is cut at a NUL byte
            if name.endswith("/"):
                if member.file_size:
                    write.refuse(f"has a folder with content: {shown(name)!r}")
                write.make_folder(name)
            else:
                with source.open(member) as content:
                    write.write_file(name, content, member.file_size)
            done += member.compress_size
            told(done)


# ---- tar -------------------------------------------------------------------------------------------------------------


def _tar(file: BinaryIO, write: _Writer, told: Callable[[int], None]) -> None:
    stream = _Stream(_plain(file, write.archive.name.lower()), write)
    source: Any = tarfile.TarFile(fileobj=stream, mode="r")  # type: ignore[arg-type]  # it needs no more of a file
    while (member := source.next()) is not None:
        if member.isdir():
            write.make_folder(member.name)
        elif not member.isreg() or member.issparse():
            write.refuse(f"has a member that is a link, a device or has holes: {shown(member.name)!r}")
        else:
            stream.budget = member.size + tarfile.BLOCKSIZE
            write.write_file(member.name, source.extractfile(member), member.size)
        told(file.tell())
        source.members.clear()  # the reader would keep what it knows of every one
        stream.budget = HEADERS
    stream.finish()


class _Stream:
    """The bytes of a tar file as its reader asks for them: forwards only, and no more than allowed.

    Args:
        source: Gives the bytes.
        write: Refuses.

    Attributes:
        budget: So many more bytes may be read.
    """

    def __init__(self, source: _Reader, write: _Writer) -> None:
        self.source = source
        self.write = write
        self.budget = HEADERS
        self.place = 0
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        """Read so many bytes, fewer at the end."""
        overhead = self.place - self.write.bytes - SMALL  # a member takes two or three blocks more than its content
        if not 0 <= size <= self.budget or overhead > 8 * tarfile.BLOCKSIZE * self.write.members:
            self.write.refuse("has a member whose header is absurdly long")
        self.last = self.source.read(size)
        self.budget -= len(self.last)
        self.place += len(self.last)
        return self.last

    def tell(self) -> int:
        """Say how many bytes were read."""
        return self.place

    def seek(self, place: int) -> None:
        """Skip bytes."""
        if place < self.place:
            self.write.refuse("is damaged: it leads backwards")
        while place > self.place and self.read(min(place - self.place, CHUNK)):
            pass

    def finish(self) -> None:
        """Refuse a file that ends without its last block, or holds more after it; and read it to its checksum."""
        if len(self.last) != tarfile.BLOCKSIZE or any(self.last):
            self.write.refuse("is cut short: its end is missing; fetch it again")
        self.budget = SMALL
        while rest := self.read(min(CHUNK, self.budget)):
            if rest.strip(b"\0"):
                self.write.refuse("holds something after its end; are these two archives in one file?")
            if not self.budget:
                self.write.refuse(f"goes on for more than {SMALL:,} bytes after its end")


def _plain(file: BinaryIO, name: str) -> _Reader:
    """Choose what takes the compression away."""
    if name.endswith((".gz", ".tgz")):
        return _Decompressed(file, _Inflate)
    if name.endswith((".bz2", ".tbz2")):
        return _Decompressed(file, bz2.BZ2Decompressor)
    if name.endswith((".xz", ".txz")):
        return _Decompressed(file, lambda: lzma.LZMADecompressor(memlimit=2**30))
    return file


class _Inflate:
    """Takes gzip's compression away; called as Python's other two decompressors are."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)  # 31: with gzip's head and checksum

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Decompressed:
    """Reads through a decompressor, which gives no more at once than it is asked for.

    Args:
        file: The compressed bytes.
        start: Makes a decompressor; a file may hold several streams.
    """

    def __init__(self, file: BinaryIO, start: Callable[[], Any]) -> None:
        self.file = file
        self.start = start
        self.inner = start()

    def read(self, size: int, /) -> bytes:
        """Read so many bytes, fewer at the end."""
        parts = []
        while size:
            given = b""
            if self.inner.eof:
                given = self.inner.unused_data.lstrip(b"\0") or self.file.read(CHUNK).lstrip(b"\0")  # zeros fill tapes
                if not given:
                    break
                self.inner = self.start()
            elif self.inner.needs_input:
                given = self.file.read(2**16)
                if not given:
                    raise EOFError("it ends in the middle")
            part = self.inner.decompress(given, size)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
