"""Image files: which there are, and their pixels as RGB."""

import errno
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# By name, because Pillow would otherwise also try formats that run outside programs (EPS calls Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 178_956_970
"""More pixels than this are refused before they are decoded: half a gigabyte that a file of some bytes can ask for.

It is what Pillow refuses too, held here because other packages of a process may lift Pillow's own limit.
"""
MAX_BYTES = 2**31
"""Larger files are refused."""


class UnreadableImage(ValueError):
    """An image file that cannot be decoded: one line with its path and the reason."""

    def __init__(self, line: str):
        # A DataLoader worker re-raises an error with its whole traceback as the message; the line itself comes last.
        super().__init__(line.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


def load_image(source: Path | Image.Image) -> Image.Image:
    """Decode a file, or take an image as it is, and return its pixels as 8-bit RGB, upright.

    Args:
        source: A file of one of `FORMATS`, or an image in memory.

    Raises:
        UnreadableImage: The file is missing, broken, or of another format.
    """
    try:
        return _decode(source)
    except Exception as error:  # decoders fail with many types on damaged bytes
        line = f"cannot read image {shown(source)}: {reason(error)}; repair it, take it out, or set on_error: skip"
    raise UnreadableImage(line)


def why_unreadable(source: Path | Image.Image) -> str | None:
    """Return why an image cannot be decoded, in a few words; None when it can."""
    try:
        _decode(source)
    except Exception as error:
        return reason(error)
    return None


def _decode(source: Path | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return to_rgb(source)
    with open_regular(source) as file, open_image(file) as image:
        return to_rgb(upright(image))


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file to read it, and nothing that only looks like one: a pipe would make the reader wait for ever.

    Raises:
        OSError: It cannot be read, or is a folder, a pipe, a socket or a device.
    """
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


def open_image(file: BufferedReader) -> Image.Image:
    """Read the head of an image of one of `FORMATS`; its pixels are decoded when they are asked for.

    Raises:
        ValueError: The file is empty or too large, or has more than `MAX_PIXELS`.
        PIL.UnidentifiedImageError: It is of another format.
    """
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


def shown(source: object) -> str:
    r"""Put the name of a file in one line that every terminal and file can take.

    >>> shown("a\nb.png")
    'a\\nb.png'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(source))


def reason(error: Exception) -> str:
    """Say in a few words why an image cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):  # its own words repeat the path
        return f"not an image of a known format ({', '.join(FORMATS)})"
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())


def upright(image: Image.Image) -> Image.Image:
    """Turn a photograph the way its EXIF orientation says; damaged EXIF data leave it as stored."""
    image.load()  # first, so that only what is wrong beside the pixels is forgiven
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour (its own conversion would clip at 255);
    transparent pixels lie on white, as viewers show them.

    Raises:
        ValueError: Float or 32-bit pixels, whose range nobody can know.
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
    """List the image files in a folder and below, sorted by path, hidden files and folders left out.

    Links to folders are not followed, so that none leads round in a circle; links to files count.

    Raises:
        OSError: A folder cannot be read: what is in it would be missing without a word.
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
    """List the images of a folder (and below), of a file, or of several of both.

    Raises:
        ValueError: A path does not exist, or a folder holds no image.
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
            raise ValueError(f"predict_images: {place} does not exist; give a folder of images or a list of files")
    if not files:
        raise ValueError("predict_images is empty; give a folder of images or a list of files")
    return files
