"""SIGTERM as an exception, for the commands without Lightning: they end as tidily by it as by Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """Somebody has sent SIGTERM."""


def _stop(*_: object) -> None:
    raise Terminated


@contextmanager
def sigterm() -> Iterator[None]:
    """Raises :class:`Terminated` inside when SIGTERM comes, in the main thread; other threads get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
