"""A damaged image is left out; a machine that fails to read stops the work; memory for decoding is bounded."""

import csv
import errno
import io
import os
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import refused
from PIL import Image, ImageFile
from test_cli_predict import arguments, bundle, images, run  # noqa: F401
from test_image_values import tiff

from dynadapter.images import reading
from dynadapter.images.memory import Budget
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import UnreadableImage, load_image, why_unreadable
from dynadapter.serve.table import PredictionTable

NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
FILES: dict[str, dict[str, Any]] = {
    "a.png": {},
    "a.jpg": {},
    "progressive.jpg": {"progressive": True},
    "a.webp": {"lossless": True},
    "a.bmp": {},
    "a.gif": {},
    "a.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "jpeg.tif": {"compression": "jpeg"},
    "a.ppm": {},
}
MACHINE = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN)
FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Failing(io.FileIO):
    """A file whose second half cannot be read."""

    code = errno.EIO

    def readinto(self, buffer: Any) -> int:
        if self.tell() + len(buffer) > os.fstat(self.fileno()).st_size // 2:
            raise OSError(self.code, os.strerror(self.code))
        return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("name", FILES)
def test_failing_disk_is_no_damaged_image(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    Image.fromarray(NOISE).save(path, **FILES[name])
    load_image(path)
    monkeypatch.setattr(reading, "open_regular", lambda path: io.BufferedReader(Failing(path), 512))
    for read in (load_image, why_unreadable, Preprocess(8).read):
        with pytest.raises(OSError, match=f"{name}'") as caught:
            read(path)
        assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # cut off, and the disk works
    assert why_unreadable(path)


def test_failure_without_a_message_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: object, **_: object) -> None:
        raise ValueError

    monkeypatch.setattr(Image, "open", fail)
    assert why_unreadable(b"image") == "ValueError"


@pytest.mark.parametrize("code", [*MACHINE, *FILE], ids=errno.errorcode.get)
def test_which_errors_are_the_images(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(reading, "open_regular", fail)
    kind = UnreadableImage if code in FILE else OSError
    with pytest.raises(kind) as caught:
        load_image(tmp_path / "a.png")
    assert isinstance(caught.value, OSError) == (code in MACHINE)
    assert ("does not exist" if code == errno.ENOENT else os.strerror(code)) in str(caught.value)


def test_open_file_that_fails_is_no_damaged_image() -> None:
    class Download(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    with pytest.raises(TimeoutError, match="timed out"):
        load_image(Download())


def test_too_little_memory_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: bytearray(2**62))
        with pytest.raises(MemoryError, match=r"not enough memory to decode image .*a\.png; use fewer"):
            load_image(tmp_path / "a.png")

    def decoder_fails(self: ImageFile.ImageFile) -> None:
        raise OSError("out of memory error when reading image file")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoder_fails)
    with pytest.raises(UnreadableImage):  # there is memory: what the file asks for is absurd
        load_image(tmp_path / "a.png")
    monkeypatch.setattr(reading, "BYTES_PER_PIXEL", 2**46)
    monkeypatch.setattr(reading, "BUDGET", Budget(2**62))
    with pytest.raises(MemoryError):
        load_image(tmp_path / "a.png")


# ---- predict


def test_predict_stops_and_goes_on(bundle, images, tmp_path, capsys, monkeypatch):  # noqa: F811
    whole, out = run(bundle, images, tmp_path / "whole.csv"), tmp_path / "out.csv"
    files = [row["file"] for row in csv.DictReader(whole.read_text().splitlines())]
    real = reading.open_regular
    for failure, words in (
        (OSError(errno.ESTALE, "Stale file handle"), f"Stale file handle: '{files[17]}'; stopped after"),
        (MemoryError(), "not enough memory to decode image"),
    ):

        def opened(path: Any, failure: Exception = failure) -> Any:
            if str(path) == files[17]:
                raise failure
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(reading, "open_regular", opened)
            line = refused(arguments(bundle, images, out, "--max_skipped=26"), capsys)
        assert words in line
        assert "the same command continues from there" in line
        assert not out.exists()
    decoded: list[str] = []
    monkeypatch.setattr(reading, "open_regular", lambda path: decoded.append(str(path)) or real(path))
    run(bundle, images, out)
    assert out.read_bytes() == whole.read_bytes()
    assert len(decoded) == len(set(decoded)) < len(files)  # each once, and finished batches are kept


def test_stale_folder_is_no_other_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and times that cannot be looked up would make an unfinished table one of other images."""

    def stale(path: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr("dynadapter.serve.table.os.stat", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        PredictionTable(tmp_path / "t.csv", ["a.png"], 1, {})


# ---- memory


def test_threads_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, "PNG")
    need = 17 * 200 * 200 + 40 * 400 + len(stream.getvalue())
    budget, now, most, lock = Budget(2 * need), 0, 0, threading.Lock()
    load = ImageFile.ImageFile.load

    def counted(self: ImageFile.ImageFile) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        try:
            return load(self)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(reading, "BUDGET", budget)
    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(Preprocess(8).read, [stream.getvalue()] * 24))
    assert most == 2
    assert len({pixels.tobytes() for pixels in read}) == 1
    with budget.reserved(2 * need):  # everything was given back, also after an error
        pass
    assert why_unreadable(stream.getvalue()[:2000])
    with budget.reserved(2 * need):
        pass


def test_small_files_that_need_much_are_refused() -> None:
    """A strip needs weights of its length to be resized, and a tile can be larger than its image."""
    strip = tiff(np.zeros((1, 4), np.uint8), 8)
    strip = strip.replace(struct.pack("<HHIHH", 256, 3, 1, 4, 0), struct.pack("<HHII", 256, 4, 1, 80_000_000))
    assert "4.6 GB of memory are more than the limit" in str(why_unreadable(strip))
    tiled = tiff(np.zeros((4, 4), np.uint8), 8)
    for tag, kind, value, new in ((278, 3, 4, 322), (279, 4, 16, 323)):
        tiled = tiled.replace(struct.pack("<HHII", tag, kind, 1, value), struct.pack("<HHII", new, 4, 1, 2**17))
    assert "GB of memory are more than the limit" in str(why_unreadable(tiled))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_child_process_starts_with_all_memory() -> None:
    budget = Budget(10)
    with budget.reserved(10):
        child = os.fork()
        if not child:
            with budget.reserved(10):
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
