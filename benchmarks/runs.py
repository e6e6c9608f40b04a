"""A log with one JSON line a run, which several processes may fill together: no run is done twice."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dynadapter.bench.timing import machine

Key = dict[str, Any]
Line = dict[str, Any]


class Runs:
    """A file of JSON lines, each with the ``key`` that says which run it is.

    Accuracy does not depend on the machine, so the key does not name it. Lines are appended whole, under a lock. A run
    is claimed by a lock on a small file in the system's folder for such; the system takes it back from a process that
    ends, however it ends.

    Args:
        path: The file; it need not be there yet.

    Raises:
        ValueError: A line is no JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        self._claims = Path(tempfile.gettempdir()) / f"dynadapter-runs-{os.getuid()}-{name}"
        self.lines: list[Line] = []
        self.read()

    def read(self) -> list[Line]:
        """Reads the file as it is now."""
        self.lines = read_lines(self.path)
        return self.lines

    def find(self, key: Key) -> Line | None:
        """Gives the line of a run that is done, as far as the file was read."""
        return next((line for line in self.lines if line["key"] == key), None)

    @contextmanager
    def claim(self, key: Key) -> Iterator[bool]:
        """Inside, a run is this process's own; gives whether it is: false where it is done, or somebody else's."""
        self._claims.mkdir(exist_ok=True)
        slip = self._claims / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        with slip.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self.read()  # it may have been done in between
            yield self.find(key) is None

    def add(self, key: Key, **values: Any) -> Line:
        """Appends a run, with the machine and the time."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.loads(json.dumps({"key": key, **values, "machine": machine(), "time": now}))
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write((json.dumps(line) + "\n").encode())
        self.lines.append(line)
        return line


def read_lines(path: str | Path) -> list[Line]:
    """Reads a file of JSON lines; none where there is no file.

    Raises:
        ValueError: A line is no JSON object with a key.
    """
    path = Path(path)
    if not path.exists():
        return []
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # nobody is in the middle of a line
        content = file.read()
    lines = []
    for number, text in enumerate(content.decode().splitlines(), start=1):
        try:
            line = json.loads(text)
            line["key"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number} is no line of a run; a run was cut short: take that line out") from None
        lines.append(line)
    return lines


def matching(lines: list[Line], **key: Any) -> list[Line]:
    """Picks the lines whose keys have these values."""
    return [line for line in lines if all(line["key"].get(name) == value for name, value in key.items())]
