"""Token merging against a loop in Python, and that everything around a network with merging does the same."""

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, refused
from conftest import CLASSES, make_convnext, make_swin, make_vit, raises_one_line
from cost_references import by_torch, counting, halved
from served import lively
from test_bundle import NAMES, edited, made, same, save
from test_class_first import exact_run, middle_threshold, network, pictures
from tiny import QUIET, loader, make_classifier, trainer
from torch import Tensor, nn

from dynadapter.adapters import LoRA, RepAdapter
from dynadapter.backbones import create_backbone, mean_tokens
from dynadapter.bench import arms
from dynadapter.cli import main
from dynadapter.cost import exit_costs, exit_parameters
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Never
from dynadapter.exits.token_merging import TokenMerging, merge_tokens
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle import load
from dynadapter.serve.export import export_onnx
from dynadapter.serve.stream import Stream
from dynadapter.training.module import ExitClassifier

TWICE = TokenMerging(after=(1, 2), share=0.4)  # inside the first stage of two blocks, and in front of the second
UNCOUNTED, COUNTED = replace(TWICE, proportional=False), replace(TWICE, proportional=True)
VITS: dict[str, dict[str, Any]] = {
    "a class token": {},
    "registers": {"reg_tokens": 3},
    "mean pooling, no class token": {"global_pool": "avg", "class_token": False},
    "mean pooling beside a class token": {"global_pool": "avg"},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "mean and maximum": {"global_pool": "avgmax"},
    "layer scale, norms of q and k": {"init_values": 0.3, "qk_norm": True},
    "any image size": {"dynamic_img_size": True},
}


def small_net(pooling: str = "token") -> ExitNet:
    """Two blocks with an exit after each, and a merging in front of each."""
    backbone = make_vit(depth=2, global_pool=pooling)
    return lively(ExitNet(backbone, LinearHeads(), every=1, token_merging=TokenMerging((0, 1), 0.4)))


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def merged(x: Tensor, count: int, prefix: int = 0) -> Tensor:
    """Merge tokens that stand for one token each."""
    return merge_tokens(x, x.new_zeros(x.shape[:2]), count, prefix)[0]


# ---- one merging -----------------------------------------------------------------------------------------------------


def by_loop(x: Tensor, count: int, prefix: int, sizes: Tensor | None = None) -> Tensor:
    """ToMe's bipartite matching, image by image and token by token; sizes (batch, tokens) become one more channel."""
    merged = []
    for image, size in zip(x, torch.ones(x.shape[:2]) if sizes is None else sizes, strict=True):
        front, own = list(image[:prefix]), list(image[prefix:])
        sources, targets = own[::2], own[1::2]
        found = []
        for place, source in enumerate(sources):
            similarities = [torch.cosine_similarity(source, target, dim=0).item() for target in targets]
            found.append((max(similarities), place, similarities.index(max(similarities))))
        found.sort(key=lambda pair: (-pair[0], pair[1]))
        weights = size[prefix:].tolist()
        groups = [[(target, weights[2 * place + 1])] for place, target in enumerate(targets)]
        for _, place, target in found[:count]:
            groups[target].append((sources[place], weights[2 * place]))
        stay = sorted(place for _, place, _ in found[count:])
        total = [sum(weight for _, weight in group) for group in groups]
        means = [sum(token * weight for token, weight in group) / n for group, n in zip(groups, total, strict=True)]
        rows = torch.stack([*front, *(sources[place] for place in stay), *means])
        if sizes is not None:
            held = torch.tensor([*size[:prefix].tolist(), *(weights[2 * place] for place in stay), *total])
            rows = torch.cat([rows, held[:, None].to(rows)], 1)
        merged.append(rows)
    return torch.stack(merged)


@pytest.mark.parametrize(
    ("own", "count", "prefix"), [(16, 6, 1), (16, 8, 0), (17, 8, 5), (9, 1, 2), (3, 1, 1), (2, 1, 0), (25, 12, 1)]
)
def test_merge_equals_loop(own: int, count: int, prefix: int) -> None:
    x = tokens(3, prefix + own, 6, seed=own).requires_grad_()
    expected, result = by_loop(x, count, prefix), merged(x, count, prefix)
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[:, :prefix], x[:, :prefix])
    weights = tokens(*expected.shape, seed=1)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (expected, result)]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("own", "count", "prefix"), [(16, 6, 1), (17, 8, 5), (2, 1, 0)])
