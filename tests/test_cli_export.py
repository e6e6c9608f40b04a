"""``dynadapter export``: the folder it writes from a bundle, the table it prints, and the settings it refuses."""

import csv
import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import test_cli_predict
import torch
from commands import printed, refused
from safetensors.torch import save_file
from test_cli_predict import ARGUMENTS, NAME, NAMES, PREPROCESS, write_bundle

from dynadapter.adapters import AdaptFormer
from dynadapter.backbones import create_backbone
from dynadapter.cli import export as command
from dynadapter.cli import main
from dynadapter.cost import exit_costs
from dynadapter.exits.policies import Confidence
from dynadapter.exits.temperature import Scaled
from dynadapter.images.reading import find_images, load_image
from dynadapter.serve import export as library
from dynadapter.serve.bundle import load
from dynadapter.serve.runtime import predict

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


images, bundle = test_cli_predict.images, test_cli_predict.bundle  # fixtures


def run(bundle: Path, out: Path, *more: str) -> Path:
    main(["export", f"--bundle={bundle}", f"--out={out}", *more])
    return out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def pictures(images: Path) -> torch.Tensor:
    return torch.stack([torch.from_numpy(PREPROCESS(load_image(path))) for path in find_images(images)])


# ---- the folder


def test_export_predicts_as_the_bundle(bundle, images, tmp_path, capfd):
    out = run(bundle, tmp_path / "new" / "onnx", f"--images={images}", "--opset=18")
    shown = capfd.readouterr()
    content, whole = manifest(out), load(bundle)
    assert (content["precision"], content["versions"]["opset"]) == ("float32", 18)
    assert content["check"]["images"] == 26
    assert content["class_names"] == list(NAMES)
    assert content["policy"] == {"kind": "Confidence", "threshold": 0.7}
    assert content["temperatures"] == [1.2, 0.9]
    costs = exit_costs(whole.net.merge(), 32, class_first=True)
    assert content["costs"]["macs"] == list(costs.macs)
    assert content["costs"]["class_first_macs"] == list(costs.class_first_macs)
    for words in ("stage0.onnx", "stage1.onnx", "MB", "26 images of", "1e-04 allowed", "all the same"):
        assert words in shown.out
    assert f"{content['check']['largest_difference']:.1e}" in shown.out
    assert f"run it with: python {out}/predict.py IMAGES" in shown.out
    assert shown.err == ""

    assert predict.main([str(images), "--threads", "1"], out) == 0
    theirs = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    main(["predict", f"--bundle={bundle}", f"--images={images}", f"--out={tmp_path / 'out.csv'}", "--batch_size=5"])
    with (tmp_path / "out.csv").open(newline="") as file:
        ours = list(csv.DictReader(file))
    assert {row["exit"] for row in ours} == {"1", "2"}
    for row, other in zip(ours, theirs, strict=True):
        assert float(row.pop("confidence")) == pytest.approx(float(other.pop("confidence")), abs=1.01e-4)
        assert row == other


