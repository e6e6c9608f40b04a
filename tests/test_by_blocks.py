"""Adapters by range of blocks: which layers they wrap, and that the rest of the package takes them."""

import copy
from typing import Any

import pytest
import torch
import yaml
from commands import printed
from conftest import BACKBONES, CLASSES, VIT, make_vit
from test_configs import small, stacked
from tiny import make_classifier, shaken, write_checkpoint

from dynadapter import Adapter, ByBlocks, Confidence, ExitClassifier, LoRA, RepAdapter, exit_costs, inject, load, merge
from dynadapter.adapters import Adapters, adapter_layers
from dynadapter.serve.bundle import bundle_from_classifier
from dynadapter.spec import plain, restore

SPEC = ByBlocks({"1-2": LoRA(rank=2), "3": None, "4-6": RepAdapter(bottleneck=4)})
YAML = "{1-2: {class_path: LoRA, init_args: {rank: 3}}, 3: RepAdapter, 4-5: null}"


@pytest.mark.parametrize("family", BACKBONES)  # of six blocks each
def test_each_block_has_the_kind_of_its_range(family, images):
    model = BACKBONES[family]()
    expected = model(images)
    names = inject(model, ByBlocks({"1-2": Adapter(bottleneck=2), "3": None, "4-6": Adapter(bottleneck=5)}))
    starts = {"vit": [f"blocks.{k}." for k in range(6)]}
    starts["swin"] = [f"layers.{stage}.blocks.{k}." for stage in range(3) for k in range(2)]
    starts["convnext"] = [
        f"stages.{stage}.blocks.{k}." for stage, k in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0))
    ]
    layers = adapter_layers(model)
    assert names == [f"{start}mlp" for k, start in enumerate(starts[family]) if k != 2]
    assert [len(layers[name].down) for name in names] == [2, 2, 5, 5, 5]
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


def test_count_of_layers_and_cost_by_hand(images):
    bare = exit_costs(make_classifier(adapter=None).net, 32).macs
    net = make_classifier(adapter=SPEC).net
    layers = adapter_layers(net.backbone)
    kinds = [layer.kind for layer in layers.values()]
    assert (kinds.count("LoRA"), kinds.count("RepAdapter"), len(kinds)) == (2, 6, 8)  # qkv; qkv and fc1
    assert [layers[f"blocks.{k}.attn.qkv"].depth for k in (0, 1, 3, 5)] == pytest.approx([0, 0.2, 0.6, 1])
    width, tokens = VIT["embed_dim"], 17
    lora, rep = tokens * 2 * (width + 3 * width), tokens * 4 * (width + width)  # multiply-adds of one layer
    more = [lora * 2, lora * 2 + rep * 2, lora * 2 + rep * 6]  # up to the exits after blocks 2, 4 and 6
    assert [cost - plain for cost, plain in zip(exit_costs(net, 32).macs, bare, strict=True)] == more


def test_merging_and_training(images):
    module = shaken(make_classifier(adapter=SPEC))
    module.net.train()(images).sum().backward()
    own = [p for layer in adapter_layers(module.net.backbone).values() for p in layer.own_parameters().values()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own)
    net = module.net.eval()
    expected = net(images)
    torch.testing.assert_close(copy.deepcopy(net).merge(1e-4)(images), expected, rtol=1e-4, atol=1e-4)


def test_checkpoint_and_bundle(images, tmp_path):
    module = shaken(make_classifier(adapter=SPEC)).eval()
    write_checkpoint(module, tmp_path / "a.ckpt")
    again = ExitClassifier.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert again.hparams["adapter"] == SPEC
    assert torch.equal(again(images), module(images))
    module.class_names = [str(k) for k in range(CLASSES)]
    place = bundle_from_classifier(module, tmp_path / "b", policy=Confidence(0.5), preprocessing={})
    bundle = load(place)
    assert bundle.config.adapter == SPEC
    assert torch.equal(bundle.net(images), module(images))
    label = "LoRA in blocks 1-2, none in block 3, RepAdapter in blocks 4-6"
    assert label in repr(bundle)
    assert label in (place / "README.md").read_text()


