"""Run the graphs of an exported folder, and stop each image at the first exit where the policy allows it."""

import hashlib
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynadapter.files import read_whole
from dynadapter.images.memory import usable_cores
from dynadapter.images.reading import SOURCES, Source, UnreadableImage, find_images, is_source, source_name
from dynadapter.serve.runtime.manifest import Stage, read_manifest
from dynadapter.serve.runtime.policies import Floats, confidence
from dynadapter.serve.runtime.sessions import ENGINES, Provider, Session

CHUNK = 16
"""Images that one CPU thread routes at a time; more do not fit its caches (measured by ``benchmarks/serving.py``)."""


class Prediction(NamedTuple):
    """The answer for one image.

    ``file`` is None for an image in memory, ``label`` the name of the class and ``class_index`` its index,
    ``confidence`` its softmax probability in [0, 1] after the exit's temperature, and ``exit_index`` the zero-based
    exit at which the image stopped.
    """

    file: str | None
    label: str
    class_index: int
    confidence: float
    exit_index: int


class Runner:
    """An exported folder, ready to run with ONNX Runtime or OpenVINO.

    The files are checked at once. The session of a stage is created when the first image needs it; if its file has
    changed since, that is a ValueError. Several threads may use one runner. On a CPU, large batches are split, and all
    stages of ONNX Runtime allocate from one arena, so that the memory of the stage before is still in the caches::

        runner = Runner("exported")
        for prediction in runner.predict("photos", batch_size=8):
            print(prediction.file, prediction.label, prediction.confidence)

    Args:
        folder: The exported folder.
        providers: Execution providers of ONNX Runtime, as for ``InferenceSession``; None for the CPU.
        threads: Threads of an operator; None for one on each core.
        engine: ``onnxruntime``, or ``openvino``, on the CPU.

    Attributes:
        manifest: The checked content of ``manifest.json``.
        policy: Decides at which exit an image stops; initially that of the manifest.
        chunk: Images that run at a time on a CPU; None for whole batches elsewhere.

    Raises:
        ValueError: The folder or an argument cannot be used.
        ImportError: The engine is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        engine: str = "onnxruntime",
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is unknown; choose from: {', '.join(ENGINES)}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"threads={threads!r} must be a whole number of at least 1, or None for all cores")
        self.engine = ENGINES[engine](providers, threads)
        self.manifest = read_manifest(folder)
        self.engine.check(self.manifest.content)
        self.policy = self.manifest.policy
        self.chunk = CHUNK * (threads or usable_cores()) if self.engine.on_cpu else None
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()

    @property
    def num_exits(self) -> int:
        """Number of exits, the last one included."""
        return len(self.manifest.stages)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their indices."""
        return self.manifest.class_names

    def load(self) -> "Runner":
        """Create the sessions of all stages now, so that no image waits for it, and return this runner."""
        for k in range(self.num_exits):
            self._session(k)
        return self

    def _session(self, k: int) -> Session:
        with self._lock:
            if k not in self._sessions:
                self._sessions[k] = self._open(self.manifest.stages[k])
            return self._sessions[k]

    def _open(self, stage: Stage) -> Session:
        try:
            graph = read_whole(stage.file)
            if hashlib.sha256(graph).hexdigest() == stage.sha256:
                return self.engine.open(graph)
        except FileNotFoundError:
            pass
        except Exception as error:  # the engines' own types have no common base
            raise ValueError(f"{self.engine.name} cannot open {stage.file}: {' '.join(str(error).split())}") from error
        raise ValueError(f"{stage.file} has changed since it was opened; open the folder again")

    def stage(self, k: int, inputs: Sequence[Floats]) -> tuple[list[Floats], Floats]:
        """Run one stage.

        Args:
            k: Zero-based stage.
            inputs: Outputs of the stage before, each (batch, ...); the images for stage 0.

        Returns:
            The inputs of the next stage (none after the last one), and the logits (batch, classes).
        """
        stage = self.manifest.stages[k]
        *rest, logits = self._session(k)(stage.outputs, dict(zip(stage.inputs, inputs, strict=True)))
        return rest, logits

    def route(self, images: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Stop each image at the first exit where the policy allows it; the others continue as a smaller batch.

        Args:
            images: (batch, 3, size, size) float32, preprocessed; an empty batch gives an empty result.

        Returns:
            The logits (batch, classes) of the exit at which each image stopped, and that zero-based exit (batch,), in
            the order of `images`.

        Raises:
            ValueError: The array has another shape or type.
        """
        images = self._check(images)
        if self.chunk and len(images) > self.chunk:
            parts = [self.route(images[start : start + self.chunk]) for start in range(0, len(images), self.chunk)]
            return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        inputs = [images]
        rows = np.arange(len(images))  # positions in the batch of the images that still run
        exit_index = np.zeros(len(images), np.int64)
        out = np.zeros((len(images), len(self.class_names)), np.float32)
        history = np.empty((0, *out.shape), np.float32)  # (exits so far, running images, classes)
        for k in range(self.num_exits):
            if not len(rows):
                break
            inputs, logits = self.stage(k, inputs)
            history = np.concatenate([history, logits[None]])
            out[rows], exit_index[rows] = self.policy.combine(history)[-1], k
            if k == self.num_exits - 1:
                break
            stay = ~self.policy.stops(history)
            if not stay.all():
                inputs, rows, history = [x[stay] for x in inputs], rows[stay], history[:, stay]
        return out, exit_index

    def every_exit(self, images: Floats) -> Floats:
        """Run all stages: images (batch, 3, size, size) float32 to logits (exits, batch, classes).

        Use these logits to calibrate thresholds on the exported graphs, for example in int8.
        """
        images = self._check(images)
        if self.chunk and len(images) > self.chunk:
            chunks = [images[start : start + self.chunk] for start in range(0, len(images), self.chunk)]
            return np.concatenate([self.every_exit(chunk) for chunk in chunks], axis=1)
        inputs = [images]
        logits = np.zeros((self.num_exits, len(images), len(self.class_names)), np.float32)
        for k in range(self.num_exits if len(images) else 0):
            inputs, logits[k] = self.stage(k, inputs)
        return logits

    def predict(
        self,
        images: Source | Iterable[Source] | Floats,
        batch_size: int = 32,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[Prediction]:
        """Read, preprocess and classify images.

        Args:
            images: A folder (searched with its subfolders), an image as :func:`~dynadapter.images.reading.load_image`
                takes it (path, bytes, open file, Pillow image, array), or several of these; or an array (batch, 3,
                size, size) float32 that is preprocessed already.
            batch_size: Images that are read and routed at once.
            on_error: ``raise`` at the first image that cannot be read, or ``skip`` it with a warning.

        Returns:
            One prediction for each image, in order.

        Raises:
            UnreadableImage: An image cannot be read, and `on_error` is ``raise``.
            ValueError: There is no image, or an argument cannot be used.
            OSError: The machine fails to read a file or a folder.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"unknown on_error {on_error!r}; choose from: raise, skip")
        preprocessed = isinstance(images, np.ndarray) and images.ndim == 1 + len(self.manifest.image_shape)
        sources = self._check(images) if preprocessed else list_sources(images)  # type: ignore[arg-type]
        if not len(sources):
            raise ValueError(f"there is not an image; give folders, or {SOURCES}")
        if not preprocessed and len(self.manifest.image_shape) > 3:
            shape = ", ".join(map(str, self.manifest.image_shape))
            raise ValueError(f"this folder takes clips of videos, no image files; give an array (batch, {shape})")
        predictions: list[Prediction] = []
        skipped: list[str] = []
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            if isinstance(batch, np.ndarray):
                predictions += self._classify([None] * len(batch), batch)
            else:
                predictions += self._classify(*self._read(batch, on_error, skipped))
        if skipped:
            message = f"skipped {len(skipped)} of {len(sources)} images: {'; '.join(skipped)}"
            warnings.warn(message, stacklevel=2)
        return predictions

    def _read(self, sources: Sequence[Source], on_error: str, skipped: list[str]) -> tuple[list[str | None], Floats]:
        """Read images and return their names and arrays (images, 3, size, size); add unreadable ones to `skipped`."""
        names: list[str | None] = []
        arrays = []
        preprocess = self.manifest.preprocess
        for source in sources:
            name = source_name(source)
            try:
                arrays.append(preprocess.read(source))
            except UnreadableImage as error:
                if on_error == "raise":
                    raise
                skipped.append(f"{name or 'an image in memory'} ({error.reason})")
                continue
            names.append(name)
        empty = np.empty((0, 3, preprocess.image_size, preprocess.image_size), np.uint8)
        return names, preprocess.normalize(np.stack(arrays) if arrays else empty)

    def _classify(self, files: Sequence[str | None], images: Floats) -> list[Prediction]:
        logits, exit_index = self.route(images)
        if nonfinite := int((~np.isfinite(logits).all(-1)).sum()):
            raise ValueError(
                f"{nonfinite} of {len(images)} images have logits that are not finite; the exported graphs, or the "
                "images' values, are broken"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            sure = confidence(logits).tolist()
        best = logits.argmax(-1).tolist()
        names = [self.class_names[index] for index in best]
        return [Prediction(*row) for row in zip(files, names, best, sure, exit_index.tolist(), strict=True)]

    def _check(self, images: Floats) -> Floats:
        wanted = self.manifest.image_shape
        if not isinstance(images, np.ndarray) or images.shape[1:] != wanted or images.dtype != np.float32:
            given = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"images are {given}; give a float32 array (batch, {shape}), or files")
        return images


def list_sources(images: Source | Iterable[Source]) -> list[Source]:
    """List images: the files of a folder and its subfolders, a file, an image in memory, or several of these."""
    found: list[Source] = []
    sources: Iterable[Any] = [images] if is_source(images) else images  # type: ignore[assignment]
    for source in sources:
        if isinstance(source, str | os.PathLike):
            path = Path(os.path.expanduser(source))
            found += find_images(path) if path.is_dir() else [path]  # reading reports a missing file
        elif is_source(source):
            found.append(source)
        else:
            raise ValueError(f"an image is a {type(source).__name__}; give folders, or {SOURCES}")
    return found
