"""Files that are cheap to make and expensive to load: sparse, packed, or one number that repeats without end."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VIT, make_vit, raises_one_line
from saved import fitted, read
from tiny import make_classifier

import dynadapter
from dynadapter import Attentive, MLPHeads, Never, create_backbone
from dynadapter.backbones.weight_files import require_stored
from dynadapter.files import read_whole, require_room, sha256
from dynadapter.serve.bundle import bundle_from_classifier
from dynadapter.training.checkpoints import AtomicCheckpointIO
from dynadapter.training.module import ExitClassifier
from dynadapter.training.restoring import load_classifier

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
LARGE = 30 * 10**6
"""Bytes; the machine of these tests has fewer."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a bundle beside it, and the weights of its backbone."""
    folder, module = tmp_path_factory.mktemp("saved"), make_classifier()
    fitted(module, folder / "good.ckpt")
    bundle_from_classifier(module, folder / "bundle", policy=Never(), preprocessing={}, costs=None)
    torch.save(make_vit().state_dict(), folder / "good.pth")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with little memory."""
    monkeypatch.setattr("dynadapter.files.machine_memory", lambda: 2 * 10**7)


def with_weights(path: Path) -> Any:
    return create_backbone("vit_tiny_patch16_224", 5, weights=path, **VIT)


def sparse(path: Path) -> Path:
    os.truncate(path, LARGE)
    return path


def packed(path: Path) -> Path:
    """Add zeros that take nearly no place in the file."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/zeros", bytes(LARGE))
    assert path.stat().st_size < LARGE / 10
    return path


def packed_arrays(path: Path) -> Path:
    path = path.with_suffix(".npz")
    np.savez_compressed(path, **{"Transformer/encoderblock_0/LayerNorm_0/scale": np.zeros(LARGE, np.uint8)})
    return path


def load_open(path: Path) -> ExitClassifier:
    with path.open("rb") as file:
        return ExitClassifier.load_from_checkpoint(file)


LOADS: dict[str, tuple[str, Callable[[Path], Path], Callable[[Path], Any]]] = {
    "checkpoint": ("good.ckpt", sparse, load_classifier),
    "checkpoint in Python": ("good.ckpt", sparse, ExitClassifier.load_from_checkpoint),
    "open checkpoint": ("good.ckpt", sparse, load_open),
    "checkpoint in a training": ("good.ckpt", sparse, AtomicCheckpointIO().load_checkpoint),
    "weights": ("good.pth", sparse, with_weights),
    "packed weights": ("good.pth", packed, with_weights),
    "packed arrays": ("good.pth", packed_arrays, with_weights),
}


@pytest.mark.parametrize("kind", LOADS)
def test_large_file_is_not_loaded(kind, saved, tmp_path, small):
    name, grow, load = LOADS[kind]
    path = Path(shutil.copy(saved / name, tmp_path))
    load(path)  # as it was
    path = grow(path)
    with raises_one_line(ValueError, match=r"loading .* takes .* GB, this machine has .* GB; the file is damaged"):
        load(path)


def test_large_bundle_is_not_loaded(saved, tmp_path, small):
    """Also one that is what its own configuration says."""
    place = shutil.copytree(saved / "bundle", tmp_path / "bundle")
    dynadapter.load(place)
    model, config = sparse(place / "model.safetensors"), place / "config.json"
    content = json.loads(config.read_text()) | {"sha256": sha256(model), "checksum": None}
    config.write_text(json.dumps(content))
    with raises_one_line(ValueError, match=r"loading .*model\.safetensors takes 0\.1 GB, this machine has 0\.0 GB"):
        dynadapter.load(place)


def test_large_graph_is_not_loaded(tmp_path, small):
    pytest.importorskip("onnx")
    from written_folder import write_folder

    from dynadapter.serve.runtime.manifest import read_manifest

    place = write_folder(tmp_path / "exported", {"kind": "Confidence", "threshold": 0.9})
    read_manifest(place)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["stages"][1]["sha256"] = sha256(sparse(place / "stage1.onnx"))
    (place / "manifest.json").write_text(json.dumps(manifest | {"checksum": None}))
    with raises_one_line(ValueError, match="loading .*exported takes 0.1 GB, this machine has 0.0 GB"):
        read_manifest(place)


