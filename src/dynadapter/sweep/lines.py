"""The results of runs: one JSON line and the values that a bootstrap needs for each, and a lock while a run works."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dynadapter.exits.policies import confidence
from dynadapter.files import append as append_bytes
from dynadapter.files import replacing
from dynadapter.sweep.plan import Unit, as_unit

RESULTS = "results.jsonl"
PREDICTIONS = "predictions.npz"
LOGITS = "logits.npz"


@contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder; yield False where another process holds it.

    The operating system releases the lock when the process ends, however it ends.

    Args:
        folder: Created where it is missing.
        wait: Wait for the other process instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def read(out: Path) -> dict[Unit, dict[str, Any]]:
    """Read the finished runs of a sweep; the first line of a run counts.

    Args:
        out: Folder of the sweep.

    Raises:
        ValueError: A line is not a run's.
    """
    path = out / RESULTS
    if not path.exists():
        return {}
    content = path.read_bytes()
    done: dict[Unit, dict[str, Any]] = {}
    whole = content[: content.rfind(b"\n") + 1]  # a killed process may have left half a line
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            done.setdefault(as_unit(line), line)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not the line of a run: {error}; delete that line") from None
    return done


def append(out: Path, line: Mapping[str, Any]) -> None:
    """Append the line of a run; from then on the run counts as finished.

    Args:
        out: Folder of the sweep.
        line: Plain data; its key ``run`` names the run.
    """
    data = json.dumps(line, allow_nan=False).encode() + b"\n"
    with (out / RESULTS).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
        append_bytes(out / RESULTS, data)
        os.fsync(file.fileno())


def pack(folder: Path, logits: Tensor, targets: Tensor, files: Tensor, exit_index: Tensor) -> None:
    """Write what a bootstrap needs of each image, about 3 bytes an image and exit, and the logits in a second file.

    The arrays are ``predictions`` (exits, images), ``confidences`` (exits, images) float16, ``targets`` (images,),
    ``files`` (images,), ``exit_index`` (images,). Classes take one byte where they fit. The second file holds
    ``logits`` (exits, images, classes) float16.

    Args:
        folder: Folder of the run.
        logits: (exits, images, classes).
        targets: (images,).
        files: Places of the images in their list (images,), from 0.
        exit_index: Where each image exits by the policy (images,), from 0.
    """
    classes = np.uint8 if logits.shape[-1] <= 256 else np.uint16
    arrays: dict[str, Any] = {
        "predictions": logits.argmax(-1).numpy().astype(classes),
        "confidences": confidence(logits).numpy().astype(np.float16),
        "targets": targets.numpy().astype(classes),
        "files": files.numpy().astype(np.uint16 if len(files) < 2**16 else np.uint32),
        "exit_index": exit_index.numpy().astype(np.uint8),
    }
    half = logits.clamp(-65504, 65504).numpy().astype(np.float16)  # NaN stays
    for name, content in ((PREDICTIONS, arrays), (LOGITS, {"logits": half})):
        with replacing(folder / name) as file:
            np.savez_compressed(file, **content)
