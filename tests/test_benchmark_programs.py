"""The timing programs on a tiny network, and the log that they share."""

import hashlib
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dynadapter import create_backbone
from dynadapter.adapters import RepAdapter
from dynadapter.bench.timing import cpu_name

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
QUICK = ["--tiny", "--rounds", "2"]
SHARES = [0.5, 0.3, 0.15, 0.05]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the log


def test_log_finds_only_its_own_machine(program, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)  # it would be in the key
    common, file, key = program("common"), tmp_path / "log.jsonl", {"backbone": "tiny"}
    other = {"key": {"cpu": "another"} | key, "value": 1}
    file.write_text(json.dumps(other) + "\n")
    log = common.Log(file)
    assert log.find(key) is None
    log.add(key, value=2)
    assert [line["value"] for line in read(file)] == [1, 2]
    assert common.Log(file).find(key)["value"] == 2
    assert read(file)[1]["key"] == {"cpu": cpu_name()} | key
    line = read(file)[1]
    older = line | {"time": "2026-01-01T00:00:00+00:00", "value": 1}
    file.write_text("".join(json.dumps(one) + "\n" for one in (line, older)))  # the time decides, not the place
    assert common.Log(file).find(key)["value"] == 2
    assert common.newest([line, older]) == [line]
    older["machine"] = older["machine"] | {"torch": "2.0"}
    assert common.newest([line, older]) == [line, older]
    file.write_text(json.dumps(older) + "\n")
    assert common.Log(file).find(key) is None


def test_log_cut_short_is_refused(program, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"key": {}}\n{"ke')
    with pytest.raises(SystemExit, match="ends in the middle of a line"):
        program("common").Log(file)


# ---- every program: runs, is resumable, and its lines make rows

PROGRAMS: dict[str, list[str]] = {
    "latency": ["--batches", "5"],
    "training": [],
    "stage_compile": ["--batches", "2"],
    "token_merging": [],
    "adapters": [],
    "serving": ["--batches", "1", "4", "--parts", "stream", "baselines"],
    "several_tasks": [],
    "load": ["--clients", "2", "--seconds", "0.2"],
}
SLOW = ("stage_compile", "load")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PROGRAMS]
IGNORED = ["ignore:`torch.jit.:FutureWarning", "ignore:`torch.jit.:DeprecationWarning"]


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory) -> Callable[[str], tuple[Path, list[str]]]:
    """Run a program once on a tiny network and return its lines' file and its arguments."""
    done: dict[str, tuple[Path, list[str]]] = {}

    def run(name: str) -> tuple[Path, list[str]]:
        if name not in done:
            file = tmp_path_factory.mktemp(name) / "out.jsonl"
            argv = ["--out", str(file), *QUICK, *PROGRAMS[name]]
            with pytest.MonkeyPatch.context() as patch:
                if name == "serving":
                    patch.setattr(program(name), "COMPILE", {"backend": "eager"})
                program(name).main(argv)
            done[name] = file, argv
        return done[name]

    return run


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize("name", NAMES)
def test_program_is_resumable(program, finished, name, capsys, monkeypatch):
    file, argv = finished(name)
    capsys.readouterr()
    before = file.read_bytes()
    for case in [case for case in vars(program(name)) if case == "case" or case.endswith("_case")]:
        monkeypatch.setattr(program(name), case, None)  # is not called again
    program(name).main(argv)
    assert file.read_bytes() == before
    assert "tiny" in capsys.readouterr().out


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize("name", NAMES)
def test_lines_make_rows(program, finished, name):
    lines = read(finished(name)[0])
    assert all({"key", "machine", "time"} <= line.keys() for line in lines)
    rows = [row for line in lines for row in program(name).rows(line)]
    assert len(rows) >= len(lines)
    assert all("control" in program(name).rows(line)[0] for line in lines)


