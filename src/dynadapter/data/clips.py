"""Clips of videos: which frames they have, and how these are decoded, by the package av."""

import os
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import IO, Any, Literal, get_args

from PIL import Image

from dynadapter.files import open_regular
from dynadapter.images.reading import (
    BUDGET,
    BYTES_PER_PIXEL,
    MAX_BYTES,
    UnreadableImage,
    is_of_the_machine,
    reason,
    shown,
)

Sampling = Literal["uniform", "dense"]

FORMATS = {
    ".avi": "avi",
    ".mkv": "matroska",
    ".mov": "mov",
    ".mp4": "mov",
    ".webm": "matroska",
}
"""Suffixes of videos, with ffmpeg's name of the format: it would otherwise also try formats that name other files."""
MAX_FRAMES = 20_000
"""Longer videos are refused; 13 minutes at 25 frames a second."""
LATE = 2
"""Frames at the end that some decoders keep for themselves; they are replaced by the last one."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Some frames of a video, decoded when they are needed.

    Args:
        path: The video: a file with one of the suffixes of `FORMATS`.
        frames: Number of frames.
        sampling: See :func:`frame_indices`.
        stride: See :func:`frame_indices`.

    Raises:
        ValueError: A setting is out of range.
    """

    path: Path
    frames: int = 16
    sampling: Sampling = "uniform"
    stride: int = 4

    def __post_init__(self) -> None:
        for name in ("frames", "stride"):
            if not 1 <= getattr(self, name) <= MAX_FRAMES:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 and at most {MAX_FRAMES:,}")
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"unknown sampling {self.sampling!r}; choose from: {', '.join(get_args(Sampling))}")

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, number: int | None = None) -> list[Image.Image]:
        """Decode the frames.

        Args:
            number: Decides which frames are drawn, as in training; None for the middle ones.

        Returns:
            Images of one size, in RGB.

        Raises:
            UnreadableImage: The video is missing, broken, too short or too large, or has another suffix.
            OSError: The machine fails to read the file; the video may be good.
            MemoryError: The machine has too little memory.
        """
        try:
            return self._read(number)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise many types on damaged bytes
            if isinstance(error, OSError) and not type(error).__module__.startswith("av.") and is_of_the_machine(error):
                raise
            why = reason(error)
            message = f"cannot read video {shown(self)}: {why}; repair it, remove it, or set on_error: skip"
            if isinstance(error, FileNotFoundError):
                message = f"video {shown(self)} does not exist; correct the path, or set on_error: skip"
            raise UnreadableImage(message, why) from None

    def _read(self, number: int | None) -> list[Image.Image]:
        kind = FORMATS.get(self.path.suffix.lower())
        if kind is None:
            raise ValueError(f"its name does not end in {', '.join(FORMATS)}")
        with open_regular(self.path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ValueError(f"the file has more than {MAX_BYTES:,} bytes")
            count = _count(file, kind)
            if count < self.frames:
                raise ValueError(f"it has {count} frames, fewer than the {self.frames} of a clip")
            wanted = frame_indices(count, self.frames, self.sampling, self.stride, number)
            file.seek(0)
            return _decode(file, kind, wanted, count)


def frame_indices(count: int, frames: int, sampling: Sampling, stride: int = 4, number: int | None = None) -> list[int]:
    """Choose frames of a video.

    ``uniform`` takes one frame of each of `frames` equal parts of the video (Wang et al. 2016, TSN), as is usual for
    Something-Something. ``dense`` takes every `stride`-th frame of one stretch, as is usual for HMDB51; where the video
    is shorter than this stretch, the largest stride that fits.

    >>> frame_indices(20, 4, "uniform"), frame_indices(20, 4, "dense", stride=2), frame_indices(5, 4, "dense", stride=2)
    ([2, 7, 12, 17], [6, 8, 10, 12], [0, 1, 2, 3])

    Args:
        count: Frames of the video, at least `frames`.
        frames: Frames to choose.
        sampling: ``uniform`` or ``dense``.
        stride: Distance of two frames in ``dense``.
        number: Seed of a random frame of each part, or of the stretch's start; None for the middle.
    """
    draw = None if number is None else Random(number)
    if sampling == "uniform":
        places = [Fraction(1, 2) if draw is None else Fraction(draw.random()) for _ in range(frames)]
        return [int((k + place) * count / frames) for k, place in enumerate(places)]
    step = min(stride, (count - 1) // max(1, frames - 1))
    free = count - 1 - (frames - 1) * step
    start = free // 2 if draw is None else draw.randint(0, free)
    return [start + k * step for k in range(frames)]


def require_av() -> None:
    """Check that the package av is there."""
    if find_spec("av") is None:
        raise ValueError("videos are read by the package av; install it by pip install 'dynadapter[video]'")


def _opened(file: IO[bytes], kind: str) -> tuple[Any, Any]:
    """Open a video, and return it with its only or first stream of pictures."""
    import av

    container = av.open(file, format=kind)
    if not container.streams.video:
        container.close()
        raise ValueError("it holds no pictures")
    stream = container.streams.video[0]
    stream.codec_context.options = {"max_pixels": str(BUDGET.total // BYTES_PER_PIXEL)}
    return container, stream


def _count(file: IO[bytes], kind: str) -> int:
    """Count the frames without decoding them; what a header says is not trusted."""
    container, stream = _opened(file, kind)
    with container:
        count = 0
        for packet in container.demux(stream):
            count += packet.size > 0
            if count > MAX_FRAMES:
                raise ValueError(f"it has more than {MAX_FRAMES:,} frames; cut it into shorter ones")
    return count


def _decode(file: IO[bytes], kind: str, wanted: list[int], count: int) -> list[Image.Image]:
    """Decode frames by their rising indices, from the start of the video, so that each index is exact."""
    container, stream = _opened(file, kind)
    with container:
        width, height = stream.codec_context.width, stream.codec_context.height
        with BUDGET.reserved((BYTES_PER_PIXEL + 3 * len(wanted)) * width * height):
            found: dict[int, Image.Image] = {}
            index, last = -1, None
            for index, last in enumerate(container.decode(stream)):
                if (last.width, last.height) != (width, height):
                    raise ValueError("its frames have several sizes")
                if index in wanted:
                    found[index] = Image.fromarray(last.to_ndarray(format="rgb24"))
                if index == wanted[-1]:
                    break
            if missing := [k for k in wanted if k not in found]:
                if last is None or index + 1 < count - LATE:
                    raise ValueError(f"only {index + 1} of its {count} frames can be decoded")
                end = Image.fromarray(last.to_ndarray(format="rgb24"))
                found |= dict.fromkeys(missing, end)
            return [found[k] for k in wanted]