def test_merge_weights_by_token_count(own: int, count: int, prefix: int) -> None:
    x = tokens(3, prefix + own, 6, seed=own)
    sizes = torch.randint(1, 9, x.shape[:2], generator=torch.Generator().manual_seed(1)).double()
    found, logs = merge_tokens(x, sizes.log(), count, prefix)
    torch.testing.assert_close(torch.cat([found, logs.exp()[..., None]], -1), by_loop(x, count, prefix, sizes))
    torch.testing.assert_close(logs.exp().sum(1), sizes.sum(1))


def test_gradients_by_finite_differences() -> None:
    x = tokens(2, 8, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: merged(x, 3, 1), x)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, tokens(2, 8, seed=1), 3, 1)[0], x)


def test_nothing_to_merge() -> None:
    x = tokens(2, 5, 4)
    assert merged(x, 0, 1) is x
    assert TokenMerging(share=0.2)(x, 1)[0] is x  # a fifth of four tokens is none
    assert TokenMerging()(x[:, :1], 1)[0].shape == (2, 1, 4)
    assert merged(x[:0], 2, 1).shape == (0, 3, 4)


def test_like_tokens_are_all_the_same() -> None:
    x = torch.ones(2, 9, 4)
    assert torch.equal(merged(x, 4, 1), x[:, :5])
    assert torch.equal(merged(0 * x, 4, 1), 0 * x[:, :5])  # without a direction


def test_merge_nonfinite_image_alone() -> None:
    x = tokens(3, 10, 4)
    fine = merged(x, 4, 1)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[1, 3] = value
        result = merged(broken, 4, 1)
        assert torch.equal(result[::2], fine[::2])
        assert not result[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_half_precision_same_tokens(dtype: torch.dtype) -> None:
    x = tokens(4, 17, 8).to(dtype)
    result = merged(x, 8, 1)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), by_loop(x.double(), 8, 1), rtol=2e-2, atol=2e-2)
    large = torch.full((1, 40, 2), 60000.0, dtype=torch.float16)
    assert merged(large, 20).isfinite().all()  # whose sum is not


def test_autocast_changes_nothing() -> None:
    x = tokens(4, 17, 8, dtype=torch.float32)
    expected = merged(x, 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged(x, 8, 1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share=0.0 must be above 0 and at most 0.5"),
        ({"share": 0.6}, "each token merges with one other"),
        ({"share": float("nan")}, "share=nan"),
        ({"after": ()}, r"after=\(\) must be rising"),
        ({"after": (4, 1)}, "must be rising"),
        ({"after": (1, 1)}, "must be rising"),
        ({"after": (-1,)}, "must be rising block counts, 0 or more"),
        ({"after": (1.5,)}, "must be rising block counts"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with raises_one_line(ValueError, match=message):
        TokenMerging(**options)


class Turning(torch.nn.Module):
    """A block that may know where a token stands."""

    def __init__(self, **options: Any) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_swin, "token_merging does not fit SwinTransformer"),
        (make_convnext, "token_merging does not fit ConvNeXt"),
        (lambda: make_vit(block_fn=Turning), "token_merging does not fit Turning"),
        (lambda: make_vit(global_pool="prr"), "token_merging does not fit prr pooling"),
        (lambda: make_vit(depth=2), r"after=\(1, 2\) merges tokens where no block follows: the backbone has 2"),
    ],
)
def test_backbones_that_cannot(make: Any, message: str) -> None:
    with raises_one_line(ValueError, match=message):
        ExitNet(make(), exit_depths=[], token_merging=TWICE)


