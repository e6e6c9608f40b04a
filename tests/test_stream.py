"""Streams and loading: bad input and errors of one batch leave the rest of a service as it is."""

import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, VIT, make_convnext, make_swin, make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from served import fails_at, lively, make_net
from tiny import QUIET, loader, make_classifier, trainer
from torch import Tensor

from dynadapter import load
from dynadapter.adapters import LoRA, inject
from dynadapter.backbones import create_backbone, fingerprint
from dynadapter.exits.heads import Balanced, LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Never, Patience, Policy
from dynadapter.serve.bundle import BackboneSource, save_bundle
from dynadapter.serve.stream import Stream
from dynadapter.training.restoring import load_classifier


def network(make=make_vit) -> ExitNet:
    return lively(ExitNet(make(), LinearHeads(), every=2))


NET = network()
IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), max_size=5),
    batch=st.integers(1, 9),
    wait=st.integers(0, 12),
    policy=st.sampled_from([Confidence(0.5), Confidence(0.0), Never(), Patience(2)]),
)
def test_stream_equals_routing_in_order(sizes, batch, wait, policy):
    images = IMAGES[: sum(sizes)]
    stream, answers = Stream(NET, policy, batch, wait), []
    with torch.no_grad():
        for part in images.split(sizes) if sizes else []:
            stream.push(part)
            answers += stream.pop()
        answers += stream.flush()
        assert [a.ticket for a in answers] == list(range(len(images)))
        if answers:
            expected = NET.early(images, policy)
            assert [a.exit_index for a in answers] == expected.exit_index.tolist()
            got = torch.stack([a.logits for a in answers])
            torch.testing.assert_close(got, expected.logits, rtol=1e-4, atol=1e-4)
    assert not stream._answers
    assert not any(stream._queues)


@pytest.mark.parametrize("make", [make_swin, make_convnext])
def test_stream_with_other_families(make):
    net = network(make)
    stream = Stream(net, Confidence(0.5), batch=4)
    with torch.no_grad():
        for image in IMAGES[:10].split(1):
            stream.push(image)
        answers = stream.flush()
        assert [a.exit_index for a in answers] == net.early(IMAGES[:10], Confidence(0.5)).exit_index.tolist()


def test_deep_stages_run_full():
    rows = []
    handle = NET.backbone.blocks[3].mlp.fc1.register_forward_hook(lambda m, i, o: rows.append(o.shape[:2]))
    stream = Stream(NET, Confidence(1.0), batch=8, wait=100)
    with torch.no_grad():
        for image in IMAGES.split(1):
            stream.push(image)
    handle.remove()
    assert {tuple(shape) for shape in rows} == {(8, 1), (8, 17)}


@pytest.mark.parametrize("wait", [0, 3, 10])
def test_wait_limits_later_arrivals(wait):
    """A sample is answered once `wait` others have arrived after it, even if no stage ever has a full batch."""
    stream = Stream(NET, Never(), batch=1000, wait=wait)
    with torch.no_grad():
        for n, image in enumerate(IMAGES.split(1)):
            stream.push(image)
            answered = stream.returned + len(stream._answers)
            assert answered >= n + 1 - wait


def test_seconds_limit_the_wait():
    now = [0.0]
    stream = Stream(NET, Never(), batch=1000, wait=1000, seconds=2.0, clock=lambda: now[0])
    with torch.no_grad():
        stream.push(IMAGES[:3])
        now[0] = 1.9
        stream.poll()
        assert not stream.pop()
        for _ in range(NET.num_exits):  # the limit holds at each stage
            now[0] += 2.0
            stream.poll()
        assert len(stream.pop()) == 3


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"wait": -1}, {"seconds": -1.0}, {"seconds": float("nan")}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        Stream(NET, Never(), **wrong)


def test_thresholds_must_fit_the_exits():
    with pytest.raises(ValueError, match="threshold has 3 values"):
        Stream(NET, Confidence((0.1, 0.2, 0.3)))


# ---- errors and threads


POLICY = Confidence(0.5)
NOISE = IMAGES[:30]


@pytest.fixture(scope="module")
def net() -> ExitNet:
    return make_net()


def alone(net: ExitNet, policy: Policy = POLICY) -> list[Tensor]:
    """Route each image alone."""
    with torch.no_grad():
        return [net.early(image, policy).logits[0] for image in NOISE.split(1)]


# ---- a stream


WRONG = {
    "another size": NOISE[:1, :, :24, :24],
    "not square": NOISE[:1, :, :24],
    "one channel": NOISE[:1, :1],
    "no batch": NOISE[0],
    "float64": NOISE[:1].double(),
    "bytes": NOISE[:1].byte(),
    "another device": NOISE[:1].to("meta"),
    "an array": NOISE[:1].numpy(),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_image_is_refused_at_push(net, wrong):
    stream = Stream(net, Confidence(0.5), batch=4, wait=100)
    stream.push(NOISE[:3])
    with pytest.raises(ValueError, match=r"images are .*; give a tensor \(batch, 3, 32, 32\) of torch.float32 on cpu"):
        stream.push(wrong)
    assert stream.push(NOISE[3:]) == range(3, 30)
    answers = stream.flush()
    assert [answer.ticket for answer in answers] == list(range(30))
    for answer, expected in zip(answers, alone(net), strict=True):
        torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)


def test_sizes_of_a_convolutional_network():
    stream = Stream(ExitNet(make_convnext(), every=2).eval(), Never(), batch=100)
    stream.push(NOISE[:2])
    with pytest.raises(ValueError, match="still wait, of shape \\(3, 32, 32\\)"):
        stream.push(torch.zeros(1, 3, 64, 64))
    assert len(stream.flush()) == 2
    stream.push(torch.zeros(1, 3, 64, 64))  # nothing waits
    assert [answer.error for answer in stream.flush()] == [None]


