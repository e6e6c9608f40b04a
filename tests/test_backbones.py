"""The cut against timm's own forward passes, and the making of backbones from names, seeds and files."""

import copy
import difflib
import itertools
import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import BACKBONES, CLASSES, make_convnext, make_swin, make_vit
from packaging.version import Version
from timm.models.byobnet import ByobNet
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dynadapter import backbones
from dynadapter.backbones import create_backbone, fingerprint

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 3, 1), "num_heads": (2, 2, 4)}
CONVNEXT = {"dims": (16, 24, 32, 48), "depths": (2, 1, 2, 1)}
NAFLEX = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
HIERA = {"img_size": 32, "embed_dim": 16, "stages": (1, 2), "q_pool": 1, "mask_unit_attn": (True, False)}
MAXVIT = {"img_size": 32, "embed_dim": (32, 64), "depths": (1, 2), "stem_width": 16}
WINDOWS = {"block_type": ("M", "T"), "transformer_window_size": (2, 2), "transformer_grid_size": (2, 2)}
RESNET = {"layers": (1, 2, 1, 1), "channels": (16, 16, 24, 32)}
REGNET = {"w0": 8, "wa": 8, "wm": 2.0, "group_size": 8, "depth": 6}

# name, arguments, (prefix tokens, whether the own head reads a class token)
ARCHITECTURES = [
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", VIT, (1, True)),
    ("vit_base_patch16_224.mae", VIT | {"global_pool": "avg"}, (1, False)),
    ("vit_base_patch16_clip_224.openai", VIT, (1, True)),  # a norm before the blocks, no bias in the patches
    ("vit_base_patch16_siglip_224", VIT, (0, False)),  # attention pooling
    ("vit_medium_patch16_gap_240", VIT, (0, False)),  # average pooling, no class token at all
    ("vit_small_patch14_reg4_dinov2", VIT, (5, True)),  # registers, position embedding without prefix
    ("vit_tiny_patch16_224", VIT | {"global_pool": "max", "class_token": False}, (0, False)),
    ("vit_tiny_patch16_224", VIT | {"dynamic_img_size": True}, (1, True)),
    ("vit_tiny_patch16_224", VIT | {"drop_path_rate": 0.5}, (1, True)),
    ("flexivit_small", VIT, (1, True)),
    ("deit_tiny_distilled_patch16_224", VIT, (2, True)),
    ("deit3_small_patch16_224", VIT, (1, True)),
    ("eva02_tiny_patch14_224", VIT, (1, False)),  # a bias of q and v alone
    ("eva02_base_patch14_224", VIT, (1, False)),  # separate projections, a SwiGLU with a norm
    ("eva_giant_patch14_224", VIT, (1, False)),  # no rotary embedding
    ("vit_small_plus_patch16_dinov3", VIT, (5, False)),  # any image size
    ("vit_base_patch16_rope_mixed_224", VIT, (1, True)),  # rotary embeddings of each block
    ("vit_pe_core_tiny_patch16_384", VIT, (1, False)),  # attention pooling
    ("beitv2_base_patch16_224", VIT, (1, False)),  # a bias of relative positions in each block
    ("beit_base_patch16_224", VIT | {"use_shared_rel_pos_bias": True, "global_pool": "token"}, (1, True)),
    ("naflexvit_base_patch16_par_gap", NAFLEX, (4, False)),  # any image size
    ("naflexvit_base_patch16_map", NAFLEX | {"rope_type": "mixed"}, (1, False)),
    ("hiera_tiny_224", HIERA, (0, False)),
    ("hiera_small_abswin_256", HIERA, (0, False)),
    ("maxvit_rmlp_pico_rw_256", MAXVIT | WINDOWS, (0, False)),  # windows and grids
    ("coatnet_0_rw_224", MAXVIT | {"block_type": ("C", "T")}, (0, False)),  # attention over the whole map
    ("maxxvitv2_nano_rw_256", MAXVIT | WINDOWS | {"block_type": ("M", "C")}, (0, False)),  # ConvNeXt blocks
    ("swin_tiny_patch4_window7_224", SWIN, (0, False)),
    ("swin_tiny_patch4_window7_224", SWIN | {"strict_img_size": False, "img_size": 24}, (0, False)),
    ("swinv2_tiny_window8_256", SWIN, (0, False)),
    ("swin_s3_tiny_224", SWIN | {"window_size": (4, 4, 8)}, (0, False)),
    ("convnext_atto", CONVNEXT, (0, False)),  # 1x1 convolutions as MLP
    ("convnext_atto_ols", CONVNEXT, (0, False)),  # overlapping stem
    ("convnext_tiny", CONVNEXT, (0, False)),  # linear layers as MLP
    ("convnext_tiny_hnf", CONVNEXT, (0, False)),  # norm before pooling
    ("convnext_large_mlp", CONVNEXT, (0, False)),  # hidden layer in the head
    ("convnextv2_atto", CONVNEXT, (0, False)),
    ("test_resnet", {}, (0, False)),  # both kinds of block, a deep stem, pooling in the shortcut
    ("resnet50", RESNET, (0, False)),
    ("seresnextaa101d_32x8d", RESNET, (0, False)),  # groups, squeeze-and-excitation, filtered downsampling
    ("regnety_002", REGNET, (0, False)),
    ("regnetv_064", REGNET, (0, False)),  # the norm comes first
    ("regnetz_005", REGNET, (0, False)),  # a last convolution after the blocks
    ("test_efficientnet", {}, (0, False)),
    ("tf_mobilenetv3_small_minimal_100", {}, (0, False)),  # padding as in TensorFlow
    ("mobilenetv4_conv_small_035", {}, (0, False)),
    ("test_byobnet", {}, (0, False)),
    ("test_byobnet", {"attn_layer": "cbam"}, (0, False)),  # a block ends with a convolution of one channel
    ("resnetv2_50", RESNET | {"stem_chs": 16}, (0, False)),
]
if timm.is_model("qwen3_vit_88m"):  # not in older releases of timm
    ARCHITECTURES += [
        ("qwen3_vit_88m", NAFLEX, (0, False)),
        ("qwen3_vit_88m_merge", NAFLEX, (0, False)),  # with the projector to the language model
    ]


