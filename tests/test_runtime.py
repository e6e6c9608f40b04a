"""The runner against torch, sample by sample, and against the package's own reading of images and policies."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_vit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import (
    Confidence,
    Entropy,
    Margin,
    Never,
    Patience,
    Policy,
    confidence,
    entropy,
    margin,
    route,
)
from dynadapter.exits.temperature import Scaled, tempered
from dynadapter.images import preprocess
from dynadapter.images import reading as images
from dynadapter.serve import runtime
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Manifest, Runner

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIZE = 32
EXITS, WIDTH = 3, 4  # of the folder made by hand: its images are 12 numbers, the logits of its exits


# ---- folders


def spell(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """A folder whose stage k answers with the numbers 4k to 4k + 3 of an image (3, 2, 2)."""
    folder.mkdir(exist_ok=True)
    stages = []
    for k in range(EXITS):
        inputs, outputs = ("images" if k == 0 else f"x{k - 1}",), (*([f"x{k}"] if k < EXITS - 1 else []), f"logits{k}")
        tensor = onnx.helper.make_tensor_value_info
        shape = onnx.numpy_helper.from_array(np.array([0, 12], np.int64), "shape")
        columns = onnx.numpy_helper.from_array(np.arange(WIDTH * k, WIDTH * (k + 1)), "columns")
        nodes = [
            onnx.helper.make_node("Reshape", [inputs[0], "shape"], ["flat"]),
            onnx.helper.make_node("Gather", ["flat", "columns"], [outputs[-1]], axis=1),
        ]
        if k < EXITS - 1:
            nodes.append(onnx.helper.make_node("Identity", [inputs[0]], [outputs[0]]))
        graph = onnx.helper.make_graph(
            nodes,
            f"stage{k}",
            [tensor(inputs[0], onnx.TensorProto.FLOAT, ["batch", 3, 2, 2])],
            [
                tensor(name, onnx.TensorProto.FLOAT, ["batch", *([WIDTH] if "logits" in name else [3, 2, 2])])
                for name in outputs
            ],
            [shape, columns],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        file = folder / f"stage{k}.onnx"
        onnx.save(model, file)
        stages.append(
            {
                "file": file.name,
                "bytes": file.stat().st_size,
                "sha256": runtime.sha256(file),
                "inputs": [{"name": name, "shape": [None, 3, 2, 2]} for name in inputs],
                "outputs": [
                    {"name": name, "shape": [None, *([WIDTH] if "logits" in name else [3, 2, 2])]} for name in outputs
                ],
            }
        )
    content = {
        "format": 1,
        "kind": "onnx",
        "stages": stages,
        "policy": settings,
        "temperatures": None,
        "class_names": list("abcd"),
        "preprocessing": {"image_size": 2, "interpolation": "nearest", "resize": "stretch", "normalization": "none"},
    }
    (folder / "manifest.json").write_text(json.dumps(content | changes))
    return folder


def as_images(logits: np.ndarray) -> np.ndarray:
    """Logits (exits, samples, classes) as images (samples, 3, 2, 2) of the folder made by hand."""
    return np.ascontiguousarray(logits.transpose(1, 0, 2).reshape(-1, 3, 2, 2), np.float32)


@pytest.fixture(scope="module")
def spelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spell(tmp_path_factory.mktemp("spelled") / "folder", {"kind": "Confidence", "threshold": 0.9})


@pytest.fixture
def copied(spelled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spelled, tmp_path / "copied"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Image files of all kinds that the package reads, with something to see on them."""
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
    """A network with exits that differ, its exported folder, and what torch says of the photos."""

    def __init__(self, folder: Path, photos: list[Path]) -> None:
        self.preprocess = preprocess.Preprocess(SIZE, resize="crop", normalization="half")
        self.images = torch.stack([self.preprocess(images.load_image(photo)) for photo in photos])
        torch.manual_seed(0)
        self.net = ExitNet(make_vit(depth=3), LinearHeads(), every=1).eval()
        with torch.no_grad():
            for head, logits in zip([*self.net.heads, self.net.backbone.head], self.net(self.images), strict=True):
                last = [layer for layer in head.modules() if isinstance(layer, torch.nn.Linear)][-1]
                last.weight *= 3 / logits.std(0)[:, None]
                last.bias -= 3 * logits.mean(0) / logits.std(0)
            self.logits = self.net(self.images)
        # About a third leaves at each exit, and thresholds lie in the widest gap between two scores thereabouts
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
            preprocessing={"image_size": SIZE, "resize": "crop", "normalization": "half"},
        )


