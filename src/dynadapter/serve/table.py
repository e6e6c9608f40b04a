"""Write a table of predictions batch by batch, by one or several processes; a killed run loses no finished batch.

While a table is being computed, it is in the folder ``<output>.partial``: ``table.json`` identifies the network and the
images, and each ``<number>.json`` is one finished batch with its checksum. A process claims a batch by a lock that the
system releases when the process ends, and a batch file is written atomically. So a killed run continues where it
stopped, several processes share the images without communication, and a damaged batch is computed again. If a run ended
because images could not be read, the next one computes their batches again. At the end the output is written atomically
from the batches.
"""

import contextlib
import filecmp
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynadapter.files import locked, replacing, sync_folder
from dynadapter.images.reading import is_of_the_machine
from dynadapter.serve.formats import COLUMNS, Row, Unread, check_output, write_table, write_unread

try:
    import fcntl
except ImportError:  # Windows: nothing prevents two processes from computing the same batch
    fcntl = None  # type: ignore[assignment]

FORMAT = 3
ENDED = "unread"
"""File in the folder of an unfinished table whose run ended because images could not be read."""
TITLE = "predictions of dynadapter"


class OtherRun(ValueError):
    """An unfinished table belongs to another network, other images or other settings."""


class PredictionTable:
    """A resumable table of predictions: one row an image, with exits counted from 1.

    Use it as a context manager. At the end of its block, an unfinished table is closed and kept.

    Args:
        output: File of the table; its suffix decides the format (``.csv``, ``.jsonl``, ``.parquet``).
        files: Names of all images, in order.
        batch_size: Images that are computed at once.
        identity: Everything else that determines the rows, as plain values by name. A table is continued only if all
            are equal.
        columns: Names of the columns; the first four are `COLUMNS`.
        overwrite: Whether the output, or an unfinished table with another identity, may be replaced.
        helper: Whether another process has begun this table and will finish it.

    Attributes:
        answered: How many images have a row.
        unread: How many images could not be read.
        exits: Sum of the exits of the answered images, from 1.

    Raises:
        OtherRun: There is an unfinished table with another identity.
        Busy: Another process is writing this table.
        ValueError: The output cannot be written.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        files: Sequence[str],
        batch_size: int,
        identity: Mapping[str, str | int],
        columns: Sequence[str] = COLUMNS,
        overwrite: bool = False,
        helper: bool = False,
    ) -> None:
        self.output, self.files, self.batch_size = Path(output), files, batch_size
        self.columns, self.overwrite = tuple(columns), overwrite
        self.answered = self.unread = self.exits = 0
        self._finished: set[int] = set()
        self._locks = contextlib.ExitStack()
        self._header: dict[str, Any] = {"unfinished": TITLE, "format": FORMAT, "batch_size": batch_size, **identity}
        self._header |= {"columns": list(self.columns), "images": len(files), "list": _digest(files)}
        self._run = zlib.crc32(json.dumps(self._header).encode())
        try:
            if helper:
                self._compare(_read_json(self.folder / "table.json"))
            else:
                self._begin()
            self._claims = self._locks.enter_context(io.FileIO(self.folder / "claims", "ab"))
            for number in range(self.batches):
                self.look(number)
            if not helper and not overwrite and self.done < len(files):
                check_output(self.output, overwrite)  # also where an unfinished table let it pass so far
        except BaseException:
            self.close()
            raise

    @property
    def folder(self) -> Path:
        """The unfinished table."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def unread_list(self) -> Path:
        """The list of the images that could not be read."""
        return self.output.with_name(self.output.name + ".skipped.csv")

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.files) // self.batch_size)

    @property
    def done(self) -> int:
        """Number of finished images, readable or not."""
        return self.answered + self.unread

    def __enter__(self) -> "PredictionTable":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batch(self, number: int) -> Sequence[str]:
        """Return the files of a batch."""
        return self.files[number * self.batch_size : (number + 1) * self.batch_size]

    def look(self, number: int) -> bool:
        """Count a batch once it is finished, and return whether it is."""
        if number not in self._finished and (content := self._read(number)) is not None:
            self._finished.add(number)
            for entry in content:
                if isinstance(entry, Unread):
                    self.unread += 1
                else:
                    self.answered += 1
                    self.exits += entry[3]
        return number in self._finished

    def claim(self, wait: bool = False) -> Iterator[int]:
        """Yield the numbers of unfinished batches, each claimed for this process until it is saved.

        Args:
            wait: Wait for batches that another process computes, and take over those that it does not finish. Save
                each one before the next is requested, or two processes may wait for each other.
        """
        for number in range(self.batches):
            if not self.look(number) and self._lock(number, wait):
                if self.look(number):
                    self._unlock(number)
                else:
                    yield number

    def save(self, number: int, entries: Iterable[Row | Unread]) -> None:
        """Add a batch atomically.

        Raises:
            ValueError: The entries do not belong to the images of this batch.
            OSError: For example if the disk is full. The table is as it was.
        """
        content = [list(entry) for entry in entries]
        if not self._fits(number, content):
            raise ValueError(f"{len(content)} images do not fit batch {number} of {len(self.batch(number))}")
        text = json.dumps(content).encode()
        new = self.folder / f".{number}.{os.getpid()}"
        try:
            # Without fsync: after a power cut the checksum fails, and the batch is computed again.
            new.write_bytes(self._checksum(text) + b" " + text)
            os.replace(new, self._path(number))
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        self.look(number)
        self._unlock(number)

    def finish(self) -> None:
        """Write the output and the list of unreadable images, each atomically, and remove the unfinished table.

        Raises:
            ValueError: Some images are not done, or another file has appeared under the output's name.
        """
        if self.done < len(self.files):
            raise ValueError(f"{self.done} of {len(self.files)} images are done; add the others first")
        new = self.folder / "output"
        with new.open("wb") as file:
            rows = (entry for entry in self._entries() if not isinstance(entry, Unread))
            write_table(file, self.output.suffix, self.columns, rows)
            file.flush()
            os.fsync(file.fileno())
        # The same table is there already if a kill came just after it got its name.
        if not self.overwrite and os.path.lexists(self.output) and not filecmp.cmp(new, self.output, shallow=False):
            check_output(self.output, overwrite=False)
        self._write_unread()
        os.replace(new, self.output)
        sync_folder(self.output.parent)
        if fcntl is None:  # Windows renames no folder with open files
            self.close()
        os.rename(self.folder, self._trash)
        self.close()
        shutil.rmtree(self._trash, ignore_errors=True)

    def list_unread(self, more: Iterable[Unread] = ()) -> None:
        """Write the list of unreadable images because they end this run; the next run tries them again."""
        self._write_unread(more)
        (self.folder / ENDED).touch()

    def close(self) -> None:
        """Close the unfinished table and release what this process claimed."""
        self._locks.close()

    # ---- the folder

    @property
    def _trash(self) -> Path:
        return self.output.with_name(f".{self.output.name}.done")

    def _begin(self) -> None:
        """Find or create the folder, for this process alone."""
        shutil.rmtree(self._trash, ignore_errors=True)  # left by a kill after a table was written
        check_output(self.output, self.overwrite or self.folder.exists())
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.exists() and not self.folder.is_dir():
            raise OtherRun(f"{self.folder} is not an unfinished table of predictions")
        self._locks.enter_context(locked(self.folder))
        self.folder.mkdir(exist_ok=True)
        there = _read_json(self.folder / "table.json")
        if there is None:
            self._check_new()
        elif there == self._header:
            self._drop_unread()
            return
        elif not (self.overwrite and _is_table(there)):
            self._compare(there)
        for path in self.folder.glob("[0-9]*.json"):
            path.unlink()
        (self.folder / ENDED).unlink(missing_ok=True)
        with replacing(self.folder / "table.json") as file:
            file.write(json.dumps(self._header).encode())

    def _drop_unread(self) -> None:
        """Remove batches with images that could not be read, if a run ended because of them; they are tried again."""
        ended = self.folder / ENDED
        if ended.exists():
            for number in range(self.batches):
                if any(isinstance(entry, Unread) for entry in self._read(number) or ()):
                    self._path(number).unlink()
            ended.unlink()

    def _check_new(self) -> None:
        """Raise an error for a folder without ``table.json`` that holds other files."""
        there = {path.name for path in self.folder.iterdir() if not path.name.startswith(".table.json.")}
        if strange := there - {"claims"}:
            raise OtherRun(f"{self.folder} is not an unfinished table of predictions: it holds {min(strange)}")
        if os.path.lexists(self.output) and not self.overwrite:  # finished by another process just now
            shutil.rmtree(self.folder)
            check_output(self.output, overwrite=False)

    def _compare(self, there: Any) -> None:
        if there != self._header:
            raise OtherRun(f"{self.folder} {_difference(there, self._header)}")

    def _lock(self, number: int, wait: bool) -> bool:
        """Claim a batch, and return whether that worked."""
        try:
            if fcntl is not None:
                fcntl.lockf(self._claims, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
        return True

    def _unlock(self, number: int) -> None:
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, number)

    def _write_unread(self, more: Iterable[Unread] = ()) -> None:
        """Write the list of unreadable images, or remove an old list where there are none."""
        found = [entry for entry in self._entries() if isinstance(entry, Unread)] if self.unread else []
        write_unread(self.unread_list, [*found, *more])

    # ---- batches

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _checksum(self, text: bytes) -> bytes:
        """Return the checksum of a batch; a process of another run, which outlived it, writes another one."""
        return f"{zlib.crc32(text, self._run):08x}".encode()

    def _read(self, number: int) -> list[Row | Unread] | None:
        """Read a batch; None if it is missing or damaged."""
        try:
            checksum, _, text = self._path(number).read_bytes().partition(b" ")
        except FileNotFoundError:
            return None
        if checksum != self._checksum(text):
            return None
        content = json.loads(text)
        if not self._fits(number, content):
            return None
        return [entry if len(entry) == len(self.columns) else Unread(*entry) for entry in content]

    def _fits(self, number: int, content: list[list[Any]]) -> bool:
        """Check whether entries belong to the images of a batch, in order."""
        sizes = {len(self.columns), len(Unread._fields)}
        names = [entry[0] for entry in content if len(entry) in sizes]
        return len(names) == len(content) and names == list(self.batch(number))

    def _entries(self) -> Iterator[Row | Unread]:
        for number in sorted(self._finished):
            content = self._read(number)
            if content is None:
                raise ValueError(f"{self._path(number)} has been damaged; the same command computes it again")
            yield from content


