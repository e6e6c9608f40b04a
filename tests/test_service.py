"""Bad input and errors of one batch leave the rest of a service as it is: streams, and loading from several threads."""

import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, VIT, make_convnext, make_vit
from tiny import QUIET, loader, make_classifier, trainer
from torch import Tensor

from dynadapter import load
from dynadapter.adapters import LoRA, inject
from dynadapter.backbones import create_backbone, fingerprint
from dynadapter.exits.heads import Balanced
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Never, Policy
from dynadapter.serve.bundle import BackboneSource, save_bundle
from dynadapter.serve.stream import Stream
from dynadapter.training.restoring import load_classifier

POLICY = Confidence(0.5)
IMAGES = torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def net() -> ExitNet:
    torch.manual_seed(0)
    net = ExitNet(make_vit(), every=2).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return net


def alone(net: ExitNet, policy: Policy = POLICY) -> list[Tensor]:
    """Route each image alone."""
    with torch.no_grad():
        return [net.early(image, policy).logits[0] for image in IMAGES.split(1)]


# ---- a stream


WRONG = {
    "another size": IMAGES[:1, :, :24, :24],
    "not square": IMAGES[:1, :, :24],
    "one channel": IMAGES[:1, :1],
    "no batch": IMAGES[0],
    "float64": IMAGES[:1].double(),
    "bytes": IMAGES[:1].byte(),
    "another device": IMAGES[:1].to("meta"),
    "an array": IMAGES[:1].numpy(),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_image_is_refused_at_push(net, wrong):
    stream = Stream(net, Confidence(0.5), batch=4, wait=100)
    stream.push(IMAGES[:3])
    with pytest.raises(ValueError, match=r"images are .*; give a tensor \(batch, 3, 32, 32\) of torch.float32 on cpu"):
        stream.push(wrong)
    assert stream.push(IMAGES[3:]) == range(3, 30)
    answers = stream.flush()
    assert [answer.ticket for answer in answers] == list(range(30))
    for answer, expected in zip(answers, alone(net), strict=True):
        torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)


def test_sizes_of_a_convolutional_network():
    stream = Stream(ExitNet(make_convnext(), every=2).eval(), Never(), batch=100)
    stream.push(IMAGES[:2])
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
    real, calls = getattr(owner, name), [0]

    def fails(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 3:
            raise kind("broken")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        answers = []
        for image in IMAGES.split(1):
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
        for image in IMAGES.split(1):
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
    images = IMAGES.clone()
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
            stream.push(IMAGES)
    assert [answer.error for answer in stream.flush()] == [None] * 30


def test_waiting_images_are_copies(net):
    stream, buffer = Stream(net, Never(), batch=100), torch.empty(1, 3, 32, 32)
    for image in IMAGES.split(1):
        stream.push(buffer.copy_(image))
    for answer, expected in zip(stream.flush(), alone(net, Never()), strict=True):
        torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)


def test_stream_in_several_threads(net):
    policy = Confidence(0.5)
    stream, tickets, answers = Stream(net, policy, batch=4), {}, []

    def push(k: int) -> None:
        tickets[stream.push(IMAGES[k : k + 1])[0]] = k
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
        expected = load(bundle).net(IMAGES[:2])
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
        assert all(torch.equal(one.net(IMAGES[:2]), expected) for one in loaded)


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
