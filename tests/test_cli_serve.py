"""``dynadapter serve``: settings, backbones that are held once, and a process that a signal stops."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from commands import refused
from conftest import VIT, make_vit
from served import NAMES, make_bundle, make_net, parts_of, photos

from dynadapter.adapters import Adapter, AdapterSpec, LoRA, inject
from dynadapter.backbones import fingerprint
from dynadapter.backbones.layout import lay_out_for_cpu
from dynadapter.cli import main, serve
from dynadapter.cli.errors import Mistake
from dynadapter.exits.heads import Balanced
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Never
from dynadapter.serve.bundle import BackboneSource, Bundle, save_bundle
from dynadapter.serve.bundle.saving import describe
from dynadapter.serve.sharing import share_backbones


def test_help_and_mistakes_load_no_torch(tmp_path):
    code = (
        "import sys\nfrom dynadapter.cli import main\n"
        "for args in (['--help'], ['--bundle', 'a', '--port', 'x'], ['--bundle', 'a.ckpt']):\n"
        "    try:\n        main(['serve', *args])\n    except SystemExit:\n        pass\n"
        "print([name for name in ('torch', 'fastapi', 'uvicorn') if name in sys.modules])"
    )
    (tmp_path / "a.ckpt").touch()
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.endswith("[]\n")
    assert "--max_pixels" in done.stdout
    assert "a.ckpt is a checkpoint, not a bundle" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", "--bundle must be given"),
        ("--bundle a --batch 0", "batch=0 must be at least 1"),
        ("--bundle a --port 70000", "port=70000 must be at most 65535"),
        ("--bundle a --queue 16", "queue=16 must be above batch=16"),
        ("--bundle x/a y/a", "two bundles have the name a; give them as NAME=PLACE, as in a2=y/a"),
        ("--bundle ä", "'ä' is not a valid name for a path; give letters"),
        ("--bundle a --together true", "--together true needs at least two bundles; give more, or leave it out"),
        ("--bundle a b --together true --backend auto", "--together true runs by torch, not by --backend auto"),
        ("--bundle a --prot 1", "did you mean"),
    ],
)
def test_mistake_is_one_line(args, words, capsys):
    assert words in refused(["serve", *args.split()], capsys)


def test_names_of_bundles():
    places = ["runs@2/flowers", "hf-hub:me/birds@v1", "hf-hub:me/trees@refs/pr/3", "hf-hub:me/fish@feature/x"]
    given = serve.parser().parse_args(["--bundle", *places, "old=runs/x=y"])
    names = ["flowers", "birds", "trees", "fish"]
    assert serve.read(given) == {**dict(zip(names, places, strict=True)), "old": "runs/x=y"}


def test_taken_port_is_one_line(tmp_path, capsys):
    pytest.importorskip("fastapi")
    from dynadapter.serve.listening import bound

    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["serve", "--bundle", str(tmp_path / "a"), "--port", str(port)])
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "asked"), [([], []), (["--threads", "3"], [3])])
def test_port_taken_while_loading(tmp_path, capsys, monkeypatch, options, asked):
    """Another server was bound to the port before this one, too, and listens first; no address is printed."""
    pytest.importorskip("fastapi")
    from dynadapter.serve.listening import bound

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bound("127.0.0.1", port) as second:
            first.listen()
            place = saved_task(tmp_path / "flowers", 0)
            given = serve.parser().parse_args(["--bundle", place, "--port", str(port), "--device", "cpu", *options])
            with pytest.raises(Mistake, match=rf"cannot listen on 127.0.0.1:{port} \(Address already in use\); give"):
                serve._serve(given, serve.read(given), second)
    assert "POST" not in capsys.readouterr().out
    assert threads == asked  # otherwise as OMP_NUM_THREADS and the affinity say


def test_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else 1)
    line = refused(["serve", "--bundle", "a"], capsys)
    assert "serve needs uvicorn; install what it needs: pip install 'dynadapter[serve]'" in line


def test_last_line_tells_what_is_left():
    pytest.importorskip("uvicorn")
    assert serve._left(0) == "no accepted request is left"
    assert serve._left(2).startswith("2 accepted requests were not, because the server waits 60 seconds for them")


# ---- one backbone for several bundles


LORA = LoRA(rank=2)


def task(seed: int, adapter: AdapterSpec = LORA) -> Bundle:
    """A task on the same backbone: an adapter and heads of its own."""
    backbone = make_vit()
    source = BackboneSource("vit_tiny_patch16_224", fingerprint(backbone), "seed", VIT)
    inject(backbone, adapter)
    net = ExitNet(backbone, Balanced(), every=2).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    net.requires_grad_(False)
    parts = {"backbone": source, "adapter": adapter, "heads": Balanced(), "policy": Never(), "class_names": NAMES}
    return Bundle(net, Never(), describe(net, **parts))


def test_bundles_hold_a_backbone_once():
    tasks, other = [task(seed) for seed in range(3)], make_bundle(net=make_net(5))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bundles = [*tasks, other]
    lay_out_for_cpu(tasks[1].net)
    with torch.no_grad():
        before = [bundle.net(images) for bundle in bundles]
        assert not torch.equal(before[0], before[1])
        saved = share_backbones(bundles)
        for bundle, logits in zip(bundles, before, strict=True):
            torch.testing.assert_close(bundle.net(images), logits, rtol=1e-5, atol=1e-5)
    frozen = sum(p.nbytes for name, p in make_vit().named_parameters() if not name.startswith("head."))
    assert saved == 2 * frozen
    held = {p.data_ptr(): p.nbytes for bundle in tasks for p in bundle.net.parameters()}
    own = sum(p.nbytes for p in tasks[0].net.parameters()) - frozen
    assert sum(held.values()) == frozen + 3 * own
    assert share_backbones([other]) == 0


def test_bundles_share_in_any_order():
    def saved(*changes: str) -> int:
        tasks = [task(seed) for seed in range(len(changes))]
        for one, change in zip(tasks, changes, strict=True):
            if change == "merged":
                one.net.merge(1e-3)
            elif change == "bfloat16":
                one.net.bfloat16()
        return share_backbones(tasks)

    both = saved("plain", "plain")
    assert both == sum(p.nbytes for name, p in make_vit().named_parameters() if not name.startswith("head."))
    assert saved("bfloat16", "plain", "plain") == both
    assert saved("merged", "plain", "plain") == saved("plain", "plain", "merged") > both


def saved_task(place: Path, seed: int, adapter: AdapterSpec = LORA, merged: bool = False, **more: Any) -> str:
    """Write a task as a bundle, and return its folder."""
    one = task(seed, adapter)
    if merged:
        one.net.merge(1e-3)
    parts = {"backbone": one.config.backbone, "adapter": adapter, "merged": merged} | more
    return str(save_bundle(one.net, place, **parts_of(one.net, Never(), **parts)))


def test_bundles_share_batches_on_request(tmp_path, capsys):
    places = {name: saved_task(tmp_path / name, seed) for seed, name in enumerate(("flowers", "birds"))}
    line = ["--bundle", *(f"{name}={place}" for name, place in places.items()), "--device", "cpu", "--together"]
    for wanted in (True, False):
        given = serve.parser().parse_args([*line, str(wanted).lower()])
        engines = serve._engines(given, serve.read(given))
        assert list(engines) == ["flowers", "birds"]
        assert (len({engine._worker for engine in engines.values()}) == 1) == wanted
        assert ("flowers, birds run in one batch" in capsys.readouterr().out) == wanted


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"adapter": Adapter(bottleneck=2)}, "its adapter is Adapter"), ({"merged": True}, "qkv.weight differs, because")],
)
def test_bundles_that_cannot_share_batches(tmp_path, options, reason):
    places = [saved_task(tmp_path / "flowers", 0), saved_task(tmp_path / "birds", 1, **options)]
    given = serve.parser().parse_args(["--bundle", *places, "--together", "true", "--device", "cpu"])
    with pytest.raises(Mistake, match="--together true: birds cannot be in one batch with flowers: ") as error:
        serve._engines(given, serve.read(given))
    assert reason in str(error.value)
    assert str(error.value).endswith("; run it by itself, without --together")


def test_weights_go_to_bundles_that_need_them(tmp_path, monkeypatch):
    source, weights = task(0).config.backbone, str(tmp_path / "w.safetensors")
    safetensors.torch.save_file(make_vit().state_dict(), weights)
    parts = {
        "file": {"backbone": replace(source, origin="file", file="w.safetensors"), "whole": False},
        "seed": {"whole": False},
        "whole": {},
    }
    places = {name: saved_task(tmp_path / name, 0, **more) for name, more in parts.items()}
    places["gone"] = str(tmp_path / "gone" / "bundle")
    real, got = serve.load_network, []
    monkeypatch.setattr(serve, "load_network", lambda given, **more: got.append(given.weights) or real(given, **more))

    def load(*names: str, options: Sequence[str] = ("--weights", weights)) -> list[str]:
        given = serve.parser().parse_args(["--bundle", *(places[name] for name in names), "--device", "cpu", *options])
        return list(serve._engines(given, serve.read(given)))

    assert load(*parts) == [*parts]
    assert got == [weights, None, None]
    with pytest.raises(Mistake, match=r"file needs the weights of its backbone .*: give their file \(w.safetensors in"):
        load(*parts, options=())
    with pytest.raises(Mistake, match=r"whole is a whole bundle, .*; leave weights and pretrained out"):
        load("whole")
    with pytest.raises(Mistake, match="is not a folder"):
        load("gone", "whole")


# ---- a process


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_a_process_gracefully(tmp_path, number):
    pytest.importorskip("fastapi")
    net = make_net()
    place = save_bundle(net, tmp_path / "flowers", **parts_of(net, Never()))
    line = [sys.executable, "-m", "dynadapter.cli", "serve", "--bundle", str(place), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(4)]
        found = re.search(r"POST an image to http://127.0.0.1:(\d+)/v1/flowers/predict", "".join(lines))
        assert found, lines
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("POST", "/v1/flowers/predict", photos(1)[0])
        answer = connection.getresponse()
        assert json.loads(answer.read())["exit"] == 3
        connection.close()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "stopped; 1 images were answered; no accepted request is left" in out
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()