TEMPERATURES = (1.5, 0.8, 2.0)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> Deployed:
    return Deployed(tmp_path_factory.mktemp("deployed"), photos)


# ---- images


def test_pixels_are_those_of_training_bit_for_bit(photos: list[Path]) -> None:
    for photo in photos:
        ours, theirs = runtime.load_image(photo), images.load_image(photo)
        assert ours.tobytes() == theirs.tobytes()
        assert ours.size == theirs.size
        for interpolation in ("bicubic", "bilinear", "nearest"):
            for resize in ("stretch", "crop"):
                options = (SIZE, interpolation, resize)
                assert np.array_equal(
                    runtime.Preprocess(*options)(ours), preprocess.Preprocess(*options)(theirs).numpy()
                ), (photo, options)


@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_squares_are_cut_where_training_cuts_them(width: int, height: int, size: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    for resize in ("stretch", "crop"):
        theirs = preprocess.Preprocess(size, "nearest", resize).pixels(image)
        assert np.array_equal(runtime.Preprocess(size, "nearest", resize).pixels(image), theirs.numpy())


@pytest.mark.parametrize("normalization", ["imagenet", "half", "none", ((0.1, 0.2, 0.3), (0.3, 0.7, 1.1))])
def test_every_byte_is_normalised_as_in_training(normalization: Any) -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 3, 1, 1)
    ours = runtime.Preprocess(1, normalization=normalization).normalize(every)
    assert np.array_equal(
        ours, preprocess.Preprocess(1, normalization=normalization).normalize(torch.from_numpy(every))
    )
    assert ours.dtype == np.float32


def test_the_same_files_are_found_and_the_same_refused(tmp_path: Path, photos: list[Path]) -> None:
    assert runtime.FORMATS == images.FORMATS
    assert runtime.SUFFIXES == images.SUFFIXES
    for name in ("b/2.png", "a/1.PNG", ".hidden/3.png", "a/.4.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(next(photo for photo in photos if photo.suffix == ".png"), tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((photos[-1].parent / "jpeg.jpg").read_bytes()[:200])
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    assert runtime.find_images(tmp_path) == images.find_images(tmp_path)
    for file in (*runtime.find_images(tmp_path), tmp_path / "notes.txt", tmp_path / "absent.png", tmp_path):
        why = images.why_unreadable(file)
        if why is None:
            runtime.load_image(file)
        else:
            with pytest.raises(runtime.UnreadableImage) as caught:
                runtime.load_image(file)
            assert caught.value.reason == why
            assert str(caught.value).startswith(f"cannot read image {file}: {why}; ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size=0 must be a whole number"),
        ({"image_size": 2.0}, "image_size=2.0 must be a whole number"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic'; choose from: bicubic"),
        ({"resize": "pad"}, "unknown resize 'pad'; choose from: stretch, crop"),
        ({"normalization": "imagenette"}, "unknown normalization 'imagenette'; choose from: imagenet"),
        ({"normalization": [[0, 0, 0], [1, 1, 0]]}, "unknown normalization"),
        ({"normalization": [[0, 0], [1, 1]]}, "unknown normalization"),
    ],
)
def test_preprocessing_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.Preprocess(**changes)


# ---- policies

values = st.floats(-30, 30, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])
thresholds = st.floats(0, 1)


@st.composite
def stacked(draw: st.DrawFn) -> np.ndarray:
    exits, samples, classes = (draw(st.integers(1, 4)), draw(st.integers(0, 5)), draw(st.integers(1, 4)))
    numbers = draw(st.lists(values, min_size=exits * samples * classes, max_size=exits * samples * classes))
    return np.array(numbers, np.float32).reshape(exits, samples, classes)


