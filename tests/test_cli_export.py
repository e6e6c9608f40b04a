"""``dynadapter export``: what it makes of a bundle, what it says of it, and what it refuses."""

import csv
import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_cli_predict import ARGUMENTS, NAME, NAMES, PREPROCESS, refused, write_bundle, write_images

from dynadapter.adapters import AdaptFormer
from dynadapter.backbones import create_backbone
from dynadapter.cli import export as command
from dynadapter.cli import main
from dynadapter.cost import exit_costs
from dynadapter.exits.policies import Confidence
from dynadapter.exits.temperature import Scaled
from dynadapter.images.reading import find_images, load_image
from dynadapter.serve import export as library
from dynadapter.serve import runtime
from dynadapter.serve.bundle import load
from dynadapter.serve.export import load_programs

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def bundle(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "bundle", images)


def run(bundle: Path, out: Path, *more: str) -> Path:
    main(["export", f"--bundle={bundle}", f"--out={out}", *more])
    return out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def pictures(images: Path) -> torch.Tensor:
    return torch.stack([torch.from_numpy(PREPROCESS(load_image(path))) for path in find_images(images)])


# ---- what it makes


def test_onnx(bundle, images, tmp_path, capsys):
    out = run(bundle, tmp_path / "new" / "onnx", f"--images={images}", "--opset=18")
    shown = capsys.readouterr()
    told, whole = manifest(out), load(bundle)
    assert (told["kind"], told["precision"], told["versions"]["opset"]) == ("onnx", "float32", 18)
    assert told["check"]["images"] == 26
    assert told["class_names"] == list(NAMES)
    assert told["policy"] == {"kind": "Confidence", "threshold": 0.7}
    assert told["temperatures"] == [1.2, 0.9]
    costs = exit_costs(whole.net.merge(), 32, class_first=True)
    assert told["costs"]["macs"] == list(costs.macs)
    assert told["costs"]["class_first_macs"] == list(costs.class_first_macs)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "stage0.onnx", "stage1.onnx"]
    for words in ("stage0.onnx", "stage1.onnx", "MB", f"26 images of {images}", "1e-04 allowed", "all the same"):
        assert words in shown.out
    assert f"{told['check']['largest_difference']:.1e}" in shown.out
    assert f"python -m dynadapter.serve.runtime {out} IMAGES" in shown.out
    assert shown.err == ""

    assert runtime.main([str(out), str(images), "--threads", "1"]) == 0
    theirs = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    main(["predict", f"--bundle={bundle}", f"--images={images}", f"--out={tmp_path / 'out.csv'}", "--batch_size=5"])
    with (tmp_path / "out.csv").open(newline="") as file:
        ours = list(csv.DictReader(file))
    assert {row["exit"] for row in ours} == {"1", "2"}
    for row, other in zip(ours, theirs, strict=True):
        assert float(row.pop("confidence")) == pytest.approx(float(other.pop("confidence")), abs=1.01e-4)
        assert row == other


def test_programs(bundle, images, tmp_path, capsys):
    out = run(bundle, tmp_path / "programs", "--format=programs", "--class_first=false", "--merge=false")
    programs, whole = load_programs(out), load(bundle)
    assert manifest(out)["costs"]["macs"] == list(exit_costs(whole.net, 32).macs)
    assert manifest(out)["check"]["images"] == 12  # noise
    assert programs.policy == whole.policy == Scaled(Confidence(0.7), (1.2, 0.9))
    with torch.no_grad():
        expected = whole.net.early(pictures(images), whole.policy)
    routed = programs.route(pictures(images))
    assert routed.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(routed.logits, expected.logits, atol=1e-5, rtol=0)
    shown = capsys.readouterr().out
    assert "stage1.pt2" in shown
    assert "12 images of noise" in shown
    assert f"load_programs('{out}')" in shown


