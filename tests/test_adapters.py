"""Every kind of adapter, in its variants, against the same properties on all families, and against formulas by hand."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import timm
import torch
from conftest import make_convnext, make_swin, make_vit, raises_one_line
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter.adapters import (
    SSF,
    VPT,
    Adapter,
    AdapterLayer,
    AdapterPlus,
    AdapterSpec,
    AdaptFormer,
    BitFit,
    Convpass,
    DoRA,
    FacT,
    LoRA,
    RepAdapter,
    adapter_layers,
    inject,
    merge,
)
from dynadapter.adapters.droprate import DropRate
from dynadapter.spec import kinds

CONVNEXT = {"depths": (1, 1, 1, 1)}
FAMILIES: dict[str, Callable[[], nn.Module]] = {  # of four blocks each
    "vit": lambda: make_vit(depth=4),
    "swin": lambda: make_swin(depths=(1, 2, 1)),
    "convnext": lambda: make_convnext(**CONVNEXT),
    "convnext_1x1": lambda: make_convnext(conv_mlp=True, **CONVNEXT),
}

KINDS = [kind for kind in kinds(AdapterSpec) if kind.__module__.startswith("dynadapter.")]
VARIANTS = {kind.__name__: kind() for kind in KINDS if kind is not VPT} | {  # which has a file of its own
    "AdapterPlus": AdapterPlus(drop_path=0.0, scale=2.0),
    "SSF": SSF(std=0.0, scale=0.5),  # without noise it starts as the identity
    "Houlsby": Adapter(placement="houlsby", scale=2.0),
    "LoRA-qv": LoRA(split="qv", scale=0.5),
    "LoRA-wide": LoRA(rank=3, targets=("*blocks.*.qkv", "*blocks.*.fc?"), dropout=0.2),
    "RepAdapter-attn": RepAdapter(placement="attn", bias=False),
    "RepAdapter-ungrouped": RepAdapter(groups=1, scale=3.0),
}
# ConvNeXt has no attention: where a kind wants it, the MLP's layers stand in.
WITHOUT_ATTENTION = {
    "Houlsby": ("*.fc1", "*.mlp"),
    "LoRA": ("*.mlp.fc1", "*.mlp.fc2"),
    "DoRA": ("*.mlp.fc1", "*.mlp.fc2"),
    "LoRA-qv": ("*.mlp.fc1",),
    "LoRA-wide": ("*.mlp.fc?",),
    "RepAdapter": ("*.mlp.fc1",),
    "RepAdapter-attn": ("*.mlp.fc2",),
    "RepAdapter-ungrouped": ("*.mlp.fc1", "*.mlp.fc2"),
}
LATER = ("SSF", "BitFit", "DoRA", "FacT", "AdapterPlus", "Convpass")  # other families: test_kinds_by_family.py
CASES = [(variant, family) for variant in VARIANTS for family in (("vit",) if variant in LATER else FAMILIES)]
each = pytest.mark.parametrize(("variant", "family"), CASES, ids=lambda value: value)
ELSEWHERE = ("LoRA-wide", "AdapterPlus", "Convpass", "FacT")  # their blocks by hand are in test_kinds_by_hand.py
AFFINE = ("SSF", "BitFit")  # around every layer, without a bottleneck
with_bottleneck = pytest.mark.parametrize(
    ("variant", "family"), [case for case in CASES if case[0] not in AFFINE], ids=lambda value: value
)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def spec_for(variant: str, family: str) -> AdapterSpec:
    spec = VARIANTS[variant]
    if family.startswith("convnext") and variant in WITHOUT_ATTENTION:
        spec = replace(spec, targets=WITHOUT_ATTENTION[variant])
    return spec


def own_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters, found as those that a bare backbone has under no name."""
    found = {}
    for name, layer in adapter_layers(model).items():
        found |= {f"{name}.{key}": value for key, value in layer.named_parameters(recurse=False)}
    return found


