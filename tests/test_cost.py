"""Costs against formulas by hand, torch's counter, and a plain forward."""

import copy
import io
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import make_convnext, make_swin, make_vit, raises_one_line
from cost_references import MODELS, SIDE, build, by_hand, by_torch, counting, halved
from rich.console import Console
from timm.layers import SwiGLUPacked
from torch import nn

from dynadapter import adapters
from dynadapter.cost import ExitCosts, cost_table, exit_costs, exit_parameters
from dynadapter.exits.heads import Balanced, LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.spec import kinds

COSTS = ExitCosts(macs=(40, 70, 110), light=(4, 7, 10), static=100, exit_depths=(3, 6, 9))


def exact(costs: ExitCosts) -> list[int]:
    """Leave the estimates for normalisation and pooling out."""
    return [macs - light for macs, light in zip(costs.macs, costs.light, strict=True)]


def small_net(make=make_vit, **changes) -> ExitNet:
    return ExitNet(make(**changes), Balanced(), every=2)


# ---- three counts of the same network ----


SAME = ("vit_tiny", "vit_small_patch16", "swin_small")  # have the formula of another model, in other sizes


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(SAME)])
def test_three_counts_agree(name):
    architecture = MODELS[name]
    depth = len(architecture.parts(SIDE)[1])
    net = ExitNet(build(name), Balanced(), every=depth // 4)  # 4 does not divide the 18 blocks of ConvNeXt-T
    costs = exit_costs(net, SIDE)
    assert exact(costs) == by_torch(net) == by_hand(architecture, net.exit_depths)
    assert all(isinstance(count, int) for count in (*costs.macs, *costs.light, costs.static))
    assert list(costs.macs) == sorted(set(costs.macs))


def test_known_costs_of_vit_base():
    costs = exit_costs(ExitNet(build("vit_base_patch16_224"), Balanced(), every=3))
    assert [round(gmacs, 2) for gmacs in costs.gmacs] == pytest.approx([4.48, 8.85, 13.21, 17.58], abs=0.011)
    assert 17.56e9 <= costs.static <= 17.59e9
    # LayerNorm counts 5 for each element: two a block and the last one over all tokens, and one row a head.
    tokens, row = 5 * 197 * 768, 5 * 768
    assert costs.light == (6 * tokens + row, 12 * tokens + 2 * row, 18 * tokens + 3 * row, 25 * tokens + 3 * row)


VARIANTS = {
    "the class token among registers": lambda: make_vit(reg_tokens=4),
    "gated MLPs": lambda: make_vit(mlp_layer=SwiGLUPacked),
    "mean pooling": lambda: make_vit(global_pool="avg", class_token=False, reg_tokens=2),
    "attention pooling": lambda: make_vit(global_pool="map", class_token=False),
    "layer scale": lambda: make_vit(init_values=1e-5),
    "another image size": lambda: make_vit(dynamic_img_size=True),
    "swin": make_swin,
    "convnext": make_convnext,
    "convnext with convolutional MLPs": lambda: make_convnext(conv_mlp=True),
    "convnext v2": lambda: make_convnext(use_grn=True, ls_init_value=None),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_variants_agree_with_torch(make):
    net = ExitNet(make(), every=2)
    side = 48 if getattr(net.backbone, "dynamic_img_size", False) else 32
    assert exact(exit_costs(net, side)) == by_torch(net, side)


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_static_is_the_plain_model(make):
    backbone = make()
    with torch.no_grad(), counting() as counter:
        backbone(torch.zeros(1, 3, 32, 32))  # timm's own forward
    static = exit_costs(ExitNet(backbone, exit_depths=[]), 32)
    assert exact(static) == [halved(counter)]
    assert static.macs == (static.static,)
    assert exit_costs(ExitNet(backbone, every=1), 32).static == static.static


def test_unfused_attention_costs_the_same():
    fused, unfused = small_net(), small_net()
    for block in unfused.backbone.blocks:
        block.attn.fused_attn = False
    assert exit_costs(fused) == exit_costs(unfused)


def test_exits_add_only_their_heads():
    """A head costs the same at every depth, and static does not depend on the exits."""
    backbone = make_vit()
    few, many = exit_costs(ExitNet(backbone, every=3)), exit_costs(ExitNet(backbone, LinearHeads(), every=1))
    assert few.static == many.static
    assert many.macs[-1] - many.static == 5 * (48 * 5 + 5 * 48)  # five heads: a product, and LayerNorm over one row


# ---- adapters ----


MERGED = (adapters.LoRA, adapters.RepAdapter, adapters.DoRA, adapters.FacT, adapters.SSF, adapters.BitFit)
FREE = (adapters.SSF, adapters.BitFit)  # arithmetic on single elements


SMALL = {
    "vit": lambda: make_vit(depth=2),
    "swin": lambda: make_swin(depths=(1, 2), num_heads=(2, 2)),
    "convnext": lambda: make_convnext(depths=(1, 1, 1, 1)),
}
KINDS = [kind for kind in kinds(adapters.AdapterSpec) if "dynadapter" in kind.__module__]
PAIRS = [(kind, family) for kind in KINDS for family in SMALL if kind is not adapters.VPT or family == "vit"]


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_adapters_count_until_merged(kind, family):
    backbone = SMALL[family]()
    plain = exit_costs(ExitNet(backbone, every=1), 32)
    adapters.inject(backbone, kind())
    net = ExitNet(backbone, every=1)
    costs = exit_costs(net, 32)
    assert exact(costs) == by_torch(net, 32)
    added = [a - b for a, b in zip(costs.macs, plain.macs, strict=True)]
    assert not any(added) if kind in FREE else all(added)
    if kind in MERGED:
        assert exit_costs(net.merge(), 32) == plain


def test_lora_by_hand():
    backbone = make_vit()
    plain = exit_costs(ExitNet(backbone, every=2))
    adapters.inject(backbone, adapters.LoRA(rank=8, targets=("*.qkv",)))
    costs = exit_costs(ExitNet(backbone, every=2))
    a_block = 17 * (48 * 8 + 8 * 3 * 48)  # 17 tokens; width 48 -> rank 8 -> q, k and v
    assert [a - b for a, b in zip(costs.macs, plain.macs, strict=True)] == [2 * a_block, 4 * a_block, 6 * a_block]


# ---- operators ----


class Wrapped(nn.Module):
    """A block with a function behind it."""

    def __init__(self, block: nn.Module, behind) -> None:
        super().__init__()
        self.block, self.behind = block, behind

    def forward(self, x):
        x = self.block(x)
        return x + 0 * self.behind(x).mean()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.mT


def extra(behind, handles=None) -> int:
    """Return what a module behind the second of six blocks adds to the exact count; x is (1, 17, 48)."""
    net = small_net()
    plain = exact(exit_costs(net))
    net.backbone.blocks[1] = Wrapped(net.backbone.blocks[1], behind)
    added = [a - b for a, b in zip(exact(exit_costs(net, handles=handles)), plain, strict=True)]
    assert len(set(added)) == 1  # all of it belongs to the first stage
    return added[0]


MATRIX = torch.zeros(48, 8)
OPERATORS = {
    "matmul": (lambda x: x @ MATRIX, 17 * 48 * 8),
    "matmul with a vector": (lambda x: x @ MATRIX[:, 0], 17 * 48),
    "matmul that broadcasts the left factor": (lambda x: MATRIX.T @ x.mT.expand(3, 48, 17), 3 * 8 * 48 * 17),
    "mm": (lambda x: torch.mm(x[0], MATRIX), 17 * 48 * 8),
    "mv": (lambda x: torch.mv(x[0], MATRIX[:, 0]), 17 * 48),
    "dot": (lambda x: torch.dot(x[0, 0], x[0, 1]), 48),
    "bmm": (lambda x: torch.bmm(x, x.mT), 17 * 48 * 17),
    "addmm": (lambda x: torch.addmm(x[0, :, :8], x[0], MATRIX), 17 * 48 * 8),
    "addmm into a result": (lambda x: torch.addmm(x[0, :, :8], x[0], MATRIX, out=torch.empty(17, 8)), 17 * 48 * 8),
    "addmm in place on a view": (lambda x: x[..., :8].clone().view(-1, 8).addmm_(x[0], MATRIX), 17 * 48 * 8),
    "baddbmm": (lambda x: torch.baddbmm(x[..., :8], x, MATRIX[None]), 17 * 48 * 8),
    "baddbmm in place": (lambda x: x[..., :8].clone().baddbmm_(x, MATRIX[None]), 17 * 48 * 8),
    "einsum": (lambda x: torch.einsum("b n d, d r -> b n r", x, MATRIX), 17 * 48 * 8),
    "einsum to an outer product": (lambda x: torch.einsum("bnd,bmd->bnm", x, x), 17 * 48 * 17),
    "convolution": (lambda x: nn.functional.conv1d(x, torch.zeros(4, 17, 3)), 46 * 4 * 17 * 3),
    "grouped convolution": (lambda x: nn.functional.conv1d(x.mT, torch.zeros(8, 12, 1), groups=4), 17 * 8 * 12),
    "depthwise convolution": (lambda x: nn.functional.conv1d(x, torch.zeros(17, 1, 5), groups=17), 44 * 17 * 5),
    "convolution padded by name": (lambda x: nn.functional.conv1d(x, torch.zeros(4, 17, 3), padding="same"), 48 * 204),
    "attention with other values": (lambda x: attend(x, x[:, :5], x[:, :5, :8]), 17 * 5 * (48 + 8)),
    "attention with a mask": (lambda x: attend(x, x, x, is_causal=True), 2 * 17 * 17 * 48),
    "normalisation and pooling": (lambda x: nn.functional.rms_norm(x, (48,)).sum() + x.var(1).norm(), 0),
    "resampling": (lambda x: nn.functional.interpolate(x[None], (8, 8), mode="bicubic", antialias=True), 0),
    "single elements": (lambda x: x.softmax(1).roll(2).pow(2).sigmoid() / (1 + x.abs().sqrt()), 0),
}
attend = nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize(("behind", "macs"), OPERATORS.values(), ids=OPERATORS)
def test_operators_by_hand(behind, macs):
    assert extra(behind) == macs


@pytest.mark.parametrize(
    ("behind", "named"),
    [
        (lambda x: torch.cdist(x, x), "1x aten::cdist;"),
        (lambda x: torch.fft.rfft(x).real + torch.fft.rfft(x).imag, "2x aten::fft_rfft"),
        (Square.apply, "1x prim::PythonOp.Square"),
        (lambda x: torch.einsum("bnd,de,ef->bnf", x, MATRIX, MATRIX.T), "einsum 'bnd,de,ef->bnf'"),
    ],
)
def test_unknown_operators_are_named(behind, named):
    """A warning says which; torch counts instead, and other handles are no way out."""
    net = small_net()
    net.backbone.blocks[1] = Wrapped(net.backbone.blocks[1], behind)
    with pytest.warns(UserWarning, match=r"no count .*handles=.*; torch's FlopCounterMode counted instead") as notes:
        costs = exit_costs(net)
    assert named in str(notes[0].message)
    assert "\n" not in str(notes[0].message)
    assert costs.meter == "torch"
    with pytest.raises(ValueError, match="handles=") as refusal:
        extra(behind, {"aten::nothing": lambda inputs, outputs: 0})
    assert named in str(refusal.value)


def test_handles_count_unknown_operators():
    assert extra(Square.apply, {"prim::PythonOp.Square": lambda inputs, outputs: 17 * 48 * 17}) == 17 * 48 * 17
    assert extra(lambda x: x @ MATRIX, {"aten::matmul": lambda inputs, outputs: 0}) == 0


# ---- a network that torch.jit cannot trace ----


@torch.compile(backend="eager")
def compiled(x):
    return x @ MATRIX


def untraceable(make=make_vit) -> ExitNet:
    """A network with a compiled function behind its second block, which torch.jit refuses to trace."""
    net = small_net(make)
    net.backbone.blocks[1] = Wrapped(net.backbone.blocks[1], compiled)
    return net


def test_torch_counts_what_jit_cannot_trace():
    with pytest.warns(
        UserWarning, match=r"cannot trace this network \(.*torch's FlopCounterMode counted instead"
    ) as notes:
        costs = exit_costs(untraceable(), class_first=True)
    assert len(notes) == 1
    traced = small_net()
    traced.backbone.blocks[1] = Wrapped(traced.backbone.blocks[1], lambda x: x @ MATRIX)
    expected = exit_costs(traced)
    assert (costs.meter, expected.meter) == ("torch", "fvcore")
    assert list(costs.macs) == exact(expected)
    assert costs.static < expected.static  # no estimate for normalisation
    assert costs.class_first_macs[-1] < costs.macs[-1]
    assert "counted by torch" in cost_table(costs).caption


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 33}, r"33 x 33 pixels .*: Input height"),
        ({"handles": {"aten::cdist": lambda inputs, outputs: 0}}, r"32 x 32 pixels .*: Detected"),
    ],
)
def test_untraceable_error_is_one_line(options, words):
    with raises_one_line(ValueError, match=words):
        exit_costs(untraceable(), **options)


