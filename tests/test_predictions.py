"""PredictionWriter: every image once, in order, in a file that is whole or missing."""

import csv
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TinyModule, make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynadapter.data import ImagesToPredict
from dynadapter.exits.policies import Confidence
from dynadapter.training.callbacks import EarlyExit, PredictionWriter
from dynadapter.training.callbacks.predictions import interleaved

NAMES = ["apple, green", 'a "pear"', "plum", "été", "5"]


class Images(Dataset):
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), self.files[i]


def batches(*files: str) -> DataLoader:
    return DataLoader(Images(list(files) or [f"{i}.png" for i in range(11)]), batch_size=4)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_every_image_once_and_in_order(tmp_path: Path) -> None:
    module = make_classifier(class_names=NAMES).eval()
    with torch.no_grad():
        for head in module.net.heads:  # logits with some spread
            head.get_submodule(list(dict(head.named_modules()))[-1]).weight.mul_(20)
        logits = torch.stack([module.net(Images(["?"] * 11)[i][0][None]) for i in range(11)])[:, :, 0]
    confidences = logits.softmax(-1).amax(-1)
    threshold = float(confidences[:, 0].sort().values[5:7].mean())
    writer = PredictionWriter(tmp_path / "new" / "out.csv")
    got = trainer(writer, EarlyExit([Confidence(threshold)])).predict(module, batches())
    assert len(got) == 3
    rows = read(tmp_path / "new" / "out.csv")
    exits = [0 if float(c[0]) >= threshold else 1 if float(c[1]) >= threshold else 2 for c in confidences]
    assert 0 < exits.count(0) < 11
    assert [row["file"] for row in rows] == [f"{i}.png" for i in range(11)]
    assert [row["exit"] for row in rows] == [str(k + 1) for k in exits]
    assert [row["class"] for row in rows] == [NAMES[int(logits[i, k].argmax())] for i, k in enumerate(exits)]
    for i, row in enumerate(rows):
        assert float(row["confidence"]) == pytest.approx(float(confidences[i, exits[i]]), abs=1e-4)
    assert list(rows[0]) == ["file", "class", "confidence", "exit"]
    assert writer.rows == 11
    assert os.listdir(tmp_path / "new") == ["out.csv"]


def test_file_names_that_are_hard(tmp_path: Path) -> None:
    hard = ["a, b.png", 'say "hi".png', "two\nlines.png", "日本.png", os.fsdecode(b"caf\xe9.png"), " space.png "]
    trainer(PredictionWriter(tmp_path / "out.csv")).predict(make_classifier(class_names=NAMES), batches(*hard))
    assert [row["file"] for row in read(tmp_path / "out.csv")] == hard
    assert b"caf\xe9.png" in (tmp_path / "out.csv").read_bytes()


def test_folder_of_images(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.png", "b/1.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 7, np.uint8)).save(tmp_path / "in" / name)
    data = ImagesToPredict(NAMES, str(tmp_path / "in"), image_size=32, batch_size=2)
    trainer(PredictionWriter(tmp_path / "out.csv")).predict(make_classifier(class_names=NAMES), datamodule=data)
    assert [row["file"] for row in read(tmp_path / "out.csv")] == [
        str(tmp_path / "in" / name) for name in ("a.png", "b/1.jpg", "b/2.png")
    ]


def test_without_output_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = PredictionWriter(None)
    run = trainer(writer)
    for _ in range(2):
        run.predict(make_classifier(), batches())
        assert writer.rows == 11
    assert os.listdir(tmp_path) == []


def test_nonfinite_logits_raise(tmp_path: Path) -> None:
    module = make_classifier()
    with torch.no_grad():
        module.net.backbone.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"logits of a batch with 'a.png' are not finite"):
        trainer(PredictionWriter(tmp_path / "out.csv")).predict(module, batches("a.png"))
    assert not (tmp_path / "out.csv").exists()


# ---- nothing is lost, nothing is half


def test_existing_file_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"out.csv exists; give another name, or overwrite it") as error:
        PredictionWriter(out)
    assert "\n" not in str(error.value)
    out.unlink()

    class Untouched(Images):
        def __getitem__(self, i: int) -> Any:
            raise AssertionError("something was read")

    writer = PredictionWriter(out)
    out.write_text("mine")  # came later
    with pytest.raises(ValueError, match="exists"):
        trainer(writer).predict(make_classifier(), DataLoader(Untouched(["a"])))
    assert out.read_text() == "mine"
    trainer(PredictionWriter(out, overwrite=True)).predict(make_classifier(), batches())
    assert len(read(out)) == 11


class Fails(Images):
    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        if i == 9:
            raise OSError("the disk is gone")
        return super().__getitem__(i)


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("old")
    writer = PredictionWriter(out, overwrite=True)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(writer).predict(make_classifier(), DataLoader(Fails(["x.png"] * 11), batch_size=4))
    assert out.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.csv"]
    trainer(writer).predict(make_classifier(), batches())  # again, and well
    assert len(read(out)) == 11


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_formats(suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    trainer(PredictionWriter(tmp_path / f"out{suffix}")).predict(make_classifier(), batches())
    assert (tmp_path / f"out{suffix}").stat().st_size > 0


# ---- mistakes


class Silent(TinyModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"files": [], "exit_index": torch.zeros(0)}


def test_step_that_returns_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"return a mapping with files, classes, .* got files, exit_index") as error:
        trainer(PredictionWriter(tmp_path / "out.csv")).predict(Silent(), batches())
    assert "\n" not in str(error.value)


# ---- several processes (test_distributed.py holds that they write the same bytes)


def test_rows_follow_the_images() -> None:
    for processes in (1, 2, 3, 5):
        for count in range(11):
            parts = [[[str(i)] for i in range(rank, count, processes)] for rank in range(processes)]
            assert list(interleaved(parts)) == [[str(i)] for i in range(count)]


@pytest.mark.parametrize("parts", [[1, 2], [3, 1], [2, 2, 3], [2, 1, 2]])
def test_rows_that_are_not_in_turn(parts: list[int]) -> None:
    with pytest.raises(ValueError, match="have not predicted every image once, in turn; give images by a") as error:
        list(interleaved([[["x"]] * rows for rows in parts]))
    assert "\n" not in str(error.value)


def test_padding_is_not_written(tmp_path: Path) -> None:
    trainer(PredictionWriter(tmp_path / "out.csv")).predict(make_classifier(), batches("a", "b", "", "c", ""))
    assert [row["file"] for row in read(tmp_path / "out.csv")] == ["a", "b", "c"]