def shake(model: nn.Module) -> nn.Module:
    """Moves every tensor away from the values, zeros above all, with which a mistake would not be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


def run(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Gives the output of every block, as the family lays it out."""
    x, outputs = backbones.embed(model, images), []
    for unit in backbones.blocks(model):
        given = backbones.arguments(model, unit, x)
        for module in unit:
            x = module(x, **given)
        outputs.append(x)
    return outputs


def check_message(error: pytest.ExceptionInfo, *words: str) -> None:
    """Asserts that an error is one line that holds the words."""
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def same(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ()) -> bool:
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items() if not name.startswith(but))


def stage_ends(model: nn.Module) -> list[int]:
    """Gives the last block of each stage that timm counts."""
    names = [info["module"] for info in model.feature_info]
    if isinstance(model, ResNet | RegNet):
        stages = [list(model.get_submodule(name).children()) for name in names[1:]]
    elif isinstance(model, EfficientNet | MobileNetV3 | ByobNet):
        ends = np.cumsum([len(stage) for stage in getattr(model, "blocks", None) or model.stages]) - 1
        return [int(ends[stage - 1]) for stage in model.stage_ends[1:]]
    else:
        return [int(end) for end in np.flatnonzero(np.diff([*backbones.widths(model), 0]))]
    return [int(end) for end in np.cumsum([len(stage) for stage in stages]) - 1]


# ---- the cut ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=ARCHITECTURES, ids=lambda case: f"{case[0]}-{len(case[1])}", scope="module")
def case(request):
    name, options, reads = request.param
    return shake(create_backbone(name, CLASSES, **options)), reads


