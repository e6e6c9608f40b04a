"""A table of predictions that survives a kill: what is done is on the disk, batch by batch.

Beside the output grows ``<output>.partial``. Its first line says which network and which images it belongs to; then
there is a line of JSON for each image in order, behind its checksum, whether it could be read or not. So the number of
whole lines says where to go on. What a kill has cut off or a disk has changed is dropped with all that follows, and so
are the other lines of its batch, because a batch is to be computed as one again. When all images are done, the output
is written from these lines under another name and takes its own in one step.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows: nobody is kept from writing the same file twice
    fcntl = None  # type: ignore[assignment]

FIELDS = ("file", "class", "confidence", "exit")
SUFFIXES = (".csv", ".jsonl")
FORMAT = 1
CHECKSUM = 9
"""Bytes of a line's checksum (CRC-32) and the space behind it."""


class Foreign(ValueError):
    """An unfinished table that belongs to another network, other images, or something else."""


class Busy(ValueError):
    """An unfinished table that another process is writing."""


class Answer(NamedTuple):
    """What is said of an image: its class, the confidence in [0, 1] or NaN, and the exit (zero-based)."""

    file: str
    label: str
    confidence: float
    exit: int


class Unread(NamedTuple):
    """An image that could not be read, and why."""

    file: str
    reason: str


Entry = Answer | Unread


