"""``dynadapter predict --bundle``: every image once, in its order, whatever stops it on the way."""

import ast
import csv
import errno
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from dynadapter.adapters import AdapterSpec, LoRA, inject
from dynadapter.backbones import create_backbone, fingerprint
from dynadapter.cli import main
from dynadapter.cli import predict as command
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence
from dynadapter.exits.temperature import Scaled
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import find_images, load_image
from dynadapter.serve import predictions
from dynadapter.serve.bundle import BackboneSource, load, save_bundle
from dynadapter.serve.predictions import Answer, Busy, Entry, Foreign, PredictionTable, Unread
from dynadapter.training.callbacks.predictions import FIELDS

NAMES = ("ant", "bee, wild", "cat")
NAME = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PREPROCESS = Preprocess(32, normalization="half")


def write_images(folder: Path, count: int = 26) -> Path:
    """Pictures of many sizes and colours, some in each class's subfolder."""
    random = np.random.default_rng(0)
    for k in range(count):
        place = folder / NAMES[k % 3]
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((30 + k, 50 - k), Image.Resampling.BICUBIC).save(place / f"{k:02d}.{'png' if k % 2 else 'jpg'}")
    return folder


def write_bundle(folder: Path, images: Path, adapter: AdapterSpec | None = None, **changes: Any) -> Path:
    """A bundle of two exits whose answers differ from image to image, as after training."""
    adapter = adapter or LoRA(rank=2)
    backbone = create_backbone(NAME, len(NAMES), **ARGUMENTS)
    source = BackboneSource(NAME, fingerprint(backbone), "seed", ARGUMENTS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject(backbone, adapter)
        net = ExitNet(backbone, LinearHeads(), every=1)
        pictures = torch.stack([torch.from_numpy(PREPROCESS(load_image(path))) for path in find_images(images)])
        with torch.no_grad():
            for p in (p for p in net.parameters() if p.requires_grad):
                p += 0.1 * torch.randn(p.shape)
            net.eval()
            for head, logits in zip([*net.heads, net.backbone.get_classifier()], net(pictures), strict=True):
                layer = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
                layer.weight *= 2 / logits.std(0)[:, None]
                layer.bias -= 2 * logits.mean(0) / logits.std(0)
    parts = {"policy": Scaled(Confidence(0.7), (1.2, 0.9)), "class_names": NAMES, "preprocessing": PREPROCESS}
    return save_bundle(net, folder, backbone=source, adapter=adapter, heads=LinearHeads(), **(parts | changes))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def bundle(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "bundle", images)


def arguments(bundle: Path, images: Path, out: Path, *more: str) -> list[str]:
    return ["predict", f"--bundle={bundle}", f"--images={images}", f"--out={out}", "--batch_size=4", *more]


def run(bundle: Path, images: Path, out: Path, *more: str) -> Path:
    main(arguments(bundle, images, out, *more))
    return out


def refused(capsys: pytest.CaptureFixture[str], args: Sequence[str], code: int = 2) -> str:
    """The one line of a command that ends with a code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main(list(args))
    [line] = capsys.readouterr().err.splitlines()
    assert ending.value.code == code, line
    assert line.startswith("dynadapter: ")
    return line


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what it says


def test_it_says_what_the_bundle_says(bundle, images, tmp_path, capsys):
    run(bundle, images, tmp_path / "new" / "out.csv")
    files = find_images(images)
    expected = load(bundle).predict(files, batch_size=4)
    rows = read(tmp_path / "new" / "out.csv")
    assert list(rows[0]) == list(FIELDS) == list(predictions.FIELDS)
    assert [row["file"] for row in rows] == [str(path) for path in files]
    assert [row["class"] for row in rows] == [p.label for p in expected]
    assert [row["confidence"] for row in rows] == [f"{p.confidence:.4f}" for p in expected]
    assert [row["exit"] for row in rows] == [str(p.exit + 1) for p in expected]
    assert {row["exit"] for row in rows} == {"1", "2"}
    assert {row["class"] for row in rows} == set(NAMES)
    assert names(tmp_path / "new") == ["out.csv"]
    printed = capsys.readouterr()
    average = np.mean([p.exit + 1 for p in expected])
    assert f"26 predictions in {tmp_path / 'new' / 'out.csv'}, average exit {average:.2f}" in printed.out
    assert printed.err == ""  # the bar is for terminals


def test_lines_of_json_say_the_same(bundle, images, tmp_path):
    rows = read(run(bundle, images, tmp_path / "out.csv"))
    lines = run(bundle, images, tmp_path / "out.JSONL").read_text(encoding="utf-8").splitlines()
    for line, row in zip(map(json.loads, lines), rows, strict=True):
        assert list(line) == list(row)
        assert line == row | {"confidence": float(row["confidence"]), "exit": int(row["exit"])}


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_the_threads_change_nothing(workers, bundle, images, tmp_path):
    out = run(bundle, images, tmp_path / "out.csv", f"--num_workers={workers}")
    assert out.read_bytes() == run(bundle, images, tmp_path / "again.csv").read_bytes()


def test_images_are_read_ahead_but_not_all(bundle, images, tmp_path, monkeypatch):
    read_so_far, ahead = [], []

    def counted(path: Path) -> Image.Image:
        read_so_far.append(path)
        return load_image(path)

    monkeypatch.setattr("dynadapter.images.reading.load_image", counted)
    for done, _ in enumerate(command.read_batches(load(bundle), [str(p) for p in find_images(images)], 2, 2), 1):
        time.sleep(0.02)
        ahead.append(len(read_so_far) - 2 * done)
    assert len(read_so_far) == 26
    assert 0 < max(ahead) <= 6


def test_names_that_are_hard_to_write(bundle, images, tmp_path):
    hard = ["a, b.png", 'say "hi".png', "two\nlines.png", "日本.png", os.fsdecode(b"caf\xe9.png"), " space .png"]
    (tmp_path / "in").mkdir()
    for name in hard:
        Image.new("RGB", (9, 9), "red").save(tmp_path / "in" / name, "PNG")
    expected = [str(path) for path in find_images(tmp_path / "in")]
    out = run(bundle, tmp_path / "in", tmp_path / "out.csv")
    assert [row["file"] for row in read(out)] == expected
    assert b"caf\xe9.png" in out.read_bytes()
    lines = run(bundle, tmp_path / "in", tmp_path / "out.jsonl").read_bytes().decode("utf-8").split("\n")[:-1]
    assert [json.loads(line)["file"] for line in lines] == expected
    assert "日本" in "".join(lines)


def test_an_output_is_replaced_where_that_is_asked_for(bundle, images, tmp_path, capsys):
    out = tmp_path / "out.csv"
    out.write_text("mine")
    assert "--overwrite true" in refused(capsys, arguments(bundle, images, out))
    assert out.read_text() == "mine"
    run(bundle, images, out, "--overwrite=true")
    assert len(read(out)) == 26


def test_a_terminal_sees_a_bar(bundle, images, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    run(bundle, images, tmp_path / "out.csv")
    assert "26/26" in terminal.getvalue()
    assert "images/s" in terminal.getvalue()
    assert "average exit 1." in terminal.getvalue()


# ---- images that cannot be read


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Path:
    """The images, and three that are none, two of them in the first batches."""
    folder = Path(shutil.copytree(images, tmp_path / "damaged"))
    (folder / "ant" / "00a.png").write_text("no image")
    (folder / "ant" / "00b.png").write_bytes(b"")
    (folder / "cat" / "zz.jpg").write_bytes((folder / "ant" / "00.jpg").read_bytes()[:400])
    return folder


def test_what_cannot_be_read_is_listed_and_left_out(bundle, damaged, tmp_path, capsys):
    out = run(bundle, damaged, tmp_path / "out.csv", "--max_skipped=3")
    files = find_images(damaged)
    bad = [path for path in files if path.name in ("00a.png", "00b.png", "zz.jpg")]
    with Path(f"{out}.skipped.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["file"] for row in listed] == [str(path) for path in bad]
    assert "not an image of a known format" in listed[0]["reason"]
    assert all(row["reason"] for row in listed)
    rows = read(out)
    assert [row["file"] for row in rows] == [str(path) for path in files if path not in bad]
    # batches are cut by position, so those who can be read stand together with the same others
    groups = [[path for path in files[k : k + 4] if path not in bad] for k in range(0, len(files), 4)]
    expected = [p for group in groups for p in load(bundle).predict(group, batch_size=4)]
    assert [row["confidence"] for row in rows] == [f"{p.confidence:.4f}" for p in expected]
    assert f"3 images could not be read, listed in {out}.skipped.csv" in capsys.readouterr().out


def test_past_the_cap_it_stops_and_can_go_on(bundle, damaged, tmp_path, capsys):
    whole = run(bundle, damaged, tmp_path / "whole.csv", "--max_skipped=3")
    out = tmp_path / "out.csv"
    line = refused(capsys, arguments(bundle, damaged, out, "--max_skipped=2"))
    assert "3 images cannot be read, more than max_skipped=2" in line
    assert f"{out}.skipped.csv" in line
    assert "28 of 29 images, kept in" in line
    assert "higher --max_skipped" in line
    assert [row["reason"] for row in read(Path(f"{out}.skipped.csv"))][1:2] == ["the file is empty"]
    assert len(read(Path(f"{out}.skipped.csv"))) == 3
    assert not out.exists()
    run(bundle, damaged, out, "--max_skipped=3")
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.skipped.csv").read_bytes() == Path(f"{whole}.skipped.csv").read_bytes()
    assert "going on after 28 of 29 images" in capsys.readouterr().out

    refused(capsys, arguments(bundle, damaged, tmp_path / "no.csv", "--max_skipped=0"))
    assert len(read(tmp_path / "no.csv.skipped.csv")) == 2  # both are in the first batch


def test_no_image_can_be_read(bundle, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no image")
    line = refused(capsys, arguments(bundle, tmp_path / "in", tmp_path / "out.csv"))
    assert "none of the images can be read" in line
    assert not (tmp_path / "out.csv").exists()


def test_an_old_list_does_not_stay(bundle, images, tmp_path):
    out = tmp_path / "out.csv"
    Path(f"{out}.skipped.csv").write_text("file,reason\nold.png,old\n")
    run(bundle, images, out)
    assert names(tmp_path) == ["out.csv"]


# ---- kills

DRIVER = """
import io, os, signal, sys
import torch
torch.set_num_threads(1)
from dynadapter.cli import main

args = sys.argv[2:]
ALWAYS = 10**9
rest = 0  # what may still happen before the kill

def tick():
    global rest
    rest -= 1
    if rest < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def ticking(call):
    def ticked(*args, **kwargs):
        tick()
        return call(*args, **kwargs)
    return ticked

class Torn(io.FileIO):
    def write(self, data):
        if rest == 0:
            super().write(data[: len(data) * 2 // 3])
        tick()
        return super().write(data)

def child(moment):
    global rest
    rest = moment
    io.FileIO = Torn  # only the unfinished table is opened by this name
    os.fsync, os.replace, os.unlink = ticking(os.fsync), ticking(os.replace), ticking(os.unlink)
    main(args)

def forked(moment, size=None):  # size: of the unfinished table, at which the kill comes from outside
    pid = os.fork()
    if pid:
        while size is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if os.path.exists(out + ".partial") and os.path.getsize(out + ".partial") > size:
                os.kill(pid, signal.SIGKILL)
                break
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.stdout = sys.stderr = open(os.devnull, "w")
    code = 1
    try:
        child(moment)
        code = 99 if "lightning" in sys.modules else 0
    except SystemExit as ending:
        code = ending.code
    finally:
        os._exit(code)

out = sys.argv[1]
shown, sys.stdout = sys.stdout, open(os.devnull, "w")
main([*args, f"--out={out}.warm.csv"])  # what is loaded and compiled now, the children share
sys.stdout = shown
for name in os.listdir(os.path.dirname(out)):
    os.unlink(os.path.join(os.path.dirname(out), name))
moment, sizes = 0, [0, 300, 700]
while True:
    first = forked(moment) if moment < ALWAYS else forked(ALWAYS, sizes.pop())
    second = forked(ALWAYS) if first == -signal.SIGKILL else None
    left = sorted(os.listdir(os.path.dirname(out)))
    files = [open(path, "rb").read() for path in (out, out + ".skipped.csv")]
    print([first, second, left, *files], flush=True)
    for name in left:
        os.unlink(os.path.join(os.path.dirname(out), name))
    moment = moment + 1 if first == -signal.SIGKILL and moment < ALWAYS else ALWAYS
    if not sizes:
        break
"""


def test_killed_at_every_moment(bundle, damaged, tmp_path):
    """Before each write, in the middle of it, and before whatever else touches the disk; and without Lightning."""
    for name in NAMES[1:]:  # three batches will do
        shutil.rmtree(damaged / name)
    whole = run(bundle, damaged, tmp_path / "whole.csv")
    expected = [whole.read_bytes(), Path(f"{whole}.skipped.csv").read_bytes()]
    out = tmp_path / "out" / "out.csv"
    command = [sys.executable, "-c", DRIVER, str(out), *arguments(bundle, damaged, out, "--num_workers=0")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    kills = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    batches = math.ceil(len(find_images(damaged)) / 4)
    assert len(kills) > 2 * batches + 8  # each batch is written and synchronised
    for first, second, left, *files in kills:
        assert (first, second) in ((-signal.SIGKILL, 0), (0, None))
        assert left == ["out.csv", "out.csv.skipped.csv"]
        assert files == expected
    assert [first for first, *_ in kills[:-3]] == [*[-signal.SIGKILL] * (len(kills) - 4), 0]


@pytest.mark.slow
def test_killed_from_outside(bundle, tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    for k in range(400):
        Image.new("RGB", (20, 20), (k % 256, 3 * k % 256, 7 * k % 256)).save(images / f"{k:03d}.png")
    whole, out = run(bundle, images, tmp_path / "whole.jsonl"), tmp_path / "out.jsonl"
    partial = Path(f"{out}.partial")
    command = [sys.executable, "-m", "dynadapter.cli", *arguments(bundle, images, out)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (partial.exists() and partial.stat().st_size > 2000):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    run(bundle, images, out)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "SIG")]
)
def test_stopped_and_gone_on(number, code, words, bundle, images, tmp_path, capsys, monkeypatch):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests were started with this signal ignored, as nohup and a shell's & do")
    whole, out = run(bundle, images, tmp_path / "whole.csv"), tmp_path / "out.csv"
    calls, answers = [], command._answers

    def stopped(*args: Any) -> list[Entry]:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return answers(*args)

    before = signal.getsignal(number)
    monkeypatch.setattr(command, "_answers", stopped)
    line = refused(capsys, arguments(bundle, images, out), code)
    assert words in line
    assert "8 of 26 images" in line
    assert "the same command goes on from there" in line
    assert signal.getsignal(number) is before
    run(bundle, images, out)
    assert out.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["out.csv", "whole.csv"]


def test_a_full_disk(bundle, images, tmp_path, capsys, monkeypatch):
    whole, out = run(bundle, images, tmp_path / "whole.csv"), tmp_path / "out.csv"

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1500:
                super().write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(io, "FileIO", Full)  # only the unfinished table is opened by this name
        line = refused(capsys, arguments(bundle, images, out))
    assert f"the disk of {out} is full after" in line
    assert "the same command goes on from there once there is room" in line
    run(bundle, images, out)
    assert "going on after" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()


def test_two_at_once(bundle, images, tmp_path, capsys):
    pytest.importorskip("fcntl")
    out = tmp_path / "out.csv"
    with PredictionTable(out, ["a.png"], 4, {}):
        line = refused(capsys, arguments(bundle, images, out, "--overwrite=true"))
        assert "out.csv.partial is being written by another process; wait for it" in line
    run(bundle, images, out, "--overwrite=true")


def test_something_else_was_begun(bundle, images, tmp_path, capsys, monkeypatch):
    other = write_bundle(tmp_path / "other", images, policy=Confidence(0.9))
    out = tmp_path / "out.csv"
    partial = Path(f"{out}.partial")

    def interrupted(*_: Any) -> list[Entry]:
        raise KeyboardInterrupt

    def begun(*more: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(command, "_answers", interrupted)
            refused(capsys, arguments(bundle, images, out, *more), 130)

    copied = Path(shutil.copytree(images, tmp_path / "copied"))
    fewer = Path(shutil.copytree(images, tmp_path / "fewer"))
    next(fewer.rglob("*.png")).unlink()
    begun()
    for args, words in (
        (arguments(other, images, out), "begun with another bundle"),
        (arguments(bundle, copied, out), "begun with other images"),
        (arguments(bundle, fewer, out), "begun with 26 images, now there are 25"),
        ([*arguments(bundle, images, out), "--batch_size=8"], "begun with batch_size=4, now it is 8"),
    ):
        line = refused(capsys, args)
        assert words in line
        assert "delete it, or start over with --overwrite true" in line
        assert partial.exists()
    partial.write_text("file,class,confidence,exit\n")
    assert "is no unfinished table of predictions" in refused(capsys, arguments(bundle, images, out))
    assert partial.read_text() == "file,class,confidence,exit\n"
    begun("--overwrite=true")
    os.utime(next(images.rglob("*.png")), (1, 1))
    assert "sizes or times of the files have changed" in refused(capsys, arguments(bundle, images, out))
    run(other, images, out, "--overwrite=true")
    assert out.read_bytes() == run(other, images, tmp_path / "fresh.csv").read_bytes()


# ---- the table by itself

FILES = ["a.png", "b, c.png", "日本.png", "x\ny.png", "e.png", "f.png", "g.png"]
ENTRIES: list[Entry] = [
    Answer(FILES[0], "ant", 0.98765, 0),
    Unread(FILES[1], "broken, quite"),
    Answer(FILES[2], 'say "bee"', 1.0, 2),
    Answer(FILES[3], "ant", math.nan, 1),
    Answer(FILES[4], "cat", 0.5, 0),
    Unread(FILES[5], "empty"),
    Answer(FILES[6], "cat", 0.25, 1),
]


def fill(out: Path, batch_size: int = 2, entries: list[Entry] = ENTRIES) -> Path:
    with PredictionTable(out, FILES, batch_size, {"bundle": "b"}) as table:
        while table.done < len(FILES):
            table.add(entries[table.done : table.done + batch_size])
        table.finish()
    return out


def test_a_table(tmp_path):
    fill(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes().decode() == (
        'file,class,confidence,exit\na.png,ant,0.9877,1\n日本.png,"say ""bee""",1.0000,3\n"x\ny.png",ant,nan,2\n'
        "e.png,cat,0.5000,1\ng.png,cat,0.2500,2\n"
    )
    assert (tmp_path / "t.csv.skipped.csv").read_text() == ('file,reason\n"b, c.png","broken, quite"\nf.png,empty\n')
    lines = fill(tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5
    assert json.loads(lines[2]) == {"file": "x\ny.png", "class": "ant", "confidence": None, "exit": 2}
    with PredictionTable(tmp_path / "u.csv", FILES, 7, {}) as table:
        table.add(ENTRIES)
        assert (table.done, table.unread, table.exits, table.nonfinite) == (7, 2, 4, 1)


def test_an_output_that_stands_there_is_not_begun_again(tmp_path):
    out = fill(tmp_path / "t.csv")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        PredictionTable(out, FILES, 2, {"bundle": "b"})
    Path(f"{out}.partial").touch()  # as where another process finishes between a look and a lock
    with pytest.raises(ValueError, match="exists"):
        PredictionTable(out, FILES, 2, {"bundle": "b"})
    assert names(tmp_path) == before


@given(st.integers(0, 10_000), st.integers(1, 9), st.binary(max_size=40))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_anywhere_and_gone_on(tmp_path, monkeypatch, cut, batch_size, rubbish):
    """Also where a disk has left something else behind what was there."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    out = tmp_path / "t.csv"
    for path in tmp_path.iterdir():
        path.unlink()
    fill(out, batch_size)
    expected = [out.read_bytes(), Path(f"{out}.skipped.csv").read_bytes()]
    out.unlink()
    with PredictionTable(out, FILES, batch_size, {"bundle": "b"}) as table:
        while table.done < len(FILES):
            table.add(ENTRIES[table.done : table.done + batch_size])
        whole = table.partial.read_bytes()
        header = whole.index(b"\n") + 1
        kept = whole[: cut % (len(whole) + 1)]
        table.partial.write_bytes(kept + (rubbish if len(kept) >= header else b""))
    with PredictionTable(out, FILES, batch_size, {"bundle": "b"}) as table:
        lines = kept[header:].count(b"\n")
        assert table.done == (7 if lines == 7 else lines - lines % batch_size)
        assert (table.partial.read_bytes() + b"!").count(b"\n") == 1 + table.done
    fill(out, batch_size)
    assert [out.read_bytes(), Path(f"{out}.skipped.csv").read_bytes()] == expected


def test_a_flipped_bit_costs_a_batch_and_no_answer(tmp_path):
    whole = fill(tmp_path / "whole.csv").read_bytes()
    for bit in random.Random(0).sample(range(3000), 60):
        out = tmp_path / f"{bit}.csv"
        with PredictionTable(out, FILES, 2, {"bundle": "b"}) as table:
            table.add(ENTRIES[:2])
            table.add(ENTRIES[2:4])
        content = bytearray(table.partial.read_bytes())
        header = content.index(b"\n") + 1
        content[header + bit // 8 % (len(content) - header)] ^= 1 << bit % 8
        table.partial.write_bytes(content)
        with PredictionTable(out, FILES, 2, {"bundle": "b"}) as table:
            assert table.done in (0, 2)
        assert fill(out).read_bytes() == whole


def test_a_table_is_finished_whole_and_once(tmp_path):
    out = tmp_path / "t.csv"
    with PredictionTable(out, FILES, 2, {}) as table:
        with pytest.raises(ValueError, match="0 of 7 images are done"):
            table.finish()
        with pytest.raises(ValueError, match="a batch of 3 images does not fit the 2 that are next"):
            table.add(ENTRIES[:3])
        with pytest.raises(ValueError, match="does not fit"):
            table.add(ENTRIES[2:4])
        while table.done < 7:
            table.add(ENTRIES[table.done : table.done + 2])
        out.write_text("somebody else's")
        with pytest.raises(ValueError, match="exists"):
            table.finish()
    assert out.read_text() == "somebody else's"
    with pytest.raises(ValueError, match="exists"):
        PredictionTable(out, FILES, 2, {})
    assert Path(f"{out}.partial").exists()
    with PredictionTable(out, FILES, 2, {}, overwrite=True) as table:
        assert table.done == 7
        table.finish()
    assert names(tmp_path) == ["t.csv", "t.csv.skipped.csv"]


def test_a_table_belongs_to_one_process(tmp_path):
    pytest.importorskip("fcntl")
    with PredictionTable(tmp_path / "t.csv", FILES, 2, {}) as table:
        with pytest.raises(Busy, match="is being written by another process"):
            PredictionTable(tmp_path / "t.csv", FILES, 2, {})
        table.add(ENTRIES[:2])
    with PredictionTable(tmp_path / "t.csv", FILES, 2, {}) as table:
        assert table.done == 2


def test_without_locks_it_works_all_the_same(tmp_path, monkeypatch):
    expected = fill(tmp_path / "t.csv").read_bytes()
    monkeypatch.setattr(predictions, "fcntl", None)
    assert fill(tmp_path / "u.csv").read_bytes() == expected
    assert names(tmp_path) == ["t.csv", "t.csv.skipped.csv", "u.csv", "u.csv.skipped.csv"]


def test_a_table_of_something_else(tmp_path):
    partial = tmp_path / "t.csv.partial"
    with PredictionTable(tmp_path / "t.csv", FILES, 2, {"bundle": "b", "device": "cpu"}) as table:
        table.add(ENTRIES[:2])
    before = partial.read_bytes()
    for identity, words in (
        ({"bundle": "b", "device": "cuda"}, "begun with device=cpu, now it is cuda"),
        ({"bundle": "b"}, "begun with device=cpu, now it is None"),
        ({"bundle": "b" * 64, "device": "cpu"}, "begun with bundle=b"),
    ):
        with pytest.raises(Foreign, match=words):
            PredictionTable(tmp_path / "t.csv", FILES, 2, identity)
    partial.write_bytes(before.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(Foreign, match="begun by another version"):
        PredictionTable(tmp_path / "t.csv", FILES, 2, {})
    for other in (b"[]\n", b"mine", b"\0" * 50 + b"\n", b"{}\n"):
        partial.write_bytes(other)
        with pytest.raises(Foreign, match="is no unfinished table"):
            PredictionTable(tmp_path / "t.csv", FILES, 2, {})
        assert partial.read_bytes() == other


# ---- mistakes


def test_help_is_there(capsys):
    for args in (["predict", "--bundle", "--help"], ["predict", "--bundle=x", "-h"]):
        main(args)
        shown = capsys.readouterr().out
        for key in ("--images", "--out", "--weights", "--max_skipped", "--overwrite", "OUT.partial"):
            assert key in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--images={I}", "out must be given"),
        ("--out=o.csv", "images must be given"),
        ("--images={I} --out=o.txt", "o.txt stands for no format; give a name that ends in .csv or .jsonl"),
        ("--images={I} --out={I}", "is a folder; give a name"),
        ("--images={W}/nowhere --out=o.csv", "nowhere does not exist; give a folder of images"),
        ("--images={W}/empty --out=o.csv", "no image in"),
        ("--images={I} --out=o.csv --batch_size=0", "batch_size=0 must be at least 1"),
        ("--images={I} --out=o.csv --batch_size=four", "batch_size: expected a whole number, not 'four'"),
        ("--images={I} --out=o.csv --num_workers=-1", "num_workers=-1 must be at least 0"),
        ("--images={I} --out=o.csv --max_skiped=3", "there is no key 'max_skiped'; did you mean 'max_skipped'?"),
        ("--images={I} --out=o.csv --device=tpu", "device: expected one of auto, cpu, cuda, not 'tpu'"),
        ("--images={I} --out=o.csv --weights={W}/no.pth", "no.pth does not exist; give a file of weights"),
        ("--images={I} --out=o.csv --ckpt_path=last.ckpt", "--bundle and --ckpt_path are two networks"),
        ("--images={I} --out=o.csv more", "'more' belongs to no setting"),
        ("--images={I} --out=o.csv --bundle={W}/nowhere", "nowhere is no folder; give a bundle's folder"),
        ("--images={I} --out=o.csv --bundle={W}/empty", "empty has no config.json"),
        ("--images={I} --out=o.csv --bundle={W}/onnx", "is an exported folder, not a bundle; run it with python -m"),
        ("--images={I} --out=o.csv --bundle={W}/last.ckpt", "is a checkpoint, not a bundle; make one with dynadapter"),
        ("--images={I} --out=o.csv --bundle={W}/tensors", "has no preprocessing"),
        ("--images={I} --out=o.csv --bundle={W}/needy", "--weights FILE, or --pretrained true if"),
        ("--images={I} --out={W}/last.ckpt/o.csv", "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(more, words, bundle, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "manifest.json").write_text("{}")
    (tmp_path / "last.ckpt").write_text("")
    if "tensors" in more:
        write_bundle(tmp_path / "tensors", images, preprocessing=None)
    if "needy" in more:
        needy = Path(shutil.copytree(bundle, tmp_path / "needy")) / "config.json"
        content = json.loads(needy.read_text())
        del content["checksum"]
        content["backbone"] |= {"origin": "file", "file": "backbone.pth"}
        needy.write_text(json.dumps(content))
    given = more.replace("{I}", str(images)).replace("{W}", str(tmp_path)).split()
    line = refused(capsys, ["predict", f"--bundle={bundle}", *given])
    assert words in line
    assert line.startswith("dynadapter: error: ")
    assert not list(tmp_path.glob("o.csv*"))


def test_a_gpu_that_is_not_there(bundle, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU here" in refused(capsys, arguments(bundle, images, tmp_path / "o.csv", "--device=cuda"))
