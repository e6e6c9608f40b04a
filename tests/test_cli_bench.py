"""``dynadapter bench``: its arms, its numbers, and its errors."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused
from conftest import CLASSES, make_vit
from PIL import Image
from test_bundle import made, save

from dynadapter.adapters import Adapter
from dynadapter.bench import arms, measure
from dynadapter.bench.timing import interleave
from dynadapter.cli import bench, main
from dynadapter.cli.errors import Mistake
from dynadapter.cost import exit_costs
from dynadapter.exits.exit_tokens import ExitTokens
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Never, route
from dynadapter.serve.bundle import load
from dynadapter.serve.bundle.proof import merged_copy

TORCH = "[static, smaller static, unmerged, merged]"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bench") / "bundle")[1]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write a folder of ten images and one broken file."""
    folder = tmp_path / "images"
    (folder / "inside").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for k in range(10):
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("inside" if k % 2 else "") / f"{k}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


def run(bundle: Path, out: Path, *more: str) -> dict[str, Any]:
    """Run the command with few rounds; return what it wrote."""
    main(["bench", "--bundle", str(bundle), "--out", str(out), "--rounds=2", *more])
    return json.loads(out.read_text())


# ---- numbers


def test_given_shares(bundle, tmp_path, capsys):
    shares = [0.5, 0.3, 0.2]
    result = run(bundle, tmp_path / "b.json", f"--shares={shares}", f"--arms={TORCH}", "--batch_sizes=[1,10]")
    printed = capsys.readouterr().out
    for words in (
        "smaller static",
        "unmerged",
        "efficiency",
        "control",
        "CPU seconds of the process",
        "% of static",
        "b.json",
    ):
        assert words in printed
    assert "noise" not in printed  # the shares are those that were set
    assert [batch["batch"] for batch in result["batches"]] == [1, 10]
    assert result["clock"] == "cpu"
    assert {"cpu", "torch", "timm"} <= result["machine"].keys()
    assert result["settings"]["shares"] == shares

    net = merged_copy(load(bundle).net, torch.randn(2, 3, 32, 32), Never())[0]
    for batch in result["batches"]:
        class_first = batch["batch"] >= 4
        costs = exit_costs(net, 32, class_first=class_first)
        assert batch["images"] == 20
        assert batch["static_gmacs"] == costs.static / 1e9
        rows = batch["arms"]
        assert list(rows) == ["static", "smaller static", "unmerged", "merged"]
        assert rows["static"]["gmacs"] == costs.static / 1e9
        assert rows["static"]["speedup"] == rows["static"]["efficiency"] == 1
        merged = rows["merged"]
        assert merged["shares"] == batch["shares"] == shares
        assert merged["gmacs"] == pytest.approx(costs.average(shares) / 1e9)
        assert merged["gmacs_run"] == pytest.approx(costs.average_run(shares) / 1e9)
        assert (merged["gmacs_run"] < merged["gmacs"]) == class_first
        assert merged["cost"] == pytest.approx(costs.average(shares) / costs.static)
        assert merged["mac_speedup"] == pytest.approx(costs.static / costs.average(shares))
        assert merged["efficiency"] == pytest.approx(merged["speedup"] / merged["mac_speedup"])
        assert rows["unmerged"]["gmacs"] > merged["gmacs"]
        for name, row in rows.items():
            calls = [1000 * call for calls in batch["seconds"][name]["wall"] for call in calls]
            assert len(calls) == 2 * 20 // batch["batch"]
            assert min(calls) - 1e-3 <= row["ms_p50"] <= row["ms_p95"] <= max(calls) + 1e-3
            assert row["images_per_second"] == pytest.approx(1000 * len(calls) * batch["batch"] / sum(calls), rel=1e-2)
        spent = batch["seconds"]
        ratios = [sum(a) / sum(b) for a, b in zip(spent["static"]["cpu"], spent["merged"]["cpu"], strict=True)]
        assert merged["speedup"] == pytest.approx(sum(ratios) / 2, rel=1e-2)  # the median of two


