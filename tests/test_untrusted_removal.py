"""A resumed training removes nothing outside its checkpoint folder, whatever checkpoint and config name."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import TINY, refused
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import loader, make_classifier, trainer

from dynadapter.cli import main
from dynadapter.cli.safety import check_run
from dynadapter.training.checkpoints import AtomicCheckpointIO, RunCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is not a file of this training's checkpoint folder"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

# The path of a file or folder of somebody else, as a hostile checkpoint can name it
KINDS: dict[str, Callable[[Path, Path], str]] = {
    "absolute": lambda ours, theirs: str(theirs / "kept.ckpt"),
    "absolute folder": lambda ours, theirs: str(theirs),
    "relative": lambda ours, theirs: "theirs/kept.ckpt",
    "parent": lambda ours, theirs: f"{ours}/../theirs/kept.ckpt",
    "parent folder": lambda ours, theirs: f"{ours}/../theirs",
    "local": lambda ours, theirs: f"local://{theirs}/kept.ckpt",
    "local folder": lambda ours, theirs: f"local://{theirs}",
    "file": lambda ours, theirs: f"file://{theirs}/kept.ckpt",
    "cached": lambda ours, theirs: f"dir::file://{theirs}/kept.ckpt",
    "linked folder": lambda ours, theirs: f"{ours}/link/kept.ckpt",
    "a link": lambda ours, theirs: f"{ours}/link",
    "a linked file": lambda ours, theirs: f"{ours}/linked.ckpt",
    "inner folder": lambda ours, theirs: f"{ours}/inner",
    "the folder itself": lambda ours, theirs: f"{ours}",
    "dot": lambda ours, theirs: f"{ours}/.",
}
FIELDS = ("best_model_path", "kth_best_model_path", "last_model_path")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a checkpoint after one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    saver = ModelCheckpoint(dirpath=folder, monitor="train/loss", save_top_k=1, save_last=True)
    trainer(saver, max_epochs=1, enable_checkpointing=True).fit(make_classifier(), loader(1))
    held: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return held


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A checkpoint folder, and a folder of somebody else that it has links to."""
    monkeypatch.chdir(tmp_path)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    (ours / "inner").mkdir(parents=True)
    (theirs / "deep").mkdir(parents=True)
    for file in (ours / "inner" / "kept.ckpt", theirs / "kept.ckpt", theirs / "deep" / "note.txt"):
        file.write_text("precious")
    (ours / "link").symlink_to(theirs)
    (ours / "linked.ckpt").symlink_to(theirs / "kept.ckpt")
    return ours, theirs


@pytest.mark.parametrize(
    ("kind", "saver"),
    [*((kind, ModelCheckpoint) for kind in KINDS), ("parent", RunCheckpoint), ("local", RunCheckpoint)],
)
def test_resume_removes_nothing_else(kind, saver, trained, places):
    ours, theirs = places
    before = contents(theirs) | contents(ours / "inner")
    path = KINDS[kind](ours, theirs)
    callback = saver(dirpath=ours, monitor="train/loss", mode="max", save_top_k=1, save_last=True)
    state = dict.fromkeys(FIELDS, path) | {"dirpath": str(ours), "best_k_models": {path: torch.tensor(-1e9)}}
    state |= {"best_model_score": torch.tensor(-1e9), "kth_value": torch.tensor(-1e9), "current_score": None}
    held = {**trained, "callbacks": {callback.state_key: state}}
    torch.save(held, ours / "evil.ckpt")
    training = trainer(callback, max_epochs=2, enable_checkpointing=True)
    training.fit(make_classifier(), loader(1), ckpt_path=ours / "evil.ckpt")
    assert contents(theirs) | contents(ours / "inner") == before
    assert training.global_step == 2
    assert len([path for path in ours.glob("*.ckpt") if not path.is_symlink()]) >= 2  # evil.ckpt and a new one


def test_own_files_are_removed(tmp_path):
    """The reference of the table above: without an attack the training removes what it replaced."""
    saver = RunCheckpoint(dirpath=tmp_path, monitor="step", mode="max", save_top_k=1)
    trainer(saver, max_epochs=3, enable_checkpointing=True).fit(make_classifier(), loader(1))
    assert [path.name for path in tmp_path.iterdir()] == [Path(saver.best_model_path).name]


def test_link_to_a_partial_file(tmp_path):
    """An unfinished file of a killed process can be a link to another place."""
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "ours").mkdir()
    for name in ("last.ckpt.partial", "last.ckpt"):
        (tmp_path / "ours" / name).symlink_to(tmp_path / "theirs")
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "ours" / "last.ckpt")
    assert (tmp_path / "theirs").read_text() == "precious"
    assert not (tmp_path / "ours" / "last.ckpt").is_symlink()


