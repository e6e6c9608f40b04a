"""Image files: which there are, and their pixels as RGB."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# By name, because Pillow would otherwise also try formats that run outside programs (EPS calls Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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
        line = f"cannot read image {source}: {_reason(error)}; repair it, take it out, or set on_error: skip"
    raise UnreadableImage(line)


def why_unreadable(source: Path | Image.Image) -> str | None:
    """Return why an image cannot be decoded, in a few words; None when it can."""
    try:
        _decode(source)
    except Exception as error:
        return _reason(error)
    return None


def _decode(source: Path | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return to_rgb(source)
    with Image.open(source, formats=FORMATS) as image:
        return to_rgb(upright(image))


def _reason(error: Exception) -> str:
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
    """List the image files in a folder and below, sorted by path, hidden files and folders left out."""

    def visible(path: Path) -> bool:
        return not any(part.startswith(".") for part in path.relative_to(folder).parts)

    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if visible(path) and path.is_file())


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
