"""Image files are found, decoded and preprocessed in one way, wherever an image is evaluated."""

import contextlib
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import raises_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from dynadapter.data.normalize import normalize
from dynadapter.images import reading
from dynadapter.images.memory import Budget
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import UnreadableImage, find_images, load_image, why_unreadable

FIXED = (((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
NORMALIZATIONS: list[tuple[Any, tuple[float, ...], tuple[float, ...]]] = [
    ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("half", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ("none", (0, 0, 0), (1, 1, 1)),
    FIXED,
]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(6, 5, 3) if pixels is None else pixels).save(path, **options)
    return path


# ---- decoding


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_grey_16_bit_keeps_high_byte(name: str, tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    rgb = np.asarray(load_image(tmp_path / name))
    np.testing.assert_array_equal(rgb, np.repeat(values[..., None] // 256, 3, axis=2))


def test_transparent_pixels_on_white(tmp_path: Path) -> None:
    rgba = noise(4, 4, 4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    rgb = np.asarray(load_image(save(tmp_path / "a.png", rgba)), dtype=float)
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(rgb, rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1)
    assert (rgb[0] == 255).all()
    np.testing.assert_array_equal(rgb[1], rgba[1, :, :3])


def test_palette_with_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=bytes([255, 0, 255]))
    palette.save(tmp_path / "frames.gif")
    opaque = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    for name in ("opaque.png", "frames.gif"):
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), opaque)
    clear = np.asarray(load_image(tmp_path / "clear.png"))
    np.testing.assert_array_equal(clear, [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]])


@pytest.mark.parametrize(("mode", "suffix"), [("1", "png"), ("L", "jpg"), ("LA", "png"), ("CMYK", "jpg"), ("L", "pgm")])
def test_other_modes_become_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    Image.fromarray(noise(5, 4, 3)).convert(mode).save(tmp_path / f"image.{suffix}")
    image = load_image(tmp_path / f"image.{suffix}")
    assert (image.mode, image.size) == ("RGB", (4, 5))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (
            np.ones((2, 2), np.float32),
            r"float values from 1 to 1 is not known; set value_range, such as \[0, 1\]",
        ),
        (np.full((2, 2), 70000, np.int32), "range of integer values from 70000 to 70000 is not known"),
        (np.full((2, 2), -5, np.int16), "range of integer values from -5 to -5 is not known"),
    ],
)
def test_unknown_ranges_are_refused(pixels: np.ndarray, words: str, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "odd.tif")
    with pytest.raises(UnreadableImage, match=words):
        load_image(tmp_path / "odd.tif")


def broken_files(folder: Path) -> list[Path]:
    whole = save(folder / "whole.jpg", noise(32, 32, 3)).read_bytes()
    contents = {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "text.png": b"not an image",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return [*(folder / name for name in contents), *(folder / f"{n}.png" for n in ("folder", "pipe", "absent"))]


def test_unreadable_file_gives_one_line(tmp_path: Path) -> None:
    for file in broken_files(tmp_path):
        with pytest.raises(UnreadableImage) as caught:
            load_image(file)
        reason = why_unreadable(file)
        words = f"cannot read image {file}: {reason}; repair it, remove it, or"
        words = words if file.exists() else f"image {file} does not exist; correct the path, or"
        assert str(caught.value) == f"{words} set on_error: skip"
        assert caught.value.reason == reason
        assert "\n" not in str(caught.value)
    assert why_unreadable(tmp_path / "whole.jpg") is None


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "big.png", noise(40, 40, 3))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
        with pytest.raises(UnreadableImage, match="decompression bomb"):
            load_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # another package has lifted Pillow's limit
    monkeypatch.setattr(reading, "BUDGET", Budget(10_000))
    with pytest.raises(UnreadableImage, match="GB of memory are more than the limit"):
        load_image(file)


def test_large_files_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(reading.MAX_BYTES + 1)
    assert "bytes are more than the limit" in str(why_unreadable(tmp_path / "sparse.png"))


@pytest.mark.parametrize("form", reading.FORMATS)
def test_damaged_bytes_never_crash(form: str, tmp_path: Path) -> None:
    generator, file = np.random.default_rng(0), tmp_path / "damaged"
    stream = io.BytesIO()
    Image.fromarray(noise(16, 16, 3)).save(stream, form)
    for _ in range(15):
        damaged = bytearray(stream.getvalue())
        for place in generator.integers(0, len(damaged), 3):
            damaged[place] = generator.integers(256)
        file.write_bytes(damaged[: generator.integers(len(damaged) // 2, len(damaged) + 1)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn about damage that they can still read
            with contextlib.suppress(UnreadableImage):  # any other exception is a failure
                assert load_image(file).mode == "RGB"


# ---- finding


def test_find_images_in_files_and_folders(tmp_path: Path) -> None:
    names = ("b/2.png", "a/1.PNG", "a/3.webp", ".hidden/3.png", "a/.4.png")
    first, second, third, *_ = files = [save(tmp_path / name) for name in names]
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(files[0])
    assert find_images(tmp_path) == [second, third, first, tmp_path / "link.png"]
    assert find_images([str(first), tmp_path / "a"]) == [first, second, third]
    assert find_images(str(first)) == [first]
    for places, words in (
        ([tmp_path / "nothing.png"], "does not exist; give a folder of images"),
        ([], "the list of images is empty"),
        (save(tmp_path / "empty" / "x.png").parent, ""),
    ):
        if not words:
            (tmp_path / "empty" / "x.png").unlink()
        with pytest.raises(ValueError, match=words or r"no image in .*empty: looked for files ending in \.png, \.jpg"):
            find_images(places)


# ---- preprocessing


@pytest.mark.parametrize(("interpolation", "pillow"), [("bicubic", 3), ("bilinear", 2), ("nearest", 0)])
@pytest.mark.parametrize(("normalization", "mean", "deviation"), NORMALIZATIONS)
def test_preprocess_matches_arithmetic(
    interpolation: Any, pillow: Any, normalization: Any, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> None:
    image = Image.fromarray(noise(30, 50, 3))
    expected = np.asarray(image.resize((12, 12), pillow), dtype=np.float64) / 255
    expected = ((expected - mean) / deviation).transpose(2, 0, 1)
    array = Preprocess(12, interpolation, normalization=normalization)(image)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected, atol=1e-6)


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    size=st.integers(1, 40),
    interpolation=st.sampled_from(["bicubic", "bilinear", "nearest"]),
    resize=st.sampled_from(["stretch", "crop"]),
)
@settings(max_examples=100, deadline=None)
def test_preprocess_matches_torchvision(width: int, height: int, size: int, interpolation: Any, resize: Any) -> None:
    image = Image.fromarray(noise(height, width, 3))
    if resize == "crop" and max(width, height) > 32 * min(width, height):
        resize = "stretch"  # a strip is cropped first
    side = [size, size] if resize == "stretch" else [size]
    steps: list[Any] = [v2.Resize(side, v2.InterpolationMode(interpolation)), v2.CenterCrop(size), v2.PILToTensor()]
    pixels = Preprocess(size, interpolation, resize).pixels(image)
    assert np.array_equal(pixels, v2.Compose(steps)(image))
    assert pixels.shape == (3, size, size)


@pytest.mark.parametrize("shape", [(2, 1_000_000, 3), (1_000_000, 2, 3)])
def test_crop_of_a_strip_needs_no_memory(shape: tuple[int, ...]) -> None:
    strip = np.zeros(shape, np.uint8)
    strip[strip.shape[0] // 2 - 9 : strip.shape[0] // 2 + 9, strip.shape[1] // 2 - 9 : strip.shape[1] // 2 + 9] = 200
    pixels = Preprocess(224, resize="crop").pixels(Image.fromarray(strip))
    assert (pixels == 200).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("normalization", "mean", "deviation"), NORMALIZATIONS)
def test_normalize_in_torch_is_bit_equal(normalization: Any, mean: Any, deviation: Any, device: str) -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3 * 35).reshape(256, 3, 5, 7)
    preprocess = Preprocess(1, normalization=normalization)
    ours, theirs = preprocess.normalize(every), normalize(torch.from_numpy(every).to(device), preprocess).cpu()
    assert (theirs.dtype, theirs.shape) == (torch.float32, ours.shape)
    assert np.array_equal(ours, theirs)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(deviation))])
    assert torch.equal(theirs, reference(torch.from_numpy(every)))


