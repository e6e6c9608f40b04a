"""Adapters of peft in this package, and LoRA of this package in peft."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused
from conftest import BACKBONES, CLASSES, VIT, make_convnext, make_vit, parting, raises_one_line
from exported_networks import NAMES, noise
from jsonargparse import Namespace
from test_backbones import shake
from test_configs import small
from tiny import make_classifier, shaken, write_checkpoint
from torch import nn

import dynadapter
from dynadapter import (
    ByBlocks,
    Confidence,
    DoRA,
    ExitClassifier,
    ExitNet,
    ExitTokens,
    LoRA,
    Peft,
    RepAdapter,
    create_backbone,
    exit_costs,
    inject,
    load,
    merge,
    save_peft,
)
from dynadapter.adapters import Adapters, adapter_layers
from dynadapter.cli import main
from dynadapter.cli.export import _backbone_call
from dynadapter.exits.policies import read_off
from dynadapter.serve import graphs
from dynadapter.serve.bundle import BackboneSource, bundle_from_classifier

peft = pytest.importorskip("peft")

# On a ViT of 6 blocks, width 48 and MLP 192: the parameters of each method by its paper.
METHODS: dict[str, tuple[Any, int]] = {
    "LoRA": (peft.LoraConfig(r=2, target_modules=["qkv"], lora_dropout=0.5), 6 * 2 * (48 + 144)),
    "DoRA": (peft.LoraConfig(r=2, target_modules=["qkv"], use_dora=True), 6 * (2 * (48 + 144) + 144)),
    "IA3": (peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"]), 6 * (144 + 192)),
    "OFT": (peft.OFTConfig(r=0, oft_block_size=4, target_modules=["qkv"]), 6 * 12 * 4 * 3 // 2),
    "VeRA": (peft.VeraConfig(r=4, target_modules=["qkv"]), 6 * (144 + 4)),
    "LN tuning": (peft.LNTuningConfig(target_modules=["norm1", "norm2"]), 6 * 2 * 2 * 48),
}
each = pytest.mark.parametrize("method", METHODS)


def spec_of(method: str) -> Peft:
    return Peft(METHODS[method][0])


def own(backbone: nn.Module) -> list[nn.Parameter]:
    return [p for layer in adapter_layers(backbone).values() for p in layer.own_parameters().values()]


@cache
def bare_macs() -> tuple[int, ...]:
    return exit_costs(ExitNet(make_vit(), every=2), 32).macs


@each
def test_method_in_every_respect(method, images):
    spec, count = METHODS[method]
    backbone = make_vit()
    bare, expected = bare_macs(), backbone(images)
    inject(backbone, Peft(spec))
    assert torch.equal(backbone(images), expected)  # the identity at the start
    net = ExitNet(backbone, every=2)
    adapters = own(net.backbone)
    assert sum(p.numel() for p in adapters) == count
    heads = {id(p) for p in (*net.heads.parameters(), *backbone.get_classifier().parameters())}
    assert {id(p) for p in net.parameters() if p.requires_grad} == {*map(id, adapters)} | heads

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * 0.1
    net.train()(images).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)
    with torch.no_grad():
        live = not torch.equal(net(images)[-1], net(images)[-1])
        logits = net.eval()(images)
        assert torch.equal(net(images), logits)
        policy = parting(logits[0])
        assert net.early(images, policy).exit_index.equal(read_off(policy, logits).exit_index)
    assert live is (method == "LoRA")
    assert not torch.allclose(logits[-1], expected, atol=1e-3)

    costs = exit_costs(net, 32).macs
    more = [17 * 2 * (48 + 144) * blocks for blocks in (2, 4, 6)]
    if method == "LoRA":
        assert [cost - plain for cost, plain in zip(costs, bare, strict=True)] == more
    assert all(cost >= plain for cost, plain in zip(costs, bare, strict=True))
    merged = copy.deepcopy(net).merge()
    assert merged.backbone.state_dict().keys() == make_vit().state_dict().keys()
    if method in ("LoRA", "LN tuning"):
        assert exit_costs(merged, 32).macs == bare
    with torch.no_grad():
        torch.testing.assert_close(merged(images), logits, rtol=1e-4, atol=1e-4)


@each
@pytest.mark.parametrize("family", BACKBONES)
def test_default_places_in_every_family(method, family, images):
    spec = spec_of(method)
    spec = Peft(spec.config, {name: value for name, value in spec.arguments.items() if not name.endswith("modules")})
    model = BACKBONES[family]()
    expected = model(images)
    assert len(inject(model, spec)) >= 6  # one a block at least
    assert torch.equal(model(images), expected)
    with torch.no_grad():
        for p in own(model):
            p.add_(0.02)
    expected = model(images)
    merge(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_default_places_are_those_of_lora():
    ours, theirs = (create_backbone("test_resnet", CLASSES) for _ in range(2))
    assert inject(ours, Peft("LoraConfig")) == inject(theirs, LoRA(rank=2)) != []


@each
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft on timm's LayerNorm
def test_logits_are_those_of_peft(method, images):
    ours, theirs = make_vit(), make_vit()
    inject(ours, spec_of(method))
    config = METHODS[method][0]
    theirs = peft.get_peft_model(theirs, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        for mine, other in zip(own(ours), trained, strict=True):
            other += torch.randn(other.shape, generator=generator) * 0.1
            mine.copy_(other)
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make", [make_vit, lambda: shake(create_backbone("test_resnet", CLASSES))], ids=["vit", "resnet"]
)
def test_our_dora_is_that_of_peft(make, images):
    """The same weights give the same logits and the same gradients, for linear layers and for convolutions."""
    ours, theirs = make(), make()
    places = inject(ours, DoRA(rank=4, scale=2.5))
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=places, use_dora=True)
    theirs = peft.get_peft_model(theirs, config).base_model.model
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for name in places:
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        matrices = (other.lora_A, other.lora_B, other.lora_magnitude_vector)
        tensors = (mine.lora_a, mine.lora_b, mine.magnitude)
        pairs += [(one, held["default"].weight) for one, held in zip(tensors, matrices, strict=True)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, two in pairs:
            one += torch.randn(one.shape, generator=generator) * 0.1
            two.copy_(one.view(two.shape))
    expected, logits = theirs.eval()(images), ours(images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    expected.pow(2).sum().backward()
    logits.pow(2).sum().backward()
    for one, two in pairs:
        assert two.grad.abs().sum() > 0
        torch.testing.assert_close(
            one.grad, two.grad.view(one.shape), rtol=1e-3, atol=1e-4 * two.grad.abs().max().item()
        )


@each
def test_checkpoint_and_bundle(method, images, tmp_path):
    spec = spec_of(method)
    module = shaken(make_classifier(adapter=spec)).eval()
    write_checkpoint(module, tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "base_layer" in name or "vera_A" in name]  # what is trained alone
    again = ExitClassifier.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert again.hparams["adapter"] == spec
    assert torch.equal(again(images), module(images))
    if method == "VeRA":  # whose shared matrices are drawn again
        module.class_names = NAMES
        folder = bundle_from_classifier(module, tmp_path / "b", policy=Confidence(0.5), preprocessing={}, costs=None)
        bundle = load(folder)
        assert bundle.config.adapter == spec
        assert torch.equal(bundle.net(images), module(images))
        assert f"{spec.config} of peft" in (folder / "README.md").read_text()


def test_dropout_follows_the_schedule(images):
    backbone = make_vit()
    inject(backbone, spec_of("LoRA"))
    net = shaken_net(ExitNet(backbone, every=2))
    layers = list(adapter_layers(backbone).values())
    assert [round(layer.depth, 1) for layer in layers] == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert {float(layer.dropout.rate) for layer in layers} == {0.5}
    for layer in layers:
        layer.dropout.set(0.0)
    net.train()
    with torch.no_grad():
        torch.testing.assert_close(net(images), net.eval()(images))


def shaken_net(net: ExitNet) -> ExitNet:
    with torch.no_grad():
        for p in own(net.backbone):
            p.add_(0.05)
    return net


def test_ranges_of_blocks(images):
    backbone = make_vit()
    expected = backbone(images)
    names = inject(backbone, ByBlocks({"1-2": spec_of("VeRA"), "3-5": RepAdapter(bottleneck=2), "6": spec_of("IA3")}))
    assert [name for name in names if backbone.get_submodule(name).kind == "Peft"] == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "blocks.5.attn.qkv",
        "blocks.5.mlp.fc2",
    ]
    torch.testing.assert_close(backbone(images), expected, rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.qkv has an adapter already, Peft; choose other targets for Lora"
    ):
        inject(backbone, spec_of("LoRA"))


def test_layers_that_peft_refuses():
    model = make_vit()
    for arguments, match in (
        ({"target_modules": ["nothing"]}, "LoraConfig of peft: .*nothing"),
        ({"target_modules": ["head"]}, "LoraConfig of peft: .*head"),  # it is trained itself
        ({"target_modules": ["norm1"]}, "LoraConfig of peft: Target module LayerNorm"),
        ({"r": 0}, "LoraConfig of peft: .*r"),
    ):
        with raises_one_line(ValueError, match=match):
            inject(model, Peft("LoraConfig", arguments))
        assert not adapter_layers(model)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in make_vit().parameters()]


def test_unmergeable_values_and_objects():
    config = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], task_type="FEATURE_EXTRACTION")
    assert Peft(config) == Peft("LoraConfig", {"r": 4, "target_modules": ["fc1", "qkv"]})
    with pytest.raises(ValueError, match="LoraConfig may not have 'bias'"):
        Peft(peft.LoraConfig(bias="all"))
    with pytest.raises(ValueError, match=r"Peft has the config PromptTuningConfig.*; give one of LoraConfig"):
        Peft(peft.PromptTuningConfig(task_type="CAUSAL_LM"))


def test_merged_for_onnx():
    net = shaken_net(ExitNet(make_vit_with("DoRA"), every=2)).eval()
    reference, merged = graphs.standalone(net, noise(1), merge=True)
    assert not adapter_layers(merged.backbone)
    with torch.no_grad():
        torch.testing.assert_close(merged(noise(3)), reference(noise(3)), rtol=1e-4, atol=1e-4)


def make_vit_with(method: str) -> nn.Module:
    backbone = make_vit()
    inject(backbone, spec_of(method))
    return backbone


def test_command_line_reads_it(built):
    options = ["--model.adapter=Peft", "--model.adapter.config=LoraConfig", "--model.adapter.arguments={r: 3}"]
    backbone = built("flops", *small(), "--data=Shapes", "--data.image_size=32", *options).model.net.backbone
    assert len(adapter_layers(backbone)) == 5
    assert len(own(backbone)[0]) == 3


# ---- from here to peft


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (make_vit, LoRA(rank=2, split="qv", targets=("*.qkv", "*.fc1"))),
        (make_vit, ByBlocks({"1": LoRA(rank=2, scale=3.0), "2-5": LoRA(rank=4), "6": None})),
        (lambda: make_convnext(conv_mlp=True), LoRA(rank=2)),
        (lambda: shake(create_backbone("test_resnet", CLASSES)), LoRA(rank=2)),
    ],
    ids=["qv", "ranges", "convolutions", "resnet"],
)
def test_peft_loads_our_lora(make, spec: Adapters, images, tmp_path):
    backbone = make()
    inject(backbone, spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in backbone.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * 0.1
    folder = save_peft(backbone, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(), folder).eval()
    assert not torch.allclose(backbone(images), make()(images), atol=1e-2)
    torch.testing.assert_close(theirs(images), backbone(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="exists; give another folder"):
        save_peft(backbone, folder)
    save_peft(backbone, folder, overwrite=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt; overwrite=True replaces an adapter folder"):
        save_peft(backbone, folder, overwrite=True)
    merge(backbone)
    for model, match in ((backbone, "merged or missing; only LoRA"), (make_vit_with("IA3"), "Peft; only LoRA")):
        with pytest.raises(ValueError, match=f"the adapters are {match}"):
            save_peft(model, tmp_path / "other")


def test_exit_tokens_name_what_keeps_them_out():
    backbone = make_vit()
    inject(backbone, spec_of("LoRA"))
    with raises_one_line(ValueError, match="not the adapter Peft on their qkv; use other heads, such as Attentive"):
        ExitNet(backbone, ExitTokens())
    merge(backbone)
    ExitNet(backbone, ExitTokens())


def test_layers_that_peft_would_change(tmp_path):
    """timm's BEiT reads only the weight of its qkv, and peft leaves out the dilation of a convolution."""
    beit = create_backbone("beit_base_patch16_224", CLASSES, **VIT)
    resnet = create_backbone("resnet18", CLASSES, output_stride=8)
    for model, match in ((beit, "no effect on blocks.0.attn.qkv"), (resnet, r"dilation \(2, 2\) of layer3.0.conv2")):
        inject(model, LoRA(rank=2))
        with raises_one_line(ValueError, match=match):
            save_peft(model, tmp_path / "adapter")