def scramble(model: nn.Module) -> nn.Module:
    """Gives all adapter tensors random values, so that the update is about as large as what it updates."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in own_tensors(model).values():
            spread = 0.5 if tensor.ndim == 1 else tensor.shape[1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return model


def inputs_of(layer: AdapterLayer, side: int) -> Tensor:
    """Random inputs of a wrapped layer, as it takes them."""
    base = next(m for m in layer.base_layer.modules() if getattr(m, "weight", None) is not None)
    width = getattr(base, "in_channels", base.weight.shape[-1])
    side *= max(getattr(base, "stride", (1,)))
    return torch.randn((3, width, side, side) if layer.channels_first else (3, side, width), dtype=torch.float64)


def injected(variant: str, family: str) -> nn.Module:
    model = FAMILIES[family]()
    inject(model, spec_for(variant, family))
    return model


# ---- every variant on every family -----------------------------------------------------------------------------------


@each
def test_injection_is_exactly_the_identity(variant, family, images):
    model = FAMILIES[family]()
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    classifier = {name for name, trains in frozen.items() if trains}
    expected = model(images)
    spec = spec_for(variant, family)
    names = inject(model, spec)
    assert names == list(adapter_layers(model))
    assert {layer.kind for layer in adapter_layers(model).values()} == {type(spec).__name__}
    assert torch.equal(model(images), expected)
    with torch.inference_mode():
        assert torch.equal(model(images), expected)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == classifier | set(own_tensors(model))
    assert all(tensor.dtype == torch.float32 for tensor in own_tensors(model).values())
    model.train()
    for layer in adapter_layers(model).values():
        layer.base_layer.eval()
    # With zero up-projections dropout has nothing to change either; only the backbone's own drop path might.
    model.eval()
    for layer in adapter_layers(model).values():
        layer.dropout.train()
    assert torch.equal(model(images), expected)


@each
def test_gradients_reach_every_tensor(variant, family, images):
    model = injected(variant, family)
    tensors = own_tensors(model)
    optimiser = torch.optim.AdamW(tensors.values(), lr=1e-2)
    for _ in range(2):  # the first step moves the up-projections off zero
        optimiser.zero_grad()
        F.cross_entropy(model(images), torch.arange(len(images))).backward()
        optimiser.step()
    for name, tensor in tensors.items():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name
    backbone = [p for p in model.parameters() if not p.requires_grad]
    assert backbone
    assert all(p.grad is None for p in backbone)


@each
def test_output_equal_without_gradients(variant, family, images):
    model = scramble(injected(variant, family))
    expected = model(images)
    assert not torch.allclose(expected, FAMILIES[family]()(images), atol=1e-3)
    before = images.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before)


@each
def test_layers_leave_their_input_alone(variant, family, images):
    """Where no gradient is recorded a layer may write in place, but only on what it made itself."""
    model = scramble(injected(variant, family))
    seen, kept = {}, []

    def remember(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[layer] = args[0].clone()

    def compare(layer: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        kept.append(torch.equal(seen[layer], args[0]))

    for layer in adapter_layers(model).values():
        layer.register_forward_pre_hook(remember)
        layer.register_forward_hook(compare)
    with torch.no_grad():
        model(images)
    assert len(kept) == len(adapter_layers(model))
    assert all(kept)


@with_bottleneck
def test_dropout_acts_in_training_only(variant, family, images):
    model = scramble(injected(variant, family))
    for layer in adapter_layers(model).values():
        layer.dropout.set(0.5)
        assert layer.dropout.rate == 0.5
    with torch.no_grad():
        evaluated = model(images)
        assert torch.equal(model(images), evaluated)
        for layer in adapter_layers(model).values():
            layer.train()
        assert not torch.allclose(model(images), model(images))
        for layer in adapter_layers(model).values():
            layer.dropout.set(0.0)
        torch.testing.assert_close(model(images), evaluated)


@each
def test_merge_keeps_output_and_timm_keys(variant, family, images):
    model = scramble(injected(variant, family))
    spec, bare = spec_for(variant, family), FAMILIES[family]()
    if not any(layer.mergeable for layer in adapter_layers(model).values()):
        keys = list(model.state_dict())
        with pytest.raises(
            ValueError, match=rf"{type(spec).__name__} cannot be merged .*kinds that can: BitFit, DoRA, "
        ):
            merge(model)
        assert list(model.state_dict()) == keys
        return
    expected = model(images)
    random_numbers = torch.get_rng_state()
    doubles = adapter_layers(copy.deepcopy(model).double())
    for name, layer in adapter_layers(model).items():
        tokens = inputs_of(layer, 5)
        double = doubles[name](tokens)
        error = (layer.merged()(tokens.float()).double() - double).norm() / double.norm()
        assert error < 1e-5, name
    torch.set_rng_state(random_numbers)
    merge(model)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert not adapter_layers(model)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in bare.named_parameters()
    }
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    bare.load_state_dict(model.state_dict())
    assert torch.equal(bare(images), model(images))


@each
def test_copies_and_pickles(variant, family, images):
    model = scramble(injected(variant, family))
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)
        with torch.no_grad():
            next(iter(own_tensors(twin).values())).add_(1)
        assert torch.equal(model(images), expected)
    fresh = injected(variant, family)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), expected)


@with_bottleneck
def test_depth_from_first_to_last_block(variant, family):
    model = injected(variant, family)
    by_place: dict[str, list[float]] = {}
    for name, layer in adapter_layers(model).items():
        place = "".join(part for part in name.split(".") if not part.isdigit())
        by_place.setdefault(place, []).append(layer.depth)
    for depths in by_place.values():
        assert depths == pytest.approx([block / 3 for block in range(4)])


@each
def test_half_precision(variant, family, images):
    exact = scramble(injected(variant, family))
    expected = exact(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = exact(images)
    backbone = FAMILIES[family]().bfloat16()
    plain = backbone(images.bfloat16())
    inject(backbone, spec_for(variant, family))
    assert torch.equal(backbone(images.bfloat16()), plain)
    assert all(tensor.dtype == torch.float32 for tensor in own_tensors(backbone).values())
    scramble(backbone)
    half = backbone(images.bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(backbone(images.bfloat16()), half, rtol=0.1, atol=0.1)
    spread = expected.std()
    for coarse in (mixed, half):
        assert (coarse.float() - expected).abs().mean() < 0.1 * spread
    half.float().sum().backward()
    assert all(tensor.grad is not None for tensor in own_tensors(backbone).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_specs_are_plain_data(variant):
    spec = VARIANTS[variant]
    file = io.BytesIO()
    torch.save({"adapter": spec}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == {"adapter": spec}
    assert hash(spec) == hash(replace(spec))
    with pytest.raises(FrozenInstanceError):
        spec.scale = 2.0


# ---- formulas by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Adapter(), 156_768),
        (Adapter(placement="houlsby"), 2 * 156_768),
        (AdaptFormer(), 1_189_632),
        (AdaptFormer(bottleneck=8), 156_768),
        (LoRA(), 294_912),
        (LoRA(split="qv"), 294_912),
        (RepAdapter(bias=False), 221_184),
        (RepAdapter(), 239_808),
        (RepAdapter(placement="attn"), 239_808 // 2),
        (SSF(), 205_824),
        (BitFit(), 102_912),
        (DoRA(), 294_912 + 12 * 2304),
        (Convpass(), 327_552),
        (VPT(), 460_800),
        (VPT(placement="shallow"), 460_800 // 12),
        (AdapterPlus(), 12 * (2 * 768 * 8 + 8 + 2 * 768)),
        (FacT(), 2 * 768 * 16 + 16**3 + 12 * 12 * 16),
    ],
    ids=str,
)
def test_parameters_on_a_vit_b16(spec, expected):
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224").requires_grad_(False)
    inject(model, spec)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def update(layer: nn.Module, x: Tensor, activation) -> Tensor:
    """s * (up act(down x + b1) + b2), one token at a time."""
    out = torch.zeros(*x.shape[:-1], len(layer.up), dtype=x.dtype)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        token = x[tuple(place)]
        out[tuple(place)] = layer.scale * (
            layer.up.mv(activation(layer.down.mv(token) + layer.down_bias)) + layer.up_bias
        )
    return out


def rep(layer: nn.Module, u: Tensor) -> Tensor:
    """RepAdapter as it is published: a pointwise convolution down and a grouped one up, over tokens."""
    hidden = F.conv1d(u.transpose(1, 2), layer.down[:, :, None], layer.down_bias)
    change = F.conv1d(hidden, layer.up[:, :, None], layer.up_bias, groups=layer.groups)
    return u + layer.scale * change.transpose(1, 2)


def lora(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows of q, k and v, each with the update that it has."""
    q, k, v = layer.base_layer(x).chunk(3, dim=-1)
    s = layer.scale
    if not layer.split:
        dq, dk, dv = (s * x @ layer.lora_a.T @ part.T for part in layer.lora_b.chunk(3))
        return torch.cat([q + dq, k + dk, v + dv], -1)
    (aq, av), (bq, bv) = layer.lora_a.chunk(2), layer.lora_b.chunk(2)
    return torch.cat([q + s * x @ (bq @ aq).T, k, v + s * x @ (bv @ av).T], -1)


