"""Bundles: the same network comes back, or an error of one line; whole folders or none."""

import copy
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CLASSES, CONVNEXT, SWIN, VIT, raises_one_line
from PIL import Image
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import dynadapter
from dynadapter import files as folder
from dynadapter.adapters import Adapter, AdapterLayer, AdapterSpec, LoRA, RepAdapter, adapter_layers, inject
from dynadapter.backbones import create_backbone, fingerprint
from dynadapter.calibrate import Calibrated, Outcome
from dynadapter.cost import exit_costs
from dynadapter.exits.heads import Balanced, Heads, LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Never, Patience, Policy, confidence, route
from dynadapter.exits.temperature import Scaled
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import load_image
from dynadapter.serve.bundle import (
    BackboneSource,
    Bundle,
    bundle_from_classifier,
    load,
    merged_copy,
    reading,
    save_bundle,
)
from dynadapter.spec import kinds, plain


def test_message_names_the_bundle_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bundle").mkdir()
    with raises_one_line(ValueError, match=r"^bundle has no config\.json: it is not a bundle"):
        load("./bundle")


SOURCES: dict[str, tuple[str, dict]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "convnext": ("convnext_tiny", CONVNEXT),
}


NAMES = [f"class {k}" for k in range(CLASSES)]
POLICY = Scaled(Confidence((0.5, 0.6)), (1.5, 1.0, 0.7))
PREPROCESS = Preprocess(32)


def spec_for(kind: type[AdapterSpec] | None, family: str) -> AdapterSpec | None:
    if kind is None:
        return None
    attention = kind in (LoRA, RepAdapter)
    return kind(scale=0.7, **({"targets": ("*.mlp.fc1",)} if attention and family == "convnext" else {}))


@cache
def made(family: str, kind: type[AdapterSpec] | None = LoRA, seed: int = 0) -> tuple[ExitNet, BackboneSource]:
    """A network with exits after blocks 2, 4 and 6, as after training: nothing that is trained is at its start."""
    name, arguments = SOURCES[family]
    backbone = create_backbone(name, CLASSES, seed=seed, **arguments)
    source = BackboneSource(name, fingerprint(backbone), "seed", arguments, seed=seed)
    spec = spec_for(kind, family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if spec is not None:
            inject(backbone, spec)
        net = ExitNet(backbone, Balanced(), every=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in net.parameters() if p.requires_grad):
            p += torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p.shape[1] ** -0.5)
    return net.eval(), source


def save(place: Path, family: str = "vit", kind: type[AdapterSpec] | None = LoRA, **changes) -> tuple[ExitNet, Path]:
    net, source = made(family, kind)
    parts = {"backbone": source, "adapter": spec_for(kind, family), "heads": Balanced(), "policy": POLICY}
    parts |= {"class_names": NAMES, "preprocessing": PREPROCESS} | changes
    return net, save_bundle(parts.pop("net", net), place, **parts)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bundles") / "original")[1]


@pytest.fixture
def whole(original: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "whole"))


def edited(place: Path, *path: str, value: object = ..., text: str | None = None) -> Path:
    """Changes one entry of config.json on purpose, or takes it out."""
    file = place / "config.json"
    config = json.loads(file.read_text())
    config.pop("checksum", None)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.write_text(json.dumps(config))
    return place


def retensored(place: Path, **changes: Tensor | None) -> Path:
    """Changes tensors of the file, whose hash in config.json follows."""
    tensors = safetensors.torch.load_file(place / "model.safetensors") | changes
    data = safetensors.torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None})
    return rewritten(place, data)


def rewritten(place: Path, data: bytes) -> Path:
    (place / "model.safetensors").write_bytes(data)
    return edited(place, "sha256", value=hashlib.sha256(data).hexdigest())


def same(bundle: Bundle, net: ExitNet, images: Tensor, equal: Callable[[Tensor, Tensor], bool] = torch.equal) -> None:
    with torch.no_grad():
        expected = net(images)
        assert equal(bundle.net(images), expected)
        assert not torch.equal(expected[0], expected[1])
        for policy in (bundle.policy, Confidence(0.3), Patience(2), Never()):
            for ours, theirs in zip(bundle.net.early(images, policy), net.early(images, policy), strict=True):
                assert equal(ours, theirs)


# ---- the same network comes back


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("vit", kind) for kind in [None, *kinds(AdapterSpec)]), *itertools.product(["swin", "convnext"], [None, LoRA])],
)
def test_same_network_bit_for_bit(family, kind, images, tmp_path):
    before = torch.random.get_rng_state()
    net, place = save(tmp_path / "new" / "bundle", family, kind)
    bundle = load(place)
    assert torch.equal(torch.random.get_rng_state(), before)
    # before 2.14, torch computes a convolution with loaded weights in another order
    close = kind is not None and kind.__name__ == "Convpass" and TorchVersion(torch.__version__) < "2.14"
    same(bundle, net, images, partial(torch.allclose, atol=1e-5) if close else torch.equal)
    assert bundle.policy == POLICY
    assert bundle.class_names == tuple(NAMES)
    assert bundle.preprocess == PREPROCESS
    assert bundle.config.adapter == spec_for(kind, family)
    assert bundle.config.heads == Balanced()
    assert not bundle.net.training
    assert not any(p.requires_grad for p in bundle.net.parameters())
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_file_holds_what_was_trained(tmp_path):
    net, place = save(tmp_path / "b")
    stored = safetensors.torch.load_file(place / "model.safetensors")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert set(stored) == trained
    assert place.joinpath("model.safetensors").stat().st_size < 1.2 * 4 * sum(t.numel() for t in stored.values()) + 4000


