"""``dynadapter predict``: every image once, in its order, whatever stops the command on the way."""

import ast
import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused
from jsonargparse import Namespace
from PIL import Image
from torch import nn

from dynadapter.adapters import AdapterSpec, LoRA, inject
from dynadapter.backbones import create_backbone, fingerprint
from dynadapter.cli import main
from dynadapter.cli.networks import chosen_policy
from dynadapter.cli.predict_on_ray import fill_on_ray
from dynadapter.exits.combining import Combined
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Margin, Never, Patience
from dynadapter.exits.temperature import Scaled
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import find_images, load_image
from dynadapter.serve import predict as engine
from dynadapter.serve.bundle import BackboneSource, bundle_from_classifier, load, save_bundle
from dynadapter.serve.formats import COLUMNS, Unread
from dynadapter.serve.table import PredictionTable
from dynadapter.spec import plain
from dynadapter.training.callbacks import EarlyExit

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
                layer.weight *= 2.5 / logits.std(0)[:, None]
                layer.bias -= 2.5 * logits.mean(0) / logits.std(0)
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


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what it writes


def test_rows_are_the_bundles_answers(bundle, images, tmp_path, capsys):
    run(bundle, images, tmp_path / "new" / "out.csv")
    files = find_images(images)
    expected = load(bundle).predict(files, batch_size=4)
    rows = read(tmp_path / "new" / "out.csv")
    assert list(rows[0]) == list(COLUMNS)
    assert [row["file"] for row in rows] == [str(path) for path in files]
    assert [row["class"] for row in rows] == [p.label for p in expected]
    assert [row["confidence"] for row in rows] == [f"{p.confidence:.4f}" for p in expected]
    assert [row["exit"] for row in rows] == [str(p.exit_index + 1) for p in expected]
    assert {row["exit"] for row in rows} == {"1", "2"}
    assert {row["class"] for row in rows} == set(NAMES)
    assert names(tmp_path / "new") == ["out.csv"]
    printed = capsys.readouterr()
    average = np.mean([p.exit_index + 1 for p in expected])
    assert f"26 predictions in {tmp_path / 'new' / 'out.csv'}, average exit {average:.2f}" in printed.out
    assert not printed.err.strip()  # the bar is for terminals; rich 14 prints an empty line


def test_top_classes_and_probabilities(bundle, images, tmp_path):
    plain = read(run(bundle, images, tmp_path / "plain.csv"))
    rows = read(run(bundle, images, tmp_path / "out.csv", "--top_k=3", "--probabilities=true"))
    columns = [f"probability_{name}" for name in NAMES]
    assert list(rows[0]) == [*COLUMNS, "class_2", "confidence_2", "class_3", "confidence_3", *columns]
    for row, expected in zip(rows, plain, strict=True):
        assert {name: row[name] for name in COLUMNS} == expected
        every = {name: float(row[column]) for name, column in zip(NAMES, columns, strict=True)}
        assert sum(every.values()) == pytest.approx(1, abs=1e-5)
        ranked = [row["class"], row["class_2"], row["class_3"]]
        assert ranked == sorted(every, key=every.__getitem__, reverse=True)
        assert [float(row[f"confidence{end}"]) for end in ("", "_2", "_3")] == pytest.approx(
            [every[name] for name in ranked], abs=1e-4
        )


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_threads_change_nothing(workers, bundle, images, tmp_path):
    out = run(bundle, images, tmp_path / "out.csv", f"--num_workers={workers}")
    assert out.read_bytes() == run(bundle, images, tmp_path / "again.csv").read_bytes()


def test_images_are_read_ahead(bundle, images, tmp_path, monkeypatch):
    """But not all of them."""
    read_so_far, ahead = [], []
    read_one = Preprocess.read

    def counted(preprocess: Preprocess, path: str) -> np.ndarray:
        read_so_far.append(path)
        return read_one(preprocess, path)

    monkeypatch.setattr(Preprocess, "read", counted)
    with PredictionTable(tmp_path / "t.csv", [str(p) for p in find_images(images)], 2, {}) as table:
        for done, _ in enumerate(engine.read_batches(PREPROCESS, table, table.claim(), 2), 1):
            time.sleep(0.02)
            ahead.append(len(read_so_far) - 2 * done)
    assert len(read_so_far) == 26
    assert 0 < max(ahead) <= 6


