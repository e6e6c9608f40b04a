"""VideoMAE as a backbone: against its formulas, and with every adapter kind, exits, costs, files and bundles."""

import copy
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CLASSES, parting, raises_one_line
from exported_networks import POLICY, noise
from test_kinds_by_family import kinds
from tiny import make_classifier, trainer
from tiny import shaken as shaken_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dynadapter import (
    SSF,
    VPT,
    Convpass,
    ExitNet,
    LoRA,
    Mixing,
    Shapes,
    Stream,
    TokenMerging,
    bundle_from_classifier,
    create_backbone,
    exit_costs,
    inject,
    load,
)
from dynadapter.adapters import AdapterSpec, adapter_layers
from dynadapter.backbones import frames, input_shape, set_image_size
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.policies import read_off
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle.tensors import fill, saved_tensors
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Runner
from dynadapter.training.mixing import mix
from dynadapter.training.module import ExitClassifier

NAME = "videomae_small_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "frames": 4}
TOKENS, WIDTH, DEPTH = 2 * 4 * 4, 48, 3


@functools.cache
def built(depth: int) -> nn.Module:
    model = create_backbone(NAME, CLASSES, **(ARGS | {"depth": depth}))
    kinds.shake(model.parameters())
    return model


def backbone(depth: int = DEPTH) -> nn.Module:
    """A copy of a VideoMAE without zeros that would hide a mistake."""
    return copy.deepcopy(built(depth))


def clips(count: int = 4) -> Tensor:
    return noise(4 * count).unflatten(0, (count, 4))


# ---- the network, by its formulas