def test_export_writes_it(tmp_path: Path, images, capsys):
    module = shaken(make_classifier(adapter=LoRA(rank=2))).eval()
    module.class_names = [str(k) for k in range(CLASSES)]
    bundle = bundle_from_classifier(module, tmp_path / "b", policy=Confidence(0.5), preprocessing={}, costs=None)
    out = tmp_path / "adapter"
    for more in ([], ["--overwrite=true"]):
        main(["export", f"--bundle={bundle}", f"--out={out}", "--format=peft", *more])
    shown = capsys.readouterr().out
    assert f"peft.PeftModel.from_pretrained(MODEL, {str(out)!r})" in shown
    [call] = {line.removeprefix("MODEL is ") for line in shown.splitlines() if line.startswith("MODEL is ")}
    backbone = eval(call, {"dynadapter": dynadapter})
    theirs = peft.PeftModel.from_pretrained(backbone, out).eval()
    torch.testing.assert_close(theirs(images), module(images)[-1], rtol=1e-5, atol=1e-5)
    line = refused(["export", f"--bundle={bundle}", f"--out={out}", "--overwrite=true"], capsys)
    assert "holds adapter_config.json, adapter_model.safetensors; --overwrite true replaces an exported folder" in line


@pytest.mark.parametrize(
    ("origin", "weights", "pretrained", "words"),
    [
        ("file", None, None, "weights='vit.pth'"),
        ("file", "other.pth", None, "weights='other.pth'"),
        ("file", None, True, "pretrained=True, seed=3"),
        ("pretrained", None, None, "pretrained=True, seed=3"),
        ("seed", None, None, "seed=3"),
    ],
)
def test_printed_call_names_the_weights(origin, weights, pretrained, words):
    source = BackboneSource("vit", "", origin, {"patch_size": 8}, image_size=64, seed=3, file="vit.pth")
    bundle: Any = Namespace(config=Namespace(backbone=source), class_names=["a", "b"])
    call = _backbone_call(bundle, Namespace(weights=weights, pretrained=pretrained))
    assert call == f"dynadapter.create_backbone('vit', num_classes=2, {words}, image_size=64, patch_size=8)"


