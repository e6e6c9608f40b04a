"""Image folders and tables of images: classes, columns, splits, and messages for what is wrong."""

import csv
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import raises_one_line
from PIL import Image

from dynadapter.data import ImageFolder, ImageTable


def make(root: Path, **splits: dict[str, int]) -> Path:
    """Write ``root/split/CLASS/0.png`` and so on."""
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 3), (i, i, i)).save(folder / f"{i}.png")
    return root


def listed(data: ImageFolder, split: str) -> list[tuple[str, int]]:
    return [(str(path.relative_to(data.root)), label) for path, label in data.dataset(split).samples]


def fails(words: str, make_data) -> None:
    with raises_one_line(ValueError, match=re.escape(words)):
        make_data()


def test_classes_are_matched_by_name(tmp_path):
    make(tmp_path, train={"cat": 2, "ant": 1, "bee": 1}, val={"cat": 1}, test={"cat": 1, "bee": 2})
    data = ImageFolder(tmp_path)
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.num_classes == 3
    assert listed(data, "train") == [
        ("train/ant/0.png", 0),
        ("train/bee/0.png", 1),
        ("train/cat/0.png", 2),
        ("train/cat/1.png", 2),
    ]
    assert listed(data, "val") == [("val/cat/0.png", 2)]
    assert listed(data, "test") == [("test/bee/0.png", 1), ("test/bee/1.png", 1), ("test/cat/0.png", 2)]


def test_train_is_split_without_val(tmp_path):
    make(tmp_path, train={"a": 10, "b": 20, "c": 1})
    data = ImageFolder(tmp_path, val_fraction=0.3)
    train, val = listed(data, "train"), listed(data, "val")
    assert set(Counter(label for _, label in val)) == {0, 1}
    assert 4 <= len(val) <= 14
    assert not set(train) & set(val)
    assert len(set(train) | set(val)) == 31
    assert listed(ImageFolder(str(tmp_path), val_fraction=0.3), "val") == val
    assert listed(ImageFolder(tmp_path, val_fraction=0.3, split_seed=1), "val") != val


def test_class_that_is_not_utf8(tmp_path):
    make(tmp_path, train={"ant": 2, os.fsdecode(b"caf\xe9"): 2})
    fails(r"class folder caf\udce9 in", lambda: ImageFolder(tmp_path))


def test_val_fraction_0_means_no_validation(tmp_path):
    make(tmp_path, train={"a": 3, "b": 3})
    data = ImageFolder(tmp_path, val_fraction=0, image_size=4)
    data.setup("fit")
    assert len(data.dataset("train")) == 6
    assert data.val_dataloader() == []
    fails("ImageFolder has no image for val; set val_fraction above 0", lambda: data.setup("validate"))