def test_whole_bundle_needs_no_backbone(tmp_path, images):
    source = replace(made("vit", Adapter)[1], origin="file", file="backbone.safetensors")
    net, place = save(tmp_path / "b", kind=Adapter, whole=True, backbone=source)
    assert set(safetensors.torch.load_file(place / "model.safetensors")) == set(net.state_dict())
    same(load(place), net, images)
    with pytest.raises(ValueError, match="a backbone of its own; leave weights and pretrained out"):
        load(place, weights="backbone.safetensors")


def test_backbone_from_a_file(tmp_path, images):
    """The weights are those of seed 3, and the bundle is told that they came from a file."""
    net, source = made("vit", seed=3)
    name, arguments = SOURCES["vit"]
    right, wrong = tmp_path / "right.safetensors", tmp_path / "wrong.safetensors"
    safetensors.torch.save_file(create_backbone(name, CLASSES, seed=3, **arguments).state_dict(), right)
    safetensors.torch.save_file(create_backbone(name, CLASSES, seed=4, **arguments).state_dict(), wrong)
    source = replace(source, origin="file", seed=0, file="right.safetensors")
    place = save(tmp_path / "b", net=net, backbone=source)[1]
    same(load(place, right), net, images)
    same(load(place, weights=str(right)), net, images)
    found = fingerprint(create_backbone(name, CLASSES, seed=4, **arguments))
    with pytest.raises(
        ValueError, match=f"{source.fingerprint[:12]}, these are {found[:12]}; give the weights of the tr"
    ):
        load(place, wrong)
    with pytest.raises(ValueError, match=r"needs the weights of its backbone .*\(right.safetensors in the training\)"):
        load(place)
    with pytest.raises(ValueError, match="is not a file"):
        load(place, tmp_path / "nowhere.pth")


def test_pretrained_unless_forbidden(tmp_path, images, monkeypatch):
    net, source = made("vit")
    place = save(tmp_path / "b", backbone=replace(source, origin="pretrained"))[1]
    asked = []

    def create(self, num_classes, *, pretrained=False, weights=None):
        asked.append(pretrained)
        return create_backbone(self.name, num_classes, **self.timm_args)

    monkeypatch.setattr(BackboneSource, "create", create)
    same(load(place), net, images)
    assert asked == [True]
    with pytest.raises(ValueError, match="needs the weights"):
        load(place, pretrained=False)


def test_changed_config_is_refused(whole):
    file = whole / "config.json"
    text = file.read_text()
    for old, new in (('"merged": false', '"merged": true'), ("vit_tiny", "vit_tinx"), ("0.", "1.")):
        changed = text.replace(old, new, 1)
        assert changed != text
        file.write_text(changed)
        with pytest.raises(ValueError, match="is not as it was written: the bundle is damaged"):
            load(whole)
    file.write_text(json.dumps(json.loads(text), sort_keys=True))  # another layout says the same
    load(whole)


def test_seed_that_draws_other_numbers(whole):
    edited(whole, "backbone", "seed", value=7)
    edited(whole, "versions", "torch", value="2.10.0")
    with pytest.raises(ValueError, match=r"drawn from a seed, by torch 2\.10\.0 then and by torch \S+ now"):
        load(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype, tmp_path, images):
    net = copy.deepcopy(made("vit")[0]).to(dtype)
    bundle = load(save(tmp_path / "b", net=net)[1])
    assert {p.dtype for p in bundle.net.parameters()} == {dtype}
    same(bundle, net, images.to(dtype))
    half = copy.deepcopy(made("vit")[0])
    for p in half.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)
    # adapters and heads in float32 on another backbone: that does not run, but it comes back
    assert {name: t.dtype for name, t in load_unchecked(half, tmp_path).items()} == {
        name: t.dtype for name, t in half.state_dict().items()
    }


def load_unchecked(net: ExitNet, place: Path) -> dict[str, Tensor]:
    from dynadapter.serve.bundle import saving

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "check_rebuilt", lambda *_: None)
        return load(save(place / "unchecked", net=net)[1]).net.state_dict()


def test_trained_backbone_tensors_are_saved(tmp_path, images):
    net = copy.deepcopy(made("vit")[0])
    net.backbone.norm.requires_grad_(True)
    with torch.no_grad():
        net.backbone.norm.weight += 0.1
    place = save(tmp_path / "b", net=net)[1]
    assert "backbone.norm.weight" in safetensors.torch.load_file(place / "model.safetensors")
    same(load(place), net, images)


def test_given_network_does_not_change(tmp_path):
    net = copy.deepcopy(made("vit")[0]).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    save(tmp_path / "b", net=net)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(
        p.requires_grad for layer in adapter_layers(net.backbone).values() for p in layer.parameters(recurse=False)
    )


