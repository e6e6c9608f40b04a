"""Checkpoints and folders on a file system that is mounted read-only."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynadapter import files
from dynadapter.cli import calibrate
from dynadapter.cli.errors import Mistake
from dynadapter.cli.runs import next_folder
from dynadapter.training.checkpoints import newest


def read_only(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))


def test_lock_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_lock_file", read_only)
    with files.locked(tmp_path / "checkpoints"):
        assert newest(tmp_path / "checkpoints") is None


def test_run_folder_names_its_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", read_only)
    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(
            ValueError, match=r"^trainer\.default_root_dir=.* cannot be written: Read-only file system;"
        ):
            next_folder(root, "test")


def test_calibration_beside_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"x")
    write = files.write
    monkeypatch.setattr(
        calibrate, "write", lambda path, data: (read_only if path.parent.name == "run" else write)(path, data)
    )
    model: Any = SimpleNamespace(class_names=["a"], backbone_name="b", backbone_hash="c")
    settings: Any = SimpleNamespace(ckpt_path=str(tmp_path / "run" / "last.ckpt"))
    calibrate._write(tmp_path, {}, model, settings)
    assert f"give predict and test --policy_from {tmp_path}" in capsys.readouterr().out
    assert (tmp_path / "calibration.json").is_file()


def test_calibrate_measures_nothing_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    trainer: Any = SimpleNamespace(world_size=1, default_root_dir=str(tmp_path / "new"))
    settings: Any = SimpleNamespace(merge=False, out=None, bundle=None)
    with pytest.raises(Mistake, match="give another folder by --out FOLDER"):
        calibrate.calibrate(trainer, None, None, settings)  # type: ignore[arg-type]