# ---- in a network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "token_merging"),
    [*((options, TWICE) for options in VITS.values()), ({}, UNCOUNTED), ({"global_pool": "avg"}, COUNTED)],
    ids=[*VITS, "attention counts once", "attention counts"],
)
def test_all_paths_give_same_logits(options: dict[str, Any], token_merging: TokenMerging) -> None:
    net = network(make_vit(**options), LoRA(rank=4), token_merging=token_merging)
    images = pictures()
    with torch.no_grad():
        every = net(images)
        assert not torch.allclose(every[0], network(make_vit(**options), LoRA(rank=4))(images)[0])
        for k in range(net.num_exits):
            torch.testing.assert_close(net.at(k)(images), every[k])
        policy = middle_threshold(net, images)
        for way in (False, True):
            logits, exits = net.early(images, policy, class_first=way)
            assert set(exits.tolist()) > {0}
            torch.testing.assert_close(logits, every[exits, range(12)], rtol=1e-4, atol=1e-5)
            alone = [net.early(image, policy, class_first=way) for image in images.split(1)]
            assert torch.equal(torch.cat([one.exit_index for one in alone]), exits)
            torch.testing.assert_close(torch.cat([one.logits for one in alone]), logits, rtol=1e-4, atol=1e-5)
        answers = Stream(net, policy, batch=5)
        answers.push(images)
        assert [answer.exit_index for answer in answers.flush()] == exits.tolist()


@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
def test_tokens_in_front_stay(options: dict[str, Any]) -> None:
    net = network(make_vit(**options), token_merging=TWICE)
    prefix = net.backbone.num_prefix_tokens
    seen: list[tuple[Tensor, Tensor]] = []
    for block in net.backbone.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        net(pictures(2))
    assert [given.shape[1] - prefix for given, _ in seen] == [16, 10, 6, 6, 6, 6]
    assert TWICE.left(16) == 6
    for (_, output), (given, _) in pairwise(seen):
        assert torch.equal(given[:, :prefix], output[:, :prefix])


@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_merge_equal_tokens_no_change(options: dict[str, Any], pooling: str) -> None:
    """One token of weight n gives what n equal tokens give, in attention, mean and attention pooling."""
    backbone = make_vit(**options)
    nn.init.zeros_(backbone.pos_embed)
    net = network(backbone, LoRA(rank=4), heads=LinearHeads(pooling=pooling))
    images = pictures()[..., :8].repeat(1, 1, 1, 4)  # each patch four times in a row
    with torch.no_grad():
        expected = net(images)
        for counted in (True, False, None):
            net.token_merging = TokenMerging((0,), 0.4, proportional=counted)
            same = torch.allclose(net(images), expected, rtol=1e-4, atol=1e-5)
            assert same == (not options.get("global_pool", "token").startswith("avg") if counted is None else counted)


def test_mean_pooling_counts_tokens() -> None:
    """Four tokens of which three become one: the mean is that of the four."""
    x = torch.tensor([[[0.1, 1.0], [0.2, 2.0], [0.3, 3.0], [4.0, -0.4]]], dtype=torch.float64)
    first, logs = merge_tokens(x, x.new_zeros(1, 4), 1)
    last, logs = merge_tokens(first, logs, 1)
    assert sorted(logs.exp()[0].tolist()) == pytest.approx([1, 3])
    torch.testing.assert_close(mean_tokens(last, logs), x.mean(1))
    assert not torch.allclose(last.mean(1), x.mean(1))


def test_distilled_and_other_image_size() -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4}
    distilled = create_backbone("deit_tiny_distilled_patch16_224", CLASSES, **small)
    wide = make_vit(dynamic_img_size=True)
    for backbone, side in ((distilled, 32), (wide, 48)):
        net, images = network(backbone, token_merging=TWICE), tokens(6, 3, side, side, dtype=torch.float32)
        with torch.no_grad():
            for way in (False, True):
                logits, _ = net.early(images, Never(), class_first=way)
                torch.testing.assert_close(logits, net(images)[-1], rtol=1e-4, atol=1e-5)


def test_exit_before_place_reads_all_tokens() -> None:
    late = replace(TWICE, after=(2,))
    plain, merging = network(make_vit()), network(make_vit(), token_merging=late)
    with torch.no_grad():
        ours, theirs = merging(pictures()), plain(pictures())
    assert torch.equal(ours[0], theirs[0])
    assert not torch.allclose(ours[1], theirs[1])


