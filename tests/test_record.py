"""``run.json``: settings, versions, data and results of a run, and how it ended."""

import json
import math
import shutil
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import TINY, refused
from PIL import Image

from dynadapter.cli import main, record
from dynadapter.data import ImageFolder, Shapes
from dynadapter.training.module import ExitClassifier

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    arguments = ["--seed_everything=7", "--trainer.accumulate_grad_batches=2", "--test_after=true", "--sparsity=null"]
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={root}", *arguments])
    return root / "version_0"


@pytest.fixture(scope="module")
def content(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_record_of_start_and_end(run: Path, content: dict[str, Any]) -> None:
    assert content["command"] == "fit"
    assert content["command_line"].startswith(f"dynadapter fit -c {TINY} --trainer.default_root_dir={run.parent} ")
    assert (content["how"], content["message"], content["resumed_from"], content["seed"]) == ("finished", None, None, 7)
    started, ended = (datetime.fromisoformat(content[key]) for key in ("started", "ended"))
    assert started <= ended
    assert started.tzinfo is not None
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == 7


def test_record_of_versions_and_trainer(run: Path, content: dict[str, Any]) -> None:
    for package in ("torch", "lightning", "timm", "dynadapter"):
        assert content["packages"][package] == version(package)
    held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["dynadapter"]
    assert content["backbone"] == {"name": held["backbone"], "hash": held["backbone_hash"]}
    assert len(held["backbone_hash"]) == 64
    assert content["trainer"] | {"precision": ""} == {
        "accelerator": "cpu",
        "strategy": "SingleDeviceStrategy",
        "processes": 1,
        "precision": "",
        "deterministic": False,
        "accumulate_grad_batches": 2,
        "global_batch_size": 96,
    }
    assert content["protocol"]["selection"] == "last epoch"
    assert content["protocol"]["preprocessing"]["normalization"] == "half"
    assert content["machine"]["cores"] >= 1


def test_record_of_data_by_split(content: dict[str, Any]) -> None:
    data, splits = Shapes(image_size=32, normalization="half"), content["data"]["splits"]
    assert set(splits) == {"train", "val", "test"}
    assert len({split["hash"] for split in splits.values()}) == 3
    for name, split in splits.items():
        assert split == record.described(data, name)
        assert split["images"] == len(data.dataset(name)) == sum(split["classes"].values())
    assert content["data"]["class_names"] == data.class_names


def test_record_results_hold_metrics_only(content: dict[str, Any]) -> None:
    names = set(content["results"])
    assert names >= {"train/loss", "val/acc", "val/ece_exit1", "test/acc", "test/confidence_0.9/share_exit3"}
    assert not any(name.startswith(("exit_weights/", "sparsity/", "epoch", "step")) for name in names)


def test_record_of_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    step = ExitClassifier.training_step

    def fails(self: ExitClassifier, *args: Any) -> Any:
        if self.global_step == 1:
            raise ValueError("the disk\nsays no")
        return step(self, *args)

    monkeypatch.setattr(ExitClassifier, "training_step", fails)
    args = ["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", "--checkpoint.every_n_train_steps=1"]
    line = refused(args, capsys)
    held = json.loads((tmp_path / "version_0" / "run.json").read_text())
    assert held["how"] == "failed"
    assert "the disk says no" in held["message"]
    assert held["message"] in line


def test_data_hash_independent_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / "one" / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), (k, 0, 0)).save(tmp_path / "one" / split / name / "a.png")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    one, other = (record.described(ImageFolder(tmp_path / root), "train") for root in ("one", "other"))
    assert one == other == {"images": 2, "classes": {"cat": 1, "dog": 1}, "hash": one["hash"]}
    Image.new("RGB", (9, 9), (2, 0, 0)).save(tmp_path / "other" / "train" / "cat" / "a.png")
    assert record.described(ImageFolder(tmp_path / "other"), "train")["hash"] != one["hash"]
    monkeypatch.setattr("dynadapter.data.identity.HASHED_BYTES", 100)  # it would take too long
    assert record.described(ImageFolder(tmp_path / "one"), "train")["hash"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *own, *args], capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert record.git_state() is None
    git("init", "-q")
    assert record.git_state() is None  # without a commit
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-qm", "one")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "untracked").write_text("")
    assert record.git_state() == clean
    (tmp_path / "a.py").write_text("2")
    assert record.git_state() == clean | {"dirty": True}
    marker = tmp_path / "ran"
    git("config", "core.fsmonitor", f"touch {marker}")
    record.git_state()
    assert not marker.exists()  # a repository's own program
    (tmp_path / ".gitattributes").write_text("a.py filter=x\n")
    for setting in ("filter.x.clean", "filter.x.process"):
        git("config", setting, f"touch {marker}; cat")
        assert record.git_state() == clean | {"dirty": None}
        assert not marker.exists()
        git("config", "--unset", setting)
    assert record.git_state() == clean | {"dirty": True}
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "global"))
    git("config", "--global", "filter.x.clean", "cat")  # the user's own program, such as that of git-lfs
    assert record.git_state() == clean | {"dirty": True}
    for key, value in (("promisor", "true"), ("url", "ssh://host/repository")):
        git("config", f"remote.origin.{key}", value)
    for key, value in (("core.repositoryformatversion", "1"), ("extensions.partialClone", "origin")):
        git("config", key, value)
    git("config", "core.sshCommand", f"touch {marker}; false")
    tree = git("rev-parse", "HEAD^{tree}")
    (tmp_path / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    assert record.git_state() == clean | {"dirty": None}
    assert not marker.exists()  # it would fetch the missing object
    monkeypatch.setenv("PATH", "")
    assert record.git_state() is None


def test_plain_is_strict_json() -> None:
    value = {1: (math.inf, math.nan, 1.5), "path": Path("a"), "flags": [True, None]}
    text = json.dumps(record.plain(value), allow_nan=False)
    assert json.loads(text) == {"1": ["inf", "nan", 1.5], "path": "a", "flags": [True, None]}


def test_selection_of_a_test_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    place = f"--trainer.default_root_dir={tmp_path}"
    more = ["--checkpoint.monitor=val/loss_exit1", "--trainer.max_epochs=2"]
    main(["fit", "-c", TINY, place, *more])
    saved = tmp_path / "version_0" / "checkpoints"

    def selection(folder: Path) -> str:
        found: str = json.loads((folder / "run.json").read_text())["protocol"]["selection"]
        return found

    assert selection(tmp_path / "version_0") == "last epoch"  # which the results of the fit are of
    cases = (("best", "best val/loss_exit1 when it was saved"), ("last", "last epoch"))
    for number, (name, words) in enumerate(cases):
        main(["test", f"--ckpt_path={saved / name}.ckpt", place])
        assert selection(tmp_path / f"test_{number}") == words
