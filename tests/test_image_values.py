"""Images of more than 8 bits: their range is used, or one warning names it, and `value_range` spreads it."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import load_image
from dynadapter.images.values import UnusedRange, to_8_bits

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # all values of 12 bits


def deep_png(values: np.ndarray, key: tuple[int, ...] = ()) -> bytes:
    """Write a 16-bit PNG of 1 to 4 channels by hand, each row behind a Paeth filter; Pillow writes grey alone."""
    height, width, channels = values.shape
    before = np.zeros((height + 1, width + 1, channels, 2), np.int16)
    before[1:, 1:] = values.astype(">u2")[..., None].view(np.uint8)
    left, up, corner = before[1:, :-1], before[:-1, 1:], before[:-1, :-1]
    distances = np.stack([abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)])
    nearest = np.choose(distances.argmin(0), [left, up, corner])
    rows = (before[1:, 1:] - nearest).astype(np.uint8).reshape(height, -1)
    data = b"".join(b"\4" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    header = chunk(b"IHDR", header) + (chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b"")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """Write an uncompressed TIFF by hand: signed, inverted and 16-bit colour, in both byte orders."""
    height, width, *channels = values.shape
    count = channels[0] if channels else 1
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    per_sample = lambda tag, value: (tag, 3, count, value)  # noqa: E731
    tags = [
        *((256, 3, 1, width), (257, 3, 1, height), per_sample(258, bits), (259, 3, 1, 1)),
        *((262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, count), (278, 3, 1, height), (279, 4, 1, len(data))),
        per_sample(339, sample_format),
    ]
    end = 8 + len(data)
    extra, entries, place = b"", b"", end + 2 + 12 * len(tags) + 4
    for tag, kind, number, value in tags:
        form = "H" if kind == 3 else "I"
        content = struct.pack(f"{order}{number}{form}", *[value] * number)
        if len(content) > 4:
            content, extra = struct.pack(f"{order}I", place + len(extra)), extra + content
        entries += struct.pack(f"{order}HHI", tag, kind, number) + content.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, end)
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0" + extra


def saved(suffix: str, **options: Any) -> Callable[[np.ndarray], bytes]:
    def save(values: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, suffix, **options)
        return stream.getvalue()

    return save


GREY: dict[str, Callable[[np.ndarray], Any]] = {
    "png": saved("PNG"),
    "tiff": saved("TIFF"),
    "tiff lzw": saved("TIFF", compression="tiff_lzw"),
    "tiff big-endian": lambda values: tiff(values, 16, order=">"),
    "tiff signed": lambda values: tiff(values.astype(np.int16), 16, sample_format=2),
    "pgm": saved("PPM"),
    "uint16": lambda values: values,
    "int16": lambda values: values.astype(np.int16),
    "int64": lambda values: values.astype(np.int64),
    "I;16": Image.fromarray,
    "I;16B": lambda values: Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()),
    "I": lambda values: Image.fromarray(values.astype(np.int32)),
}
COLOUR: dict[str, Callable[[np.ndarray], Any]] = {
    "png": deep_png,
    "tiff": lambda values: tiff(values, 16, photometric=2),
    "tiff big-endian": lambda values: tiff(values, 16, photometric=2, order=">"),
    "pillow": lambda values: Image.open(io.BytesIO(deep_png(values))),
    "array": lambda values: values,
}


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15])
@pytest.mark.parametrize("kind", GREY)
def test_unused_bits_are_a_warning(kind: str, bits: int) -> None:
    values = RAMP >> 12 - bits if bits < 12 else RAMP << bits - 12
    with pytest.warns(UnusedRange, match=rf"values from 0 to {values.max()} .* set value_range: \[0, {2**bits - 1}\]"):
        image = load_image(GREY[kind](values))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], values >> 8)
    spread = np.asarray(load_image(GREY[kind](values), (0, 2**bits - 1)))
    np.testing.assert_array_equal(spread, np.repeat((values >> bits - 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", COLOUR)
def test_unused_bits_of_colour(kind: str, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (30, 40, channels), dtype=np.uint16)
    values[..., 3:] = 4095 if kind == "array" else 65535  # opaque
    if channels == 4 and kind.startswith("tiff"):
        values = values[..., :3]
    with pytest.warns(UnusedRange, match=r"do not use the range up to 65535 .* set value_range: \[0, 4095\]"):
        load_image(COLOUR[kind](values[..., :3]))
    spread = np.asarray(load_image(COLOUR[kind](values), (0, 4095)))
    np.testing.assert_array_equal(spread, values[..., :3] >> 4)


def test_deep_grey_with_opacity() -> None:
    values = np.full((4, 4, 2), 65535, np.uint16)
    values[..., 0] = 0x8000
    assert (np.asarray(load_image(deep_png(values))) == 0x80).all()
    values[..., 0], values[0, 0, 1] = 0x0800, 0
    with pytest.warns(UnusedRange):
        load_image(deep_png(values))
    pixels = np.asarray(load_image(deep_png(values), (0, 4095)))
    assert (pixels[1:] == 0x80).all()
    assert (pixels[0, 0] == 255).all()


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("kind", ["png", "array"])
def test_opacity_does_not_follow_the_range_in_files(kind: str, channels: int) -> None:
    values = np.full((4, 4, channels), 2000, np.uint16)
    values[..., -1] = 0x8000 if kind == "png" else 2048
    given: Any = deep_png(values) if kind == "png" else values
    grey = 112 if (kind, channels) == ("png", 2) else 125  # of which Pillow keeps the high byte
    expected = (grey * 128 + 255 * 127) / 255
    assert abs(np.asarray(load_image(given, (0, 4095))).astype(float) - expected).max() <= 1


@pytest.mark.parametrize("value_range", [None, (0, 65535)])
def test_transparent_colour_of_16_bits(value_range: Any) -> None:
    values = np.zeros((2, 2, 3), np.uint16)
    values[0, 0] = 0x0100, 0, 0
    values[0, 1] = 0x0101, 0, 0
    values[1, 1] = 40000
    for key, expected in (((0x0100, 0, 0), [[255, 1], [0, 156]]), ((40000, 40000, 40000), [[1, 1], [0, 255]])):
        red = np.asarray(load_image(deep_png(values, key), value_range))[..., 0]
        assert red.tolist() == expected


@pytest.mark.parametrize("kind", GREY)
def test_used_range_needs_no_warning(kind: str) -> None:
    if kind not in ("int16", "tiff signed"):  # which hold no larger values
        values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
        np.testing.assert_array_equal(np.asarray(load_image(GREY[kind](values)))[..., 0], values >> 8)
    load_image(GREY[kind](np.zeros((4, 4), np.uint16)))  # black in any range


def test_twelve_bits_in_the_file_are_known() -> None:
    """A TIFF says how many bits it has; Pillow reads 12 of them as they are."""
    packed = np.repeat(RAMP.reshape(-1, 2), 1, axis=1).astype(np.uint32)
    joined = packed[:, 0] << 12 | packed[:, 1]
    data = np.stack([joined >> 16, joined >> 8, joined], axis=1).astype(np.uint8)
    content = bytearray(tiff(RAMP, 12))
    content[8 : 8 + data.size] = data.tobytes()
    np.testing.assert_array_equal(np.asarray(load_image(bytes(content)))[..., 0], RAMP >> 4)


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_values_need_a_range(bits: int) -> None:
    values = np.arange(-128, 128).reshape(16, 16).astype(f"<i{bits // 8}")
    for source in (tiff(values, bits, sample_format=2), values):
        with pytest.raises(ValueError, match=r"integer values from -128 to 127 .* such as \[-128, 127\]"):
            load_image(source)
        np.testing.assert_array_equal(np.asarray(load_image(source, (-128, 127)))[..., 0], values.astype(int) + 128)


def test_white_is_zero_in_16_bits() -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    grey = np.asarray(load_image(tiff(values, 16, photometric=0)))[..., 0]
    np.testing.assert_array_equal(grey, 255 - (values >> 8))
    bytes_ = (values >> 8).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(tiff(bytes_, 8, photometric=0)))[..., 0], 255 - bytes_)


@pytest.mark.parametrize("low_high", [(0, 1), (-1, 1), (0, 255), (-1024, 3071)])
def test_floats_are_spread_as_arithmetic_says(low_high: tuple[float, float], tmp_path: Path) -> None:
    low, high = low_high
    values = np.linspace(low - (high - low) / 10, high, 64).reshape(8, 8).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "float.tif")
    expected = np.clip(np.rint((values.astype(float) - low) / (high - low) * 255), 0, 255)
    for source in (values, tmp_path / "float.tif", Image.fromarray(values)):
        np.testing.assert_array_equal(np.asarray(load_image(source, low_high))[..., 0], expected)


def test_8_bits_ignore_the_range(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    for source in (pixels, Image.fromarray(pixels)):
        np.testing.assert_array_equal(np.asarray(load_image(source, (0, 4095))), pixels)


def test_large_arrays_are_spread_in_strips() -> None:
    values = np.random.default_rng(0).integers(0, 4096, (1500, 1500), dtype=np.uint16)
    np.testing.assert_array_equal(to_8_bits(values, (0, 4095))[0], values >> 4)


# ---- the setting


def test_one_warning_for_many_images(tmp_path: Path) -> None:
    for k in range(5):
        Image.fromarray(RAMP + k).save(tmp_path / f"{k}.png")
    preprocess = Preprocess(64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = [preprocess.read(path) for path in sorted(tmp_path.iterdir())]
    assert len(caught) == 1
    assert "0.png: values from 0 to 4095" in str(caught[0].message)
    assert read[0].max() == 15
    spread = Preprocess(64, value_range=(0, 4095)).read(tmp_path / "0.png")
    np.testing.assert_array_equal(spread[0], RAMP >> 4)


@pytest.mark.parametrize("given", [(1, 1), (4095, 0), (0, float("inf")), (0,), 5, "12", (0, "a")])
def test_wrong_range_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"value_range={given!r} is not (low, high)")):
        Preprocess(value_range=given)


def test_range_from_a_file_is_equal() -> None:
    assert Preprocess(value_range=[0, 4095]) == Preprocess(value_range=(0.0, 4095.0))  # type: ignore[arg-type]