def block_of_affine_layers(block: nn.Module, plain: Block, spec: AdapterSpec, x: Tensor) -> Tensor:
    """A ViT block whose layers are each followed by ``g * y + b``, as published; BitFit has b alone."""
    after = {}
    for name, layer in adapter_layers(block).items():
        after[name] = (1 + layer.scale * layer.gain if isinstance(spec, SSF) else 1, layer.scale * layer.shift)

    def call(name: str, x: Tensor) -> Tensor:
        gain, shift = after[name]
        return gain * plain.get_submodule(name)(x) + shift

    batch, tokens, width = x.shape
    heads = plain.attn.num_heads
    q, k, v = call("attn.qkv", call("norm1", x)).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1) @ v
    x = x + call("attn.proj", mixed.transpose(1, 2).reshape(batch, tokens, width))
    return x + call("mlp.fc2", F.gelu(call("mlp.fc1", call("norm2", x))))


def block_by_hand(block: nn.Module, plain: Block, spec: AdapterSpec, x: Tensor) -> Tensor:
    """A ViT block with the adapters' formulas written out; ``plain`` is the block before injection."""
    attn, mlp = block.attn, block.mlp
    if isinstance(spec, SSF | BitFit):
        return block_of_affine_layers(block, plain, spec, x)
    u = plain.norm1(x)
    if isinstance(spec, LoRA):
        qkv = lora(attn.qkv, u)
    elif isinstance(spec, DoRA):
        own, length = attn.qkv, plain.attn.qkv.weight + attn.qkv.scale * attn.qkv.lora_b @ attn.qkv.lora_a
        rows = [size * row / row.pow(2).sum().sqrt() for size, row in zip(own.magnitude, length, strict=True)]
        qkv = u @ torch.stack(rows).T + plain.attn.qkv.bias
    else:
        qkv = plain.attn.qkv(rep(attn.qkv, u) if isinstance(spec, RepAdapter) else u)
    batch, tokens, width = x.shape
    heads = plain.attn.num_heads
    q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1) @ v
    out = plain.attn.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
    if spec == Adapter(placement="houlsby", scale=2.0):
        out = out + update(attn.proj, out, F.gelu)
    x = x + out
    u = plain.norm2(x)
    if isinstance(spec, RepAdapter) and spec.placement == "block":
        return x + plain.mlp.fc2(F.gelu(plain.mlp.fc1(rep(mlp.fc1, u))))
    out = plain.mlp(u)
    if isinstance(spec, Adapter):
        out = out + update(mlp, out, F.gelu)
    if isinstance(spec, AdaptFormer):
        out = out + update(mlp, x, torch.relu)
    return x + out


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ELSEWHERE])
def test_a_block_by_hand(variant):
    plain = Block(24, num_heads=2, qkv_bias=True).double().eval()
    model = nn.ModuleDict({"blocks": nn.ModuleList([copy.deepcopy(plain)])})
    inject(model, VARIANTS[variant])
    scramble(model).double()
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    block = model["blocks"][0]
    expected = block_by_hand(block, plain, VARIANTS[variant], x)
    torch.testing.assert_close(block(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    assert not torch.allclose(expected, plain(x), atol=1e-2)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("DoRA", *ELSEWHERE)])  # constant lengths
