"""Exported stages against the network that they come from: three families, two formats, any batch."""

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_convnext, make_swin, make_vit
from torch import Tensor, nn

import dynadapter
from dynadapter.adapters import AdapterSpec, AdaptFormer, LoRA, RepAdapter, adapter_layers, inject
from dynadapter.cost import exit_costs
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Entropy, Margin, Never, Patience, Policy, route
from dynadapter.exits.temperature import Scaled
from dynadapter.images import preprocess
from dynadapter.serve import export, runtime
from dynadapter.serve.export import Programs, export_onnx, export_programs, load_programs
from dynadapter.serve.runtime import Runner

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZE = 32
POLICY = Confidence(0.7)
NAMES = [f"class {i}" for i in range(CLASSES)]


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def spread(net: ExitNet) -> ExitNet:
    """Gives the heads logits that differ from image to image, as after training."""
    last = net.backbone.get_classifier()
    for head, logits in zip([*net.heads, last], net(pictures(32, 9)), strict=True):
        layer = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
        layer.weight *= 2 / logits.std(0)[:, None]
        layer.bias -= 2 * logits.mean(0) / logits.std(0)
    return net.eval()


def network(backbone: nn.Module, every: int = 1, exits: list[int] | None = None) -> ExitNet:
    torch.manual_seed(0)
    return spread(ExitNet(backbone, LinearHeads(), every, exits).eval())


def adapted(*specs: AdapterSpec, exits: list[int] | None = None) -> ExitNet:
    """A ViT of two blocks whose adapters do something."""
    backbone = make_vit(depth=2)
    for spec in specs:
        inject(backbone, spec)
    generator = torch.Generator().manual_seed(1)
    for layer in adapter_layers(backbone).values():
        for name, tensor in layer.named_parameters():
            if not name.startswith("base_layer."):
                nn.init.normal_(tensor, std=0.05, generator=generator)
    return network(backbone, exits=exits)


NETWORKS = {
    "vit": lambda: network(make_vit(depth=2)),
    "swin": lambda: network(make_swin(depths=(1, 2), num_heads=(2, 2)), exits=[1]),
    "convnext": lambda: network(make_convnext(depths=(1, 1, 1, 1)), every=2),
}


def options(**changes: Any) -> dict[str, Any]:
    return {"policy": POLICY, "class_names": NAMES, "preprocessing": {"image_size": SIZE}} | changes


@dataclass
class Exported:
    """A network and its two folders, opened."""

    net: ExitNet
    onnx: Path
    programs: Path
    runner: Runner
    torch: Programs


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net, folder = NETWORKS[request.param](), tmp_path_factory.mktemp(request.param)
    export_onnx(net, folder / "onnx", **options())
    export_programs(net, folder / "programs", **options())
    runner = Runner(folder / "onnx", threads=1)
    return Exported(net, folder / "onnx", folder / "programs", runner, load_programs(folder / "programs"))


@pytest.fixture(scope="module")
def small() -> ExitNet:
    """A block and no early exit, which is exported in no time."""
    return network(make_vit(depth=1))


SMALL = options(policy=Never())


# ---- what comes out


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_both_formats_do_what_the_network_does(exported: Exported, batch: int) -> None:
    images, net = pictures(batch, batch), exported.net
    with torch.no_grad():
        expected, routed = net(images), net.early(images, POLICY)
    runner, programs = exported.runner, exported.torch
    np.testing.assert_allclose(runner.every_exit(images.numpy()), expected, atol=1e-4)
    torch.testing.assert_close(programs.every_exit(images), expected, atol=1e-5, rtol=0)
    logits, exits = runner.route(images.numpy())
    np.testing.assert_allclose(logits, routed.logits, atol=1e-4)
    assert exits.tolist() == routed.exit_index.tolist()
    also = programs.route(images)
    torch.testing.assert_close(also.logits, routed.logits, atol=1e-5, rtol=0)
    assert also.exit_index.tolist() == routed.exit_index.tolist()
    assert also.nonfinite == 0


def test_the_networks_of_these_tests_use_all_their_exits(exported: Exported) -> None:
    images = pictures(32)
    routed = exported.torch.route(images)
    assert set(routed.exit_index.tolist()) == set(range(exported.net.num_exits))
    with torch.no_grad():
        assert torch.equal(routed.exit_index, route(POLICY, exported.net(images)))