def test_loaded_network_is_saved_again(whole, tmp_path, images):
    bundle, policy = load(whole), Patience(2)
    config = bundle.config
    place = save_bundle(
        bundle.net,
        tmp_path / "again",
        backbone=config.backbone,
        adapter=config.adapter,
        heads=config.heads,
        policy=policy,
        class_names=config.class_names,
    )
    again = load(place)
    same(again, bundle.net, images)
    assert again.policy == policy
    assert again.preprocess is None
    assert (place / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


NEW_PROCESS = """
import sys
import torch
from dynadapter.serve.bundle import load
from dynadapter.spec import Spec
def names(base):
    return {base.__name__}.union(*map(names, base.__subclasses__()))
there = names(Spec)
assert len(load(sys.argv[1]).predict(torch.zeros(2, 3, 32, 32))) == 2
assert "lightning" not in sys.modules
print(*there)
"""


def test_loading_in_a_new_process(whole):
    """Without Lightning, and a file names heads, policies and adapters by classes that come with the reader."""
    done = subprocess.run([sys.executable, "-c", NEW_PROCESS, str(whole)], capture_output=True, text=True, check=True)
    for name in dynadapter.__all__:  # loads all of the package
        getattr(dynadapter, name)
    for base in (Heads, Policy, AdapterSpec):
        kinds = {kind.__name__ for kind in subclasses(base) if kind.__module__.startswith("dynadapter.")}
        assert kinds <= set(done.stdout.split())


def subclasses(base: type) -> set[type]:
    return {base}.union(*map(subclasses, base.__subclasses__()))


# ---- what does not belong together is not written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": LoRA(scale=0.8)}, "logits differ"),
        ({"adapter": LoRA(scale=0.7, rank=4)}, "in another shape"),
        ({"adapter": RepAdapter()}, "lacks .* and has unknown"),
        ({"adapter": None}, "has unknown"),
        ({"heads": Balanced(pooling="mean")}, "logits differ"),
        ({"heads": LinearHeads()}, "lacks"),
        ({"class_names": NAMES[:-1]}, "4 class names for 5 classes"),
        ({"policy": Confidence((0.5,))}, "threshold has 1 value, this network has 2 early exits"),
        ({"policy": Scaled(Never(), (1.0, 2.0))}, "temperatures has 2 values, this network has 3 exits"),
        ({"preprocessing": {"image_size": 64}}, "images of 64 pixels, the backbone was built for 32"),
        ({"preprocessing": {"image_size": 32, "resise": "crop"}}, "preprocessing: Preprocess has no 'resise'"),
        ({"measured": 0.9}, "must be a mapping"),
        ({"measured": {"accuracy": object()}}, "cannot be written as JSON"),
        ({"merged": True}, "still has adapters"),
    ],
)
def test_parts_that_do_not_fit(changes, message, tmp_path):
    with raises_one_line(ValueError, match=message):
        save(tmp_path / "b", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 64}, "not the one that seed 0 draws"),
        ({"fingerprint": "0" * 64, "origin": "file"}, "the bundle would name 000000000000"),
        ({"timm_args": SOURCES["vit"][1] | {"depth": 7}, "origin": "file"}, "backbone has 7 blocks"),
        ({"timm_args": SOURCES["vit"][1] | {"num_heads": 4}, "origin": "file"}, "logits differ"),
        ({"timm_args": SOURCES["vit"][1] | {"qkv_bias": False}, "origin": "file"}, "qkv.base_layer.bias differs"),
        ({"timm_args": SOURCES["vit"][1] | {"norm_layer": nn.LayerNorm}}, "config.json cannot be written: .*LayerNorm"),
        ({"name": "local-dir:/some/where"}, "is none of timm's own, and a bundle may name no other"),
    ],
)
def test_another_backbone_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "b", backbone=replace(made("vit")[1], **changes))
    assert not list(tmp_path.iterdir())


def test_changed_backbone_is_refused(tmp_path, images):
    net = copy.deepcopy(made("vit")[0])
    with torch.no_grad():
        net.backbone.blocks[0].norm1.weight[0] += 1e-3
    with pytest.raises(ValueError, match="its frozen tensors have changed"):
        save(tmp_path / "b", net=net)
    same(load(save(tmp_path / "b", net=net, whole=True)[1]), net, images)


def test_nonfinite_tensors(tmp_path):
    net = copy.deepcopy(made("vit")[0])
    with torch.no_grad():
        net.heads[1].classify.bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold NaN or infinity \(heads.1.classify.bias\)"):
        save(tmp_path / "b", net=net)
    place = save(tmp_path / "b", net=net, check_finite=False)[1]
    with pytest.raises(ValueError, match=r"model.safetensors: 1 of \d+ tensors hold NaN"):
        load(place)
    bundle = load(place, check_finite=False)
    x, policy = torch.randn(3, 3, 32, 32), Confidence((1.0, 0.0))
    assert bundle.route(x, policy).exit_index.tolist() == [2, 2, 2]  # no image exits early with such logits
    with torch.no_grad():
        bundle.net.backbone.head.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="3 of 3 images have logits that are not finite"):
        bundle.predict(x, policy=Never())


# ---- merging with proof


@pytest.mark.parametrize("kind", [None, LoRA, RepAdapter])
@pytest.mark.parametrize("family", SOURCES)
def test_merged_bundle_equals_to_rounding(family, kind, images, tmp_path):
    net = made(family, kind)[0]
    before = copy.deepcopy(net.state_dict())
    merged, proof = merged_copy(net, images, POLICY)
    assert not adapter_layers(merged.backbone)
    assert proof.images == len(images)
    assert proof.difference < 1e-5
    assert proof.policy == POLICY.name
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    place = save(tmp_path / "b", family, kind, net=merged, merged=True, proof=proof)[1]
    bundle = load(place)
    same(bundle, merged, images)
    assert bundle.config.proof == proof
    with torch.no_grad():
        old, new = net(images), bundle.net(images)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    assert torch.equal(route(POLICY, new), route(POLICY, old))
    card = (place / "README.md").read_text()
    assert f"compared with the unmerged one on {len(images)} images" in card


def test_merge_that_differs_is_refused(images):
    net = made("vit")[0]
    with pytest.raises(ValueError, match="more than tolerance=1e-12"):
        merged_copy(net, images, POLICY, tolerance=1e-12)
    with pytest.raises(
        ValueError, match="Adapter cannot be merged into the backbone; the kinds that can: BitFit, DoRA, FacT, LoRA, "
    ):
        merged_copy(made("vit", Adapter)[0], images, POLICY)
    with pytest.raises(ValueError, match=r"shape \(0, 3, 32, 32\); give some of the task's"):
        merged_copy(net, images[:0], POLICY)
    with pytest.raises(ValueError, match="threshold has 1 value"):
        merged_copy(net, images, Confidence((0.5,)))
    with pytest.raises(ValueError, match="logits of exit 1 by nan"):
        merged_copy(net, images * torch.nan, POLICY)


