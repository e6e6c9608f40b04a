"""Hostile files of every kind run no code, read nothing outside their folder, and fill no memory."""

import ast
import os
import struct
import time
import tomllib
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import TINY, printed, refused
from lightning.pytorch.callbacks import LambdaCallback
from packaging.requirements import Requirement
from PIL import Image

from dynadapter.cli import main
from dynadapter.cli.errors import Failed, Mistake
from dynadapter.cli.predict import helpers
from dynadapter.cli.safety import check_config
from dynadapter.cli.sweep_workers import spread
from dynadapter.data import ImageFolder, UnreadableImage, VTAB1k, lists
from dynadapter.images.reading import load_image
from dynadapter.training.module import ExitClassifier

ROOT = Path(__file__).parents[1]


class Code:
    """Create a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that only hostile code creates."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


# ---- the source


def calls() -> Iterator[tuple[str, str, dict[str, ast.expr]]]:
    """Yield the calls in package, benchmarks and tools: the file, the dotted name, the named arguments."""
    for path in sorted(path for room in ("src", "benchmarks", "tools") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                named = {word.arg: word.value for word in node.keywords if word.arg is not None}
                yield path.name, ast.unparse(node.func), named


def test_source_loads_no_pickle():
    seen = 0
    for file, name, named in calls():
        last = name.rpartition(".")[2]
        if name == "torch.load" or (name == "read_checkpoint" and file == "weight_files.py"):  # there it is timm's
            seen += 1
            assert ast.unparse(named["weights_only"]) == "True", file
        assert name != "torch.export.load", file  # it loads pickles
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "joblib.", "cloudpickle.")), file
        assert last != "Unpickler", file
        assert name not in ("torch.jit.load", "torch.hub.load", "pd.read_pickle"), file
        assert "allow_pickle" not in named, file
    assert seen > 5


def test_source_runs_no_text():
    for file, name, named in calls():
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen"), file
        assert "shell" not in named, file
        if name.startswith("yaml.") and "load" in name:
            assert name in ("yaml.load", "yaml.safe_load"), file
            assert name != "yaml.load" or file == "limits.py"  # by SafeLoaders
        if name.endswith("extractall"):
            assert ast.unparse(named["filter"]) == "'data'", file


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        # malicious uploads, GHSA-w37p-236h-pfx3; before 2.6.6 a checkpoint's hyper-parameters could run code
        ("lightning", ("2.6.2", "2.6.3", "2.6.5"), "2.6.6"),
        ("torch", ("2.5.1", "2.9.1"), "2.10.0"),  # weights_only could be got around before 2.6 (CVE-2025-32434)
        ("jsonargparse", ("4.48.0", "5.0.0"), "4.51.0"),
        ("pillow", ("10.2.0", "11.2.0"), "11.3.0"),  # CVE-2024-28219, CVE-2025-48379
        ("timm", ("1.0.20", "1.0.22", "1.0.25"), "1.0.31"),  # these could load pickles that run code
        ("onnxruntime", ("1.20.0", "1.22.0", "1.23.0"), "1.24.1"),  # these read external data of graphs from any path
    ],
)
def test_bounds_exclude_bad_releases(name, bad, good):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["onnx"]]
    (found,) = [r for r in map(Requirement, stated) if r.name == name]
    assert not [version for version in bad if version in found.specifier]
    assert good in found.specifier


# ---- a hostile checkpoint


@pytest.fixture(scope="module")
def content(tiny_run: Path) -> dict[str, Any]:
    """The content of a valid checkpoint."""
    held: dict[str, Any] = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)
    return held


COMMANDS = {
    "test": ["test", "--ckpt_path", "{C}"],
    "validate": ["validate", "--ckpt_path", "{C}"],
    "flops": ["flops", "--ckpt_path", "{C}"],
    "predict": ["predict", "--ckpt_path", "{C}", "--images", "{C}", "--out", "p.csv"],
    "calibrate": ["calibrate", "--ckpt_path", "{C}", "--goal.cost", "0.5"],
    "fit": ["fit", "-c", TINY, "--ckpt_path", "{C}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_a_checkpoint(command, content, mark, capsys, monkeypatch):
    monkeypatch.chdir(mark.parent)
    path = mark.parent / "evil.ckpt"
    torch.save({**content, "callbacks": {"x": Code(mark)}}, path)
    line = refused([arg.replace("{C}", str(path)) for arg in COMMANDS[command]], capsys)
    assert "evil.ckpt is not a readable checkpoint: it holds more than numbers, text and tensors" in line


def test_code_in_a_resumed_checkpoint(content, mark, capsys):
    run = mark.parent / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(Path(TINY).read_text())
    torch.save({**content, "callbacks": Code(mark)}, run / "checkpoints" / "last.ckpt")
    assert "last.ckpt" in refused(["fit", "--resume", str(run)], capsys)


def test_code_in_a_checkpoint_from_python(content, mark):
    path = mark.parent / "evil.ckpt"
    torch.save({**content, "hyper_parameters": Code(mark)}, path)
    with pytest.raises(ValueError, match="holds more than numbers, text and tensors"):
        ExitClassifier.load_from_checkpoint(path)


def test_code_in_weights(mark, capsys):
    path = mark.parent / "evil.pth"
    torch.save({"state_dict": Code(mark)}, path)
    line = refused(["fit", "-c", TINY, "--trainer.fast_dev_run=true", f"--model.weights={path}"], capsys)
    assert "needs code to load" in line


def named(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


@pytest.mark.parametrize(
    "where", ["adapter", "heads", "backbone_args", "lr_schedule", "weights", "data", "preprocessing"]
)
@pytest.mark.parametrize("what", ["os.mkdir", "evil_module.Data"])
def test_class_named_by_a_checkpoint(what, where, content, mark, capsys, monkeypatch):
    """No module is imported for it."""
    (mark.parent / "evil_module.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Data: pass\n")
    monkeypatch.syspath_prepend(mark.parent)
    evil = named(what, path=str(mark))
    held = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    if where in ("data", "preprocessing"):
        held["dynadapter"][where] = evil
    else:
        held["hyper_parameters"][where] = evil
    held["hyper_parameters"] |= {"_instantiator": "os.mkdir", "_class_path": "os.mkdir"}
    path = mark.parent / "evil.ckpt"
    torch.save(held, path)
    line = refused(["test", "--ckpt_path", str(path)], capsys)
    words = {
        "adapter": f"adapter: there is no Adapters {what!r}",
        "heads": f"heads: there is no Heads {what!r}",
        "lr_schedule": f"lr_schedule: there is no Schedule {what!r}",
        "backbone_args": "the argument 'class_path', which is none of the architecture's",
        "weights": "weights: ",
        "data": "data is missing",
        "preprocessing": f"it names the class {what!r}",
    }
    assert words[where] in line


# ---- a hostile config

LAUGHTER = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 10)}]}}\n" for k in range(1, 12))


def as_text(key: str, content: str) -> str:
    """Return a config whose key holds YAML as a text, which jsonargparse reads as YAML again."""
    return yaml.safe_dump({"model": {key: content}})


CONFIGS = {
    "adapter": "model: {adapter: {class_path: os.mkdir, init_args: {path: MARK}}}",
    "backbone_args": "model: {backbone_args: {depth: {class_path: os.mkdir, init_args: {path: MARK}}}}",
    "optimizer": "model: {optimizer: {class_path: os.mkdir, init_args: {path: MARK}}}",
    "optimizer as a program": "model: {optimizer: {class_path: subprocess.Popen, init_args: {args: [mkdir, MARK]}}}",
    "schedule": "model: {lr_schedule: {class_path: os.mkdir, init_args: {path: MARK}}}",
    "policies": "early_exit: {policies: [{class_path: os.mkdir, init_args: {path: MARK}}]}",
    "a hook": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {setup: os.system}}]}",
    "a hook with arguments": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {setup: "
    "{class_path: os.mkdir, init_args: {path: MARK}}}}]}",
    "callback": "trainer: {callbacks: [{class_path: os.mkdir, init_args: {path: MARK}}]}",
    "logger": "trainer: {logger: {class_path: os.mkdir, init_args: {path: MARK}}}",
    "profiler": "trainer: {profiler: {class_path: os.mkdir, init_args: {path: MARK}}}",
    "plugins": "trainer: {plugins: [{class_path: os.mkdir, init_args: {path: MARK}}]}",
    "strategy": "trainer: {strategy: {class_path: DDPStrategy, init_args: {ddp_comm_hook: os.system}}}",
    "data": "data: {class_path: os.mkdir, init_args: {path: MARK}}",
    "a tag of Python": "model: !!python/object/apply:os.mkdir [MARK]",
    "a tag inside": "model: {backbone: !!python/object/apply:os.mkdir [MARK]}",
    "laughter": LAUGHTER,
    "laughter in a text": as_text("backbone_args", LAUGHTER),
    "laughter in a text in a text": as_text("backbone_args", yaml.safe_dump({"depth": LAUGHTER})),
    "laughter in a list": as_text("exit_depths", LAUGHTER.replace("a11: &a11 ", "").replace("x", "1")),
    "merges": MERGES,
    "merges in a text": as_text("backbone_args", MERGES),
    "a file as a section": "model: {F}/laughter.yaml",
    "a file as a class": "model: {adapter: {F}/laughter.yaml}",
    "a pipe as a section": "model: {F}/pipe",
    "a pipe as a class": "model: {adapter: {F}/pipe}",
    "a pipe as an argument": "early_exit: {policies: {F}/pipe}",
    "too long": "model: " + "x" * 2**21,
    "a list as a key": "? [a]\n: b",
    "a torch function as a hook": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {setup: "
    "torch.hub.load_state_dict_from_url}}]}",
    "a torch function": "model: {optimizer: torch.hub.load}",
    "a communication hook": "trainer: {strategy: {class_path: DDPStrategy, init_args: {ddp_comm_hook: "
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook}}}",
    "a circle": "model: &m {backbone_args: *m}",
    "depth": "model: " + "[" * 5000,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_hostile_config(kind, mark, capsys):
    path = mark.parent / "evil.yaml"
    path.write_text(CONFIGS[kind].replace("MARK", str(mark)).replace("{F}", str(mark.parent)))
    (mark.parent / "laughter.yaml").write_text(LAUGHTER)
    os.mkfifo(mark.parent / "pipe")  # nobody ever writes there
    start = time.perf_counter()
    refused(["fit", "-c", TINY, "-c", str(path), "--trainer.fast_dev_run=true"], capsys)
    assert time.perf_counter() - start < 60


def test_config_with_usual_classes_passes(mark, capsys):
    path = mark.parent / "good.yaml"
    path.write_text(
        "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}, lr_schedule: Cosine}\n"
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/acc}}], logger: "
        "{class_path: CSVLogger, init_args: {save_dir: x}}}\n"
    )
    assert "torch.optim.SGD" in printed(["fit", "-c", TINY, "-c", path, "--print_config"], capsys)


def test_config_may_name_transforms():
    for name in ("RandomHorizontalFlip", "RandAugment"):
        check_config({"class_path": f"torchvision.transforms.v2.{name}", "init_args": {}}, "data.transform")
    for wrong in (
        os.mkdir,
        torch.hub.load,
        LambdaCallback,
        {"class_path": "lightning.pytorch.callbacks.LambdaCallback"},
    ):
        with pytest.raises(Mistake, match="cannot be"):
            check_config({"hook": wrong})


# ---- the current folder


@pytest.mark.parametrize("command", ["predict", "sweep"])
def test_helpers_import_nothing_from_here(command, mark, monkeypatch):
    """The folder of the images can hold a file with the name of a module."""
    (mark.parent / "yaml.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.chdir(mark.parent)
    if command == "predict":
        with helpers(Namespace(engine="local", processes=2), ["--help"]):
            pass
    else:
        with pytest.raises(Failed):  # there is no such sweep
            spread("missing.yaml", 1)


# ---- pipes and devices

PLACES = {
    "config": ["fit", "-c", "{F}"],
    "checkpoint": ["test", "--ckpt_path", "{F}"],
    "checkpoint of a prediction": ["predict", "--ckpt_path", "{F}", "--images", "{F}", "--out", "p.csv"],
    "weights": ["fit", "-c", TINY, "--model.weights={F}", "--trainer.fast_dev_run=true"],
    "sweep": ["sweep", "{F}"],
    "list": ["predict", "--bundle", "{B}", "--images", "{F}.txt", "--out", "p.csv"],
    "table": ["predict", "--bundle", "{B}", "--images", "{F}.csv", "--out", "p.csv"],
    "bundle": ["predict", "--bundle", "{P}", "--images", "{F}.csv", "--out", "p.csv"],
    "run": ["fit", "--resume", "{R}"],
    "section": ["fit", "-c", TINY, "--model", "{F}"],
}


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize("place", PLACES)
def test_no_pipe_or_device_is_read(place, kind, tmp_path, capsys, monkeypatch):
    def make(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/zero")

    monkeypatch.chdir(tmp_path)
    for name in (
        "f",
        "f.txt",
        "f.csv",
        "p/config.json",
        "p/model.safetensors",
        "r/checkpoints/last.ckpt",
        "r/run.json",
    ):
        make(tmp_path / name)
    (tmp_path / "r" / "config.yaml").write_text(Path(TINY).read_text())
    (tmp_path / "b").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "b" / name).write_text("{}")
    places = {"{F}": tmp_path / "f", "{B}": tmp_path / "b", "{P}": tmp_path / "p", "{R}": tmp_path / "r"}
    args = PLACES[place]
    for mark, path in places.items():
        args = [arg.replace(mark, str(path)) for arg in args]
    start = time.perf_counter()
    refused(args, capsys)
    assert time.perf_counter() - start < 30


# ---- a hostile list


def task(folder: Path, line: str) -> Path:
    (folder / "set" / "task" / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    Image.new("RGB", (4, 4)).save(folder / "set" / "task" / "images" / "0.png")
    for name in lists.LISTS:
        (folder / "set" / "task" / name).write_text(f"images/0.png 0\n{line}\n")
    return folder / "set"


@pytest.mark.parametrize(
    "path",
    [
        "../../secret.png",
        "images/../../../secret.png",
        "{F}/secret.png",
        "C:\\secret.png",
        "..\\..\\secret.png",
        "a\0b",
    ],
)
def test_list_leaves_folder(path, tmp_path, capsys):
    root = task(tmp_path, f"{path.replace('{F}', str(tmp_path))} 1")
    with pytest.raises(ValueError, match=r"leaves the folder of the images|is not 'PATH LABEL'"):
        VTAB1k(root, "task")
    args = ["verify", "--data", "VTAB1k", "--data.root", root, "--data.task", "task"]
    assert ".txt:2: " in refused(args, capsys)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("what", ["the image", "its folder"])
def test_list_leaves_folder_by_a_link(what, skip, tmp_path):
    root = task(tmp_path, "more/secret.png 1")
    if what == "its folder":
        (root / "task" / "more").symlink_to(tmp_path)
    else:
        (root / "task" / "more").mkdir()
        (root / "task" / "more" / "secret.png").symlink_to(tmp_path / "secret.png")
    data = VTAB1k(root, "task", on_error="skip" if skip else "raise")
    with pytest.raises(ValueError, match=r":2: image more/secret.png leads out of .*, to .*secret.png;"):
        data.samples("train")
    assert VTAB1k(root.parent / "set", "task").samples  # a root that is given by way of a link is another matter
    (tmp_path / "link").symlink_to(root)
    (root / "task" / "more").rename(tmp_path / "away")
    (root / "task" / "train800.txt").write_text("images/0.png 0\n")
    assert len(VTAB1k(tmp_path / "link", "task").samples("train")) == 1


def test_list_too_long(tmp_path, monkeypatch):
    root = task(tmp_path, "images/0.png 0\n" * 100)
    monkeypatch.setattr(lists, "MAX_LIST", 1000)
    with pytest.raises(ValueError, match="has more than 1,000 bytes, too many for a list"):
        VTAB1k(root, "task")
    (root / "task" / "test.txt").unlink()
    os.mkfifo(root / "task" / "test.txt")  # nobody ever writes there
    monkeypatch.undo()
    assert "test.txt" not in VTAB1k(root, "task").lists


# ---- a hostile image


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header claims so many pixels, and that holds nearly none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + parts + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def eps(mark: Path) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n" + f"({mark}) (w) file\n".encode()


IMAGES: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "more pixels than memory": ("a.png", lambda mark: png(60_000, 60_000), "decompression bomb"),
    "a side without end": ("a.png", lambda mark: png(2**31 - 1, 1), "decompression bomb"),
    "text without end": (
        "a.png",
        lambda mark: png(9, 9, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))),
        "too large",
    ),
    "a program": ("a.png", eps, "not an image of a known format"),
    "a pickle": ("a.jpg", lambda mark: b"\x80\x04c__main__\nCode\n.", "not an image of a known format"),
    "a program by name": ("a.tif", lambda mark: b"#!/bin/sh\nmkdir mark\n", "not an image of a known format"),
    "a table that leads round": (
        "a.tif",
        lambda mark: b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\x01\0\0\0\x09\0\0\0\x08\0\0\0",
        "a.tif",
    ),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_hostile_image(kind, mark, capsys):
    name, make, words = IMAGES[kind]
    folder = mark.parent / "set" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(make(mark))
    Image.new("RGB", (4, 4)).save(folder / "good.png")
    with pytest.raises(UnreadableImage, match=words):
        load_image(folder / name)
    data = ImageFolder(mark.parent / "set", val_fraction=0, on_error="skip")
    with pytest.warns(UserWarning, match=rf"skipped 1 unreadable image\(s\): .*{name}"):
        assert len(data.dataset("train")) == 1
    with pytest.raises(SystemExit) as ending:
        main(["verify", "--data", "ImageFolder", "--data.root", str(mark.parent / "set")])
    assert ending.value.code == 1
    assert ": 1 image cannot be read" in capsys.readouterr().out
