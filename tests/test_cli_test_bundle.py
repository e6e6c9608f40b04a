"""``dynadapter test --bundle``: the numbers are those of the bundle on the test images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused
from PIL import Image
from test_cli_predict import NAMES, PREPROCESS, write_bundle, write_images

from dynadapter.backbones import set_image_size
from dynadapter.cli import main
from dynadapter.images.reading import find_images, load_image
from dynadapter.serve import fastest
from dynadapter.serve.bundle import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in a folder for each class and split, and a bundle of these classes."""
    place = tmp_path_factory.mktemp("shipped")
    for split in ("train", "test"):
        write_images(place / "images" / split)
    write_bundle(place / "bundle", place / "images" / "test")
    return place


def arguments(folder: Path, *more: str) -> list[str]:
    return ["test", f"--bundle={folder / 'bundle'}", "--data=ImageFolder", f"--data.root={folder / 'images'}", *more]


def test_other_preprocessing_is_used_and_told(folder, capsys):
    with pytest.warns(UserWarning, match="image_size=64 instead of 32, normalization=imagenet instead of half"):
        main(arguments(folder, "--data.image_size=64", "--data.normalization=imagenet"))
    printed = capsys.readouterr().out
    bundle, files = load(folder / "bundle"), find_images(folder / "images" / "test")
    set_image_size(bundle.net.backbone, 64)
    other = replace(PREPROCESS, image_size=64, normalization="imagenet")
    with torch.no_grad():
        classes = bundle.net(torch.from_numpy(np.stack([other(load_image(file)) for file in files]))).argmax(-1)
    targets = torch.tensor([NAMES.index(file.parent.name) for file in files])
    assert all(f"{value:.1%}" in printed for value in (classes == targets).float().mean(-1).tolist())


def test_graphs_have_one_image_size(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("DYNADAPTER_CACHE", str(tmp_path))
    other = arguments(folder, "--data.image_size=64", "--device=cpu")
    with pytest.warns(UserWarning, match="image_size=64 instead of 32"):
        line = refused([*other, "--backend=onnx"], capsys)
    assert "--data.image_size 64: the exported graphs take images of 32 pixels; give --backend torch, or leave" in line
    monkeypatch.setattr(fastest, "fastest", lambda *_: ("onnx", "backend onnx (auto)"))
    with pytest.warns(UserWarning, match="image_size=64 instead of 32"):
        main([*other, "--backend=auto"])
    printed = capsys.readouterr().out
    assert "backend torch instead: the exported graphs take images of 32 pixels" in printed
    assert "% of static" in printed


def test_numbers_are_the_bundles(folder, capsys):
    main(arguments(folder))
    printed = capsys.readouterr().out
    files = find_images(folder / "images" / "test")
    bundle = load(folder / "bundle")
    found = bundle.predict(files)
    accuracy = np.mean([answer.label == file.parent.name for answer, file in zip(found, files, strict=True)])
    share = np.mean([answer.exit_index == 0 for answer in found])
    images = torch.from_numpy(np.stack([PREPROCESS(load_image(file)) for file in files]))
    with torch.no_grad():
        classes = bundle.net(images).argmax(-1)
    targets = torch.tensor([NAMES.index(file.parent.name) for file in files])
    for value in (accuracy, share, 1 - share, *(classes == targets).float().mean(-1).tolist()):
        assert f"{value:.1%}" in printed
    assert "% of static" in printed
    assert bundle.policy.name in printed


def test_policy_of_the_command_line(folder, capsys):
    main(arguments(folder, "--policy=Never"))
    assert "0.0% / 100.0%" in capsys.readouterr().out


def test_data_section_of_a_config(folder, tmp_path, capsys):
    config = tmp_path / "a.yaml"
    config.write_text(f"data: {{class_path: ImageFolder, init_args: {{root: {folder / 'images'}}}}}\n")
    main(["test", f"--bundle={folder / 'bundle'}", "-c", str(config)])
    assert "% of static" in capsys.readouterr().out


def test_further_set_may_have_more_classes(folder, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / NAMES[0]).symlink_to(folder / "images" / "test" / NAMES[0])
    main(arguments(folder, f"--data.root={tmp_path}", f"--data.test_sets={{all: {folder / 'images'}}}"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    main(arguments(folder))
    alone = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert rows[len(alone) :] == alone != rows[: len(alone)]


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("ant", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / split / name / "a.png")
    line = refused(arguments(folder, f"--data.root={tmp_path}"), capsys)
    assert "dog" in line
    assert "is not a folder" in refused(["test", f"--bundle={tmp_path}/no", *arguments(folder)[2:]], capsys)
    assert "data" in refused(["test", f"--bundle={folder / 'bundle'}"], capsys)