@torch.no_grad()
def test_cut_is_bit_equal_to_timm(case, images):
    model, _ = case
    features = backbones.finish(model, run(model, images)[-1])
    assert torch.equal(features, model.forward_features(images))
    assert torch.equal(backbones.classify(model, features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (len(images), model.head_hidden_size)


@torch.no_grad()
def test_blocks_equal_timms_intermediates(case, images):
    model, _ = case
    outputs = run(model, images)
    read = [backbones.tokens(model, x) for x in outputs]
    assert backbones.widths(model) == [x.shape[-1] for x in read]
    if len(set(backbones.widths(model))) == 1:
        expected = model.forward_intermediates(
            images, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        expected = [torch.cat(pair[::-1], 1) if isinstance(pair, tuple) else pair for pair in expected]
        ends = range(len(outputs))
    else:
        expected = model.forward_intermediates(images, intermediates_only=True)
        expected = [torch.stack([image.flatten(1).T for image in x]) for x in expected]  # NCHW, image by image
        ends = stage_ends(model)
        expected = expected[-len(ends) :]  # without the stem's
        assert ends[-1] == len(outputs) - 1
    assert len(ends) == len(expected)
    for end, features in zip(ends, expected, strict=True):
        assert torch.equal(read[end], features)


@torch.no_grad()
def test_prefix_and_class_token(case, images):
    model, (prefix, reads_class) = case
    assert (backbones.prefix_tokens(model), backbones.has_class_token(model)) == (prefix, reads_class)
    if isinstance(model, VisionTransformer):
        patches = (images.shape[-1] // model.patch_embed.patch_size[0]) ** 2
        assert backbones.embed(model, images).shape[1] == prefix + patches
    # What the head reads shows in what moves its logits: the first token alone, or the others
    features = model.forward_features(images)
    if reads_class and prefix == 1:
        features[:, 1:] = 0
        assert torch.equal(backbones.classify(model, features), model(images))


def test_classifier_is_all_that_trains(case, images):
    model, _ = case
    assert not any(module.training for module in model.modules())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = backbones.classifier(model)
    assert all(isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == CLASSES for layer in layers)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for m in layers for p in m.parameters()}
    assert len(trainable) == 2 * len(layers)
    assert len(layers) == (2 if hasattr(model, "head_dist") else 1)
    model(images).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable


@torch.no_grad()
def test_other_image_sizes(images):
    wide = torch.cat([images, images], dim=-1)
    others = [case for case in ARCHITECTURES if case[0] in ("test_resnet", "regnety_002", "test_efficientnet")]
    for model in (
        make_vit(dynamic_img_size=True),
        make_swin(strict_img_size=False),
        make_convnext(),
        *(create_backbone(name, CLASSES, **options) for name, options, _ in others),
        create_backbone("tf_mobilenetv3_small_minimal_100", CLASSES),
    ):
        assert torch.equal(backbones.finish(model, run(model, wide)[-1]), model.forward_features(wide))


@pytest.mark.parametrize("name", ["beitv2", "hiera_tiny", "hiera_small", "coatnet", "naflexvit", "qwen3"])
@torch.no_grad()
def test_second_image_size(name):
    found = [(other, options) for other, options, _ in ARCHITECTURES if other.startswith(name)]
    if not found:
        pytest.skip("not in this release of timm")
    size, (other, options) = 64, found[0]
    options = {key: value for key, value in options.items() if key != "img_size"}
    model = shake(create_backbone(other, CLASSES, image_size=size, **options))
    assert backbones.built_for(model) in (None, size)
    images = torch.randn(2, 3, size, size)
    features = backbones.finish(model, run(model, images)[-1])
    assert torch.equal(features, model.forward_features(images))
    assert torch.equal(backbones.classify(model, features), model(images))


@torch.no_grad()
def test_cut_uses_replaced_and_copied_layers(any_backbone, images):
    before = backbones.classify(any_backbone, backbones.finish(any_backbone, run(any_backbone, images)[-1]))
    other = copy.deepcopy(any_backbone)
    mine = {id(module) for module in other.modules()}
    assert all(id(module) in mine for unit in backbones.blocks(other) for module in unit)

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    name = next(name for name, module in reversed(list(other.named_modules())) if name.endswith("mlp"))
    other.set_submodule(name, Doubled(other.get_submodule(name)))
    after = backbones.classify(other, backbones.finish(other, run(other, images)[-1]))
    assert not torch.equal(before, after)
    assert torch.equal(after, other(images))


def test_cut_compiles_as_one_graph(any_backbone, images):
    def forward(x):
        return backbones.classify(any_backbone, backbones.finish(any_backbone, run(any_backbone, x)[-1]))

    with torch.no_grad():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(forward, fullgraph=True, backend="eager")(images), any_backbone(images))


@pytest.mark.parametrize(
    "function",
    [backbones.blocks, backbones.widths, lambda m: backbones.embed(m, None), lambda m: backbones.finish(m, None)],
)
def test_unknown_class_names_the_known(function):
    with pytest.raises(TypeError) as error:
        function(nn.Linear(2, 2))
    check_message(error, "no cut is known for Linear", "'ConvNeXt'", "'SwinTransformer'", "'VisionTransformer'")


@pytest.mark.parametrize("method", ["forward", "forward_features"])
def test_cut_own_forward_refused(any_backbone, images, method):
    family = type(any_backbone)
    any_backbone.__class__ = type("Mine", (family,), {"helper": lambda self: None})
    assert len(backbones.blocks(any_backbone)) == 6
    any_backbone.__class__ = type("Mine", (family,), {method: lambda self, x: x})
    for function in (backbones.blocks, lambda model: backbones.embed(model, images)):
        with pytest.raises(TypeError) as error:
            function(any_backbone)
        check_message(error, "no cut is known for Mine", method, family.__name__)


# ---- names, arguments and seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_seed_global_state_unchanged(make):
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    model = make()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(2)
    with torch.device("meta"):  # a default device of the caller's plays no part
        assert same(make(), model)
    assert not same(make(seed=1), model)


def test_image_size_where_family_needs_it(tmp_path):
    small = VIT | {"img_size": None}
    for name, options, size in (
        ("vit_tiny_patch16_224", small, 48),
        ("vit_tiny_patch16_224", small, 224),  # timm's own: nothing to rebuild
        ("swin_tiny_patch4_window7_224", SWIN | {"img_size": None}, 48),
        ("convnext_atto", CONVNEXT, None),
    ):
        options = {key: value for key, value in options.items() if value is not None}
        model = create_backbone(name, CLASSES, image_size=size or 48, **options)
        assert backbones.built_for(model) == size
        assert model(torch.zeros(1, 3, size or 48, size or 48)).shape == (1, CLASSES)
        if size:
            assert same(model, create_backbone(name, CLASSES, img_size=size, **options))
    assert backbones.built_for(make_vit(image_size=48)) == 32  # img_size wins
    model = shake(make_vit())
    loaded = make_vit(img_size=None, image_size=64, weights=save(model, tmp_path / "file.pth"))
    assert backbones.built_for(loaded) == 64
    assert same_shapes_but_positions(loaded, model)


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_without_classes(make, images, tmp_path):
    model = make(num_classes=0)
    assert backbones.classifier(model) == []
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))
    loaded = make(num_classes=0, weights=save(make(), tmp_path / "file.pth"))
    assert fingerprint(loaded) == fingerprint(make())