# ---- a run folder of somebody else


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch, of two that were planned."""
    root = tmp_path_factory.mktemp("runs")
    args = ["--trainer.max_epochs=2", "--checkpoint.monitor=val/acc", "--checkpoint.mode=max"]
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={root}", *args])
    return root / "version_0"


def evil_run(run: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a run as if it was interrupted, and change its config."""
    copy = tmp_path / "foreign" / "version_0"
    (copy / "checkpoints").mkdir(parents=True)
    content = yaml.safe_load((run / "config.yaml").read_text())
    edit(content)
    (copy / "config.yaml").write_text(yaml.safe_dump(content))
    (copy / "checkpoints" / "last.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    return copy


def named(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


def callback(class_path: str, **arguments: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda c: c["trainer"].update(callbacks=[named(class_path, **arguments)])


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "folder": (
        lambda c: c["checkpoint"].update(dirpath="foreign/version_0/checkpoints"),
        "dirpath is 'foreign/version_0/",
    ),
    "name": (lambda c: c["checkpoint"].update(filename="../../theirs/kept"), "filename is '../../theirs/kept'"),
    "another saver": (callback("ModelCheckpoint", dirpath="theirs"), "dirpath is 'theirs'"),
    "saver by path": (callback("lightning.pytorch.callbacks.ModelCheckpoint", filename="/x"), "filename is '/x'"),
    "logger": (lambda c: c["trainer"].update(logger=named("CSVLogger", save_dir=".")), "class_path is 'CSVLogger'"),
    "logger by name": (lambda c: c["trainer"].update(logger="CSVLogger"), "logger is 'CSVLogger'"),
    "address": (lambda c: c["trainer"].update(profiler=named("PyTorchProfiler", dirpath="x")), "class_path is 'PyT"),
    "class of the folder": (callback("foreign.payload.Evil"), "class_path is 'foreign.payload.Evil'"),
    "bare class": (lambda c: c["trainer"].update(callbacks=["foreign.payload.Evil"]), "is 'foreign.payload.Evil'"),
    "class in a text": (
        lambda c: c["model"].update(adapter="{class_path: foreign.payload.Evil}"),
        "class_path is 'foreign.payload.Evil'",
    ),
    "class by a dotted key": (lambda c: c.update({"model.adapter": "LoRA"}), "fit does not write configs of this form"),
    "section in a text": (lambda c: c.update(model="{backbone: micro}"), "fit does not write configs of this form"),
    "function": (callback("LambdaCallback", setup="os.getcwd"), "class_path is 'LambdaCallback'"),
    "workers": (lambda c: c["data"]["init_args"].update(num_workers=10**6), "num_workers=1000000"),
    "workers in a text": (lambda c: c["data"]["init_args"].update(num_workers="1000000"), "num_workers='1000000'"),
    "workers in hex": (lambda c: c["data"]["init_args"].update(num_workers="0x3e8"), "num_workers='0x3e8'"),
    "workers of a part": (
        lambda c: c["data"]["init_args"].update(splits={"train": {"size": 10**9}}),
        "size=1000000000",
    ),
    "module in a text": (lambda c: c["model"].update(lr_schedule="antigravity.fly"), "is 'antigravity.fly'"),
    "images": (lambda c: c["data"]["init_args"].update(train_images=10**9), "train_images=1000000000"),
    "hub": (lambda c: c["model"].update(backbone="hf-hub:a/b"), "the backbone 'hf-hub:a/b'"),
    "weights": (lambda c: c["model"]["backbone_args"].update(checkpoint_path="x"), "the argument 'checkpoint_path'"),
}


HARMLESS: dict[str, dict[str, Any]] = {
    "large seeds": {"split_seed": 20240101, "shots_seed": 2**40, "seed": 2**40, "max_skipped": 10**9},
    "numbers as names": {"root": "20261129", "test_sets": {"winter": "20261129"}, "label_column": "20261129"},
    "names like modules": {"file": "antigravity.csv", "root": "antigravity.d", "test_sets": {"a": "antigravity.csv"}},
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_usual_settings_of_data_pass(kind):
    """A training with them can be continued and measured."""
    content = {
        "data": named("dynadapter.ImageTable", **HARMLESS[kind]),
        "model": {"weights": "antigravity.pth"},
        "trainer": {"default_root_dir": "antigravity.runs"},
        "ckpt_path": "antigravity.ckpt",
    }
    check_run(Path("config.yaml"), content, (), ())
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", EDITS)
def test_hostile_run_is_refused(kind, run, tmp_path, monkeypatch, capsys):
    edit, words = EDITS[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder = evil_run(run, tmp_path, edit)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kept.ckpt").write_text("precious")
    (tmp_path / "foreign" / "payload.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    before = contents(tmp_path)
    line = refused(["fit", "--resume", folder], capsys)
    assert line.startswith(f"dynadapter: error: {folder / 'config.yaml'} cannot be used as it is: ")
    assert words in line
    assert contents(tmp_path) == before
    assert not (tmp_path / "mark").exists()


def test_lock_of_another_folder_stays(run, tmp_path, capsys):
    lock = tmp_path / ".kept.lock"
    lock.write_text("precious")
    folder = evil_run(run, tmp_path, lambda c: c["checkpoint"].update(dirpath=str(tmp_path / "kept")))
    refused(["fit", "--resume", folder], capsys)
    assert lock.read_text() == "precious"


def test_named_config_is_trusted(run, tmp_path, capsys):
    """What the user names by -c may write where it says."""
    there = tmp_path / "elsewhere"
    folder = evil_run(run, tmp_path, lambda c: c["trainer"].update(logger=named("CSVLogger", save_dir=str(there))))
    main(["fit", "--resume", str(folder), "-c", str(folder / "config.yaml"), "--trainer.max_epochs=3"])
    assert list(there.rglob("metrics.csv"))


def test_foreign_run_removes_nothing(run, tmp_path, monkeypatch):
    folder = evil_run(run, tmp_path, lambda c: None)
    monkeypatch.chdir(tmp_path)
    ours, theirs = folder / "checkpoints", folder / "theirs"
    theirs.mkdir()
    (theirs / "kept.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    path = KINDS["parent"](ours, theirs)
    held = torch.load(ours / "last.ckpt", weights_only=True)
    (key,) = (key for key in held["callbacks"] if key.startswith("ModelCheckpoint"))
    held["callbacks"][key] |= dict.fromkeys(FIELDS, path) | {"best_k_models": {path: torch.tensor(-1.0)}}
    torch.save(held, ours / "last.ckpt")
    before = contents(theirs)
    for more in ([], [f"--checkpoint.dirpath={ours}"]):
        main(["fit", "--resume", str(folder), "--trainer.max_epochs=4", *more])
        assert contents(theirs) == before
