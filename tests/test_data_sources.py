"""Data sets of other libraries: `datasets` on disk and by name, and torchvision's."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SMALL
from conftest import raises_one_line
from PIL import Image
from tiny import make_classifier, trainer

from dynadapter.cli import main
from dynadapter.cli.layers import checkpoint_settings
from dynadapter.cli.resume import expand_resume
from dynadapter.data import HubDataset, TorchVisionDataset
from dynadapter.data.identity import data_hash
from dynadapter.data.verify import verify

needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="needs the package datasets")
NAMES = ["ant", "bee", "cat"]


def picture(k: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, (10 + k % 3, 9, 3), dtype=np.uint8))


def features(**labels):
    import datasets

    return datasets.Features({"image": datasets.Image(), **labels})


def write(folder: Path, labels: dict[str, list], feature=None, name: str = "label") -> Path:
    """Write a data set to disk by its own library; image k of a split is `picture`(k)."""
    import datasets

    datasets.disable_progress_bars()
    feature = feature or datasets.ClassLabel(names=NAMES)
    parts = {
        split: datasets.Dataset.from_dict(
            {"image": [picture(k) for k in range(len(part))], name: part}, features=features(**{name: feature})
        )
        for split, part in labels.items()
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> Path:
    labels = {"train": [0, 1, 2] * 6, "validation": [2, 1, 0, 0], "test": [1, 1, 2]}
    return write(tmp_path_factory.mktemp("disk") / "set", labels)


# ---- datasets


@needs_datasets
def test_disk_gives_images_names_and_splits(on_disk):
    data = HubDataset(on_disk, image_size=8)
    assert data.class_names == NAMES
    assert [[label for _, label in data.samples(split)] for split in ("train", "val", "test")] == [
        [0, 1, 2] * 6,
        [2, 1, 0, 0],
        [1, 1, 2],
    ]
    expected = [data.preprocess(picture(k)) for k in range(18)]
    for k, (image, _) in enumerate(data.dataset("train")):
        assert np.array_equal(image.numpy(), expected[k])
    assert str(data.samples("test")[2][0]) == f"{on_disk}/test[2]"


@needs_datasets
@pytest.mark.parametrize("options", [{"num_workers": 2}, {"cache": True}, {"augment": "flip"}])
def test_loaders_agree_on_a_disk_set(options, on_disk):
    def batches(**options):
        torch.manual_seed(0)
        data = HubDataset(on_disk, image_size=8, batch_size=5, **options)
        return [(images, labels) for images, labels in data.train_dataloader()]

    plain = batches(augment=options.get("augment", "none"))
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(plain, batches(**options), strict=True)
    )
    assert len(plain) == 3


@needs_datasets
def test_missing_val_is_held_out(tmp_path):
    few = HubDataset(write(tmp_path / "few", {"train": ["9", "10", "2"] * 10}, string()))
    more = HubDataset(write(tmp_path / "more", {"train": ["9", "10", "2"] * 12}, string()))
    assert few.class_names == ["2", "9", "10"]
    held = {source.index for source, _ in few.samples("val")}
    kept = {source.index for source, _ in few.samples("train")}
    assert sorted([*held, *kept]) == list(range(30))
    assert len(held) >= 3
    assert held <= {source.index for source, _ in more.samples("val")}
    with pytest.raises(ValueError, match="has no images for test"):
        few.samples("test")


def string():
    import datasets

    return datasets.Value("string")


@needs_datasets
def test_identity_is_that_of_the_bytes(on_disk, tmp_path):
    data = HubDataset(on_disk)
    files = []
    for source, label in data.samples("train"):
        file = tmp_path / f"{source.index}.png"
        file.write_bytes(source.fetch())
        files.append((file, label))
    assert data_hash(data.samples("train")) == data_hash(files)
    by, keys = data.dataset("train").image_keys()
    assert (by, len(set(keys.tolist()))) == ("content", 18)


@needs_datasets
def test_verify_finds_equal_images(on_disk):
    report = verify(HubDataset(on_disk))
    assert [(split.images, split.unreadable) for split in report.splits] == [(18, 0), (4, 0), (3, 0)]
    assert "leak" in {finding.kind for finding in report.findings}  # splits repeat pictures of train


def multi():
    import datasets

    return datasets.List(datasets.Value("int64"))


WRONG = {
    "several labels": ({"train": [[0], [0, 1]]}, "multi", {}, "holds several values; an image has one label"),
    "no split": ({"extra": [0, 1]}, None, {}, "has the splits extra; give train_split"),
    "unknown split": (
        {"train": [0, 1]},
        None,
        {"test_split": "tset"},
        "has no split 'tset'; test_split may be one of: train",
    ),
    "unknown column": ({"train": [0, 1]}, None, {"label_column": "fine"}, "has no column 'fine'; label_column"),
    "no image": ({"train": [0, 1]}, None, {"image_column": "label"}, "column label holds no images"),
}


@needs_datasets
@pytest.mark.parametrize("case", WRONG)
def test_wrong_sets_are_one_line(case, tmp_path):
    labels, feature, options, words = WRONG[case]
    folder = write(tmp_path / "set", labels, multi() if feature else None)
    with raises_one_line(ValueError, match=words):
        HubDataset(folder, **options)


@needs_datasets
@pytest.mark.parametrize("other", [["dog", "cat"], ["cat", "dog", "emu"], None])
def test_splits_with_other_classes_are_named(other, tmp_path):
    import datasets

    parts = {}
    for split, names in (("train", ["cat", "dog"]), ("test", other)):
        feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        columns = {"image": [picture(0), picture(1)], "label": [0, 1]}
        parts[split] = datasets.Dataset.from_dict(columns, features=features(label=feature))
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    words = "set: column label has other classes in split test than in split train; cast both to one ClassLabel"
    with raises_one_line(ValueError, match=words):
        HubDataset(tmp_path / "set")


def unlabelled(folder: Path) -> Path:
    """Write a training split with labels and a test split without."""
    import datasets

    named = datasets.Dataset.from_dict(
        {"image": [picture(k) for k in range(6)], "label": [0, 1] * 3},
        features=features(label=datasets.ClassLabel(names=NAMES)),
    )
    bare = datasets.Dataset.from_dict({"image": [picture(7)]}, features=features())
    datasets.DatasetDict({"test": bare, "train": named}).save_to_disk(str(folder))
    return folder


@needs_datasets
def test_split_without_labels_is_left_out(tmp_path):
    data = HubDataset(unlabelled(tmp_path / "set"), val_fraction=0)
    assert len(data.samples("train")) == 6
    with pytest.raises(ValueError, match="has no images for test"):
        data.samples("test")
    with raises_one_line(ValueError, match="set: split test has no column label; give another test_split"):
        HubDataset(tmp_path / "set", test_split="test")


@needs_datasets
def test_position_in_an_epoch_fits_another_path(on_disk, monkeypatch):
    def loader(path):
        torch.manual_seed(0)
        return HubDataset(path, image_size=8, batch_size=5).train_dataloader()

    first = loader(on_disk)
    next(iter(first))
    monkeypatch.chdir(on_disk.parent)
    second = loader(on_disk.name)
    second.load_state_dict(first.state_dict())
    assert len(list(second)) == 2


@needs_datasets
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "is neither a folder nor a name on the Hub"),
        ("a/b", "download: true"),
        ("../a", "is neither a folder nor a name"),
    ],
)
def test_names_are_not_fetched_by_themselves(path, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was fetched"))
    with pytest.raises(ValueError, match=words):
        HubDataset(path)


@needs_datasets
def test_name_is_loaded_on_request(on_disk, monkeypatch):
    import datasets

    asked = []
    found = datasets.load_from_disk(str(on_disk))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **given: asked.append((args, given)) or found)
    data = HubDataset("owner/name", config="small", revision="v1", download=True)
    assert asked == [(("owner/name", "small"), {"revision": "v1"})]
    assert len(data.samples("train")) == 18
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(
        ValueError, match="owner/name cannot be loaded from the Hub: ZeroDivisionError: division by zero"
    ):
        HubDataset("owner/name", download=True)


@needs_datasets
def test_files_outside_are_not_read(tmp_path):
    import datasets

    secret = tmp_path / "secret.png"
    picture(0).save(secret)
    rows = datasets.Dataset.from_dict(
        {"image": [{"path": str(secret), "bytes": None}], "label": [0]},
        features=features(label=datasets.ClassLabel(names=NAMES)),
    )
    folder = tmp_path / "set"
    rows.save_to_disk(str(folder))
    assert HubDataset(folder, val_fraction=0).samples("train")[0][0].fetch() == secret.read_bytes()  # kept inside
    table = rows.data.table  # as written by another program
    import pyarrow

    [file] = folder.glob("*.arrow")
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = HubDataset(folder, val_fraction=0, image_size=8)
    with pytest.raises(ValueError, match="names a file outside the data set"):
        data.dataset("train")[0]


# ---- torchvision


def fake(**options) -> TorchVisionDataset:
    given = {
        "dataset": "FakeData",
        "args": {"image_size": [3, 12, 12], "num_classes": 3},
        "splits": {"train": {"size": 24}, "test": {"size": 6, "random_offset": 100}},
        "image_size": 32,
        "batch_size": 6,
    }
    return TorchVisionDataset(**(given | options))


def test_torchvision_images_and_labels_are_its_own():
    from torchvision.datasets import FakeData

    data, reference = fake(val_fraction=0), FakeData(24, (3, 12, 12), 3)
    assert data.class_names == ["0", "1", "2"]
    assert [label for _, label in data.samples("train")] == [reference[k][1] for k in range(24)]
    for k in (0, 23):
        assert np.array_equal(data.dataset("train")[k][0].numpy(), data.preprocess(reference[k][0]))
    assert [str(source) for source, _ in data.samples("test")][5] == "FakeData/test[5]"


def test_training_on_torchvision(tmp_path):
    model, data = make_classifier(num_classes=3), fake()
    run = trainer(max_epochs=1)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    assert run.callback_metrics["test/acc"] >= 0
    assert len(model.images["val"]) == len(data.samples("val")) > 0


def mnist(root: Path) -> Path:
    """Write tiny files in the format of MNIST: big-endian sizes, then bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 20), ("t10k", 5)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        head = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())
    return root


