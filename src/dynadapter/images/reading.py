"""Find image files and decode them to RGB.

This file imports Pillow, numpy and files.py: an exported folder holds a copy of it.
"""

import contextlib
import errno
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dynadapter.files import one_line, open_regular, shown
from dynadapter.images.memory import Budget
from dynadapter.images.values import Range, decode_deep_colour, from_array, to_rgb

# Named, because Pillow would otherwise also try formats that run outside programs (EPS calls Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
BUDGET = Budget(3 * 2**30)
"""Memory for decoding, over all threads of the process; an image that needs more is refused before it is decoded."""
BYTES_PER_PIXEL, BYTES_PER_SIDE = 17, 40
"""What an image needs while it is decoded, converted, turned and resized: for each pixel, and for each of a row and a
column, whose resampling weights take more than the pixels where an image is a strip."""
MAX_BYTES = 2**30
"""Larger files are refused."""
TILE_WIDTH, TILE_HEIGHT = 322, 323  # tags of a TIFF
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO}
ABSENT |= {errno.ENODEV, errno.EACCES, errno.EPERM}
"""Errors of a file that is missing, forbidden or no file. Others are the machine's: the image may be good."""


class Fetched(Protocol):
    """An image that is fetched only when it is read, such as an image inside a data set."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    def fetch(self) -> str | os.PathLike[str] | bytes | Image.Image:
        """Return its file, the bytes of its file, or its pixels."""


Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[Any] | Fetched
"""A path, the bytes of a file, an open file, pixels in memory, see :func:`load_image`, or an image to be fetched."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded.

    Args:
        message: One line with the path and the reason.
        reason: The reason without the path, in a few words.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        # A DataLoader worker raises the error again with a whole traceback as its message; the last line is ours.
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])
        self.reason = reason


class UnreadPages(UserWarning):
    """A file has further pages or frames, which are not read."""


def load_image(source: Source, value_range: Range | None = None) -> Image.Image:
    """Return an image as 8-bit RGB, upright by its EXIF orientation.

    A path, the bytes of a file, an open file, and the image that Pillow opens give the same pixels; so does an array of
    the stored values, which holds no orientation.

    Args:
        source: A file of one of `FORMATS`: its path, its bytes, or opened in binary mode (and read from its start); an
            image of Pillow; or an array (height, width) or (height, width, 1 to 4 channels).
        value_range: The values (low, high) that become 0 and 255 in images of more than 8 bits; None for all that 16
            bits can hold. Floats have no range of their own.

    Raises:
        UnreadableImage: The image is missing, forbidden, broken, or of another format.
        OSError: The machine fails to read the file (EIO, ESTALE, EMFILE, ...); the image itself may be intact.
        MemoryError: The machine has too little memory.
        TypeError: The source has another type.

    Warns:
        UnusedRange: The image has more than 8 bits, uses only a part of their range, and therefore becomes dark.
        UnreadPages: The file has several pages or frames; only the first is read.
    """
    with decoded(source, value_range) as (image, remarks):
        for remark in remarks:
            warnings.warn(remark, stacklevel=2)
        return image.copy() if image is source else image


@contextlib.contextmanager
def decoded(source: Source, value_range: Range | None = None) -> Iterator[tuple[Image.Image, list[UserWarning]]]:
    """Decode an image, and reserve its part of `BUDGET` inside the context.

    Args:
        source: As in :func:`load_image`, which lists the errors as well.
        value_range: As in :func:`load_image`.

    Yields:
        The image in 8-bit RGB, which must not be changed, and remarks about content of the file that was not used.
    """
    if not is_source(source):
        raise TypeError(f"an image is a {type(source).__name__}; give {SOURCES}")
    failure: Exception | None = None
    with contextlib.ExitStack() as stack:
        try:
            image, remarks = _decode(source, value_range, stack)
        except Exception as error:  # decoders raise many types on damaged bytes
            failure = _failure(error, source)
        if failure is not None:
            raise failure
        yield image, remarks