def test_lists_and_single_images(bundle, images, tmp_path):
    whole = read(run(bundle, images, tmp_path / "whole.csv", "--batch_size=1"))
    files = [row["file"] for row in whole]
    (tmp_path / "list.txt").write_text("\n".join(files[:3]))
    (tmp_path / "in.csv").write_text("id,path\n" + "".join(f'{k},"{file}"\n' for k, file in enumerate(files[3:9])))
    out = tmp_path / "out.csv"
    places = ["--images", str(tmp_path / "list.txt"), str(tmp_path / "in.csv"), files[9]]
    main(["predict", f"--bundle={bundle}", *places, f"--out={out}", "--path_column=path", "--batch_size=1"])
    assert read(out) == whole[:10]


def test_output_that_exists_costs_no_work(bundle, images, tmp_path, capsys, monkeypatch):
    """The rerun of a stopped ``--overwrite true`` is refused at once; a file that appears meanwhile is at the end."""
    out = tmp_path / "out.csv"
    out.write_text("mine")
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2, signal.SIGINT)
        refused(arguments(bundle, images, out, "--overwrite=true"), capsys, 130)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "rows", lambda *_: pytest.fail("computed"))
        line = refused(arguments(bundle, images, out), capsys)
    assert line.endswith("out.csv exists; give another name, or --overwrite true")
    later, rows = tmp_path / "later.csv", engine.rows
    monkeypatch.setattr(engine, "rows", lambda *args: (later.write_text("mine"), rows(*args))[1])
    line = refused(arguments(bundle, images, later), capsys)
    assert line.endswith("later.csv exists; give another name, or --overwrite true")
    assert later.read_text() == out.read_text() == "mine"