def test_the_manifest_says_it_all(exported: Exported) -> None:
    for folder, kind in ((exported.onnx, "onnx"), (exported.programs, "torch.export")):
        told = json.loads((folder / "manifest.json").read_text())
        assert (told["format"], told["kind"], told["precision"]) == (1, kind, "float32")
        assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *(s["file"] for s in told["stages"])]
        assert len(told["stages"]) == exported.net.num_exits
        for stage in told["stages"]:
            assert stage["sha256"] == runtime.sha256(folder / stage["file"])
            assert stage["bytes"] == (folder / stage["file"]).stat().st_size
        first, last = told["stages"][0], told["stages"][-1]
        assert [(x["name"], x["shape"]) for x in first["inputs"]] == [("images", [None, 3, SIZE, SIZE])]
        assert [x["shape"] for x in last["outputs"]] == [[None, CLASSES]]
        assert told["policy"] == {"kind": "Confidence", "threshold": 0.7}
        assert told["temperatures"] is None
        assert told["class_names"] == NAMES
        assert told["check"]["largest_difference"] <= 1e-4
        assert told["versions"]["torch"] == torch.__version__.split("+")[0]
        assert told["versions"]["dynadapter"] == dynadapter.__version__
    assert set(told["versions"]) < set(json.loads((exported.onnx / "manifest.json").read_text())["versions"])


def test_a_stage_holds_its_own_weights_and_nothing_of_this_machine(exported: Exported) -> None:
    net = exported.net
    needed = sum(p.numel() for p in net.parameters())
    for k in range(net.num_exits - 1):
        if net.splits(k):  # one stage begins the block, the next one finishes it
            *_, block = net.stage_modules(k)
            needed += sum(p.numel() for p in block.parameters())
    stages = sorted(exported.onnx.glob("*.onnx"))
    held = sum(math.prod(tensor.dims) for file in stages for tensor in onnx.load(file).graph.initializer)
    assert 0.7 * needed < held < 1.1 * needed + 1000
    programs = exported.torch._modules
    held = sum(tensor.numel() for module in programs for tensor in module.state_dict().values())
    assert 0.7 * needed < held < 1.1 * needed + 1000
    for file in (*stages, *exported.programs.glob("*.pt2")):
        content = file.read_bytes()
        for path in (Path(dynadapter.__file__).parent, Path(torch.__file__).parent, Path(__file__).parent):
            assert str(path).encode() not in content


def test_programs_move_to_another_device(exported: Exported) -> None:
    moved = [export._open_program(file, torch.device("meta")) for file in sorted(exported.programs.glob("*.pt2"))]
    held: Any = [pictures(3).to("meta")]
    for module in moved:
        *held, logits = module(*held)
        assert (logits.device.type, logits.shape) == ("meta", (3, CLASSES))


def test_an_empty_batch_gives_an_empty_answer(exported: Exported) -> None:
    for logits, exits in (exported.runner.route(pictures(0).numpy()), exported.torch.route(pictures(0))):
        assert logits.shape == (0, CLASSES)
        assert exits.shape == (0,)


def test_the_saved_preprocessing_is_that_of_training(exported: Exported) -> None:
    told = json.loads((exported.onnx / "manifest.json").read_text())["preprocessing"]
    told["normalization"] = tuple(map(tuple, told["normalization"]))
    assert preprocess.Preprocess(**told).statistics == preprocess.Preprocess(SIZE).statistics
    assert {**told, "normalization": "imagenet"} == asdict(preprocess.Preprocess(SIZE))


