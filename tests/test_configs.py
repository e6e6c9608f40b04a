"""The config files that ship: each trains, alone or laid over vtab.yaml, and says what it claims to say."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dynadapter import Heads, Schedule, Weighting
from dynadapter.backbones import packaged
from dynadapter.cli import main
from dynadapter.cli.app import DynCLI
from dynadapter.spec import restore
from dynadapter.training.callbacks import BidirectionalSparsity, EarlyExit, ExitWeights
from dynadapter.training.schedules import Cosine, Warmup

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
ALONE = ("quickstart", "vtab")
KINDS = ("adapter", "lora", "repadapter", "adaptformer")
SMALL = [
    "--model.backbone=vit_tiny_patch16_224",
    "--model.pretrained=false",
    "--model.backbone_args={patch_size: 16, embed_dim: 24, depth: 5, num_heads: 3}",
    "--model.every=1",
    "--trainer.accelerator=cpu",
    "--trainer.fast_dev_run=true",
]
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments for a task of generated images, in the layout of VTAB-1k."""
    root = tmp_path_factory.mktemp("data")
    (root / "colours" / "images").mkdir(parents=True)
    for k in range(8):
        Image.new("RGB", (20, 24), (30 * k, 255 - 30 * k, 60)).save(root / "colours" / "images" / f"{k}.png")
    lines = [f"images/{k}.png {k % 4}" for k in range(8)]
    for name in ("train800", "val200", "train800val200", "test"):
        (root / "colours" / f"{name}.txt").write_text("\n".join(lines))
    return [f"--data.root={root}", "--data.task=colours", "--data.image_size=32"]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch):
    def build(*args: str) -> DynCLI:
        made: list[DynCLI] = []
        monkeypatch.setattr(DynCLI, "_run_subcommand", lambda self, subcommand: made.append(self))
        main(list(args))
        return made[0]

    return build


def stacked(*names: str) -> list[str]:
    return [f"--config={CONFIGS / name}.yaml" for name in names]


def name_of(file: Path) -> str:
    return file.relative_to(CONFIGS).with_suffix("").as_posix()


def test_every_file_is_tested():
    assert {name_of(file) for file in FILES} == {*ALONE, *KINDS, "paper", "static"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_trains_in_the_small(file, task, recwarn):
    names = [file.stem] if file.stem in ALONE else ["vtab", name_of(file)]
    main(["fit", *stacked(*names), *SMALL, *(task if "vtab" in names else ["--data.image_size=32"])])
    assert not [str(warning.message) for warning in recwarn if "discard" in str(warning.message)]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_has_comments_that_say_how_to_run_it(file):
    head = [line for line in file.read_text().splitlines()[:4] if line.startswith("#")]
    assert any(f"configs/{name_of(file)}.yaml" in line and "dynadapter fit" in line for line in head)


@pytest.fixture
def benchmark(monkeypatch) -> Any:
    """The recipes of benchmarks/transfer.py."""
    monkeypatch.setattr(sys, "path", [str(CONFIGS.parent / "benchmarks"), *sys.path])
    return importlib.import_module("recipes")


def test_paper_is_the_recipe_of_the_paper(benchmark):
    recipe, config = benchmark.recipe(benchmark.PAPER), yaml.safe_load((CONFIGS / "paper.yaml").read_text())
    assert restore(config["model"]["heads"], Heads) == recipe.heads
    assert (config["model"]["token_merging"], config["model"]["distillation"]) == (
        recipe.token_merging,
        recipe.distillation,
    )
    assert restore(config["exit_weights"]["weighting"], Weighting) == recipe.weighting
    found = [restore(config["sparsity"][name], Schedule | None) for name in ("shallow", "deep", "keep")]
    assert found == [recipe.shallow, recipe.deep, recipe.keep]


def test_one_adapter_over_another_is_that_one_alone(task, built):
    """jsonargparse would keep the targets of the one below."""
    alone = built("fit", *stacked("vtab"), *SMALL, *task, "--model.adapter=RepAdapter").model.hparams["adapter"]
    for below in ("adaptformer", "lora"):
        for over in (["--model.adapter=RepAdapter"], ["--model.adapter", "RepAdapter"]):
            cli = built("fit", *stacked("vtab", below), *SMALL, *task, *over)
            assert cli.model.hparams["adapter"] == alone
        file = built("fit", *stacked("vtab", below, "repadapter"), *SMALL, *task).model.hparams["adapter"]
        assert file == built("fit", *stacked("vtab", "repadapter"), *SMALL, *task).model.hparams["adapter"]


def test_settings_of_the_same_kind_are_laid_over_each_other(task, built):
    more = ["--model.adapter=AdaptFormer", "--model.adapter.scale=0.3"]
    adapter = built("fit", *stacked("vtab", "adaptformer"), *SMALL, *task, *more).model.hparams["adapter"]
    assert adapter["init_args"]["bottleneck"] == 64
    assert adapter["init_args"]["scale"] == 0.3


def test_vtab_is_the_protocol():
    config = yaml.safe_load((CONFIGS / "vtab.yaml").read_text())
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    assert (model["backbone"], model["pretrained"]) == ("vit_base_patch16_224.orig_in21k", True)
    assert model["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 1e-4}}
    expected = {"image_size": 224, "interpolation": "bicubic", "resize": "stretch", "augment": "none", "batch_size": 64}
    assert expected.items() <= data.items()
    assert data["normalization"]  # named
    assert trainer["max_epochs"] == 100


def test_vtab_warms_up_for_ten_epochs_and_ends_at_a_hundredth(task, built):
    schedule = built("fit", *stacked("vtab"), *SMALL, *task).model.lr_schedule
    assert schedule == Warmup(0.1, 1e-3, then=Cosine(1.0, 1e-2))
    rates = [1e-3 * schedule(epoch / 100) for epoch in (0, 10, 100)]
    assert rates == pytest.approx([1e-6, 1e-3, 1e-5])


def test_static_is_the_same_model_without_exits(task, built):
    dynamic = built("fit", *stacked("vtab", "lora"), *SMALL, *task)
    for order in (("vtab", "lora", "static"), ("vtab", "static", "lora")):
        static = built("fit", *stacked(*order), *SMALL, *task)
        assert static.model.net.exit_depths == (5,)
        assert static.model.backbone_hash == dynamic.model.backbone_hash
        trained = {name for name, p in static.model.net.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in dynamic.model.net.named_parameters() if p.requires_grad and "heads." not in n}
        ours = {type(callback) for callback in static.trainer.callbacks}
        assert not ours & {EarlyExit, ExitWeights, BidirectionalSparsity}


def test_quickstart_needs_no_download():
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert config["model"]["backbone"] in packaged.names()
    assert config["model"]["pretrained"] is True
    assert config["data"]["class_path"] == "Digits"


def test_quickstart_gives_the_backbone_images_as_it_was_trained_with():
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    about = json.loads((packaged.FOLDER / f"{config['model']['backbone']}.json").read_text())
    assert about["preprocess"].items() <= config["data"]["init_args"].items()
