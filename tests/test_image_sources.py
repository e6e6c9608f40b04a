"""One loading function: a path, bytes, an open file, an array and a Pillow image give the same pixels everywhere."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import raises_one_line
from PIL import Image

from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import UnreadableImage, UnreadPages, load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
TURNED = {  # what to do to the stored pixels, by EXIF orientation
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: np.rot90,
}


class Pipe(io.RawIOBase):
    """An open file without seek, as a download is."""

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self.content.read(size)


def copied(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def loaded(path: Path) -> Image.Image:
    image = Image.open(path)
    image.load()
    return image


@contextlib.contextmanager
def given(source: str, path: Path) -> Iterator[Any]:
    made = SOURCES[source](path)
    try:
        yield made
    finally:
        if hasattr(made, "close"):
            made.close()


SOURCES: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
    "stream": lambda path: io.BytesIO(path.read_bytes()),
    "pipe": lambda path: Pipe(path.read_bytes()),
    "pillow": Image.open,
    "pillow loaded": loaded,
    "pillow copy": copied,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_every_source_is_upright(source: str, suffix: str, tmp_path: Path) -> None:
    for orientation, turn in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(PIXELS).save(tmp_path / f"{orientation}.{suffix}", exif=exif, lossless=True)
        with given(source, tmp_path / f"{orientation}.{suffix}") as image:
            for _ in range(1 if source == "pipe" else 2):  # reading changes nothing that a second reading would notice
                np.testing.assert_array_equal(np.asarray(load_image(image)), turn(PIXELS))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_sources_are_equal_in_every_mode(mode: str, tmp_path: Path) -> None:
    image = (
        Image.fromarray(PIXELS).convert(mode) if mode != "I;16" else Image.fromarray(PIXELS[..., 0] * np.uint16(257))
    )
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image.save(path)
    expected = np.asarray(load_image(path))
    for source in SOURCES:
        with given(source, path) as image:
            np.testing.assert_array_equal(np.asarray(load_image(image)), expected)
    if mode in ("1", "L", "LA", "RGB", "RGBA", "I;16"):
        array = np.asarray(copied(path))
        np.testing.assert_array_equal(np.asarray(load_image(array)), expected)
        if array.ndim == 2:
            np.testing.assert_array_equal(np.asarray(load_image(array[..., None])), expected)


def test_given_image_stays_as_it_is() -> None:
    for mode in ("RGB", "RGBA", "L"):
        image = Image.fromarray(PIXELS).convert(mode)
        before = image.tobytes()
        made = load_image(image)
        made.paste((1, 2, 3), (0, 0, *made.size))
        assert (image.mode, image.tobytes()) == (mode, before)


def test_preprocessing_reads_every_source(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    preprocess = Preprocess(8)
    expected = preprocess.pixels(Image.fromarray(PIXELS))
    np.testing.assert_array_equal(preprocess.read(PIXELS), expected)
    for source in SOURCES:
        with given(source, tmp_path / "a.png") as image:
            np.testing.assert_array_equal(preprocess.read(image), expected)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "image in memory: the file is empty"),
        (b"no image", "image in memory: not an image of a known format"),
        (io.StringIO("text"), "opened as text; open it in mode 'rb'"),
        (np.zeros((3, 20, 40), np.uint8), r"an array of uint8 \(3, 20, 40\) is not an image; give pixels"),
        (np.zeros((0, 4, 3), np.uint8), r"an array of uint8 \(0, 4, 3\) is not an image"),
        (np.zeros((4, 4), np.complex64), "an array of complex64"),
        (np.full((4, 4), np.nan), "infinite or not a number"),
        ("a\0.png", "embedded null"),
    ],
)
def test_unreadable_sources_are_named(source: Any, words: str) -> None:
    with raises_one_line(UnreadableImage, match=words):
        load_image(source)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="an image is a int; give a file, its bytes, an open file"):
        load_image(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_first_page_is_read_with_a_warning(suffix: str, tmp_path: Path) -> None:
    pages = [Image.fromarray(PIXELS[..., k]) for k in range(3)]
    path = tmp_path / f"pages.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:], lossless=True)
    for source in ("path", "bytes", "pillow"):
        with given(source, path) as opened, pytest.warns(UnreadPages, match="several pages or frames; only the first"):
            image = load_image(opened)
        np.testing.assert_array_equal(np.asarray(image)[..., 0], PIXELS[..., 0])
    preprocess = Preprocess(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            preprocess.read(path)
    assert len(caught) == 1
