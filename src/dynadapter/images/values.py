"""Convert pixels of any type to 8-bit RGB, with a remark if an image does not use the range of its type.

This file imports only Pillow and numpy: an exported folder holds a copy of it.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Range = tuple[float, float]
Array = NDArray[Any]

BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
STRIP = 2**20
"""Values that are converted at a time, so that the intermediate arrays stay small."""


class UnusedRange(UserWarning):
    """The values of an image are small compared with the range of its type, so it becomes dark."""


def to_rgb(
    image: Image.Image, tags: Mapping[int, Any], value_range: Range | None = None
) -> tuple[Image.Image, UnusedRange | None]:
    """Convert a decoded image of any Pillow mode to 8-bit RGB.

    Without `value_range`, 16-bit values keep their high byte, grey or colour. Transparent pixels are placed on white,
    as viewers show them.

    Args:
        image: As Pillow decodes it, or :func:`decode_deep_colour`.
        tags: Tags of a TIFF file; empty for other images.
        value_range: The range that becomes 0 to 255 in images of more than 8 bits; 8-bit values do not change.

    Returns:
        The image, and a remark about its range if there is one.

    Raises:
        ValueError: The values are floats, negative or beyond 16 bits, and `value_range` is None.
    """
    signed = image.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == 2  # Pillow takes signed bytes for unsigned ones
    if signed or image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).view(np.int8) if signed else np.asarray(image)
        pixels, remark = to_8_bits(values, value_range, tags.get(BITS_PER_SAMPLE, (16,))[0])
        if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow obeys in 8 bits alone
            np.subtract(255, pixels, out=pixels)
        if isinstance(key := image.info.get("transparency"), int):
            pixels[values == key] = 255
        return Image.fromarray(pixels).convert("RGB"), remark
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        page = Image.new("RGB", image.size, "white")
        image = image.convert("RGBA")
        page.paste(image, mask=image)
        return page, None
    return image if image.mode == "RGB" else image.convert("RGB"), None


def from_array(array: Array, value_range: Range | None = None) -> tuple[Image.Image, UnusedRange | None]:
    """Return an array as an image of 8-bit values, which :func:`to_rgb` understands.

    Args:
        array: Pixels (height, width), or (height, width, channels) with 1 channel for grey, 2 for grey and opacity,
            3 for RGB or 4 for RGB and opacity; bool, integers or floats.
        value_range: As in :func:`to_rgb`; in an array it is also that of opacity.

    Raises:
        ValueError: The array has another shape or type, or its range is not known.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or not array.size or not 1 <= channels <= 4 or array.dtype.kind not in "buif":
        raise ValueError(
            f"an array of {array.dtype} {array.shape} is not an image; give pixels (height, width) or "
            "(height, width, 1 to 4 channels)"
        )
    if array.ndim == 3 and channels == 1:
        array = array[..., 0]
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array)), None
    pixels, remark = to_8_bits(array, value_range)
    return Image.fromarray(pixels), remark


def to_8_bits(values: Array, value_range: Range | None, bits: int = 16) -> tuple[NDArray[np.uint8], UnusedRange | None]:
    """Return values as bytes of the same shape, and a remark where they do not use their range.

    Args:
        values: Integers or floats.
        value_range: The range that becomes 0 to 255; None for the range of unsigned integers with `bits` bits.
        bits: Number of bits of the type in the file.

    Raises:
        ValueError: The values are not finite, or do not fit the range of the type.
    """
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("some values are infinite or not a number")
    if value_range is not None:
        return _scaled(values, value_range), None
    full = 2 ** min(bits, 16) - 1
    if values.dtype.kind == "f" or low < 0 or high > full:
        kind = "float" if values.dtype.kind == "f" else "integer"
        raise ValueError(
            f"the range of {kind} values from {low:g} to {high:g} is not known; set value_range, such as "
            f"[{min(_rounded(low), 0)}, {max(_rounded(high), 1)}]"
        )
    return _scaled(values, (0, full)), _remark(int(low), int(high), full)


def _remark(low: int, high: int, full: int) -> UnusedRange | None:
    """Return a remark if at least one bit is never used; a black image gives none."""
    if not 0 < 2 * high <= full:
        return None
    return UnusedRange(
        f"values from {low} to {high} do not use the range up to {full} and become {low * 256 // (full + 1)} to "
        f"{high * 256 // (full + 1)} of 255; if all images are like this, set value_range: [0, {_rounded(high)}]"
    )