class PredictionTable:
    """A table ``file, class, confidence, exit`` (exits from 1) in the making, as CSV or JSON lines.

    Use it as a context manager: on leaving, the unfinished table is closed and stays what it is.

    Args:
        output: The table; ``.csv``, or ``.jsonl`` for an object a line.
        files: Names of all images, in order.
        batch_size: Images that are computed at once. What is done ends at a multiple of it.
        identity: What else decides the answers, as plain values by name; a table is only gone on with where all of them
            are the same.
        overwrite: Whether the output, and an unfinished table of something else, may be replaced.

    Attributes:
        done: How many images are settled.
        unread: How many of these could not be read.
        exits: Sum of the zero-based exits of the others.
        nonfinite: How many of the others have no confidence, because their logits were not finite.

    Raises:
        Foreign: If there is an unfinished table of something else.
        Busy: If another process is writing it.
        ValueError: If the output cannot be written.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        files: Sequence[str],
        batch_size: int,
        identity: Mapping[str, str | int],
        overwrite: bool = False,
    ) -> None:
        self.output, self.files, self.batch_size, self.overwrite = Path(output), files, batch_size, overwrite
        self.done = self.unread = self.exits = self.nonfinite = 0
        self._header = {"unfinished": "predictions of dynadapter", "format": FORMAT, "batch_size": batch_size}
        self._header |= {**identity, "images": len(files), "list": _digest(files)}
        # Where both are there, a kill may have come just after the output had its name.
        check_output(self.output, overwrite or self.partial.exists())
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._file = _opened(self.partial)
        try:
            self._recover()
            self._check_output()
        except BaseException:
            self.close()
            raise

    @property
    def partial(self) -> Path:
        """The unfinished table."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def listed(self) -> Path:
        """The list of the images that could not be read."""
        return self.output.with_name(self.output.name + ".skipped.csv")

    def __enter__(self) -> "PredictionTable":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, entries: Sequence[Entry]) -> None:
        """Adds a batch, which is on the disk when this returns.

        Args:
            entries: Of the next ``batch_size`` images, or of all that are left.

        Raises:
            ValueError: If they are not these.
            OSError: If the disk is full, for example. The table is as it was.
        """
        due = self.files[self.done : self.done + self.batch_size]
        if [entry.file for entry in entries] != list(due):
            raise ValueError(f"a batch of {len(entries)} images does not fit the {len(due)} that are next")
        self._write(b"".join(_checksum(line) + line for line in map(_encoded, entries)))
        self._count(entries)

    def finish(self) -> None:
        """Writes the output, and the list of what could not be read where there is something, both in one step each.

        Raises:
            ValueError: If not all images are done, or the output has come into being meanwhile.
        """
        if self.done < len(self.files):
            raise ValueError(f"{self.done} of {len(self.files)} images are done; add the others first")
        self._check_output()
        self.list_unread()
        with replacing(self.output) as file:
            self._render(file)
        if fcntl is None:  # Windows removes no open file
            self.close()
        self.partial.unlink(missing_ok=True)
        self.close()

    def list_unread(self, more: Iterable[Unread] = ()) -> None:
        """Writes the list of the images that could not be read; where there are none, an old list is removed.

        Args:
            more: Some that are not in the table.
        """
        found = [entry for _, entry in self._lines() if isinstance(entry, Unread)] if self.unread else []
        write_unread(self.listed, [*found, *more])

    def close(self) -> None:
        """Lets go of the unfinished table."""
        self._file.close()

    def _check_output(self) -> None:
        """Refuses an output that may not be replaced, unless it says what this table does."""
        if not os.path.lexists(self.output) or self.overwrite or self._says_the_same():
            return
        if not self.done:  # made just now: the process that had the table has finished it
            with contextlib.suppress(OSError):
                self.partial.unlink()
        check_output(self.output, False)

    def _says_the_same(self) -> bool:
        if self.done < len(self.files):
            return False
        with tempfile.TemporaryFile() as ours, self.output.open("rb") as theirs:
            self._render(ours)
            ours.seek(0)
            chunk = partial(ours.read, 1 << 20)
            return all(theirs.read(len(part)) == part for part in iter(chunk, b"")) and not theirs.read(1)

    def _render(self, file: IO[bytes]) -> None:
        """Writes the table as it is to be."""
        if self.output.suffix.lower() == ".jsonl":
            for line, entry in self._lines():
                if isinstance(entry, Answer):
                    file.write(line)
        else:
            rows = (entry for _, entry in self._lines() if isinstance(entry, Answer))
            _write_csv(file, FIELDS, ((r.file, r.label, f"{r.confidence:.4f}", r.exit + 1) for r in rows))

    def _recover(self) -> None:
        """Finds where to go on, and drops what is behind."""
        with self.partial.open("rb") as reader:
            first = reader.readline()
            header = _parsed(first)
            if header is None and _begins(_line(self._header), first):
                self._restart()
                return
            if header != self._header:
                if not self.overwrite:
                    raise Foreign(f"{self.partial} {_differs(header, self._header)}")
                self._restart()
                return
        batch: list[Entry] = []
        self._end = end = len(first)
        for line, entry in self._lines():
            end += CHECKSUM + len(line)
            batch.append(entry)
            if len(batch) == self.batch_size or self.done + len(batch) == len(self.files):
                self._count(batch)
                self._end, batch = end, []
        self._file.truncate(self._end)

    def _restart(self) -> None:
        self._file.truncate(0)
        self._end = 0
        self._write(_line(self._header))
        _sync(self.partial.parent)

    def _lines(self) -> Iterator[tuple[bytes, Entry]]:
        """Yields the lines of images and what they say, up to the first that is not whole."""
        with self.partial.open("rb") as reader:
            reader.readline()
            for file in self.files:
                checksum, line = reader.read(CHECKSUM), reader.readline()
                entry = _entry(_parsed(line)) if checksum == _checksum(line) else None
                if entry is None or entry.file != file:
                    return
                yield line, entry

    def _count(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.done += 1
            if isinstance(entry, Answer):
                self.exits += entry.exit
                self.nonfinite += math.isnan(entry.confidence)
            else:
                self.unread += 1

    def _write(self, data: bytes) -> None:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(data)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses an output that cannot be written.

    Raises:
        ValueError: If its suffix stands for no format, or it is there and may not be replaced.
    """
    if output.is_dir():
        raise ValueError(f"{output} is a folder; give a name that ends in .csv or .jsonl")
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{output} stands for no format; give a name that ends in .csv or .jsonl")
    if os.path.lexists(output) and not overwrite:
        raise ValueError(f"{output} exists; give another name, or overwrite it")


def write_unread(path: Path, found: Sequence[Unread]) -> None:
    """Writes a list of images that could not be read; where there are none, an old list is removed."""
    if not found:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as file:
        _write_csv(file, Unread._fields, found)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file that takes its name, from one that may be there, when it is whole and on the disk."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)  # a kill can have left it
    try:
        with new.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        _sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


def _opened(path: Path) -> io.FileIO:
    """Opens a file for this process alone; it is made where there is none."""
    while True:
        file = io.FileIO(path, "ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise Busy(f"{path} is being written by another process; wait for it, or name another output") from None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that had it has finished and removed it


def _sync(folder: Path) -> None:
    """Puts the names in a folder on the disk; Windows cannot, and needs not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(files: Iterable[str]) -> str:
    """Hashes names, and sizes and times of the files: when one of them is another image, so are the answers."""
    digest = hashlib.sha256()
    for name in files:
        try:
            found = os.stat(name)
            state = [name, found.st_size, found.st_mtime_ns]
        except OSError:
            state = [name]
        digest.update(json.dumps(state).encode() + b"\n")
    return digest.hexdigest()


def _differs(there: Any, wanted: Mapping[str, Any]) -> str:
    """Says what an unfinished table was begun with."""
    if not isinstance(there, dict) or there.get("unfinished") != wanted["unfinished"]:
        return "is no unfinished table of predictions"
    if there.get("format") != wanted["format"]:
        return "was begun by another version of dynadapter"
    if there.get("images") != wanted["images"]:
        return f"was begun with {there.get('images')} images, now there are {wanted['images']}"
    if there.get("list") != wanted["list"]:
        return "was begun with other images: names, sizes or times of the files have changed"
    name = next(name for name in [*wanted, *there] if there.get(name) != wanted.get(name))
    told = str(there.get(name))
    if len(told) == 64:  # a hash says nothing to anybody
        return f"was begun with another {name}"
    return f"was begun with {name}={told}, now it is {wanted.get(name)}"


# ---- lines -----------------------------------------------------------------------------------------------------------


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a file name that is no text in any encoding
        return json.dumps(content).encode() + b"\n"


def _encoded(entry: Entry) -> bytes:
    if isinstance(entry, Unread):
        return _line({"file": entry.file, "unread": entry.reason})
    # JSON has no NaN; as many digits as the CSV file shows
    sure = None if math.isnan(entry.confidence) else round(entry.confidence, 4)
    return _line({"file": entry.file, "class": entry.label, "confidence": sure, "exit": entry.exit + 1})


def _checksum(line: bytes) -> bytes:
    return f"{zlib.crc32(line):08x} ".encode()


def _parsed(line: bytes) -> Any:
    """Reads a line; None for one that is not whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _entry(content: Any) -> Entry | None:
    match content:
        case {"file": str(file), "unread": str(reason)}:
            return Unread(file, reason)
        case {"file": str(file), "class": str(label), "confidence": float() | int() | None as sure, "exit": int(exit)}:
            return Answer(file, label, math.nan if sure is None else sure, exit - 1)
    return None


def _begins(whole: bytes, part: bytes) -> bool:
    """Says whether a first line is nothing but the start of one, as a kill leaves it."""
    return not part.endswith(b"\n") and whole[:20].startswith(part[:20])


def _write_csv(file: IO[bytes], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    # Python reads file names that are not UTF-8 with surrogateescape; so written, they are the same bytes.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    text.detach()