def clear_cut(policy: Policy, logits: torch.Tensor) -> bool:
    """Whether no score is so close to its threshold that torch's and numpy's rounding could tell them apart."""
    for kind, score in ((Confidence, confidence), (Entropy, entropy), (Margin, margin)):
        if isinstance(policy, kind):
            near = [(score(one) - policy.at(k)).abs() < 1e-6 for k, one in enumerate(logits[:-1])]
            finite = logits[:-1].isfinite().all(-1)
            return not any((close & known).any() for close, known in zip(near, finite, strict=True))
    return True


@given(
    logits=stacked(),
    kind=st.sampled_from([Confidence, Entropy, Margin, Patience, Never]),
    limits=st.lists(thresholds, min_size=3, max_size=3) | thresholds,
    patience=st.integers(1, 4),
    heat=st.none() | st.lists(st.floats(0.125, 8, width=32), min_size=4, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_policies_decide_as_those_of_the_package(logits, kind, limits, patience, heat) -> None:
    exits = len(logits)
    fields: dict[str, Any] = {"patience": patience} if kind is Patience else {}
    if kind in (Confidence, Entropy, Margin):
        fields = {"threshold": tuple(limits[: exits - 1]) if isinstance(limits, list) else limits}
    policy = kind(**fields)
    temperatures = None if heat is None else tuple(heat[:exits])
    theirs = torch.from_numpy(logits)
    assume(clear_cut(policy, theirs if heat is None else tempered(theirs, temperatures)))
    expected = route(policy if heat is None else Scaled(policy, temperatures), theirs)
    plain = json.loads(json.dumps({"kind": kind.__name__, **fields}))
    assert runtime.Policy(plain, exits, temperatures).route(logits).tolist() == expected.tolist()


def test_scores_are_those_of_the_package() -> None:
    logits = 5 * np.random.default_rng(0).standard_normal((200, 7)).astype(np.float32)
    for ours, theirs in (
        (runtime.confidence, confidence),
        (runtime.entropy, entropy),
        (runtime.margin, margin),
    ):
        np.testing.assert_allclose(ours(logits), theirs(torch.from_numpy(logits)), atol=1e-6)
        assert ours(logits).dtype == np.float32
        assert ours(logits[:, :1]).tolist() == [0 if ours is runtime.entropy else 1] * 200


def test_a_score_on_the_threshold_leaves() -> None:
    even = np.zeros((1, 1, 2), np.float32)
    for settings_ in ({"kind": "Confidence", "threshold": 0.5}, {"kind": "Entropy", "threshold": 1.0}):
        assert runtime.Policy(settings_, 2).leave(even).tolist() == [True]
    assert runtime.Policy({"kind": "Margin", "threshold": 0}, 2).leave(even).tolist() == [True]


@pytest.mark.parametrize(
    ("given_", "temperatures", "message"),
    [
        (
            {"kind": "Random"},
            None,
            "unknown policy 'Random'; choose from: Confidence, Entropy, Margin, Patience, Never",
        ),
        ({}, None, "unknown policy None"),
        ({"kind": "Confidence"}, None, "it takes kind, threshold"),
        ({"kind": "Never", "threshold": 1}, None, "it takes"),
        ({"kind": "Confidence", "threshold": [0.9]}, None, r"threshold=\[0.9\] does not fit 3 exits; give one number"),
        ({"kind": "Margin", "threshold": 1.5}, None, "threshold=1.5 does not fit"),
        ({"kind": "Margin", "threshold": math.nan}, None, "threshold=nan does not fit"),
        ({"kind": "Margin", "threshold": "0.5"}, None, "threshold='0.5' does not fit"),
        ({"kind": "Patience", "patience": 0}, None, "patience=0 must be a whole number"),
        ({"kind": "Patience", "patience": 1.5}, None, "patience=1.5 must be a whole number"),
        ({"kind": "Never"}, [1, 1], "temperatures=.* do not fit; give 3 numbers above 0"),
        ({"kind": "Never"}, [1, 0, 1], "temperatures=.* do not fit"),
    ],
)
def test_policies_that_cannot_be(given_: dict[str, Any], temperatures: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        runtime.Policy(given_, 3, temperatures)
    assert "\n" not in str(caught.value)


# ---- routing


def watch(runner: Runner) -> list[tuple[int, int]]:
    """Notes each run of a stage with the size of its batch."""
    calls: list[tuple[int, int]] = []
    stage = runner.stage

    def noted(k: int, held: Any) -> Any:
        calls.append((k, len(held[0])))
        return stage(k, held)

    runner.stage = noted  # type: ignore[method-assign]
    return calls


@given(
    logits=st.integers(0, 7).flatmap(
        lambda samples: st.lists(values, min_size=EXITS * samples * WIDTH, max_size=EXITS * samples * WIDTH)
    ),
    policy=st.sampled_from(
        [
            {"kind": "Confidence", "threshold": [0.9, 0.6]},
            {"kind": "Entropy", "threshold": 0.5},
            {"kind": "Margin", "threshold": 0.3},
            {"kind": "Patience", "patience": 2},
            {"kind": "Never"},
        ]
    ),
)
@settings(max_examples=80, deadline=None)
def test_nothing_is_lost_order_is_kept_and_no_stage_runs_in_vain(spelled: Path, logits: list, policy: dict) -> None:
    runner = shared_runner(spelled)
    runner.policy = runtime.Policy(policy, EXITS)
    told = np.array(logits, np.float32).reshape(EXITS, -1, WIDTH)
    samples = told.shape[1]
    calls = watch(runner)
    try:
        out, exits = runner.route(as_images(told))
    finally:
        del runner.stage  # the noting one
    one_by_one = [
        next((k for k in range(EXITS - 1) if runner.policy.leave(told[: k + 1, i : i + 1])[0]), EXITS - 1)
        for i in range(samples)
    ]
    assert exits.tolist() == one_by_one
    np.testing.assert_array_equal(out, told[exits, np.arange(samples)])
    still_in = [sum(k <= exit for exit in one_by_one) for k in range(EXITS)]
    assert calls == [(k, size) for k, size in enumerate(still_in) if size]
    np.testing.assert_array_equal(runner.every_exit(as_images(told)), told)


def test_a_large_batch_is_cut_on_a_cpu_and_comes_back_whole(spelled: Path) -> None:
    draw, samples = np.random.default_rng(0), 2 * runtime.CHUNK + 5
    told = draw.normal(0, 3, (EXITS, samples, WIDTH)).astype(np.float32)
    runner = Runner(spelled, threads=1)
    runner.policy = runtime.Policy({"kind": "Confidence", "threshold": 0.7}, EXITS)
    expected, calls = runner.policy.route(told), watch(runner)
    for chunk, first in ((runtime.CHUNK, [runtime.CHUNK, runtime.CHUNK, 5]), (None, [samples])):
        calls.clear()
        assert runner.chunk == runtime.CHUNK
        runner.chunk = chunk
        out, exits = runner.route(as_images(told))
        assert [size for k, size in calls if k == 0] == first
        assert exits.tolist() == expected.tolist()
        np.testing.assert_array_equal(out, told[exits, np.arange(samples)])
        np.testing.assert_array_equal(runner.every_exit(as_images(told)), told)
        runner.chunk = runtime.CHUNK
    assert Runner(spelled, threads=3).chunk == 3 * runtime.CHUNK  # as many for each thread


def test_stages_share_their_memory(spelled: Path) -> None:
    for runner in (Runner(spelled), Runner(spelled)):  # the second one finds it there
        assert runner._options.get_session_config_entry("session.use_env_allocators") == "1"
        assert runner.load().route(np.zeros((3, 3, 2, 2), np.float32))[1].shape == (3,)


_RUNNERS: dict[Path, Runner] = {}


def shared_runner(folder: Path) -> Runner:
    return _RUNNERS.setdefault(folder, Runner(folder, threads=1))


def test_a_stage_that_nobody_needs_is_not_even_loaded(spelled: Path) -> None:
    runner = Runner(spelled)
    assert not runner._sessions
    sure, unsure = [9.0, 0, 0, 0], [0.0] * 4
    runner.route(as_images(np.array([[sure, sure], [unsure] * 2, [unsure] * 2], np.float32)))
    assert list(runner._sessions) == [0]
    runner.route(as_images(np.array([[sure, unsure], [unsure, sure], [unsure] * 2], np.float32)))
    assert list(runner._sessions) == [0, 1]
    assert list(runner.load()._sessions) == [0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_from_image_files_the_runner_says_what_torch_says(
    deployed: Deployed, photos: list[Path], batch_size: int
) -> None:
    runner = Runner(deployed.folder, threads=1)
    predictions = runner.predict(photos, batch_size)
    with torch.no_grad():
        parts = [deployed.net.early(part, deployed.policy) for part in deployed.images.split(batch_size)]
    exits, logits = torch.cat([part.exit_index for part in parts]), torch.cat([part.logits for part in parts])
    assert {0, 1, 2} == set(exits.tolist())
    assert [p.exit for p in predictions] == exits.tolist()
    assert [p.file for p in predictions] == [str(photo) for photo in photos]
    assert [p.index for p in predictions] == logits.argmax(-1).tolist()
    assert [p.class_name for p in predictions] == [f"class {i}" for i in logits.argmax(-1).tolist()]
    scaled = logits / torch.tensor(TEMPERATURES)[exits, None]
    np.testing.assert_allclose([p.confidence for p in predictions], confidence(scaled), atol=1e-5)

    array = np.stack([runner.preprocess(runtime.load_image(photo)) for photo in photos])
    assert np.array_equal(array, deployed.images)
    for start in range(0, len(array), batch_size):
        ours, taken = runner.route(array[start : start + batch_size])
        np.testing.assert_allclose(ours, logits[start : start + batch_size], atol=1e-4)
        assert taken.tolist() == exits[start : start + batch_size].tolist()
    np.testing.assert_allclose(runner.every_exit(array), deployed.logits, atol=1e-4)
    assert [(p.index, p.exit) for p in runner.predict(array, batch_size)] == [(p.index, p.exit) for p in predictions]


def test_images_come_as_files_folders_and_pictures(deployed: Deployed, photos: list[Path]) -> None:
    runner = Runner(deployed.folder, threads=1)
    expected = runner.predict(photos)
    assert runner.predict(photos[0].parent) == expected
    assert runner.predict(str(photos[0])) == expected[:1]
    opened = [Image.open(photos[0]), runtime.load_image(photos[1])]
    assert [p.index for p in runner.predict(opened)] == [p.index for p in expected[:2]]
    assert [p.file for p in runner.predict(opened)] == [str(photos[0]), None]
    assert runner.predict([photos[2], photos[0].parent])[1:] == expected


def test_several_threads_share_a_runner(deployed: Deployed, photos: list[Path]) -> None:
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


def test_answers_without_meaning_are_told(spelled: Path) -> None:
    runner = Runner(spelled)
    told = np.zeros((EXITS, 2, WIDTH), np.float32)
    told[:, 1] = math.nan
    with pytest.warns(RuntimeWarning, match="1 of 2 images have logits that are not finite"):
        odd = runner.predict(as_images(told))
    assert [p.exit for p in odd] == [2, 2]
    assert math.isnan(odd[1].confidence)


# ---- images that are none


def test_unreadable_images_are_named_or_skipped(spelled: Path, photos: list[Path], tmp_path: Path) -> None:
    runner = Runner(spelled)
    (tmp_path / "text.png").write_text("no image")
    mixed = [photos[0], tmp_path / "text.png", photos[1], tmp_path / "absent.png"]
    with pytest.raises(ValueError, match=r"cannot read image .*text\.png: not an image of a known format .*'skip'"):
        runner.predict(mixed)
    for batch_size in (1, 2, 8):
        with pytest.warns(
            UserWarning, match=r"skipped 2 of 4 images: .*text\.png \(not an .*absent\.png \(No such file"
        ):
            found = runner.predict(mixed, batch_size, on_error="skip")
        assert [p.file for p in found] == [str(photos[0]), str(photos[1])]
    with pytest.warns(UserWarning, match="skipped 1 of 1"):
        assert runner.predict(mixed[1], on_error="skip") == []


@pytest.mark.parametrize(
    ("images_", "message"),
    [
        ([], "the list of images is empty"),
        (np.zeros((0, 3, 2, 2), np.float32), "the array of images is empty"),
        (
            np.zeros((1, 3, 4, 4), np.float32),
            r"images are float32 \(1, 3, 4, 4\); give a float32 array \(batch, 3, 2, 2\)",
        ),
        (np.zeros((1, 3, 2, 2)), r"images are float64 \(1, 3, 2, 2\)"),
        (np.zeros((2, 2, 3), np.uint8), r"images are uint8 \(2, 2, 3\)"),
        ([np.zeros((2, 2, 3), np.uint8)], "ndarray is no image; give files"),
        ([3], "int is no image"),
    ],
)
def test_what_is_no_list_of_images(spelled: Path, images_: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Runner(spelled).predict(images_)


def test_arguments_that_cannot_be(spelled: Path, tmp_path: Path) -> None:
    runner = Runner(spelled)
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        runner.predict(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="unknown on_error 'ignore'; choose from: raise, skip"):
        runner.predict(tmp_path, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no image in .*: looked for files ending in \.png"):
        runner.predict(tmp_path)
    with pytest.raises(ValueError, match=r"images are list; give a float32 array"):
        runner.route([[0.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads=0 must be"):
        Runner(spelled, threads=0)
    with pytest.raises(ValueError, match=r"has no provider 'MagicProvider'; choose from: .*CPUExecutionProvider"):
        Runner(spelled, providers=["MagicProvider"])
    assert Runner(spelled, providers=[("CPUExecutionProvider", {})]).route(np.zeros((1, 3, 2, 2), np.float32))[1] == [2]


# ---- folders that are none


def swap(folder: Path) -> None:
    one, other = folder / "stage0.onnx", folder / "stage1.onnx"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def flip(folder: Path) -> None:
    file = folder / "stage2.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = folder / "stage1.onnx"
    file.write_bytes(file.read_bytes()[:-9])


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in content.items() if v != "leave out"}))

    return apply


def edit_stage(k: int, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        content["stages"][k] |= changes
        (folder / "manifest.json").write_text(json.dumps(content))

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda f: (f / "stage1.onnx").unlink(), r"stage1\.onnx is missing; copy the whole exported folder again"),
    "cut off": (truncate, r"stage1\.onnx has \d+ bytes instead of \d+; copy"),
    "swapped": (swap, r"stage0\.onnx (has|is not the file that was exported)"),
    "a bit": (flip, r"stage2\.onnx is not the file that was exported: its SHA-256 starts with"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json does not exist; give a folder"),
    "no folder": (shutil.rmtree, r"manifest\.json does not exist"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is not JSON \("),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json is not JSON \("),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), r"is no manifest: it holds a list"),
    "newer": (edit(format=2), r"has format 2, this dynadapter reads up to 1; update dynadapter"),
    "no format": (edit(format="leave out"), r"has format=None; it was not written by dynadapter's export"),
    "programs": (
        edit(kind="torch.export"),
        r"'torch.export', not 'onnx'; open it with dynadapter.serve.export.load_programs",
    ),
    "odd kind": (edit(kind="zip"), r"'zip', not 'onnx'; known are onnx, torch.export"),
    "no stages": (edit(stages="leave out"), r"manifest\.json has no 'stages'; export the model again"),
    "empty": (edit(stages=[]), r"manifest\.json cannot be used: it names no stage"),
    "odd stages": (edit(stages=[1]), r"manifest\.json does not hold what it should"),
    "policy": (edit(policy={"kind": "Random"}), r"cannot be used: unknown policy 'Random'; choose from"),
    "thresholds": (edit(policy={"kind": "Margin", "threshold": [0.1] * 3}), r"threshold=.* does not fit 3 exits"),
    "temperatures": (edit(temperatures=[1.0]), r"temperatures=\[1\.0\] do not fit"),
    "classes": (edit(class_names=["a"]), r"names 1 classes, the graphs have 4"),
    "resize": (edit(preprocessing={"image_size": 2, "resize": "pad"}), r"unknown resize 'pad'"),
    "setting": (edit(preprocessing={"image_size": 2, "crop": 1}), r"does not hold what it should"),
    "size": (edit(preprocessing={"image_size": 9}), r"images of 9 pixels do not fit the input \(3, 2, 2\)"),
    "elsewhere": (edit_stage(0, file="../stage0.onnx"), r"'\.\./stage0\.onnx' is not a plain name"),
    "unfit": (edit_stage(1, inputs=[]), r"what stage0\.onnx gives is not what stage1\.onnx takes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_told_in_one_line(copied: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(copied)
    with pytest.raises(ValueError, match=message) as caught:
        Runner(copied)
    assert "\n" not in str(caught.value)
    assert str(copied) in str(caught.value)


def test_a_graph_that_onnxruntime_cannot_open(copied: Path) -> None:
    (copied / "stage0.onnx").write_bytes(b"no graph")
    edit_stage(0, bytes=8, sha256=runtime.sha256(copied / "stage0.onnx"))(copied)
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot open .*stage0\.onnx: ") as caught:
        Runner(copied).load()
    assert "\n" not in str(caught.value)


def test_a_manifest_may_be_edited(copied: Path) -> None:
    edit(policy={"kind": "Confidence", "threshold": 0.0})(copied)
    assert Runner(copied).route(np.zeros((2, 3, 2, 2), np.float32))[1].tolist() == [0, 0]
    assert Manifest(copied).policy.kind == "Confidence"


# ---- on its own

LOADED = """
import sys
heavy = {"torch", "torchvision", "timm", "lightning", "onnxruntime", "scipy", "rich"} & set(sys.modules)
"""


def test_importing_it_loads_no_framework() -> None:
    code = f"import dynadapter.serve.runtime\n{LOADED}\nprint(sorted(heavy))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_file_runs_by_itself(deployed: Deployed, photos: list[Path], tmp_path: Path) -> None:
    shutil.copy(runtime.__file__, tmp_path / "runner.py")
    code = f"""
import sys
sys.path = [p for p in sys.path if not p.endswith("src")]  # where the package is not installed
import runner
predictions = runner.Runner({str(deployed.folder)!r}).predict({str(photos[0].parent)!r})
{LOADED}
print(sorted(heavy), any(name.startswith("dynadapter") for name in sys.modules))
print([p.exit for p in predictions])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded, exits = done.stdout.splitlines()
    assert loaded == "['onnxruntime'] False"
    assert json.loads(exits) == [p.exit for p in Runner(deployed.folder).predict(photos)]


def test_the_command_line(deployed: Deployed, photos: list[Path], tmp_path: Path, capsys) -> None:
    assert runtime.main([str(deployed.folder), str(photos[0].parent), "--batch-size", "4", "--threads", "1"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "file,class,confidence,exit"
    predictions = Runner(deployed.folder, threads=1).predict(photos, batch_size=4)
    assert rows == [f"{p.file},{p.class_name},{p.confidence:.4f},{p.exit + 1}" for p in predictions]

    (tmp_path / "text.png").write_text("no image")
    assert runtime.main([str(deployed.folder), str(tmp_path), str(photos[0])]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot read image {tmp_path / 'text.png'}: not an image")
    assert runtime.main([str(deployed.folder), str(tmp_path), str(photos[0]), "--skip-errors"]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("warning: skipped 1 of 2 images")
    assert told.out.splitlines()[1] == rows[0]
    assert runtime.main([str(tmp_path), str(tmp_path)]) == 2
    assert "manifest.json does not exist" in capsys.readouterr().err


def test_without_onnxruntime_it_says_so(spelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        Runner(spelled)


def test_a_manifest_that_changed_by_itself_is_refused(tmp_path: Path) -> None:
    content = {"format": 1, "kind": "onnx", "class_names": ["a"]}
    content["checksum"] = runtime.checksum(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content).replace('"a"', '"b"'))
    with pytest.raises(ValueError, match="is not as it was written: copy the exported folder again"):
        runtime.Manifest(tmp_path)


def test_a_reader_that_has_seen_enough(deployed, photos):
    """As ``| head`` does: no traceback."""
    command = [sys.executable, "-m", "dynadapter.serve.runtime", str(deployed.folder), str(photos[0])]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
