"""The config files that ship: each trains over vtab.yaml, they compose in any order, and they hold what they claim."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dynadapter.backbones import create_backbone, own_preprocessing, packaged
from dynadapter.cli import main
from dynadapter.cli.app import DynCLI
from dynadapter.data import VTAB_TASKS, Shapes
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.training.callbacks import BidirectionalSparsity, EarlyExit, ExitWeights
from dynadapter.training.schedules import Cosine, Warmup

CONFIGS = Path(__file__).parents[1] / "configs"
ALONE = ("own_images", "quickstart", "vtab")
KINDS = (
    "adapter",
    "adapter_plus",
    "adaptformer",
    "bitfit",
    "convpass",
    "dora",
    "fact",
    "lora",
    "repadapter",
    "ssf",
    "vpt",
)
PRETRAININGS = ("clip", "dinov2", "mae")  # built in tests/test_pretrainings.py
VIDEO = ("video",)  # trained in tests/test_videos.py
EXTRAS = ("augment", "exit_tokens", "token_merging", "linear_heads", "distillation", "static")
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", "{patch_size: 16, embed_dim: 24, depth: 5, num_heads: 3}"),
    "swin": (
        "swin_tiny_patch4_window7_224",
        "{patch_size: 2, window_size: 4, embed_dim: 16, depths: [2, 2], num_heads: [2, 2]}",
    ),
    "convnext": ("convnext_tiny", "{patch_size: 2, dims: [16, 24, 32, 48], depths: [2, 1, 2, 1]}"),
    "resnet": ("test_resnet", "{}"),
    "regnet": ("regnety_002", "{}"),
    "efficientnet": ("test_efficientnet", "{}"),
}
OVERLAYS = FAMILIES.keys() - {"vit"}
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def small(family: str = "vit") -> list[str]:
    """Return overrides for a tiny backbone of a family."""
    name, args = FAMILIES[family]
    backbone = [f"--model.backbone={name}", f"--model.backbone_args={args}", "--model.pretrained=false"]
    return [*backbone, "--model.every=1", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=true"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments for a task of plain-coloured images in the layout of VTAB-1k."""
    root = tmp_path_factory.mktemp("data")
    (root / "colours" / "images").mkdir(parents=True)
    for k in range(8):
        Image.new("RGB", (20, 24), (30 * k, 255 - 30 * k, 60)).save(root / "colours" / "images" / f"{k}.png")
    lines = [f"images/{k}.png {k % 4}" for k in range(8)]
    for name in ("train800", "val200", "train800val200", "test"):
        (root / "colours" / f"{name}.txt").write_text("\n".join(lines))
    return [f"--data.root={root}", "--data.task=colours", "--data.image_size=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of plain-coloured images of two classes."""
    root = tmp_path_factory.mktemp("own")
    for name, value in (("dark", 30), ("light", 200)):
        (root / name).mkdir()
        for k in range(10):
            Image.new("RGB", (20, 24), (value, 3 * k, 60)).save(root / name / f"{k}.png")
    return root


def stacked(*names: str) -> list[str]:
    return [f"--config={CONFIGS / name}.yaml" for name in names]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_every_file_is_tested():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {*ALONE, *KINDS, *EXTRAS, *OVERLAYS, *PRETRAININGS, *VIDEO, "paper", "vtab_scales"}


@pytest.mark.parametrize("name", [*ALONE, *KINDS, *EXTRAS, *sorted(OVERLAYS), "paper"])
def test_file_trains(name, task, folder, recwarn):
    names = [name] if name in ALONE else ["vtab", name]
    family = name if name in FAMILIES else "vit"
    data = task if "vtab" in names else ["--data.image_size=32"]
    if name == "own_images":
        data.append(f"--data.root={folder}")
    main(["fit", *stacked(*names), *small(family), *data])
    assert not [str(warning.message) for warning in recwarn if "discard" in str(warning.message)]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_file_starts_with_a_sentence(path):
    first, *others = path.read_text().splitlines()
    assert first.startswith("# ")
    assert first.endswith(".")
    if path.stem != "vtab_scales":
        names = [path.stem] if path.stem in ALONE else ["vtab", path.stem]
        assert others[0].startswith("#   dynadapter fit " + " ".join(f"-c {name}" for name in names))


# ---- files over each other


def settings(cli: DynCLI) -> dict[str, Any]:
    """Return the model's settings and the callbacks of a built command."""
    callbacks = sorted(type(callback).__name__ for callback in cli.trainer.callbacks)
    found = {**{k: repr(v) for k, v in cli.model.hparams.items()}, "callbacks": callbacks}
    if cli.model.net.num_exits == 1:
        del found["distillation"]  # it has no effect on a single exit
    return found


@pytest.mark.parametrize(
    "overlays",
    [
        ("adapter", "token_merging", "static"),
        ("repadapter", "linear_heads", "distillation"),
        ("adaptformer", "distillation", "static"),
    ],
    ids="-".join,
)
def test_overlays_in_any_order(overlays, task, built):
    first, second = (
        settings(built("fit", *stacked("vtab", *order), *small(), *task)) for order in (overlays, overlays[::-1])
    )  # each pair in both orders
    assert first == second


def test_fair_baseline(task, built):
    """Without exits, with the tokens of the dynamic network merged and its kind of adapter."""
    model = built("fit", *stacked("vtab", "adapter", "token_merging", "static"), *small(), *task).model
    assert model.net.exit_depths == (5,)
    assert model.net.token_merging == TokenMerging(after=(1, 2, 3, 4), share=0.23)
    assert model.hparams["adapter"]["class_path"].endswith("Adapter")


def test_static_is_the_same_model_without_exits(task, built):
    dynamic = built("fit", *stacked("vtab", "lora"), *small(), *task)
    static = built("fit", *stacked("vtab", "static"), *small(), *task)
    assert static.model.net.exit_depths == (5,)
    assert static.model.backbone_hash == dynamic.model.backbone_hash
    trained = {name for name, p in static.model.net.named_parameters() if p.requires_grad}
    early = ("heads.", "beside.")
    named = dynamic.model.net.named_parameters()
    assert trained == {name for name, p in named if p.requires_grad and not name.startswith(early)}
    assert not {type(callback) for callback in static.trainer.callbacks} & {
        EarlyExit,
        ExitWeights,
        BidirectionalSparsity,
    }


@pytest.mark.parametrize("below", ["adaptformer", "lora"])
def test_adapter_replaces_another_kind(below, task, built):
    """jsonargparse alone would keep the targets of the kind below."""
    alone = built("fit", *stacked("vtab"), *small(), *task, "--model.adapter=RepAdapter").model.hparams["adapter"]
    for over in (["--model.adapter=RepAdapter"], ["--model.adapter", "RepAdapter"]):
        cli = built("fit", *stacked("vtab", below), *small(), *task, *over)
        assert cli.model.hparams["adapter"] == alone
    file = built("fit", *stacked("vtab", below, "repadapter"), *small(), *task).model.hparams["adapter"]
    assert file == built("fit", *stacked("vtab", "repadapter"), *small(), *task).model.hparams["adapter"]


def test_adapter_of_the_same_kind_is_changed(task, built):
    more = ["--model.adapter=AdaptFormer", "--model.adapter.scale=0.3"]
    adapter = built("fit", *stacked("vtab", "adaptformer"), *small(), *task, *more).model.hparams["adapter"]
    assert (adapter["init_args"]["bottleneck"], adapter["init_args"]["scale"]) == (64, 0.3)


# ---- what the files hold


def test_vtab_learning_rate(task, built):
    schedule = built("fit", *stacked("vtab"), *small(), *task).model.lr_schedule
    assert schedule == Warmup(0.1, 1e-3, then=Cosine(1.0, 1e-2))
    rates = [1e-3 * schedule(epoch / 100) for epoch in (0, 10, 100)]
    assert rates == pytest.approx([1e-6, 1e-3, 1e-5])


def test_published_scales_name_every_task():
    scales = read("vtab_scales")
    assert set(scales) == {"adapter", "adaptformer", "convpass", "lora", "repadapter"}  # searched by task
    assert all(list(of_kind) == list(VTAB_TASKS) for of_kind in scales.values())
    assert all(scale > 0 for of_kind in scales.values() for scale in of_kind.values())
    assert scales["adapter"] == scales["adaptformer"]
    assert (scales["lora"]["kitti"], scales["repadapter"]["kitti"], scales["adapter"]["dtd"]) == (10, 5, 0.01)


def test_quickstart_reads_images_as_its_backbone():
    config = read("quickstart")
    assert config["model"]["backbone"] in packaged.names()
    assert config["model"]["pretrained"] is True
    name = config["model"]["backbone"]
    about = json.loads((packaged.FOLDER / f"{name}.json").read_text())
    data = Shapes(**config["data"]["init_args"])
    data.take_preprocessing(own_preprocessing(create_backbone(name, 8), name), trained=False)
    assert about["preprocess"].items() <= data.preprocessing.items()