def _rounded(value: float) -> int:
    """Round a limit outwards to a power of two, as the limits of a type are.

    >>> _rounded(1000), _rounded(4095), _rounded(-1000), _rounded(0.7)
    (1023, 4095, -1024, 1)
    """
    whole = int(np.ceil(abs(float(value))))
    return 2 ** whole.bit_length() - 1 if value > 0 else -(2 ** (whole - 1).bit_length()) if value < 0 else 0


def _scaled(values: Array, value_range: Range) -> NDArray[np.uint8]:
    """Spread a range over 0 to 255 and clip values outside. Integers are divided into 256 equal steps."""
    low, high = value_range
    whole = values.dtype.kind in "iu"
    factor = 256 / (high - low + 1) if whole else 255 / (high - low)
    flat, scaled = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, values.size, STRIP):
        part = (flat[start : start + STRIP].astype(np.float64) - low) * factor
        scaled[start : start + STRIP] = np.clip(np.floor(part) if whole else np.rint(part), 0, 255)
    return scaled.reshape(values.shape)


# ---- 16-bit colour, of which Pillow keeps the high bytes


def decode_deep_colour(image: Image.Image, value_range: Range | None) -> tuple[Image.Image, UnusedRange | None]:
    """Decode a file of 16-bit colour; return other images, and images that are decoded already, unchanged.

    Args:
        image: As opened by Pillow.
        value_range: The range that becomes 0 to 255; None for the high bytes.

    Returns:
        The image in 8 bits, and a remark about its range if there is one.
    """
    rawmodes = map(_rawmode, getattr(image, "tile", ()))
    rawmode = next((name for name in rawmodes if ";16" in name and image.mode in ("RGB", "RGBA", "CMYK")), "")
    if not rawmode:
        return image, None
    key = image.info.get("transparency")  # of 16 bits, which Pillow compares with the high bytes
    low = None if value_range is None and key is None else _low_bytes(image, rawmode)
    image.load()
    remark = _remark_on_high_bytes(image) if value_range is None else None
    if value_range is None and key is None:
        return image, remark
    spread = image.copy()
    spread.info.pop("transparency", None)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        values = np.asarray(image.crop(box)).astype(np.uint16) << 8
        if low is not None:
            values |= np.asarray(low.crop(box))
        scaled = _scaled(values, value_range or (0, 65535))
        if image.mode == "RGBA":
            scaled[..., 3] = values[..., 3] >> 8
        if key is not None:
            scaled[(values == key).all(axis=-1)] = 255
        spread.paste(Image.frombytes(image.mode, (image.width, len(values)), scaled.tobytes()), box)
    return spread, remark


def _remark_on_high_bytes(image: Image.Image) -> UnusedRange | None:
    colours: Any = image.getextrema()[:3]  # a pair for each band of a colour image
    lowest, highest = min(band[0] for band in colours), max(band[1] for band in colours)
    return _remark(256 * lowest, 256 * highest + 255, 65535) if highest else None


def _rawmode(tile: Any) -> str:
    """Return Pillow's name of the raw mode in which a tile of a file is stored."""
    return str(tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3])


def _low_bytes(image: Image.Image, rawmode: str) -> Image.Image | None:
    """Decode the low bytes, by reading in the other byte order; None if Pillow has no such raw mode."""
    layout, _, order = rawmode.partition(";16")
    native, swapped = ("L", "B") if sys.byteorder == "little" else ("B", "L")
    if layout not in ("RGB", "RGBA", "CMYK") or order not in ("L", "B", "N"):
        return None
    other = f"{layout};16{native if order == swapped else swapped}"
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    twin: Any = Image.open(file, formats=(str(image.format),))
    twin.tile = list(_renamed(twin.tile, other))
    twin.load()
    return twin


def _renamed(tiles: Iterable[Any], rawmode: str) -> Iterable[Any]:
    for tile in tiles:
        args = (rawmode, *tile[3][1:]) if isinstance(tile[3], tuple) else rawmode
        yield type(tile)(*tile[:3], args) if hasattr(tile, "_fields") else (*tile[:3], args)