@pytest.mark.parametrize("name", ["vit_tinny_patch16_224", "swin_tiny_patch4_window7_225", "convnext_ato"])
def test_unknown_name_gives_the_nearest(name):
    with pytest.raises(ValueError, match="timm has no model") as error:
        create_backbone(name, CLASSES)
    nearest = difflib.get_close_matches(name, timm.list_models(), n=1)[0]
    check_message(error, repr(name), nearest)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_tiny_patch16_224", {"img_sise": 32}, ["img_sise", "img_size"]),
        ("vit_tiny_patch16_224", {"qqqq": 32}, ["qqqq"]),
        ("vit_tiny_patch16_224", {"embed_dim": 10}, ["embed_dim", "divisible"]),
        ("vit_tiny_patch16_224", {"global_pool": "mean"}, ["global_pool", "mean"]),
        ("vit_tiny_patch16_224", {"global_pool": ""}, ["global_pool", "avg"]),
        ("convnext_atto", {"img_size": 32}, ["img_size", "leave it out"]),
        ("local-dir:/nowhere", {}, ["/nowhere"]),
        ("elsewhere:timm/vit", {}, ["elsewhere:timm/vit"]),
        ("vit_tiny_patch16_224", {"num_classes": -1}, ["num_classes=-1"]),
        ("vit_tiny_patch16_224", {"image_size": 30, "patch_size": 8}, ["30 is not a multiple of 8 p", "use 24 or 32"]),
        ("resmlp_12_224", {}, ["no cut is known for MlpMixer", "ConvNeXt"]),
        ("???", {}, ["timm has no model", "convnext_tiny", "vit_base_patch16_224"]),
        ("vit_tiny_patch16_224.augreg_in22k", {}, ["no weights 'augreg_in22k'", "augreg_in21k, augreg_in21k_ft_in1k"]),
    ],
)
def test_wrong_arguments_are_one_line(name, options, words):
    with pytest.raises((ValueError, TypeError)) as error:
        create_backbone(name, **({"num_classes": CLASSES} | options))
    check_message(error, *words)
    assert isinstance(error.value, TypeError) == ("no cut is known" in words[0])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224.ms_in1k", "hf-hub:timm/nobody"])