def _read_json(path: Path) -> Any:
    """Read a JSON file; return None if there is none, and the text if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return "damaged"


def _is_table(there: Any) -> bool:
    return isinstance(there, dict) and there.get("unfinished") == TITLE


def _digest(files: Iterable[str]) -> str:
    """Hash names, sizes and times of files, so that a replaced image is noticed."""
    digest = hashlib.sha256()
    for name in files:
        try:
            found = os.stat(name)
            state = [name, found.st_size, found.st_mtime_ns]
        except (OSError, ValueError) as error:  # missing, or a name that no file can have
            if isinstance(error, OSError) and is_of_the_machine(error):
                raise
            state = [name]
        digest.update(json.dumps(state).encode() + b"\n")
    return digest.hexdigest()


def _difference(there: Any, wanted: Mapping[str, Any]) -> str:
    """Describe how an unfinished table differs from the wanted one."""
    if not _is_table(there):
        return "is not an unfinished table of predictions"
    if there.get("format") != wanted["format"]:
        return "was begun by another version of dynadapter"
    if there.get("images") != wanted["images"]:
        return f"was begun with {there.get('images')} images, now there are {wanted['images']}"
    if there.get("list") != wanted["list"]:
        return "was begun with other images: names, sizes or times of the files have changed"
    name = next(name for name in [*wanted, *there] if there.get(name) != wanted.get(name))
    before = there.get(name)
    if isinstance(before, list) or re.fullmatch("[0-9a-f]{64}", str(before)):  # a hash does not help a reader
        return f"was begun with another {name}" if name != "columns" else "was begun with other columns"
    return f"was begun with {name}={before}, now it is {wanted.get(name)}"