def embedded(model: Any, x: Tensor) -> Tensor:
    """Cut each frame into patches by unfold; a token sums the products of its two frames."""
    moments = []
    for start in (0, 2):
        patches = [F.unfold(x[:, start + k], 8, stride=8).transpose(1, 2) for k in (0, 1)]
        weights = [model.patch_embed.proj.weight[:, :, k].flatten(1) for k in (0, 1)]
        moments.append(sum(p @ w.T for p, w in zip(patches, weights, strict=True)) + model.patch_embed.proj.bias)
    tokens = torch.cat(moments, 1)
    table = torch.empty(TOKENS, WIDTH)
    for place in range(TOKENS):
        for k in range(WIDTH):
            angle = place / 10_000 ** (2 * (k // 2) / WIDTH)
            table[place, k] = math.cos(angle) if k % 2 else math.sin(angle)
    return tokens + table


def logits_by_hand(model: Any, x: Tensor) -> Tensor:
    x = embedded(model, x)
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, WIDTH // 3)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) / math.sqrt(WIDTH // 3)).softmax(-1) @ v
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return model.head(F.layer_norm(x.mean(1), (WIDTH,), model.fc_norm.weight, model.fc_norm.bias, 1e-6))


@torch.no_grad()
def test_network_is_its_formula() -> None:
    model, x = backbone(), clips()
    assert (frames(model), input_shape(model, 32, 32)) == (4, (4, 3, 32, 32))
    torch.testing.assert_close(model._pos_embed(model.patch_embed(x)), embedded(model, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), logits_by_hand(model, x), rtol=1e-4, atol=1e-4)
    assert torch.equal(ExitNet(model, every=1).eval()(x)[-1], model(x))


@torch.no_grad()
def test_clip_does_not_see_its_batch() -> None:
    net, x = ExitNet(backbone(), every=1).eval(), clips(6)
    alone = torch.cat([net(clip[None]) for clip in x], 1)
    torch.testing.assert_close(net(x), alone, rtol=1e-4, atol=1e-5)
    policy = parting(alone[0])
    routed, expected = net.early(x, policy), read_off(policy, alone)
    assert routed.exit_index.equal(expected.exit_index)
    assert len(routed.exit_index.unique()) > 1
    torch.testing.assert_close(routed.logits, expected.logits, rtol=1e-4, atol=1e-5)
    order = [net(clip.flip(0)[None])[-1] for clip in x]  # the same frames backwards
    assert (torch.cat(order) - alone[-1]).abs().amax() > 1e-2


# ---- adapters


@pytest.mark.parametrize("spec", kinds.KINDS, ids=kinds.label)
def test_every_kind(spec: AdapterSpec) -> None:
    model, x = backbone(depth=2), clips(2)
    before = model(x)
    inject(model, spec)
    if not isinstance(spec, VPT):
        torch.testing.assert_close(model(x), before)  # the identity at the start
    net = ExitNet(model, every=1)
    adapters = [p for layer in adapter_layers(model).values() for p in layer.parameters() if p.requires_grad]
    trained = [p for p in net.parameters() if p.requires_grad]
    heads = {id(p) for p in (*net.heads.parameters(), *model.get_classifier().parameters())}
    assert {id(p) for p in trained} == {id(p) for p in adapters} | heads
    kinds.shake(trained)
    net.train()(x).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    with torch.no_grad():
        logits = net.eval()(x)
    if all(layer.mergeable for layer in adapter_layers(model).values()):
        merged = copy.deepcopy(net).merge(1e-4)
        with torch.no_grad():
            torch.testing.assert_close(merged(x), logits, rtol=1e-3, atol=1e-4)
    costs = exit_costs(net)
    assert (costs.meter, len(costs.macs)) == ("fvcore", 2)
    fresh = backbone(depth=2)
    inject(fresh, spec)
    again = ExitNet(fresh, every=1).eval()
    fill(again, saved_tensors(net, whole=False), False, "bundle")
    with torch.no_grad():
        torch.testing.assert_close(again(x), logits)


def test_ssf_wraps_the_tubelets() -> None:
    model = backbone()
    assert "patch_embed.proj" in inject(model, SSF())


@torch.no_grad()
def test_convpass_stays_in_its_moment() -> None:
    model = backbone()
    inject(model, Convpass(bottleneck=2))
    layer = model.blocks[0].mlp
    kinds.shake([layer.kernel, layer.up])
    x = torch.randn(1, TOKENS, WIDTH)
    other = x.clone()
    other[:, 16:] = 0  # the second moment
    assert torch.equal(layer(x)[:, :16], layer(other)[:, :16])
    assert not torch.equal(layer(x)[:, 16:], layer(other)[:, 16:])


# ---- cost


def block_macs(tokens: int) -> int:
    return 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 8 * tokens * WIDTH**2


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_cost_is_its_formula(share: float) -> None:
    merging = TokenMerging(after=(1, 2), share=share) if share else None
    costs = exit_costs(ExitNet(backbone(), LinearHeads(), every=1, token_merging=merging))
    tokens = [TOKENS, TOKENS - int(share * TOKENS)]
    tokens.append(tokens[-1] - int(share * tokens[-1]))
    embed, head = TOKENS * (3 * 2 * 8 * 8) * WIDTH, WIDTH * CLASSES
    found = [macs - light for macs, light in zip(costs.macs, costs.light, strict=True)]
    parts = [embed + sum(block_macs(n) for n in tokens[: k + 1]) + (k + 1) * head for k in range(DEPTH)]
    if share:  # the products of similar tokens cost a little, and more than the formula
        assert all(0 <= one - part < 0.1 * part for one, part in zip(found, parts, strict=True))
        assert costs.relative[-1] < 1
    else:
        assert found == parts
        assert costs.static - costs.light[-1] < found[-1]


# ---- files of weights


def released(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename a state to the names of VideoMAE's release."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("qkv.bias"):
            found[name.replace("qkv.bias", "q_bias")], _, found[name.replace("qkv.bias", "v_bias")] = tensor.chunk(3)
        else:
            found[name] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def of_transformers(state: dict[str, Tensor], bias: str) -> dict[str, Tensor]:
    found, names = {}, {"patch_embed.proj": "videomae.embeddings.patch_embeddings.projection", "head": "classifier"}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    inner |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            _, number, rest = module.split(".", 2)
            start = f"videomae.encoder.layer.{number}"
            if rest == "attn.qkv":
                for key, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    if kind == "weight":
                        found[f"{start}.attention.attention.{key}.weight"] = part
                    elif key != "key":
                        found[f"{start}.attention.attention.{bias.format(key, key[0])}"] = part
                continue
            module = f"{start}.{inner[rest]}"
        found[f"{names.get(module, module)}.{kind}"] = tensor
    return found


def without_key_bias() -> nn.Module:
    model = backbone()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[WIDTH : 2 * WIDTH] = 0
    return model


FILES = {
    "fine-tuned": lambda state: {"module": released(state, "")},
    "of the trainer": lambda state: {"model": released(state, "backbone.")},
    "transformers": lambda state: of_transformers(state, "{0}.bias"),
    "older transformers": lambda state: of_transformers(state, "{1}_bias"),
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_under_other_names(kind: str, tmp_path: Path) -> None:
    model = without_key_bias()
    torch.save(FILES[kind](model.state_dict()), tmp_path / "weights.pth")
    read = create_backbone(NAME, CLASSES, weights=tmp_path / "weights.pth", **ARGS)
    with torch.no_grad():
        assert torch.equal(read(clips()), model(clips()))


def test_weights_of_a_pretraining(tmp_path: Path) -> None:
    model = without_key_bias()
    state = {name: one for name, one in model.state_dict().items() if not name.startswith(("head.", "fc_norm."))}
    norm = {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    decoder = {
        "mask_token": torch.ones(1),
        "decoder.norm.weight": torch.ones(8),
        "encoder_to_decoder.weight": torch.ones(8),
    }
    content = released(state | norm, "encoder.") | decoder
    torch.save({"model": content}, tmp_path / "weights.pth")
    read = create_backbone(NAME, CLASSES, weights=tmp_path / "weights.pth", **ARGS)
    with torch.no_grad():
        assert torch.equal(read.forward_features(clips()), model.forward_features(clips()))
    assert read.fc_norm.weight.eq(1).all()
    torch.save({"model": {k: v for k, v in content.items() if "blocks.2." not in k}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"do not fit .*: 12 missing \(blocks.2"):
        create_backbone(NAME, CLASSES, weights=tmp_path / "weights.pth", **ARGS)


# ---- what does not fit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 5}, "frames=5 must be a multiple of tubelet_size=2"),
        ({"class_token": True}, "multiple values for keyword argument 'class_token'"),
        ({"dynamic_img_size": True}, "takes no argument"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad does not fit clips; leave it out"),
        ({"pretrained": True}, "give a local file as weights="),
        ({"img_size": None, "image_size": 36}, "image_size=36 is not a multiple of 8 pixels"),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",
)
def test_wrong_arguments(changes: dict[str, Any], words: str) -> None:
    with raises_one_line(ValueError, match=words):
        create_backbone(NAME, CLASSES, **{k: v for k, v in (ARGS | changes).items() if v is not None})


def test_wrong_shapes(vit: nn.Module) -> None:
    net, x = ExitNet(backbone()), clips()
    with pytest.raises(ValueError, match=r"\(4, 3, 32, 32\), and the backbone takes clips \(batch, 4 frames, channels"):
        net(x[:, 0])
    with pytest.raises(ValueError, match=r"takes clips \(batch, 4, 3, 32, 32\): frames, channels, height and width"):
        net(x[:, :2])
    with pytest.raises(ValueError, match="images of 1 channel do not fit a backbone with in_chans=3"):
        net(x[:, :, :1])
    with pytest.raises(ValueError, match=r"the backbone takes images \(batch, channels, height, width\)"):
        ExitNet(vit)(x)
    with pytest.raises(ValueError, match="takes clips of 32 pixels alone"):
        set_image_size(net.backbone, 64)


# ---- training, files, serving


def module(**changes: Any) -> ExitClassifier:
    options = {"backbone": NAME, "backbone_args": ARGS, "every": 1}
    return make_classifier(**(options | changes))


def test_data_of_another_kind() -> None:
    model, data = module(), SimpleNamespace(take_preprocessing=None, frames=8)
    with pytest.raises(ValueError, match="takes clips of 4 frames, and the data give clips of 8 frames; set frames=4"):
        model.match_data(data)
    with pytest.raises(ValueError, match="takes clips of 4 frames, and the data give images; read them by VideoLists"):
        model.match_data(Shapes(1, 1, 1))
    with pytest.raises(ValueError, match="takes images, and the data give clips of 8 frames; give a backbone of vid"):
        make_classifier().match_data(data)


def test_trained_checkpoint_is_the_network(tmp_path: Path) -> None:
    model = module(mixing=Mixing())
    batches = DataLoader(TensorDataset(clips(4), torch.arange(4)), batch_size=2)
    training = trainer(max_epochs=1)
    training.fit(model, batches, batches)
    training.save_checkpoint(tmp_path / "last.ckpt")
    again = ExitClassifier.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu").eval()
    with torch.no_grad():
        assert torch.equal(again(clips()), model.eval()(clips()))


def test_prediction_of_clips() -> None:
    model = module().eval()
    with torch.no_grad():
        expected = [model.class_names[k] for k in model(clips(4))[-1].argmax(-1)]
        assert model.predict_step([clips(4), torch.arange(4)], 0)["classes"] == expected
    with pytest.raises(ValueError, match="give clips"):
        model.predict_step(clips(4)[0], 0)


def test_mixing_takes_all_frames_alike() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 2, 8, 8)
    mixed, _ = mix(Mixing(mixup=0).mixer(CLASSES), x, torch.arange(4))
    assert mixed.shape == x.shape
    assert torch.equal(mixed, mixed[:, :1, :1].expand_as(mixed))


def test_bundle_takes_clips_alone(tmp_path: Path) -> None:
    model = shaken_module(module()).eval()
    x, preprocessing = clips(), {"image_size": 32}
    place = bundle_from_classifier(
        model, tmp_path / "bundle", policy=POLICY, preprocessing=preprocessing, merge=True, check_images=x
    )
    bundle = load(place)
    assert bundle.preprocess is None
    with torch.no_grad():
        expected = model.net.early(x, POLICY)
    torch.testing.assert_close(bundle.route(x).logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert [one.exit_index for one in bundle.predict(x)] == expected.exit_index.tolist()
    assert bundle.predict(x[0])[0].label == bundle.predict(x)[0].label
    with pytest.raises(ValueError, match=r"has no preprocessing; give preprocessed tensors \(batch, 4, 3, 32, 32\)"):
        bundle.predict("video.mp4")
    with pytest.raises(ValueError, match=r"give preprocessed floats \(4, 3, 32, 32\)"):
        bundle.predict(x[:, :2])
    with pytest.raises(ValueError, match=r"give \(batch, 4, 3, 32, 32\)"):
        bundle.route(x[0])


def test_stream_answers_clips() -> None:
    net, x = shaken_module(module()).net.eval(), clips()
    stream = Stream(net, POLICY, batch=2)
    stream.push(x)
    with torch.no_grad():
        expected = net.early(x, POLICY)
    assert [answer.exit_index for answer in stream.flush()] == expected.exit_index.tolist()
    with pytest.raises(ValueError, match=r"give a tensor \(batch, 4, 3, 32, 32\)"):
        stream.push(x[:, 0])


@pytest.mark.slow
def test_exported_graphs_are_the_network(tmp_path: Path) -> None:
    net = shaken_module(module(adapter=LoRA(rank=2))).net.eval()
    names, preprocess = [f"class {k}" for k in range(CLASSES)], Preprocess(image_size=32)
    export_onnx(net, tmp_path / "out", policy=POLICY, class_names=names, preprocess=preprocess, check_images=clips(8))
    runner, x = Runner(tmp_path / "out"), clips(5)
    with torch.no_grad():
        expected = net.early(x, POLICY)
    logits, exit_index = runner.route(x.numpy())
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-3, atol=1e-4)
    assert exit_index.tolist() == expected.exit_index.tolist()
    assert len(runner.predict(x.numpy())) == 5
    with pytest.raises(ValueError, match=r"takes clips of videos, no image files; give an array \(batch, 4, 3, 32, 32"):
        runner.predict("photo.png")