def test_smaller_static_costs_what_routing_does(bundle, tmp_path):
    result = run(bundle, tmp_path / "b.json", "--shares=[0.6,0.2,0.2]", "--arms=[smaller_static]", "--batch_sizes=[2]")
    [batch] = result["batches"]
    smaller = batch["arms"]["smaller static"]
    depth = int(smaller["detail"].split()[0])
    net = merged_copy(load(bundle).net, torch.randn(2, 3, 32, 32), Never())[0]
    average = exit_costs(net, 32).average(batch["shares"])
    far = [abs(exit_costs(arms.cut_after(net, d), 32).macs[0] - average) for d in range(1, 7)]
    assert depth == 1 + min(range(6), key=far.__getitem__)
    assert abs(smaller["gmacs"] * 1e9 - average) == pytest.approx(far[depth - 1])


@pytest.mark.parametrize("depth", range(1, 7))
def test_cut_after(depth):
    net = copy.deepcopy(made("vit")[0])  # the shorter network shares its tensors and freezes them
    x = torch.randn(2, 3, 32, 32)
    shallow = arms.cut_after(net, depth)
    with torch.no_grad():
        cut = shallow.at(0)(x)
        if depth in net.exit_depths:
            assert torch.equal(cut, net(x)[net.exit_depths.index(depth)])
        else:
            assert torch.equal(shallow.stage(0, shallow.embed(x)), _blocks(net, depth, x))
    assert not any(layer.training for layer in net.modules())


def test_cut_after_exit_tokens():
    """The heads read exit tokens, which the shorter network does not have."""
    net = ExitNet(make_vit(), ExitTokens(count=2), every=2)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert arms.cut_after(net, 2).at(0)(x).shape == (2, CLASSES)


def _blocks(net: ExitNet, depth: int, x: torch.Tensor) -> torch.Tensor:
    x = net.embed(x)
    for block in net.backbone.blocks[:depth]:  # type: ignore[union-attr, index]
        x = block(x)
    return x


def test_real_images_give_the_shares(bundle, images, tmp_path, capsys):
    result = run(bundle, tmp_path / "b.json", f"--images={images}", "--arms=[merged]", "--batch_sizes=[2]")
    assert "note: 1 images cannot be read and are left out, the first is" in capsys.readouterr().out
    opened = load(bundle)
    files = sorted(images.rglob("[0-9].png"))
    assert len(files) == 10
    with torch.no_grad():
        logits = opened.net(torch.stack([torch.from_numpy(opened.preprocess(Image.open(file))) for file in files]))
    expected = route(opened.policy, logits).bincount(minlength=3) / 10
    assert result["shares_of_all_images"] == pytest.approx(expected.tolist())
    assert result["batches"][0]["shares"] == pytest.approx(expected.tolist())  # 20 images: each of the ten twice
    assert result["images"] == "real"


def test_noise_is_a_note(bundle, tmp_path, capsys):
    result = run(bundle, tmp_path / "b.json", "--arms=[merged]", "--batch_sizes=[1]")
    words = "the images are noise, and exit shares on noise are not real"
    assert words in capsys.readouterr().out
    assert any(words in note for note in result["notes"])
    assert result["images"] == "noise"


def test_unmergeable_adapters(tmp_path, capsys):
    _, place = save(tmp_path / "bundle", kind=Adapter)
    result = run(place, tmp_path / "b.json", "--shares=[0.5,0.3,0.2]", f"--arms={TORCH}", "--batch_sizes=[2]")
    assert list(result["batches"][0]["arms"]) == ["static", "smaller static", "unmerged"]
    printed = capsys.readouterr().out
    assert "note: static and all others keep the adapters: Adapter cannot be merged" in printed
    assert "note: merged is not timed at batch 2: the adapters cannot be merged" in printed


