"""The runtime of an exported folder alone, without torch: routing, images, and damaged folders."""

import csv
import errno
import io
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
from conftest import raises_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from written_folder import EXITS, WIDTH, as_images, taken, write_folder

from dynadapter.files import checksum, files_of, sha256
from dynadapter.serve.export import copy_runtime
from dynadapter.serve.runtime import Runner, manifest, policies
from dynadapter.serve.runtime import predict as program
from dynadapter.serve.runtime.manifest import FORMAT, check_place, read_manifest
from dynadapter.serve.runtime.runner import CHUNK

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("written") / "folder", {"kind": "Confidence", "threshold": 0.9})


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


# ---- policies

values = st.floats(-30, 30, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])


def test_score_on_the_threshold_stops() -> None:
    even = np.zeros((1, 1, 2), np.float32)
    for settings_ in ({"kind": "Confidence", "threshold": 0.5}, {"kind": "Entropy", "threshold": 1.0}):
        assert policies.Policy(settings_, 2).stops(even).tolist() == [True]
    assert policies.Policy({"kind": "Margin", "threshold": 0}, 2).stops(even).tolist() == [True]


@pytest.mark.parametrize(
    ("given_", "temperatures", "message"),
    [
        (
            {"kind": "Random"},
            None,
            "unknown policy 'Random'; choose from: Confidence, Entropy, Margin, Patience, AtExit, Never",
        ),
        ({}, None, "unknown policy ''"),
        ({"kind": "Confidence"}, None, "policy Confidence has kind; it takes kind, threshold"),
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
def test_wrong_policies_are_refused(given_: dict[str, Any], temperatures: Any, message: str) -> None:
    with raises_one_line(ValueError, match=message):
        policies.Policy(given_, 3, temperatures)


# ---- routing


def watch(runner: Runner) -> list[tuple[int, int]]:
    """Record each run of a stage with the size of its batch."""
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
def test_route_keeps_order_and_skips_stages(written: Path, logits: list, policy: dict) -> None:
    runner = shared_runner(written)
    runner.policy = policies.Policy(policy, EXITS)
    logits = np.array(logits, np.float32).reshape(EXITS, -1, WIDTH)
    samples = logits.shape[1]
    calls = watch(runner)
    try:
        out, exits = runner.route(as_images(logits))
    finally:
        del runner.stage  # the recording one
    one_by_one = [
        next((k for k in range(EXITS - 1) if runner.policy.stops(logits[: k + 1, i : i + 1])[0]), EXITS - 1)
        for i in range(samples)
    ]
    assert exits.tolist() == one_by_one
    np.testing.assert_array_equal(out, logits[exits, np.arange(samples)])
    still_in = [sum(k <= exit for exit in one_by_one) for k in range(EXITS)]
    assert calls == [(k, size) for k, size in enumerate(still_in) if size]
    np.testing.assert_array_equal(runner.every_exit(as_images(logits)), logits)


def test_large_batches_run_in_chunks(written: Path) -> None:
    draw, samples = np.random.default_rng(0), 2 * CHUNK + 5
    logits = draw.normal(0, 3, (EXITS, samples, WIDTH)).astype(np.float32)
    runner = Runner(written, threads=1)
    runner.policy = policies.Policy({"kind": "Confidence", "threshold": 0.7}, EXITS)
    expected, calls = taken(runner.policy, logits), watch(runner)
    for chunk, first in ((CHUNK, [CHUNK, CHUNK, 5]), (None, [samples])):
        calls.clear()
        assert runner.chunk == CHUNK
        runner.chunk = chunk
        out, exits = runner.route(as_images(logits))
        assert [size for k, size in calls if k == 0] == first
        assert exits.tolist() == expected.tolist()
        np.testing.assert_array_equal(out, logits[exits, np.arange(samples)])
        np.testing.assert_array_equal(runner.every_exit(as_images(logits)), logits)
        runner.chunk = CHUNK
    assert Runner(written, threads=3).chunk == 3 * CHUNK  # as many for each thread


def test_chunk_counts_usable_cores(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5}, raising=False)
    assert Runner(written).chunk == 2 * CHUNK


def test_stages_share_memory(written: Path) -> None:
    for runner in (Runner(written), Runner(written)):  # the second runner finds the arena registered
        assert runner.engine._options.get_session_config_entry("session.use_env_allocators") == "1"
        assert runner.load().route(np.zeros((3, 3, 2, 2), np.float32))[1].shape == (3,)


_RUNNERS: dict[Path, Runner] = {}


def shared_runner(folder: Path) -> Runner:
    return _RUNNERS.setdefault(folder, Runner(folder, threads=1))


def test_unneeded_stages_are_not_loaded(written: Path) -> None:
    runner = Runner(written)
    assert not runner._sessions
    sure, unsure = [9.0, 0, 0, 0], [0.0] * 4
    runner.route(as_images(np.array([[sure, sure], [unsure] * 2, [unsure] * 2], np.float32)))
    assert list(runner._sessions) == [0]
    runner.route(as_images(np.array([[sure, unsure], [unsure, sure], [unsure] * 2], np.float32)))
    assert list(runner._sessions) == [0, 1]
    assert list(runner.load()._sessions) == [0, 1, 2]


def test_nonfinite_logits_raise(written: Path) -> None:
    runner = Runner(written)
    logits = np.zeros((EXITS, 2, WIDTH), np.float32)
    logits[:, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 2 images have logits that are not finite"):
        runner.predict(as_images(logits))
    assert runner.route(as_images(logits))[1].tolist() == [2, 2]


# ---- wrong images and arguments


def test_unreadable_images_raise_or_skip(written: Path, tmp_path: Path) -> None:
    photos = [tmp_path / "0.png", tmp_path / "1.png"]
    for photo in photos:
        Image.new("RGB", (5, 4)).save(photo)
    runner = Runner(written)
    (tmp_path / "text.png").write_text("no image")
    mixed = [photos[0], tmp_path / "text.png", photos[1], tmp_path / "absent.png"]
    with pytest.raises(ValueError, match=r"cannot read image .*text\.png: not an image of .*on_error: skip"):
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
        ([], "there is not an image; give folders, or a file"),
        (np.zeros((0, 3, 2, 2), np.float32), "there is not an image"),
        (
            np.zeros((1, 3, 4, 4), np.float32),
            r"images are float32 \(1, 3, 4, 4\); give a float32 array \(batch, 3, 2, 2\)",
        ),
        (np.zeros((1, 3, 2, 2)), r"images are float64 \(1, 3, 2, 2\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"images are uint8 \(1, 2, 2, 3\)"),
        (np.zeros(4, np.uint8), r"an array of uint8 \(4,\) is not an image"),
        ([3], "an image is a int"),
    ],
)
def test_wrong_images_are_refused(written: Path, images_: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Runner(written).predict(images_)


def test_wrong_arguments_are_refused(written: Path, tmp_path: Path) -> None:
    runner = Runner(written)
    with pytest.raises(ValueError, match="batch_size=0 must be"):
        runner.predict(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="unknown on_error 'ignore'; choose from: raise, skip"):
        runner.predict(tmp_path, on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no image in .*: looked for files ending in \.png"):
        runner.predict(tmp_path)
    with pytest.raises(ValueError, match=r"images are list; give a float32 array"):
        runner.route([[0.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads=0 must be"):
        Runner(written, threads=0)
    with pytest.raises(ValueError, match=r"has no provider 'MagicProvider'; choose from: .*CPUExecutionProvider"):
        Runner(written, providers=["MagicProvider"])
    assert Runner(written, providers=[("CPUExecutionProvider", {})]).route(np.zeros((1, 3, 2, 2), np.float32))[1] == [2]


# ---- as a program


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_program_answers_any_name_and_encoding(encoding: str, written: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/exported\xe9"
    shutil.copytree(os.fsencode(written), folder)
    place = Path(os.fsdecode(folder))
    copy_runtime(place)
    edit(files={name: sha256(place / name) for name in files_of(place) if name != "manifest.json"})(place)
    (tmp_path / "photos").mkdir()
    names = [b"caf\xe9.png", "日本.png".encode(), b"a\rb.png"]
    for name in names:
        Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(os.fsdecode(os.fsencode(tmp_path / "photos") + b"/" + name))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": ""}
    command = [sys.executable, folder + b"/predict.py", tmp_path / "photos"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    rows = list(csv.reader(io.StringIO(done.stdout.decode(errors="surrogateescape"), newline="")))
    assert sorted(os.fsencode(row[0]).rpartition(b"/")[2] for row in rows[1:]) == sorted(names)
    command[-1] = os.fsencode(tmp_path) + b"/absent\xe9.png"
    done = subprocess.run(command, capture_output=True, env=environment)
    [line] = done.stderr.decode(encoding).splitlines()
    assert done.returncode == 2
    assert line.startswith("error: image ")
    assert line.endswith("absent\\udce9.png does not exist; correct the path, or give --on_error skip")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("what", ["folder", "stage", "manifest", "image"])
def test_program_names_what_is_unreadable(
    what: str, code: int, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    failing = {"folder": "photos", "stage": "stage1.onnx", "manifest": "manifest.json", "image": "a.png"}[what]

    def fails(real: Any) -> Any:
        def opened(path: Any, *args: Any, **more: Any) -> Any:
            if os.fspath(path).endswith(failing):
                raise OSError(code, os.strerror(code), os.fspath(path))
            return real(path, *args, **more)

        return opened

    monkeypatch.setattr(os, "open", fails(os.open))
    monkeypatch.setattr(os, "scandir", fails(os.scandir))
    assert program.main([str(tmp_path / "photos")], copied) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert failing in line
    assert os.strerror(code) in line


def test_program_spreads_a_range(written: Path, tmp_path: Path, capfd: Any) -> None:
    values = np.array([[0, 4095], [2048, 1024]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray((values >> 4).astype(np.uint8)).save(tmp_path / "flat.png")
    answers = []
    for name, more in (("flat.png", []), ("deep.png", ["--value_range", "0", "4095"]), ("deep.png", [])):
        assert program.main([str(tmp_path / name), *more], written) == 0
        printed = capfd.readouterr()
        answers.append(printed.out.splitlines()[1].split(",")[1:])
        assert ("values from 0 to 4095" in printed.err) == (name == "deep.png" and not more)
    assert answers[0] == answers[1] != answers[2]


def test_runner_takes_every_source(written: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content, runner = (tmp_path / "a.png").read_bytes(), Runner(written)
    [expected] = runner.predict(tmp_path / "a.png")
    for source in (content, io.BytesIO(content), pixels, Image.fromarray(pixels)):
        for given_ in (source, [source]):
            [found] = runner.predict(given_)
            assert found[1:] == expected[1:]
            assert found.file is None


# ---- damaged folders


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


def make_pipe(folder: Path, name: str = "manifest.json") -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


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


def hide(folder: Path) -> None:
    (folder / "dynadapter" / "sub").mkdir(parents=True)
    (folder / "dynadapter" / "sub" / "numpy.py").write_text("")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "predict.cpython-311.pyc").write_bytes(b"")  # what Python writes is no fault


def change_code(folder: Path) -> None:
    (folder / "predict.py").write_text("print(1)")
    edit(files={"predict.py": sha256(folder / "predict.py")})(folder)
    (folder / "predict.py").write_text("print(2)")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda f: (f / "stage1.onnx").unlink(), r"stage1\.onnx is missing; copy the whole exported folder again"),
    "cut off": (truncate, r"stage1\.onnx is not the file that was exported: it has \d+ bytes"),
    "swapped": (swap, r"stage0\.onnx is not the file that was exported"),
    "a bit": (flip, r"stage2\.onnx is not the file that was exported: .* its SHA-256 starts with"),
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        r"manifest\.json does not exist; give a folder that",
    ),
    "no folder": (shutil.rmtree, r"manifest\.json does not exist"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json is not JSON \("),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json is not JSON \("),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), r"holds a list, not a manifest"),
    "old": (edit(format=2), r"has format=2, .* reads format 3; export the model again to another folder"),
    "newer": (edit(format=4), r"has format=4, this version of dynadapter reads format 3; export the model again"),
    "no format": (edit(format="leave out"), r"has format=None, this version"),
    "a pipe": (make_pipe, r"manifest\.json cannot be read: a pipe"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), r"manifest\.json is not JSON \("),
    "no stages": (edit(stages="leave out"), r"manifest\.json has no 'stages'; export the model again"),
    "empty": (edit(stages=[]), r"manifest\.json cannot be used: it names no stage"),
    "odd stages": (edit(stages=[1]), r"manifest\.json has a value of a wrong type"),
    "policy": (edit(policy={"kind": "Random"}), r"cannot be used: unknown policy 'Random'; choose from"),
    "thresholds": (edit(policy={"kind": "Margin", "threshold": [0.1] * 3}), r"threshold=.* does not fit 3 exits"),
    "temperatures": (edit(temperatures=[1.0]), r"temperatures=\[1\.0\] do not fit"),
    "classes": (edit(class_names=["a"]), r"names 1 classes, the graphs have 4"),
    "resize": (edit(preprocessing={"image_size": 2, "resize": "pad"}), r"unknown resize 'pad'"),
    "setting": (edit(preprocessing={"image_size": 2, "crop": 1}), r"has a value of a wrong type"),
    "size": (edit(preprocessing={"image_size": 9}), r"images of 9 pixels do not fit the input \(3, 2, 2\)"),
    "elsewhere": (edit_stage(0, file="../stage0.onnx"), r"'\.\./stage0\.onnx' is not a plain name"),
    "pipe of a stage": (lambda f: make_pipe(f, "stage1.onnx"), r"stage1\.onnx cannot be read: a pipe"),
    "a file more": (lambda f: (f / "stage0.onnx.data").write_bytes(b"x"), r"holds stage0\.onnx\.data, which was not"),
    "a file inside": (hide, r"holds dynadapter/sub/numpy\.py, which was not exported \(1 such"),
    "a link": (lambda f: (f / "more").symlink_to("/"), r"holds more, which was not exported"),
    "code gone": (edit(files={"predict.py": "0" * 64}), r"predict\.py is missing; copy the whole"),
    "code changed": (change_code, r"predict\.py is not the file that was exported"),
    "a path": (edit(files={"../other": "0" * 64}), r"the file '\.\./other' is not inside the folder"),
    "a path further in": (edit(files={"a/../../other": "0" * 64}), r"the file 'a/\.\./\.\./other' is not inside"),
    "an absolute path": (edit(files={"/etc/hostname": "0" * 64}), r"the file '/etc/hostname' is not inside"),
    "a drive": (edit(files={"C:other": "0" * 64}), r"the file 'C:other' is not inside the folder"),
    "no files": (edit(files="leave out"), r"manifest\.json has no 'files'"),
    "unfit": (edit_stage(1, inputs=[]), r"the outputs of stage0\.onnx do not fit the inputs of stage1\.onnx"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_gives_one_line(copied: Path, damage: str) -> None:
    apply, message = DAMAGE[damage]
    apply(copied)
    with raises_one_line(ValueError, match=message) as caught:
        Runner(copied)
    assert str(copied) in str(caught.value)


def test_invalid_graph_is_refused(copied: Path) -> None:
    (copied / "stage0.onnx").write_bytes(b"no graph")
    edit_stage(0, bytes=8, sha256=sha256(copied / "stage0.onnx"))(copied)
    with raises_one_line(ValueError, match=r"ONNX Runtime cannot open .*stage0\.onnx: "):
        Runner(copied).load()


@pytest.mark.parametrize("there", [True, False])
def test_exchanged_graph_is_refused(copied: Path, there: bool) -> None:
    """An export that replaces the folder must not give the later stages of an open one."""
    runner, image = Runner(copied), np.zeros((1, 3, 2, 2), np.float32)
    inputs, _ = runner.stage(0, [image])
    if there:
        (copied / "stage1.onnx").write_bytes((copied / "stage0.onnx").read_bytes())
    else:
        (copied / "stage1.onnx").unlink()
    with raises_one_line(ValueError, match=r"stage1\.onnx has changed since it was opened; open the folder again"):
        runner.stage(1, inputs)


def test_folder_exchanged_while_it_is_checked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = manifest._read_json

    def reads(path: Path) -> Any:
        content = real(path)
        monkeypatch.setattr(manifest, "_read_json", real)
        (copied / "stage0.onnx").write_bytes((copied / "stage0.onnx").read_bytes() + b" ")
        edit_stage(0, sha256=sha256(copied / "stage0.onnx"))(copied)
        return content

    monkeypatch.setattr(manifest, "_read_json", reads)
    assert read_manifest(copied).stages[0].sha256 == sha256(copied / "stage0.onnx")


def test_only_exported_folders_are_replaced(copied: Path, tmp_path: Path) -> None:
    assert check_place(copied, overwrite=True) == copied
    for content in ("{}", "[]", "{", '{"format": 1, "files": [], "stages": []}', '{"files": {}, "stages": []}'):
        (copied / "manifest.json").write_text(content)
        with raises_one_line(ValueError, match=r"holds manifest\.json, stage0\.onnx, stage1\.onnx and 1 more; "):
            check_place(copied, overwrite=True)
    (copied / "manifest.json").write_text('{"format": 1, "files": {}, "stages": [{"file": 7}]}')
    with raises_one_line(ValueError, match=r"holds stage0\.onnx, stage1\.onnx, stage2\.onnx; "):
        check_place(copied, overwrite=True)


def test_relative_folder_after_chdir(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    runner = Runner(copied.name)
    monkeypatch.chdir("/")
    assert runner.load() is runner


def test_external_weights_are_refused(copied: Path, tmp_path: Path) -> None:
    """A graph could otherwise read any file of this machine as its weights."""
    file = copied / "stage0.onnx"
    model = onnx.load(file)
    tensor = model.graph.initializer.add()
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "weights"))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    file.write_bytes(model.SerializeToString())
    edit_stage(0, bytes=file.stat().st_size, sha256=sha256(file))(copied)
    with pytest.raises(ValueError, match=r"stage0\.onnx takes weights from another file"):
        Runner(copied)


def test_edited_manifest_is_used(copied: Path) -> None:
    edit(policy={"kind": "Confidence", "threshold": 0.0})(copied)
    assert Runner(copied).route(np.zeros((2, 3, 2, 2), np.float32))[1].tolist() == [0, 0]
    assert read_manifest(copied).policy.kind == "Confidence"


def test_changed_manifest_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"format": FORMAT, "class_names": ["a"]}
    content["checksum"] = checksum(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content).replace('"a"', '"b"'))
    with pytest.raises(ValueError, match="has changed since it was written: copy the exported folder again"):
        read_manifest(tmp_path)


# ---- imports


def test_runtime_loads_no_framework() -> None:
    heavy = "{'torch', 'torchvision', 'timm', 'lightning', 'onnxruntime', 'scipy', 'rich'}"
    code = f"import sys, dynadapter.serve.runtime.predict; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_missing_onnxruntime_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        Runner(written)


def test_engines_give_the_same(written: Path) -> None:
    pytest.importorskip("openvino")
    images = as_images(np.random.default_rng(0).normal(size=(EXITS, 37, WIDTH)).astype(np.float32))
    one, other = Runner(written, threads=1), Runner(written, threads=1, engine="openvino")
    for left, right in zip(one.route(images), other.route(images), strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(one.every_exit(images), other.every_exit(images))
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = other.every_exit(images[number : number + 5])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in found.items():
        np.testing.assert_array_equal(logits, one.every_exit(images)[:, number : number + 5])
    assert len(found) == 20


def test_openvino_refuses_what_is_not_its_own(written: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match="belong to ONNX Runtime"):
        Runner(written, ["CPUExecutionProvider"], engine="openvino")
    folder = write_folder(tmp_path / "int8", {"kind": "Never"}, precision="int8")
    with pytest.raises(ValueError, match="without int8"):
        Runner(folder, engine="openvino")


def test_unknown_or_missing_engine_is_named(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="choose from: onnxruntime, openvino"):
        Runner(written, engine="tensorrt")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"dynadapter\[openvino\]"):
        Runner(written, engine="openvino")
