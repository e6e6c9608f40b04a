"""Runs an exported folder: image files in, classes out, with nothing but numpy, onnxruntime and Pillow.

The folder is what ``dynadapter.serve.export.export_onnx`` writes: a graph for each stage and ``manifest.json``. An
image leaves at the first exit that is sure, and a stage that nobody needs is neither loaded nor run.

    runner = Runner("exported")
    for prediction in runner.predict("photos", batch_size=8):
        print(prediction.file, prediction.class_name, prediction.confidence)

From a shell: ``python -m dynadapter.serve.runtime exported photos > predictions.csv``.

The file imports nothing of its own package, so that it can be copied to a server by itself. What it repeats, reading
images and the policies, is held to :mod:`dynadapter.data` and :mod:`dynadapter.exits.policies` by tests.
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMAT = 1
"""Version of the folder's layout and manifest."""
CHUNK = 16
"""Images that a CPU's thread routes at a time; more leave its caches (ours, by ``benchmarks/serving.py``)."""

Floats = NDArray[np.float32]
Source = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says about one image.

    Args:
        file: Where the image came from; None for one that was in memory.
        class_name: Name of the class.
        index: Its index.
        confidence: The largest softmax probability, in [0, 1], with the exit's temperature where there is one.
        exit: Where the image left, zero-based.
    """

    file: str | None
    class_name: str
    index: int
    confidence: float
    exit: int


# ---- policies --------------------------------------------------------------------------------------------------------


def softmax(logits: Floats) -> Floats:
    """Gives the probabilities of logits (..., classes)."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def confidence(logits: Floats) -> Floats:
    """Gives the largest softmax probability, in [1 / classes, 1]: (..., classes) to (...)."""
    return softmax(logits).max(-1)


def entropy(logits: Floats) -> Floats:
    """Gives the entropy of the softmax over log(classes), in [0, 1]: (..., classes) to (...)."""
    centred = logits - logits.max(-1, keepdims=True)
    log_p = centred - np.log(np.exp(centred).sum(-1, keepdims=True))
    greatest = np.float32(math.log(max(logits.shape[-1], 2)))  # a single class has entropy 0 over anything
    return np.clip(-(np.exp(log_p) * log_p).sum(-1) / greatest, 0, 1)


def margin(logits: Floats) -> Floats:
    """Gives how far the largest softmax probability is above the second, in [0, 1]: (..., classes) to (...)."""
    p = softmax(logits)
    if p.shape[-1] == 1:
        return p[..., 0]
    highest = np.partition(p, -2, axis=-1)
    return highest[..., -1] - highest[..., -2]


# Which score a kind compares with its threshold, and how.
_SCORES: dict[str, tuple[Callable[[Floats], Floats], Callable[..., Any]]] = {
    "Confidence": (confidence, np.greater_equal),
    "Entropy": (entropy, np.less_equal),
    "Margin": (margin, np.greater_equal),
}
POLICIES = (*_SCORES, "Patience", "Never")


