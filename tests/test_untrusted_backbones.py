"""A checkpoint or a bundle names timm's own architectures with plain arguments of limited size, and nothing else."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import VIT
from saved import fitted, logits, read
from tiny import loader, make_classifier, trainer

import dynadapter
from dynadapter import Never, create_backbone
from dynadapter.adapters import LoRA
from dynadapter.cli import main
from dynadapter.data.shapes import CLASSES
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle import bundle_from_classifier
from dynadapter.training.checkpoints import AtomicCheckpointIO
from dynadapter.training.module import ExitClassifier
from dynadapter.training.restoring import load_classifier

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
ONE_LINE = r"\A[^\n]+\Z"


def shapes_classifier() -> ExitClassifier:
    return make_classifier(num_classes=len(CLASSES), class_names=list(CLASSES))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and beside it a bundle."""
    folder = tmp_path_factory.mktemp("saved")
    module = shapes_classifier()
    fitted(module, folder / "good.ckpt")
    bundle_from_classifier(module, folder / "bundle", policy=Never(), preprocessing=Preprocess(32), costs=None)
    return folder


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where timm builds a model, or a socket is opened."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"reached with {args} {kwargs}")

    monkeypatch.setattr(timm, "create_model", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)


def changed_checkpoint(saved: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    held = read(saved / "good.ckpt")
    edit(held)
    torch.save(held, tmp_path / "evil.ckpt")
    return tmp_path / "evil.ckpt"


def changed_bundle(saved: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    content = json.loads((saved / "bundle" / "config.json").read_text())
    content.pop("checksum")
    edit(content)
    (folder / "model.safetensors").write_bytes((saved / "bundle" / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def command(*args: str) -> None:
    with pytest.raises(SystemExit) as ending:
        main(list(args))
    raise ValueError(f"exit code {ending.value.code}")


def loaded(path: Path, commands: tuple[str, ...] = ("test",)) -> None:
    """Load a checkpoint or a bundle in every way, each of which must refuse it in one line."""
    if path.is_dir():
        ways = [lambda: dynadapter.load(path)]
    else:
        ways = [
            lambda: ExitClassifier.load_from_checkpoint(path),
            lambda: load_classifier(path),
            *(lambda name=name: command(name, "--ckpt_path", str(path)) for name in commands),
        ]
    for way in ways:
        with pytest.raises(ValueError, match=ONE_LINE) as error:
            way()
        assert str(error.value) != "exit code 1"


NAMES: dict[str, Any] = {
    "a folder": "local-dir:/etc",
    "the hub": "hf-hub:owner/name",
    "the hub, as it was written": "hf_hub:owner/name",
    "a path": "../vit_tiny_patch16_224",
    "an address": "http://localhost/vit",
    "a slash": "timm/vit_tiny_patch16_224.augreg_in21k",
    "a line": "vit_tiny_patch16_224\nhf-hub:a/b",
    "none": None,
    "a list": ["hf-hub:owner/name"],
    "long": "v" * 10**6,
}


@pytest.mark.parametrize("kind", NAMES)
def test_foreign_backbone_is_refused(kind, saved, tmp_path, sealed):
    path = changed_checkpoint(saved, tmp_path, lambda c: c["hyper_parameters"].update(backbone=NAMES[kind]))
    loaded(path, ("test", "calibrate"))
    loaded(changed_bundle(saved, tmp_path, lambda c: c["backbone"].update(name=NAMES[kind])))


ARGUMENTS: dict[str, dict[str, Any]] = {
    "a pickle": {"checkpoint_path": "evil.pth"},
    "a configuration": {"pretrained_cfg": {"file": "evil.pth"}},
    "an address": {"pretrained_cfg": {"url": "http://localhost/evil.pth"}},
    "a repository": {"pretrained_cfg": {"hf_hub_id": "owner/name"}},
    "a name of one": {"pretrained_cfg": "hf-hub:owner/name"},
    "an overlay": {"pretrained_cfg_overlay": {"file": "evil.pth"}},
    "a cache": {"cache_dir": "/tmp"},
    "weights": {"pretrained": True},
    "features": {"features_only": True},
    "scripting": {"scriptable": True},
    "classes": {"num_classes": 7},
    "a class": {"norm_layer": {"class_path": "os.mkdir"}},
    "a function": {"act_layer": "os.system"},
    "a layer": {"block_fn": "timm.layers.Mlp"},
    "a pooling": {"global_pool": "../map"},
    "deep": {"depth": 10**6},
    "wide": {"embed_dim": 10**9},
    "pixels": {"img_size": 10**6},
    "two sides": {"img_size": [32, 10**6]},
    "stages": {"depths": [10**6, 1]},
    "many stages": {"depths": [1] * 10**5},
    "a nested list": {"depths": [[1]]},
    "channels": {"in_chans": 10**7},
    "below zero": {"depth": -1},
    "a ratio": {"mlp_ratio": 1e12},
    "no number": {"mlp_ratio": float("nan")},
    "infinite": {"drop_rate": float("inf")},
    "a digit string": {"depth": "3"},
    "true depth": {"depth": True},
    "a number as a switch": {"qkv_bias": 1},
    "a long word": {"global_pool": "a" * 10**6},
    "another key": {3: 4},
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_foreign_arguments_are_refused(kind, saved, tmp_path, sealed):
    more = ARGUMENTS[kind]
    loaded(changed_checkpoint(saved, tmp_path, lambda c: c["hyper_parameters"]["backbone_args"].update(more)))
    loaded(changed_bundle(saved, tmp_path, lambda c: c["backbone"]["timm_args"].update(more)))


def shared(levels: int) -> list[Any]:
    """Ten references to ten references ...: a few bytes in a pickle."""
    part: list[Any] = []
    for _ in range(levels):
        part = [part] * 10
    return part


def unchecked(spec: Any, **fields: Any) -> Any:
    """An object as a hostile pickle holds it: its fields were never checked."""
    spec = object.__new__(type(spec))
    spec.__dict__.update(fields)
    return spec


SETTINGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "classes": lambda c: c["dynadapter"].update(class_names=[str(k) for k in range(100_001)]),
    "classes counted": lambda c: c["hyper_parameters"].update(num_classes=10**9),
    "references": lambda c: c["hyper_parameters"].update(exit_depths=shared(12)),
    "references in the data": lambda c: c["dynadapter"].update(data={"class_path": "x", "init_args": shared(12)}),
    "references in an object": lambda c: c["hyper_parameters"].update(adapter=unchecked(LoRA(), targets=shared(12))),
    "nested": lambda c: c["hyper_parameters"].update(exit_depths=json.loads("[" * 90 + "]" * 90)),
    "rank": lambda c: c["hyper_parameters"].update(adapter=unchecked(LoRA(), **(vars(LoRA()) | {"rank": 10**9}))),
    "a text": lambda c: c["hyper_parameters"].update(adapter=unchecked(LoRA(), **(vars(LoRA()) | {"scale": "1"}))),
    "hidden": lambda c: c["hyper_parameters"].update(heads={"class_path": "MLPHeads", "init_args": {"hidden": 10**9}}),
    "an optimizer": lambda c: c["hyper_parameters"].update(optimizer="torch.hub.load"),
    "no mapping": lambda c: c.update(hyper_parameters=[1]),
    "depth": lambda c: c["hyper_parameters"].update(depth=10**6),
    "exits": lambda c: c["hyper_parameters"].update(exit_depths=list(range(201_000))),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_sizes_in_a_checkpoint_are_bounded(kind, saved, tmp_path):
    loaded(changed_checkpoint(saved, tmp_path, SETTINGS[kind]))


BUNDLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "classes": lambda c: c.update(class_names=[str(k) for k in range(10**6)], num_classes=10**6),
    "fewer classes": lambda c: c.update(class_names=[str(k) for k in range(150_000)], num_classes=150_000),
    "rank": lambda c: c["adapter"]["init_args"].update(rank=10**9),
    "nested": lambda c: c.update(measured=json.loads('{"a":' * 400 + "1" + "}" * 400)),
    "depth": lambda c: c["backbone"].update(depth=10**6),
    "pixels": lambda c: c["preprocessing"].update(image_size=10**6),
    "pixels of the backbone": lambda c: c["backbone"].update(image_size=10**6, timm_args={}),
    "much": lambda c: c.update(measured={str(k): k for k in range(210_000)}),
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_sizes_in_a_bundle_are_bounded(kind, saved, tmp_path):
    loaded(changed_bundle(saved, tmp_path, BUNDLES[kind]))


def test_too_large_for_this_machine(monkeypatch):
    """Each argument is allowed, and together they take 300 GB; nothing of it is ever reserved."""
    large = {"depth": 24, "embed_dim": 16384, "num_heads": 8}
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**22}[name])  # 17 GB
    with pytest.raises(ValueError, match=r"takes 3\d\d\.\d GB, this machine has 17\.2 GB; give smaller sizes"):
        create_backbone("vit_tiny_patch16_224", 5, **large)


# ---- what the user says is trusted


def test_user_wins_over_the_checkpoint(saved, tmp_path):
    evil = {"backbone": "hf-hub:owner/name", "backbone_args": {"checkpoint_path": "evil.pth"}}
    path = changed_checkpoint(saved, tmp_path, lambda c: c["hyper_parameters"].update(evil))
    good = {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT}
    again = ExitClassifier.load_from_checkpoint(path, **good)
    assert torch.equal(logits(again), logits(ExitClassifier.load_from_checkpoint(saved / "good.ckpt")))
    args = [f"--model.{name}={json.dumps(value) if name == 'backbone_args' else value}" for name, value in good.items()]
    main(["flops", "--ckpt_path", str(path), "--data=Shapes", "--data.image_size=32", *args])


def test_own_places_give_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}')
    for name in ("local-dir:/nowhere", "hf-hub:"):
        with pytest.raises(ValueError, match=ONE_LINE):
            create_backbone(name, 5)
    assert create_backbone(f"local-dir:{tmp_path}", 5, **VIT).num_classes == 5


# ---- remote places

PLACES = (
    "http://localhost:1/a.ckpt",
    "https://localhost:1/a.ckpt",
    "HTTP://localhost:1/a.ckpt",
    "s3://bucket/a.ckpt",
    "hf://owner/name/a.ckpt",
    "ftp://localhost/a.ckpt",
    "memory://a.ckpt",
    "simplecache::http://localhost:1/a.ckpt",
    "file:///tmp/a.ckpt",
    "registry:owner/name",
)


@pytest.mark.parametrize("place", PLACES)
def test_remote_checkpoint_is_refused(place, sealed, capsys):
    with pytest.raises(ValueError, match="is not a local file; fetch it first"):
        ExitClassifier.load_from_checkpoint(place)
    with pytest.raises(ValueError, match="is not a local file; fetch it first"):
        load_classifier(place)
    with pytest.raises(SystemExit, match="2"):
        main(["test", "--ckpt_path", place])


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("place", PLACES[::3])
def test_trainer_refuses_remote_checkpoints(place, method, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a request"))
    with pytest.raises(ValueError, match="is not a local file; fetch it first"):
        getattr(trainer(), method)(make_classifier(), loader(1), ckpt_path=place)


def test_flag_allows_a_remote_checkpoint(saved):
    place = "memory://remote/a.ckpt"
    files = AtomicCheckpointIO(remote=True)
    files.save_checkpoint(read(saved / "good.ckpt"), place)
    trainer(plugins=[files]).validate(shapes_classifier(), loader(1), ckpt_path=place, verbose=False)


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_no_code_from_a_checkpoint(method, saved, tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "mark",)

    path = tmp_path / "evil.ckpt"
    torch.save({**read(saved / "good.ckpt"), "more": Evil()}, path)
    for weights_only in (None, False):
        with pytest.raises(ValueError, match=r"holds more than numbers|weights_only=False would run"):
            getattr(trainer(), method)(make_classifier(), loader(1), ckpt_path=path, weights_only=weights_only)
    assert not (tmp_path / "mark").exists()