def test_pretrained_without_network_message(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="could not be fetched") as error:
        create_backbone(name, CLASSES, pretrained=True, cache_dir=str(tmp_path))
    check_message(error, name, "weights='...'", "LocalEntryNotFoundError")


def test_pretrained_is_timms_own(tmp_path, vit):
    """A folder in the layout of the hub goes through the same door as the hub itself."""
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": CLASSES, "model_args": VIT | {"depth": 6}}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "classifier": "head", "first_conv": "patch_embed.proj"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(shake(vit).state_dict(), tmp_path / "model.safetensors")
    name = f"local-dir:{tmp_path}"
    assert same(create_backbone(name, CLASSES, pretrained=True), vit)
    assert same(create_backbone(name, CLASSES + 1, pretrained=True), make_other_head(vit), but=("head.",))
    assert not same(create_backbone(name, CLASSES), vit)
    trained = [n for n, p in create_backbone(name, CLASSES, pretrained=True).named_parameters() if p.requires_grad]
    assert trained == ["head.weight", "head.bias"]


def make_other_head(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.reset_classifier(CLASSES + 1)
    return model


# ---- weight files ----------------------------------------------------------------------------------------------------


def save(model: nn.Module, path, wrap=lambda state: state):
    state = wrap({name: tensor.clone() for name, tensor in model.state_dict().items()})
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **to_google(model))
    else:
        torch.save(state, path)
    return path


