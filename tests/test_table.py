"""The table of predictions by itself: formats, resumption, several processes, damage."""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynadapter.files import Busy
from dynadapter.images.reading import find_images
from dynadapter.serve import table as module
from dynadapter.serve.formats import check_output
from dynadapter.serve.inputs import list_images
from dynadapter.serve.predict import columns
from dynadapter.serve.runtime.runner import list_sources
from dynadapter.serve.table import OtherRun, PredictionTable, Unread

FILES = ["a.png", "b, c.png", "日本.png", "x\ny.png", " space .png", 'say "hi".png', os.fsdecode(b"caf\xe9.png")]
ENTRIES: list[Any] = [
    [FILES[0], "ant", 0.9877, 1],
    Unread(FILES[1], "broken, quite"),
    [FILES[2], 'say "bee"', 1.0, 3],
    [FILES[3], "ant", 0.75, 2],
    [FILES[4], "cat", 0.5, 1],
    Unread(FILES[5], "empty"),
    [FILES[6], "cat", 0.25, 2],
]
IDENTITY = {"network": "b"}


def opened(out: Path, batch_size: int = 2, **changes: Any) -> PredictionTable:
    return PredictionTable(out, FILES, batch_size, **({"identity": IDENTITY} | changes))


def part(table: PredictionTable, number: int) -> list[Any]:
    size = table.batch_size
    return ENTRIES[number * size : (number + 1) * size]


def fill(out: Path, batch_size: int = 2, **changes: Any) -> Path:
    with opened(out, batch_size, **changes) as table:
        for number in table.claim():
            table.save(number, part(table, number))
        table.finish()
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- formats


def test_csv(tmp_path):
    content = fill(tmp_path / "t.csv").read_bytes()
    assert (
        content
        == (
            'file,class,confidence,exit\na.png,ant,0.9877,1\n日本.png,"say ""bee""",1.0000,3\n"x\ny.png",ant,0.7500,2\n'
            " space .png,cat,0.5000,1\n"
        ).encode()
        + b"caf\xe9.png,cat,0.2500,2\n"
    )
    skipped = 'file,reason\n"b, c.png","broken, quite"\n"say ""hi"".png",empty\n'
    assert (tmp_path / "t.csv.skipped.csv").read_text() == skipped
    assert names(tmp_path) == ["t.csv", "t.csv.skipped.csv"]


NAMES = ["=1+1", "+1", "-1", "@a", "\ta", "\ra", "\na", "a\rb", "a;b", "a\tb", 'a"b', "a,b", "plain", "a=b", "'=1"]


@pytest.mark.parametrize("name", NAMES)
def test_csv_is_no_formula(name, tmp_path):
    """A spreadsheet takes no cell for a formula, and a reader of CSV finds one row with the same file."""
    with PredictionTable(tmp_path / "t.csv", [name, f"{name}2"], 2, {}) as table:
        table.save(0, [[name, name, 0.5, 1], Unread(f"{name}2", name)])
        table.finish()
    for path, last in ((tmp_path / "t.csv", ["0.5000", "1"]), (tmp_path / "t.csv.skipped.csv", [])):
        with path.open(newline="") as file:
            [_, (file_name, text, *rest)] = csv.reader(file)
        given = name if last else f"{name}2"
        assert os.path.normpath(file_name) == given
        assert text in (name, f"'{name}")
        assert rest == last
        assert not {file_name[0], text[0]} & set("=+-@\t\r\n")
        assert (file_name, text) == (given, name) or name[0] in "=+-@\t\r\n"
    with PredictionTable(tmp_path / "t.jsonl", [name], 1, {}) as table:
        table.save(0, [[name, name, 0.5, 1]])
        table.finish()
    line = json.loads((tmp_path / "t.jsonl").read_text())
    assert (line["file"], line["class"]) == (name, name)