@pytest.mark.parametrize("channels_first", [False, True], ids=["tokens", "images"])
def test_gradients_equal_finite_differences(variant, channels_first):
    """Every layer that the variant wraps, in all of its own tensors and in its input."""
    block = Block(4, num_heads=2, mlp_ratio=2, qkv_bias=True)
    if channels_first:
        block.norm2 = nn.Identity()
        block.attn.qkv, block.attn.proj = nn.Conv2d(4, 12, 1), nn.Conv2d(4, 4, 1)
        block.mlp.fc1, block.mlp.fc2 = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])}).eval().requires_grad_(False)
    sizes = {name: 2 for name in ("rank", "bottleneck") if hasattr(VARIANTS[variant], name)}
    inject(model, replace(VARIANTS[variant], **sizes))
    scramble(model).double()
    for layer in adapter_layers(model).values():
        x = inputs_of(layer, 1).requires_grad_()
        own = [p for p in layer.parameters() if p.requires_grad]
        assert own
        assert torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x), (x, *own))


def test_readable_keys(vit):
    before = set(vit.state_dict())
    inject(vit, LoRA())
    qkv = "blocks.0.attn.qkv"
    assert {k for k in vit.state_dict() if k.startswith(qkv)} == {
        f"{qkv}.base_layer.weight",
        f"{qkv}.base_layer.bias",
        f"{qkv}.lora_a",
        f"{qkv}.lora_b",
    }
    assert {k.replace(".base_layer", "") for k in vit.state_dict() if "lora" not in k} == before
    inject(vit, AdaptFormer())
    keys = {k for k in vit.state_dict() if k.startswith(("blocks.0.mlp.", "blocks.0.norm2.")) and "fc" not in k}
    assert keys == {f"blocks.0.mlp.{key}" for key in ("down", "down_bias", "up", "up_bias", "norm.weight", "norm.bias")}


