"""Exported stages against the network that they come from: three families, any batch, every option."""

import copy
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_vit, raises_one_line
from exported_networks import NAMES, NETWORKS, POLICY, SIZE, adapted, network, noise, options

import dynadapter
from dynadapter.adapters import (
    SSF,
    VPT,
    AdapterPlus,
    AdapterSpec,
    AdaptFormer,
    BitFit,
    Convpass,
    DoRA,
    FacT,
    LoRA,
    RepAdapter,
    adapter_layers,
)
from dynadapter.cost import exit_costs
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Never, Patience, route
from dynadapter.exits.temperature import Scaled
from dynadapter.files import sha256
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve import comparison, export, graphs
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Runner
from dynadapter.serve.runtime.manifest import CODE, FORMAT, read_manifest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SMALL = options(policy=Never())


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@dataclass
class Exported:
    """A network, its folder, and the folder opened."""

    net: ExitNet
    folder: Path
    runner: Runner
    content: dict[str, Any]


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net, folder = NETWORKS[request.param](), tmp_path_factory.mktemp(request.param) / "exported"
    export_onnx(net, folder, **options())
    return Exported(net, folder, Runner(folder, threads=1), json.loads((folder / "manifest.json").read_text()))


@pytest.fixture(scope="module")
def small() -> ExitNet:
    """A block without early exit: the fastest export."""
    return network(make_vit(depth=1))


def reuse_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next exports copy the graphs of a folder: the exporter of torch takes seconds for each."""
    stages = json.loads((folder / "manifest.json").read_text())["stages"]

    def copy_graphs(net: ExitNet, draft: Path, *_: Any) -> list[dict[str, Any]]:
        for stage in stages:
            shutil.copy(folder / stage["file"], draft)
        return stages

    monkeypatch.setattr(export, "write_graphs", copy_graphs)


@pytest.fixture(scope="module")
def small_folder(small: ExitNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "exported"
    export_onnx(small, folder, **SMALL)
    return folder


@pytest.fixture
def small_graphs(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of `small` copy its graphs."""
    reuse_graphs(small_folder, monkeypatch)


# ---- the result


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_graphs_match_the_network(exported: Exported, batch: int) -> None:
    images, net, runner = noise(batch, batch), exported.net, exported.runner
    with torch.no_grad():
        expected, routed = net(images), net.early(images, POLICY)
    np.testing.assert_allclose(runner.every_exit(images.numpy()), expected, atol=1e-4)
    logits, exit_index = runner.route(images.numpy())
    np.testing.assert_allclose(logits, routed.logits, atol=1e-4)
    assert exit_index.tolist() == routed.exit_index.tolist()


def test_networks_here_use_every_exit(exported: Exported) -> None:
    images = noise(32)
    exit_index = exported.runner.route(images.numpy())[1].tolist()
    assert set(exit_index) == set(range(exported.net.num_exits))
    with torch.no_grad():
        assert exit_index == route(POLICY, exported.net(images)).tolist()


def test_manifest_is_complete(exported: Exported) -> None:
    content, folder = exported.content, exported.folder
    assert (content["format"], content["precision"]) == (FORMAT, "float32")
    assert len(content["stages"]) == exported.net.num_exits
    for stage in content["stages"]:
        assert stage["sha256"] == sha256(folder / stage["file"])
        assert stage["bytes"] == (folder / stage["file"]).stat().st_size
    first, last = content["stages"][0], content["stages"][-1]
    assert [(x["name"], x["shape"]) for x in first["inputs"]] == [("images", [None, 3, SIZE, SIZE])]
    assert [x["shape"] for x in last["outputs"]] == [[None, CLASSES]]
    assert content["policy"] == {"kind": "Confidence", "threshold": 0.7}
    assert content["temperatures"] is None
    assert content["class_names"] == NAMES
    assert content["check"]["largest_difference"] <= 1e-4
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["versions"]["dynadapter"] == dynadapter.__version__
    assert Preprocess(**content["preprocessing"]).statistics == Preprocess(SIZE).statistics
    names = ["predict.py", "dynadapter/__init__.py", *(f"dynadapter/{name}" for name in CODE)]
    assert files(folder) == sorted(["manifest.json", *names, *(stage["file"] for stage in content["stages"])])
    assert content["files"] == {name: sha256(folder / name) for name in names}