class Policy:
    """Says who leaves at an exit, as the class of the same name in :mod:`dynadapter.exits.policies` does.

    >>> policy = Policy({"kind": "Confidence", "threshold": 0.8}, exits=2)
    >>> policy.leave(np.array([[[2.0, 0.0], [1.0, 0.0]]], dtype=np.float32))  # confidence 0.88 and 0.73
    array([ True, False])

    Args:
        settings: The kind and its fields: ``threshold``, one number or one for each early exit, or ``patience``.
        exits: Number of exits, the last included.
        temperatures: By which each exit's logits are divided first, (exits,); None for no division.

    Raises:
        ValueError: If the kind is unknown, or its fields or the temperatures do not fit.
    """

    def __init__(self, settings: dict[str, Any], exits: int, temperatures: Sequence[float] | None = None) -> None:
        self.settings = settings
        self.kind = settings.get("kind")
        if self.kind not in POLICIES:
            raise ValueError(f"unknown policy {self.kind!r}; choose from: {', '.join(POLICIES)}")
        fields = {"kind", "threshold"} if self.kind in _SCORES else {"kind", "patience"}
        if settings.keys() != (fields if self.kind != "Never" else {"kind"}):
            raise ValueError(
                f"policy {self.kind} has the fields {', '.join(settings)}; it takes {', '.join(sorted(fields))}"
            )
        self.thresholds = np.empty(0, np.float32)
        if self.kind in _SCORES:
            given = settings["threshold"]
            values = given if isinstance(given, list | tuple) else [given] * (exits - 1)
            if len(values) != exits - 1 or not all(_number(value) and 0 <= value <= 1 for value in [*values]):
                raise ValueError(
                    f"threshold={given!r} does not fit {exits} exits; give one number in [0, 1], or {exits - 1}, one "
                    "for each early exit"
                )
            self.thresholds = np.asarray(values, np.float32)
        self.patience = settings.get("patience", 1)
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"patience={self.patience!r} must be a whole number of at least 1")
        if temperatures is not None and (
            len(temperatures) != exits or not all(_number(t) and 0 < t < math.inf for t in temperatures)
        ):
            raise ValueError(
                f"temperatures={temperatures!r} do not fit; give {exits} numbers above 0, one for each exit"
            )
        self.temperatures = np.ones(exits, np.float32) if temperatures is None else np.asarray(temperatures, np.float32)

    def leave(self, history: Floats) -> NDArray[np.bool_]:
        """Says which samples leave at the newest exit; one whose logits there are not finite never does.

        Args:
            history: Logits (exits so far, batch, classes), the newest last; the last exit of the network is not asked.

        Returns:
            (batch,) bool.
        """
        k = len(history) - 1
        with np.errstate(over="ignore", invalid="ignore"):  # whatever is not finite is sorted out by `finite`
            tempered = history / self.temperatures[: k + 1, None, None]
            finite = np.isfinite(tempered).all(-1)  # (exits so far, batch)
            if self.kind in _SCORES:
                score, beyond = _SCORES[self.kind]
                sure = beyond(score(tempered[-1]), self.thresholds[k])
            elif self.kind == "Patience" and len(history) >= self.patience:
                classes = tempered[-self.patience :].argmax(-1)
                sure = ((classes == classes[-1]) & finite[-self.patience :]).all(0)
            else:
                sure = np.zeros(history.shape[1], bool)
        return sure & finite[-1]

    def route(self, logits: Floats) -> NDArray[np.int64]:
        """Says at which exit each sample leaves, from the logits of all exits (exits, samples, classes)."""
        taken = np.full(logits.shape[1], len(logits) - 1, np.int64)
        for k in reversed(range(len(logits) - 1)):  # the earliest exit writes last
            taken[self.leave(logits[: k + 1])] = k
        return taken


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# ---- images ----------------------------------------------------------------------------------------------------------

# By name, because Pillow would otherwise also try formats that run outside programs (EPS calls Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 178_956_970
"""More pixels than this are refused before they are decoded."""
MAX_BYTES = 2**31
"""Larger files are refused."""

Interpolation = Literal["bicubic", "bilinear", "nearest"]
Resize = Literal["stretch", "crop"]
_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class UnreadableImage(ValueError):
    """An image that cannot be decoded.

    Args:
        source: The file, or the image in memory.
        reason: Why, in a few words.
    """

    def __init__(self, source: Source, reason: str) -> None:
        name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(source))
        super().__init__(f"cannot read image {name}: {reason}; repair it, take it out, or skip it (on_error='skip')")
        self.source = source
        self.reason = reason


def load_image(source: Source) -> Image.Image:
    """Decodes a file, or takes an image as it is, and gives its pixels as 8-bit RGB, upright.

    Raises:
        UnreadableImage: If the file is missing, broken, or of another format.
    """
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        with _open_regular(source) as file, _open_image(file) as image:
            return _to_rgb(_upright(image))
    except Exception as error:  # decoders fail with many types on damaged bytes
        reason = _reason(error)
    raise UnreadableImage(source, reason)