# ---- the rate of dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_dropout_is_unbiased(rate, dtype):
    drop = DropRate(rate).train()
    x = torch.ones(400_000, dtype=dtype)
    y = drop(x)
    assert y.dtype == dtype
    dropped = (y == 0).double().mean()
    assert dropped == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / len(x)))
    torch.testing.assert_close(y[y != 0].float(), torch.full_like(y[y != 0], 1 / (1 - rate)).float(), rtol=5e-3, atol=0)
    assert drop.eval()(x) is x


def test_dropout_zero_rate_no_operation():
    x = torch.randn(3)
    drop = DropRate().train()
    state = torch.get_rng_state()
    assert drop(x) is x
    drop.set(0.0)
    assert drop(x) is x
    drop.set(0.5)
    drop.set(0.0)
    assert torch.equal(drop(x), x)
    assert not torch.equal(torch.get_rng_state(), state)
    assert "rate" not in drop.state_dict()
    assert copy.deepcopy(drop).rate == 0


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_dropout_rates_are_checked(rate):
    with pytest.raises(ValueError, match="must be a fraction of at least 0 and below 1"):
        DropRate(rate)
    drop = DropRate(0.3)
    with pytest.raises(ValueError, match="dropout"):
        drop.set(rate)
    assert drop.rate == pytest.approx(0.3)


def test_dropout_rate_change_no_recompile():
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    drop = DropRate(0.5).train()
    compiled = torch.compile(drop, backend=backend, fullgraph=True)
    x = torch.ones(1000)
    for rate, most in ((0.5, 600), (0.9, 200), (0.0, 1000)):
        drop.set(rate)
        kept = int((compiled(x) != 0).sum())
        assert most - 200 <= kept <= most
    assert len(compilations) == 1


# ---- names and errors ------------------------------------------------------------------------------------------------


def untouched(model: nn.Module, spec: AdapterSpec, match: str) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    with raises_one_line(ValueError, match=match):
        inject(model, spec)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_pattern_without_match_lists_layers(convnext, vit):
    untouched(
        convnext,
        LoRA(targets=("*.qkv",)),
        r"no layer of ConvNeXt matches the target '\*.qkv' of LoRA; .*: stem.\*, .*stages.\*.blocks.\*.mlp.fc1",
    )
    untouched(
        vit,
        LoRA(targets=("*.qkv", "*.fc3")),
        r"'\*.fc3'.*: patch_embed.proj, blocks.\*.attn.qkv, .*head$",
    )
    untouched(nn.Sequential(nn.ReLU()), LoRA(), "LoRA has no default places in Sequential; kinds that have: none$")
    untouched(nn.Sequential(nn.ReLU()), LoRA(targets=("a",)), "matches the target 'a' of LoRA; choose another kind$")


