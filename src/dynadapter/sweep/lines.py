"""Store the results of runs: one JSON line each, with the values for a bootstrap; and the lock of a run."""

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynadapter.exits.policies import confidence
from dynadapter.files import Busy, locked, replacing
from dynadapter.files import append as append_bytes
from dynadapter.sweep.plan import Line, Unit, as_unit

RESULTS = "results.jsonl"
PREDICTIONS = "predictions.npz"
LOGITS = "logits.npz"


@contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Create a folder and hold its lock; yield False if another process holds it, unless to wait for that."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait))
            mine = True
        except Busy:
            mine = False
        yield mine


def read(out: Path) -> dict[Unit, dict[str, Any]]:
    """Read the finished runs of a sweep; the last line of a run counts.

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
            done[as_unit(line)] = line
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number} is not the line of a run: {error}; delete that line") from None
    return done


def append(out: Path, line: Mapping[str, Any]) -> None:
    """Append the line of a run, after which the run counts as finished."""
    data = json.dumps(line, allow_nan=False).encode() + b"\n"
    with locked(out / RESULTS, wait=True), (out / RESULTS).open("a+b") as file:
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
        append_bytes(out / RESULTS, data)
        os.fsync(file.fileno())


def pack(folder: Path, logits: Tensor, targets: Tensor, files: Tensor) -> None:
    """Write the predictions of each image, and the logits in a second file.

    The arrays are ``predictions`` (exits, images), ``confidences`` (exits, images) float16, ``targets`` (images,) and
    ``files`` (images,). Classes take one byte where they fit. The second file holds ``logits`` (exits, images,
    classes) float16.

    Args:
        folder: Folder of the run.
        logits: (exits, images, classes).
        targets: (images,).
        files: Index of each image in its list (images,), from 0.
    """
    classes = np.uint8 if logits.shape[-1] <= 256 else np.uint16
    arrays: dict[str, Any] = {
        "predictions": logits.argmax(-1).numpy().astype(classes),
        "confidences": confidence(logits).numpy().astype(np.float16),
        "targets": targets.numpy().astype(classes),
        "files": files.numpy().astype(np.uint16 if len(files) < 2**16 else np.uint32),
    }
    half = logits.clamp(-65504, 65504).numpy().astype(np.float16)  # NaN stays
    for name, content in ((PREDICTIONS, arrays), (LOGITS, {"logits": half})):
        with replacing(folder / name) as file:
            np.savez_compressed(file, **content)


def require_logits(folder: Path) -> None:
    """Check that a folder has what :func:`pack` wrote.

    Raises:
        FileNotFoundError: A file is missing.
    """
    if (missing := next(_missing(folder), None)) is not None:
        raise FileNotFoundError(
            f"{missing} is missing, and thresholds come from it: restore the run folder, or delete the run's line in "
            f"{RESULTS} to train it again"
        )


def has_logits(folder: Path) -> bool:
    """Check whether a folder has what :func:`pack` wrote."""
    return next(_missing(folder), None) is None


def _missing(folder: Path) -> Iterator[Path]:
    return (folder / name for name in (PREDICTIONS, LOGITS) if not (folder / name).exists())


def unpack(folder: Path) -> tuple[Tensor, Tensor]:
    """Read the logits (exits, images, classes) float32 and the targets (images,) that :func:`pack` wrote."""
    with np.load(folder / LOGITS) as logits, np.load(folder / PREDICTIONS) as others:
        return torch.from_numpy(logits["logits"]).float(), torch.from_numpy(others["targets"].astype(np.int64))


def as_text(images: Mapping[str, np.ndarray]) -> str:
    """Return arrays of images as text for a line: a compressed ``.npz`` in base64; bool arrays take a bit an entry.

    Args:
        images: Arrays (..., images), bool or small integers.
    """
    arrays: dict[str, Any] = {
        name: np.packbits(array, axis=-1) if array.dtype == bool else array for name, array in images.items()
    }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return base64.b64encode(file.getvalue()).decode()


def right_of(line: Line) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return which images a run gets right, from its line.

    Returns:
        By each way and exit (ways, exits, images), and by each policy (images,), both bool.
    """
    with np.load(io.BytesIO(base64.b64decode(line["per_image"]))) as packed:
        right, routed = (
            np.unpackbits(packed[name], axis=-1, count=line["images"]).astype(bool) for name in ("right", "routed")
        )
    return right, dict(zip(reached(line["policies"]), routed, strict=True))


def exit_index_of(line: Line) -> dict[str, np.ndarray]:
    """Return the exit index of each image by each policy of a run (images,), uint8 from 0, from its line."""
    with np.load(io.BytesIO(base64.b64decode(line["per_image"]))) as packed:
        return dict(zip(reached(line["policies"]), packed["exit_index"], strict=True))


def reached(policies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the goals that a run reached; the values of each image have their order."""
    return [name for name, entry in policies.items() if "unreached" not in entry]
