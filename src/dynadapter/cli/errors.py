"""How a command ends: errors in one line, exit codes, and SIGTERM. Imports nothing heavy, so that errors are fast."""

import difflib
import dis
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Mistake(Exception):
    """Invalid input (exit code 2). The message is one line: what was given, what is allowed, what to do."""


class Stopped(Exception):
    """A command that ended before its work was done.

    Args:
        line: One line that says how to continue.
        code: The exit code; 128 plus the number of the signal that stopped it.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


class Failed(Stopped):
    """Work of which some parts failed (exit code 1).

    Args:
        line: One line that names those parts.
    """

    def __init__(self, line: str) -> None:
        super().__init__(f"error: {line}", 1)


class Terminated(BaseException):
    """SIGTERM arrived. Not an ``Exception``, so that no handler for errors catches it."""


def _raise_terminated(*_: object) -> None:
    raise Terminated


@contextmanager
def sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` in the body when SIGTERM arrives. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_line(error: BaseException | str) -> str:
    """Return a message without line breaks; the name of the error's class where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest(given: str, names: Iterable[str], cutoff: float = 0.7) -> str:
    """Return a question with the name nearest to a wrong one, or an empty string where none is similar.

    >>> nearest("LoRa", ["LoRA", "Adapter"])
    "; did you mean 'LoRA'?"

    Args:
        given: The wrong name; case is ignored.
        names: The valid ones.
        cutoff: Least similarity, in [0, 1].
    """
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=cutoff)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""


def describe(error: Exception) -> tuple[str, int]:
    """Return an error as one line, and the exit code: 2 for invalid input, 1 for what looks like a bug."""
    from dynadapter.cli.explain import innermost

    if isinstance(error, Mistake):
        return f"error: {error}", 2
    if _is_input_error(error):
        return f"error: {one_line(innermost(str(error)).text)} (--debug shows where)", 2
    return f"bug: {type(error).__name__}: {one_line(error)} (please report this with what --debug shows)", 1


def _is_input_error(error: Exception) -> bool:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from torch import OutOfMemoryError

    if isinstance(error, OSError | ImportError | MisconfigurationException | OutOfMemoryError):
        return True
    return isinstance(error, ValueError | TypeError) and raised_on_purpose(error)


def raised_on_purpose(error: BaseException) -> bool:
    """Check whether a ``raise`` statement raised an error, rather than an operation that failed.

    >>> try:
    ...     raise ValueError("a check")
    ... except ValueError as error:
    ...     raised_on_purpose(error)
    True
    >>> try:
    ...     (1).x + None
    ... except AttributeError as error:
    ...     raised_on_purpose(error)
    False
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
