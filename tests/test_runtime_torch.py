"""The runtime of an exported folder against torch: decisions, images, predictions, and its command."""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_vit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from written_folder import taken

from dynadapter.data import ImageData
from dynadapter.exits.combining import Combined
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import (
    AtExit,
    Confidence,
    Entropy,
    Margin,
    Never,
    Patience,
    Policy,
    confidence,
    entropy,
    margin,
    read_off,
    route,
)
from dynadapter.exits.temperature import Scaled, tempered
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import load_image
from dynadapter.serve.bundle import Bundle
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Runner, policies, predict

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZE = 32
TEMPERATURES = (1.5, 0.8, 2.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return image files of all kinds that the package reads, with structure in them."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)

    def scene(width: int, height: int, channels: int = 3) -> Image.Image:
        coarse = generator.integers(0, 256, (5, 5, channels), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    turned = Image.Exif()
    turned[0x0112] = 6
    clear = scene(37, 50).quantize(16)
    grey = np.asarray(scene(40, 40).convert("L")).astype(np.uint16) * 257
    made: dict[str, Callable[[Path], None]] = {
        **{f"{i}.png": scene(20 + 7 * i, 90 - 8 * i).save for i in range(9)},
        "jpeg.jpg": scene(64, 48).save,
        "turned.jpg": lambda path: scene(48, 30).save(path, exif=turned),
        "cmyk.jpg": scene(33, 33).convert("CMYK").save,
        "alpha.png": scene(40, 60, 4).save,
        "palette.png": lambda path: clear.save(path, transparency=0),
        "sixteen.png": Image.fromarray(grey).save,
        "sixteen.tif": Image.fromarray(grey).save,
        "grey.pgm": scene(31, 45).convert("L").save,
        "bits.png": scene(50, 50).convert("1").save,
        "web.webp": scene(50, 41).save,
        "tiny.bmp": scene(1, 3).save,
        "same.png": scene(SIZE, SIZE).save,
        "strip.png": scene(300, 7).save,
    }
    for name, save in made.items():
        save(folder / name)
    return sorted(folder.iterdir())


class Deployed:
    """A network whose exits differ, its exported folder, and torch's logits of the photos."""

    def __init__(self, folder: Path, photos: list[Path]) -> None:
        self.preprocess = Preprocess(SIZE, resize="crop", normalization="half")
        self.images = torch.from_numpy(np.stack([self.preprocess(load_image(photo)) for photo in photos]))
        torch.manual_seed(0)
        self.net = ExitNet(make_vit(depth=3), LinearHeads(), every=1).eval()
        with torch.no_grad():
            for head, logits in zip([*self.net.heads, self.net.backbone.head], self.net(self.images), strict=True):
                last = [layer for layer in head.modules() if isinstance(layer, torch.nn.Linear)][-1]
                last.weight *= 3 / logits.std(0)[:, None]
                last.bias -= 3 * logits.mean(0) / logits.std(0)
            self.logits = self.net(self.images)
        # About a third stops at each exit; a threshold is in the middle of the widest gap between scores near there
        thresholds: list[float] = []
        left = torch.ones(len(photos), dtype=torch.bool)
        for scores in confidence(tempered(self.logits, TEMPERATURES))[:-1]:
            ranked = scores[left].sort().values
            middle = len(ranked) - len(photos) // 3
            gaps = ranked[middle - 2 : middle + 3].diff()
            lower = middle - 2 + int(gaps.argmax())
            thresholds.append((ranked[lower] + ranked[lower + 1]).item() / 2)
            left &= scores < thresholds[-1]
        self.policy = Scaled(Confidence(tuple(thresholds)), TEMPERATURES)
        self.folder = folder / "exported"
        export_onnx(
            self.net,
            self.folder,
            policy=self.policy,
            class_names=[f"class {i}" for i in range(CLASSES)],
            preprocess=self.preprocess,
        )


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> Deployed:
    return Deployed(tmp_path_factory.mktemp("deployed"), photos)


# ---- policies

values = st.floats(-30, 30, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])
thresholds = st.floats(0, 1)


@st.composite
def stacked(draw: st.DrawFn) -> np.ndarray:
    exits, samples, classes = (draw(st.integers(1, 4)), draw(st.integers(0, 5)), draw(st.integers(1, 4)))
    numbers = draw(st.lists(values, min_size=exits * samples * classes, max_size=exits * samples * classes))
    return np.array(numbers, np.float32).reshape(exits, samples, classes)


def clear_cut(policy: Policy, logits: torch.Tensor) -> bool:
    """Return whether every score is far enough from its threshold for torch's and numpy's rounding to agree."""
    for kind, score in ((Confidence, confidence), (Entropy, entropy), (Margin, margin)):
        if isinstance(policy, kind):
            near = [(score(one) - policy.threshold_at(k)).abs() < 1e-6 for k, one in enumerate(logits[:-1])]
            finite = logits[:-1].isfinite().all(-1)
            return not any((close & known).any() for close, known in zip(near, finite, strict=True))
    return True


@given(
    logits=stacked(),
    kind=st.sampled_from([Confidence, Entropy, Margin, Patience, AtExit, Never]),
    limits=st.lists(thresholds, min_size=3, max_size=3) | thresholds,
    patience=st.integers(1, 4),
    heat=st.none() | st.lists(st.floats(0.125, 8, width=32), min_size=4, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_policies_match_torch(logits, kind, limits, patience, heat) -> None:
    exits = len(logits)
    fields: dict[str, Any] = {"patience": patience} if kind is Patience else {}
    if kind is AtExit:
        assume(exits > 1)
        fields = {"exit": min(patience, exits - 1)}
    if kind in (Confidence, Entropy, Margin):
        fields = {"threshold": tuple(limits[: exits - 1]) if isinstance(limits, list) else limits}
    policy = kind(**fields)
    temperatures = None if heat is None else tuple(heat[:exits])
    theirs = torch.from_numpy(logits)
    assume(clear_cut(policy, theirs if heat is None else tempered(theirs, temperatures)))
    expected = route(policy if heat is None else Scaled(policy, temperatures), theirs)
    plain = json.loads(json.dumps({"kind": kind.__name__, **fields}))
    assert taken(policies.Policy(plain, exits, temperatures), logits).tolist() == expected.tolist()


@given(
    logits=stacked(),
    by=st.sampled_from(["mean", "geometric"]),
    heat=st.lists(st.floats(0.125, 8, width=32), min_size=4, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_combination_matches_torch(logits, by, heat) -> None:
    temperatures = tuple(heat[: len(logits)])
    expected = Scaled(Combined(Never(), by), temperatures).combine(torch.from_numpy(logits))
    found = policies.Policy({"kind": "Never", "combine": by}, len(logits), temperatures).combine(logits)
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("by", ["mean", "geometric"])
def test_runner_predicts_by_combination(deployed, by) -> None:
    runner = Runner(deployed.folder)
    policy = Scaled(Combined(Confidence(0.6), by), TEMPERATURES)
    runner.policy = policies.Policy({"kind": "Confidence", "threshold": 0.6, "combine": by}, 3, TEMPERATURES)
    expected = read_off(policy, deployed.logits)
    logits, exit_index = runner.route(deployed.images.numpy())
    assert exit_index.tolist() == expected.exit_index.tolist()
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-3, atol=1e-4)


def test_scores_match_torch() -> None:
    logits = 5 * np.random.default_rng(0).standard_normal((200, 7)).astype(np.float32)
    for ours, theirs in (
        (policies.confidence, confidence),
        (policies.entropy, entropy),
        (policies.margin, margin),
    ):
        np.testing.assert_allclose(ours(logits), theirs(torch.from_numpy(logits)), atol=1e-6)
        assert ours(logits).dtype == np.float32
        assert ours(logits[:, :1]).tolist() == [0 if ours is policies.entropy else 1] * 200


# ---- predictions


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_predictions_match_torch(deployed: Deployed, photos: list[Path], batch_size: int) -> None:
    runner = Runner(deployed.folder, threads=1)
    predictions = runner.predict(photos, batch_size)
    with torch.no_grad():
        parts = [deployed.net.early(part, deployed.policy) for part in deployed.images.split(batch_size)]
    exits, logits = torch.cat([part.exit_index for part in parts]), torch.cat([part.logits for part in parts])
    assert {0, 1, 2} == set(exits.tolist())
    assert [p.exit_index for p in predictions] == exits.tolist()
    assert [p.file for p in predictions] == [str(photo) for photo in photos]
    assert [p.class_index for p in predictions] == logits.argmax(-1).tolist()
    assert [p.label for p in predictions] == [f"class {i}" for i in logits.argmax(-1).tolist()]
    np.testing.assert_allclose([p.confidence for p in predictions], confidence(logits), atol=1e-5)

    array = np.stack([runner.manifest.preprocess(load_image(photo)) for photo in photos])
    assert np.array_equal(array, deployed.images)
    for start in range(0, len(array), batch_size):
        ours, taken = runner.route(array[start : start + batch_size])
        np.testing.assert_allclose(ours, logits[start : start + batch_size], atol=1e-4)
        assert taken.tolist() == exits[start : start + batch_size].tolist()
    np.testing.assert_allclose(runner.every_exit(array), deployed.logits, atol=1e-4)
    assert [(p.class_index, p.exit_index) for p in runner.predict(array, batch_size)] == [
        (p.class_index, p.exit_index) for p in predictions
    ]


def test_predict_takes_files_folders_images(deployed: Deployed, photos: list[Path]) -> None:
    runner = Runner(deployed.folder, threads=1)
    expected = runner.predict(photos)
    assert runner.predict(photos[0].parent) == expected
    assert runner.predict(str(photos[0])) == expected[:1]
    opened = [Image.open(photos[0]), load_image(photos[1])]
    assert [p.class_index for p in runner.predict(opened)] == [p.class_index for p in expected[:2]]
    assert [p.file for p in runner.predict(opened)] == [str(photos[0]), None]
    assert runner.predict([photos[2], photos[0].parent])[1:] == expected


def test_threads_share_a_runner(deployed: Deployed, photos: list[Path]) -> None:
    runner, answers = Runner(deployed.folder, threads=1), {}
    expected = Runner(deployed.folder, threads=1).predict(photos, batch_size=4)

    def ask(i: int) -> None:
        answers[i] = runner.predict(photos, batch_size=4)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(answers.values()) == [expected] * 4


# ---- one image pipeline


class Photos(ImageData):
    """The photos as a test set."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__(image_size=SIZE, resize="crop", normalization="half")
        self.files = files
        self.class_names = [f"class {i}" for i in range(CLASSES)]

    def samples(self, split: Any) -> list[Any]:
        return [(file, 0) for file in self.files]


def test_one_image_gives_one_tensor_everywhere(
    deployed: Deployed, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test, bundle and exported runtime feed a network the same tensor."""
    found: dict[str, Any] = {}
    data = Photos(photos)
    data.setup("test")
    found["test"] = torch.cat([batch for batch, _ in data.test_dataloader()])
    seen: list[torch.Tensor] = []
    early = deployed.net.early
    monkeypatch.setattr(deployed.net, "early", lambda images, policy: (seen.append(images), early(images, policy))[1])
    config: Any = SimpleNamespace(preprocessing=deployed.preprocess, class_names=data.class_names)
    Bundle(deployed.net, deployed.policy, config).predict(photos)
    found["bundle"] = torch.cat(seen)
    code = f"""
import sys
sys.path = [{str(deployed.folder)!r}] + [p for p in sys.path if not p.endswith("src")]
import numpy as np
from dynadapter.serve.runtime import Runner
runner = Runner({str(deployed.folder)!r}, threads=1)
np.save("found.npy", runner._read(sys.argv[1:], "raise", [])[1])
"""
    subprocess.run([sys.executable, "-c", code, *map(str, photos)], check=True, cwd=tmp_path)
    found["runtime"] = np.load(tmp_path / "found.npy")
    for name, images in found.items():
        assert np.array_equal(images, deployed.images), name


# ---- its command


def run_exported(folder: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``predict.py`` as a user does, without this package on the path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(folder / "predict.py"), *args]
    return subprocess.run(command, text=True, check=False, env=clean, **({"capture_output": True} | options))


def test_command_prints_a_table(deployed: Deployed, photos: list[Path]) -> None:
    done = run_exported(deployed.folder, str(photos[0].parent), "--batch_size", "4", "--threads", "1")
    header, *rows = done.stdout.splitlines()
    assert (done.returncode, done.stderr, header) == (0, "", "file,class,confidence,exit")
    predictions = Runner(deployed.folder, threads=1).predict(photos, batch_size=4)
    assert rows == [f"{p.file},{p.label},{p.confidence:.4f},{p.exit_index + 1}" for p in predictions]


def test_command_errors_are_one_line(
    deployed: Deployed, photos: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    args = [str(tmp_path), str(photos[0])]
    assert predict.main(args, deployed.folder) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read image {tmp_path / 'text.png'}: not an image")
    assert line.endswith("; repair it, remove it, or give --on_error skip")
    assert predict.main(["nope"], deployed.folder) == 2
    assert capfd.readouterr().err == "error: image nope does not exist; correct the path, or give --on_error skip\n"
    assert predict.main([*args, "--on_error", "skip"], deployed.folder) == 0
    shown = capfd.readouterr()
    assert shown.err.startswith("warning: skipped 1 of 2 images")
    assert shown.out.splitlines()[1].startswith(f"{photos[0]},")
    assert predict.main(args, tmp_path) == 2
    assert "manifest.json does not exist" in capfd.readouterr().err


def test_closed_output_gives_no_traceback(deployed: Deployed, photos: list[Path]) -> None:
    """As under ``| head``."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run_exported(deployed.folder, str(photos[0]), capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
