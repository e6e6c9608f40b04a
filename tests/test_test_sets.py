"""Several test sets: each has metrics of its own name, equal to those of a test on it alone."""

import json
from pathlib import Path

import pytest
import torch
from commands import SMALL
from conftest import raises_one_line
from PIL import Image
from tiny import make_classifier, trainer

from dynadapter.cli import main
from dynadapter.cli.test_bundle import measure
from dynadapter.data import ImageFolder, ImageTable
from dynadapter.data.verify import verify
from dynadapter.exits.policies import Confidence
from dynadapter.serve.bundle import in_memory
from dynadapter.training.callbacks import EarlyExit, FlopsReport

NAMES = ("ant", "bee", "cat")


def images(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write images of noise, a folder for each class."""
    generator = torch.Generator().manual_seed(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A root with its own test split; a flat folder without cat in another order; one with all splits; one unknown."""
    images(tmp_path / "root" / "train", dict.fromkeys(NAMES, 6))
    images(tmp_path / "root" / "test", dict.fromkeys(NAMES, 2), seed=1)
    images(tmp_path / "flat", {"cat": 4, "bee": 3}, seed=2)
    images(tmp_path / "split" / "train", dict.fromkeys(NAMES, 1), seed=3)
    images(tmp_path / "split" / "test", {"ant": 5, "cat": 1}, seed=4)
    images(tmp_path / "other", {"ant": 1, "dog": 2}, seed=5)
    return tmp_path


def table(folder: Path, name: str, split: str = "") -> Path:
    """Write a table of the images of a folder with their classes, and a split where one is given."""
    rows = [f"{file.relative_to(folder.parent)},{file.parent.name}{split}" for file in sorted(folder.rglob("*.png"))]
    file = folder.parent / name
    file.write_text("\n".join(["path,label" + (",split" if split else ""), *rows]) + "\n")
    return file


def both(kind: str, places: Path, **options):
    """Return the data with a further set, and the further set's images as a data set of their own."""
    if kind == "folder":
        (places / "alone").mkdir()
        (places / "alone" / "test").symlink_to(places / "flat")
        data = ImageFolder(places / "root", test_sets={"wild": str(places / "flat")}, **options)
        return data, ImageFolder(places / "alone", **options)
    first, second = table(places / "root" / "train", "train.csv"), table(places / "flat", "flat.csv")
    data = ImageTable(first, root=first.parent, test_sets={"wild": str(second)}, **options)
    return data, ImageTable(table(places / "flat", "alone.csv", ",test"), **options)


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_further_set_is_measured_as_alone(kind, places):
    data, alone = both(kind, places, image_size=32, batch_size=4)
    model, run = make_classifier(num_classes=3, class_names=list(NAMES)), trainer(EarlyExit(), FlopsReport(show=False))
    [further] = data.further_tests()
    run.test(model, datamodule=further, verbose=False)
    named = dict(run.callback_metrics)
    run.test(model, datamodule=alone, verbose=False)
    assert {key.replace("test/wild/", "test/"): value for key, value in named.items()} == run.callback_metrics
    assert all(key.startswith("test/wild/") for key in named)
    assert [NAMES[label] for _, label in further.dataset("test").samples] == ["bee"] * 3 + ["cat"] * 4


def test_a_test_split_comes_first(places):
    data = ImageFolder(places / "root", test_sets={"a": str(places / "split"), "b": str(places / "flat")})
    assert [len(one.samples("test")) for one in data.further_tests()] == [6, 7]
    assert [one.test_label for one in (data, *data.further_tests())] == ["test", "test/a", "test/b"]
    assert ImageFolder(places / "root").further_tests() == []


@pytest.mark.parametrize("kind", ["folder", "table"])
@pytest.mark.parametrize("splits", [("train", "val"), ("val",), ("training",)])
def test_set_without_test_split_is_measured_whole(kind, splits, places):
    """The split for validation may have a class of its own."""
    counts = dict(zip(splits, ({"ant": 3, "cat": 2}, {"cat": 1, "bee": 4}), strict=False))
    for seed, (split, count) in enumerate(counts.items()):
        images(places / "new" / split, count, seed=seed)
    expected = sorted((str(file), file.parent.name) for file in (places / "new").rglob("*.png"))
    if kind == "folder":
        data = ImageFolder(places / "root", test_sets={"new": str(places / "new")})
    else:
        rows = [f"{file},{name},{Path(file).parts[-3]}" for file, name in expected]
        (places / "new.csv").write_text("\n".join(["path,label,split", *rows]))
        data = ImageTable(table(places / "root", "first.csv"), test_sets={"new": str(places / "new.csv")})
    [further] = data.further_tests()
    further.take_classes(data.class_names)
    assert sorted((str(file), NAMES[label]) for file, label in further.dataset("test").samples) == expected


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"wild": "other"}, "test_sets.wild: the data have classes that the model does not know: dog"),
        ({"wild": "nowhere"}, "test_sets.wild: root .*nowhere does not exist"),
        ({"a/b": "flat"}, "test_sets names 'a/b'"),
    ],
)
def test_wrong_further_sets_are_one_line(sets, words, places):
    given = {name: str(places / place) for name, place in sets.items()}
    with raises_one_line(ValueError, match=words):
        ImageFolder(places / "root", test_sets=given).further_tests()