def test_images_are_found_at_any_depth(tmp_path):
    make(tmp_path, train={"a": 1, "b/deep/er": 2, ".cache": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "._0.png").write_text("not an image")
    data = ImageFolder(tmp_path, val_fraction=0)
    assert data.class_names == ["a", "b"]
    assert [label for _, label in listed(data, "train")] == [0, 1, 1]


def test_unknown_class_lists_both_splits(tmp_path):
    make(tmp_path, train={"a": 1, "b": 1}, test={"a": 1, "z": 1})
    fails("test has classes that train does not have: z; train has: a, b", lambda: ImageFolder(tmp_path).setup("test"))


def test_encodings_of_accents_are_equal(tmp_path):
    root = make(tmp_path, train={"caf\u00e9": 2, "zoo": 2}, test={"cafe\u0301": 1, "zoo": 1})
    assert [label for _, label in ImageFolder(root).samples("test")] == [0, 1]


def test_missing_folder_is_named(tmp_path):
    fails(f"root {tmp_path / 'no'} does not exist", lambda: ImageFolder(tmp_path / "no"))
    fails(
        f"{tmp_path / 'train'} does not exist; expected train/CLASS/image.png or {tmp_path.name}/CLASS/image.png, "
        "but root contains: no folder",
        lambda: ImageFolder(tmp_path),
    )
    make(tmp_path, cats={"a": 1}, dogs={"b": 1})
    fails("but root contains: cats, dogs", lambda: ImageFolder(tmp_path))
    (tmp_path / "train").mkdir()
    fails("holds no class folder", lambda: ImageFolder(tmp_path))
    make(tmp_path, train={"a": 1})
    fails("test does not exist; expected test/CLASS/image.png", lambda: ImageFolder(tmp_path).setup("test"))


def test_class_without_images_is_named(tmp_path):
    make(tmp_path, train={"a": 1, "b": 0}, val={"a": 0})
    fails("train for: b; looked for files ending in .png", lambda: ImageFolder(tmp_path).setup("fit"))
    fails("val for: a; looked for files", lambda: ImageFolder(tmp_path).setup("validate"))


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_val_fraction_out_of_range(tmp_path, fraction):
    fails("val_fraction must lie in [0, 1)", lambda: ImageFolder(make(tmp_path, train={"a": 1}), val_fraction=fraction))


def test_root_of_classes_is_train(tmp_path):
    flat = make(tmp_path / "one", **{".": {"a": 10, "b": 20}})
    split = make(tmp_path / "two", train={"a": 10, "b": 20})
    one, two = ImageFolder(flat), ImageFolder(split)
    assert one.class_names == ["a", "b"]
    for name in ("train", "val"):  # the same images are held out
        assert listed(one, name) == [(path.removeprefix("train/"), label) for path, label in listed(two, name)]
    fails("test does not exist; expected test/CLASS/image.png", lambda: ImageFolder(flat).setup("test"))
    make(flat, c={"deep": 1})  # a folder without an image of its own: this may be a folder of data sets
    fails(f"expected train/CLASS/image.png or {flat.name}/CLASS/image.png", lambda: ImageFolder(flat))
    fails("root contains: a, b, c; no image directly in: c", lambda: ImageFolder(flat))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("valid", "invalid"), "valid as val"),
        (("bus", "train"), "train as train"),
        (("no_test", "test"), "test as test"),
    ],
)
def test_class_is_called_like_a_split(names, taken, tmp_path):
    root = make(tmp_path, **{".": dict.fromkeys(names, 4)})
    fails(f"taken as a split: {taken}; if it is a class, move all class folders into", lambda: ImageFolder(root))


def test_test_alone_can_be_measured(tmp_path):
    data = ImageFolder(make(tmp_path, test={"b": 2, "d": 1}), image_size=4)
    data.take_classes(["a", "b", "c", "d"])
    assert listed(data, "test") == [("test/b/0.png", 1), ("test/b/1.png", 1), ("test/d/0.png", 3)]
    fails("train does not exist; expected train/CLASS/image.png, but root contains: test", lambda: data.setup("fit"))
    fails("train does not exist", lambda: data.setup("validate"))


# ---- tables


HEADER = ("path", "label")


def make_table(
    folder: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER, suffix: str = ".csv"
) -> Path:
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


def rows_of(data: ImageTable, split: str) -> list[tuple[str, str]]:
    return [(path.name, data.class_names[label]) for path, label in data.dataset(split).samples]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_go_to_their_splits(tmp_path, suffix):
    rows = [
        ("i/1.png", "dog", "train"),
        ("i/2.png", "cat", "Training"),
        ("i/3.png", "cat", "VALID"),
        ("4.png", "dog", "test"),
    ]
    data = ImageTable(make_table(tmp_path, rows, ("filename", "class", "split"), suffix), image_size=4)
    assert data.class_names == ["cat", "dog"]
    assert rows_of(data, "train") == [("1.png", "dog"), ("2.png", "cat")]
    assert rows_of(data, "val") == [("3.png", "cat")]
    assert rows_of(data, "test") == [("4.png", "dog")]
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 4, 4)
    assert sorted(labels.tolist()) == [0, 1]