def test_json_lines(tmp_path):
    lines = list(map(json.loads, fill(tmp_path / "t.JSONL").read_text(encoding="utf-8").splitlines()))
    assert [line["file"] for line in lines] == [entry[0] for entry in ENTRIES if not isinstance(entry, Unread)]
    assert lines[2] == {"file": "x\ny.png", "class": "ant", "confidence": 0.75, "exit": 2}


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import read_table

    found = read_table(fill(tmp_path / "t.parquet"))
    assert found.column_names == ["file", "class", "confidence", "exit"]
    assert found["exit"].to_pylist() == [1, 3, 2, 1, 2]
    assert found["confidence"].to_pylist() == [0.9877, 1.0, 0.75, 0.5, 0.25]
    assert found["file"].to_pylist()[-1] == r"caf\udce9.png"  # no UTF-8


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow; install it by pip install 'dynadapter\[parquet\]'"):
        check_output(tmp_path / "t.parquet", overwrite=False)


@pytest.mark.parametrize(("name", "words"), [("t.txt", "names no format"), ("", "is a folder"), ("t.csv", "exists")])
def test_output_that_is_refused(name, words, tmp_path):
    (tmp_path / "t.csv").touch()
    with pytest.raises(ValueError, match=words):
        check_output(tmp_path / name, overwrite=False)


# ---- resumption


def test_counts(tmp_path):
    with opened(tmp_path / "t.csv", 7) as table:
        table.save(0, ENTRIES)
        assert (table.done, table.answered, table.unread, table.exits) == (7, 5, 2, 9)
    with opened(tmp_path / "t.csv", 7) as table:
        assert (table.done, table.exits) == (7, 9)


def test_finished_whole_and_once(tmp_path):
    out = tmp_path / "t.csv"
    with opened(out) as table:
        with pytest.raises(ValueError, match="0 of 7 images are done"):
            table.finish()
        for entries in (ENTRIES[:3], ENTRIES[2:4], ENTRIES[:1], [ENTRIES[0], ["b, c.png", "ant", 1.0]]):
            with pytest.raises(ValueError, match="do not fit batch 0 of 2"):
                table.save(0, entries)
        for number in table.claim():
            table.save(number, part(table, number))
        out.write_text("somebody else's")
        with opened(out, helper=True) as helper:
            assert helper.done == 7
        with pytest.raises(ValueError, match="exists"):
            table.finish()
    assert out.read_text() == "somebody else's"
    assert fill(out, overwrite=True) == out
    assert names(tmp_path) == ["t.csv", "t.csv.skipped.csv"]
    with pytest.raises(ValueError, match="exists"):
        opened(out)
    Path(f"{out}.partial").mkdir()  # as where another process finishes between a look and a lock
    with pytest.raises(ValueError, match="exists"):
        opened(out)
    assert names(tmp_path) == ["t.csv", "t.csv.skipped.csv"]


def test_output_after_a_stopped_overwrite(tmp_path):
    """Without ``overwrite`` an unfinished table does not hide that the output exists, until all is computed."""
    out = tmp_path / "t.csv"
    out.write_text("mine")
    with opened(out, overwrite=True) as table:
        table.save(1, ENTRIES[2:4])
    with pytest.raises(ValueError, match="exists; give another name, or overwrite it"):
        opened(out)
    with opened(out, overwrite=True) as table, opened(out, helper=True) as helper:
        assert table.done == helper.done == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_unread_images_are_tried_again(overwrite, tmp_path):
    """Their file is the same once its folder may be read, and the same command continues."""
    with opened(tmp_path / "t.csv", 1) as table:
        for number in range(4):
            table.save(number, part(table, number))
    with opened(tmp_path / "t.csv", 1) as table:  # a run that was only interrupted keeps them
        assert (table.answered, table.unread) == (3, 1)
        table.list_unread()
    with opened(tmp_path / "t.csv", 1, overwrite=overwrite) as table:
        assert (table.answered, table.unread) == (3, 0)
        table.save(1, [[FILES[1], "ant", 0.5, 1]])
        assert table.answered == 4


def test_kill_at_the_end_of_finish(tmp_path, monkeypatch):
    """The output has its name, the folder is left: the same command must find all rows and remove it."""

    def killed(*_):
        raise KeyboardInterrupt

    out = tmp_path / "t.csv"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(out)
    before = out.read_bytes()
    with opened(out) as table:
        assert (table.answered, table.unread) == (5, 2)
        table.finish()
    assert out.read_bytes() == before
    assert names(tmp_path) == ["t.csv", "t.csv.skipped.csv"]


