"""``dynadapter calibrate``: results against the pure functions, files, and errors."""

import copy
import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from commands import refused
from jsonargparse import Namespace
from PIL import Image
from test_calibrate import lost
from test_data_vtab import make as make_vtab
from tiny import make_classifier
from torch import Tensor

from dynadapter import load
from dynadapter.adapters import AdaptFormer, LoRA, adapter_layers
from dynadapter.calibrate import (
    COMBINES,
    KINDS,
    SEARCHES,
    Goal,
    curve,
    evaluate,
    fit_temperatures,
    solve,
    with_guarantee,
)
from dynadapter.calibrate.report import temperatures
from dynadapter.cli import main
from dynadapter.cli.calibrate import Combine, Kind, Search, Settings, _check_mergeable, calibrate
from dynadapter.cli.calibration_images import check_images, some_images
from dynadapter.cli.errors import Mistake
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.data import Shapes, VTAB1k
from dynadapter.exits.combining import Combined, predicting
from dynadapter.exits.policies import Margin, Never, Policy
from dynadapter.serve.bundle import bundle_from_classifier
from dynadapter.spec import plain, restore
from dynadapter.training.callbacks.stacked_logits import StackedLogits
from dynadapter.training.module import ExitClassifier

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def stacked(trained: Path) -> tuple[Tensor, Tensor, ExitCosts]:
    """Return logits and targets of the validation images from a plain loop, and the costs."""
    model = ExitClassifier.load_from_checkpoint(trained, map_location="cpu").eval()
    loader = Shapes(image_size=32, batch_size=48, normalization="half").val_dataloader()
    with torch.no_grad():
        seen = [(model(images), targets) for images, targets in loader]
    costs = exit_costs(model.net, 32)
    return torch.cat([logits for logits, _ in seen], 1), torch.cat([targets for _, targets in seen]), costs


def command(checkpoint: Path) -> list[str]:
    return ["calibrate", "--ckpt_path", str(checkpoint), *QUIET]


def run(checkpoint: Path, *args: str) -> None:
    main([*command(checkpoint), *args])


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "calibration.json").read_text())


def agrees(written: dict[str, Any], logits: Tensor, targets: Tensor, costs: ExitCosts, **options: Any) -> None:
    """Compare what is written with the pure functions on the logits of a plain loop."""
    policy = restore(written["policy"], Policy)
    outcome = evaluate(policy, logits, targets, costs.macs, static=costs.static)
    one = written["calibration"]
    assert (one["cost"], one["accuracy"], tuple(one["shares"])) == (outcome.cost, outcome.accuracy, outcome.shares)
    assert one["lost"] == lost(policy, logits, targets).mean().item()
    assert one["accuracy_last_exit"] == (logits[-1].argmax(-1) == targets).double().mean()
    found = solve(logits, targets, costs.macs, static=costs.static, samples="validation images", **options)
    assert found.found.policy == policy
    assert written["cross_fitted"] == plain(found.cross_fitted)
    assert tuple(written["temperatures"]) == temperatures(policy, len(logits))
    assert tuple(written["notes"]) == found.notes
    assert (written["samples"], written["goal"]) == (len(targets), found.goal.given)


# ---- precision


def test_other_precision_is_noted(checkpoint, tmp_path):
    """`predict` runs in 32 bits."""
    run(checkpoint, "--goal.cost=0.8", "--trainer.precision=bf16-mixed", f"--out={tmp_path / 'out'}")
    assert any("trainer.precision=bf16-mixed; predict, serve" in note for note in result(tmp_path / "out")["notes"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--goal.risk=0.5", "--trainer.precision=bf16-mixed"], "goal.risk is guaranteed for the network of predict"),
        (
            ["--goal.cost=0.8", "--merge=true", "--bundle=never", "--trainer.precision=bf16-true"],
            "adapters cannot be merged",
        ),
    ],
)
def test_unsuitable_precision(checkpoint, capsys, args, said):
    line = refused([*command(checkpoint), *args], capsys)
    assert said in line
    assert line.endswith("give --trainer.precision 32-true")