@pytest.mark.parametrize("part", ["embed", "stage", "head", "policy"])
@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, KeyError])
def test_failed_stage_answers_its_batch_only(net, part, kind, monkeypatch):
    policy = Confidence(0.7)
    stream = Stream(net, policy, batch=4, wait=1000)
    owner, name = {
        "embed": (net, "embed"),
        "stage": (net, "begin"),
        "head": (net, "head"),
        "policy": (Confidence, "should_exit"),
    }[part]
    fails = fails_at(getattr(owner, name), 3, kind)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        answers = []
        for image in NOISE.split(1):
            stream.push(image)
            answers += stream.pop()
        answers += stream.flush()
    assert [answer.ticket for answer in answers] == list(range(30))
    failed = [answer for answer in answers if answer.error is not None]
    assert 1 <= len(failed) <= 4
    assert all(type(answer.error) is kind and answer.logits is answer.exit_index is None for answer in failed)
    for answer, expected in zip(answers, alone(net, policy), strict=True):
        if answer.error is None:
            torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)
    assert not stream._answers
    assert not any(stream._queues)


def test_failed_stages_leak_nothing(net, monkeypatch):
    """No tensor stays alive by an error, although its traceback names the place."""
    held: list[weakref.ref] = []
    real = net.begin

    def fails(k, x, class_first):
        held.append(weakref.ref(x))
        if k:
            raise RuntimeError("broken")
        return real(k, x, class_first)

    with monkeypatch.context() as patch:
        patch.setattr(net, "begin", fails)
        stream = Stream(net, Confidence(1.0), batch=5)
        for image in NOISE.split(1):
            stream.push(image)
        answers = stream.flush()
    assert [type(answer.error) for answer in answers] == [RuntimeError] * 30
    assert "fails" in [entry.tb_frame.f_code.co_name for entry in _entries(answers[0].error)]
    gc.collect()
    assert len(held) == 12
    assert not [one for one in held if one() is not None]


def _entries(error: BaseException):
    place = error.__traceback__
    while place is not None:
        yield place
        place = place.tb_next


@pytest.mark.parametrize("policy", [Confidence(0.5), Never()])
def test_nan_answers_its_own_ticket(net, policy):
    images = NOISE.clone()
    images[[2, 17]] = float("nan")
    stream = Stream(net, policy, batch=6)
    stream.push(images)
    answers = stream.flush()
    assert [answer.ticket for answer in answers if answer.error is not None] == [2, 17]
    assert "not finite" in str(answers[2].error)
    for k, (answer, expected) in enumerate(zip(answers, alone(net, policy), strict=True)):
        if k not in (2, 17):
            torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)


def test_interrupt_loses_no_sample(net, monkeypatch):
    stream = Stream(net, Never(), batch=4, wait=100)
    with monkeypatch.context() as patch:
        patch.setattr(net, "embed", lambda x: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            stream.push(NOISE)
    assert [answer.error for answer in stream.flush()] == [None] * 30


def test_waiting_images_are_copies(net):
    stream, buffer = Stream(net, Never(), batch=100), torch.empty(1, 3, 32, 32)
    for image in NOISE.split(1):
        stream.push(buffer.copy_(image))
    for answer, expected in zip(stream.flush(), alone(net, Never()), strict=True):
        torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)


def test_stream_in_several_threads(net):
    policy = Confidence(0.5)
    stream, tickets, answers = Stream(net, policy, batch=4), {}, []

    def push(k: int) -> None:
        tickets[stream.push(NOISE[k : k + 1])[0]] = k
        answers.extend(stream.pop())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(push, range(30)))
    answers += stream.flush()
    assert sorted(answer.ticket for answer in answers) == list(range(30))
    expected = alone(net, policy)
    for answer in answers:
        torch.testing.assert_close(answer.logits, expected[tickets[answer.ticket]], rtol=1e-4, atol=1e-4)


# ---- loading


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = create_backbone("vit_tiny_patch16_224", CLASSES, **VIT)
    source = BackboneSource("vit_tiny_patch16_224", fingerprint(backbone), "seed", VIT)
    inject(backbone, LoRA(rank=2))
    place = tmp_path_factory.mktemp("bundles") / "b"
    names = [str(k) for k in range(CLASSES)]
    parts = {"backbone": source, "adapter": LoRA(rank=2), "heads": Balanced(), "policy": Never(), "class_names": names}
    return save_bundle(ExitNet(backbone, Balanced(), every=2).eval(), place, **parts)


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def test_load_from_several_threads(bundle):
    """Each thread gets the network of the bundle, whatever other threads draw."""
    with torch.no_grad():
        expected = load(bundle).net(NOISE[:2])
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(100)
            torch.manual_seed(5)

    noise = threading.Thread(target=draw)
    noise.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            loaded = list(pool.map(lambda _: load(bundle), range(8)))
    finally:
        stop.set()
        noise.join()
    with torch.no_grad():
        assert all(torch.equal(one.net(NOISE[:2]), expected) for one in loaded)


def test_load_keeps_random_states(bundle):
    torch.manual_seed(7)
    before = random_states()
    load(bundle)
    assert random_states() == before


@pytest.mark.filterwarnings(*QUIET)
def test_load_classifier_keeps_random_states(tmp_path):
    run = trainer(max_steps=1)
    run.fit(make_classifier(), loader(1), loader(1))
    run.save_checkpoint(tmp_path / "a.ckpt")
    before = random_states()
    load_classifier(tmp_path / "a.ckpt")
    assert random_states() == before