@pytest.mark.slow  # four exports
def test_shipped_recipes_are_timed(program, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    argv = ["--out", str(tmp_path / "out.jsonl"), *QUICK, "--parts", "shipped", "--batches", "2"]
    program("serving").main(argv)
    lines = read(tmp_path / "out.jsonl")
    assert [line["key"]["recipe"] for line in lines] == ["vtab", "vtab, token_merging"]
    arms = {"smaller static", "merged", "onnx static", "onnx staged"}
    assert all(arms <= line.keys() and program("serving").rows(line) for line in lines)
    monkeypatch.setattr(sys.modules["shipped"], "shipped_case", None)  # is not called again
    program("serving").main(argv)
    assert read(tmp_path / "out.jsonl") == lines


def test_committed_lines_make_rows(program):
    for name in PROGRAMS:
        file = BENCHMARKS / "results" / f"{name}.jsonl"
        for line in read(file) if file.exists() else ():
            assert program(name).rows(line)


# ---- what their numbers mean


def test_latency_ratios(program, finished):
    (line,) = read(finished("latency")[0])
    got = line["50/30/15/5 plain"]
    assert got["shares"] == SHARES
    assert got["efficiency"] == pytest.approx(got["speedup"] / got["mac_speedup"])
    assert line["25/25/25/25 class first"]["shares"] == [0.25] * 4
    assert line["all last plain"]["shares"] == [0, 0, 0, 1]
    assert line["50/30/15/5 class first"]["mac_speedup"] > got["mac_speedup"] > 1
    alone = zip(line["seconds"]["50/30/15/5 stages alone"], line["seconds"]["50/30/15/5 plain"], strict=True)
    assert got["of_stages_alone"] == pytest.approx(statistics.median(a / b for a, b in alone))


def test_batch_from_which_routing_pays(program):
    speedups = {1: 1.2, 8: 0.9, 64: 1.1, 256: 1.5, 512: 0.5}
    lines = {batch: {"one": {"speedup": s}, "control": 1.5 if batch == 512 else 1.0} for batch, s in speedups.items()}
    assert program("latency").pays_from(lines, "one") == 64  # the line of batch 512 is void
    assert program("latency").pays_from({8: lines[8], 512: lines[512]}, "one") is None


def test_client_that_fails_ends_the_load(program):
    """The server closes the connection of its second request: the round has no throughput."""
    load, seen = program("load"), program("load").Seen()

    def answer(server: socket.socket) -> None:
        connection = server.accept()[0]
        connection.recv(65536)
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"exit":1}')
        connection.recv(65536)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            load.run(server.getsockname()[1], [b"photo"], 1, 30.0, seen)
    assert not seen.throughput


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["latency", "training", "stage_compile"])
def test_missing_gpu_is_one_line(program, name, tmp_path):
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        program(name).main(["--device", "cuda", "--out", str(tmp_path / "out.jsonl")])


def test_compile_verdict_follows_the_rule(program):
    verdict = program("stage_compile").verdict

    def lines(*gains: float, deep: float = 0.5) -> list[dict[str, Any]]:
        shares = {"routing": [0.5, 0.5], "routing compiled": [1 - deep, deep]}
        return [{"over_eager": {"routing compiled": gain}, "shares": shares} for gain in gains]

    assert verdict(lines(1.2, 1.3, 1.0, 1.0)).startswith("routing compiled passes")
    for gains in ((1.2, 1.1, 1.1, 1.1), (1.3, 1.3, 1.3, 0.9)):
        assert verdict(lines(*gains)).startswith("no way of compiling passes")
    assert verdict(lines(1.5, 1.5, deep=0.25)).startswith("no way of compiling passes")  # it ran fewer stages


@pytest.mark.filterwarnings(*IGNORED)
def test_stream_answers_as_plain_routing(finished):
    line = next(line for line in read(finished("serving")[0]) if line["key"]["part"] == "stream")
    plain, stream = line["50/30/15/5 plain"], line["50/30/15/5 Stream of 8"]
    assert plain["shares"] == stream["shares"] == SHARES
    assert stream["same_exits"] == 1
    assert plain["over_plain"] == 1
    assert 0 < stream["waits_for"]["mean"] <= stream["waits_for"]["most"] < 20


@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(("arm", "package"), [("peft LoRA merged", "peft"), ("earlyon", "earlyon")])
def test_missing_baselines_are_named(finished, arm, package):
    for line in read(finished("serving")[0]):
        if line["key"]["part"] == "baselines":
            assert line["routing"]["shares"] == SHARES
            assert line["routing, LoRA unmerged"]["mac_speedup"] < line["routing"]["mac_speedup"]
            missing = f"{arm}: ModuleNotFoundError: No module named '{package}"
            assert arm in line or any(note.startswith(missing) for note in line["notes"])


@pytest.mark.slow
def test_onnx_stages_beside_one_graph(program, tmp_path):
    pytest.importorskip("onnxscript")
    serving, common = program("serving"), program("common")
    _, net = common.build(**common.TINY["tiny"])
    line = serving.onnx_case(net, serving.Exported(net, 32, tmp_path), size=32, batch=2, rounds=2)
    got = line["50/30/15/5 class first"]
    assert got["shares"] == SHARES
    assert got["efficiency"] == pytest.approx(got["speedup"] / got["mac_speedup"])
    assert json.loads(json.dumps(line)) == line