def to_google(model: nn.Module) -> dict[str, np.ndarray]:
    """Names and lays out a ViT's tensors as Google's JAX checkpoints do."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(len(model.blocks)):
        block, here = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays[f"{here}{theirs}/scale"] = state[f"{block}{ours}.weight"]
            arrays[f"{here}{theirs}/bias"] = state[f"{block}{ours}.bias"]
        attention = f"{here}MultiHeadDotProductAttention_1/"
        kernels = np.split(state[f"{block}attn.qkv.weight"], 3)
        biases = np.split(state[f"{block}attn.qkv.bias"], 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            arrays[f"{attention}{part}/kernel"] = kernel.T.reshape(width, heads, -1)
            arrays[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{block}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{block}attn.proj.bias"]
        for r in (0, 1):
            arrays[f"{here}MlpBlock_3/Dense_{r}/kernel"] = state[f"{block}mlp.fc{r + 1}.weight"].T
            arrays[f"{here}MlpBlock_3/Dense_{r}/bias"] = state[f"{block}mlp.fc{r + 1}.bias"]
    return arrays


@pytest.mark.parametrize(
    ("kind", "suffix"), [*itertools.product(BACKBONES, [".safetensors", ".pth", ".pt", ".bin"]), ("vit", ".npz")]
)
def test_weights_round_trip(kind, suffix, tmp_path):
    model = shake(BACKBONES[kind](seed=3))
    loaded = BACKBONES[kind](weights=save(model, tmp_path / f"file{suffix}"))
    assert same(loaded, model)
    assert fingerprint(loaded) == fingerprint(model)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not loaded.training


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: tensor.double() for name, tensor in state.items()},
    ],
)
def test_wrapped_weights(any_backbone, wrap, tmp_path, request):
    shake(any_backbone)
    make = BACKBONES[request.node.callspec.params["any_backbone"]]
    assert same(make(weights=str(save(any_backbone, tmp_path / "file.pth", wrap))), any_backbone)


def test_weights_win_over_pretrained(vit, tmp_path):
    assert same(make_vit(seed=2, pretrained=True, weights=save(vit, tmp_path / "file.pth")), vit)


old_timm = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="takes a Swin file without head for one of Swin's authors"
)


@pytest.mark.parametrize(
    ("kind", "has_head"),
    [
        *itertools.product([*BACKBONES, "npz", "distilled"], [True]),
        *itertools.product(["vit", "convnext", "npz", "distilled"], [False]),
        pytest.param("swin", False, marks=old_timm),
    ],
)
def test_weights_other_classifier_left_out(kind, has_head, tmp_path):
    name = {"npz": "vit"}.get(kind, kind)

    def make(classes, **options):
        if kind == "distilled":
            return create_backbone("deit_tiny_distilled_patch16_224", classes, **VIT, **options)
        return BACKBONES[name](classes, **options)

    def wrap(state):
        return state if has_head else {key: t for key, t in state.items() if not key.startswith(heads)}

    heads = ("head.fc.",) if kind in ("swin", "convnext") else ("head.", "head_dist.")
    model = shake(make(7, seed=3))
    if kind == "npz" and not has_head:
        path = tmp_path / "file.npz"
        np.savez(path, **{key: array for key, array in to_google(model).items() if not key.startswith("head")})
    else:
        path = save(model, tmp_path / ("file.npz" if kind == "npz" else "file.pth"), wrap)
    loaded, fresh = make(CLASSES, weights=path), make(CLASSES)
    head = {key for key in loaded.state_dict() if key.startswith(heads)}
    assert len(head) == (4 if kind == "distilled" else 2)
    for key, tensor in loaded.state_dict().items():
        expected = fresh if key in head else model
        assert torch.equal(tensor, expected.state_dict()[key]), key


# timm's interpolation of Swin's relative positions indexes with a list and searches in strided values
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
@pytest.mark.parametrize(
    ("kind", "made", "wanted"),
    [
        ("vit", {}, {"img_size": 64}),  # position embedding
        ("vit", {}, {"patch_size": 4}),  # patches and position embedding
        ("vit", {}, {"img_size": (32, 64), "no_embed_class": False}),
        ("vit", {"no_embed_class": True, "reg_tokens": 2}, {"no_embed_class": True, "reg_tokens": 2, "img_size": 64}),
        ("vit", {}, {"in_chans": 1}),  # first convolution
        ("vit", {}, {"in_chans": 5}),
        ("swin", {}, {"img_size": 64, "window_size": 8}),  # relative positions
        ("swin", {}, {"patch_size": 4}),
        ("swin", {}, {"in_chans": 1}),
        ("convnext", {}, {"in_chans": 1}),
    ],
)
def test_weights_are_adapted_as_timm_does(kind, made, wanted, tmp_path):
    model = shake(BACKBONES[kind](seed=3, **made))
    path = save(model, tmp_path / "file.pth")
    loaded = BACKBONES[kind](weights=path, **wanted)
    options = {  # what conftest's factories give timm
        "vit": VIT | {"depth": 6},
        "swin": SWIN | {"depths": (2, 2, 2)},
        "convnext": CONVNEXT | {"patch_size": 2, "ls_init_value": 1.0},
    }[kind]
    name = {"vit": "vit_tiny_patch16_224", "swin": "swin_tiny_patch4_window7_224", "convnext": "convnext_tiny"}[kind]
    overlay = {"file": str(path), "num_classes": CLASSES, "custom_load": False}
    reference = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES, **(options | wanted)
    )
    assert same(loaded, reference)
    assert not same(loaded, BACKBONES[kind](**wanted))


def test_npz_of_another_resolution(vit, tmp_path):
    loaded = make_vit(img_size=64, weights=save(shake(vit), tmp_path / "file.npz"))
    assert same_shapes_but_positions(loaded, vit)


def same_shapes_but_positions(a: nn.Module, b: nn.Module) -> bool:
    assert a.pos_embed.shape != b.pos_embed.shape
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items() if name != "pos_embed")


def test_names_of_the_original_authors(tmp_path):
    """Files of DeiT III, Swin and ConvNeXt as their authors published them."""
    deit = shake(create_backbone("deit3_small_patch16_224", CLASSES, seed=3, **VIT))
    path = save(
        deit,
        tmp_path / "deit3.pth",
        lambda s: {
            "model": {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in s.items()}
        },
    )
    assert same(create_backbone("deit3_small_patch16_224", CLASSES, weights=path, **VIT), deit)

    swin = shake(make_swin(seed=3))

    def older(state):  # merging at the end of a stage, head without fc, and a buffer that timm does not keep
        names = {k: k.replace("head.fc", "head") for k in state}
        for stage in (1, 2):
            names = {
                k: n.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample") for k, n in names.items()
            }
        table = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
        return {"model": {names[k]: v for k, v in state.items()} | table}

    assert same(make_swin(weights=save(swin, tmp_path / "swin.pth", older)), swin)

    masked = shake(make_convnext(seed=3))  # pre-trained by masking: ends before the head and its norm
    path = save(masked, tmp_path / "fcmae.pth", lambda s: {k: v for k, v in s.items() if not k.startswith("head.")})
    assert same(make_convnext(weights=path), masked, but=("head.",))


def test_weights_that_do_not_fit(any_backbone, tmp_path, request):
    make = BACKBONES[request.node.callspec.params["any_backbone"]]
    names = [name for name in any_backbone.state_dict() if "blocks" in name]

    def refuse(wrap, *words, **changes):
        path = save(any_backbone, tmp_path / "file.pth", wrap)
        with pytest.raises(ValueError, match="do not fit") as error:
            make(weights=path, **changes)
        check_message(error, "file.pth", *words)

    refuse(lambda state: {k: v for k, v in state.items() if k != names[0]}, "1 missing", names[0])
    refuse(lambda state: {k: v for k, v in state.items() if k not in names[:9]}, "9 missing", names[2], "...")
    refuse(lambda state: state | {"extra.scale": torch.ones(1)}, "1 unknown", "extra.scale")
    refuse(lambda state: state | {names[0]: torch.ones(3)}, "1 of another shape", f"{names[0]} (3,)")
    refuse(lambda state: {"state_dict": {"a": torch.zeros(2)}}, "missing", "1 unknown (a)")


def test_weights_of_another_family(tmp_path, vit, swin, convnext):
    models = {"vit": vit, "swin": swin, "convnext": convnext}
    for made, model in models.items():
        path = save(model, tmp_path / f"{made}.safetensors")
        for wanted, make in BACKBONES.items():
            if wanted != made:
                with pytest.raises(ValueError, match="do not fit") as error:
                    make(weights=path)
                check_message(error, made)


def test_npz_that_does_not_fit(tmp_path, vit):
    path = save(vit, tmp_path / "file.npz")
    for change in ({"depth": 7}, {"depth": 5}, {"embed_dim": 96, "num_heads": 6}, {"pre_norm": True}):
        with pytest.raises(ValueError, match=r"file\.npz") as error:
            make_vit(weights=path, **change)
        check_message(error)
    with pytest.raises(ValueError, match="do not fit") as error:
        make_swin(weights=path)
    check_message(error, "SwinTransformer", ".safetensors")


class Code:
    ran = False

    def __reduce__(self):
        return setattr, (Code, "ran", True)


def broken_files():
    state = {"weight": torch.zeros(1000)}

    def cut_off(path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    def numpy_file(path, **arrays):
        np.savez(path, **arrays)

    return {
        "text.pth": lambda path: path.write_text("hello, world\n" * 20),
        "text.safetensors": lambda path: path.write_text("hello, world\n" * 20),
        "text.npz": lambda path: path.write_text("hello, world\n" * 20),
        "empty.pth": lambda path: path.write_bytes(b""),
        "empty.safetensors": lambda path: path.write_bytes(b""),
        "empty.npz": lambda path: path.write_bytes(b""),
        "cut.pth": lambda path: (torch.save(state, path), cut_off(path)),
        "cut.safetensors": lambda path: (safetensors.torch.save_file(state, path), cut_off(path)),
        "cut.npz": lambda path: (numpy_file(path, a=np.zeros(99)), cut_off(path)),
        "other.npz": lambda path: numpy_file(path, a=np.zeros(99)),
        "list.pth": lambda path: torch.save([1, 2], path),
        "numbers.pth": lambda path: torch.save({"a": 1, "b": "c"}, path),
        "code.pth": lambda path: torch.save({"weight": Code()}, path),
        "code.bin": lambda path: path.write_bytes(pickle.dumps({"weight": Code()}, protocol=2)),
        "model.pt": lambda path: torch.save(nn.Linear(2, 2), path),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_one_line(name, tmp_path):
    path = tmp_path / name
    broken_files()[name](path)
    with pytest.raises(ValueError, match="weights=") as error:
        make_vit(weights=path)
    check_message(error, str(path))
    if name.startswith(("code", "model")):
        check_message(error, "code", ".safetensors")
    assert not Code.ran


@pytest.mark.parametrize("name", ["absent.pth", ""])
def test_no_such_file(name, tmp_path):
    with pytest.raises(ValueError, match="is not a file") as error:
        make_vit(weights=tmp_path / name)
    check_message(error, str(tmp_path), ".safetensors")


# ---- fingerprint -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fingerprint_covers_frozen_tensors(any_backbone):
    mark = fingerprint(any_backbone)
    assert len(mark) == 64
    assert fingerprint(copy.deepcopy(any_backbone)) == mark
    marks = {mark}
    for parameter in any_backbone.parameters():
        bits = parameter.view(-1)[-1:].view(torch.int32)
        bits ^= 1
        assert (fingerprint(any_backbone) == mark) == parameter.requires_grad
        marks.add(fingerprint(any_backbone))
        bits ^= 1
    assert fingerprint(any_backbone) == mark
    assert len(marks) == 1 + sum(not parameter.requires_grad for parameter in any_backbone.parameters())
    for name, buffer in any_backbone.named_buffers():  # Swin's own, which are computed and not saved
        assert name not in any_backbone.state_dict()
        buffer += 1
    assert fingerprint(any_backbone) == mark
    any_backbone.register_buffer("statistics", torch.zeros(3))
    assert fingerprint(any_backbone) != mark


def test_fingerprint_layouts_and_types(any_backbone, convnext):
    mark = fingerprint(any_backbone)
    any_backbone.requires_grad_(True).train()
    assert fingerprint(any_backbone) == mark
    any_backbone.reset_classifier(11)
    assert fingerprint(any_backbone) == mark
    assert fingerprint(any_backbone.to(torch.bfloat16)) != mark
    mark = fingerprint(convnext)
    assert fingerprint(convnext.to(memory_format=torch.channels_last)) == mark


@pytest.mark.slow
def test_fingerprint_in_another_process(vit):
    code = """
from dynadapter.backbones import create_backbone, fingerprint
options = {"num_heads": 3, "depth": 6, "embed_dim": 48, "patch_size": 8, "img_size": 32}
print(fingerprint(create_backbone("vit_tiny_patch16_224", 5, **options)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(vit)