def test_normalization_from_a_file_is_equal() -> None:
    assert Preprocess(normalization=[[0, 0, 0], [1, 0.5, 1]]) == Preprocess(normalization=((0, 0, 0), (1, 0.5, 1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, "image_size must be a whole number of at least 1 pixel, not 0"),
        ({"image_size": 2.0}, "not 2.0"),
        ({"image_size": True}, "not True"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; choose from: bicubic, bilinear, nearest"),
        ({"resize": "pad"}, "unknown resize 'pad'; choose from: stretch, crop"),
        ({"normalization": "clip"}, "unknown normalization 'clip'; choose from: imagenet, half, none, or a pair"),
        ({"normalization": ((0, 0, 0), (1, 1, 0))}, "is not ((mean of 3 colours), (deviation of 3 colours above 0))"),
        ({"normalization": ((0, 0, 0), (1, 1, float("inf")))}, "is not"),
        ({"normalization": [[0, 0], [1, 1]]}, "is not"),
        ({"normalization": 3}, "is not"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with raises_one_line(ValueError, match=re.escape(words)):
        Preprocess(**options)


# ---- without a framework


def test_images_need_numpy_and_pillow_alone() -> None:
    code = (
        "import sys; import dynadapter.images.reading, dynadapter.images.preprocess; "
        "print(sorted({'torch', 'torchvision', 'timm', 'lightning', 'scipy', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
