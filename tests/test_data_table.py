"""Tables of images: columns, splits, labels, and messages for what is wrong."""

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from dynadapter.data import ImageFolder, ImageTable

HEADER = ("path", "label")


def make(folder: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER, suffix: str = ".csv") -> Path:
    """Write a table and, for each row, an image of the same path where that can be one."""
    for number, row in enumerate(rows):
        if row[0] and not row[0].startswith((".", "/")) and not (folder / row[0]).exists():
            (folder / row[0]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3), (number % 256, 0, 0)).save(folder / row[0])
    file = folder / f"table{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        columns = zip(*rows, strict=True)
        write_table(pyarrow.table(dict(zip(header, map(list, columns), strict=True))), file)
    else:
        with file.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([header, *rows])
    return file


def listed(data: ImageTable, split: str) -> list[tuple[str, str]]:
    return [(path.name, data.class_names[label]) for path, label in data.dataset(split).samples]


def fails(words: str, make_data) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        make_data()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_go_to_their_splits(tmp_path, suffix):
    rows = [
        ("i/1.png", "dog", "train"),
        ("i/2.png", "cat", "Training"),
        ("i/3.png", "cat", "VALID"),
        ("4.png", "dog", "test"),
    ]
    data = ImageTable(make(tmp_path, rows, ("filename", "class", "split"), suffix), image_size=4)
    assert data.class_names == ["cat", "dog"]
    assert listed(data, "train") == [("1.png", "dog"), ("2.png", "cat")]
    assert listed(data, "val") == [("3.png", "cat")]
    assert listed(data, "test") == [("4.png", "dog")]
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 4, 4)
    assert sorted(labels.tolist()) == [0, 1]


def test_same_images_are_held_out_as_in_a_folder(tmp_path):
    """The hash has the path below the class in a folder, and the whole path in a table."""
    rows = [(f"train/{name}/{k}.png", name) for name in ("a", "b") for k in range(20)]
    table = ImageTable(make(tmp_path, rows), val_fraction=0.3)
    more = ImageTable(make(tmp_path, [*rows, ("train/a/new.png", "a")]), val_fraction=0.3)
    val = listed(table, "val")
    assert set(val) <= set(listed(more, "val"))
    assert not set(listed(table, "train")) & set(listed(more, "val")) - {("new.png", "a")}
    assert len(val) + len(listed(table, "train")) == 40
    assert {name for _, name in val} == {"a", "b"}
    assert ImageFolder(tmp_path).class_names == table.class_names


@pytest.mark.parametrize(
    ("labels", "names"), [(["10", "9", "1"], ["1", "9", "10"]), (["b", "10", "9"], ["10", "9", "b"])]
)
def test_classes_are_sorted(tmp_path, labels, names):
    assert ImageTable(make(tmp_path, [(f"{k}.png", name) for k, name in enumerate(labels)])).class_names == names


def test_columns_are_named_or_found(tmp_path):
    rows = [("wrong", "1.png", "x", "a"), ("wrong", "2.png", "y", "b")]
    file = make(tmp_path, [row[1:] for row in rows])
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("path", "photo", "kind", "label"), *rows])
    data = ImageTable(file, path_column="photo", label_column="kind", val_fraction=0)
    assert listed(data, "train") == [("1.png", "x"), ("2.png", "y")]
    fails(
        "has no column 'size'; its columns are: path, photo, kind, label", lambda: ImageTable(file, path_column="size")
    )
    file.write_text("photo,kind\n1.png,x\n")
    fails("no column called path or file; set path_column to one of: photo, kind", lambda: ImageTable(file))


def test_root_holds_the_images(tmp_path):
    images = tmp_path / "elsewhere"
    lists = tmp_path / "lists"
    lists.mkdir()
    make(images, [("1.png", "a"), ("2.png", "b")])
    file = make(lists, [])
    wrong = {"1.png": "paths are relative to that folder", str(images / "1.png"): "to a folder that holds all images"}
    for path, words in wrong.items():
        file.write_text(f"path,label\n{path},a\n")
        assert listed(ImageTable(file, root=images), "train") == [("1.png", "a")]
        fails(words, lambda: ImageTable(file).setup("fit"))
    file.write_text("path,label\n../lists/table.csv,a\n")
    fails("leads out of", lambda: ImageTable(file, root=images).setup("fit"))


MISTAKES = [
    ([("1.png", "")], "table.csv:2: there is nothing in column 'label'"),
    ([("", "a")], "table.csv:2: there is nothing in column 'path'"),
    ([], "lists no image"),
    ([("1.png", "a"), ("2.png", "b"), ("3.png", "a|b")], "table.csv:4: 'a|b' names 2 classes; an image has one label"),
    ([("1.png", "a"), ("2.png", "b"), ("3.png", "b, a")], "'b, a' names 2 classes"),
    ([("1.png", "a"), ("1.png", "b")], "table.csv:3: image 1.png is b here and a in"),
    ([("1.png", "a"), ("./1.png", "b")], "is b here and a in"),
]


@pytest.mark.parametrize(("rows", "words"), MISTAKES)
def test_wrong_rows_are_named(tmp_path, rows, words):
    fails(words, lambda: ImageTable(make(tmp_path, rows)))


def test_wrong_splits_are_named(tmp_path):
    header = ("path", "label", "split")
    fails(
        "unknown split 'dev'; use train, val or test",
        lambda: ImageTable(make(tmp_path, [("1.png", "a", "dev")], header)),
    )
    rows = [("1.png", "a", "train"), ("1.png", "a", "test")]
    fails("is for test here and for train in", lambda: ImageTable(make(tmp_path, rows, header)))
    data = ImageTable(make(tmp_path, [("1.png", "a", "test")], header))
    fails("has no row for train; it has rows for: test", lambda: data.setup("fit"))


def test_separators_within_names_are_names(tmp_path):
    data = ImageTable(make(tmp_path, [("1.png", "cat, wild"), ("2.png", "cat, tame")]))
    assert data.class_names == ["cat, tame", "cat, wild"]


def test_wrong_files_are_named(tmp_path):
    fails("does not exist or is not a file", lambda: ImageTable(tmp_path / "no.csv"))
    (tmp_path / "a.txt").write_text("x")
    fails("is not a table; give a file that ends in .csv or .parquet", lambda: ImageTable(tmp_path / "a.txt"))
    (tmp_path / "a.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    fails("is not text in UTF-8", lambda: ImageTable(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text('path,label\n"' + "x" * 200_000 + '",1\n')
    fails("a.csv:", lambda: ImageTable(tmp_path / "a.csv"))
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("path,label\n")
    fails("is not a Parquet file", lambda: ImageTable(tmp_path / "a.parquet"))


def test_lists_in_cells_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"path": ["1.png"], "label": [["a", "b"]]}), tmp_path / "t.parquet")
    fails("label holds several values; an image has one label", lambda: ImageTable(tmp_path / "t.parquet"))


def test_short_rows_are_named(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\n1.png\n")
    fails("t.csv:2: there is nothing in column 'label'", lambda: ImageTable(tmp_path / "t.csv"))