def test_copied_code_equals_the_package(exported: Exported) -> None:
    package = Path(dynadapter.__file__).parent
    for name in CODE:
        assert (exported.folder / "dynadapter" / name).read_bytes() == (package / name).read_bytes()
    shown = (exported.folder / "predict.py").read_bytes()
    assert shown == (package / "serve" / "runtime" / "predict.py").read_bytes()


def test_stage_holds_its_own_weights_only(exported: Exported) -> None:
    net = exported.net
    needed = sum(p.numel() for p in net.parameters())
    for k in range(net.num_exits - 1):
        if net.splits(k):  # one stage begins the block, the next one finishes it
            *_, block = net.stage_modules(k)
            needed += sum(p.numel() for p in block.parameters())
    stages = sorted(exported.folder.glob("*.onnx"))
    held = sum(math.prod(tensor.dims) for file in stages for tensor in onnx.load(file).graph.initializer)
    assert 0.7 * needed < held < 1.2 * needed + 1000  # the exporter copies small matrices that are used twice


def test_no_path_of_this_machine_is_written(exported: Exported) -> None:
    for name in files(exported.folder):
        content = (exported.folder / name).read_bytes()
        for path in (Path(dynadapter.__file__).parent, Path(torch.__file__).parent, Path(__file__).parent):
            assert str(path).encode() not in content


def test_empty_batch_gives_empty_result(exported: Exported) -> None:
    logits, exit_index = exported.runner.route(noise(0).numpy())
    assert (logits.shape, exit_index.shape) == ((0, CLASSES), (0,))


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "lightning", "onnx", "onnxscript"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("exported", ["vit"], indirect=True)
def test_folder_runs_without_torch(exported: Exported, tmp_path: Path) -> None:
    """In a process without torch, where the only dynadapter is the copy in the folder."""
    code = f"""{BLOCKED}
sys.path = [{str(exported.folder)!r}] + [p for p in sys.path if not p.endswith("src")]
import numpy as np
import dynadapter
assert dynadapter.__file__.startswith({str(exported.folder)!r})
import predict
from dynadapter.serve.runtime import Runner
runner = Runner({str(exported.folder)!r}, threads=1)
np.save("exits.npy", runner.route(np.load("images.npy"))[1])
assert all(str(module.__file__).startswith({str(exported.folder)!r})
           for name, module in list(sys.modules.items()) if name.startswith("dynadapter"))
print(sorted(name for name in ("torch", "timm", "lightning", "onnx", "rich", "scipy") if name in sys.modules))
"""
    images = noise(20)
    np.save(tmp_path / "images.npy", images.numpy())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert np.load(tmp_path / "exits.npy").tolist() == exported.net.early(images, POLICY).exit_index.tolist()


# ---- options


@pytest.mark.parametrize("spec", [LoRA(rank=2), RepAdapter(bottleneck=4), AdaptFormer(bottleneck=4)], ids=repr)
def test_adapters_are_merged_if_possible(spec: AdapterSpec) -> None:
    net = adapted(spec).train()
    before = copy.deepcopy(net.state_dict())
    for merge in (True, False):
        reference, merged = graphs.standalone(net, noise(1), merge)
        assert bool(adapter_layers(merged.backbone)) is (not merge or isinstance(spec, AdaptFormer))
        with torch.no_grad():
            torch.testing.assert_close(merged(noise(5)), reference(noise(5)), atol=1e-4, rtol=0)
    assert net.training  # the network is unchanged
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


