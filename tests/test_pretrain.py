"""tools/pretrain: data, recipe, resuming, early classifiers, starting weights, and the files that a run leaves."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor

from dynadapter import ExitNet, LinearHeads, create_backbone
from tools.pretrain.__main__ import main
from tools.pretrain.export import card
from tools.pretrain.images import read
from tools.pretrain.learner import Learner
from tools.pretrain.model import soft_loss, supervised_loss
from tools.pretrain.recipe import Recipe

ROOT = Path(__file__).parents[1]
SHAPE: dict[str, Any] = {"batch": 4, "lr": 1e-3, "width": 16, "heads": 2, "depth": 2, "size": 12, "patch": 6}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images twice: in a folder for each class, and as mosaics."""
    root, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            pixels = draw.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
            (root / "folder" / split / name).mkdir(parents=True)
            (root / "mosaic" / split).mkdir(parents=True, exist_ok=True)
            for k, one in enumerate(pixels):
                Image.fromarray(one).save(root / "folder" / split / name / f"{k}.png")
            grid = pixels.reshape(2, -1, 12, 12, 3).swapaxes(1, 2).reshape(24, -1, 3)
            Image.fromarray(grid).save(root / "mosaic" / split / f"{name}.png")
    return root


def options(source: Path, out: Path, more: str = "") -> list[str]:
    """The options of a run that takes some tenths of a second."""
    common = "--size 12 --patch 6 --depth 2 --batch 4 --epochs 2 --precision fp32 --device cpu --threads 1"
    for name, value in (("--width", 16), ("--heads", 2)):
        common += "" if name in more else f" {name} {value}"
    return ["--data", str(source / "folder"), "--out", str(out), *f"{common} {more}".split()]


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run the program, which must end with one line and exit code 2; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pretrain: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def earlier(source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a run without early classifiers."""
    out = tmp_path_factory.mktemp("earlier")
    main(options(source, out))
    return out / "micro.safetensors"


def timm_model(**shape: Any) -> Any:
    given = {"img_size": 12, "patch_size": 6, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 2}
    return timm.create_model("vit_tiny_patch16_224", **(given | shape))


def learner(start: Path | None = None, **changes: Any) -> Learner:
    return Learner(Recipe(**(SHAPE | changes)), 2, CPU, compiled=False, start=start)


# ---- data and recipe


def test_folders_equal_mosaics(source):
    (train, val, names), other = read(source / "folder", 12), read(source / "mosaic", 12)
    assert names == other[2] == ["cat", "dog"]
    assert torch.equal(train.pixels, other[0].pixels)
    assert torch.equal(val.pixels, other[1].pixels)
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    with pytest.raises(ValueError, match="is not a grid of tiles of 7 x 7"):
        read(source / "mosaic", 7)
    with pytest.raises(ValueError, match="has no folder 'train'"):
        read(source, 12)


@pytest.mark.parametrize("kind", ["folder", "mosaic"])
def test_class_names_keep_their_dots(kind, source, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number, path in enumerate(sorted((source / kind / split).iterdir()), 1):
            (tmp_path / split / f"00{number}.{path.name}").symlink_to(path)
    train, _, names = read(tmp_path, 12)
    assert names == ["001.cat", "002.dog"]
    assert torch.equal(train.pixels, read(source / kind, 12)[0].pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_every": 2}, "--exit_every 2 must be from 0 to below --depth 2"),
        ({"exit_weight": -1.0}, "--exit_weight -1.0 must be 0 or more"),
        ({"exit_teaching": 1.5}, "--exit_teaching 1.5 must be a fraction from 0 to 1"),
        ({"drop_path": 1.0}, "--drop_path 1.0 must be a fraction from 0 to less than 1"),
        ({"lr": float("nan")}, "--lr nan must be above 0"),
        ({"patch": 5}, "--size 12 must be a multiple of --patch 5"),
    ],
)
def test_invalid_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**(SHAPE | changes))


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--exit_every" in capsys.readouterr().out


# ---- a run that is stopped


@pytest.mark.parametrize(
    "more",
    ["--mix 0.5 --ops 0.5 --drop_path 0.1", "--exit_every 1 --mix 0.5 --token_merging 0.5 --proportional --muon"],
    ids=["plain", "prepared"],
)
def test_stopped_run_resumes_bit_for_bit(source, tmp_path, capsys, more):
    main(options(source, tmp_path / "whole", more))
    for _ in range(3):
        main(options(source, tmp_path / "parts", f"{more} --stop_after 0.000001"))
        assert "stopped and saved" in capsys.readouterr().out
    main(options(source, tmp_path / "parts", more))
    whole, parts = (tmp_path / name / "micro.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    logs = [(path.parent / "log.jsonl").read_text().splitlines() for path in (whole, parts)]
    same = [[(one["epoch"], one["loss"], one["val_acc"]) for one in map(json.loads, log)] for log in logs]
    assert same[0] == same[1] != []
    ends = [torch.load(file.with_name("checkpoint.pt"), weights_only=True)["learner"] for file in (whole, parts)]
    for name, one in ends[0].get("early", {}).items():
        assert torch.equal(one, ends[1]["early"][name])
    assert "was begun with width=16, not 32" in refused(capsys, options(source, whole.parent, f"{more} --width 32"))


def test_files_of_a_run_fit_each_other(source, tmp_path):
    main(options(source, tmp_path, "--exit_every 1"))
    weights, about = tmp_path / "micro.safetensors", json.loads((tmp_path / "micro.json").read_text())
    assert about["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    found, model = safetensors.torch.load_file(weights), timm_model()
    assert {name: one.shape for name, one in found.items()} == {n: p.shape for n, p in model.state_dict().items()}
    counts = about["parameters"]
    assert sum(p.numel() for p in model.parameters()) == counts["backbone"] + counts["classifier"]
    backbone = create_backbone(about["architecture"], 3, weights=weights, **about["timm_args"])
    assert backbone(torch.randn(1, 3, 12, 12)).shape == (1, 3)
    text = (tmp_path / "micro.md").read_text()
    assert all(about[name] in text for name in ("sha256", "fingerprint"))
    assert "early exits: classifiers after every 1 blocks" in text


def test_shipped_backbone_fits_its_files():
    folder = ROOT / "tools" / "pretrain" / "backbones"
    about = json.loads((folder / "micro_plain.json").read_text())
    assert hashlib.sha256((folder / "micro_plain.safetensors").read_bytes()).hexdigest() == about["sha256"]
    assert (folder / "micro_plain.md").read_text() == card(about)
    model = create_backbone(about["architecture"], 3, weights=folder / "micro_plain.safetensors", **about["timm_args"])
    classifier = sum(p.numel() for p in model.head.parameters())
    assert sum(p.numel() for p in model.parameters()) - classifier == about["parameters"]["backbone"]


# ---- early classifiers and token merging


@pytest.mark.parametrize("mixed", [False, True])
def test_early_loss_by_hand(mixed):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    labels, own = torch.tensor([3, 0, 0, 4]), torch.tensor([1.0, 0.7, 0.2, 0.5], dtype=torch.float64)
    recipe = Recipe(**SHAPE, smoothing=0.1, exit_every=1, exit_weight=0.3, exit_teaching=0.25)
    logs, last = logits.log_softmax(-1), logits[-1].softmax(-1)
    expected = 0.0
    for place in range(3):
        for k in range(4):
            wanted = torch.full((5,), 0.1 / 5, dtype=torch.float64)
            wanted[labels[k]] += 0.9 * (own[k] if mixed else 1)
            wanted[labels[3 - k]] += 0.9 * (1 - own[k] if mixed else 0)
            labelled = -(wanted * logs[place, k]).sum()
            distance = (last[k] * (logs[2, k] - logs[place, k])).sum()
            expected += (labelled if place == 2 else 0.3 * (0.75 * labelled + 0.25 * distance)) / 4
    given = logits.clone().requires_grad_()
    loss = supervised_loss(given, labels, own if mixed else None, recipe)
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    loss.backward()  # the last classifier gets no gradient from the early ones
    alone = logits[-1].clone().requires_grad_()
    soft_loss(alone, labels, own if mixed else None, 0.1).backward()
    torch.testing.assert_close(given.grad[-1], alone.grad)


def test_early_losses_reach_earlier_blocks():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 12, 12), generator=draw, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])

    def gradients(**changes: Any) -> dict[str, Tensor]:
        one = learner(depth=3, **changes)
        logits = one.supervised(images.float() / 255)
        assert len(logits) == 1 + len(one.supervised.early)
        assert torch.equal(logits[-1], one.model(images.float() / 255))
        supervised_loss(logits, labels, None, one.recipe).backward()
        return {name: parameter.grad for name, parameter in one.model.named_parameters()}

    without, weightless, weighty = gradients(), gradients(exit_every=1, exit_weight=0.0), gradients(exit_every=1)
    assert all(torch.equal(one, weightless[name]) for name, one in without.items())
    for name, one in without.items():
        behind = name.startswith(("blocks.2.", "norm.", "head."))
        assert torch.equal(one, weighty[name]) == behind, name


@pytest.mark.parametrize("proportional", [False, True])
def test_token_merging_equals_exitnet(proportional):
    one = learner(depth=5, size=24, token_merging=1.0, proportional=proportional)
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert one.mergings
    for merging in one.mergings:
        net = ExitNet(one.model, LinearHeads(), 5, (), merging).eval()
        one.supervised.eval().token_merging = merging
        torch.testing.assert_close(one.supervised(images)[-1], net(images)[-1])


def test_step_merges_tokens_at_its_share():
    one, labels = learner(depth=5, token_merging=0.5), torch.tensor([0, 1, 1, 0])
    one.schedule("fp32", 40)
    merged = []
    for number in range(40):
        one.step(torch.zeros(4, 3, 12, 12, dtype=torch.uint8), labels, number)
        merged.append(one.supervised.token_merging)
    assert 8 < sum(kind is not None for kind in merged) < 32


# ---- weights to start with


def test_start_from_an_earlier_run(source, earlier, tmp_path, capsys):
    more = f"--start {earlier} --exit_every 1"
    one = learner(earlier, exit_every=1)
    for model in (one.model, one.ema.module):
        for name, tensor in safetensors.torch.load_file(earlier).items():
            assert torch.equal(model.state_dict()[name], tensor.float())
    main(options(source, tmp_path / "on", f"{more} --stop_after 0.000001"))
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(timm_model().state_dict(), other)
    for elsewhere in (f"--start {other}", ""):
        assert "was begun with start=" in refused(
            capsys, options(source, tmp_path / "on", f"{elsewhere} --exit_every 1")
        )
    main(options(source, tmp_path / "on", more))
    digest = hashlib.sha256(earlier.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "on" / "micro.json").read_text())["start"] == digest
    assert digest[:12] in (tmp_path / "on" / "micro.md").read_text()


@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        ("missing", "", "missing.safetensors cannot be read"),
        ("damaged", "", "damaged.safetensors cannot be read"),
        ("foreign", "", "is another model's: blocks.0"),
        ("earlier", "--width 8", "is another model's"),
        ("earlier", "--width 32", "is another model's"),
    ],
)
def test_bad_start_is_refused_in_one_line(source, earlier, tmp_path, capsys, file, more, message):
    (tmp_path / "damaged.safetensors").write_bytes(earlier.read_bytes()[:-1])
    safetensors.torch.save_file({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    start = earlier if file == "earlier" else tmp_path / f"{file}.safetensors"
    assert message in refused(capsys, options(source, tmp_path / "out", f"--start {start} {more}"))
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
