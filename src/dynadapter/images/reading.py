"""Find image files and decode them to RGB.

This file imports Pillow and numpy alone: an exported folder holds a copy of it.
"""

import errno
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Named, because Pillow would otherwise also try formats that run outside programs (EPS calls Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 178_956_970
"""Images with more pixels are refused before they are decoded: a file of a few bytes can decode to gigabytes.

This is Pillow's own limit, repeated here because other packages in the process may raise Pillow's.
"""
MAX_BYTES = 2**31
"""Larger files are refused."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded.

    Args:
        message: One line with the path and the reason.
        reason: The reason alone, in a few words.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        # A DataLoader worker raises the error again with a whole traceback as its message; the last line is ours.
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])
        self.reason = reason


def load_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Return the pixels of a file or of a Pillow image as 8-bit RGB, upright.

    Args:
        source: A file of one of `FORMATS`, or an image in memory.

    Raises:
        UnreadableImage: The file is missing, broken, or of another format.
    """
    try:
        if isinstance(source, Image.Image):
            return to_rgb(upright(source))
        with open_regular(source) as file, open_image(file) as image:
            return to_rgb(upright(image))
    except Exception as error:  # decoders raise many types on damaged bytes
        why = reason(error)
    message = f"cannot read image {shown(source)}: {why}; repair it, remove it, or set on_error: skip"
    raise UnreadableImage(message, why)


def why_unreadable(source: str | os.PathLike[str] | Image.Image) -> str | None:
    """Return the reason why an image cannot be decoded, or None if it can."""
    try:
        load_image(source)
    except UnreadableImage as error:
        return error.reason
    return None


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; opening a pipe could block for ever.

    Raises:
        OSError: The path cannot be read, or is a folder, a pipe, a socket or a device.
    """
    _check_regular(os.stat(path).st_mode, path)  # before opening, because opening some devices has effects
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(handle).st_mode, path)  # again, because the file may have been exchanged meanwhile
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file", str(path))


def open_image(file: BufferedReader) -> Image.Image:
    """Read the header of an image of one of `FORMATS`; Pillow decodes the pixels later.

    Raises:
        ValueError: The file is empty or too large, or has more than `MAX_PIXELS`.
        PIL.UnidentifiedImageError: The file has another format.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError("the file is empty")
    if size > MAX_BYTES:  # some decoders read the whole file, and a sparse file costs nothing to make
        raise ValueError(f"{size:,} bytes are more than the limit of {MAX_BYTES:,}")
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}, could be a decompression bomb"
        )
    return image


def shown(source: object) -> str:
    r"""Return a file name as one printable line.

    >>> shown("a\nb.png")
    'a\\nb.png'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(source))


def reason(error: Exception) -> str:
    """Return in a few words why decoding failed."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's message repeats the path
        return f"not an image of a known format ({', '.join(FORMATS)})"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def upright(image: Image.Image) -> Image.Image:
    """Rotate a photograph by its EXIF orientation; with damaged EXIF data, return it as stored."""
    image.load()  # outside the try, so that only errors of the EXIF data are ignored
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB.

    16-bit grey keeps its high byte, as 16-bit colour does in Pillow (Pillow itself would clip grey at 255).
    Transparent pixels are placed on white, as viewers show them.

    Raises:
        ValueError: The pixels are floats or 32-bit integers, whose range is unknown.
    """
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


def image_files(folder: Path) -> list[Path]:
    """List the image files of a folder and its subfolders, sorted by path.

    Hidden files and folders are left out. Links to folders are not followed, so that no link leads into a circle;
    links to files count.

    Raises:
        OSError: A folder cannot be read; its images would be missing without notice.
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
    """List the images of a folder and its subfolders, a single file, or the images of several of these.

    Raises:
        ValueError: A path does not exist, or there is no image.
    """
    if isinstance(places, (str, os.PathLike)):
        places = [places]
    files: list[Path] = []
    for place in (Path(place).expanduser() for place in places):
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