def test_merged_bundle_or_no_adapters(tmp_path):
    net, _source = made("vit")
    merged, proof = merged_copy(net, torch.randn(4, 3, 32, 32), Never())
    _, place = save(tmp_path / "merged", net=merged, merged=True, proof=proof, policy=Never())
    result = run(place, tmp_path / "m.json", "--arms=[unmerged,merged]", "--batch_sizes=[2]")
    assert "unmerged is not timed at batch 2: the bundle was merged" in result["notes"]
    assert list(result["batches"][0]["arms"]) == ["static", "merged"]
    _, place = save(tmp_path / "bare", kind=None)
    result = run(place, tmp_path / "n.json", f"--arms={TORCH}", "--batch_sizes=[2]", "--shares=[0,0,1]")
    assert "unmerged is not timed at batch 2: the bundle has no adapters" in result["notes"]
    assert (
        "smaller static is not timed at batch 2: routing costs nearly as much as the whole backbone, which the "
        "arm static runs" in (result["notes"])
    )


@pytest.mark.slow
def test_other_families_and_half_precision(tmp_path):
    for family in ("swin", "convnext"):
        _, place = save(tmp_path / family, family)
        more = ("--arms=[smaller static, merged]", "--batch_sizes=[4]", "--shares=[0.5,0.3,0.2]")
        [batch] = run(place, tmp_path / f"{family}.json", *more)["batches"]
        assert batch["arms"]["merged"]["shares"] == [0.5, 0.3, 0.2]
        assert batch["exit_gmacs_run"] == batch["exit_gmacs"]
    result = run(
        tmp_path / "swin",
        tmp_path / "half.json",
        "--precision=bf16",
        "--arms=[unmerged, onnx static]",
        "--batch_sizes=[2]",
    )
    assert "unmerged" in result["batches"][0]["arms"]
    assert any("run in float32; leave --precision out" in note for note in result["notes"])