def pets(root: Path) -> Path:
    """Write a set in the layout of OxfordIIITPet: four breeds of two species, three images of each."""
    folder, rows = root / "oxford-iiit-pet", []
    for name in ("images", "annotations/trimaps"):
        (folder / name).mkdir(parents=True)
    for breed, (name, species) in enumerate((("Abyssinian", 1), ("beagle", 2), ("Bengal", 1), ("boxer", 2)), start=1):
        for k in range(3):
            picture(k + 3 * breed).save(folder / "images" / f"{name}_{k}.jpg")
            rows.append(f"{name}_{k} {breed} {species} 1")
    for split in ("trainval", "test"):
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(rows) + "\n")
    return root


PETS = {"train": {"split": "trainval"}, "test": {"split": "test"}}


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        ("category", [0, 1, 2, 3], ["Abyssinian", "Beagle", "Bengal", "Boxer"]),
        ("binary-category", [0, 1, 0, 1], ["0", "1"]),
    ],
)
def test_labels_are_those_of_the_items(kind, labels, names, tmp_path):
    data = TorchVisionDataset("OxfordIIITPet", pets(tmp_path), args={"target_types": kind}, splits=PETS)
    assert [label for _, label in data.samples("test")] == [label for label in labels for _ in range(3)]
    assert data.class_names == names


