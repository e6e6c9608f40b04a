"""Adapter+, Convpass, FacT, VPT, SSF, BitFit and DoRA: formulas written out, and what each may not be combined with."""

import copy
from typing import Any

import pytest
import torch
from conftest import make_convnext, make_swin, make_vit, raises_one_line
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter.adapters import (
    SSF,
    VPT,
    Adapter,
    AdapterPlus,
    AdapterSpec,
    AdaptFormer,
    BitFit,
    Convpass,
    DoRA,
    FacT,
    LoRA,
    adapter_layers,
    inject,
    merge,
)
from dynadapter.backbones import create_backbone, prefix_tokens, set_image_size
from dynadapter.exits.exit_tokens import ExitTokens
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.training.sharding import shard


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")}


def scrambled(spec: AdapterSpec, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A bare ViT and the same one with adapters that change it, in float64."""
    plain = make_vit(depth=2, **options).double()
    model = copy.deepcopy(plain)
    inject(model, spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.ndim == 1 else p[0].numel() ** -0.5))
    return plain, model.double()


def tokens(count: int = 17, width: int = 48) -> Tensor:
    return torch.randn(2, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def adapter_plus(block: nn.Module, adapted: Any, x: Tensor) -> Tensor:
    y = block(x)
    hidden = F.gelu(y @ adapted.down.T + adapted.down_bias)
    return y + 2.0 * adapted.gain * (hidden @ adapted.up.T + adapted.up_bias)


def convolution(layer: Any, x: Tensor) -> Tensor:
    """Convpass, patch by patch on a grid of 4 x 4, behind one class token."""
    hidden = F.gelu(x @ layer.down.T + layer.down_bias)
    mixed = torch.empty_like(hidden)
    for image, out in zip(hidden, mixed, strict=True):
        out[0] = layer.kernel[:, :, 1, 1] @ image[0] + layer.kernel_bias
        for row in range(4):
            for column in range(4):
                total = layer.kernel_bias
                for dr in (-1, 0, 1):
                    for dc in (-1, 0, 1):
                        r, c = row + dr, column + dc
                        if 0 <= r < 4 and 0 <= c < 4:
                            total = total + layer.kernel[:, :, dr + 1, dc + 1] @ image[1 + 4 * r + c]
                out[1 + 4 * row + column] = total
    return layer.scale * (F.gelu(mixed) @ layer.up.T + layer.up_bias)


def convpass(block: Any, adapted: Any, x: Tensor) -> Tensor:
    u = block.norm1(x)
    x = x + block.attn(u) + convolution(adapted.attn, u)
    u = block.norm2(x)
    return x + block.mlp(u) + convolution(adapted.mlp, u)


def fact(block: Any, adapted: Any, x: Tensor) -> Tensor:
    """The block with W + s * (up @ (sum over k of mix[k] * core[..., k]) @ down) in each tile of 48 x 48."""
    first = adapted.attn.qkv
    block = copy.deepcopy(block)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer, weight = adapted.get_submodule(name), block.get_submodule(name).weight
        rows, columns = weight.shape[0] // 48, weight.shape[1] // 48
        for tile in range(rows * columns):
            i, j = 48 * (tile // columns), 48 * (tile % columns)
            weighed = sum(layer.mix[tile, k] * first.core[:, :, k] for k in range(layer.rank))
            weight[i : i + 48, j : j + 48] += layer.scale * first.up @ weighed @ first.down
    return block(x)


def vpt(block: nn.Module, adapted: Any, x: Tensor) -> Tensor:
    prompts = 0.5 * adapted.prompts.expand(2, -1, -1)
    y = block(torch.cat([x, prompts], 1))  # a block treats its tokens as a set
    return y[:, : x.shape[1]]


@pytest.mark.parametrize(
    ("spec", "by_hand"),
    [
        (AdapterPlus(bottleneck=4, scale=2.0), adapter_plus),
        (Convpass(bottleneck=4, scale=0.5), convpass),
        (FacT(rank=3, scale=2.0), fact),
        (VPT(prompts=5, scale=0.5), vpt),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_a_block_by_hand(spec: AdapterSpec, by_hand: Any) -> None:
    plain, model = scrambled(spec)
    x = tokens()
    expected = by_hand(plain.blocks[0], model.blocks[0], x)
    torch.testing.assert_close(model.blocks[0](x), expected)
    assert not torch.allclose(expected, plain.blocks[0](x), atol=1e-3)


@pytest.mark.parametrize("spec", [AdapterPlus(bottleneck=2), Convpass(bottleneck=1), VPT(prompts=2)], ids=str)
def test_gradients_by_finite_differences(spec: AdapterSpec) -> None:
    _, model = scrambled(spec, embed_dim=4, num_heads=2, img_size=16)
    block, x = model.blocks[0], tokens(5, 4).requires_grad_()
    own = [p for p in block.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *own))


def test_dora_lengths_are_constants() -> None:
    """The published gradient: the lengths of the updated rows get none."""
    _, model = scrambled(DoRA(rank=2, scale=0.5, targets=("blocks.0.attn.qkv",)))
    layer: Any = model.blocks[0].attn.qkv
    x, own = tokens(), (layer.magnitude, layer.lora_a, layer.lora_b)
    rows = layer.base_layer.weight + 0.5 * layer.lora_b @ layer.lora_a
    weight = layer.magnitude[:, None] * rows / rows.norm(dim=1, keepdim=True).detach()
    expected = F.linear(x, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), own) for y in (layer(x), expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("factor", [0.0, 1e-25, 1e-19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dora_of_rows_without_length(factor: float, dtype: torch.dtype) -> None:
    """Zero rows, such as those of pruned channels, and rows whose squares are too small for float32."""
    model: Any = make_vit(depth=2)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[3:5] *= factor
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(x)
    inject(model, DoRA(rank=2, dropout=0.0))
    assert torch.equal(model(x), before)
    layer = model.blocks[0].attn.qkv
    for rows in (5, 0):  # the update leaves these rows alone at first
        nn.init.normal_(layer.lora_b.data[rows:], std=0.1)
        model.float()(x).square().mean().backward()
        gradients = [p.grad for p in trained(model).values() if p.grad is not None]
        assert all(gradient.isfinite().all() and gradient.abs().max() < 1e3 for gradient in gradients)
        assert model.to(dtype)(x.to(dtype)).isfinite().all()
    expected = model.float()(x)
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_ssf_starts_near_the_identity() -> None:
    model = make_vit()
    inject(model, SSF())
    values = torch.cat([p.detach() for p in trained(model).values()])
    assert values.mean().item() == pytest.approx(0, abs=5 * 0.02 / len(values) ** 0.5)
    assert values.std().item() == pytest.approx(0.02, rel=0.1)


def test_bitfit_is_training_of_the_biases(images: Tensor) -> None:
    biases, model = make_vit(), make_vit()
    inject(model, BitFit())
    for name, p in biases.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    expected = [p for name, p in biases.named_parameters() if p.requires_grad and not name.startswith("head.")]
    assert sum(p.numel() for p in trained(model).values()) == sum(p.numel() for p in expected)
    for one in (biases, model):
        for p in one.head.parameters():
            p.requires_grad_(False)
        own = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            own.zero_grad()
            F.cross_entropy(one(images), torch.arange(4)).backward()
            own.step()
    torch.testing.assert_close(model(images), biases(images), rtol=1e-4, atol=1e-5)
    merge(model)
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, biases.state_dict()[name])


@pytest.mark.parametrize("spec", [SSF(std=0.5), BitFit()], ids=str)
@torch.no_grad()
def test_change_before_an_activation(spec: AdapterSpec) -> None:
    """timm's BatchNormAct2d ends with an activation, and a convolution without bias gets a factor alone."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, groups=1, bias=False), BatchNormAct2d(4)).eval()
    for p in (*model.parameters(), model[1].running_mean):
        nn.init.normal_(p)
    conv, norm = copy.deepcopy(model[0]), copy.deepcopy(model[1])
    inject(model, spec)
    for p in trained(model).values():
        nn.init.normal_(p)
    x = torch.randn(2, 3, 9, 9)
    layers: Any = adapter_layers(model)
    y = conv(x)
    if isinstance(spec, SSF):
        assert layers["0"].shift is None
        y = y * (1 + layers["0"].gain)[:, None, None]
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[:, None, None]
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    if isinstance(spec, SSF):
        y = y * (1 + layers["1"].gain)[:, None, None]
    expected = (y + layers["1"].shift[:, None, None]).relu()
    torch.testing.assert_close(model(x), expected)
    merge(model)
    torch.testing.assert_close(model(x), expected)


def test_fact_shares_its_factors(images: Tensor) -> None:
    model = make_swin()
    inject(model, FacT(rank=2))
    tiles = {"layers.0.blocks.0": 16, "layers.1.blocks.0": 32, "layers.2.blocks.0": 64}
    found = {name: len(p) for name, p in trained(model).items() if name.endswith(".up")}
    assert found == {f"{block}.attn.qkv.up": tile for block, tile in tiles.items()}
    assert sum(p.numel() for p in trained(model).values()) == sum(4 * t + 8 for t in tiles.values()) + 6 * 12 * 2
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in trained(twin).values():
            p.normal_()
        before, after = model(images), twin(images)
        twin.layers[0].blocks[0].attn.qkv.up.add_(1)
        torch.testing.assert_close(model(images), before)
        assert not torch.allclose(twin(images), after)


def test_fact_keeps_an_earlier_injection(images: Tensor) -> None:
    model = make_vit(depth=4)
    for blocks in ("23", "01"):
        expected, before = model(images), len(trained(model))
        inject(model, FacT(rank=2, targets=(f"blocks.[{blocks}].attn.qkv", f"blocks.[{blocks}].attn.proj")))
        assert torch.equal(model(images), expected)
        assert len(trained(model)) == before + 3 + 4
        with torch.no_grad():
            for p in trained(model).values():
                p.normal_()


def test_drop_path_drops_whole_samples() -> None:
    _, model = scrambled(AdapterPlus(drop_path=0.5))
    block: Any = model.blocks[0]
    x = torch.randn(64, 17, 48, dtype=torch.float64)
    y = block.base_layer(x)
    update = block(x) - y
    block.train()
    kept = ((block(x) - y) / update).flatten(1)
    assert kept.std(1).max() < 1e-6
    assert set(kept.mean(1).round(decimals=6).tolist()) == {0.0, 2.0}


def test_adaptformer_beside_attention(images: Tensor) -> None:
    """timm's block gives an attention mask to the layer."""
    plain, model = scrambled(AdaptFormer(targets=("*.attn",), norms=("norm1",), bottleneck=2, scale=2.0))
    x, block, adapted = tokens(), plain.blocks[0], model.blocks[0].attn
    update = F.relu(x @ adapted.down.T + adapted.down_bias) @ adapted.up.T + adapted.up_bias
    y = x + block.attn(block.norm1(x)) + 2 * update
    torch.testing.assert_close(model.blocks[0](x), y + block.mlp(block.norm2(y)))


@pytest.mark.parametrize("gradients", [True, False])
def test_autocast_keeps_the_residual_stream(gradients: bool, images: Tensor) -> None:
    model = make_vit(depth=2)
    inject(model, AdapterPlus(drop_path=0.0))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        x = model._pos_embed(model.patch_embed(images))
        assert x.dtype == model.blocks[0](x).dtype == torch.float32


# ---- prompts, exits and token merging --------------------------------------------------------------------------------


@torch.no_grad()
def test_shallow_prompts_pass_all_blocks(images: Tensor) -> None:
    plain, model = scrambled(VPT(prompts=5, placement="shallow"), global_pool="avg")
    net = ExitNet(model, LinearHeads(pooling="mean"), every=1).double().eval()
    x = plain._pos_embed(plain.patch_embed(images.double()))
    x = torch.cat([x, model.norm_pre.prompts.expand(4, -1, -1)], 1)
    head: Any = net.heads[0]
    x = plain.blocks[0](x)
    early = head.classify(head.norm(x[:, 1:17]).mean(1))  # of the 16 patches
    last = plain.fc_norm(plain.blocks[1](x)[:, 1:17].mean(1))
    torch.testing.assert_close(net(images.double()), torch.stack([early, plain.head(last)]))
    torch.testing.assert_close(model(images.double()), plain.head(last))


EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
OTHERS: list[AdapterSpec] = [
    AdapterPlus(bottleneck=2),
    VPT(prompts=2),
    Adapter(bottleneck=2, targets=("*.attn",)),
]


@pytest.mark.parametrize("first", OTHERS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_prompts_beside_other_adapters(name: str, first: AdapterSpec, images: Tensor) -> None:
    outputs = []
    for order in ((first, VPT(prompts=3, placement="shallow")), (VPT(prompts=3, placement="shallow"), first)):
        model = create_backbone(name, 5, **EVA)
        for spec in order:
            torch.manual_seed(0)
            inject(model, spec)
        assert prefix_tokens(model) == 3 + prefix_tokens(create_backbone(name, 5, **EVA))
        outputs.append(model(images))
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5) or isinstance(first, VPT)  # whose order of prompts counts


@pytest.mark.parametrize("placement", ["deep", "shallow"])
def test_prompts_have_no_position(placement: Any) -> None:
    plain, model = make_vit(depth=1), make_vit(depth=1)
    inject(model, VPT(prompts=5, placement=placement))
    count = model.num_prefix_tokens
    for size in (48, 32):
        set_image_size(plain, size)
        set_image_size(model, size)
        assert torch.equal(model.pos_embed, plain.pos_embed)
        assert model.num_prefix_tokens == count
        assert model(torch.zeros(1, 3, size, size)).isfinite().all()


@pytest.mark.parametrize("placement", ["deep", "shallow"])
@torch.no_grad()
def test_prompts_are_never_merged(placement: Any, images: Tensor) -> None:
    """Merged tokens count as many times as they stand for; prompts count once and stay."""
    backbone = make_vit(depth=2)
    nn.init.zeros_(backbone.pos_embed)
    inject(backbone, VPT(prompts=5, placement=placement))
    net = ExitNet(backbone, LinearHeads(), every=1).eval()
    same = images[..., :8].repeat(1, 1, 1, 4)  # each patch four times in a row
    expected, seen = net(same), []
    block = backbone.blocks[0].base_layer if placement == "deep" else backbone.blocks[0]
    block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    net.token_merging = TokenMerging((0,), 0.4)
    torch.testing.assert_close(net(same), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1 + 5 + 10]


@torch.no_grad()
def test_exit_tokens_beside_prompts(images: Tensor) -> None:
    backbone = make_vit()
    inject(backbone, VPT(prompts=5, placement="shallow"))
    static = backbone(images)
    net = ExitNet(backbone, ExitTokens(count=2, rank=2), every=2).eval()
    torch.testing.assert_close(net(images)[-1], static)


def exit_tokens(spec: AdapterSpec) -> None:
    backbone = make_vit()
    inject(backbone, spec)
    ExitNet(backbone, ExitTokens())


def merged_tokens(spec: AdapterSpec) -> None:
    backbone = make_vit()
    inject(backbone, spec)
    ExitNet(backbone, token_merging=TokenMerging((1,)))


def sharded(spec: AdapterSpec) -> None:
    backbone = make_vit()
    inject(backbone, spec)
    shard(ExitNet(backbone), None)  # type: ignore[arg-type]


def both(*specs: AdapterSpec) -> None:
    backbone = make_vit()
    for spec in specs:
        inject(backbone, spec)


def hiera() -> nn.Module:
    return create_backbone("hiera_tiny_224", 5, img_size=64, embed_dim=16, stages=(1, 1, 1, 1))


def naflex() -> nn.Module:
    return create_backbone("naflexvit_base_patch16_map", 5, image_size=64, depth=2, embed_dim=48, num_heads=3)


def parallel() -> nn.Module:
    return create_backbone("vit_base_patch16_xp_224", 5, **EVA)


def lambdanet() -> nn.Module:
    return create_backbone("lambda_resnet26t", 5, img_size=64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: sharded(FacT()),
            r"FacT cannot be trained sharded, .* use another kind, such as LoRA, or strategy: ddp",
        ),
        (lambda: inject(make_swin(), VPT()), r"VPT has no default places in Swin.*; kinds that have: AdaptF.*SSF"),
        (lambda: inject(make_convnext(), VPT(placement="shallow")), "VPT has no default places in ConvNeXt; kinds"),
        (lambda: inject(make_convnext(), LoRA(targets=("*.qkv",))), r"no layer of ConvNeXt matches the target"),
        (lambda: inject(naflex(), VPT(targets=("blocks.0",))), "VPT cannot wrap blocks.0: NaFlexVit does not take mo"),
        (lambda: inject(naflex(), VPT()), r"no default places in NaFlexVit; kinds that have: [\w, ]*$"),
        (lambda: inject(make_vit(), VPT(targets=("*.mlp",))), "VPT cannot wrap blocks.0.mlp, .*; it takes a block of"),
        (lambda: inject(make_vit(), AdapterPlus(targets=("*.mlp",))), "AdapterPlus cannot wrap blocks.0.mlp"),
        (lambda: inject(make_vit(dynamic_img_size=True), VPT(placement="shallow")), "dynamic_img_size does not fit"),
        (lambda: inject(hiera(), Convpass(targets=("blocks.*.mlp",))), "Convpass cannot wrap blocks.0.mlp: the tokens"),
        (lambda: inject(hiera(), Convpass()), r"no default places in Hiera; kinds that have: [\w, ]*$"),
        (lambda: inject(hiera(), Convpass(targets=("x",))), "matches the target 'x' of Convpass; choose another kind$"),
        (lambda: inject(lambdanet(), LoRA(split="qv", targets=("*.qkv",))), "split='qv' does not fit .*q, k and v"),
        (lambda: inject(parallel(), LoRA()), "LoRA has no .*; kinds that have: AdapterPlus, BitFit, SSF, VPT; or set"),
        (lambda: exit_tokens(VPT()), "ExitTokens needs .*, not the adapter VPT on them; use other heads"),
        (lambda: exit_tokens(Convpass()), "ExitTokens needs .*, not the adapter Convpass on them"),
        (lambda: merged_tokens(Convpass()), "token_merging does not fit Convpass, which can need every token"),
        (lambda: both(VPT(), Convpass()), "Convpass does not fit the other adapters: one adds tokens"),
        (lambda: both(Convpass(), VPT()), "VPT does not fit the other adapters"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with raises_one_line(ValueError, match=message):
        make()


def test_convpass_needs_its_grid() -> None:
    model = make_vit(img_size=(32, 64), depth=1)
    inject(model, Convpass())
    model(torch.randn(1, 3, 32, 64))  # its own grid is no square
    with pytest.raises(ValueError, match="Convpass needs every patch in its place, and 6 do not form a square"):
        model.blocks[0](torch.randn(1, 7, 48))