def test_a_folder_that_is_there_is_replaced_where_that_is_asked_for(bundle, tmp_path, capsys, monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(library, "export_onnx", lambda net, out, **options: given.update(options))
    monkeypatch.setattr(command, "_print", lambda *_: None)
    (tmp_path / "manifest.json").write_text("{}")
    assert "--overwrite true" in refused(capsys, ["export", f"--bundle={bundle}", f"--out={tmp_path}"])
    run(bundle, tmp_path, "--overwrite=true")
    assert given["overwrite"] is True


def test_adapters_that_cannot_be_folded_stay(images, tmp_path, capsys, monkeypatch):
    bundle = write_bundle(tmp_path / "bundle", images, AdaptFormer(bottleneck=2))
    given: dict[str, Any] = {}
    monkeypatch.setattr(library, "export_programs", lambda net, out, **options: given.update(options))
    monkeypatch.setattr(command, "_print", lambda *_: None)
    run(bundle, tmp_path / "programs", "--format=programs")
    assert "the adapters stay as they are, AdaptFormer cannot be folded into the backbone" in capsys.readouterr().out
    assert given["costs"] == exit_costs(load(bundle).net, 32, class_first=True)


def test_eight_bits_with_labels(bundle, images, tmp_path, capsys):
    out = run(bundle, tmp_path / "int8", "--int8=true", f"--images={images}", "--max_images=20")
    told, shown = manifest(out), capsys.readouterr().out
    files = find_images(images)
    some = [files[k * 26 // 20] for k in range(20)]
    assert told["precision"] == "int8"
    found = told["quantization"]
    assert found["images"] == told["check"]["images"] == 20
    right = [said.label == path.parent.name for path, said in zip(some, load(bundle).predict(some), strict=True)]
    assert found["accuracy_float32"] == pytest.approx(sum(right) / 20)
    assert 0 <= found["accuracy_int8"] <= 1
    for name, label in (("same_class", "same class"), ("same_exit", "same exit"), ("accuracy_int8", "accuracy, int8")):
        [line] = [line for line in shown.splitlines() if label in line]
        assert f"{found[name]:.2%}" in line
    for name in ("float32", "int8"):
        [line] = [line for line in shown.splitlines() if f"leave at each exit, {name}" in line]
        assert " / ".join(f"{share:.1%}" for share in found[f"exit_shares_{name}"]) in line
    assert "no accuracy" not in shown


def test_eight_bits_without_labels(bundle, images, tmp_path, capsys, monkeypatch):
    """Without the export itself, which takes its time."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(library, "export_onnx", lambda net, out, **options: given.update(options))
    monkeypatch.setattr(command, "_print", lambda *_: None)
    args = ["--int8=true", "--merge=false", "--class_first=false", "--tolerance=0.5"]
    run(bundle, tmp_path / "a", *args, f"--images={images / 'ant'}")
    assert given["check_labels"] is None
    assert len(given["check_images"]) == 9
    assert (given["merge"], given["class_first"], given["tolerance"], given["int8"]) == (False, False, 0.5, True)
    assert "images lie in no subfolder in" in capsys.readouterr().out
    other = Path(shutil.copytree(images, tmp_path / "other"))
    (other / "cat").rename(other / "cow")
    run(bundle, tmp_path / "a", *args, f"--images={other}")
    assert given["check_labels"] is None
    assert "the subfolder 'cow' is named after none of the classes in" in capsys.readouterr().out
    run(bundle, tmp_path / "a", *args, f"--images={images}")
    labels = [NAMES.index(path.parent.name) for path in find_images(images)]
    assert given["check_labels"].tolist() == labels
    torch.testing.assert_close(given["check_images"], pictures(images), atol=0, rtol=0)
    assert capsys.readouterr().out == ""


def test_a_backbone_from_a_file(images, tmp_path, monkeypatch):
    bundle = write_bundle(tmp_path / "bundle", images)
    file = bundle / "config.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    content["backbone"] |= {"origin": "file", "seed": 5}
    file.write_text(json.dumps(content))
    save_file(create_backbone(NAME, len(NAMES), **ARGUMENTS).state_dict(), tmp_path / "backbone.safetensors")
    monkeypatch.setattr(library, "export_programs", lambda net, out, **options: {"net": net})
    monkeypatch.setattr(command, "_print", lambda *_: None)
    run(bundle, tmp_path / "out", "--format=programs", f"--weights={tmp_path / 'backbone.safetensors'}")


# ---- mistakes


def test_help_is_there(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["export", "--help"])
    assert not ending.value.code
    shown = capsys.readouterr().out
    for key in ("--bundle", "--out", "--format {onnx,programs}", "--int8", "--images", "--opset", "--tolerance"):
        assert key in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "out must be given"),
        ("--out={W}/there", "there exists; give another --out, or --overwrite true"),
        ("--out={W}/there --overwrite=true", "there holds no manifest.json, so it is no exported folder to replace"),
        ("--out={W}/a.png", "exists and is no folder"),
        ("--out=o --format=tflite", "format: expected one of onnx, programs, not 'tflite'"),
        ("--out=o --int8=true", "give --images, a folder of real ones"),
        ("--out=o --int8=true --images={I} --format=programs", "int8 is made of ONNX graphs"),
        ("--out=o --opset=17", "opset=17 must be at least 18"),
        ("--out=o --opset=20 --format=programs", "opset belongs to ONNX"),
        ("--out=o --tolerance=0", "tolerance=0.0 must be above 0"),
        ("--out=o --max_images=0", "max_images=0 must be at least 1"),
        ("--out=o --images={W}/nowhere", "nowhere is no folder; give a folder of images"),
        ("--out=o --images={W}/there", "no image in"),
        ("--out=o --images={W}", "cannot read image"),
        ("--out=o --ckpt_path=last.ckpt", "dynadapter calibrate --ckpt_path FILE --goal.cost 0.5 --bundle DIR"),
        ("--out=o --bundle={W}/last.ckpt", "is a checkpoint, not a bundle; make one with dynadapter calibrate"),
        ("--out=o --bundle={W}/exported", "is an exported folder, not a bundle"),
        ("--out=o --bundle={W}/nowhere", "nowhere is no folder; give a bundle's folder"),
        ("--out=o --pretrained=perhaps", "pretrained: expected true or false"),
        ("--out=o --weights={W}/no.pth", "no.pth does not exist; give a file of weights"),
        ("--out=o --clas_first=true", "there is no key 'clas_first'; did you mean 'class_first'?"),
    ],
)
def test_a_mistake_is_one_line(more, words, bundle, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "manifest.json").write_text("{}")
    (tmp_path / "last.ckpt").write_text("")
    (tmp_path / "a.png").write_text("no image")
    given = more.replace("{I}", str(images)).replace("{W}", str(tmp_path)).split()
    line = refused(capsys, ["export", f"--bundle={bundle}", *given])
    assert words in line
    assert not (tmp_path / "o").exists()


USELESS = {
    "--opset=99": "graphs of opset=99 do not run here; give a smaller --opset, or none",
    "--tolerance=1e-12": "more than tolerance=1e-12; nothing was written: allow more, or try another opset or --merge ",
}


@pytest.mark.slow
@pytest.mark.parametrize("arg", USELESS)
def test_what_comes_out_is_of_no_use(arg, bundle, tmp_path, capsys):
    assert USELESS[arg] in refused(capsys, ["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}", arg])
    assert list(tmp_path.iterdir()) == []


def test_what_the_library_refuses_is_one_line(bundle, tmp_path, capsys, monkeypatch):
    def refusing(*_: Any, **__: Any) -> None:
        raise ValueError("a score lies on its threshold;\n or give other check_images, merge=False")

    monkeypatch.setattr(library, "export_onnx", refusing)
    line = refused(capsys, ["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}", "--opset=20"])
    assert line.endswith("a score lies on its threshold; or give other --images, --merge false")


def test_stopped_it_leaves_nothing(bundle, tmp_path, capsys, monkeypatch):
    def stopped(*_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(library, "_write_program", stopped)
    args = ["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}", "--format=programs"]
    assert "stopped by SIGTERM; nothing was written" in refused(capsys, args, 143)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_tensors(images, tmp_path, capsys):
    bundle = write_bundle(tmp_path / "bundle", images, preprocessing=None)
    line = refused(capsys, ["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}"])
    assert "has no preprocessing, which an exported folder needs" in line