def test_merge_is_compared_at_every_exit(images, monkeypatch):
    """A merge that passes layer by layer, and yet moves the network: played by a merge that goes wrong."""
    net = made("vit")[0]
    monkeypatch.setattr(ExitNet, "merge", lambda self, tolerance: self.heads[1].classify.bias.data[0].add_(0.5))
    with pytest.raises(ValueError, match="changes the logits of exit 2"):
        merged_copy(net, images, POLICY)
    with torch.no_grad():
        edge = confidence(net(images)[1])[2].item()  # exactly this image's score
    index = int(net(images)[1, 2].argmax())
    monkeypatch.setattr(ExitNet, "merge", lambda self, tolerance: self.heads[1].classify.bias.data[index].sub_(1e-4))
    with pytest.raises(
        ValueError, match=r"exit or class of 1 of 4 images under confidence_1_.* \(the first is image 2\)"
    ):
        merged_copy(net, images, Confidence((1.0, edge)), tolerance=1e-2)


# ---- whole or not at all

KILLER = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("folder", sys.argv[1])
folder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(folder)
from pathlib import Path
left = int(sys.argv[3])
def deadly(function):
    def call(*args, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return function(*args, **options)
    return call
for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
    setattr(os, name, deadly(getattr(os, name)))
if sys.argv[4] == "two steps":
    folder._exchange = lambda *_: False
else:
    folder._exchange = deadly(folder._exchange)
files = {"model.safetensors": b"new" * 1000, "README.md": b"new", "config.json": b'{"library": "dynadapter"}'}
folder.write_folder(Path(sys.argv[2]), files)
"""


@pytest.mark.parametrize("way", ["nothing there", "exchange", "two steps"])
def test_folder_is_whole_after_any_kill(way, tmp_path):
    if way == "exchange" and not sys.platform.startswith("linux"):
        pytest.skip("exchanging two folders in one step is asked of Linux alone")
    old = {"model.safetensors": b"old", "README.md": b"old", "config.json": b"{}"}
    new = {"model.safetensors": b"new" * 1000, "README.md": b"new", "config.json": b'{"library": "dynadapter"}'}
    for deaths in range(40):
        target = tmp_path / f"try{deaths}" / "bundle"
        target.parent.mkdir()
        if way != "nothing there":
            target.mkdir()
            for name, data in old.items():
                (target / name).write_bytes(data)
        arguments = [folder.__file__, str(target), str(deaths), way]
        done = subprocess.run([sys.executable, "-I", "-S", "-c", KILLER, *arguments], check=False)
        found = {path.name: path.read_bytes() for path in target.iterdir()} if target.exists() else None
        aside = folder.left_over(target)
        if found is None and way == "two steps":
            assert aside is not None
            found = {path.name: path.read_bytes() for path in aside.iterdir()}
            with pytest.raises(ValueError, match="has left the bundle that was there as"):
                load(target)
        assert found in ([None, new] if way == "nothing there" else [old, new])
        if done.returncode == 0:
            assert found == new
            assert [path.name for path in target.parent.iterdir()] == ["bundle"]
            break
    assert done.returncode == 0
    assert deaths >= 6


def test_error_while_writing(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    place = save(tmp_path / "b")[1]
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    write = folder.write

    def failing(path, data):
        if path.name == "config.json":
            raise Killed
        write(path, data)

    monkeypatch.setattr(folder, "write", failing)
    for target, overwrite in ((tmp_path / "c", False), (place, True)):
        with pytest.raises(Killed):
            save(target, overwrite=overwrite, policy=Never())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_bundle_exchanged_while_it_is_read(whole, monkeypatch):
    """The configuration is of the old bundle, the tensors are of the new one."""
    real = reading.read_config

    def reads(place):
        config = real(place)
        monkeypatch.setattr(reading, "read_config", real)
        save(place, kind=RepAdapter, overwrite=True, policy=Never())
        return config

    monkeypatch.setattr(reading, "read_config", reads)
    assert load(whole).policy == Never()


def test_part_of_a_bundle(whole):
    for name in ("config.json", "model.safetensors"):
        part = whole.with_name(f"without_{name}")
        shutil.copytree(whole, part)
        (part / name).unlink()
        with pytest.raises(ValueError, match=f"has no {re.escape(name)}: it is not a bundle, or only a part of one"):
            load(part)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting(exchange, whole, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda *_: False)
    with pytest.raises(ValueError, match="exists; give another folder, or overwrite=True"):
        save(whole, policy=Never())
    assert load(whole).policy == POLICY
    save(whole, policy=Never(), overwrite=True)
    assert load(whole).policy == Never()
    link = whole.with_name("link")
    link.symlink_to(whole)
    save(link, policy=Patience(2), overwrite=True)
    assert link.is_symlink()
    assert load(whole).policy == load(link).policy == Patience(2)
    assert sorted(path.name for path in whole.parent.iterdir()) == ["link", "whole"]


def test_overwriting_replaces_bundles_alone(whole, tmp_path):
    (whole / "notes.txt").write_text("mine")
    other, empty, file = tmp_path / "other", tmp_path / "empty", tmp_path / "file"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "vit"}')
    empty.mkdir()
    file.write_text("")
    for place, message in (
        (whole, "holds notes.txt"),
        (other, "holds config.json; overwrite=True replaces a bundle and nothing more"),
        (file, "is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            save(place, overwrite=True)
    save(empty, overwrite=True)
    assert load(empty).policy == POLICY


def test_file_that_appears_meanwhile_stays(whole, monkeypatch):
    monkeypatch.setattr(
        "dynadapter.serve.bundle.saving.check_rebuilt", lambda *_: (whole / "notes.txt").write_text("mine")
    )
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        save(whole, policy=Never(), overwrite=True)
    assert (whole / "notes.txt").read_text() == "mine"
    assert load(whole).policy == POLICY


# ---- what is damaged or wrong is refused in one line


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 4, "has format 4, this dynadapter reads format 3; update dynadapter"),
        (("format",), 2, "has format 2, this dynadapter reads format 3; write the bundle again"),
        (("format",), "1", "has format '1'"),
        (("library",), "timm", "does not belong to a bundle of dynadapter"),
        (("sha256",), ..., "lacks 'sha256'"),
        (("heads",), ..., "lacks 'heads'"),
        (("merged",), ..., "lacks 'merged'"),
        (("backbone", "fingerprint"), ..., "backbone: BackboneSource lacks 'fingerprint'"),
        (("backbone", "name"), 3, "backbone.name: 3 is not text"),
        (("backbone", "name"), "vit_tiny_patch16_225", "timm has no model"),
        (("backbone", "origin"), "web", "backbone.origin: 'web' is none of 'pretrained', 'file', 'seed'"),
        (("backbone", "timm_args", "depth"), 7, "was made for the backbone"),
        (
            ("adapter", "class_path"),
            "dynadapter.LoRB",
            "adapter: there is no Adapters 'dynadapter.LoRB'; did you mean 'L",
        ),
        (("adapter", "class_path"), "os.system", "there is no Adapters 'os.system'"),
        (
            ("adapter", "class_path"),
            "dynadapter.exits.policies.Never",
            "there is no Adapters 'dynadapter.exits.policies.Never'",
        ),
        (("adapter", "init_args", "rank"), "8", "adapter.rank: '8' is not a whole number"),
        (("adapter", "init_args", "rank"), 0, "adapter: rank=0 must be a whole number of at least 1"),
        (("adapter", "init_args", "rank"), 4, "in another shape"),
        (
            ("adapter", "init_args", "rnak"),
            4,
            "adapter: LoRA has no 'rnak'; it has scale, dropout, targets, rank, split",
        ),
        (("adapter",), None, "has unknown"),
        (("adapter",), "LoRA", "adapter: 'LoRA' is not a mapping of class_path and init_args"),
        (("heads", "init_args", "hidden"), 8, "in another shape"),
        (("policy", "class_path"), "dynadapter.Impatience", "did you mean 'Patience'"),
        (("policy", "class_path"), "dynadapter.Thresholded", "there is no Policy"),
        (("policy", "init_args", "temperatures"), [1.0, 1.0], "temperatures has 2 values, this network has 3 exits"),
        (
            ("policy", "init_args", "policy", "init_args", "threshold"),
            [0.5] * 3,
            "3 values, this network has 2 early exits",
        ),
        (("policy", "init_args", "policy", "init_args", "threshold"), 1.5, "1.5 is not in"),
        (
            ("policy", "init_args", "policy", "init_args", "threshold"),
            "0.5",
            "threshold: '0.5' is of no type that fits",
        ),
        (("class_names",), NAMES[:4], "4 class names for 5 classes"),
        (("class_names",), [], "0 class names for 5 classes"),
        (("num_classes",), 4, "5 class names for 4 classes"),
        (("class_names",), "abcde", "class_names: 'abcde' is not a list"),
        (("exit_depths",), [2, 6], "temperatures has 3 values"),
        (("exit_depths",), [2, 3, 4], "exits are after blocks"),
        (("exit_depths",), [4, 2, 6], "must be strictly rising"),
        (("preprocessing", "resize"), "squash", "preprocessing.resize: 'squash' is none of 'stretch', 'crop'"),
        (("whole",), True, "lacks"),
        (("merged",), True, "whole must be, too"),
        (("dtype",), "int8", "dtype: 'int8' is none of"),
        (("surprise",), 1, "Config has no 'surprise'"),
    ],
)
def test_wrong_config_is_one_line(path, value, message, whole):
    edited(whole, *path, value=value)
    with raises_one_line(ValueError, match=re.escape(message)) as caught:
        load(whole)
    assert str(whole) in str(caught.value) or "timm" in message or "rising" in message


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"library": "dynadapter"}', "[" * 100_000, "\x00"])
def test_no_config(text, whole):
    (whole / "config.json").write_text(text)
    with raises_one_line(ValueError, match=r"is not JSON|does not belong|has format None"):
        load(whole)


def test_damaged_tensors(whole):
    model, good = whole / "model.safetensors", (whole / "model.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for data in (good[:-1], good[:100], b"", bytes(flipped)):
        model.write_bytes(data)
        with raises_one_line(ValueError, match=r"has SHA-256 .* its config\.json says"):
            load(whole)
    for data in (good[:-1], b"", b"no tensors"):
        with raises_one_line(ValueError, match="is not a readable safetensors file"):
            load(rewritten(whole, data))
    assert load(rewritten(whole, good)).policy == POLICY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads.0.norm.weight": None}, r"lacks 1 tensors \(heads.0.norm.weight\)"),
        ({"heads.7.norm.weight": torch.zeros(1)}, r"has unknown 1 tensors \(heads.7.norm.weight\)"),
        ({"heads.0.norm.weight": torch.zeros(47)}, r"another shape, 1 tensors \(heads.0.norm.weight \(47,\) instead"),
        ({"heads.0.norm.weight": torch.full((48,), torch.inf)}, "hold NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(changes, message, whole):
    with pytest.raises(ValueError, match=message):
        load(retensored(whole, **changes))


def test_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a folder but a file; give a bundle's folder"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match="nowhere is not a folder; give a bundle's folder"):
        load(tmp_path / "nowhere")


# ---- predictions


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Seven image files of several sizes and kinds."""
    numbers = np.random.default_rng(0)
    paths = []
    for k in range(7):
        path = tmp_path / f"{k}.{['png', 'jpg', 'bmp'][k % 3]}"
        Image.fromarray(numbers.integers(0, 256, (20 + 9 * k, 50, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def test_predictions_follow_the_files(whole, pictures):
    bundle = load(whole)
    images = [load_image(path) for path in pictures]
    tensors = torch.stack([torch.from_numpy(PREPROCESS(image)) for image in images])
    with torch.no_grad():
        routed = bundle.net.early(tensors, POLICY)
    assert len(set(routed.exit_index.tolist())) > 1
    expected = bundle.predict(tensors)
    for k, (label, certainty, exit) in enumerate(expected):
        assert label == NAMES[routed.logits[k].argmax()]
        assert exit == routed.exit_index[k]
        own = bundle.net(tensors[k : k + 1])[exit, 0] / POLICY.temperatures[exit]
        assert certainty == pytest.approx(own.softmax(0).max().item(), rel=1e-5)
    for given in (pictures, [str(path) for path in pictures], images, list(tensors), (path for path in pictures)):
        assert bundle.predict(given) == expected
    for size in (1, 2, 3):
        close(bundle.predict(pictures, batch_size=size), expected)
    close(bundle.predict(pictures[2]), expected[2:3])
    close(bundle.predict(images[2]), expected[2:3])
    close(bundle.predict(tensors[2]), expected[2:3])
    close(bundle.predict([pictures[2], images[3], tensors[4]]), expected[2:5])
    assert bundle.predict([]) == bundle.predict(tensors[:0]) == []
    assert {p.exit_index for p in bundle.predict(pictures, policy=Never())} == {2}


def close(ours, theirs) -> None:
    assert [(p.label, p.exit_index) for p in ours] == [(p.label, p.exit_index) for p in theirs]
    assert [p.confidence for p in ours] == pytest.approx([p.confidence for p in theirs], abs=1e-5)


def test_images_that_cannot_be_used(whole, pictures, tmp_path):
    bundle = load(whole)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image .*broken\.png: not an image"):
        bundle.predict([pictures[0], tmp_path / "broken.png"])
    with pytest.raises(TypeError, match="an image is a int"):
        bundle.predict([3])
    with pytest.raises(ValueError, match="give preprocessed floats"):
        bundle.predict([torch.zeros(3, 32, 32, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="give preprocessed floats"):
        bundle.predict(torch.zeros(32, 32))
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        bundle.predict(pictures, batch_size=0)
    with pytest.raises(ValueError, match="threshold has 1 value"):
        bundle.predict(pictures, policy=Confidence((0.5,)))
    bare = load(save(tmp_path / "bare", preprocessing={})[1])
    assert len(bare.predict(torch.zeros(2, 3, 32, 32))) == 2
    with pytest.raises(ValueError, match="this bundle has no preprocessing"):
        bare.predict(pictures)


@pytest.fixture(scope="module")
def loaded(original, tmp_path_factory):
    """A bundle, and one that takes only tensors."""
    bare = save(tmp_path_factory.mktemp("bundles") / "bare", preprocessing={})[1]
    return load(original), load(bare)


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(3, 64, 64),
        torch.zeros(2, 3, 64, 64),
        torch.zeros(2, 3, 32, 16),
        torch.zeros(1, 32, 32),
        torch.zeros(2, 4, 32, 32),
        torch.zeros(2, 32, 32, 3),
        torch.zeros(3, 32),
        torch.zeros(()),
        torch.zeros(1, 1, 3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.int64),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 32, 32, dtype=torch.bool),
        torch.zeros(2, 3, 32, 32, dtype=torch.complex64),
        [torch.zeros(3, 32, 32), torch.zeros(3, 48, 48)],
        [torch.zeros(3, 32, 32), torch.zeros(1, 32, 32)],
        [torch.zeros(2, 3, 32, 32)],
        np.zeros((3, 32, 32), np.float32),
        np.zeros((2, 3, 32, 32), np.float32),
        np.zeros((32, 32, 3), np.complex64),
        np.zeros((2, 32, 32, 5), np.uint8),
        b"no image",
    ],
    ids=lambda given: str(getattr(given, "shape", type(given).__name__)),
)
def test_wrong_shapes_and_types_are_refused(given, loaded):
    for bundle in loaded:
        with raises_one_line(ValueError, match=r"an image|images are|an array|cannot read|no preprocessing"):
            bundle.predict(given)
        if isinstance(given, torch.Tensor) and given.ndim == 4:
            with pytest.raises(ValueError, match="an image is a tensor"):
                bundle.route(given)


def test_any_size_is_one_size_in_a_batch(tmp_path):
    bundle = load(save(tmp_path / "b", "convnext", None, preprocessing={})[1])
    small, large = torch.zeros(3, 32, 32), torch.zeros(3, 64, 64)
    assert len(bundle.predict([small, large], batch_size=1)) == 2
    with pytest.raises(ValueError, match="several sizes"):
        bundle.predict([small, large])


def test_predict_takes_every_source(whole, pictures):
    bundle = load(whole)
    expected = bundle.predict(pictures, batch_size=1)
    arrays = [np.asarray(load_image(path)) for path in pictures]
    contents = [path.read_bytes() for path in pictures]
    for given in (contents, map(io.BytesIO, contents), arrays):
        assert bundle.predict(given, batch_size=1) == expected
    assert bundle.predict(pictures[1].read_bytes()) == bundle.predict(arrays[1]) == expected[1:2]
    assert bundle.predict(np.stack([arrays[0]] * 2), batch_size=1) == expected[:1] * 2


def vit_with(**changes) -> dict[str, object]:
    name, arguments = SOURCES["vit"]
    backbone = create_backbone(name, CLASSES, **(arguments | changes))
    source = BackboneSource(name, fingerprint(backbone), "seed", arguments | changes)
    return {"net": ExitNet(backbone, Balanced(), every=2), "backbone": source, "adapter": None}


def test_wide_images_are_refused(tmp_path):
    for preprocessing in (PREPROCESS, None):
        with raises_one_line(ValueError, match=r"img_size=\(32, 48\): the backbone was built for images that are not"):
            save(tmp_path / "b", **vit_with(img_size=(32, 48)), preprocessing=preprocessing)


def test_other_channels_take_tensors_alone(tmp_path):
    parts = vit_with(in_chans=5)
    with pytest.raises(ValueError, match="images of 3 channels, the backbone takes 5"):
        save(tmp_path / "b", **parts)
    bundle = load(save(tmp_path / "b", **parts | {"preprocessing": None})[1])
    assert len(bundle.predict(torch.zeros(2, 5, 32, 32))) == 2


def test_repr_and_device(whole):
    bundle = load(whole, device=torch.device("cpu"))
    assert repr(bundle) == (
        f"Bundle(vit_tiny_patch16_224, LoRA, 5 classes, exits after blocks (2, 4, 6), {POLICY.name}, on cpu)"
    )
    assert bundle.to("cpu") is bundle
    assert bundle.costs is None
    assert set(bundle.config.versions) == {"dynadapter", "torch", "timm", "python"}


# ---- the card


def test_card_measured_and_not(tmp_path):
    net = made("vit")[0]
    costs = exit_costs(net, 32)
    measured = Outcome(cost=0.613, accuracy=0.9375, shares=(0.5, 0.3, 0.2), samples=64)
    place = save(tmp_path / "b", costs=costs, measured=measured)[1]
    bundle = load(place)
    assert bundle.costs == costs
    assert bundle.config.measured == {"cost": 0.613, "accuracy": 0.9375, "shares": (0.5, 0.3, 0.2), "samples": 64}
    card = (place / "README.md").read_text()
    row = f"| 2 | 4 | {costs.gmacs[1]:.3g} | {costs.relative[1]:.1%} | 30.0% |"
    for line in (
        row,
        "| accuracy | 93.8% |",
        "| samples | 64 |",
        "Not measured: time in milliseconds.",
        "not recorded",
    ):
        assert line in card
    assert "class 0, class 1" in card
    nothing = (save(tmp_path / "c", class_names=["a|b", "<x>", "c\nd", "e", "f"])[1] / "README.md").read_text()
    assert "The cost of the exits was not counted." in nothing
    assert "Not measured: accuracy, exit shares, average cost of an image, time in" in nothing
    assert r"`a\|b`, `<x>`, c d, e, f" in nothing
    unlabelled = save(tmp_path / "d", measured=replace(measured, accuracy=float("nan")))[1]
    assert "Not measured: accuracy, time" in (unlabelled / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "[a](http://b.c)",
        "http://b.c",
        "www.b.c",
        "a@b.c",
        "![x](//b)",
        "<img src=x>",
        "&#x202e;x",
        "`[a](//b)`",
        "``` x",
    ],
)
def test_card_has_no_live_names(name, tmp_path):
    """What is outside code spans holds nothing of the name; a code span holds neither links nor entities."""
    card = (save(tmp_path / "b", class_names=[name, "b", "c", "d", "e"])[1] / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("Classifies images"))
    spans = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
    assert [found[2].strip() for found in spans.finditer(line)] == [name]
    assert "5 classes: , b, c, d, e." in spans.sub("", line)


@pytest.mark.parametrize("name", ["\x1b[31mred", "right\u202eleft", "a\u2066b", "zero\u200bwidth", "a\x9bb"])
def test_card_has_no_control_characters(name, tmp_path):
    card = (save(tmp_path / "b", class_names=[name, "b", "c", "d", "e"])[1] / "README.md").read_text()
    assert all(character.isprintable() or character == "\n" for character in card)
    assert name.encode("unicode_escape").decode() in card


def test_card_of_calibration(tmp_path):
    found = Calibrated(
        cost=0.5,
        accuracy=0.75,
        shares=(0.5, 0.25, 0.25),
        samples=8,
        policy=POLICY,
        method="confidence threshold to a cost of at most 0.5",
        notes=("one", "two", "three"),
    )
    place = save(tmp_path / "b", measured=found)[1]
    assert load(place).config.measured["method"] == found.method
    card = (place / "README.md").read_text()
    assert "| exit | after block | share of images |" in card
    assert "| 3 | 6 | 25.0% |" in card
    assert "| notes | one, two, three |" in card
    assert "risk" not in card


@pytest.mark.parametrize(
    ("origin", "call"),
    [
        ("seed", 'load("path/of/this/folder")\n'),
        ("file", 'weights="path/of/x.pth")'),
        ("pretrained", "fetches the backbone"),
    ],
)
def test_card_how_to_load(origin, call, tmp_path):
    source = replace(made("vit")[1], origin=origin, file="x.pth" if origin == "file" else None)
    card = (save(tmp_path / "b", backbone=source)[1] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert call in code


# ---- from a classifier


def classifier(kind: type[AdapterSpec] | None = LoRA, **changes) -> SimpleNamespace:
    """What an ExitClassifier of the command line looks like: its settings are plain."""
    net, source = made("vit", kind)
    settings = {
        "pretrained": False,
        "weights": None,
        "image_size": None,
        "backbone_args": dict(source.timm_args),
        "backbone_seed": 0,
        "adapter": plain(spec_for(kind, "vit")),
        "heads": {"class_path": "dynadapter.Balanced", "init_args": {"hidden": 64}},
        "full_checkpoint": False,
    }
    return SimpleNamespace(
        net=net,
        backbone_name=source.name,
        backbone_hash=source.fingerprint,
        class_names=NAMES,
        preprocessing={"image_size": 32, "resize": "crop"},
        hparams=settings | changes,
    )


def test_classifier_becomes_a_bundle(tmp_path, images):
    place = bundle_from_classifier(classifier(), tmp_path / "b", policy=POLICY)
    bundle = load(place)
    same(bundle, made("vit")[0], images)
    assert bundle.preprocess == Preprocess(32, resize="crop")
    assert bundle.config.adapter == LoRA(scale=0.7)
    assert bundle.costs == exit_costs(made("vit")[0], 32)
    assert not bundle.config.whole
    bundle = load(bundle_from_classifier(classifier(), tmp_path / "c", policy=POLICY, preprocessing={}, costs=None))
    assert bundle.preprocess is bundle.costs is None
    unknown = classifier()
    unknown.preprocessing = {}
    with pytest.raises(ValueError, match="the classifier knows no preprocessing"):
        bundle_from_classifier(unknown, tmp_path / "d", policy=POLICY)
    with pytest.raises(ValueError, match="exists; give another folder"):
        bundle_from_classifier(classifier(), place, policy=POLICY)


@pytest.mark.parametrize(
    ("settings", "origin", "file"),
    [
        ({}, "seed", None),
        ({"pretrained": True}, "pretrained", None),
        ({"pretrained": True, "weights": "/secret/place/vit.npz"}, "file", "vit.npz"),
    ],
)
def test_origin_of_the_backbone(settings, origin, file, tmp_path):
    place = bundle_from_classifier(classifier(**settings), tmp_path / "b", policy=POLICY, costs=None)
    config = json.loads((place / "config.json").read_text())
    assert config["backbone"]["origin"] == origin
    assert config["backbone"]["file"] == file
    assert "secret" not in (place / "config.json").read_text() + (place / "README.md").read_text()


def test_classifier_is_merged_on_images(tmp_path, pictures, images):
    net = made("vit", RepAdapter)[0]
    tensors = torch.stack([torch.from_numpy(Preprocess(32, resize="crop")(load_image(path))) for path in pictures])
    for k, given in enumerate((pictures, [load_image(path) for path in pictures], tensors)):
        place = bundle_from_classifier(
            classifier(RepAdapter), tmp_path / f"b{k}", policy=POLICY, merge=True, check_images=given
        )
        bundle = load(place)
        assert bundle.config.proof.images == 7
        assert bundle.config.merged
        assert bundle.config.whole
        with torch.no_grad():
            torch.testing.assert_close(bundle.net(images), net(images), rtol=1e-4, atol=1e-5)
    assert adapter_layers(net.backbone)
    assert bundle.costs.macs[-1] < exit_costs(net, 32).macs[-1]  # what is shipped is counted
    with pytest.raises(ValueError, match="give some as check_images"):
        bundle_from_classifier(classifier(), tmp_path / "c", policy=POLICY, merge=True)
    with pytest.raises(ValueError, match="check_images is empty"):
        bundle_from_classifier(classifier(), tmp_path / "c", policy=POLICY, merge=True, check_images=[])
    with pytest.raises(ValueError, match="Adapter cannot be merged"):
        bundle_from_classifier(classifier(Adapter), tmp_path / "c", policy=POLICY, merge=True, check_images=pictures)


@pytest.mark.parametrize("merged", [False, True])
def test_real_classifier(merged, tmp_path, images):
    from dynadapter.training.module import ExitClassifier

    name, arguments = SOURCES["vit"]
    arguments = {key: value for key, value in arguments.items() if key != "img_size"}
    model = ExitClassifier(
        CLASSES,
        name,
        pretrained=False,
        image_size=32,
        backbone_args=arguments,
        adapter=LoRA(rank=2),
        exit_depths=[2, 4],
    )
    for layer in model.net.modules():
        if isinstance(layer, AdapterLayer):
            nn.init.normal_(layer.lora_b, std=0.1)
    if merged:
        model.merge()
    bundle = load(bundle_from_classifier(model, tmp_path / "b", policy=Confidence(0.5), preprocessing=PREPROCESS))
    same(bundle, model.net.eval(), images)
    assert bundle.class_names == tuple("01234")
    assert bundle.config.whole is merged
    assert bundle.config.backbone.image_size == 32


def test_origin_in_a_full_checkpoint(tmp_path, images):
    """Such a checkpoint says neither pretrained nor weights, and its backbone is not the one that the seed draws."""
    net, source = made("vit", seed=3)
    model = classifier(full_checkpoint=True)
    model.net, model.backbone_hash = net, source.fingerprint
    same(load(bundle_from_classifier(model, tmp_path / "b", policy=POLICY)), net, images)
    place = bundle_from_classifier(model, tmp_path / "c", policy=POLICY, whole=False)
    with pytest.raises(ValueError, match="needs the weights of its backbone"):
        load(place)
    drawn = classifier(full_checkpoint=True)
    same(load(bundle_from_classifier(drawn, tmp_path / "d", policy=POLICY, whole=False)), drawn.net, images)