@pytest.mark.parametrize("spec", [LoRA(rank=2), RepAdapter(bottleneck=4), AdaptFormer(bottleneck=4)], ids=repr)
def test_adapters_are_merged_where_they_can_be(spec: AdapterSpec) -> None:
    net = adapted(spec).train()
    before = copy.deepcopy(net.state_dict())
    for merge in (True, False):
        reference, exported = export._standalone(net, pictures(1), merge)
        assert bool(adapter_layers(exported.backbone)) is (not merge or isinstance(spec, AdaptFormer))
        with torch.no_grad():
            torch.testing.assert_close(exported(pictures(5)), reference(pictures(5)), atol=1e-4, rtol=0)
    assert net.training  # the network is as it was
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_static_network_with_adapters_as_they_are(tmp_path: Path) -> None:
    kinds = [
        LoRA(rank=2, targets=("blocks.0.attn.qkv",)),
        AdaptFormer(bottleneck=4),
        RepAdapter(bottleneck=4, targets=("blocks.1.attn.qkv",)),
    ]
    net, images = adapted(*kinds, exits=[]), pictures(5)
    told = export_onnx(net, tmp_path / "onnx", **SMALL, merge=False, opset=18, class_first=False)
    assert told["versions"]["opset"] == 18
    logits, exits = Runner(tmp_path / "onnx").route(images.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(logits, net(images)[0], atol=1e-4)
    assert exits.tolist() == [0] * 5
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["manifest.json", "stage0.onnx"]


def test_eight_bits_are_measured(tmp_path: Path) -> None:
    net, images, folder = NETWORKS["vit"](), pictures(40, 3), tmp_path / "int8"
    with torch.no_grad():
        whole = net(images)
    labels = whole[-1].argmax(-1)
    told = export_onnx(net, folder, **options(), int8=True, check_images=images, check_labels=labels)
    assert told == runtime.Manifest(folder).content
    assert told["precision"] == "int8"
    runner, measured = Runner(folder), told["quantization"]
    parts = [runner.route(part.numpy()) for part in images.split([1, 3, 32, 4])]  # a batch decides on its own scales
    logits, exits = (torch.cat([torch.from_numpy(part[i]) for part in parts]) for i in range(2))
    before = route(POLICY, whole)
    classes = whole[before, torch.arange(40)].argmax(-1)
    assert measured["images"] == 40
    assert measured["products"] >= 8  # qkv, projection and two of the MLP in each block
    assert measured["same_exit"] == pytest.approx((exits == before).double().mean().item())
    assert measured["same_class"] == pytest.approx((logits.argmax(-1) == classes).double().mean().item())
    assert measured["accuracy_float32"] == pytest.approx((classes == labels).double().mean().item())
    assert measured["accuracy_int8"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert measured["exit_shares_float32"] == pytest.approx([(before == k).double().mean().item() for k in range(2)])
    assert measured["exit_shares_int8"] == pytest.approx([(exits == k).double().mean().item() for k in range(2)])
    assert 0 < measured["mean_logit_difference"] < 0.5
    assert measured["same_class"] > 0.8
    for stage in told["stages"]:
        assert stage["bytes"] < 111_000  # the weights of a block in float32
        assert stage["sha256"] == runtime.sha256(folder / stage["file"])


def test_eight_bits_need_something_to_quantise(small: ExitNet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_quantise", lambda file: 0)
    with pytest.raises(ValueError, match="int8 finds no matrix product in this network's blocks; leave it out"):
        export_onnx(small, tmp_path / "onnx", **SMALL, int8=True, check_images=pictures(2))
    assert not list(tmp_path.iterdir())


# ---- policies


@pytest.mark.parametrize(
    "policy",
    [Confidence(0.7), Entropy((0.4, 0.5)), Margin(0.2), Patience(2), Never(), Scaled(Margin(0.3), (0.5, 2.0, 1.0))],
    ids=lambda policy: policy.name,
)
def test_every_policy_survives_the_manifest(policy: Policy) -> None:
    told = json.loads(json.dumps(manifest(policy=policy)))
    assert export._torch_policy(told) == policy
    logits = 2 * torch.randn(3, 50, CLASSES, generator=torch.Generator().manual_seed(0))
    ours = runtime.Policy(told["policy"], 3, told["temperatures"]).route(logits.numpy())
    assert ours.tolist() == route(policy, logits).tolist()


def test_temperatures_come_alone_or_with_the_policy() -> None:
    alone = manifest(temperatures=torch.tensor([2.0, 1.0, 0.5]))
    assert export._torch_policy(alone) == Scaled(POLICY, (2.0, 1.0, 0.5))
    assert manifest(policy=Scaled(POLICY, 2.0))["temperatures"] == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="the policy brings temperatures along"):
        manifest(policy=Scaled(POLICY, 2.0), temperatures=[1, 1, 1])


def manifest(**changes: Any) -> dict[str, Any]:
    """What would be said of a network of three exits, without its stages."""
    net = ExitNet(make_vit(depth=3), LinearHeads(), every=1)
    return export._manifest("onnx", net, **(options(temperatures=None, costs=None) | changes))


# ---- folders


def test_a_folder_that_is_there_is_left_alone(small: ExitNet, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    for write in (export_onnx, export_programs):
        with pytest.raises(ValueError, match="there exists; name another folder, or set overwrite=True"):
            write(small, folder, **SMALL)
        with pytest.raises(ValueError, match=r"holds no manifest\.json, so it is no exported folder to replace"):
            write(small, folder, **SMALL, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_export_leaves_what_was_there(small: ExitNet, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "programs"
    export_programs(small, folder, **SMALL)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"differ from the network's by .* at exit 1, more than tolerance=-1e\+00"):
        export_programs(small, folder, **SMALL, overwrite=True, tolerance=-1)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]
    export_programs(small, folder, **options(policy=Patience(3)), overwrite=True)
    assert load_programs(folder).policy == Patience(3)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_score_on_its_threshold_is_not_exported(small: ExitNet, tmp_path: Path, monkeypatch) -> None:
    routed = Programs.route
    monkeypatch.setattr(
        Programs, "route", lambda self, x: routed(self, x)._replace(exit_index=torch.ones(len(x)).long())
    )
    with pytest.raises(ValueError, match=r"12 of 12 images leave .* at another exit .* move the threshold a little"):
        export_programs(small, tmp_path / "programs", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_stage_too_large_for_one_file(small: ExitNet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "LARGEST_ONNX", 1000)
    with pytest.raises(ValueError, match=r"stage0 has 0\.0 GB of weights, one file holds 0\.0; set more exits"):
        export_onnx(small, tmp_path / "onnx", **SMALL)
    assert not list(tmp_path.iterdir())


def test_programs_of_another_kind_or_damaged(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'onnx', not 'torch\.export'; open it with dynadapter\.runtime\.Runner"):
        load_programs(exported.onnx)
    with pytest.raises(
        ValueError, match=r"'torch\.export', not 'onnx'; open it with dynadapter\.export\.load_programs"
    ):
        Runner(exported.programs)
    file = tmp_path / "odd.pt2"
    file.write_bytes(b"no program")
    with pytest.raises(ValueError, match=r"torch .* cannot open .*odd\.pt2 \(") as caught:
        export._open_program(file, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match=r"images are torch\.float32 \(1, 3, 8, 8\); give torch\.float32 \(batch, 3, 32"
    ):
        exported.torch.route(torch.zeros(1, 3, 8, 8))


# ---- arguments


class Mine(Confidence):
    """A policy of somebody else's."""


IMAGES = pictures(4)
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"policy": Mine(0.5)},
        "policy Mine cannot be exported; choose Confidence, Entropy, Margin, Patience, Never, or one",
    ),
    ({"policy": Scaled(Scaled(Never(), 2.0), 2.0)}, "policy Scaled cannot be exported"),
    (
        {"policy": Confidence((0.5, 0.5))},
        r"threshold=\(0.5, 0.5\) does not fit 1 exits; give one number in \[0, 1\], or 0",
    ),
    ({"temperatures": [1.0, 1.0]}, r"temperatures=\[1.0, 1.0\] do not fit; give 1 numbers above 0"),
    ({"class_names": ["one"]}, "1 class names for 5 classes; give one name a class"),
    ({"preprocessing": {"size": 32}}, "preprocessing has 'size'; it takes image_size, interpolation"),
    ({"preprocessing": {"image_size": 32, "resize": "pad"}}, "unknown resize 'pad'"),
    ({"preprocessing": {"image_size": 48}}, r"does not take images of 3 x 48 x 48 \(.*\); see preprocessing"),
    ({"check_images": IMAGES[0]}, r"check_images are torch.float32 \(3, 32, 32\); give preprocessed ones"),
    ({"check_images": IMAGES[:0]}, "at least one"),
    ({"check_images": IMAGES.to(torch.uint8)}, r"check_images are torch.uint8"),
    ({"check_labels": torch.zeros(4)}, r"check_labels have shape \(4,\) for no images"),
    ({"check_images": IMAGES, "check_labels": torch.zeros(3)}, r"check_labels have shape \(3,\) for 4 images"),
    ({"opset": 17}, "opset=17 must be a whole number of at least 18"),
    ({"int8": True}, "int8 changes what the network says; give check_images"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[" ".join(changes) for changes, _ in BAD])
def test_arguments_that_do_not_fit(small: ExitNet, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        export_onnx(small, tmp_path / "onnx", **(SMALL | changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_costs_are_kept_and_must_be_of_this_network(small: ExitNet, tmp_path: Path) -> None:
    costs = exit_costs(small, SIZE)
    told = export_programs(small, tmp_path / "programs", **SMALL, costs=costs)
    assert told["costs"]["macs"] == costs.macs
    assert json.loads((tmp_path / "programs" / "manifest.json").read_text())["costs"]["macs"] == list(costs.macs)
    with pytest.raises(ValueError, match="costs of 2 exits for 1; count them on the network to export"):
        export_programs(small, tmp_path / "other", **SMALL, costs=exit_costs(NETWORKS["vit"](), SIZE))


def test_without_onnx_it_says_so(small: ExitNet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"export to ONNX needs onnxscript: pip install 'dynadapter\[onnx\]'"):
        export_onnx(small, tmp_path / "onnx", **SMALL)