# ---- one trace that disturbs nothing ----


def test_every_block_runs_once():
    net, calls = small_net(), []
    for module in (*net.backbone.blocks, *net.heads):
        module.register_forward_hook(lambda *_: calls.append(1))
    exit_costs(net)
    assert len(calls) == 6 + 2


def test_counts_what_forward_runs():
    from fvcore.nn import FlopCountAnalysis

    net = small_net(make_swin).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linears = FlopCountAnalysis(net, torch.zeros(1, 3, 32, 32)).unsupported_ops_warnings(False).by_operator()
    # Swin at this size multiplies its attention out by matmul, so that fvcore by itself misses no product.
    assert exact(exit_costs(net, 32))[-1] == linears["linear"] + linears["matmul"] + linears["conv"]


@pytest.mark.parametrize("size", [None, 33], ids=["a trace", "a failed trace"])
def test_nothing_is_disturbed(size):
    net = small_net()
    adapters.inject(net.backbone, adapters.LoRA())
    net.train()
    net.heads[0].norm.eval()
    hooks = [lambda *_: None for _ in net.modules()]
    for module, hook in zip(net.modules(), hooks, strict=True):
        module.register_forward_hook(hook)

    def state():
        hooked = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
        return [m.training for m in net.modules()], hooked, torch.is_grad_enabled(), torch.get_rng_state().tolist()

    tensors, before = copy.deepcopy(net.state_dict()), state()
    if size:
        with raises_one_line(ValueError, match=r"33 x 33 pixels .*: Input height"):
            exit_costs(net, size)
    else:
        exit_costs(net)
    assert state() == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_fvcore_is_imported_when_needed():
    code = """
import sys, warnings
warnings.simplefilter("error")
import timm
from dynadapter.cost import exit_costs
from dynadapter.exits.net import ExitNet
net = ExitNet(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), every=1)
assert not {"fvcore", "lightning"} & set(sys.modules)
exit_costs(net)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dtype_and_context_do_not_matter():
    costs = exit_costs(small_net())
    assert exit_costs(small_net().bfloat16()) == costs
    with torch.inference_mode():
        assert exit_costs(small_net()) == costs
    faster = small_net()
    for block in faster.backbone.blocks:
        block.compile(backend="eager")
    assert exit_costs(faster) == costs
    assert all(block._compiled_call_impl is not None for block in faster.backbone.blocks)


@pytest.mark.cuda
def test_a_network_on_a_gpu_costs_the_same():
    state = torch.cuda.get_rng_state()
    assert exit_costs(small_net().cuda().half()) == exit_costs(small_net())
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_image_size():
    assert exit_costs(small_net()) == exit_costs(small_net(), 32) == exit_costs(small_net(), (32, 32))
    wide = small_net(dynamic_img_size=True)
    assert exit_costs(wide, (32, 64)).static > exit_costs(wide).static
    grey = small_net(in_chans=1)
    patches = exact(exit_costs(small_net()))[0] - exact(exit_costs(grey))[0]
    assert patches == 16 * 2 * 64 * 48  # 16 patches, two channels less, 64 pixels, width 48
    convnext = small_net(make_convnext)  # has no image size of its own, so that of its weights counts
    assert exit_costs(convnext) == exit_costs(convnext, convnext.backbone.pretrained_cfg["input_size"][1:])
    convnext.backbone.pretrained_cfg = {}
    with pytest.raises(ValueError, match="pass image_size"):
        exit_costs(convnext)


def test_exit_costs_misuse_raises():
    with pytest.raises(TypeError, match="takes an ExitNet, not VisionTransformer"):
        exit_costs(make_vit())
    with pytest.raises(ValueError, match="at least 1 pixel"):
        exit_costs(small_net(), 0)
    with pytest.raises(ValueError, match="meta device"):
        exit_costs(small_net().to("meta"))


# ---- parameters, averages, table ----


@pytest.mark.parametrize("make", [make_vit, make_swin, make_convnext])
def test_parameters_are_cumulative(make):
    backbone = make()
    heads = [sum(p.numel() for p in head.parameters()) for head in ExitNet(backbone, every=2).heads]
    own = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert exit_parameters(ExitNet(backbone, every=2)) == (heads[0], sum(heads), sum(heads) + own)
    backbone.requires_grad_(True)
    totals = exit_parameters(ExitNet(backbone, every=2, freeze=False))
    embedding = backbone.stem if make is make_convnext else backbone.patch_embed
    assert totals[0] > heads[0] + sum(p.numel() for p in embedding.parameters())
    assert totals[-1] == sum(heads) + sum(p.numel() for p in backbone.parameters())


def test_parameters_of_lora_by_hand():
    backbone = make_vit()
    adapters.inject(backbone, adapters.LoRA(rank=8, targets=("*.qkv",)))
    net = ExitNet(backbone, Balanced(), every=2)
    norm, mlp, linear = 2 * 48, 48 * 64 + 64 + 64 * 5 + 5, 48 * 5 + 5
    a_block = 8 * 48 + 3 * 48 * 8
    first = 2 * a_block + norm + mlp
    second = first + 2 * a_block + norm + linear
    assert exit_parameters(net) == (first, second, second + 2 * a_block + linear)


def test_average_cost():
    assert COSTS.average([0, 0, 1]) == 110
    assert COSTS.average((0.5, 0.3, 0.2)) == pytest.approx(63)
    assert COSTS.average(torch.tensor([0.5, 0.3, 0.2])) == pytest.approx(63)
    assert COSTS.average([0.333, 0.333, 0.334]) == pytest.approx(73.4, abs=0.1)
    assert COSTS.relative == (0.4, 0.7, 1.1)
    assert COSTS.average_run([0.5, 0, 0.5]) == COSTS.average([0.5, 0, 0.5]) == 75
    run = replace(COSTS, class_first_macs=(30, 60, 100))
    assert (run.average_run([0.5, 0, 0.5]), run.average([0.5, 0, 0.5]), run.relative) == (65, 75, COSTS.relative)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0.5], "2 shares for 3 exits"),
        ([0.5, 0.5, 0.5], "sum to 1"),
        ([50, 30, 20], "not to 100"),
        ([-0.5, 1, 0.5], "at least 0"),
        ([float("nan"), 0.5, 0.5], "at least 0"),
    ],
)
def test_average_wrong_shares_raises(shares, message):
    with pytest.raises(ValueError, match=message):
        COSTS.average(shares)


def test_cost_table():
    table = cost_table(COSTS, accuracy=[0.5, torch.tensor(0.6), 0.75], train_parameters=[1200, 2, "-"])
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    lines = out.getvalue().splitlines()
    heading = " ".join(lines[1].replace("┃", "│").split())
    assert "exit │ after block │ GMACs │ % of static │ accuracy │ train parameters" in heading
    assert [cell.strip() for cell in lines[3].strip("│").split("│")] == ["1", "3", "4e-08", "40.0%", "0.500", "1,200"]
    assert "110.0%" in lines[5]
    assert "GMACs run" not in lines[1]
    assert [str(column.header) for column in cost_table(replace(COSTS, class_first_macs=(1, 2, 3))).columns][
        -1
    ] == "GMACs run"
    with pytest.raises(ValueError, match="column 'accuracy' has 1 values for 3 exits"):
        cost_table(COSTS, accuracy=[0.5])