def test_commands_measure_every_set(places, capsys):
    data = ["--data=ImageFolder", f"--data.root={places / 'root'}", "--data.batch_size=6"]
    sets = json.dumps({"wild": str(places / "flat"), "cold": str(places / "split")})
    rest = ["--epochs=1", "--test_after=true", f"--data.test_sets={sets}"]
    main(["fit", *data, *SMALL, *rest, f"--trainer.default_root_dir={places / 'runs'}"])
    run = places / "runs" / "version_0"
    after = {k: v for k, v in json.loads((run / "run.json").read_text())["results"].items() if k.startswith("test/")}
    capsys.readouterr()
    main(["test", f"--ckpt_path={run}/checkpoints/last.ckpt", "--trainer.accelerator=cpu"])
    titles = capsys.readouterr().out
    [record] = (places / "runs").glob("test_*/run.json")
    again = json.loads(record.read_text())["results"]
    for label in ("test", "test/wild", "test/cold"):
        assert f"Exits ({label}, shares" in titles
        for key in ("acc", "acc_exit1", "confidence_0.9/acc", "confidence_0.9/gmacs"):
            assert again[f"{label}/{key}"] == pytest.approx(after[f"{label}/{key}"])
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"test/acc", "test/wild/acc", "test/cold/acc"} <= {*header}


def test_record_keeps_data_of_the_training(places):
    """A further set adds its images to ``run.json``, its unreadable ones to ``skipped.csv``, and replaces nothing."""
    (places / "root" / "train" / "ant" / "9.png").write_bytes(b"no image")
    (places / "flat" / "bee" / "9.png").write_bytes(b"no image")
    data = ["--data=ImageFolder", f"--data.root={places / 'root'}", "--data.batch_size=6", "--data.on_error=skip"]
    rest = ["--data.augment=flip", "--epochs=1", "--test_after=true"]
    skipped = {}
    for name, sets in {"one": {}, "two": {"wild": str(places / "flat")}}.items():
        given = [f"--data.test_sets={json.dumps(sets)}", f"--trainer.default_root_dir={places / name}"]
        with pytest.warns(UserWarning, match="skipped 1 unreadable"):
            main(["fit", *data, *SMALL, *rest, *given])
        skipped[name] = [Path(row.split(",")[0]).parent.name for row in _lines(places / name, "skipped.csv")[1:]]
    alone, record = (json.loads("".join(_lines(places / name, "run.json"))) for name in ("one", "two"))
    assert record["protocol"] == alone["protocol"]
    assert record["protocol"]["augment"] == "flip"
    further = record["data"]["splits"].pop("test/wild")
    assert record["data"]["settings"].pop("test_sets") != alone["data"]["settings"].pop("test_sets")
    assert record["data"] == alone["data"]
    assert (further["images"], further["classes"]) == (7, {"ant": 0, "bee": 3, "cat": 4})
    assert skipped == {"one": ["ant"], "two": ["ant", "bee"]}


