"""Weights in another order: the same values, files and training."""

import copy
from functools import partial

import pytest
import torch
from conftest import make_vit
from test_class_first import ADAPTERS, middle_threshold, network, pictures
from torch import Tensor, nn

from dynadapter import Confidence, ExitNet, LinearHeads, LoRA, RepAdapter, create_backbone, inject, lay_out_for_cpu
from dynadapter.backbones import fingerprint
from dynadapter.serve.bundle import BackboneSource, load, save_bundle

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def linears(net: nn.Module) -> list[nn.Linear]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Linear)]


def laid_out(net: nn.Module) -> bool:
    return all(layer.weight.t().is_contiguous() for layer in linears(net))


def assert_same_state(net: nn.Module, other: nn.Module) -> None:
    mine, theirs = net.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_values_and_answers_stay(adapter):
    net = network(make_vit(), adapter)
    other = lay_out_for_cpu(copy.deepcopy(net))
    assert laid_out(other)
    assert not laid_out(net)
    assert_same_state(other, net)
    images = pictures()
    with torch.inference_mode():
        close(other(images), net(images))
        policy = middle_threshold(net, images)
        for class_first in (False, True):
            mine, theirs = (each.early(images, policy, class_first) for each in (other, net))
            assert torch.equal(mine.exit_index, theirs.exit_index)
            close(mine.logits, theirs.logits)


def test_second_call_changes_nothing():
    net = network(make_vit())
    assert lay_out_for_cpu(net) is net
    places = [layer.weight.data_ptr() for layer in linears(net)]
    lay_out_for_cpu(net)
    assert [layer.weight.data_ptr() for layer in linears(net)] == places


def test_layout_survives_copy_and_load():
    net, other = (network(make_vit(), LoRA(rank=4)) for _ in range(2))
    lay_out_for_cpu(net)
    assert laid_out(copy.deepcopy(net))
    assert laid_out(copy.deepcopy(net).double())
    nn.init.ones_(linears(other)[0].weight)
    net.load_state_dict(other.state_dict())
    assert laid_out(net)
    assert_same_state(net, other)


def test_weights_in_16_bits_stay_as_they_are():
    net = lay_out_for_cpu(network(make_vit()).bfloat16())
    assert not laid_out(net)
    assert laid_out(lay_out_for_cpu(net.double()))


def test_shared_weights_stay_shared():
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    second.weight = first.weight
    lay_out_for_cpu(nn.Sequential(first, second))
    assert first.weight is second.weight
    assert laid_out(first)


@pytest.mark.parametrize("adapter", [LoRA(rank=4), RepAdapter()], ids=str)
def test_merging_gives_the_same(adapter):
    net = network(make_vit(), adapter)
    other = lay_out_for_cpu(copy.deepcopy(net)).merge()
    assert laid_out(other)
    assert_same_state(other, net.merge())


def test_the_fingerprint_knows_no_order():
    assert fingerprint(lay_out_for_cpu(make_vit())) == fingerprint(make_vit())


def test_training_goes_on():
    def trained(net: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            net(pictures(4)).square().mean().backward()
            optimizer.step()
        return net.state_dict()

    net = network(make_vit(), LoRA(rank=4))
    other = lay_out_for_cpu(copy.deepcopy(net))
    mine, theirs = trained(other), trained(net)
    assert laid_out(other)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_state_dict_file_unchanged(tmp_path):
    net, other = network(make_vit()), network(make_vit())
    nn.init.ones_(other.backbone.head.weight)
    torch.save(lay_out_for_cpu(net).state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not laid_out(other)
    assert_same_state(other, net)


def test_a_bundle_is_the_same_to_the_byte(tmp_path):
    size = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
    backbone = create_backbone("vit_tiny_patch16_224", 3, **size)
    source = BackboneSource("vit_tiny_patch16_224", fingerprint(backbone), "seed", timm_args=size)
    inject(backbone, LoRA(rank=2))
    net = ExitNet(backbone, LinearHeads(), every=2).eval()
    for place in ("plain", "laid out"):
        save_bundle(
            lay_out_for_cpu(net) if place == "laid out" else net,
            tmp_path / place,
            backbone=source,
            adapter=LoRA(rank=2),
            heads=LinearHeads(),
            policy=Confidence(0.5),
            class_names=["a", "b", "c"],
            whole=True,
        )
    files = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("plain", "laid out")]
    assert files[0] == files[1]
    loaded = load(tmp_path / "laid out").net
    assert not laid_out(loaded)  # not by default: a loaded bundle has the saved network's logits bit for bit
    assert_same_state(loaded, net)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"^lay_out_for_cpu takes a module, not a dict; give an nn\.Module$"):
        lay_out_for_cpu({})  # type: ignore[type-var]


def test_a_bundle_is_told_to_give_its_net():
    class Bundle:
        net = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"^lay_out_for_cpu takes a module, not a Bundle; give its net$"):
        lay_out_for_cpu(Bundle())  # type: ignore[type-var]
