"""Few shots: k images of each class, drawn by seed, in every kind of data module."""

import hashlib
import json
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from commands import SMALL
from PIL import Image

from dynadapter.cli import main
from dynadapter.data import HubDataset, ImageFolder, ImageLists, ImageTable, Shapes, TorchVisionDataset, VTAB1k
from dynadapter.data.identity import data_hash, list_hash
from dynadapter.data.splits import path_in
from dynadapter.data.verify import verify
from dynadapter.training.class_weights import without_images

COUNTS = {"train": {"ant": 9, "bee": 6, "cat": 3}, "val": {"ant": 2, "bee": 1, "cat": 1}, "test": {"ant": 1, "cat": 2}}
NAMES = sorted(COUNTS["train"])
KINDS = ["folder", "held out", "table", "vtab", "hub", "torchvision", "shapes"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One folder of images that is an `ImageFolder`, an `ImageTable`, a task of VTAB and a data set on disk."""
    root = tmp_path_factory.mktemp("shots") / "set"
    generator, rows, lists = np.random.default_rng(0), ["path,label,split"], {}
    for split, counts in COUNTS.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                file = f"{split}/{name}/{k}.png"
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / file)
                rows.append(f"{file},{name},{split}")
                lists.setdefault(split, []).append(f"{file} {NAMES.index(name)}\n")
    (root / "table.csv").write_text("\n".join(rows))
    for split, file in {"train": "train800", "val": "val200", "test": "test"}.items():
        (root / f"{file}.txt").write_text("".join(lists[split]))
    (root / "classes.txt").write_text("\n".join(NAMES))
    if find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()
        feature = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        parts = {}
        for split, lines in lists.items():
            files, labels = zip(*(line.split() for line in lines), strict=True)
            columns = {"image": [str(root / file) for file in files], "label": [int(label) for label in labels]}
            parts[split] = datasets.Dataset.from_dict(columns, features=feature)
        datasets.DatasetDict(parts).save_to_disk(str(root.parent / "disk"))
    return root


def make(kind: str, root: Path, **options):
    """Return a data module of a kind over the images of `root`."""
    if kind == "hub":
        pytest.importorskip("datasets")
        return HubDataset(root.parent / "disk", **options)
    return {
        "folder": lambda: ImageFolder(root, **options),
        "held out": lambda: ImageFolder(root / "train", val_fraction=0.3, **options),
        "table": lambda: ImageTable(root / "table.csv", **options),
        "vtab": lambda: VTAB1k(root.parent, "set", **options),
        "torchvision": lambda: TorchVisionDataset("FakeData", args={"size": 60, "num_classes": 3}, **options),
        "shapes": lambda: Shapes(**options),
    }[kind]()


def names(samples) -> list[tuple[str, int]]:
    return [(str(getattr(source, "tobytes", lambda source=source: source)()), label) for source, label in samples]


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_has_k_images(kind, root):
    whole = names(make(kind, root).dataset("train").samples)
    available = Counter(label for _, label in whole)
    smaller: set[tuple[str, int]] = set()
    for shots in (1, 2, 4, 8, 16):
        data = make(kind, root, shots=shots, shots_seed=1)
        drawn = names(data.dataset("train").samples)
        assert Counter(label for _, label in drawn) == {c: min(shots, n) for c, n in available.items()}
        assert drawn == [one for one in whole if one in set(drawn)]  # in their order, each once
        assert drawn == names(make(kind, root, shots=shots, shots_seed=1).used("train"))
        assert smaller < {*drawn} or (smaller == {*drawn} == {*whole})
        smaller = {*drawn}
    for split in ("val", "test"):
        if kind not in ("held out", "torchvision") or split == "val":
            assert names(data.dataset(split).samples) == names(make(kind, root).dataset(split).samples)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_draw_other_images(kind, root):
    drawn = [names(make(kind, root, shots=2, shots_seed=seed).dataset("train").samples) for seed in range(3)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


@pytest.mark.parametrize("seed", range(3))
def test_draw_is_a_hash_of_the_path(seed, root, tmp_path):
    (tmp_path / "moved").symlink_to(root)
    expected = []
    for name, count in COUNTS["train"].items():
        paths = [f"/train/{name}/{k}.png" for k in range(count)]
        digests = {path: hashlib.sha256(f"{seed}\0shots\0{path}".encode()).digest()[:8] for path in paths}
        expected += sorted(sorted(paths, key=digests.__getitem__)[:2])
    for place in (root, tmp_path / "moved"):
        samples = ImageFolder(place, shots=2, shots_seed=seed).used("train")
        assert [str(source).removeprefix(str(place)) for source, _ in samples] == expected


@pytest.mark.parametrize("kind", ["folder", "table", "vtab", "lists"])
def test_draw_does_not_follow_the_root(kind, root, lists, monkeypatch):
    """A root may be absolute or relative: the same images, and the same list in a checkpoint."""
    folder = lists if kind == "lists" else root
    drawn = []
    for place, start in (
        ("/", folder),
        (folder, "."),
        (folder.parent, folder.name),
        (folder.parent, f"./{folder.name}"),
    ):
        monkeypatch.chdir(place)
        path = Path(start)
        data = {
            "folder": lambda path=path: ImageFolder(path, shots=2),
            "table": lambda path=path: ImageTable(path / "table.csv", shots=2),
            "vtab": lambda path=path: VTAB1k(path / "..", root.name, shots=2),
            "lists": lambda path=path: ImageLists(path / "images", path / "annotations" / "test_meta.list", shots=1),
        }
        used = data[kind]().used("train")
        drawn.append(([(str(file.resolve()), label) for file, label in used], list_hash(used, data[kind]().folder)))
    assert drawn[1:] == drawn[:1] * 3


def test_lists_may_name_files_from_the_root(lists, monkeypatch):
    monkeypatch.chdir(lists)
    (lists / "absolute.txt").write_text(f"{lists}/images/ant/0.png 0\n")
    (lists / "relative.txt").write_text("images/ant/0.png 0\n")
    for name in ("absolute", "relative"):
        assert ImageLists("images", train=f"{name}.txt").samples("train") == [(Path("images/ant/0.png"), 0)]


def test_file_in_a_folder_called_like_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("images/0.png", "images/images/0.png"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    Path("a.txt").write_text("images/0.png 0\n")
    for root in ("images", tmp_path / "images"):
        [(file, _)] = ImageLists(root, train="a.txt").samples("train")
        assert file.resolve() == tmp_path / "images" / "images" / "0.png"


def test_draw_does_not_follow_class_indices(root):
    data, other = (ImageFolder(root, shots=2) for _ in range(2))
    other.take_classes(NAMES[::-1])
    files = [[str(source) for source, _ in one.dataset("train").samples] for one in (data, other)]
    assert files[0] == files[1]
    assert [label for _, label in other.dataset("train").samples] == [2, 2, 1, 1, 0, 0]


def test_small_classes_are_named(root):
    lines = without_images(ImageFolder(root, shots=8))
    assert lines == ["fewer than 8 training images, all of them used, of: bee (6), cat (3)"]
    assert without_images(ImageFolder(root, shots=3)) == []


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_of_zero_are_refused(shots):
    with pytest.raises(ValueError, match=f"shots must be at least 1, not {shots}"):
        Shapes(shots=shots)


@pytest.mark.parametrize("kind", ["folder", "table", "vtab"])
def test_files_beyond_the_shots_are_counted(kind, root):
    data = make(kind, root, shots=2)
    report = verify(data, threads=1)
    train = next(split for split in report.splits if split.name == "train")
    assert train.classes == dict.fromkeys(NAMES, 2)
    assert train.hash == data_hash(data.dataset("train").samples)
    assert "6 train + 4 val + 3 test" in report.account
    assert "12 beyond the shots" in report.account
    assert [finding.text for finding in report.findings if ".png" in finding.text] == []


def test_training_is_recorded_and_resumed(root, tmp_path):
    data = ["--data=ImageFolder", f"--data.root={root}", "--data.shots=2", "--data.shots_seed=1", "--data.batch_size=3"]
    rest = ["--data.balanced=true", f"--trainer.default_root_dir={tmp_path}", "--epochs=1"]
    main(["fit", *data, *SMALL, *rest])
    run = tmp_path / "version_0"
    main(["fit", "--resume", str(run), "--epochs=2"])
    content = json.loads((run / "run.json").read_text())
    used = ImageFolder(root, shots=2, shots_seed=1).used("train")
    assert content["how"] == "finished"
    assert content["data"]["splits"]["train"]["hash"] == data_hash(used)
    assert content["protocol"]["data"] | {"shots": 2, "shots_seed": 1} == content["protocol"]["data"]


# ---- lists of shots drawn by others


@pytest.fixture
def lists(root, tmp_path) -> Path:
    """Lists in NOAH's layout over the images of `root`."""
    (tmp_path / "images").symlink_to(root / "train")
    (tmp_path / "annotations").mkdir()
    parts = {"train_meta.list.num_shot_1.seed_0": (0, 0), "val_meta.list": (1,), "test_meta.list": (2, 1)}
    for file, numbers in parts.items():
        lines = [f"{name}/{k}.png {label}\n" for label, name in enumerate(NAMES) for k in numbers]
        (tmp_path / "annotations" / file).write_text("".join(lines))
    return tmp_path


def of_lists(lists: Path, **options) -> ImageLists:
    files = {"train": "train_meta.list.num_shot_1.seed_0", "val": "val_meta.list", "test": "test_meta.list"}
    given = {split: lists / "annotations" / file for split, file in files.items()} | options
    return ImageLists(lists / "images", **given)


def test_lists_name_images_of_each_split(lists, root):
    data = of_lists(lists)
    assert data.class_names == ["0", "1", "2"]
    for split, numbers in {"train": (0, 0), "val": (1,), "test": (2, 1)}.items():
        expected = [(lists / "images" / name / f"{k}.png", NAMES.index(name)) for name in NAMES for k in numbers]
        assert data.dataset(split).samples == expected
    assert of_lists(lists, classes=root / "classes.txt").class_names == NAMES
    assert [len(of_lists(lists, val=None).samples(split)) for split in ("train", "val")] == [6, 0]
    assert {split.name: split.images for split in verify(data, threads=1).splits} == {"train": 6, "val": 3, "test": 6}
    assert [label for _, label in of_lists(lists, shots=1).used("train")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("../x.png 0", r"val_meta.list:1: path '../x.png' leaves the folder of the images, .*images"),
        ("ant/0.png one", r"val_meta.list:1: .* is not 'PATH LABEL'"),
        (
            "ant/0.png 40",
            r"val_meta.list:1: label 40 is higher than the number of listed images; .* give it as classes",
        ),
        ("ant/0.png -1", r"val_meta.list:1: label -1 is out of range; valid labels are 0 to 2"),
        ("ant/99.png 0", r"val_meta.list:1: image ant/99.png does not exist in .*images \(1 of the 1 listed"),
        ("ant/link.png 0", r"val_meta.list:1: image ant/link.png leads out of .*images, to /etc/hostname; copy"),
    ],
)
def test_wrong_lines_of_a_list_are_named(line, words, lists, tmp_path):
    (tmp_path / "own" / "ant").mkdir(parents=True)
    (tmp_path / "own" / "ant" / "link.png").symlink_to("/etc/hostname")
    if "link" in line:
        (lists / "images").unlink()
        (lists / "images").symlink_to(tmp_path / "own")
    (lists / "annotations" / "val_meta.list").write_text(line + "\n")
    with pytest.raises(ValueError, match=words):
        of_lists(lists).samples("val")


