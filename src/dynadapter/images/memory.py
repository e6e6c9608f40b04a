"""Count the cores of this process, and limit the memory for decoding over all its threads.

This file imports the standard library alone: an exported folder holds a copy of it.
"""

import contextlib
import os
import threading
from collections.abc import Iterator


def usable_cores() -> int:
    """Return the number of cores: those of the process's CPU affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Budget:
    """A number of bytes that threads share: a thread reserves bytes before it takes memory, and waits if none are free.

    Args:
        total: Bytes that may be reserved at a time.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._release_all()
        if hasattr(os, "register_at_fork"):  # the threads that hold memory do not exist in the child
            os.register_at_fork(after_in_child=self._release_all)

    def _release_all(self) -> None:
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, and reserve them inside the context."""
        if size > self.total:
            raise ValueError(f"{size / 1e9:.1f} GB of memory are more than the limit of {self.total / 1e9:.1f} GB")
        with self._changed:
            self._changed.wait_for(lambda: self._used + size <= self.total)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()