# ---- goals


def test_goal_cost_with_bundle(checkpoint, stacked, tmp_path, capsys):
    logits, targets, costs = stacked
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    run(checkpoint, "--goal.cost=0.8", "--search=one_threshold", f"--out={out}", f"--bundle={bundle}")
    printed = capsys.readouterr().out
    for words in ("cost at most 0.8 of static", "cross-fitted", "exit 1, after block 1", "temperature", str(out)):
        assert words in printed
    assert "confidence_0.9" not in printed  # the default policy of a test

    written = result(out)
    assert written["calibration"]["cost"] <= 0.8
    assert tuple(written["temperatures"]) == fit_temperatures(logits, targets)
    assert "10 folds, each class alike (seed 0)" in written["protocol"]
    agrees(written, logits, targets, costs, goal=Goal(cost=0.8), searches=("one_threshold",))

    with (out / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = curve(logits, targets, costs.macs, prediction=restore(written["policy"], Policy), static=costs.static)
    points = [*expected.routed, *expected.anytime]
    assert [float(row["cost"]) for row in rows] == [point.cost for point in points]
    assert [float(row["accuracy"]) for row in rows] == [point.accuracy for point in points]
    assert [float(row["share_exit1"]) for row in rows] == [point.shares[0] for point in points]

    with Image.open(out / "curve.png") as picture:
        assert picture.size == (900, 600)

    shipped = load(bundle)
    assert shipped.config.policy == restore(written["policy"], Policy)
    assert shipped.config.measured["accuracy"] == written["cross_fitted"]["accuracy"]
    assert "validation images, cross-fitted" in (bundle / "README.md").read_text()


def test_flops_calibrate_and_bundle_agree(checkpoint, stacked, tmp_path, capsys):
    """An image costs the same in every command, and the last exit costs over 100 % of static."""
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    main(["flops", "--ckpt_path", str(checkpoint)])
    counted = re.findall(r"│\s+([\d.]+%)\s+│", capsys.readouterr().out)
    run(checkpoint, "--goal.risk=0.001", f"--out={out}", f"--bundle={bundle}")  # which nothing reaches
    written, costs = result(out), stacked[2]
    assert restore(written["costs"], ExitCosts) == load(bundle).costs == costs
    assert counted == [f"{share:.1%}" for share in costs.relative]
    with (out / "curve.csv").open(newline="") as file:
        alone = {row["policy"]: float(row["cost"]) for row in csv.DictReader(file)}
    assert [alone[f"exit {k}"] for k in (1, 2, 3)] == pytest.approx(costs.relative)
    assert written["cross_fitted"]["shares"] == [0, 0, 1]
    assert written["cross_fitted"]["cost"] == pytest.approx(costs.relative[-1])
    assert costs.relative[-1] > 1


def test_merged_bundle_replaces_bundle(checkpoint, stacked, tmp_path, capsys):
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    net = ExitClassifier.load_from_checkpoint(checkpoint, map_location="cpu").eval().net
    bundle_from_classifier(ExitClassifier.load_from_checkpoint(checkpoint, map_location="cpu"), bundle, policy=Never())
    assert not load(bundle).config.merged
    run(checkpoint, "--goal.cost=0.8", f"--out={out}", f"--bundle={bundle}", "--merge=true", "--overwrite=true")
    printed, written, shipped = capsys.readouterr().out, result(out), load(bundle)
    assert shipped.config.merged
    assert shipped.config.whole
    assert not adapter_layers(shipped.net.backbone)
    assert shipped.config.policy == restore(written["policy"], Policy)
    assert shipped.config.proof is not None
    assert shipped.config.proof.images == 64
    line = f"merged: on 64 validation images the logits differ by at most {shipped.config.proof.difference:.1e} of"
    assert line in printed
    # The costs, those of the goal included, are of the merged network.
    assert shipped.costs == exit_costs(copy.deepcopy(net).merge(), 32)
    assert shipped.costs.macs < stacked[2].macs
    agrees(written, stacked[0], stacked[1], shipped.costs, goal=Goal(cost=0.8))
    images = torch.stack([image for image, _ in Shapes(image_size=32, normalization="half").dataset("val")])
    with torch.no_grad():
        torch.testing.assert_close(shipped.net(images), net(images), atol=1e-4, rtol=1e-4)


def test_images_to_compare_on_are_spread(tmp_path):
    data = Shapes(image_size=32, normalization="half")
    images, some = data.dataset("val"), some_images(data, "val")
    assert len(some) == 64
    assert all(torch.equal(some[k], images[k * len(images) // 64][0]) for k in range(64))
    vtab = VTAB1k(make_vtab(tmp_path), "toys", split="train800")
    assert len(some_images(vtab, "val")) == len(vtab.dataset("val")) == 2


def test_goal_accuracy_drop_by_margin(checkpoint, stacked):
    args = ["--goal.accuracy_drop=5", "--policy=margin", "--search=thresholds", "--combine=geometric", "--seed=3"]
    run(checkpoint, *args, "--temperatures=false")
    written = result(checkpoint.parents[2] / "calibrate_0")
    options: dict[str, Any] = {"kind": KINDS["margin"], "searches": ("thresholds",), "combines": ("geometric",)}
    policy = restore(written["policy"], Policy)
    assert isinstance(policy, Combined)
    assert isinstance(policy.policy, Margin)
    assert written["temperatures"] == [1, 1, 1]
    agrees(written, *stacked, goal=Goal(accuracy_drop=5), seed=3, with_temperatures=False, **options)


def test_goal_risk(checkpoint, stacked, tmp_path):
    """All images certify: no temperature is fitted."""
    logits, targets, costs = stacked
    run(checkpoint, "--goal.risk=0.2", "--goal.confidence=0.8", "--policy=entropy", f"--out={tmp_path / 'out'}")
    written = result(tmp_path / "out")
    options: dict[str, Any] = {"kind": KINDS["entropy"], "static": costs.static, "comparisons": 3}
    tried = [
        with_guarantee(logits, targets, costs.macs, 0.2, 0.8, prediction=predicting(by), **options) for by in COMBINES
    ]
    found = min(tried, key=lambda one: one.cost)
    assert restore(written["policy"], Policy) == found.policy
    assert written["goal"] == {"risk": 0.2, "confidence": 0.8}
    assert written["calibration"]["lost"] == found.risk
    agrees(written, logits, targets, costs, goal=Goal(risk=0.2, confidence=0.8), kind=KINDS["entropy"])


def test_reference_is_run_on_the_same_images(checkpoint, stacked, tmp_path, capsys):
    """The network itself as its own reference: as without one."""
    twin, out = shutil.copy(checkpoint, tmp_path / "twin.ckpt"), tmp_path / "out"
    run(checkpoint, "--goal.accuracy_drop=2", f"--goal.reference={twin}", f"--out={out}")
    written = result(out)
    assert written["goal"] == {"accuracy_drop": 2, "reference": str(twin)}
    assert written["cross_fitted"]["accuracy_reference"] == written["cross_fitted"]["accuracy_last_exit"]
    found = solve(*stacked[:2], stacked[2].macs, Goal(accuracy_drop=2), static=stacked[2].static)
    assert restore(written["policy"], Policy) == found.found.policy
    printed = capsys.readouterr().out
    assert "accuracy of the reference" in printed
    assert "interval of 95 %" in printed
    args = [f"--goal.reference={twin}", "--data_split=train", "--accept_optimistic_numbers=true"]
    line = refused([*command(checkpoint), "--goal.accuracy_drop=2", *args], capsys)
    assert "was trained on 1000 of the 1000 training images" in line


def test_bundle_as_a_reference(checkpoint, tmp_path, capsys):
    bundle, out = tmp_path / "twin", tmp_path / "out"
    twin = ExitClassifier.load_from_checkpoint(checkpoint, map_location="cpu")
    preprocessing = Shapes(image_size=32, normalization="half").preprocessing
    bundle_from_classifier(twin, bundle, policy=Never(), preprocessing=preprocessing)
    run(checkpoint, "--goal.accuracy_drop=2", f"--goal.reference={bundle}", f"--out={out}")
    written = result(out)
    assert written["cross_fitted"]["accuracy_reference"] == written["cross_fitted"]["accuracy_last_exit"]
    note = f"the images of the training of goal.reference={bundle} are unknown, and may be among these"
    assert note in written["notes"]
    assert f"note: {note}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["foreign", "changed", "missing", "tensors only", "other classes"])
def test_wrong_reference_costs_no_pass(kind, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dynadapter.cli.calibrate.stack_logits", lambda *_: pytest.fail("the images were run"))
    place, words = tmp_path / "other.ckpt", "goal.reference="
    if kind == "foreign":
        torch.save({"state_dict": {"weight": torch.zeros(1)}}, place)
        words = "other.ckpt: this checkpoint was not written by dynadapter"
    elif kind == "changed":
        content = bytearray(checkpoint.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 256] = bytes(
            byte ^ 1 for byte in content[middle : middle + 256]
        )  # more than the padding between two parts
        place.write_bytes(content)
        words = "other.ckpt is not a readable checkpoint: it is cut off or damaged"
    elif kind == "missing":
        words = f"goal.reference={place} does not exist"
    elif kind == "tensors only":
        bundle_from_classifier(ExitClassifier.load_from_checkpoint(checkpoint), place, policy=Never())
        config = json.loads((place / "config.json").read_text()) | {"preprocessing": None, "checksum": None}
        (place / "config.json").write_text(json.dumps(config))
        words = f"goal.reference={place} takes only tensors, no image files"
    else:
        content = torch.load(checkpoint, weights_only=True)
        content["dynadapter"]["class_names"][0] = "another"
        torch.save(content, place)
        words = f"goal.reference={place} has other classes"
    line = refused([*command(checkpoint), "--goal.accuracy_drop=2", f"--goal.reference={place}"], capsys)
    assert words in line


def test_choices_are_all_kinds():
    assert get_args(Kind) == tuple(KINDS)
    assert get_args(Search) == ("auto", *SEARCHES)
    assert get_args(Combine) == ("auto", *COMBINES)


# ---- other splits


def test_other_splits_need_consent(checkpoint, tmp_path, capsys):
    for split, samples in (("test", 400), ("train", 1000)):
        out = tmp_path / split
        args = ["--goal.cost=0.9", f"--data_split={split}", f"--out={out}"]
        assert "--accept_optimistic_numbers true" in refused([*command(checkpoint), *args], capsys)
        run(checkpoint, *args, "--accept_optimistic_numbers=true")
        written = result(out)
        assert written["samples"] == samples
        assert written["data_split"] == split
        assert written["notes"][-1].startswith(f"calibrated on {'test' if split == 'test' else 'training'} images")


# ---- mistakes


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ("", ("there is no goal", "goal.cost=0.5", "goal.accuracy_drop", "goal.risk")),
        ("--goal.cost=0.5 --goal.risk=0.1", ("goal.cost and goal.risk are 2 goals",)),
        ("--goal.cots=0.5", ("'goal.cots'", "'goal.cost'")),
        ("--goal.cost=half", ("goal.cost", "a number", "'half'")),
        ("--goal.risk=0.1 --goal.confidence=1", ("goal.confidence=1", "between 0 and 1")),
        ("--goal.cost=0.5 --policy=confidance", ("policy", "'confidance'", "'confidence'")),
        ("--goal.cost=0.5 --data_split=val200", ("data_split", "val, test, train")),
        ("--goal.cost=0.5 --bundle={W}", ("exists", "bundle=", "--overwrite true")),
        ("--goal.cost=0.5 --bundle={W} --overwrite=true", ("holds calibration.json", "--overwrite true replaces")),
        ("--goal.cost=0.5 --merge=true", ("merge is a setting of the bundle", "--bundle FOLDER")),
        ("--goal.cost=0.5 --out={W}", ("calibration.json already",)),
        ("--goal.cost=0.5 --ckpt_path=null --data=Shapes", ("calibrate needs a checkpoint",)),
        ("--goal.cost=0.01", ("goal.cost=0.01 cannot be reached", "of static; give that or more")),
        ("--goal.accuracy_drop=-99", ("goal.accuracy_drop=-99 cannot be reached", "give at least")),
        (
            "--goal.cost=0.9 --trainer.limit_val_batches=1 --data.batch_size=1",
            ("one image cannot calibrate and measure",),
        ),
    ],
)
def test_mistake_is_one_line(args, names, checkpoint, tmp_path, capsys):
    world = tmp_path / "world"
    world.mkdir()
    (world / "calibration.json").write_text("{}")
    line = refused([*command(checkpoint), *args.replace("{W}", str(world)).split()], capsys)
    assert all(name in line for name in names), line
    assert not list(checkpoint.parents[2].glob("calibrate_*"))


@pytest.mark.parametrize(
    ("goal", "changes", "words"),
    [
        ({"cost": 0.0}, {}, "goal.cost=0.0 must be above 0"),
        ({"cost": 50.0}, {}, "goal.cost=50.0 must be above 0 and at most 1: a fraction of static, e.g. 0.5 for 50 %"),
        ({"cost": 0.5, "confidence": 0.9}, {}, "goal.confidence belongs to goal.risk"),
        ({"risk": 0.1}, {"search": "thresholds"}, "guarantee tests policies that are fixed beforehand"),
        ({"risk": 0.1, "reference": "static.ckpt"}, {}, "goal.risk is against the last exit; leave goal.reference out"),
        (
            {"cost": 0.5},
            {"search": "thresholds", "policy": "patience"},
            "search=thresholds does not fit policy=patience",
        ),
        ({"cost": 0.5}, {"seed": -1}, "seed=-1 must be at least 0"),
        ({"cost": 0.5}, {"out": __file__}, "exists and is not a folder"),
        ({"cost": 0.5}, {"out": "x/../new", "bundle": "new"}, "out=x/../new lies in bundle=new, which is written as"),
        ({"cost": 0.5}, {"out": "new/results", "bundle": "new"}, "out=new/results lies in bundle=new"),
    ],
)
def test_invalid_settings_raise(goal, changes, words):
    """Checked without the command line, which takes long to start."""
    settings = vars(Settings(None, "last.ckpt")) | changes
    none = dict.fromkeys(Goal.__dataclass_fields__)
    with pytest.raises(Mistake, match=re.escape(words)):
        Settings.read(Namespace(**settings | {"goal": Namespace(**{**none, **goal})}))


def test_unmergeable_adapter_raises():
    _check_mergeable(make_classifier(adapter=LoRA(rank=2)))
    _check_mergeable(make_classifier(adapter=None))
    with pytest.raises(Mistake, match="AdaptFormer cannot be merged into the backbone; leave --merge out"):
        _check_mergeable(make_classifier(adapter=AdaptFormer(bottleneck=2)))


def test_no_validation_images_raises(tmp_path):
    data = VTAB1k(make_vtab(tmp_path), "toys", split="train800val200")
    with pytest.raises(Mistake, match=r"VTAB1k has no validation images; calibrate .* trained with split: train800"):
        check_images(data, "val", "last.ckpt")


def test_several_devices_raise():
    class Several:
        world_size = 2

    with pytest.raises(Mistake, match=r"--trainer\.devices 1"):
        calibrate(Several(), None, Shapes(), Settings(Goal(cost=0.5), "last.ckpt"))  # type: ignore[arg-type]


def test_stacked_logits_of_half_precision():
    stacked = StackedLogits()
    outputs = {"logits": torch.ones(2, 3, 4, dtype=torch.bfloat16), "targets": torch.zeros(3)}
    stacked.on_test_batch_end(None, None, outputs, None, 0)
    assert stacked.logits.dtype == torch.float32