def test_layers_that_a_kind_cannot_take(vit, convnext):
    untouched(
        vit, LoRA(targets=("*.mlp",)), "LoRA cannot wrap blocks.0.mlp, a module of type Mlp; it takes an nn.Linear"
    )
    untouched(vit, RepAdapter(targets=("*.qkv", "*.norm1")), r"cannot wrap blocks.0.norm1, LayerNorm\(\(48,\)")
    untouched(convnext, LoRA(targets=("*.conv_dw",)), "cannot wrap stages.0.blocks.0.conv_dw, Conv2d.*in one group")
    untouched(vit, Adapter(targets=("*.norm1",)), "Adapter cannot wrap blocks.0.norm1, LayerNorm")


def test_nothing_is_wrapped_twice(vit, images):
    inject(vit, LoRA())
    untouched(vit, LoRA(), "blocks.0.attn.qkv has an adapter already, LoRA; choose other targets for LoRA")
    untouched(vit, RepAdapter(), "blocks.0.attn.qkv has an adapter already, LoRA; choose other targets for RepAdapter")


def test_kinds_in_one_backbone(vit, images):
    """A layer inside a wrapped module keeps its old name for patterns; kinds nest in either order."""
    expected = vit(images)
    twin = copy.deepcopy(vit)
    rep_fc1 = RepAdapter(targets=("*.mlp.fc1",))
    for model, specs in ((vit, (LoRA(), AdaptFormer(), rep_fc1)), (twin, (rep_fc1, AdaptFormer(), LoRA()))):
        for spec in specs:
            names = inject(model, spec)
            assert [model.get_submodule(name).kind for name in names] == [type(spec).__name__] * 6
        assert torch.equal(model(images), expected)
        assert len(adapter_layers(model)) == 18
        assert [layer.depth for layer in adapter_layers(model).values()][-1] == 1
        scramble(model)
    twin.load_state_dict(vit.state_dict())
    assert torch.equal(twin(images), vit(images))
    both = make_vit()
    assert len(inject(both, Adapter(targets=("*.mlp", "*.mlp.fc1")))) == 12
    assert torch.equal(both(images), expected)


def test_depth_counts_the_whole_backbone(vit):
    (name,) = inject(vit, LoRA(targets=("blocks.4.attn.qkv",)))
    assert adapter_layers(vit)[name].depth == pytest.approx(0.8)


def test_adaptformer_finds_the_norm():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, block_fn=ResPostBlock)
    untouched(model, AdaptFormer(norms=("ln",)), r"none of norms=\('ln',\) beside blocks.0.mlp; .*norm1, .*mlp, norm2")
    block = copy.deepcopy(model.blocks[0]).eval()
    inject(model, AdaptFormer(bottleneck=4))
    adapted = scramble(model).eval().blocks[0]
    x = torch.randn(2, 17, 192)
    with torch.no_grad():  # the norm after the MLP stays in its place
        y = x + block.norm1(block.attn(x))
        update = torch.relu(y @ adapted.mlp.down.T + adapted.mlp.down_bias) @ adapted.mlp.up.T + adapted.mlp.up_bias
        torch.testing.assert_close(adapted(x), y + adapted.norm2(block.mlp(y) + 0.1 * update))


def test_repadapter_groups_and_biases():
    untouched(
        make_vit(), RepAdapter(bottleneck=9, groups=9), "groups=9 must divide the 48 channels that blocks.0.attn.qkv"
    )
    model = make_vit(qkv_bias=False)
    inject(model, RepAdapter())
    found = {name: layer.down_bias is not None for name, layer in adapter_layers(model).items()}
    assert found == {name: name.endswith("fc1") for name in found}
    before = scramble(model)(torch.ones(1, 3, 32, 32))
    merge(model)
    torch.testing.assert_close(model(torch.ones(1, 3, 32, 32)), before)