def test_images_whose_names_begin_like_a_user(bundle, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(find_images(images)[0], "~a.png")
    Path("~list.txt").write_text("~a.png\n")
    assert [row["file"] for row in read(run(bundle, Path("~list.txt"), Path("~out.csv")))] == ["~a.png"]


def test_terminal_shows_a_bar(bundle, images, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    run(bundle, images, tmp_path / "out.csv")
    for words in ("26/26", "images/s", "average exit 1."):
        assert words in terminal.getvalue()


# ---- the exit policy


@pytest.mark.parametrize(
    ("options", "exits"),
    [
        (["--threshold=0.0"], {"1"}),
        (["--threshold=1.0"], {"2"}),
        (["--threshold=[0.0]"], {"1"}),
        (["--policy=Never"], {"2"}),
        (["--policy=Margin", "--threshold=0"], {"1"}),
        (["--policy={class_path: Patience, init_args: {patience: 1}}"], {"1"}),
    ],
)
def test_another_policy_or_threshold(options, exits, bundle, images, tmp_path):
    assert {row["exit"] for row in read(run(bundle, images, tmp_path / "out.csv", *options))} == exits


def test_chosen_policy():
    stored = Scaled(Confidence(0.7), (1.2, 0.9))
    assert chosen_policy(stored, None, None) == stored
    assert chosen_policy(stored, None, 0.8) == Scaled(Confidence(0.8), (1.2, 0.9))
    given = Scaled(Confidence(0.8), 3.0)
    assert chosen_policy(stored, plain(given), None) == given
    assert chosen_policy(stored, "Margin", 0.8) == Scaled(Margin(0.8), (1.2, 0.9))
    assert chosen_policy(Never(), "Confidence", [0.1, 0.2]) == Confidence((0.1, 0.2))
    assert chosen_policy(Scaled(Combined(by="mean"), 1.2), None, 0.8) == Scaled(Combined(Confidence(0.8), "mean"), 1.2)
    for policy in (Never(), Patience(2)):
        with pytest.raises(ValueError, match="give --policy Confidence, too"):
            chosen_policy(policy, None, 0.5)
    with pytest.raises(ValueError, match=r"there is no Policy 'os\.system'"):
        chosen_policy(stored, "os.system", None)


# ---- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a run folder whose config names a policy."""
    from tiny import make_classifier, write_checkpoint

    run = tmp_path_factory.mktemp("runs") / "version_0"
    classifier = make_classifier(class_names=["ant", "bee", "cat", "dog", "eel"])
    classifier.preprocessing = {"image_size": 32, "normalization": "half"}
    with torch.no_grad():
        for p in classifier.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    (run / "checkpoints").mkdir(parents=True)
    path = write_checkpoint(classifier, run / "checkpoints" / "last.ckpt", EarlyExit([Never(), Confidence(0.5)]))
    bundle_from_classifier(classifier, run / "bundle", policy=Never())
    return path


def test_checkpoint_gives_its_bundles_rows(checkpoint, images, tmp_path):
    place = ["predict", f"--images={images}", "--batch_size=4"]
    main([*place, f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'c.csv'}"])
    main([*place, f"--bundle={checkpoint.parent.parent / 'bundle'}", f"--out={tmp_path / 'b.csv'}"])
    assert (tmp_path / "c.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert {row["exit"] for row in read(tmp_path / "c.csv")} == {"3"}  # the first policy of its training
    assert names(checkpoint.parents[2]) == ["version_0"]  # no new run


def test_checkpoint_resumes(checkpoint, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.csv"
    args = ["predict", f"--images={images}", f"--ckpt_path={checkpoint}", f"--out={out}", "--batch_size=4"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2, signal.SIGINT)
        assert "8 of 26 images" in refused(args, capsys, 130)
    main(args)
    assert "continuing after 8 of 26 images" in capsys.readouterr().out
    assert len(read(out)) == 26


# ---- images that cannot be read


@pytest.fixture
def damaged(images: Path, tmp_path: Path) -> Path:
    """The images and three that cannot be read, two of them in the first batches."""
    folder = Path(shutil.copytree(images, tmp_path / "damaged"))
    (folder / "ant" / "00a.png").write_text("no image")
    (folder / "ant" / "00b.png").write_bytes(b"")
    (folder / "cat" / "zz.jpg").write_bytes((folder / "ant" / "00.jpg").read_bytes()[:400])
    return folder


def test_unreadable_images_are_listed(bundle, damaged, tmp_path, capsys):
    out = run(bundle, damaged, tmp_path / "out.csv", "--max_skipped=3")
    files = find_images(damaged)
    bad = [path for path in files if path.name in ("00a.png", "00b.png", "zz.jpg")]
    listed = read(Path(f"{out}.skipped.csv"))
    assert [row["file"] for row in listed] == [str(path) for path in bad]
    assert "not an image of a known format" in listed[0]["reason"]
    assert all(row["reason"] for row in listed)
    rows = read(out)
    assert [row["file"] for row in rows] == [str(path) for path in files if path not in bad]
    # batches are cut by position, so the readable images of a batch are computed together
    groups = [[path for path in files[k : k + 4] if path not in bad] for k in range(0, len(files), 4)]
    expected = [p for group in groups for p in load(bundle).predict(group, batch_size=4)]
    assert [row["confidence"] for row in rows] == [f"{p.confidence:.4f}" for p in expected]
    assert f"3 images could not be read, listed in {out}.skipped.csv" in capsys.readouterr().out


def test_past_the_cap_it_stops_and_resumes(bundle, damaged, tmp_path, capsys):
    whole = run(bundle, damaged, tmp_path / "whole.csv", "--max_skipped=3")
    out = tmp_path / "out.csv"
    line = refused(arguments(bundle, damaged, out, "--max_skipped=2"), capsys)
    for words in ("3 images cannot be read, more than max_skipped=2", f"{out}.skipped.csv", "higher --max_skipped"):
        assert words in line
    assert "28 of 29 images, kept in" in line
    assert [row["reason"] for row in read(Path(f"{out}.skipped.csv"))][1:2] == ["the file is empty"]
    assert len(read(Path(f"{out}.skipped.csv"))) == 3
    assert not out.exists()
    run(bundle, damaged, out, "--max_skipped=3")
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.skipped.csv").read_bytes() == Path(f"{whole}.skipped.csv").read_bytes()
    assert "continuing after 24 of 29 images" in capsys.readouterr().out
    refused(arguments(bundle, damaged, tmp_path / "no.csv", "--max_skipped=0"), capsys)
    assert len(read(tmp_path / "no.csv.skipped.csv")) == 2  # both are in the first batch


def test_no_readable_image(bundle, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no image")
    line = refused(arguments(bundle, tmp_path / "in", tmp_path / "out.csv"), capsys)
    assert "none of the images can be read" in line
    assert not (tmp_path / "out.csv").exists()


def test_old_list_is_removed(bundle, images, tmp_path):
    out = tmp_path / "out.csv"
    Path(f"{out}.skipped.csv").write_text("file,reason\nold.png,old\n")
    run(bundle, images, out)
    assert names(tmp_path) == ["out.csv"]


# ---- kills

DRIVER = """
import os, pathlib, shutil, signal, sys
import torch
torch.set_num_threads(1)
from dynadapter.cli import main

args = sys.argv[2:]
ALWAYS = 10**9
rest = 0  # calls before the kill

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

write = pathlib.Path.write_bytes

def torn(path, data):
    if rest == 0:
        write(path, data[: len(data) * 2 // 3])
    tick()
    return write(path, data)

def child(moment):
    global rest
    rest = moment
    pathlib.Path.write_bytes = torn  # of a batch
    for name in ("fsync", "replace", "unlink", "rename", "mkdir", "rmdir"):
        setattr(os, name, ticking(getattr(os, name)))
    main(args)

def forked(moment):
    pid = os.fork()
    if pid:
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

out = pathlib.Path(sys.argv[1])
shown, sys.stdout = sys.stdout, open(os.devnull, "w")
main([*args, f"--out={out}.warm.csv"])  # what is loaded and compiled now, the children share
sys.stdout = shown
for path in out.parent.iterdir():
    path.unlink()
moment = 0
while True:
    first = forked(moment)
    finished = out.exists()
    second = forked(ALWAYS) if first == -signal.SIGKILL else None
    left = sorted(os.listdir(out.parent))
    files = [path.read_bytes() for path in (out, pathlib.Path(f"{out}.skipped.csv"))]
    print([first, second, finished, left, *files], flush=True)
    for path in out.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if first == 0:
        break
    moment += 1
"""


@pytest.mark.slow
def test_killed_at_every_moment(bundle, damaged, tmp_path):
    """Before and in the middle of each write and whatever else touches the disk; and without Lightning."""
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
    assert len(kills) > 12
    for first, second, finished, left, *files in kills[:-1]:
        assert first == -signal.SIGKILL
        assert second == 0 or (finished and second == 2)  # then the table exists
        kept = [name for name in left if name != ".out.csv.done" and ".partial" not in name]
        assert kept == ["out.csv", "out.csv.skipped.csv"]
        assert files == expected
    assert kills[-1] == [0, None, True, ["out.csv", "out.csv.skipped.csv"], *expected]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for k in range(240):
        Image.new("RGB", (20, 20), (k % 256, 3 * k % 256, 7 * k % 256)).save(tmp_path / "in" / f"{k:03d}.png")
    return tmp_path / "in"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_from_outside(processes, number, bundle, many, tmp_path):
    whole, out = run(bundle, many, tmp_path / "whole.jsonl"), tmp_path / "out.jsonl"
    args = arguments(bundle, many, out, f"--processes={processes}")
    process = subprocess.Popen([sys.executable, "-m", "dynadapter.cli", *args])
    while not list(Path(f"{out}.partial").glob("[1-9].json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
    assert not out.exists()
    main(args)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_processes_write_the_same_bytes(bundle, many, tmp_path):
    whole = run(bundle, many, tmp_path / "whole.csv")
    assert run(bundle, many, tmp_path / "out.csv", "--processes=3").read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["in", "out.csv", "whole.csv"]


def interrupted_after(patch: pytest.MonkeyPatch, batches: int, number: signal.Signals) -> None:
    calls, rows = [], engine.rows

    def stopped(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > batches:
            signal.raise_signal(number)
        return rows(*args)

    patch.setattr(engine, "rows", stopped)


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "SIG")]
)
def test_stopped_and_resumed(number, code, words, bundle, images, tmp_path, capsys, monkeypatch):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests were started with this signal ignored, as nohup and a shell's & do")
    whole, out = run(bundle, images, tmp_path / "whole.csv"), tmp_path / "out.csv"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2, number)
        line = refused(arguments(bundle, images, out), capsys, code)
    for part in (words, "8 of 26 images", "the same command continues from there"):
        assert part in line
    assert signal.getsignal(number) is before
    run(bundle, images, out)
    assert out.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["out.csv", "whole.csv"]


def test_full_disk(bundle, images, tmp_path, capsys, monkeypatch):
    whole, out = run(bundle, images, tmp_path / "whole.csv"), tmp_path / "out.csv"
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith(".3."):
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        line = refused(arguments(bundle, images, out), capsys)
    assert f"the disk of {out} is full after 12 of 26 images" in line
    assert "the same command continues from there once there is room" in line
    run(bundle, images, out)
    assert "continuing after 12" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()


def test_two_commands_at_once(bundle, images, tmp_path, capsys):
    pytest.importorskip("fcntl")
    with PredictionTable(tmp_path / "out.csv", ["a.png"], 4, {}):
        line = refused(arguments(bundle, images, tmp_path / "out.csv", "--overwrite=true"), capsys)
    assert "out.csv.partial is being written by another thread; wait for it" in line


def test_table_of_something_else(bundle, images, tmp_path, capsys, monkeypatch):
    other = write_bundle(tmp_path / "other", images, policy=Confidence(0.9))
    images = Path(shutil.copytree(images, tmp_path / "in"))
    copied = Path(shutil.copytree(images, tmp_path / "copied"))
    fewer = Path(shutil.copytree(images, tmp_path / "fewer"))
    next(fewer.rglob("*.png")).unlink()
    out = tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        interrupted_after(patch, 0, signal.SIGINT)
        refused(arguments(bundle, images, out), capsys, 130)
    for args, words in (
        (arguments(other, images, out), "begun with another network"),
        (arguments(bundle, copied, out), "begun with other images"),
        (arguments(bundle, fewer, out), "begun with 26 images, now there are 25"),
        ([*arguments(bundle, images, out), "--batch_size=8"], "begun with batch_size=4, now it is 8"),
        (arguments(bundle, images, out, "--top_k=2"), "begun with other columns"),
        (arguments(bundle, images, out, "--threshold=0.8"), "begun with policy=Scaled("),
    ):
        line = refused(args, capsys)
        assert words in line
        assert "delete it, or start over with --overwrite true" in line
        assert Path(f"{out}.partial").exists()
    os.utime(next(images.rglob("*.png")), (1, 1))
    assert "sizes or times of the files have changed" in refused(arguments(bundle, images, out), capsys)
    run(other, images, out, "--overwrite=true")
    assert out.read_bytes() == run(other, images, tmp_path / "fresh.csv").read_bytes()


# ---- mistakes


def test_help_has_at_most_50_lines(capsys):
    for args in (["predict", "--bundle", "--help"], ["predict", "-h"]):
        main(args)
        shown = capsys.readouterr().out
        assert len(shown.splitlines()) <= 50
        for key in ("--images", "--out", "--ckpt_path", "--weights", "--max_skipped", "--overwrite", "OUT.partial"):
            assert key in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--images={I}", "out must be given"),
        ("--out=o.csv", "images must be given"),
        ("--images={I} --out=o.txt", "o.txt names no format; give a name that ends in .csv, .jsonl or .parquet"),
        ("--images={I} --out={I}", "is a folder; give a name"),
        ("--images={W}/nowhere --out=o.csv", "nowhere does not exist; give a folder"),
        ("--images={W}/empty --out=o.csv", "no image in"),
        ("--images={I} --out=o.csv --batch_size=0", "batch_size=0 must be at least 1"),
        ("--images={I} --out=o.csv --processes=0", "processes=0 must be at least 1"),
        ("--images={I} --out=o.csv --batch_size=four", "batch_size: expected a whole number, not 'four'"),
        ("--images={I} --out=o.csv --num_workers=-1", "num_workers=-1 must be at least 0"),
        ("--images={I} --out=o.csv --max_skiped=3", "there is no key 'max_skiped'; did you mean 'max_skipped'?"),
        ("--images={I} --out=o.csv --device=tpu", "device: expected one of auto, cpu, cuda, not 'tpu'"),
        ("--images={I} --out=o.csv --top_k=4", "top_k=4 is more than the 3 classes"),
        ("--images={I} --out=o.csv --policy=Confidense", "did you mean 'Confidence'"),
        ("--images={I} --out=o.csv --threshold=2", "2.0 is not in"),
        ("--images={I} --out=o.csv --weights={W}/no.pth", "no.pth does not exist; give a file of weights"),
        ("--images={I} --out=o.csv --ckpt_path=last.ckpt", "one of the two"),
        ("--images={I} --out=o.csv --bundle={W}/nowhere", "nowhere is not a folder; give a bundle's folder"),
        ("--images={I} --out=o.csv --bundle={W}/empty", "empty has no config.json"),
        ("--images={I} --out=o.csv --bundle={W}/onnx", "is an exported folder, not a bundle; run it with python"),
        ("--images={I} --out=o.csv --bundle={W}/last.ckpt", "is a checkpoint, not a bundle; make one with dynadapter"),
        ("--images={I} --out=o.csv --bundle={W}/tensors", "has no preprocessing"),
        ("--images={I} --out=o.csv --bundle={W}/needy", "--weights FILE, or --pretrained true if"),
        ("--images={I} --out={W}/last.ckpt/o.csv", "cannot be written"),
    ],
)
def test_mistake_is_one_line(more, words, bundle, images, tmp_path, capsys, monkeypatch):
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
    line = refused(["predict", f"--bundle={bundle}", *given], capsys)
    assert words in line
    assert line.startswith("dynadapter: error: ")
    assert not list(tmp_path.glob("o.csv*"))


@pytest.mark.parametrize("content", ["missing", b"", b"no checkpoint"])
def test_wrong_checkpoint_is_one_line(content, images, tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    if content != "missing":
        path.write_bytes(content)
    line = refused(["predict", f"--ckpt_path={path}", f"--images={images}", f"--out={tmp_path / 'o.csv'}"], capsys)
    assert "last.ckpt" in line


@pytest.mark.parametrize("where", ["adapter", "heads", "backbone_args", "lr_schedule", "preprocessing"])
def test_checkpoint_that_names_code(where, checkpoint, images, tmp_path, capsys, monkeypatch):
    """Not even a module is imported for it."""
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    held = torch.load(checkpoint, weights_only=True)
    place = held["dynadapter"] if where == "preprocessing" else held["hyper_parameters"]
    place[where] = {"class_path": "evil_module.Data", "init_args": {"path": "x"}}
    held["hyper_parameters"] |= {"_instantiator": "os.mkdir", "_class_path": "os.mkdir"}
    torch.save(held, tmp_path / "evil.ckpt")
    args = [f"--ckpt_path={tmp_path / 'evil.ckpt'}", f"--images={images}", f"--out={tmp_path / 'o.csv'}"]
    refused(["predict", *args], capsys)
    assert not (tmp_path / "mark").exists()


def test_gpu_that_is_not_there(bundle, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU here" in refused(arguments(bundle, images, tmp_path / "o.csv", "--device=cuda"), capsys)


# ---- Ray Data


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_writes_the_same_bytes(bundle, many, damaged, alone_on_ray, tmp_path, capsys, monkeypatch):
    expected = run(bundle, many, tmp_path / "one.csv")
    assert run(bundle, many, tmp_path / "two.csv", "--engine", "ray", "--processes", "2").read_bytes() == (
        expected.read_bytes()
    )
    for _ in range(2):  # the same command again does not get past the limit
        error = refused(arguments(bundle, damaged, tmp_path / "t.csv", "--engine", "ray", "--max_skipped", "1"), capsys)
        assert "images cannot be read, more than max_skipped=1, listed in " in error
        assert "the same command continues from there with a higher --max_skipped" in error
        assert len(read(tmp_path / "t.csv.skipped.csv")) > 1
    monkeypatch.setattr(engine, "predict", None)  # nothing is computed in this process
    resumed = run(bundle, damaged, tmp_path / "t.csv", "--engine", "ray", "--processes", "2")
    assert "continuing after" in capsys.readouterr().out
    monkeypatch.undo()
    assert resumed.read_bytes() == run(bundle, damaged, tmp_path / "u.csv").read_bytes()


@pytest.mark.parametrize("saved", [3, 4])
def test_cap_of_finished_batches_on_ray(saved, tmp_path):
    """The limit holds for what an earlier run has saved, whether or not anything is left to compute."""
    files = ["a.png", "b.png", "c.png", "d.png"]
    with PredictionTable(tmp_path / "t.csv", files, 1, {}) as table:
        for number in range(saved):
            table.save(number, [Unread(files[number], "empty") if number < 2 else [files[number], "ant", 0.5, 1]])
        with pytest.raises(engine.TooManyUnread, match="2 images cannot be read, more than max_skipped=1"):
            fill_on_ray(Namespace(max_skipped=1), [], table, lambda: None)
        assert [row["file"] for row in read(table.unread_list)] == files[:2]
        if saved == len(files):
            fill_on_ray(Namespace(max_skipped=2), [], table, lambda: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "ray", "--backend", "auto"], "--engine ray takes one --backend for all machines"),
        (["--engine", "ray", "--device", "cpu"], "--gpus instead of --device"),
        (["--gpus", "-1"], "gpus=-1.0 must be at least 0"),
        (["--gpus", "1"], "gpus=1.0 belongs to --engine ray"),
        (["--engine", "ray", "--gpus", "1", "--backend", "onnx"], "--backend onnx runs on a CPU; leave out --gpus"),
    ],
)
def test_options_of_ray(options, words, bundle, images, tmp_path, capsys):
    assert words in refused(arguments(bundle, images, tmp_path / "t.csv", *options), capsys)
