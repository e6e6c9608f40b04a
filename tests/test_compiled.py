"""Compiled stages give the answers of the plain ones and compile for no new batch size."""

import shutil

import pytest
import torch
from conftest import make_convnext, make_swin, make_vit

from dynadapter.adapters import LoRA, inject
from dynadapter.compiled import CompiledNet
from dynadapter.net import ExitNet
from dynadapter.policies import Confidence, Never

IMAGES = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def network(make, every=3) -> ExitNet:
    torch.manual_seed(0)
    trunk = make()
    if make is make_vit:
        inject(trunk, LoRA(rank=2))
    net = ExitNet(trunk, every=every).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return net


@pytest.mark.parametrize("make", [make_vit, make_swin, make_convnext])
def test_same_answers_and_nothing_compiled_anew(make):
    net = network(make)
    graphs = []

    def counting(graph, example):
        graphs.append(len(example))
        return graph.forward

    compiled = CompiledNet(net, buckets=(1, 4, 8), backend=counting).warm_up(IMAGES[0])
    once = len(graphs)
    with torch.no_grad():
        for count in range(1, 12):
            for policy in (Confidence(0.5), Never()):
                got, expected = compiled.early(IMAGES[:count], policy), net.early(IMAGES[:count], policy)
                assert torch.equal(got.exits, expected.exits)
                torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(graphs) == once


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
# torch.compile's own imports and notes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_with_torchs_own_compiler():
    net = network(make_vit)
    compiled = CompiledNet(net, buckets=(4,))
    with torch.no_grad():
        got, expected = compiled.early(IMAGES, Confidence(0.5)), net.early(IMAGES, Confidence(0.5))
    assert torch.equal(got.exits, expected.exits)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("buckets", [(), (0, 1), (4, 2), (2, 2)])
def test_wrong_buckets(buckets):
    with pytest.raises(ValueError, match="rising batch sizes"):
        CompiledNet(network(make_vit), buckets)