def test_chunk_doubles_with_token_merging() -> None:
    net, images = network(make_vit(), token_merging=TWICE), pictures(70)
    seen: list[int] = []
    embed = net.embed
    net.embed = lambda part: seen.append(len(part)) or embed(part)  # type: ignore[assignment, func-returns-value]
    with torch.no_grad():
        logits, _ = net.early(images, Never())
        assert seen == [64, 6]
        torch.testing.assert_close(logits, net(images)[-1], rtol=1e-4, atol=1e-5)
        seen.clear()
        net.token_merging = None
        net.early(images, Never())
    assert seen == [32, 32, 6]


def test_folded_adapters_do_the_same() -> None:
    net = network(make_vit(), RepAdapter(), token_merging=TWICE)
    with torch.no_grad():
        before = net(pictures())
        torch.testing.assert_close(copy.deepcopy(net).merge()(pictures()), before, rtol=1e-4, atol=1e-4)


def test_every_trained_tensor_gets_gradient() -> None:
    net = network(make_vit(), LoRA(rank=2), token_merging=TWICE).train()
    net(pictures()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_bfloat16() -> None:
    net = network(make_vit(), token_merging=TWICE)
    with torch.no_grad():
        exact, half = net(pictures()), net.bfloat16()(pictures().bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().median() < 0.1 * exact.abs().median()


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
def test_the_meter_agrees_with_torch(options: dict[str, Any]) -> None:
    net = network(make_vit(depth=4, **options), LoRA(rank=4), token_merging=TWICE).requires_grad_(False)
    costs, plain = exit_costs(net), exit_costs(network(make_vit(depth=4, **options), LoRA(rank=4)))
    assert [a - b for a, b in zip(costs.macs, costs.light, strict=True)] == by_torch(net, 32)
    assert costs.static == plain.static
    assert all(ours < theirs for ours, theirs in zip(costs.macs, plain.macs, strict=True))
    assert net.token_merging == TWICE


def test_the_meter_agrees_with_a_formula() -> None:
    d, net = 48, ExitNet(make_vit(), LinearHeads(), every=2, token_merging=TWICE)
    embed, total, expected = 16 * 3 * 8 * 8 * d, 0, []
    total = embed
    for block, own in enumerate([16, 10, 6, 6, 6, 6]):
        if block in TWICE.after:
            before = {10: 16, 6: 10}[own]
            sources = targets = before // 2
            total += sources * targets * d + (1 + own) * (1 + before) * d  # similarities and means
        total += (1 + own) * 12 * d * d + 2 * (1 + own) ** 2 * d
        if block % 2:
            total += d * CLASSES
            expected.append(total)
    costs = exit_costs(net)
    assert [a - b for a, b in zip(costs.macs, costs.light, strict=True)] == expected
    assert exit_parameters(net) == exit_parameters(ExitNet(make_vit(), LinearHeads(), every=2))


def test_the_meter_counts_what_routing_runs() -> None:
    net = network(make_vit().requires_grad_(False), token_merging=TWICE)
    run = exact_run(net)
    for k in range(net.num_exits):
        policy = Confidence(tuple(float(i != k) for i in range(net.num_exits - 1)))
        with torch.no_grad(), counting() as counter:
            assert net.early(pictures(1), policy, class_first=True).exit_index.tolist() == [k]
        assert halved(counter) == run[k]


# ---- saved, exported, served -----------------------------------------------------------------------------------------


def merging_net() -> ExitNet:
    """The network of the bundles' tests, with merging."""
    net = copy.deepcopy(made("vit")[0])
    net.token_merging = TWICE
    return net


def test_a_bundle_brings_it_along(tmp_path: Path) -> None:
    net, place = merging_net(), tmp_path / "b"
    save(place, net=net, costs=exit_costs(net))
    bundle = load(place)
    assert bundle.net.token_merging == bundle.config.token_merging == TWICE
    same(bundle, net, pictures(4))
    said = "| token merging | `TokenMerging(after=(1, 2), share=0.4, proportional=None)` |"
    assert said in (place / "README.md").read_text()


def test_bundle_with_wrong_merging(tmp_path: Path) -> None:
    _, place = save(tmp_path / "b")
    assert json.loads((place / "config.json").read_text())["token_merging"] is None
    edited(place, "token_merging")
    with pytest.raises(ValueError, match="lacks 'token_merging'; the bundle is damaged"):
        load(place)
    edited(place, "token_merging", value={"class_path": "dynadapter.TokenMerging", "init_args": {"after": [1, 6]}})
    with pytest.raises(ValueError, match=r"after=\(1, 6\) merges tokens where no block follows"):
        load(place)


def test_bench_static_keeps_every_token(tmp_path: Path) -> None:
    place, out = tmp_path / "b", tmp_path / "b.json"
    save(place, net=merging_net())
    main(["bench", "--bundle", str(place), f"--out={out}", "--rounds=1", "--batch_sizes=[4]", "--arms=[static]"])
    result = json.loads(out.read_text())
    [batch] = result["batches"]
    assert batch["arms"]["static"]["gmacs"] == batch["static_gmacs"] > batch["exit_gmacs"][-1]
    assert any("the static arms keep every token" in note for note in result["notes"])
    net, x = merging_net(), pictures(4)
    static = arms.cut_after(net, net.depth).at(-1)
    with torch.no_grad():
        assert torch.equal(static(x), net.backbone(x))


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_exported_stages_do_the_same(pooling: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("dynadapter.serve.runtime")
    net = small_net(pooling)
    options: dict[str, Any] = {
        "policy": Confidence(0.5),
        "class_names": NAMES,
        "preprocess": Preprocess(32),
        "check_images": pictures(6),
    }
    export_onnx(net, tmp_path / "onnx", **options)  # compares logits and exits
    found, exits = map(torch.from_numpy, runtime.Runner(tmp_path / "onnx", threads=1).route(pictures(5).numpy()))
    with torch.no_grad():
        expected = net.early(pictures(5), options["policy"])
    assert torch.equal(exits, expected.exit_index)
    torch.testing.assert_close(found, expected.logits, rtol=1e-4, atol=1e-4)


# ---- trained ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(*QUIET, "ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_a_checkpoint_brings_it_along(tmp_path: Path) -> None:
    module, path = make_classifier(token_merging=TWICE), tmp_path / "a.ckpt"
    fit = trainer(max_steps=1)
    fit.fit(module, loader(1))
    fit.save_checkpoint(path)
    again = ExitClassifier.load_from_checkpoint(path)
    assert again.net.token_merging == TWICE
    assert torch.equal(again.eval()(pictures(4)), module.eval()(pictures(4)))
    content = torch.load(path, weights_only=True)
    with pytest.warns(
        UserWarning, match=r"trained with token_merging=TokenMerging\(after=\(1, 2\).*this model has .*None"
    ):
        make_classifier().on_load_checkpoint(content)  # as a Trainer that is given the file
    del content["hyper_parameters"]["token_merging"]
    torch.save(content, path)
    assert ExitClassifier.load_from_checkpoint(path).net.token_merging is None


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--model.token_merging=TokenMerging",
        "--model.token_merging.share=0.5",
        "--model.token_merging.after=[0,1]",
        "--model.heads=LinearHeads",
    ]
    main(["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", *asked])
    path = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    assert ExitClassifier.load_from_checkpoint(path).net.token_merging == TokenMerging((0, 1), 0.5)
    capsys.readouterr()
    main(["flops", "-c", TINY, *asked])
    merged = capsys.readouterr().out
    main(["flops", "-c", TINY])
    assert merged != capsys.readouterr().out
    bundle = ["--ckpt_path", str(path), f"--bundle={tmp_path / 'b'}", "--trainer.enable_progress_bar=false"]
    main(["calibrate", *bundle, "--goal.cost=0.9"])
    found = load(tmp_path / "b")
    assert found.net.token_merging == TokenMerging((0, 1), 0.5)
    assert found.costs is not None
    assert found.costs.macs[-1] < found.costs.static
    for wrong, words in (
        ("--model.token_merging.share=0.7", "at most 0.5"),
        ("--model.token_merging.after=[3]", "no block follows"),
        ("--model.token_merging.after=[a]", "model.token_merging.after: expected a whole number, not \"['a']\""),
        ("--model.token_merging.places=[1]", "model.token_merging: there is no setting 'places'"),
    ):
        assert words in refused(["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", asked[0], wrong], capsys)