def test_labels_of_several_kinds_are_refused(tmp_path):
    kinds = ["category", "binary-category"]
    with raises_one_line(ValueError, match="not a class index; an image has one label"):
        TorchVisionDataset("OxfordIIITPet", pets(tmp_path), args={"target_types": kinds}, splits=PETS)


def test_damaged_image_of_torchvision_keeps_its_label(tmp_path):
    (pets(tmp_path) / "oxford-iiit-pet" / "images" / "Bengal_0.jpg").write_bytes(b"")
    data = TorchVisionDataset("OxfordIIITPet", tmp_path, splits=PETS)
    assert [label for _, label in data.samples("test")] == [label for label in range(4) for _ in range(3)]


def test_torchvision_splits_follow_the_class(tmp_path):
    data = TorchVisionDataset("torchvision.datasets.MNIST", root=mnist(tmp_path), val_fraction=0)
    assert data.class_names[3] == "3 - three"
    assert [label for _, label in data.samples("train")] == [k % 10 for k in range(20)]
    assert len(data.samples("test")) == 5


def test_valid_is_val(tmp_path):
    for split, count in (("train", 4), ("valid", 3), ("test", 2)):
        for name in ("AT", "BE"):
            (tmp_path / "country211" / split / name).mkdir(parents=True)
            for k in range(count):
                picture(k).save(tmp_path / "country211" / split / name / f"{k}.jpg")
    data = TorchVisionDataset("Country211", tmp_path)
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [8, 6, 4]


