"""What a GPU may change: the same properties on the CPU and, where there is one, on a GPU."""

import pytest
import torch
from conftest import make_vit, parting
from torch import Tensor

from dynadapter import ExitNet, LinearHeads, LoRA, Never, TokenMerging, inject, joint_loss, merge

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TYPES = {"fp32": (torch.float32, 1e-3), "bf16": (torch.bfloat16, 1e-1)}
"""Precision, and tolerance: batches of another size use other kernels, and a GPU embeds patches in TF32."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def network(device: str, dtype: torch.dtype = torch.float32, **options) -> ExitNet:
    torch.manual_seed(0)
    backbone = make_vit()
    inject(backbone, LoRA(rank=2))
    net = ExitNet(backbone, LinearHeads(), every=2, **options).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # no adapter starts at zero
    return net.to(device, dtype)


def batch(device: str, dtype: torch.dtype = torch.float32, count: int = 16) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("class_first", [False, True])
@pytest.mark.parametrize("token_merging", [None, TokenMerging(after=(1, 2), share=0.3)], ids=["every", "merged"])
def test_routing_gives_logits_of_its_exit(device, precision, class_first, token_merging):
    dtype, tolerance = TYPES[precision]
    net, images = network(device, dtype, token_merging=token_merging), batch(device, dtype)
    with torch.inference_mode():
        every = net(images)
        routed = net.early(images, parting(every[0]), class_first)
    assert len(routed.exit_index.unique()) > 1
    expected = every[routed.exit_index, torch.arange(len(images), device=device)]
    torch.testing.assert_close(routed.logits, expected, rtol=tolerance, atol=tolerance)


def test_devices_give_the_logits_of_the_cpu(device):
    with torch.inference_mode():
        there, here = network(device)(batch(device)).cpu(), network("cpu")(batch("cpu"))
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)


def test_merged_adapters_keep_logits(device):
    net, images = network(device), batch(device)
    with torch.inference_mode():
        before = net(images)
        merge(net.backbone)
        torch.testing.assert_close(net(images), before, rtol=1e-3, atol=1e-3)


def test_no_early_head_runs_without_a_policy(device):
    net, images = network(device), batch(device)
    with torch.inference_mode():
        routed = net.early(images, Never())
        torch.testing.assert_close(routed.logits, net(images)[-1], rtol=1e-4, atol=1e-4)
    assert (routed.exit_index == net.num_exits - 1).all()


@pytest.mark.parametrize("precision", TYPES)
def test_a_step_trains_what_is_to_learn(device, precision):
    net, images = network(device).train(), batch(device)
    targets = torch.arange(len(images), device=device) % net.num_classes
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(20):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(images)
        loss = joint_loss(logits.float(), targets, net.exit_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in learning)
    assert losses[-1] < losses[0] - 0.03