SEVERAL = [
    LoRA(rank=2, targets=("blocks.0.attn.qkv",)),
    AdaptFormer(bottleneck=4),
    RepAdapter(bottleneck=4, targets=("blocks.1.attn.qkv",)),
    SSF(targets=("patch_embed.proj", "blocks.0.norm1")),
    BitFit(targets=("norm",)),
    DoRA(rank=2, targets=("blocks.0.attn.proj",)),
    FacT(rank=2, targets=("*.mlp.fc1",)),
    AdapterPlus(bottleneck=4),
    Convpass(bottleneck=4, targets=("*.attn",)),
]


@pytest.mark.parametrize("kinds", [SEVERAL, [VPT(prompts=3)]], ids=["several", "VPT"])
def test_static_network_with_adapters(kinds: list[AdapterSpec], tmp_path: Path) -> None:
    net, images, folder = adapted(*kinds, exit_depths=[]), noise(5), tmp_path / "exported"
    content = export_onnx(net, folder, **SMALL, merge=False, opset=18, class_first=False)
    assert content["versions"]["opset"] == 18
    logits, exit_index = Runner(folder).route(images.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(logits, net(images)[0], atol=1e-4)
    assert exit_index.tolist() == [0] * 5
    assert [path.name for path in folder.glob("*.onnx")] == ["stage0.onnx"]


@pytest.mark.parametrize("way", ["dynamic", "static"])
@pytest.mark.parametrize("exported", ["vit"], indirect=True)
def test_int8_change_is_measured(
    exported: Exported, way: Literal["dynamic", "static"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "static":
        pytest.importorskip("nncf")
    net, images, folder = exported.net, noise(40, 3), tmp_path / "int8"
    reuse_graphs(exported.folder, monkeypatch)
    with torch.no_grad():
        expected = net(images)
    labels = expected[-1].argmax(-1)
    content = export_onnx(net, folder, **options(), int8=way, check_images=images, check_labels=labels)
    assert content == read_manifest(folder).content
    assert content["precision"] == "int8"
    runner, measured = Runner(folder), content["quantization"]
    if way == "static":  # the other images determined the ranges
        images, expected, labels = images[1::2], expected[:, 1::2], labels[1::2]
    count = len(images)
    sizes = [1, 3, 32, 4] if way == "dynamic" else [count]  # for dynamic, the ranges depend on the batch
    parts = [runner.route(part.numpy()) for part in images.split(sizes)]
    logits, after = (torch.cat([torch.from_numpy(part[i]) for part in parts]) for i in range(2))
    before = route(POLICY, expected)
    classes = expected[before, torch.arange(count)].argmax(-1)
    assert (measured["way"], measured["images"]) == (way, count)
    assert measured["products"] >= 8  # qkv, projection and two of the MLP in each block
    assert measured["same_exit"] == pytest.approx((after == before).double().mean().item())
    assert measured["same_class"] == pytest.approx((logits.argmax(-1) == classes).double().mean().item())
    assert measured["accuracy_float32"] == pytest.approx((classes == labels).double().mean().item())
    assert measured["accuracy_int8"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert measured["exit_shares_float32"] == pytest.approx([(before == k).double().mean().item() for k in range(2)])
    assert measured["exit_shares_int8"] == pytest.approx([(after == k).double().mean().item() for k in range(2)])
    assert 0 < measured["mean_logit_difference"] < 0.5
    assert measured["same_class"] > 0.8
    for stage in content["stages"]:
        assert stage["bytes"] < 111_000  # the weights of a block in float32
        assert stage["sha256"] == sha256(folder / stage["file"])


@pytest.mark.parametrize("exported", ["vit"], indirect=True)
def test_static_int8_is_the_same_in_any_batch(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    reuse_graphs(exported.folder, monkeypatch)
    images = noise(12, 5)
    export_onnx(exported.net, tmp_path / "int8", **options(), int8="static", check_images=images)
    pixels, runner = images.numpy(), Runner(tmp_path / "int8", threads=1)
    together = runner.every_exit(pixels)
    alone = np.concatenate([runner.every_exit(pixels[k : k + 1]) for k in range(12)], axis=1)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    pytest.importorskip("openvino")
    other = Runner(tmp_path / "int8", threads=1, engine="openvino")
    np.testing.assert_allclose(other.every_exit(pixels), together, atol=0.1)


@pytest.mark.usefixtures("small_graphs")
def test_int8_without_products_is_refused(small: ExitNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "quantise_dynamic", lambda file: 0)
    with pytest.raises(ValueError, match="int8 finds no matrix product in this network's blocks; leave it out"):
        export_onnx(small, tmp_path / "exported", **SMALL, int8="dynamic", check_images=noise(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_graphs")
def test_static_int8_without_nncf(small: ExitNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ImportError, match=r"pip install 'dynadapter\[int8\]'"):
        export_onnx(small, tmp_path / "exported", **SMALL, int8="static", check_images=noise(2))
    assert not list(tmp_path.iterdir())


# ---- policies


def test_one_temperature_is_for_every_exit() -> None:
    assert export.policy_settings(Scaled(POLICY, 2.0), 3)[1] == [2.0, 2.0, 2.0]


# ---- folders


def test_other_folders_are_left_alone(small: ExitNet, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="there exists; give another folder, or overwrite=True to replace an exported folder"
    ):
        export_onnx(small, folder, **SMALL)
    (folder / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(
        ValueError, match=r"holds letter\.txt, manifest\.json; overwrite=True replaces an exported folder"
    ):
        export_onnx(small, folder, **SMALL, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["letter.txt", "manifest.json"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("small_graphs")
def test_failed_export_keeps_the_old_folder(small: ExitNet, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "exported"
    export_onnx(small, folder, **SMALL)
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with pytest.raises(ValueError, match=r"differ from the network's by .* at exit 1, more than tolerance=-1e\+00"):
        export_onnx(small, folder, **SMALL, overwrite=True, tolerance=-1)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    assert list(folder.parent.iterdir()) == [folder]
    export_onnx(small, folder, **options(policy=Patience(3)), overwrite=True)
    assert Runner(folder).policy.kind == "Patience"
    assert list(folder.parent.iterdir()) == [folder]
    note = folder / "dynadapter" / "note.txt"
    note.write_text("mine")
    with pytest.raises(ValueError, match=r"holds dynadapter/note\.txt; .* move that away, or give another folder"):
        export_onnx(small, folder, **SMALL, overwrite=True)
    assert note.read_text() == "mine"


@pytest.mark.usefixtures("small_graphs")
@pytest.mark.parametrize("overwrite", [False, True])
def test_file_that_appears_meanwhile_stays(
    overwrite: bool, small: ExitNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = export.compare, tmp_path / "exported"

    def slow(*args: Any) -> Any:
        folder.mkdir(exist_ok=True)
        (folder / "letter.txt").write_text("mine")
        return real(*args)

    if overwrite:
        export_onnx(small, folder, **SMALL)
    monkeypatch.setattr(export, "compare", slow)
    with pytest.raises(ValueError, match=r"holds letter\.txt" if overwrite else "exists; give another folder"):
        export_onnx(small, folder, **SMALL, overwrite=overwrite)
    assert (folder / "letter.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("small_graphs")
def test_folder_behind_a_link_is_replaced(small: ExitNet, tmp_path: Path) -> None:
    export_onnx(small, tmp_path / "v1", **SMALL)
    (tmp_path / "current").symlink_to("v1")
    export_onnx(small, tmp_path / "current", **options(policy=Patience(3)), overwrite=True)
    assert Runner(tmp_path / "v1").policy.kind == "Patience"
    assert (tmp_path / "current").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


@pytest.mark.usefixtures("small_graphs")
def test_score_on_its_threshold_is_refused(small: ExitNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Runner.route
    monkeypatch.setattr(Runner, "route", lambda self, x: (real(self, x)[0], np.ones(len(x), np.int64)))
    words = r"12 of 12 images stop at another exit in the exported graphs .* move the threshold a little"
    with pytest.raises(ValueError, match=words):
        export_onnx(small, tmp_path / "exported", **SMALL)
    assert not list(tmp_path.iterdir())


def test_stage_too_large_for_one_file(small: ExitNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"stage0 has 0\.0 GB of weights, one file holds 0\.0; set more exits"):
        export_onnx(small, tmp_path / "exported", **SMALL)
    assert not list(tmp_path.iterdir())


def test_comparison_finds_nan(exported: Exported) -> None:
    images = noise(2)
    images[1] = math.nan
    with pytest.raises(ValueError, match="own logits are not finite for 1 of 2 images"):
        comparison.compare(exported.runner, exported.net, POLICY, images, 1e-4)


# ---- arguments


class Mine(Confidence):
    """A policy of another package."""


IMAGES = noise(4)
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"policy": Mine(0.5)},
        "policy Mine cannot be exported; choose Confidence, Entropy, Margin, Patience, AtExit, Never, al",
    ),
    ({"policy": Scaled(Scaled(Never(), 2.0), 2.0)}, "policy Scaled cannot be exported"),
    ({"policy": Confidence((0.5, 0.5))}, r"threshold=\[0.5, 0.5\] does not fit 1 exits; give one number in \[0, 1\]"),
    ({"policy": Scaled(Never(), (1.0, 1.0))}, r"temperatures=\[1.0, 1.0\] do not fit; give 1 numbers above 0"),
    ({"class_names": ["one"]}, "1 class names for 5 classes; give one name for each class"),
    ({"preprocess": Preprocess(48)}, r"does not take images of 3 x 48 x 48 \(.*\); see preprocessing"),
    ({"check_images": IMAGES[0]}, r"check_images are torch.float32 \(3, 32, 32\); give preprocessed ones"),
    ({"check_images": IMAGES[:0]}, "at least one"),
    ({"check_images": IMAGES.to(torch.uint8)}, r"check_images are torch.uint8"),
    ({"check_labels": torch.zeros(4)}, r"check_labels have shape \(4,\) for no images"),
    ({"check_images": IMAGES, "check_labels": torch.zeros(3)}, r"check_labels have shape \(3,\) for 4 images"),
    ({"opset": 17}, "opset=17 must be a whole number of at least 18"),
    ({"int8": "dynamic"}, "int8 changes predictions; give check_images"),
    ({"int8": True}, "int8=True must be one of dynamic, static"),
    ({"int8": "static", "check_images": IMAGES[:1]}, "needs at least 2 check_images"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[" ".join(changes) for changes, _ in BAD])
def test_wrong_arguments_are_refused(small: ExitNet, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with raises_one_line(ValueError, match=message):
        export_onnx(small, tmp_path / "exported", **(SMALL | changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_graphs")
def test_costs_must_be_of_this_network(small: ExitNet, tmp_path: Path) -> None:
    costs = exit_costs(small, SIZE)
    content = export_onnx(small, tmp_path / "exported", **SMALL, costs=costs)
    assert content["costs"]["macs"] == list(costs.macs)
    assert json.loads((tmp_path / "exported" / "manifest.json").read_text())["costs"]["macs"] == list(costs.macs)
    with pytest.raises(ValueError, match="costs of 2 exits for 1; count them on the network to export"):
        export_onnx(small, tmp_path / "other", **SMALL, costs=exit_costs(NETWORKS["vit"](), SIZE))


def test_missing_packages_are_named(small: ExitNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"export to ONNX needs onnxscript: pip install 'dynadapter\[onnx\]'"):
        export_onnx(small, tmp_path / "exported", **SMALL)
