"""A stream of small batches gives the results of routing, in order, and no sample waits too long."""

import pytest
import torch
from conftest import make_convnext, make_swin, make_vit
from hypothesis import given, settings
from hypothesis import strategies as st

from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Never, Patience
from dynadapter.serve.stream import Stream


def network(make=make_vit) -> ExitNet:
    torch.manual_seed(0)
    net = ExitNet(make(), LinearHeads(), every=2).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return net


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