def test_new_table_forgets_how_the_old_one_ended(tmp_path):
    with opened(tmp_path / "t.csv") as table:
        table.list_unread()
    with opened(tmp_path / "t.csv", identity={"network": "c"}, overwrite=True) as table:
        table.save(0, part(table, 0))
    with opened(tmp_path / "t.csv", identity={"network": "c"}, overwrite=True) as table:
        assert (table.answered, table.unread) == (1, 1)


def test_process_that_outlived_its_run(tmp_path):
    """It writes into the folder of the next run, which computes the batch itself."""
    out = tmp_path / "t.csv"
    with opened(out) as first, opened(out, helper=True) as orphan:
        first.close()
        with opened(out, identity={"network": "new"}, overwrite=True) as table:
            orphan.save(1, ENTRIES[2:4])
            assert not table.look(1)
            assert list(table.claim()) == [0, 1, 2, 3]


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_costs_a_batch_alone(tmp_path, data):
    """Cut, flip or extend any batch file: its batch is computed again, and no other."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    whole = fill(folder / "whole.csv").read_bytes()
    with opened(folder / "t.csv") as table:
        for number in table.claim():
            table.save(number, part(table, number))
        number = data.draw(st.integers(0, 3))
        path = table.folder / f"{number}.json"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "extend", "missing"]))
    if kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    changed = {"cut": content[:place], "extend": content + data.draw(st.binary(min_size=1, max_size=9))}
    path.write_bytes(changed.get(kind, content))
    if kind == "missing":
        path.unlink()
    with opened(folder / "t.csv") as table:
        assert list(table.claim()) == [number]
    assert fill(folder / "t.csv").read_bytes() == whole


def test_table_of_something_else(tmp_path):
    out = tmp_path / "t.csv"
    identity = {"network": "b" * 64, "device": "cpu"}
    with opened(out, identity=identity) as table:
        table.save(0, ENTRIES[:2])
        header = table.folder / "table.json"
    before = header.read_bytes()
    for changes, words in (
        ({"identity": identity | {"device": "cuda"}}, "begun with device=cpu, now it is cuda"),
        ({"identity": identity | {"network": "c" * 64}}, "begun with another network"),
        ({"identity": identity, "columns": ("file", "class", "confidence", "exit", "class_2")}, "with other columns"),
        ({"identity": identity, "batch_size": 3}, "begun with batch_size=2, now it is 3"),
    ):
        with pytest.raises(OtherRun, match=words):
            opened(out, **changes)
    header.write_bytes(before.replace(b'"format": 3', b'"format": 9'))
    with pytest.raises(OtherRun, match="begun by another version"):
        opened(out, identity=identity)
    for other in (b"[]", b"mine", b"\0" * 50, b"{}", b"[" * 10**5):
        header.write_bytes(other)
        for overwrite in (False, True):
            with pytest.raises(OtherRun, match="is not an unfinished table"):
                opened(out, identity=identity, overwrite=overwrite)
        assert header.read_bytes() == other
    header.write_bytes(before)
    with opened(out, identity={"network": "c"}, overwrite=True) as table:
        assert table.done == 0


def test_folder_of_somebody_else(tmp_path):
    (tmp_path / "t.csv.partial").mkdir()
    (tmp_path / "t.csv.partial" / "notes.txt").write_text("mine")
    (tmp_path / "u.csv.partial").write_text("mine")
    for name in ("t.csv", "u.csv"):
        with pytest.raises(OtherRun, match="is not an unfinished table"):
            opened(tmp_path / name, overwrite=True)
    assert (tmp_path / "t.csv.partial" / "notes.txt").read_text() == "mine"


# ---- several processes

SHARE = """
import sys, time
from test_table import *
with opened(Path(sys.argv[1]), 1, helper=True) as table:
    for number in table.claim():
        print(number, flush=True)
        if sys.argv[2] == "hang":
            time.sleep(60)
        time.sleep(0.05)
        table.save(number, part(table, number))