@pytest.mark.slow
def test_onnx(bundle, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    exported = []
    export = arms.export_onnx
    monkeypatch.setattr(arms, "export_onnx", lambda *args, **options: exported.append(1) or export(*args, **options))
    more = ("--shares=[0.5,0.3,0.2]", "--batch_sizes=[2,3]")
    result = run(bundle, tmp_path / "b.json", "--arms=[merged,onnx static,onnx staged]", *more)
    assert len(exported) == 2  # each once, for both batch sizes
    for batch in result["batches"]:
        rows = batch["arms"]
        assert list(rows) == ["static", "merged", "onnx static", "onnx staged"]
        assert rows["onnx staged"]["shares"] == rows["merged"]["shares"]
        assert rows["onnx staged"]["baseline"] == "onnx static"
        assert rows["onnx static"]["mac_speedup"] == 1
    assert not list(tmp_path.glob("dynadapter-bench*"))


def test_failing_arm_is_a_note(bundle, tmp_path, monkeypatch, capsys):
    def broken(*args: Any) -> None:
        raise RuntimeError("no compiler\nand many lines")

    monkeypatch.setitem(arms.BUILDERS, "merged", broken)
    monkeypatch.setattr("dynadapter.serve.export.find_spec", lambda name: None)
    result = run(bundle, tmp_path / "b.json", "--shares=[0.5,0.3,0.2]", "--batch_sizes=[1]")
    printed = capsys.readouterr().out
    assert "note: merged is not timed at batch 1: no compiler\n" in printed
    assert "note: onnx staged is not timed at batch 1: export to ONNX needs onnx, onnxscript, onnxruntime" in printed
    assert list(result["batches"][0]["arms"]) == ["static", "smaller static", "unmerged"]


def test_void_run_is_a_warning(bundle, tmp_path, monkeypatch, capsys):
    def unlike(*args: Any, **kwargs: Any) -> Any:
        times = interleave(*args, **kwargs)
        times["control"].cpu = [[2 * call for call in calls] for calls in times["static"].cpu]
        return times

    monkeypatch.setattr(measure, "interleave", unlike)
    result = run(bundle, tmp_path / "b.json", "--arms=[merged]", "--batch_sizes=[1]")
    assert result["batches"][0]["void"]
    assert result["batches"][0]["control"] == 2
    printed = capsys.readouterr().out
    assert "warning: at batch 1 the static arm timed twice differs from itself by the factor 2.000" in printed
    assert "VOID" in printed


def test_threads_are_restored(bundle, tmp_path):
    before = torch.get_num_threads()
    result = run(bundle, tmp_path / "b.json", "--arms=[]", "--batch_sizes=[20]", "--threads=2")
    assert torch.get_num_threads() == before
    assert result["clock"] == "wall"
    assert list(result["batches"][0]["arms"]) == ["static"]


# ---- errors


def test_existing_file_stays(bundle, tmp_path, capsys):
    out = tmp_path / "b.json"
    out.write_text("mine")
    line = refused(["bench", f"--bundle={bundle}", f"--out={out}"], capsys)
    assert f"out={out} exists; give another file, or --overwrite true" in line
    assert out.read_text() == "mine"
    run(bundle, out, "--overwrite=true", "--arms=[static]", "--batch_sizes=[1]")
    assert json.loads(out.read_text())["batches"]
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_file_written_meanwhile_stays(tmp_path):
    out = tmp_path / "b.json"
    out.write_text("another's")
    with pytest.raises(Mistake, match="in the meantime; the numbers are in"):
        bench._write(out, {"a": 1}, overwrite=False)
    assert out.read_text() == "another's"
    [draft] = tmp_path.glob(".b.json.*.partial")
    assert json.loads(draft.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "bundle must be given"),
        (["--bundle=nowhere"], "nowhere is not a folder; give a bundle's folder"),
        (["--rounds=0"], "rounds=0 must be at least 1"),
        (["--threads=0"], "threads=0 must be at least 1"),
        (["--batch_sizes=1"], "batch_sizes: expected a list such as [1], not '1'"),
        (["--batch_sizes=[]"], "batch_sizes=[] must be some whole numbers of at least 1"),
        (["--batch_sizes=[0,8]"], "batch_sizes=[0, 8] must be some whole numbers of at least 1"),
        (["--batch_sizes=[a]"], "batch_sizes"),
        (["--arms=[statik]"], "there is no arm 'statik'; did you mean 'static'? There are static, smaller static"),
        (["--shares=[0.5,0.6]"], "shares=[0.5, 0.6] must be at least 0 and sum to 1"),
        (["--shares=[0.5,0.5]"], "shares has 2 numbers, this network has 3 exits"),
        (["--device=tpu"], "device: expected one of cpu, cuda, not 'tpu'"),
        (["--precision=16"], "precision: expected one of 32, bf16"),
        (["--images=nowhere"], "images=nowhere is not a folder"),
        (["--round=5"], "there is no key 'round'; did you mean 'rounds'?"),
        (["--out=no/such/folder/b.json"], "is not there or cannot be written"),
    ],
)
def test_invalid_setting_is_one_line(bundle, tmp_path, monkeypatch, capsys, args, line):
    monkeypatch.chdir(tmp_path)
    given = [] if not args or args[0].startswith("--bundle") else [f"--bundle={bundle}"]
    assert line in refused(["bench", *given, *args], capsys)
    assert not list(tmp_path.iterdir())


def test_unusable_images_raise(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    args = ["bench", f"--bundle={bundle}", "--images=empty"]
    assert "holds no image" in refused(args, capsys)
    (tmp_path / "empty" / "a.png").write_bytes(b"?")
    assert "none of the 1 images in empty can be read" in refused(args, capsys)
    _, place = save(tmp_path / "tensors", preprocessing=None)
    assert "has no preprocessing" in refused(["bench", f"--bundle={place}", "--images=empty"], capsys)
    if not torch.cuda.is_available():
        assert "torch finds no CUDA device here" in refused(["bench", f"--bundle={bundle}", "--device=cuda"], capsys)


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom dynadapter.cli import main\n"
        "try:\n    main(['bench', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for arm in bench.ARMS:
        assert arm in " ".join(done.stdout.split())