def is_source(source: object) -> bool:
    """Check whether an object can be an image by its type, without reading its content."""
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
    return isinstance(source, kinds) or hasattr(source, "read") or hasattr(source, "fetch")


SOURCES = "a file, its bytes, an open file, a Pillow image, or an array (height, width, channels)"


def _decode(
    source: Any, value_range: Range | None, stack: contextlib.ExitStack
) -> tuple[Image.Image, list[UserWarning]]:
    """Decode an image; the stack keeps its file open and its memory reserved."""
    if hasattr(source, "fetch"):
        source = source.fetch()
    if isinstance(source, np.ndarray):
        stack.enter_context(BUDGET.reserved(BYTES_PER_PIXEL * source.size))
        image, remark = from_array(source, value_range)
        return to_rgb(image, {})[0], [_about(remark, source)] if remark else []
    if isinstance(source, Image.Image):
        return _decode_opened(source, source, 0, value_range, stack)
    file, size = _opened(source, stack)
    try:
        image = stack.enter_context(Image.open(file, formats=FORMATS))
        return _decode_opened(image, source, size, value_range, stack)
    finally:
        if failure := getattr(file, "failure", None):
            raise failure


def _decode_opened(
    image: Image.Image, source: object, size: int, value_range: Range | None, stack: contextlib.ExitStack
) -> tuple[Image.Image, list[UserWarning]]:
    """Decode an image of which Pillow has read the header, from a file of `size` bytes."""
    need = _memory(image, size)
    stack.enter_context(BUDGET.reserved(need))
    try:
        pages = _has_more_pages(image)
        tags = getattr(image, "tag_v2", {})
        pixels, first = decode_deep_colour(image, value_range)
        rgb, second = to_rgb(upright(pixels, in_place=pixels is not source), tags, value_range)
    except OSError as error:
        if "out of memory" in str(error):
            bytearray(need)  # a MemoryError if the machine has no more; else the file is damaged
        raise
    return rgb, [_about(remark, source) for remark in (first, second, pages) if remark]


def _about(remark: UserWarning, source: object) -> UserWarning:
    return type(remark)(f"image {_name(source)}: {remark}")