def test_injection_follows_the_mode(vit):
    vit.train()
    inject(vit, LoRA())
    assert all(layer.training and layer.dropout.training for layer in adapter_layers(vit).values())
    vit.eval()
    inject(vit, Adapter())
    assert not any(layer.training or layer.dropout.training for layer in adapter_layers(vit).values())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LoRA(rank=0), "rank=0 must be a whole number of at least 1"),
        (lambda: LoRA(rank=2.5), "rank=2.5 must be a whole number"),
        (lambda: LoRA(split="kv"), "split='kv' must be one of 'fused', 'qv'"),
        (lambda: LoRA(targets="*.qkv"), r"targets='\*.qkv' must be a tuple of names, such as"),
        (lambda: LoRA(scale=math.inf), "scale=inf must be a finite number above 0"),
        (lambda: LoRA(scale=0.0), "scale=0.0 must be"),
        (lambda: LoRA(dropout=1.0), "dropout=1.0 must be a fraction"),
        (lambda: Adapter(bottleneck=-1), "bottleneck=-1"),
        (lambda: Adapter(placement="attn"), "placement='attn' must be one of 'mlp', 'houlsby'"),
        (lambda: AdaptFormer(bottleneck=0), "bottleneck=0"),
        (lambda: AdaptFormer(norms="norm2"), "norms='norm2' must be a tuple"),
        (lambda: RepAdapter(bottleneck=6, groups=4), "groups=4 must divide bottleneck=6"),
        (lambda: RepAdapter(placement="mlp"), "placement='mlp' must be one of 'block', 'attn'"),
        (lambda: SSF(std=-1.0), "std=-1.0 must be a finite number of at least 0"),
        (lambda: SSF(dropout=0.1), "dropout=0.1 does not fit SSF, which has no bottleneck; use 0"),
        (lambda: BitFit(dropout=0.1), "dropout=0.1 does not fit BitFit"),
        (lambda: DoRA(rank=0), "rank=0 must be"),
        (lambda: FacT(rank=0), "rank=0 must be"),
        (lambda: Convpass(bottleneck=0), "bottleneck=0 must be"),
        (lambda: AdapterPlus(drop_path=1.0), "drop_path=1.0 must be a fraction"),
        (lambda: VPT(prompts=0), "prompts=0 must be"),
        (lambda: VPT(placement="last"), "placement='last' must be one of 'deep', 'shallow'"),
        (lambda: VPT(placement="shallow", targets=("blocks.1",)), "targets=.* do not fit placement='shallow'"),
    ],
)
def test_fields_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_merging_is_all_or_nothing(vit, images):
    inject(vit, LoRA())
    scramble(vit)
    with torch.no_grad():
        vit.blocks[4].attn.qkv.lora_b.fill_(math.nan)
    modules = list(map(id, vit.modules()))
    with pytest.raises(ValueError, match=r"merging blocks.4.attn.qkv changes its output by nan .* tolerance=1e-05"):
        merge(vit)
    assert list(map(id, vit.modules())) == modules

    mixed = make_vit()
    inject(mixed, LoRA())
    inject(mixed, Adapter())
    with pytest.raises(ValueError, match="Adapter cannot be merged"):
        merge(mixed)
    assert len(adapter_layers(mixed)) == 12


def test_merge_half_precision_refused():
    vit = make_vit().bfloat16()
    inject(vit, LoRA())
    scramble(vit)
    with pytest.raises(ValueError, match=r"more than tolerance=1e-05; nothing was merged: keep the adapters"):
        merge(vit)
    merge(vit, tolerance=0.05)
    assert not adapter_layers(vit)


def test_merge_in_training_mode_no_dropout(vit, images):
    inject(vit, LoRA(dropout=0.5))
    expected = scramble(vit)(images)
    for layer in adapter_layers(vit).values():
        layer.train()
    merge(vit)
    torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-4)


def test_merge_without_adapters_no_change(vit):
    modules = list(map(id, vit.modules()))
    merge(vit)
    assert list(map(id, vit.modules())) == modules


def test_merge_equals_peft(vit):
    """W' = W + (alpha / r) B A with s = alpha / r."""
    inject(vit, LoRA(rank=4, scale=16 / 4))
    scramble(vit)
    layer = vit.blocks[0].attn.qkv
    expected = layer.base_layer.weight + 16 / 4 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer.merged().weight, expected)