def _open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file to read it, and nothing that only looks like one: a pipe would make the reader wait for ever."""
    _check_regular(os.stat(path).st_mode, path)  # first, because opening some devices does something already
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle).st_mode, path)  # again, because it may have been exchanged
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file", str(path))


def _open_image(file: BinaryIO) -> Image.Image:
    """Reads the head of an image, and refuses one with too many pixels to decode."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("the file is empty")
    if size > MAX_BYTES:  # some decoders read a file whole, and one with holes costs nothing to make
        raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}, no image is that large")
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}, could be a decompression bomb"
        )
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own words repeat the path
        return f"not an image of a known format ({', '.join(FORMATS)})"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def _upright(image: Image.Image) -> Image.Image:
    """Turns a photograph the way its EXIF orientation says; damaged EXIF data leave it as stored."""
    image.load()  # first, so that only what is wrong beside the pixels is forgiven
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB: 16-bit grey keeps its high byte, transparent pixels lie on white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError(f"32-bit grey values from {grey.min()} to {grey.max()}; expected 8 or 16 bits")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels have no known range; expected 8 or 16 bits")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """What happens to every image, bit for bit as in training: resize, scale to [0, 1], normalise.

    >>> Preprocess(image_size=32)(Image.new("L", (8, 8))).shape
    (3, 32, 32)

    Args:
        image_size: Height and width of the result in pixels.
        interpolation: How pixels are resampled.
        resize: ``stretch`` to the square, or ``crop`` its centre after the shorter side fits.
        normalization: ``imagenet``, ``half``, ``none``, or a pair (mean, deviation), each with a value per colour.

    Raises:
        ValueError: If a value is none of these.
    """

    image_size: int = 224
    interpolation: Interpolation = "bicubic"
    resize: Resize = "stretch"
    normalization: Any = "imagenet"

    def __post_init__(self) -> None:
        if isinstance(self.image_size, bool) or not isinstance(self.image_size, int) or self.image_size < 1:
            raise ValueError(f"image_size={self.image_size!r} must be a whole number of at least 1 pixel")
        for name, kind in (("interpolation", Interpolation), ("resize", Resize)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"unknown {name} {value!r}; choose from: {', '.join(get_args(kind))}")
        try:
            statistics = np.asarray(self.statistics, np.float64)
            fits = statistics.shape == (2, 3) and np.isfinite(statistics).all() and bool((statistics[1] > 0).all())
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"unknown normalization {self.normalization!r}; choose from: {', '.join(_STATISTICS)}, or a pair (mean "
                "of 3 colours, deviation of 3 colours above 0)"
            )

    @property
    def statistics(self) -> Any:
        """Mean and deviation of the three colours, for pixels in [0, 1]."""
        if isinstance(self.normalization, str):
            return _STATISTICS.get(self.normalization)
        return self.normalization

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resizes an image and gives its bytes, (3, size, size) uint8."""
        size, image = self.image_size, image.convert("RGB")
        width, height = image.size
        short = min(width, height)
        wanted = (size, size)
        if self.resize == "crop":
            # Rounded as torchvision does it: the longer side down, the corner of the square to the nearest pixel.
            wanted = (int(size * width / short), int(size * height / short))
        if wanted != image.size:
            image = image.resize(wanted, Image.Resampling[self.interpolation.upper()])
        left, top = (round((side - size) / 2) for side in wanted)
        square = image.crop((left, top, left + size, top + size))
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    def normalize(self, pixels: NDArray[np.uint8]) -> Floats:
        """Turns bytes (..., 3, size, size) into float32 of the same shape."""
        mean, deviation = np.asarray(self.statistics, np.float32)[..., None, None]
        return (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / deviation

    def __call__(self, image: Image.Image) -> Floats:
        """Turns a decoded image into (3, size, size) float32."""
        return self.normalize(self.pixels(image))


def find_images(places: Source | Iterable[Source]) -> list[Source]:
    """Lists images: those of a folder and below sorted by path, a file, an image in memory, or several of these.

    Raises:
        ValueError: If a folder holds no image, something is no image, or nothing is given.
    """
    if isinstance(places, str | os.PathLike | Image.Image):
        places = [places]
    found: list[Source] = []
    for place in places:
        if isinstance(place, Image.Image):
            found.append(place)
            continue
        if not isinstance(place, str | os.PathLike):
            raise ValueError(f"{type(place).__name__} is no image; give files, folders, Pillow images or one array")
        path = Path(place).expanduser()
        inside = _files_in(path) if path.is_dir() else [path]  # what is no file is found out when it is read
        if not inside:
            raise ValueError(f"no image in {path}: looked for files ending in {', '.join(SUFFIXES)}")
        found += inside
    if not found:
        raise ValueError("the list of images is empty; give files, folders, Pillow images or one array")
    return found


def _files_in(folder: Path) -> list[Path]:
    """Lists the image files in a folder and below; hidden ones stay hidden."""
    found, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for path, entry in ((Path(entry.path), entry) for entry in entries if not entry.name.startswith(".")):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif path.suffix.lower() in SUFFIXES and path.is_file():
                    found.append(path)
    return sorted(found)


# ---- the folder ------------------------------------------------------------------------------------------------------


class Manifest:
    """What ``manifest.json`` says, checked against the files beside it.

    Args:
        folder: The exported folder.
        kind: What the folder has to hold: ``onnx`` or ``torch.export``.

    Attributes:
        content: The file's own content.
        files: The stages' files in order.
        num_exits: Number of exits.
        class_names: Names of the classes, in the order of their indices.
        preprocess: From image to array.
        policy: Who leaves where.
        image_shape: Channels, height and width of an image.

    Raises:
        ValueError: If a file is missing, damaged or another one than was exported, or the manifest cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], kind: str = "onnx") -> None:
        self.folder = Path(folder).expanduser()
        self.content = _read_json(self.folder / "manifest.json")
        _check_format(self.content, kind, self.folder)
        if self.content.pop("checksum", None) not in (None, checksum(self.content)):
            raise ValueError(
                f"{self.folder / 'manifest.json'} is not as it was written: copy the exported folder again; if you "
                "changed something on purpose, take the entry 'checksum' out"
            )
        try:
            self._read()
        except KeyError as error:
            self._refuse(f"has no {error}")
        except (AttributeError, IndexError, TypeError) as error:
            self._refuse(f"does not hold what it should ({error})")
        except ValueError as error:
            self._refuse(f"cannot be used: {error}")
        for file, stage in zip(self.files, self.content["stages"], strict=True):
            _check_file(file, stage)

    def _read(self) -> None:
        content = self.content
        self.stages: list[dict[str, Any]] = [
            {
                "file": stage["file"],
                "sha256": stage["sha256"],
                "bytes": stage["bytes"],
                "inputs": [tensor["name"] for tensor in stage["inputs"]],
                "outputs": [tensor["name"] for tensor in stage["outputs"]],
            }
            for stage in content["stages"]
        ]
        self.num_exits = len(self.stages)
        if not self.num_exits:
            raise ValueError("it names no stage")
        for stage in self.stages:
            if Path(stage["file"]).name != stage["file"]:
                raise ValueError(f"the stage file {stage['file']!r} is not a plain name")
        self.files = [self.folder / stage["file"] for stage in self.stages]
        self.class_names = [str(name) for name in content["class_names"]]
        for before, after in pairwise(self.stages):
            if len(before["outputs"]) != len(after["inputs"]) + 1:
                raise ValueError(f"what {before['file']} gives is not what {after['file']} takes, and logits")
        self.image_shape = tuple(content["stages"][0]["inputs"][0]["shape"][1:])
        classes = content["stages"][-1]["outputs"][-1]["shape"][-1]
        if len(self.class_names) != classes:
            raise ValueError(f"it names {len(self.class_names)} classes, the graphs have {classes}")
        self.preprocess = Preprocess(**content["preprocessing"])
        if self.image_shape != (3, self.preprocess.image_size, self.preprocess.image_size):
            raise ValueError(f"images of {self.preprocess.image_size} pixels do not fit the input {self.image_shape}")
        self.policy = Policy(content["policy"], self.num_exits, content["temperatures"])

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self.folder / 'manifest.json'} {why}; export the model again, or mend the file") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a folder that was written by export") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ValueError(f"{path} is not JSON ({error}); copy the exported folder again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no manifest: it holds a {type(content).__name__}; copy the exported folder again")
    return content


def _check_format(content: dict[str, Any], kind: str, folder: Path) -> None:
    version = content.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(
            f"{folder / 'manifest.json'} has format={version!r}; it was not written by dynadapter's export"
        )
    if version > FORMAT:
        raise ValueError(f"{folder} has format {version}, this dynadapter reads up to {FORMAT}; update dynadapter")
    if content.get("kind") != kind:
        readers = {"onnx": "dynadapter.serve.runtime.Runner", "torch.export": "dynadapter.serve.export.load_programs"}
        reader = readers.get(str(content.get("kind")))
        advice = f"open it with {reader}" if reader else f"known are {', '.join(readers)}"
        raise ValueError(f"{folder} holds stages of the kind {content.get('kind')!r}, not {kind!r}; {advice}")


def _check_file(file: Path, stage: dict[str, Any]) -> None:
    """Makes sure that a stage's file is the one that was exported."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; copy the whole exported folder again")
    size = file.stat().st_size
    if size != stage["bytes"]:
        raise ValueError(f"{file} has {size} bytes instead of {stage['bytes']}; copy the exported folder again")
    digest = sha256(file)
    if digest != stage["sha256"]:
        raise ValueError(
            f"{file} is not the file that was exported: its SHA-256 starts with {digest[:12]}, the manifest's with "
            f"{str(stage['sha256'])[:12]}; copy the exported folder again"
        )


def checksum(content: Mapping[str, Any]) -> str:
    """Gives the hash of what a manifest says, whatever its layout, as 64 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(file: Path) -> str:
    """Gives the hash of a file's bytes as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- running it ------------------------------------------------------------------------------------------------------


class Runner:
    """Runs the stages of an exported folder with ONNX Runtime and lets each image leave at the first sure exit.

    The files are checked at once; a stage's session is created when the first image needs it. One runner may be used
    by several threads. On a CPU large batches are cut, and the stages take their memory from one place, for a stage
    that runs where the one before has just been finds it in the caches.

    Args:
        folder: What ``export_onnx`` wrote.
        providers: ONNX Runtime's execution providers, as in ``InferenceSession``; None for the CPU.
        threads: Threads of an operator; None for one on each core.

    Attributes:
        class_names: Names of the classes, in the order of their indices.
        preprocess: From a decoded image to an array.
        policy: Who leaves where.
        num_exits: Number of exits, the last included.
        chunk: Images that run at a time; None for all of a batch, on anything but a CPU.
        manifest: The content of ``manifest.json``.

    Raises:
        ValueError: If the folder or an argument cannot be used.
        ImportError: If onnxruntime is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
        threads: int | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("the runner needs ONNX Runtime: pip install onnxruntime") from error
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"threads={threads!r} must be a whole number of at least 1, or None for all cores")
        self.providers = list(providers or ["CPUExecutionProvider"])
        there = onnxruntime.get_available_providers()
        for provider in self.providers:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in there:
                raise ValueError(f"this ONNX Runtime has no provider {name!r}; choose from: {', '.join(there)}")
        checked = Manifest(folder)
        self.manifest = checked.content
        self.class_names = checked.class_names
        self.preprocess = checked.preprocess
        self.policy = checked.policy
        self.num_exits = checked.num_exits
        self._folder = checked
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3  # errors come back as exceptions; the rest is of no use to a caller
        self._options.intra_op_num_threads = threads or 0
        # Each stage has threads of its own, and those of the stages before would spin where this one wants to run.
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.chunk: int | None = None
        if self.providers == ["CPUExecutionProvider"]:
            self.chunk = CHUNK * (threads or os.cpu_count() or 1)
            _share_memory(onnxruntime, self._options)
        self._open = onnxruntime.InferenceSession
        self._sessions: dict[int, Any] = {}
        self._lock = threading.Lock()

    def load(self) -> "Runner":
        """Creates the sessions of all stages now, so that no image waits for one."""
        for k in range(self.num_exits):
            self._session(k)
        return self

    def _session(self, k: int) -> Any:
        with self._lock:
            if k not in self._sessions:
                file = self._folder.files[k]
                try:
                    self._sessions[k] = self._open(file, self._options, providers=self.providers)
                except Exception as error:  # onnxruntime's own types have no common base
                    raise ValueError(f"ONNX Runtime cannot open {file}: {' '.join(str(error).split())}") from error
            return self._sessions[k]

    def stage(self, k: int, held: Sequence[Floats]) -> tuple[list[Floats], Floats]:
        """Runs one stage for everybody who is still in.

        Args:
            k: Zero-based stage.
            held: What the stage before gave, each (batch, ...); the images for stage 0.

        Returns:
            What the next stage takes (nothing from the last one), and the logits (batch, classes).
        """
        stage = self._folder.stages[k]
        *rest, logits = self._session(k).run(stage["outputs"], dict(zip(stage["inputs"], held, strict=True)))
        return rest, logits

    def route(self, images: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Lets each image leave at the first exit where the policy is sure; the rest goes on as a smaller batch.

        Args:
            images: (batch, 3, size, size) float32, preprocessed; an empty batch gives an empty result.

        Returns:
            The logits (batch, classes) of the exit at which each image left, and that exit (batch,), zero-based, both
            in the order of ``images``.

        Raises:
            ValueError: If the array has another shape or type.
        """
        images = self._checked(images)
        if self.chunk and len(images) > self.chunk:
            parts = [self.route(part) for part in self._cut(images)]
            return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        held = [images]
        rows = np.arange(len(images))  # where the images still in stand in the batch
        exits = np.zeros(len(images), np.int64)
        out = np.zeros((len(images), len(self.class_names)), np.float32)
        history = np.empty((0, *out.shape), np.float32)  # (exits so far, still in, classes)
        for k in range(self.num_exits):
            if not len(rows):
                break
            held, logits = self.stage(k, held)
            out[rows], exits[rows] = logits, k
            if k == self.num_exits - 1:
                break
            history = np.concatenate([history, logits[None]])
            stay = ~self.policy.leave(history)
            if not stay.all():
                held, rows, history = [x[stay] for x in held], rows[stay], history[:, stay]
        return out, exits

    def every_exit(self, images: Floats) -> Floats:
        """Runs all stages for all images: (batch, 3, size, size) float32 to logits (exits, batch, classes).

        From these logits thresholds can be calibrated on what really runs, an int8 folder for one.
        """
        images = self._checked(images)
        if self.chunk and len(images) > self.chunk:
            return np.concatenate([self.every_exit(part) for part in self._cut(images)], axis=1)
        held = [images]
        logits = np.zeros((self.num_exits, len(images), len(self.class_names)), np.float32)
        for k in range(self.num_exits if len(images) else 0):
            held, logits[k] = self.stage(k, held)
        return logits

    def _cut(self, images: Floats) -> list[Floats]:
        assert self.chunk is not None
        return [images[start : start + self.chunk] for start in range(0, len(images), self.chunk)]

    def predict(
        self,
        images: Source | Iterable[Source] | Floats,
        batch_size: int = 32,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> list[Prediction]:
        """Reads, preprocesses and classifies images.

        Args:
            images: A file, a folder (searched with its subfolders), a Pillow image, or several of these; or an array
                (batch, 3, size, size) float32 that is preprocessed already.
            batch_size: Images in a batch.
            on_error: ``raise`` at the first image that cannot be read, or ``skip``, which warns and leaves it out.

        Returns:
            One prediction for each image, in the order in which they were given.

        Raises:
            UnreadableImage: If an image cannot be read, unless it is to be skipped.
            ValueError: If there is no image, or an argument cannot be used.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"unknown on_error {on_error!r}; choose from: raise, skip")
        sources = self._checked(images) if isinstance(images, np.ndarray) else find_images(images)
        if not len(sources):
            raise ValueError("the array of images is empty; give at least one image")
        predictions, skipped = [], []
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            files: list[str | None] = [None] * len(batch)
            if not isinstance(batch, np.ndarray):
                files, batch, broken = self._read(batch)
                if broken and on_error == "raise":
                    raise broken[0]
                skipped += broken
            predictions += self._classify(files, batch)
        if skipped:
            told = "; ".join(f"{error.source} ({error.reason})" for error in skipped)
            warnings.warn(f"skipped {len(skipped)} of {len(sources)} images: {told}", stacklevel=2)
        return predictions

    def _read(self, sources: Sequence[Source]) -> tuple[list[str | None], Floats, list[UnreadableImage]]:
        """Reads files; gives the names and pixels (images, 3, size, size) of those that can be read, and the others."""
        names: list[str | None] = []
        arrays, broken = [], []
        for source in sources:
            try:
                arrays.append(self.preprocess.pixels(load_image(source)))
            except UnreadableImage as error:
                broken.append(error)
                continue
            # A Pillow image remembers its file, where there was one.
            names.append(getattr(source, "filename", None) or None if isinstance(source, Image.Image) else str(source))
        size = self.preprocess.image_size
        pixels = np.stack(arrays) if arrays else np.empty((0, 3, size, size), np.uint8)
        return names, self.preprocess.normalize(pixels), broken

    def _classify(self, files: Sequence[str | None], images: Floats) -> list[Prediction]:
        logits, exits = self.route(images)
        odd = int((~np.isfinite(logits).all(-1)).sum())
        if odd:
            warnings.warn(
                f"{odd} of {len(images)} images have logits that are not finite; what is said of them means nothing",
                RuntimeWarning,
                stacklevel=3,
            )
        with np.errstate(over="ignore", invalid="ignore"):
            sure = confidence(logits / self.policy.temperatures[exits, None])
        columns = zip(files, logits.argmax(-1).tolist(), sure.tolist(), exits.tolist(), strict=True)
        return [Prediction(file, self.class_names[i], i, confident, k) for file, i, confident, k in columns]

    def _checked(self, images: Floats) -> Floats:
        wanted = self._folder.image_shape
        if not isinstance(images, np.ndarray) or images.shape[1:] != wanted or images.dtype != np.float32:
            given = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"images are {given}; give a float32 array (batch, {shape}), or files")
        return images


def _share_memory(onnxruntime: Any, options: Any) -> None:
    """Lets a session take its memory from the one place that all such sessions of the process share.

    Each would otherwise keep as much as it ever needed, and a stage would find nothing of its own in the caches. Plans
    for where each tensor lies, which ONNX Runtime makes by default, would spread them again.
    """
    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    with contextlib.suppress(Exception):  # it is there already: ours, or the application's own
        onnxruntime.create_and_register_allocator(info, None)
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights can be given back
    options.enable_mem_pattern = False


# ---- the command line ------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> int:
    """Classifies image files and prints CSV: file, class, confidence in [0, 1], exit (from 1)."""
    parser = argparse.ArgumentParser(prog="python -m dynadapter.serve.runtime", description=main.__doc__)
    parser.add_argument("folder", help="the exported folder")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a batch (default: 32)")
    parser.add_argument("--threads", type=int, help="threads of ONNX Runtime (default: one on each core)")
    parser.add_argument("--provider", action="append", help="execution provider of ONNX Runtime (default: the CPU)")
    parser.add_argument("--skip-errors", action="store_true", help="leave out images that cannot be read")
    given = parser.parse_args(args)
    on_error: Literal["raise", "skip"] = "skip" if given.skip_errors else "raise"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            runner = Runner(given.folder, given.provider, given.threads)
            images = iter(find_images(given.images))
            rows = csv.writer(sys.stdout, lineterminator="\n")
            rows.writerow(("file", "class", "confidence", "exit"))
            while batch := list(islice(images, max(given.batch_size, 1))):
                for p in runner.predict(batch, given.batch_size, on_error):
                    rows.writerow((p.file, p.class_name, f"{p.confidence:.4f}", p.exit + 1))
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as head does; Python would try to write the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
