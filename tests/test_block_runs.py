"""``backbone.run``: timm's own block to the bit, in fewer steps."""

import pytest
import torch
from conftest import BACKBONES, make_vit
from test_class_first import ADAPTERS, VITS, network, pictures
from torch import Tensor, nn

from dynadapter import backbones
from dynadapter.adapters import LoRA
from dynadapter.exits.policies import AtExit


def called(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """A backbone's last block's output by ``run`` and by its modules' own calls."""
    ours = theirs = backbones.embed(net.backbone, images)
    for unit in backbones.blocks(net.backbone):
        for module in unit:
            before = ours.clone()
            after = backbones.run(module, ours)
            assert torch.equal(ours, before), "the input was written to"
            ours, theirs = after, module(theirs)
    return ours, theirs


def assert_equal(net: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        ours, theirs = called(net, images)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("family", "options", "adapter"),
    [
        *(("vit", {}, adapter) for adapter in ADAPTERS),
        *(("vit", options, None) for options in VITS.values()),
        *((family, {}, None) for family in BACKBONES),
    ],
    ids=str,
)
def test_equal_on_every_network(family, options, adapter):
    assert_equal(network(BACKBONES[family](**options), adapter), pictures())


def test_run_half_precision_and_autocast():
    net = network(make_vit(), LoRA(rank=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(net, pictures())
    assert_equal(net.bfloat16(), pictures().bfloat16())


def test_equal_with_unfused_attention(monkeypatch):
    net = network(make_vit())
    for block in net.backbone.blocks:
        block.attn.fused_attn = False
    assert_equal(net, pictures())


@pytest.mark.parametrize("biased", [False, True])
def test_attention_written_out_is_the_same(biased):
    net = network(make_vit(), LoRA(rank=4))
    x = backbones.embed(net.backbone, pictures())
    bias = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) if biased else None

    def results() -> list[Tensor]:
        block = net.backbone.blocks[0]
        row, keys_values = backbones.class_row(block, x, bias)
        return [row, backbones.other_rows(block, x, keys_values, bias), backbones.run(block, x, bias)]

    with torch.no_grad():
        expected = results()
        with backbones.written_out_attention(net.backbone):
            assert not any(getattr(part, "fused_attn", False) for part in net.backbone.modules())
            found = results()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(block.attn.fused_attn for block in net.backbone.blocks)


def test_fewer_steps_than_the_block_takes():
    """What is called says so: no dropout, no identity of the attention's and the MLP's."""
    net, steps = network(make_vit()), []
    for name, module in net.backbone.blocks[0].named_modules():
        if isinstance(module, nn.Dropout | nn.GELU):
            module.register_forward_pre_hook(lambda *_, name=name: steps.append(name))
    block, x = net.backbone.blocks[0], backbones.embed(net.backbone, pictures())
    with torch.inference_mode():
        block(x)
        assert "attn.proj_drop" in steps
        steps.clear()
        backbones.run(block, x)
    assert steps == ["mlp.act", "mlp.drop1", "mlp.drop2"]  # an activation with a hook is called, and its MLP as it is


@pytest.mark.parametrize("place", ["", "attn", "mlp", "mlp.act", "norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1"])
def test_hooks_are_called(place):
    net, seen = network(make_vit()), []
    for block in net.backbone.blocks:
        block.get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        net(pictures(2))
    assert len(seen) == net.depth


PLACES = ["attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop2", "ls1", "ls2", "norm2"]


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, targets=("*.qkv", "*.proj", "*.fc1", "*.fc2"))], ids=str)
@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}], ids=["plain", "layer scale"])
def test_hooks_keep_whole_tensors(adapter, options):
    """No later step writes to a tensor that a hook keeps."""
    net = network(make_vit(**options), adapter)
    block, kept = net.backbone.blocks[1], []
    for place in [*PLACES, *(name for name, _ in block.named_modules() if name.endswith("base_layer"))]:
        layer = block.get_submodule(place)
        handle = layer.register_forward_hook(lambda *given: kept.append((given[-1], given[-1].clone())))
        with torch.no_grad():
            net(pictures(2))
            net.early(pictures(), AtExit(1), class_first=True)
        handle.remove()
        assert kept, place
        assert all(torch.equal(tensor, copy) for tensor, copy in kept), place
        kept.clear()


def test_who_watches_all_modules_sees_them():
    net, seen = network(make_vit()), []
    watch = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with torch.inference_mode():
            net(pictures(2))
    finally:
        watch.remove()
    assert seen.count(nn.Linear) >= 4 * net.depth


@pytest.mark.parametrize("place", ["norm2", "attn.proj", "mlp.fc2"])
def test_run_own_forward_called(place):
    net = network(make_vit())
    layer = net.backbone.blocks[0].get_submodule(place)
    layer.forward = lambda x, plain=layer.forward: 2 * plain(x)
    assert_equal(net, pictures(2))


def test_a_forward_of_its_own_is_used():
    net = network(make_vit())
    net.backbone.blocks[1].forward = lambda x: torch.zeros_like(x)
    with torch.inference_mode():
        assert not backbones.run(net.backbone.blocks[1], backbones.embed(net.backbone, pictures(2))).any()


def test_a_compiled_block_sees_its_own_call():
    """No tensor of a graph is written again: the trace holds the block's own steps."""
    net = network(make_vit())
    x = backbones.embed(net.backbone, pictures(2)).detach()
    with torch.no_grad():
        program = torch.export.export(_Runs(net.backbone.blocks[0]), (x,))
    assert not any("add_." in str(node.target) or "gelu_" in str(node.target) for node in program.graph.nodes)


class _Runs(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return backbones.run(self.block, x)