def test_cut_backbone_is_refused(tmp_path: Path, capsys):
    """peft would load the adapters into a backbone with all blocks without a word."""
    module = make_classifier(adapter=LoRA(rank=2), depth=4).eval()
    module.class_names = [str(k) for k in range(CLASSES)]
    bundle = bundle_from_classifier(module, tmp_path / "b", policy=Confidence(0.5), preprocessing={}, costs=None)
    line = refused(["export", f"--bundle={bundle}", f"--out={tmp_path / 'o'}", "--format=peft"], capsys)
    assert "has only the first 4 blocks of its backbone (model.depth)" in line
    assert line.endswith("export it as onnx")
    assert not (tmp_path / "o").exists()


def test_folder_behind_a_link_is_replaced(tmp_path: Path, monkeypatch):
    backbone = make_vit()
    inject(backbone, LoRA(rank=2))
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("v1")
    assert save_peft(backbone, tmp_path / "current", overwrite=True) == tmp_path / "v1"
    assert (tmp_path / "current").is_symlink()
    assert len(list((tmp_path / "v1").iterdir())) == 2
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", ".."):  # this process would keep the old folder, which is removed
        with pytest.raises(ValueError, match="is the current folder, or contains it; give another folder"):
            save_peft(backbone, place, overwrite=True)
    (tmp_path / "here").rmdir()  # an absolute path needs no current folder
    save_peft(backbone, tmp_path / "v1", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_file_that_appears_meanwhile_stays(tmp_path: Path, monkeypatch):
    backbone = make_vit()
    inject(backbone, LoRA(rank=2))
    place = save_peft(backbone, tmp_path / "v1")

    def write_slowly(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        (place / "notes.txt").write_text("mine")

    monkeypatch.setattr("dynadapter.files.write", write_slowly)
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        save_peft(backbone, place, overwrite=True)
    assert (place / "notes.txt").read_text() == "mine"