"""


def share(out: Path, how: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", SHARE, str(out), how]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_one_owner(tmp_path):
    pytest.importorskip("fcntl")
    with opened(tmp_path / "t.csv") as table:
        with pytest.raises(Busy, match="is being written by another thread"):
            opened(tmp_path / "t.csv")
        table.save(1, ENTRIES[2:4])
    with opened(tmp_path / "t.csv") as table:
        assert table.done == 2


def test_processes_share_the_batches(tmp_path):
    """Each batch is computed once, and a killed process leaves its batch to the others."""
    pytest.importorskip("fcntl")
    whole, out = fill(tmp_path / "whole.csv", 1), tmp_path / "t.csv"
    with opened(out, 1) as table:
        hanging = share(out, "hang")
        assert hanging.stdout.readline() == "0\n"
        others = [share(out, "work") for _ in range(2)]
        numbers = [line for other in others for line in other.communicate(timeout=60)[0].split()]
        assert sorted(numbers) == list("123456")
        assert list(table.claim()) == []  # the first batch is claimed
        hanging.kill()
        hanging.communicate()
        for number in table.claim(wait=True):
            assert number == 0
            table.save(number, part(table, number))
        table.finish()
    assert out.read_bytes() == whole.read_bytes()


def test_without_locks(tmp_path, monkeypatch):
    expected = fill(tmp_path / "t.csv").read_bytes()
    monkeypatch.setattr(module, "fcntl", None)
    assert fill(tmp_path / "u.csv").read_bytes() == expected
    assert names(tmp_path) == ["t.csv", "t.csv.skipped.csv", "u.csv", "u.csv.skipped.csv"]


# ---- inputs


def test_inputs(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b, c.png", "two\nlines.png"):
        (photos / name).touch()
    (tmp_path / "list.txt").write_text("photos/a.png\r\n\nphotos/no.png\n/elsewhere/x.jpg\n")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "x"], ["photos/two\nlines.png", "1"], ["", "2"], ["photos/b, c.png", "3"]])
    assert list_images([photos]) == [str(photos / name) for name in ("a.png", "b, c.png", "two\nlines.png")]
    listed = [str(photos / "a.png"), str(photos / "no.png"), "/elsewhere/x.jpg"]
    assert list_images([tmp_path / "list.txt", photos / "a.png"]) == [*listed, str(photos / "a.png")]
    rows = [str(photos / "two\nlines.png"), str(photos / "b, c.png")]
    assert list_images([tmp_path / "t.csv"]) == list_images([tmp_path / "t.csv"], "path") == rows


@pytest.mark.parametrize("kind", ["list.txt", "list.csv"])
def test_paths_in_a_list(kind, tmp_path, monkeypatch):
    """Absolute ones and those of a folder above are read; the home of the reader is not put in."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = ["a.png", "../b.png", "/c/d.png", "~/e.png", "~root/f.png"]
    (tmp_path / kind).write_text("\n".join((["path"] if kind.endswith("csv") else []) + names))
    folder = str(tmp_path)
    expected = [f"{folder}/a.png", f"{folder}/../b.png", "/c/d.png", f"{folder}/~/e.png", f"{folder}/~root/f.png"]
    assert list_images([str(tmp_path / kind)]) == expected


@pytest.mark.parametrize("name", ["photos.txt", "photos.list", "photos.csv"])
def test_folder_named_as_a_list(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.png").touch()
    assert list_images([tmp_path / name]) == [str(tmp_path / name / "a.png")]


def test_columns_of_equal_names():
    expected = ["probability_crane", "probability_crane_2", "probability_ant", "probability_crane_2_2"]
    assert list(columns(["crane", "crane", "ant", "crane_2"], 1, True)[4:]) == expected


def test_input_that_begins_like_a_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~a.png").touch()
    Path("list.txt").write_text("~a.png\n")
    assert list_images(["~a.png", "list.txt"]) == ["~a.png", "~a.png"]
    assert list_sources("~a.png") == find_images("~a.png") == [Path("~a.png")]


def test_inputs_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "t.csv").write_text("path,label\na.png,1\n")
    for place, column, words in (
        ("nowhere", None, "nowhere does not exist; give a folder"),
        ("empty", None, "no image in"),
        ("empty.txt", None, "lists no image"),
        ("empty.csv", None, "has no column"),
        ("t.csv", "file", "has no column 'file'; its columns are: path, label"),
    ):
        with pytest.raises(ValueError, match=words):
            list_images([tmp_path / place], column)
