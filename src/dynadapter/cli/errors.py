"""How a command ends: one-line errors, exit codes and signals. Imports nothing heavy, so that errors are fast."""

import difflib
import dis
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from dynadapter.files import one_line as one_line


class Mistake(Exception):
    """Invalid input (exit code 2). The message is one line: what was given, what is allowed, what to do.

    Any function of the command line may raise it.
    """


class Stopped(Exception):
    """A command ended before it was finished."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


class Failed(Stopped):
    """Runs of a sweep or workers of Ray failed, maybe by a bug (exit code 1)."""

    def __init__(self, line: str) -> None:
        super().__init__(f"error: {line}", 1)


class Terminated(BaseException):
    """A signal stops the process. This is not an ``Exception``, so that no handler of errors catches it."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a process to stop: of a scheduler, of a terminal that closes, of a scheduler in advance."""


def stopping_signals() -> list[int]:
    """Return the signals that stop this process; SIGHUP is not among them under ``nohup``, which ignores it."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


def _raise_terminated(number: int, _: object) -> None:
    raise Terminated(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise :class:`Terminated` inside the context when such a signal arrives; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _raise_terminated) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TYPED = {
    "weights='...'": "--weights FILE",
    "pretrained=True": "--pretrained true",
    "overwrite=True": "--overwrite true",
    "or overwrite it": "or --overwrite true",
    "set on_error: skip": "give --data.on_error skip",
}
"""Settings in messages for Python, and as they are typed on the command line."""


@contextmanager
def mistakes(before: str = "", after: str = "", kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Raise an error of the body as a :class:`Mistake`, its message in one line between two texts."""
    try:
        yield
    except kinds as error:
        raise Mistake(f"{before}{as_typed(one_line(error))}{after}") from error


def as_typed(line: str) -> str:
    """Replace settings in a message for Python by those of the command line."""
    for python, typed in TYPED.items():
        line = line.replace(python, typed)
    return line


def closest(given: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Return the valid name that is most similar to a wrong or shortened one; None if none is similar."""
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=cutoff)
    begun = [name for name in lower if len(given) > 3 and name.startswith(given.lower())]
    near = near or (begun if len(begun) == 1 else [])
    return lower[near[0]] if near else None


def nearest(given: str, names: Iterable[str], cutoff: float = 0.7) -> str:
    """Return a question with the :func:`closest` name, or an empty string if none is similar.

    >>> nearest("LoRa", ["LoRA", "Adapter"])
    "; did you mean 'LoRA'?"
    """
    return meant(closest(given, names, cutoff))


def meant(name: str | None) -> str:
    """Return the question "did you mean" with a name; an empty string for None."""
    return f"; did you mean {name!r}?" if name is not None else ""


def nearest_place(given: str) -> str:
    """Return the same question for a path that does not exist, from the names in the same folder."""
    path = Path(os.path.expanduser(given))
    if path.exists():
        return ""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = closest(path.name, (other.name for other in islice(beside, 1000)))
    return meant(str(path.with_name(near)) if near is not None else None)


OUTAGES = {
    r"DataLoader worker .*(shared memory|Bus error)": "a process that reads images has no shared memory; make /dev/shm "
    "larger, or give --data.num_workers 0",
    r"DataLoader worker": "a process that reads images was killed, often because the memory is full; give fewer "
    "--data.num_workers, or 0",
    r"Too many open files|items of ancdata": "too many files are open; raise the limit by ulimit -n, or give fewer "
    "--data.num_workers",
    r"(?i)MemoryError|out of memory|allocate memory|bad_alloc": "the memory is full; give a smaller batch size, or "
    "fewer processes",
    r"No space left|quota exceeded|File too large|PytorchStreamWriter": "the disk is full; free space, or give another "
    "folder",
    r"Stale file|Input/output error|Transport endpoint|Remote I/O|Host is down|timed out|No such device": "the file "
    "system failed or is disconnected; check the disk or the mount",
    r"(?i)by peer|Broken pipe|\bgloo\b|\bnccl|ProcessGroup|TCPStore|DistNetworkError": "another process of this run "
    "ended or cannot be reached; its own message is above",
    r"CUDA (error|driver)|cuDNN error": "the GPU failed; see nvidia-smi, or give --trainer.accelerator cpu",
}
"""What fails beside this program, by a pattern in the type and the message of an error, and the way out."""


def outage(error: BaseException) -> str:
    """Return what has failed outside this program, and what to do; an empty string for any other error."""
    kind, message, _ = _parts(error)
    own = isinstance(error, OSError) and error.errno is None and "[Errno" not in message
    if own or isinstance(error, ValueError | TypeError | ImportError):
        return ""  # our own line, or invalid input
    if message.startswith("[Errno"):
        message = message.partition(": ")[0]  # without the name of the file
    text = f"{kind}: {message}"
    return next((words for pattern, words in OUTAGES.items() if re.search(pattern, text, re.DOTALL)), "")


def _parts(error: BaseException) -> tuple[str, str, bool]:
    """Return the type and the message of an error, and whether it was raised on purpose.

    torch raises an error of a loader's worker process again, with the text of its traceback as message.
    """
    text = str(error)
    if not (worker := re.match(r"Caught (\w+) .*\.\nOriginal Traceback", text)):
        return type(error).__name__, text, raised_on_purpose(error)
    start = list(re.finditer(rf"^([\w.]+\.)?{worker[1]}(: |$)", text, re.MULTILINE))[-1]
    statement = text[: start.start()].rpartition('\n  File "')[2].split("\n")[1]
    return worker[1], text[start.end() :], re.search(r"\braise\b", statement) is not None


def describe(error: Exception) -> tuple[str, int]:
    """Return an error as one line, and the exit code: 2 for invalid input or an outage, 1 for what looks like a bug."""
    from dynadapter.cli.explain import innermost

    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, Mistake):
        return f"error: {error}{notes}", 2
    kind, message, on_purpose = _parts(error)
    line = one_line(message) if message.strip() else kind
    if words := outage(error):
        return f"error: {words} ({line}){notes} (--debug shows where)", 2
    if _is_input_error(error, message, on_purpose):
        return f"error: {as_typed(one_line(innermost(message or kind).text))}{notes} (--debug shows where)", 2
    return f"bug: {kind}: {line} (please report this with what --debug shows)", 1


def _is_input_error(error: Exception, message: str, on_purpose: bool) -> bool:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if isinstance(error, OSError | ImportError | UnicodeError | OverflowError | MisconfigurationException):
        return True
    if isinstance(error, ValueError) and re.search(r"embedded null|format string|islice\(\)|int too large", message):
        return True  # of a value that was given: Python itself refuses it
    return isinstance(error, ValueError | TypeError) and on_purpose


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