def test_blanks_beside_commas_mean_nothing(tmp_path):
    file = make_table(tmp_path, [("a.png", "cat"), ("b.png", "cat, tabby")])
    file.write_text('path, label\na.png, "cat"\nb.png, "cat, tabby", \na.png,cat\n')
    rows = ImageTable(file).rows
    assert [(row.path, row.label) for row in rows] == [("a.png", "cat"), ("b.png", "cat, tabby"), ("a.png", "cat")]


def test_same_images_are_held_out_as_in_a_folder(tmp_path):
    """The hash has the path below the class in a folder, and the whole path in a table."""
    rows = [(f"train/{name}/{k}.png", name) for name in ("a", "b") for k in range(20)]
    table = ImageTable(make_table(tmp_path, rows), val_fraction=0.3)
    more = ImageTable(make_table(tmp_path, [*rows, ("train/a/new.png", "a")]), val_fraction=0.3)
    val = rows_of(table, "val")
    assert set(val) <= set(rows_of(more, "val"))
    assert not set(rows_of(table, "train")) & set(rows_of(more, "val")) - {("new.png", "a")}
    assert len(val) + len(rows_of(table, "train")) == 40
    assert {name for _, name in val} == {"a", "b"}
    assert ImageFolder(tmp_path).class_names == table.class_names


@pytest.mark.parametrize(
    ("labels", "names"), [(["10", "9", "1"], ["1", "9", "10"]), (["b", "10", "9"], ["10", "9", "b"])]
)
def test_classes_are_sorted(tmp_path, labels, names):
    assert ImageTable(make_table(tmp_path, [(f"{k}.png", name) for k, name in enumerate(labels)])).class_names == names


def test_columns_are_named_or_found(tmp_path):
    rows = [("wrong", "1.png", "x", "a"), ("wrong", "2.png", "y", "b")]
    file = make_table(tmp_path, [row[1:] for row in rows])
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("path", "photo", "kind", "label"), *rows])
    data = ImageTable(file, path_column="photo", label_column="kind", val_fraction=0)
    assert rows_of(data, "train") == [("1.png", "x"), ("2.png", "y")]
    fails(
        "has no column 'size'; its columns are: path, photo, kind, label", lambda: ImageTable(file, path_column="size")
    )
    file.write_text("photo,kind\n1.png,x\n")
    fails("no column called path or file; set path_column to one of: photo, kind", lambda: ImageTable(file))


def test_root_holds_the_images(tmp_path):
    images = tmp_path / "elsewhere"
    lists = tmp_path / "lists"
    lists.mkdir()
    make_table(images, [("1.png", "a"), ("2.png", "b")])
    file = make_table(lists, [])
    wrong = {"1.png": "paths are relative to that folder", str(images / "1.png"): "to a folder that holds all images"}
    for path, words in wrong.items():
        file.write_text(f"path,label\n{path},a\n")
        assert rows_of(ImageTable(file, root=images), "train") == [("1.png", "a")]
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


def test_image_in_two_rows_is_on_one_side(tmp_path):
    paths = [spelled for k in range(24) for spelled in (f"{k}.png", f"./{k}.png")]
    rows = [(path, "ab"[int(Path(path).stem) % 2]) for path in paths]
    data = ImageTable(make_table(tmp_path, [*rows, ("25.png", "c"), ("25.png", "c")]))
    train, val = ({path for path, _ in data.samples(split)} for split in ("train", "val"))
    assert len(train) + len(val) == 25
    assert len(val) >= 2
    assert not train & val


@pytest.mark.parametrize(("rows", "words"), MISTAKES)
def test_wrong_rows_are_named(tmp_path, rows, words):
    fails(words, lambda: ImageTable(make_table(tmp_path, rows)))