def endless(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(*shape)


ENDLESS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "trained": lambda c: c["state_dict"].update({next(iter(c["state_dict"])): endless(10**6, 10**6)}),
    "images": lambda c: c["dynadapter"]["images"].update(train=torch.zeros(1, dtype=torch.int64).expand(10**12)),
    "in a list": lambda c: c.update(loops=[{"a": (endless(10**12),)}]),
    "without elements": lambda c: c.update(more=torch.empty(10**12, device="meta")),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_repeated_number_in_a_checkpoint(kind, saved, tmp_path):
    held, path = read(saved / "good.ckpt"), tmp_path / "evil.ckpt"
    ENDLESS[kind](held)
    torch.save(held, path)
    assert path.stat().st_size < 10**6
    for load in (load_classifier, ExitClassifier.load_from_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with raises_one_line(ValueError, match="evil.ckpt holds a tensor .* that is not stored whole"):
            load(path)
    with path.open("rb") as file, raises_one_line(ValueError, match="the checkpoint holds a tensor"):
        ExitClassifier.load_from_checkpoint(file)
    with raises_one_line(ValueError, match="holds a tensor"):
        AtomicCheckpointIO(remote=True).load_checkpoint(f"file://{path}")


def test_repeated_number_in_weights(tmp_path):
    torch.save(make_vit().state_dict() | {"pos_embed": endless(1, 10**9, 64)}, tmp_path / "evil.pth")
    with raises_one_line(ValueError, match=r"evil\.pth' holds a tensor \(1, 1000000000, 64\) that is not stored whole"):
        with_weights(tmp_path / "evil.pth")


def test_a_list_in_itself(saved, tmp_path):
    """A pickle can hold one; the search for tensors ends."""
    held, inner = read(saved / "good.ckpt"), list[Any]()
    inner.append(inner)
    torch.save(held | {"more": inner}, tmp_path / "a.ckpt")
    loaded = load_classifier(tmp_path / "a.ckpt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in held["state_dict"].items())


def written(kind: str, **settings: int) -> dict[str, Any]:
    return {"class_path": f"dynadapter.{kind}", "init_args": settings}


SIZES: list[tuple[dict[str, Any], str]] = [
    ({"heads": written("Attentive", queries=2_000_000)}, "queries=2000000 must be .* at most 64"),
    ({"adapter": written("FacT", rank=1024)}, "rank=1024 must be .* at most 256"),
    (
        {
            "heads": written("Attentive", queries=64),
            "whole": True,
            "num_classes": 10**5,
            "class_names": [*map(str, range(10**5))],
        },
        r"safetensors: its adapters and heads would have more than [\d,]+ numbers, and the file holds [\d,]+; the file",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SIZES, ids=["queries", "rank", "classes"])
def test_settings_beyond_the_tensors_of_a_bundle(changes, message, saved, tmp_path):
    place = shutil.copytree(saved / "bundle", tmp_path / "bundle")
    config = place / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes | {"checksum": None}))
    with raises_one_line(ValueError, match=message):
        dynadapter.load(place)


def test_settings_beyond_the_tensors_of_a_checkpoint(saved, tmp_path):
    held, path = read(saved / "good.ckpt"), tmp_path / "evil.ckpt"
    names = [*map(str, range(10**5))]
    held["dynadapter"]["class_names"] = names
    held["hyper_parameters"] |= {"num_classes": 10**5, "heads": Attentive(queries=64)}
    torch.save(held, path)
    for load in (load_classifier, ExitClassifier.load_from_checkpoint, load_open):
        with raises_one_line(ValueError, match="its adapters and heads would have more than .*; the file is damaged"):
            load(path)


def test_network_beyond_the_machine(monkeypatch):
    make_classifier(heads=MLPHeads(hidden=4096))
    monkeypatch.setattr("dynadapter.backbones.limited.machine_memory", lambda: 10**6)
    with raises_one_line(ValueError, match=r"take more than 0\.0 GB, this machine has 0\.0 GB; give smaller sizes"):
        make_classifier(heads=MLPHeads(hidden=4096))


def test_views_and_empty_tensors_are_stored():
    whole = torch.arange(12.0).view(3, 4)
    require_stored([whole, whole.t(), whole[1:, ::2], whole[:0], torch.tensor(1), torch.nn.Parameter(whole)], "a")
    with pytest.raises(ValueError, match="a holds a tensor"):
        require_stored([torch.zeros(9, 9).to_sparse()], "a")


def test_room_is_that_of_the_machine(tmp_path, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    require_room("a", 4_096_000)
    require_room("a", 1_365_333, copies=3)
    for size, copies in ((4_096_001, 1), (1_365_334, 3)):
        with pytest.raises(ValueError, match="loading a takes"):
            require_room("a", size, copies)
    (tmp_path / "a").write_bytes(b"content")
    assert read_whole(tmp_path / "a") == b"content"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe"):
        read_whole(tmp_path / "pipe")