def source_name(source: object) -> str | None:
    """Return the path of an image, also of an open file or a Pillow image; None if there is none."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    name = getattr(source, "filename" if isinstance(source, Image.Image) else "name", None)
    return str(name) if isinstance(name, str | os.PathLike) and str(name) else None


def _name(source: object) -> str:
    return shown(source_name(source) or "in memory")


def _failure(error: Exception, source: object) -> Exception:
    """Return the error to raise: `UnreadableImage` only if the image itself is at fault."""
    name = _name(source)
    if isinstance(error, MemoryError):
        return MemoryError(f"not enough memory to decode image {name}; use fewer threads and processes")
    if isinstance(error, OSError) and is_of_the_machine(error):
        return OSError(error.errno, error.strerror, name)
    why = reason(error)
    if isinstance(error, FileNotFoundError):
        return UnreadableImage(f"image {name} does not exist; correct the path, or set on_error: skip", why)
    return UnreadableImage(f"cannot read image {name}: {why}; repair it, remove it, or set on_error: skip", why)


def is_of_the_machine(error: OSError) -> bool:
    """Check whether reading failed because of the machine, and not because of a missing, forbidden or damaged file."""
    return error.errno is not None and error.errno not in ABSENT  # Pillow's own errors have no number


def _raise_if_of_the_machine(error: Exception) -> None:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and is_of_the_machine(error)):
        raise error


class _Stream(BufferedReader):
    """A file that records a failed read, because Pillow takes some errors for the end of the image's metadata.

    It has no file descriptor, so that libtiff also reads through Python.
    """

    failure: OSError | None = None

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            self.failure = error
            raise

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


def _opened(source: Any, stack: contextlib.ExitStack) -> tuple[Any, int]:
    """Open a path, bytes, or the content of an open file; return the file and its size in bytes."""
    file: Any
    if isinstance(source, str | os.PathLike):
        opened = open_regular(source)
        size = os.fstat(opened.fileno()).st_size
        file = stack.enter_context(_Stream(opened.detach()))
    else:
        if hasattr(source, "read"):
            if hasattr(source, "seekable") and source.seekable():
                source.seek(0)
            source = source.read(MAX_BYTES + 1)
            if not isinstance(source, bytes):
                raise ValueError("the file was opened as text; open it in mode 'rb'")
        file, size = io.BytesIO(source), memoryview(source).nbytes
    if not size:
        raise ValueError("the file is empty")
    if size > MAX_BYTES:  # some decoders read the whole file, and a sparse file costs nothing to make
        raise ValueError(f"{size:,} bytes are more than the limit of {MAX_BYTES:,}")
    return file, size


def _memory(image: Image.Image, size: int) -> int:
    """Return the most bytes of memory that decoding, converting and resizing a file of `size` bytes can take."""
    tags = getattr(image, "tag_v2", {})
    width = max(image.width, int(tags.get(TILE_WIDTH, 0)))  # a tile can be larger than the image
    height = max(image.height, int(tags.get(TILE_HEIGHT, 0)))
    return BYTES_PER_PIXEL * width * height + BYTES_PER_SIDE * (width + height) + size


def _has_more_pages(image: Image.Image) -> UnreadPages | None:
    """Return a remark if a file has further pages or frames; the preview of a photograph (MPO) does not count."""
    try:
        more = getattr(image, "is_animated", False) and image.format != "MPO" and image.tell() == 0
    except Exception as error:  # behind the first
        _raise_if_of_the_machine(error)
        return None
    return UnreadPages("it has several pages or frames; only the first is read") if more else None


def why_unreadable(source: Source, value_range: Range | None = None) -> str | None:
    """Return why an image cannot be decoded, or None if it can; other errors of `load_image` are raised."""
    try:
        with decoded(source, value_range):
            return None
    except UnreadableImage as error:
        return error.reason


def reason(error: Exception) -> str:
    """Return in a few words why decoding failed."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's message repeats the path
        return f"not an image of a known format ({', '.join(FORMATS)})"
    return one_line(getattr(error, "strerror", None) or error)


def upright(image: Image.Image, in_place: bool = False) -> Image.Image:
    """Rotate a photograph by its EXIF orientation; with damaged EXIF data, return it as stored."""
    image.load()  # outside the try, so that only errors of the EXIF data are ignored
    try:
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)
            return image
        return ImageOps.exif_transpose(image)
    except Exception as error:
        _raise_if_of_the_machine(error)
        return image


def image_files(folder: Path) -> list[Path]:
    """List the image files of a folder and its subfolders, sorted by path.

    Hidden files and folders are left out. Links to folders are not followed, which avoids cycles; links to files are.

    Raises:
        OSError: A folder cannot be read; otherwise its images would be missing without notice.
    """
    found, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for path, entry in ((Path(entry.path), entry) for entry in entries if not entry.name.startswith(".")):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif path.suffix.lower() in SUFFIXES and path.is_file():
                    found.append(path)
    return sorted(found)


def find_images(places: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the images of a folder and its subfolders, a single file, or the images of several of these."""
    if isinstance(places, (str, os.PathLike)):
        places = [places]
    files: list[Path] = []
    for place in (Path(os.path.expanduser(place)) for place in places):
        if place.is_dir():
            inside = image_files(place)
            if not inside:
                raise ValueError(f"no image in {place}: looked for files ending in {', '.join(SUFFIXES)}")
            files += inside
        elif place.is_file():
            files.append(place)
        else:
            raise ValueError(f"{place} does not exist; give a folder of images or a list of files")
    if not files:
        raise ValueError("the list of images is empty; give a folder of images or a list of files")
    return files
