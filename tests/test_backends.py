"""A bundle answers the same by torch, ONNX Runtime and OpenVINO, and `auto` takes what was measured to be fastest."""

import errno
import importlib.metadata
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace
from served import make_bundle, parts_of, tensors

from dynadapter.bench.timing import machine
from dynadapter.cli import networks
from dynadapter.cli.errors import Mistake
from dynadapter.exits.policies import AtExit, Confidence, Never, Patience
from dynadapter.files import replacing_folder
from dynadapter.serve import backends, export, fastest
from dynadapter.serve.backends import cache_of, open_graphs, use_backend
from dynadapter.serve.bundle import Bundle, load, save_bundle
from dynadapter.serve.engine import Engine
from dynadapter.serve.runtime.manifest import MANIFEST

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

GRAPHS = ["onnx", "openvino"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNADAPTER_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def reference() -> Bundle:
    return make_bundle()


@pytest.fixture(params=GRAPHS, scope="module")
def bundle(request, reference) -> Bundle:
    """Return the bundle by another backend than torch; all share one export."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    other = Bundle(reference.net, reference.policy, reference.config)
    assert use_backend(other, request.param) == f"backend {request.param}"
    return other


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max().clamp_min(1)))


@pytest.mark.parametrize("policy", [Confidence(0.6), Patience(2), Never(), AtExit(1)], ids=lambda policy: policy.name)
def test_graphs_route_as_the_network(bundle, reference, policy):
    for images in (tensors(0), tensors(1), tensors(21)):
        bundle.graphs.runner.chunk = 8
        found, expected = bundle.route(images, policy), reference.route(images, policy)
        assert torch.equal(found.exit_index, expected.exit_index)
        close(found.logits, expected.logits) if len(images) else None
    assert len(found.exit_index.unique()) > 1 or policy.name != Confidence(0.6).name


def test_graphs_compute_every_exit(bundle, reference):
    with torch.no_grad():
        close(bundle.runs(tensors(5)), reference.net(tensors(5)))


def test_engine_runs_by_graphs(bundle, reference):
    images = tensors(12)
    with Engine(bundle, batch=4, queue=32) as engine:
        answers = [job.result(60) for job in [engine.submit(image) for image in images]]
    expected = reference.route(images)
    assert [answer.exit_index for answer in answers] == expected.exit_index.tolist()
    close(torch.stack([answer.probabilities for answer in answers]), expected.logits.softmax(-1))


def test_graphs_stay_on_the_cpu(bundle):
    with pytest.raises(ValueError, match="load it with backend='torch'"):
        bundle.to("meta")
    assert bundle.backend in repr(bundle)


def test_load_exports_once(reference, tmp_path, monkeypatch):
    save_bundle(reference.net, tmp_path / "b", **parts_of(reference.net))
    use_backend(reference, "onnx")
    first = load(tmp_path / "b", backend="torch")
    assert first.graphs is None
    assert torch.equal(first.net(tensors(3)), reference.net(tensors(3)))
    folder = cache_of(first)
    folder.parent.mkdir(exist_ok=True)
    if not folder.exists():
        folder.symlink_to(cache_of(reference))
    reference.graphs = None
    monkeypatch.setattr("dynadapter.serve.export.export_onnx", lambda *_, **__: pytest.fail("exported again"))
    assert load(tmp_path / "b", backend="onnx").backend == "ONNX Runtime"


def test_two_exports_at_once(tmp_path, monkeypatch):
    folder, written = tmp_path / "new" / "graphs", []

    def slow(_, place):
        with replacing_folder(place, overwrite=False) as draft:
            time.sleep(0.3)
            (draft / MANIFEST).touch()
        written.append(place)

    def runner(place, **_):
        if not (place / MANIFEST).exists():
            raise ValueError
        return SimpleNamespace(load=lambda: "opened")

    monkeypatch.setattr(backends, "cache_of", lambda _: folder.parent)
    monkeypatch.setattr(backends, "_export", slow)
    monkeypatch.setattr(backends, "Runner", runner)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: open_graphs(None, "onnx").runner, range(2)))
    assert found == ["opened", "opened"]
    assert written == [folder]


def test_damaged_graphs_are_exported_again(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNADAPTER_CACHE", str(tmp_path))
    place = cache_of(reference)
    open_graphs(reference, "onnx")
    (place / "graphs" / "stage1.onnx").write_bytes(b"")
    with torch.no_grad():
        close(open_graphs(reference, "onnx")(tensors(5)), reference.net(tensors(5)))
    monkeypatch.setattr("dynadapter.__version__", "9.9")
    assert cache_of(reference) != place


def test_cache_that_cannot_be_written(reference, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DYNADAPTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot be written; set DYNADAPTER_CACHE to a folder that can: .*file"):
        open_graphs(reference, "onnx")


def test_damaged_cache_of_another_user(reference, tmp_path, monkeypatch):
    """Its files can be read, and neither removed nor written."""
    monkeypatch.setenv("DYNADAPTER_CACHE", str(tmp_path))
    (cache_of(reference) / "graphs").mkdir(parents=True)
    remove = backends.shutil.rmtree

    def refuses(path, ignore_errors=False, **_):
        if path == cache_of(reference) / "graphs" and not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        if path != cache_of(reference) / "graphs":
            remove(path, ignore_errors)

    monkeypatch.setattr(backends.shutil, "rmtree", refuses)
    with pytest.raises(OSError, match=r"set DYNADAPTER_CACHE to a folder that can: .*Permission denied"):
        open_graphs(reference, "onnx")


def test_module_of_another_package(reference, tmp_path, monkeypatch):
    """onnxruntime-gpu provides the module onnxruntime, and there is no package of this name."""
    distribution, place = importlib.metadata.distribution, cache_of(reference)

    def lacking(name):
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(importlib.metadata, "distribution", lacking)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("onnxruntime")
    assert cache_of(reference) == place
    parts = (reference.class_names, reference.preprocess, None, 20)
    written = export._manifest(reference.net, Never(), *parts)["versions"]["onnxruntime"]
    assert written == machine()["onnxruntime"] == onnxruntime.__version__
    monkeypatch.setattr(fastest, "cache_of", lambda _: tmp_path)
    monkeypatch.setattr(fastest, "missing", lambda name: [] if name == "onnx" else [name])
    monkeypatch.setattr(fastest, "measure", lambda *_: {"torch": 2.0, "onnx": 1.0})
    assert fastest.fastest(reference, 8)[0] == "onnx"


@pytest.mark.parametrize(
    ("backend", "words"), [("tensorrt", "choose from: torch, onnx, openvino, auto"), ("onnx", "pip install")]
)
def test_wrong_backend_is_refused(backend, words, reference, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda _: ["onnxruntime"])
    with pytest.raises((ValueError, ImportError), match=words):
        use_backend(reference, backend)


def test_batch_size_is_checked(reference):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        use_backend(reference, "auto", batch_size=0)


def test_device_of_graphs_is_checked(reference):
    elsewhere = SimpleNamespace(device=torch.device("cuda"), graphs=None)
    assert use_backend(elsewhere, "auto") == "backend torch (auto: on a GPU)"
    with pytest.raises(ValueError, match="runs on a CPU"):
        use_backend(elsewhere, "onnx")


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"torch": 2.0, "onnx": 1.0}, "onnx"),
        ({"torch": 1.0, "onnx": 2.0}, "torch"),
        ({"torch": 1.0, "onnx": 0.98}, "torch"),
    ],
)
def test_auto_takes_what_was_measured(seconds, best, tmp_path, monkeypatch):
    monkeypatch.setattr(fastest, "cache_of", lambda _: tmp_path)
    monkeypatch.setattr(fastest, "missing", lambda name: [] if name in seconds else [name])
    monkeypatch.setattr(fastest, "measure", lambda *_: seconds)
    name, words = fastest.fastest(None, 8)
    assert name == best
    assert "at batch 8" in words
    monkeypatch.setattr(fastest, "measure", lambda *_: pytest.fail("measured again"))
    assert fastest.fastest(None, 8) == (name, words)
    monkeypatch.setattr(fastest, "measure", lambda *_: {"torch": 1.0, "onnx": 9.0})
    assert fastest.fastest(None, 1)[0] == "torch"  # another batch size is measured
    assert len(json.loads((tmp_path / "measured.json").read_text())) == 2


def test_auto_without_a_cache_to_write(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(fastest, "cache_of", lambda _: tmp_path / "file")
    monkeypatch.setattr(fastest, "measure", lambda *_: {"torch": 2.0, "onnx": 1.0, "openvino": 3.0})
    monkeypatch.setattr(fastest, "missing", lambda _: [])
    monkeypatch.setattr(fastest, "version_of", lambda _: "1")
    assert fastest.fastest(None, 8)[0] == "onnx"


def test_auto_falls_back_to_torch(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(fastest, "cache_of", lambda _: tmp_path)
    monkeypatch.setattr(fastest, "measure", fails)
    assert fastest.fastest(None, 8) == (
        "torch",
        "backend torch (auto: the graphs of the others failed: no such operator)",
    )
    assert not list(Path(tmp_path).iterdir())
    monkeypatch.setattr(fastest, "missing", lambda name: [name])
    assert fastest.fastest(None, 8)[0] == "torch"


def test_measure_counts_who_reaches_a_stage(monkeypatch):
    seen, clock = [], iter(range(100))
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: next(clock))

    def step(k, inputs):
        seen.append(len(inputs[0]))
        return inputs, None

    # Each stage takes one second: 8, 4, and for 0.4 images of a batch that has at least one, 0.4 seconds
    assert fastest._once(step, torch.zeros(8, 1), [1.0, 0.5, 0.05]) == pytest.approx(1 + 1 + 0.4)
    assert seen == [8, 4, 1]


def test_measured_backends_are_all_timed(reference):
    found = fastest.measure(reference, ["onnx"], 2)
    assert list(found) == ["torch", "onnx"]
    assert min(found.values()) > 0


def test_commands_pass_the_backend_on(reference, tmp_path, monkeypatch, capsys):
    names = ("ckpt_path", "policy", "threshold", "weights", "pretrained")
    given = Namespace(bundle="b", device="cpu", backend="auto", **dict.fromkeys(names))
    asked = []
    monkeypatch.setattr(networks, "load_bundle", lambda *_: reference)
    monkeypatch.setattr(backends, "use_backend", lambda *args: asked.append(args) or "backend onnx (auto)")
    networks.load_network(given, batch_size=7)
    assert asked == [(reference, "auto", 7)]
    assert "backend onnx (auto)" in capsys.readouterr().out

    def refuses(*_):
        raise ImportError("backend=onnx needs onnx")

    monkeypatch.setattr(backends, "use_backend", refuses)
    with pytest.raises(Mistake, match="needs onnx"):
        networks.load_network(given)