def test_convolutions_equal_repadapter(program):
    base = torch.nn.Linear(16, 24)
    layer = program("adapters").Convolutions(base).eval()
    own = RepAdapter(targets=("qkv",)).wrap(torch.nn.ModuleDict({"qkv": base}), "qkv")
    with torch.no_grad():
        own.down.copy_(layer.down.weight[..., 0])
        own.down_bias.copy_(layer.down.bias)
        own.up.copy_(layer.up.weight[..., 0])
        own.up_bias.copy_(layer.up.bias)
        x = torch.randn(2, 7, 16)
        torch.testing.assert_close(own.eval()(x), layer(x))


# ---- gpu.sh


def gpu(tmp_path: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(BENCHMARKS / "gpu.sh"), *parts]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_gpu_script_lists_its_parts(tmp_path):
    listed = gpu(tmp_path)
    assert listed.returncode == 0
    assert {"tests", "step", "routing", "compile", "pretrain", "pretrain_micro", "tasks"} <= {
        line.split()[0] for line in listed.stdout.split("\n") if line
    }
    unknown = gpu(tmp_path, "nope")
    assert (unknown.returncode, "no part is named 'nope'" in unknown.stderr) == (2, True)


@pytest.mark.slow
def test_gpu_parts_run_once_on_a_cpu(tmp_path, monkeypatch):
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (48, 48), (20 * k, 100, 50)).save(tmp_path / "data" / name / f"{k}.png")
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "weights"))
    parts = {part: f"gpu_{part}" for part in ("step", "routing", "compile")}
    parts |= {"pretrain": "gpu_small", "pretrain_micro": "gpu_micro_plain"}
    contents = []
    for _ in range(2):
        done = gpu(tmp_path, "--tiny", "tests", *parts)
        assert done.returncode == 0, done.stderr[-2000:]
        contents.append({name: (tmp_path / f"{name}.jsonl").read_bytes() for name in parts.values()})
    assert contents[0] == contents[1]
    suite = ElementTree.parse(tmp_path / "gpu_tests.xml").find("testsuite").attrib
    assert int(suite["tests"]) > int(suite["skipped"])
    assert (suite["failures"], suite["errors"]) == ("0", "0")
    assert all(b'"precision": "bf16"' in contents[0][name] for name in ("gpu_step", "gpu_routing", "gpu_compile"))
    about = json.loads((tmp_path / "small.json").read_text())
    assert hashlib.sha256((tmp_path / "small.safetensors.0").read_bytes()).hexdigest() == about["sha256"]
    assert json.loads((tmp_path / "micro_plain.json").read_text())["start"]


@pytest.mark.slow
def test_gpu_tasks_continue_elsewhere(program, tmp_path, monkeypatch):
    """The archive of a finished call holds all that a fresh machine needs to repeat no run."""
    program("fresh").main(["--out", str(tmp_path / "tasks"), "--tiny", "--tasks", "textures"])
    shape = {"img_size": 48, "patch_size": 6, "embed_dim": 16, "depth": 8, "num_heads": 2}
    net = create_backbone("vit_tiny_patch16_224", 2, **shape)
    (tmp_path / "weights").mkdir()
    save_file(net.state_dict(), tmp_path / "weights" / "small.safetensors.0")  # a piece
    about = {"architecture": "vit_tiny_patch16_224", "timm_args": shape, "preprocess": {"normalization": "half"}}
    (tmp_path / "weights" / "small.json").write_text(json.dumps(about))
    for name in ("TASKS", "WEIGHTS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    archive, run = tmp_path / "gpu_tasks_small.tar.gz", tmp_path / "runs/gpu_tasks_small"
    lines = []
    for _ in range(3):
        done = gpu(tmp_path, "--tiny", "tasks")
        assert done.returncode == 0, done.stderr[-2000:]
        lines.append((run / "transfer/results.jsonl").read_text().splitlines())
        shutil.rmtree(run)
        if len(lines) == 2:  # as if the time had been over before the last run
            with tarfile.open(archive) as packed:
                packed.extractall(run, filter="data")
            (run / "transfer/results.jsonl").write_text("".join(f"{line}\n" for line in lines[0][:-1]))
            with tarfile.open(archive, "w:gz") as packed:
                packed.add(run, ".")
            shutil.rmtree(run)
    assert lines[0] == lines[1]
    assert len(lines[0]) == 6
    assert lines[2][:-1] == lines[0][:-1]
    assert json.loads(lines[2][-1])["run"] == json.loads(lines[0][-1])["run"]


@pytest.mark.slow
def test_killed_runs_equal_uninterrupted(program, tmp_path):
    argv = ["--out", str(tmp_path / "soak.jsonl"), "--work", str(tmp_path / "work"), "--chains", "1", "--epochs", "2"]
    with pytest.raises(SystemExit) as ending:
        program("soak").main(argv)
    assert not ending.value.code
    assert {line["outcome"] for line in read(tmp_path / "soak.jsonl")} == {"same"}