def _lines(root: Path, name: str) -> list[str]:
    return (root / "version_0" / name).read_text().splitlines()


def test_bundle_measures_further_sets(places):
    data = ImageFolder(places / "root", image_size=32, test_sets={"wild": str(places / "flat")})
    model = make_classifier(num_classes=3, class_names=list(NAMES))
    model.preprocessing = data.preprocessing
    bundle = in_memory(model, Confidence(0.9))
    titles = [found.title for one in (data, *data.further_tests()) for found in measure(bundle, one)]
    assert titles[2:] == ["Exits (test/wild, shares under confidence_0.9)", "Early exits (test/wild)"]


def test_names_of_sets_may_be_numbers(places):
    """YAML reads 2024 as a number."""
    data = ImageFolder(places / "root", test_sets={2024: str(places / "flat")})
    assert [one.test_label for one in data.further_tests()] == ["test/2024"]
    with raises_one_line(ValueError, match="test_sets names 1 twice; give each set its own name"):
        ImageFolder(places / "root", test_sets={1: "a", "1": "b"})


def test_verify_checks_further_sets(places):
    (places / "flat" / "cat" / "z.png").write_bytes((places / "root" / "train" / "cat" / "0.png").read_bytes())
    (places / "flat" / "bee" / "0.png").write_bytes(b"")
    report = verify(ImageFolder(places / "root", test_sets={"wild": str(places / "flat")}))
    errors = [one.text for one in report.findings if one.level == "error"]
    assert errors == ["test/wild: 1 image cannot be read", "1 image of train also in test/wild"]
    assert report.splits[-1].classes == {"ant": 0, "bee": 3, "cat": 5}
    report = verify(ImageFolder(places / "root", test_sets={"wild": str(places / "none")}))
    (error,) = [one.text for one in report.findings if one.level == "error"]
    assert error.startswith(f"test_sets.wild: root {places / 'none'} does not exist")


def test_verify_checks_sets_beside_a_wrong_one(places):
    (places / "flat" / "cat" / "z.png").write_bytes((places / "root" / "train" / "cat" / "0.png").read_bytes())
    sets = {name: str(places / place) for name, place in (("a", "other"), ("b", "flat"), ("c", "none"))}
    report = verify(ImageFolder(places / "root", test_sets=sets))
    errors = [one.text for one in report.findings if one.level == "error"]
    assert len(errors) == 3
    assert errors[0].startswith("test_sets.a: the data have classes that the model does not know: dog")
    assert errors[1].startswith(f"test_sets.c: root {places / 'none'} does not exist")
    assert errors[2] == "1 image of train also in test/b"


def test_verify_lists_missing_images_of_sets(places):
    """A missing image of one table hides neither its other images nor those of the other table."""
    first, second = table(places / "root" / "train", "train.csv"), table(places / "flat", "flat.csv")
    (places / "flat" / "bee" / "0.png").unlink()
    report = verify(ImageTable(first, root=first.parent, test_sets={"wild": str(second)}))
    assert [one.text for one in report.findings if one.level == "error"] == ["test/wild: 1 image cannot be read"]
    assert report.splits[-1].images == 7


@pytest.mark.parametrize("absolute", [False, True])
def test_images_of_sets_count_as_used(absolute, places, monkeypatch):
    images(places / "root" / "wild", {"bee": 3}, seed=6)
    monkeypatch.chdir(places)
    place = (places if absolute else Path()) / "root" / "wild"
    report = verify(ImageFolder("root", test_sets={"wild": str(place)}))
    assert not report.findings or {one.kind for one in report.findings} == {"empty"}
    assert "6 test + 3 test/wild" in report.account