def test_wrong_splits_are_named(tmp_path):
    header = ("path", "label", "split")
    fails(
        "unknown split 'dev'; use train, val or test",
        lambda: ImageTable(make_table(tmp_path, [("1.png", "a", "dev")], header)),
    )
    rows = [("1.png", "a", "train"), ("1.png", "a", "test")]
    fails("is for test here and for train in", lambda: ImageTable(make_table(tmp_path, rows, header)))
    data = ImageTable(make_table(tmp_path, [("1.png", "a", "test")], header))
    fails("has no row for train; it has rows for: test", lambda: data.setup("fit"))


def test_separators_within_names_are_names(tmp_path):
    data = ImageTable(make_table(tmp_path, [("1.png", "cat, wild"), ("2.png", "cat, tame")]))
    assert data.class_names == ["cat, tame", "cat, wild"]


def test_wrong_files_are_named(tmp_path):
    fails("does not exist or is not a file", lambda: ImageTable(tmp_path / "no.csv"))
    (tmp_path / "a.txt").write_text("x")
    fails("is not a table; give a file that ends in .csv or .parquet", lambda: ImageTable(tmp_path / "a.txt"))
    (tmp_path / "a.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    fails("is not text in UTF-8", lambda: ImageTable(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text('path,label\n"' + "x" * 200_000 + '",1\n')
    fails("a.csv:", lambda: ImageTable(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("path,label," + "x" * 200_000 + "\na,b,c\n")
    fails("a.csv:1: field larger than field limit", lambda: ImageTable(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text('path,label\n1.png,"a\n2.png,b\n')
    fails("a.csv:2: unexpected end of data; check the quotes", lambda: ImageTable(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text('path,label\n1.png,"a\n2.png,b\n3.png,c"\n')
    fails("a.csv:4: 'a\\n2.png,b\\n3.png,c' in column 'label' has a control ch", lambda: ImageTable(tmp_path / "a.csv"))
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,label\na.png,ant\nb.png,cat,dog\n", "3: 3 cells under a header of 2; quote values with commas"),
        ("path,label,label\na.png,ant,bee\n", " several columns are called 'label'; rename or remove all but one"),
    ],
)
def test_no_cell_of_a_table_is_dropped(content, words, tmp_path):
    file = tmp_path / "list.csv"
    file.write_text(content)
    fails(f"{file}:{words}", lambda: ImageTable(file))


@pytest.mark.parametrize("content", ["path,label,,\na.png,ant,,\n", "path,label,notes,notes\na.png,ant,1,2\n"])
def test_columns_that_nothing_reads_may_repeat(content, tmp_path):
    file = tmp_path / "list.csv"
    file.write_text(content)
    assert ImageTable(file).class_names == ["ant"]


@pytest.mark.parametrize("header", ["path,Label,label", "path,label ,label"])
def test_columns_of_one_meaning_raise(header, tmp_path):
    file = tmp_path / "list.csv"
    file.write_text(f"{header}\na.png,ant,bee\n")
    names = ", ".join(map(repr, header.split(",")[1:]))
    fails(f"several columns for the label: {names}; set label_column to one of them", lambda: ImageTable(file))
    assert ImageTable(file, label_column="label").class_names == ["bee"]


def test_encodings_of_an_accent_are_one_class(tmp_path):
    data = ImageTable(make_table(tmp_path, [("1.png", "caf\u00e9"), ("2.png", "cafe\u0301")]))
    assert data.class_names == ["caf\u00e9"]
    data.take_classes(["bee", "cafe\u0301"])
    data.setup("fit")
    assert {label for _, label in data.dataset("train").samples} == {1}
    account = data.account()
    assert account is not None
    assert sum(account.read.values()) == 2


def test_parquet_columns_of_one_name_raise(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "list.parquet"
    columns = [pyarrow.array(["a.png"]), pyarrow.array(["ant"]), pyarrow.array(["bee"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["path", "label", "label"]), file)
    fails(f"{file}: several columns are called 'label'", lambda: ImageTable(file))
    columns = [pyarrow.array([name]) for name in ("a.png", "ant", "1", "2")]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["path", "label", "notes", "notes"]), file)
    assert ImageTable(file).class_names == ["ant"]