def test_as_json_and_back():
    assert restore(plain(SPEC), Adapters) == SPEC
    assert ByBlocks({4: None, "1-3": LoRA()}).ranges.keys() == {"4", "1-3"}  # YAML reads one block as a number


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ({"1-3": LoRA(), "3-6": LoRA()}, "ranges: blocks 1-3 and 3-6 overlap; give each block once"),
        ({"4": LoRA(), "1-6": LoRA()}, "ranges: blocks 1-6 and 4 overlap"),
        ({"3-1": LoRA()}, "ranges: '3-1' is not a range of blocks; give one such as 1-3, or 4 for one block"),
        ({"0-2": LoRA()}, "ranges: '0-2' is not a range"),
        ({"late": LoRA()}, "ranges: 'late' is not a range"),
        ({"1-6": SPEC}, "ranges: 1-6 has ByBlocks.*; give an adapter kind, such as LoRA, or None"),
        ({"1-6": "LoRA"}, "ranges: 1-6 has 'LoRA'; give an adapter kind"),
    ],
)
def test_ranges_that_cannot_be(ranges: Any, match):
    with pytest.raises(ValueError, match=match):
        ByBlocks(ranges)


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ({"1-3": LoRA()}, "ranges: 4-6 of 6 blocks is missing; add it, with null for no adapter"),
        ({}, "ranges: 1-6 of 6 blocks is missing"),
        ({"1-2": LoRA(), "4-6": LoRA()}, "ranges: 3 of 6 blocks is missing"),
        ({"1-12": LoRA()}, "ranges: blocks 1-12 do not fit a backbone of 6 blocks; end at 6"),
        ({"1-3": LoRA(), "4-6": LoRA(targets=("blocks.0.*",))}, r"blocks 4-6: .* matches the target 'blocks\.0"),
        ({"1-3": LoRA(), "4-6": LoRA(targets=("*.mlp",))}, "blocks 4-6: LoRA cannot wrap blocks.3.mlp"),
    ],
)
def test_ranges_that_do_not_fit(ranges, match):
    model = make_vit()
    with pytest.raises(ValueError, match=match):
        inject(model, ByBlocks(ranges))
    assert not adapter_layers(model)  # all or nothing


def test_ranges_with_another_injection(images):
    model = make_vit()
    inject(model, Adapter())
    inject(model, ByBlocks({"1-4": None, "5-6": LoRA(targets=("*.fc1",))}))  # inside of the wrapped MLPs
    assert [layer.kind for layer in adapter_layers(model).values()] == ["Adapter"] * 4 + ["Adapter", "LoRA"] * 2
    with pytest.raises(ValueError, match=r"blocks 5-6: blocks.4.mlp has an adapter already, Adapter"):
        inject(model, ByBlocks({"1-4": None, "5-6": Adapter()}))
    with pytest.raises(ValueError, match="Adapter cannot be merged"):
        merge(model)


# ---- on the command line


@pytest.fixture
def build(built):
    return lambda *args: built("flops", *args, *small(), "--data=Shapes", "--data.image_size=32").model


def test_config_and_command_line(build, tmp_path):
    file = tmp_path / "ranges.yaml"
    adapter = {"class_path": "ByBlocks", "init_args": {"ranges": yaml.safe_load(YAML)}}
    file.write_text(yaml.safe_dump({"model": {"adapter": adapter}}))
    options = ["--model.adapter", "ByBlocks", "--model.adapter.ranges", YAML]
    static = [*stacked("vtab"), f"--config={file}", *stacked("static")]
    for args in ([f"--config={file}"], options, [*stacked("adaptformer"), *options], static):
        model = build(*args)
        kinds = [layer.kind for layer in adapter_layers(model.net.backbone).values()]
        assert kinds == ["LoRA", "LoRA", "RepAdapter", "RepAdapter"]
        assert restore(model.hparams["adapter"], Adapters) == ByBlocks(
            {"1-2": LoRA(rank=3), "3": RepAdapter(), "4-5": None}
        )
        assert (model.net.num_exits == 1) is (args is static)
    changed = build(f"--config={file}", "--model.adapter.ranges", "{1-5: LoRA}")  # replaces all ranges
    assert restore(changed.hparams["adapter"], Adapters) == ByBlocks({"1-5": LoRA()})


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ("{1-2: LoRA}", "ranges: 3-5 of 5 blocks is missing; add it, with null for no adapter"),
        ("{1-3: LoRA, 3-5: LoRA}", "ranges: blocks 1-3 and 3-5 overlap; give each block once"),
        ("{1-5: LoRB}", "LoRB"),
    ],
)
def test_mistake_is_one_line(ranges, words, build, capsys):
    with pytest.raises(SystemExit):
        build("--model.adapter=ByBlocks", f"--model.adapter.ranges={ranges}")
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_help_lists_the_settings(capsys):
    text = printed(["fit", "--model.adapter.help", "ByBlocks"], capsys)
    assert "--model.adapter.ranges RANGES" in text
    assert "Blocks count from 1" in " ".join(text.split())
