"""Every file of a folder of images is accounted for: read, or left out for a reason."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import raises_one_line
from PIL import Image
from test_cli_predict import write_bundle, write_images
from test_data_vtab import make as make_vtab
from tiny import make_classifier, trainer

from dynadapter.cli import main
from dynadapter.data import ImageFolder, ImageTable, Shapes, VTAB1k
from dynadapter.data.dataset import ImageDataset
from dynadapter.data.verify import verify
from dynadapter.images.accounting import account
from dynadapter.images.reading import find_images


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".png", ".jpg"):
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes(b"no image")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set with four read images of each split, and a file left out for each reason."""
    place = tmp_path / "set"
    for split, count in (("train", 4), ("valid", 2), ("test", 1)):
        for name in "ab":
            for k in range(count):
                write(place / split / name / f"{k}.png")
    write(place / "train" / "a" / "deep" / "er" / "x.JPG".lower())
    write(place / "train" / "a" / "photo.heic")
    write(place / "train" / "a" / "README")
    write(place / "train" / "b" / ".hidden.png")
    write(place / "train" / ".thumbs" / "a.png")
    write(place / "dev" / "a" / "0.png")
    write(place / "loose.png")
    (place / "train" / "a" / "broken.png").symlink_to(tmp_path / "nothing.png")
    for k in range(3):
        write(tmp_path / "elsewhere" / f"{k}.png")
    (place / "train" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (place / "train" / "a" / "circle").symlink_to(place)
    (place / "train" / "c").symlink_to(tmp_path / "elsewhere")  # a class folder may be a link
    return place


LEFT_OUT = {
    "hidden": 2,
    "behind links to folders": 3,
    "images in no split": 2,
    ".heic": 1,
    "without suffix": 1,
    "broken links": 1,
}


def numbers(line: str) -> dict[str, int]:
    parts = line.partition(" = ")[2].partition(";")[0].split(" + ")
    return {name: int(count.replace(",", "")) for count, _, name in (part.partition(" ") for part in parts)}


def test_every_file_has_its_reason(root: Path) -> None:
    counted = ImageFolder(root).account()
    assert counted.read == {"train": 12, "val": 4, "test": 2}
    assert counted.left_out == LEFT_OUT
    there = sum(len(files) for _, _, files in os.walk(root))  # broken links included
    behind = 3 + 3  # in the class that is a link, and in the link below a class
    assert sum(numbers(str(counted)).values()) == there + behind
    assert str(counted).startswith(f"{there + behind} files in {root} = 12 train + 4 val + 2 test + ")


@pytest.mark.parametrize("place", [".", "./", "../set", "train/.."])
def test_relative_folder(place: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    counted = ImageFolder(place).account()
    assert counted.read == {"train": 12, "val": 4, "test": 2}
    assert counted.left_out == LEFT_OUT


@pytest.mark.timeout(20)
def test_this_folder_and_another(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "valid")
    files = [*find_images("."), *find_images(tmp_path / "elsewhere")]
    assert account(Path("."), {"images": files}).read == {"images": 4}


def test_table_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [str(write(Path("a") / f"{k}.png")) for k in range(4)]
    Path("t.csv").write_text("path,label\n" + "".join(f"{name},{k % 2}\n" for k, name in enumerate(names)))
    counted = ImageTable("t.csv").account()
    assert sum(counted.read.values()) == 4
    assert counted.left_out == {".csv": 1}


def test_unreadable_and_held_out_images_count(tmp_path: Path) -> None:
    for k in range(20):
        write(tmp_path / "train" / "ab"[k % 2] / f"{k}.png")
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    data = ImageFolder(tmp_path, on_error="skip")
    with pytest.warns(UserWarning, match="skipped 1 unreadable image"):
        read = {split: len(data.dataset(split)) for split in ("train", "val")}
    counted = data.account()
    assert {name: counted.read[name] for name in read} == read
    assert counted.left_out == {"unreadable": 1}
    assert sum(read.values()) == 19


def test_lists_account_for_their_folder(tmp_path: Path) -> None:
    make_vtab(tmp_path)
    folder = tmp_path / "toys"
    data = VTAB1k(tmp_path, "toys", split="train800")
    write(folder / "images" / "unlisted.png")
    counted = data.account()
    used = {path for split in ("train", "val", "test") for path, _ in data.samples(split)}
    assert sum(counted.read.values()) == len(used)
    assert counted.left_out["images in no split"] == 1
    first = min(used)
    first.unlink()
    data = VTAB1k(tmp_path, "toys", split="train800", on_error="skip")
    assert "1 more are listed and missing" in str(data.account())
    assert Shapes().account() is None


def lines(text: str, place: Path) -> list[str]:
    return [line for line in text.splitlines() if re.search(rf"\d+ files in {re.escape(str(place))} = ", line)]


def test_commands_print_the_account(root, tmp_path, capsys, caplog):
    expected = str(ImageFolder(root).account())
    with pytest.raises(SystemExit):  # equal images in two splits are errors
        main(["verify", "--data=ImageFolder", f"--data.root={root}"])
    assert lines(capsys.readouterr().out, root) == [expected]
    assert verify(ImageFolder(root)).account == expected
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        model = make_classifier(num_classes=3)
        trainer(max_steps=1, limit_val_batches=1).fit(model, datamodule=ImageFolder(root, batch_size=4))
        assert [expected in line for line in lines(caplog.text, root)] == [True]


def test_predict_command_prints_the_account(tmp_path, capsys):
    for name in ("a.png", "more/b.jpg", "c.heic", ".d.png"):
        write(tmp_path / "in" / name)
    write_images(tmp_path / "pictures")
    bundle = write_bundle(tmp_path / "bundle", tmp_path / "pictures")
    main(["predict", f"--bundle={bundle}", f"--images={tmp_path / 'in'}", f"--out={tmp_path / 'out.csv'}"])
    [line] = lines(capsys.readouterr().out, tmp_path / "in")
    assert numbers(line) == {"images": 2, ".heic": 1, "hidden": 1}


# ---- worker processes


def shared_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    disk = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr("dynadapter.data.workers.os.statvfs", lambda path: disk)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no limited shared memory here")
def test_small_shared_memory_is_one_line(tmp_path, monkeypatch):
    data = Shapes(200, 100, 100, batch_size=64, num_workers=4, image_size=224)
    shared_memory(monkeypatch, 32 * 2**20)
    with raises_one_line(ValueError, match=r"/dev/shm has 34 MB free, and the batches of num_workers=4") as error:
        data.test_dataloader()
    needed = 100 * 3 * 224 * 224 * 4  # all images are ready at once
    assert f"need {needed / 1e6:.0f} MB" in str(error.value)
    shared_memory(monkeypatch, needed + 4096)
    data.test_dataloader()
    shared_memory(monkeypatch, 0)
    Shapes(8, 8, 8, image_size=8).test_dataloader()  # without workers
    Shapes(8, 8, 8, image_size=8, num_workers=2, cache=True).train_dataloader()


def test_waiting_for_workers_ends(monkeypatch):
    data = Shapes(8, 8, 8, image_size=8, num_workers=1)
    assert data.test_dataloader().timeout > 0
    monkeypatch.setattr("dynadapter.data.base.TIMEOUT", 1)
    monkeypatch.setattr(ImageDataset, "pixels", lambda *given: __import__("time").sleep(4))
    with raises_one_line(TimeoutError, match="no batch came from the worker processes"):
        list(data.test_dataloader())