def test_missing_lists_are_named(lists):
    for options, words in [
        ({"test": lists / "no"}, "test: .*no does not exist"),
        ({"classes": "x"}, "classes: x does"),
    ]:
        with pytest.raises(ValueError, match=words):
            of_lists(lists, **options)
    with pytest.raises(ValueError, match="there is no list; give train, val or test"):
        ImageLists(lists / "images")
    with pytest.raises(ValueError, match="test has no list; give test"):
        of_lists(lists, test=None).setup("test")


@pytest.mark.parametrize("folder", ["set", "/data/set", ".", "..", "/", "../set", "set/../set"])
def test_path_in_a_folder(folder, monkeypatch):
    """The path is that of relpath, which a file below the folder does not need."""
    inside = ["a.png", "train/cat/a.png", "train//./a.png", "train/../a.png", "..a/b..png", "../set2/a.png"]
    files = [Path(folder, name) for name in inside] + [Path("set/a.png"), Path("/data/set/a.png"), Path("settings/a")]
    for file in files:
        assert path_in(file, Path(folder)) == "/" + Path(os.path.relpath(file, folder)).as_posix()
        assert path_in(file, None) == file.as_posix()
    calls = []
    monkeypatch.setattr(os.path, "relpath", lambda *given: calls.append(given) or "x")
    path_in(Path(folder, "train/a.png"), Path(folder))
    assert bool(calls) == (folder == "." or ".." in folder)