def test_unknown_split_is_no_download(tmp_path):
    with raises_one_line(ValueError, match=r"Unknown value 'train' .*; name them, as in splits: {train: ") as error:
        TorchVisionDataset("OxfordIIITPet", pets(tmp_path))
    assert "download" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "CIFAR99"}, "has no data set 'CIFAR99'"),
        ({"dataset": "os.system"}, "has no data set 'os.system'"),
        ({"dataset": "LSUN"}, "has no data set 'LSUN'"),
        ({"args": {"transform": "x"}}, "no argument 'transform' to set"),
        ({"args": {"sizes": 3}}, "no argument 'sizes' to set; it has: size, image_size"),
        ({"args": {"size": {"a": 1}}}, "must be plain values"),
        ({"splits": {"dev": {}}}, "it may name train, val and test"),
        ({"dataset": "CIFAR10", "args": {}, "splits": None, "root": "empty"}, "--data.download true fetches it"),
    ],
)
def test_wrong_torchvision_sets_are_one_line(options, words):
    with raises_one_line(ValueError, match=words):
        fake(**options)


@pytest.mark.parametrize("label", [torch.tensor([0, 1]), (1, 2), {"a": 1}, 0.5, "cat"])
def test_several_labels_are_refused(label, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FakeData.__getitem__", lambda self, k: (picture(k), label))
    with raises_one_line(ValueError, match="not a class index; an image has one label"):
        fake()


# ---- on the command line


@needs_datasets
def test_commands_read_a_disk_set(on_disk, tmp_path, capsys):
    data = ["--data=HubDataset", f"--data.path={on_disk}", "--data.batch_size=6"]
    main(["fit", *data, *SMALL, "--epochs=1", f"--trainer.default_root_dir={tmp_path}"])
    run = tmp_path / "version_0"
    recorded = json.loads((run / "run.json").read_text())
    main(["test", f"--ckpt_path={run}/checkpoints/last.ckpt", "--trainer.accelerator=cpu"])
    assert "Exits (test" in capsys.readouterr().out
    assert recorded["how"] == "finished"
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["dynadapter"]
    assert saved["class_names"] == NAMES


def test_files_do_not_switch_download_on(tmp_path):
    model, data = make_classifier(num_classes=3), fake(download=True)
    run = trainer(max_steps=1)
    run.fit(model, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    settings = checkpoint_settings(str(tmp_path / "last.ckpt"))[0]["data"]["init_args"]
    assert (data.hparams["download"], settings["download"], settings["dataset"]) == (True, False, "FakeData")
    run_folder = tmp_path / "version_0"
    (run_folder / "checkpoints").mkdir(parents=True)
    (tmp_path / "last.ckpt").rename(run_folder / "checkpoints" / "last.ckpt")
    (run_folder / "config.yaml").write_text("data: {class_path: HubDataset, init_args: {download: true}}\n")
    layer = expand_resume([], ["--resume", str(run_folder), "--epochs=2"]).layer
    assert layer["data"] == {"class_path": "HubDataset", "init_args": {"download": False}}