@pytest.fixture
def given(monkeypatch) -> dict[str, Any]:
    """Return the options that the command passes to the library, which does not export anything."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(library, "export_onnx", lambda net, out, **options: found.update(options, net=net))
    monkeypatch.setattr(command, "_print", lambda *_: None)
    return found


def test_overwrite_replaces_an_exported_folder(bundle, tmp_path, capsys, given):
    (tmp_path / "manifest.json").write_text('{"format": 3, "files": {}, "stages": []}')
    assert "--overwrite true" in refused(["export", f"--bundle={bundle}", f"--out={tmp_path}"], capsys)
    run(bundle, tmp_path, "--overwrite=true")
    assert given["overwrite"] is True
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    for more, what in (("onnx", "an exported folder"), ("peft", "an adapter folder")):
        line = refused(
            ["export", f"--bundle={bundle}", f"--out={tmp_path}", "--overwrite=true", f"--format={more}"], capsys
        )
        assert f"holds manifest.json; --overwrite true replaces {what} and nothing more: move that away" in line


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_that_cannot_be_merged_stay(merge, images, tmp_path, capsys, given):
    bundle = write_bundle(tmp_path / "bundle", images, AdaptFormer(bottleneck=2))
    run(bundle, tmp_path / "out", f"--merge={merge}", "--class_first=false")
    note = "the adapters are not merged, AdaptFormer cannot be merged into the backbone"
    assert (note in capsys.readouterr().out) is merge
    assert given["costs"] == exit_costs(load(bundle).net, 32)
    assert given["policy"] == Scaled(Confidence(0.7), (1.2, 0.9))
    assert given["check_images"] is None  # noise


@pytest.mark.slow
def test_int8_with_labels(bundle, images, tmp_path, capsys):
    out = run(bundle, tmp_path / "int8", "--int8=dynamic", f"--images={images}", "--max_images=20")
    content, shown = manifest(out), capsys.readouterr().out
    files = find_images(images)
    some = [files[k * 26 // 20] for k in range(20)]
    assert content["precision"] == "int8"
    found = content["quantization"]
    assert found["images"] == content["check"]["images"] == 20
    right = [found_.label == path.parent.name for path, found_ in zip(some, load(bundle).predict(some), strict=True)]
    assert found["accuracy_float32"] == pytest.approx(sum(right) / 20)
    assert 0 <= found["accuracy_int8"] <= 1
    for name, label in (("same_class", "same class"), ("same_exit", "same exit"), ("accuracy_int8", "accuracy, int8")):
        [line] = [line for line in shown.splitlines() if label in line]
        assert f"{found[name]:.2%}" in line
    for name in ("float32", "int8"):
        [line] = [line for line in shown.splitlines() if f"exit shares, {name}" in line]
        assert " / ".join(f"{share:.1%}" for share in found[f"exit_shares_{name}"]) in line
    assert "no accuracy" not in shown


def test_int8_labels_come_from_subfolders(bundle, images, tmp_path, capsys, given):
    args = ["--int8=dynamic", "--merge=false", "--class_first=false", "--tolerance=0.5"]
    run(bundle, tmp_path / "a", *args, f"--images={images / 'ant'}")
    assert given["check_labels"] is None
    assert len(given["check_images"]) == 9
    assert (given["merge"], given["class_first"], given["tolerance"], given["int8"]) == (False, False, 0.5, "dynamic")
    assert "images are in no subfolder in" in capsys.readouterr().out
    other = Path(shutil.copytree(images, tmp_path / "other"))
    (other / "cat").rename(other / "cow")
    run(bundle, tmp_path / "a", *args, f"--images={other}")
    assert given["check_labels"] is None
    assert "no class has the name of the subfolder 'cow' in" in capsys.readouterr().out
    run(bundle, tmp_path / "a", *args, f"--images={images}")
    labels = [NAMES.index(path.parent.name) for path in find_images(images)]
    assert given["check_labels"].tolist() == labels
    torch.testing.assert_close(given["check_images"], pictures(images), atol=0, rtol=0)
    assert capsys.readouterr().out == ""


def test_weights_of_the_backbone_from_a_file(images, tmp_path, given):
    bundle = write_bundle(tmp_path / "bundle", images)
    file = bundle / "config.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    content["backbone"] |= {"origin": "file", "seed": 5}
    file.write_text(json.dumps(content))
    save_file(create_backbone(NAME, len(NAMES), **ARGUMENTS).state_dict(), tmp_path / "backbone.safetensors")
    run(bundle, tmp_path / "out", f"--weights={tmp_path / 'backbone.safetensors'}")
    assert given["net"].num_classes == len(NAMES)


# ---- mistakes


def test_help_lists_the_settings(capsys):
    shown = printed(["export", "--help"], capsys)
    for key in ("--bundle", "--out", "--int8", "--images", "--opset", "--tolerance"):
        assert key in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "out must be given"),
        (
            "--out={W}/there",
            "there exists; give another folder, or --overwrite true to replace an exported folder in it",
        ),
        (
            "--out={W}/exported --overwrite=true",
            "exported holds manifest.json; --overwrite true replaces an exported folder and nothing more",
        ),
        ("--out={W}/a.png", "exists and is not a folder"),
        ("--out=o --int8=dynamic", "give --images, a folder of real ones"),
        ("--out=o --opset=17", "opset=17 must be at least 18"),
        ("--out=o --tolerance=0", "tolerance=0.0 must be above 0"),
        ("--out=o --max_images=0", "max_images=0 must be at least 1"),
        ("--out=o --images={W}/nowhere", "nowhere is not a folder; give a folder of images"),
        ("--out=o --images={W}/there", "no image in"),
        (
            "--out=o --images={W}",
            "(PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM); repair it or remove it",
        ),
        ("--out=o --ckpt_path=last.ckpt", "dynadapter calibrate --ckpt_path FILE --goal.cost 0.5 --bundle DIR"),
        ("--out=o --bundle={W}/last.ckpt", "is a checkpoint, not a bundle; make one with dynadapter calibrate"),
        ("--out=o --bundle={W}/exported", "is an exported folder, not a bundle"),
        ("--out=o --bundle={W}/nowhere", "nowhere is not a folder; give a bundle's folder"),
        ("--out=o --pretrained=perhaps", "pretrained: expected true or false"),
        ("--out=o --weights={W}/no.pth", "no.pth does not exist; give a file of weights"),
        ("--out=o --format=peft --int8=dynamic", "--int8 belongs to --format onnx; leave it out for peft"),
        ("--out=o --format=peft --images={I}", "--images belongs to --format onnx"),
        ("--out=o --format=peft --merge=false", "--merge belongs to --format onnx"),
        ("--out=o --format=peft --max_images=9", "--max_images belongs to --format onnx"),
        ("--out=o --clas_first=true", "there is no key 'clas_first'; did you mean 'class_first'?"),
    ],
)
def test_wrong_settings_give_one_line(more, words, bundle, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "manifest.json").write_text("{}")
    (tmp_path / "last.ckpt").write_text("")
    (tmp_path / "a.png").write_text("no image")
    given = more.replace("{I}", str(images)).replace("{W}", str(tmp_path)).split()
    line = refused(["export", f"--bundle={bundle}", *given], capsys)
    assert words in line
    assert not (tmp_path / "o").exists()


def test_static_int8_needs_two_images(bundle, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    args = ["--int8=static", f"--images={images}", "--max_images=1"]
    line = refused(["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}", *args], capsys)
    assert "--int8 static needs at least 2 images; give more --images, or a larger --max_images" in line


FAILURES = {
    "--opset=99": "graphs of opset=99 do not run here (ONNX Runtime cannot open",
    "--tolerance=1e-12": "more than tolerance=1e-12; nothing was written: set a larger tolerance or another opset, or ",
}


@pytest.mark.slow
@pytest.mark.parametrize("arg", FAILURES)
def test_failed_export_leaves_nothing(arg, bundle, tmp_path, capsys):
    assert FAILURES[arg] in refused(["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}", arg], capsys)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing(bundle, tmp_path, capsys, monkeypatch):
    def stopped(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(library, "write_graphs", stopped)
    args = ["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}"]
    assert "stopped by SIGTERM; nothing was written" in refused(args, capsys, 143)
    assert list(tmp_path.iterdir()) == []


def test_bundle_without_preprocessing(images, tmp_path, capsys):
    bundle = write_bundle(tmp_path / "bundle", images, preprocessing=None)
    line = refused(["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}"], capsys)
    assert "has no preprocessing, which an exported folder needs" in line
