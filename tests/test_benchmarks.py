"""The programs behind the transfer results: recipes, training, the log, outcomes, pre-training."""

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter import AdapterSpec, Constant, ExitCosts, ExitNet, LateToEarly, LinearHeads, Uniform, route
from dynadapter.adapters import AdapterLayer
from dynadapter.data.normalize import normalize
from dynadapter.serve.runtime import Runner
from dynadapter.training.callbacks.sparsity import _own_parameters

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3}
CLASSES = 4
QUIET = {"shallow": None, "keep": Constant(1.0)}
"""Nothing is drawn at random."""


@pytest.fixture(scope="module")
def program():
    """Imports a module of the folder of benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield importlib.import_module


@pytest.fixture(scope="module")
def backbone(program, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The description of a random backbone."""
    path = tmp_path_factory.mktemp("backbone") / "small.json"
    path.write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "timm_args": SHAPE, "weights": None}))
    return path


@pytest.fixture
def build(program, backbone):
    """Builds the network of a method by a recipe with changes; ``every`` is 2, so that there are three exits."""
    learning, recipes = program("learning"), program("recipes")

    def build(method: str = "lora", **changes: Any) -> tuple[ExitNet, Any]:
        recipe = recipes.Recipe(**({"every": 2} | QUIET | changes))
        net = learning.build(learning.BackboneFile.read(backbone), CLASSES, method, recipe, 1.0, 0)
        with torch.no_grad():  # no adapter tensor is zero, so that every one has a gradient
            for element in adapters(net):
                element.add_(0.1 * torch.randn(element.shape, generator=torch.Generator().manual_seed(1)))
        return net, recipe

    return build


def adapters(net: ExitNet) -> list[torch.nn.Parameter]:
    return [p for layer in net.modules() if isinstance(layer, AdapterLayer) for p in _own_parameters(layer)]


def batch(count: int = 20) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count) % CLASSES


# ---- recipes


def test_every_recipe_can_be_made(program):
    recipes = program("recipes")
    made = {name: recipes.recipe(name) for name in recipes.VARIANTS}
    assert made["static"].static
    assert not made["base"].static
    # what takes another recipe's change back
    same = {"base", "balanced-heads", "early-to-late", "no-distillation", "every-token"}
    same |= {"forward", "backward", "sparsity"}
    assert all(made[name] != made["base"] for name in made if name not in same)
    assert set(recipes.INGREDIENTS) <= set(made)
    both = recipes.recipe("late-to-early+no-backward")
    assert (both.weighting, both.keep) == (LateToEarly(), Constant(1.0))
    with pytest.raises(ValueError, match="there is no recipe 'odd'; there are static, base"):
        recipes.recipe("base+odd")
    specs = [make(0.5) for make in recipes.METHODS.values() if make]
    assert all(isinstance(spec, AdapterSpec) and spec.scale == 0.5 for spec in specs)


def test_the_last_exit_learns_alone_at_first(program):
    weighting = program("recipes").last_first(0.5)
    early, late = weighting(0.4, 4), weighting(0.6, 4)
    assert early[:3] == (0, 0, 0) and early[3] > 0  # noqa: PT018
    assert min(late) > 0


# ---- training


def loop(program, net: ExitNet, recipe: Any, images: Tensor, targets: Tensor, protocol: Any) -> None:
    """Training as anybody would write it."""
    learning = program("learning")
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=protocol.lr, weight_decay=protocol.weight_decay)
    order = learning._order(len(images), protocol.batch, protocol.epochs, 0)
    net.train()
    for step, rows in enumerate(order):
        progress = step / (len(order) - 1)
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr * learning.RATE(progress)
        logits = net(images[rows])
        weights = recipe.weighting(progress, net.num_exits)
        loss = sum(w * F.cross_entropy(one, targets[rows]) for w, one in zip(weights, logits, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["lora", "adapter", "repadapter", "probe", "full"])
def test_training_is_that_of_a_plain_loop(program, build, method):
    learning, (images, targets) = program("learning"), batch()
    protocol = learning.Protocol(epochs=2, batch=8, lr=1e-2)
    fast, recipe = build(method)
    plain, _ = build(method)
    for layer in [layer for net in (fast, plain) for layer in net.modules() if isinstance(layer, AdapterLayer)]:
        layer.dropout.set(0.0)
    before = [p.detach().clone() for p in plain.parameters() if p.requires_grad]
    learning.Fit(fast, recipe, images, targets, protocol, seed=0).run()
    loop(program, plain, recipe, images, targets, protocol)
    trained = [[p for p in net.parameters() if p.requires_grad] for net in (fast, plain)]
    assert all(not torch.equal(was, now) for was, now in zip(before, trained[1], strict=True))
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


def test_a_mask_lets_elements_rest_and_the_heads_move(program, build):
    learning, (images, targets) = program("learning"), batch(8)
    net, recipe = build(keep=Constant(0.5))
    before, head = [p.detach().clone() for p in adapters(net)], net.heads[0].state_dict()
    head = {name: value.clone() for name, value in head.items()}
    learning.Fit(net, recipe, images, targets, learning.Protocol(epochs=1, batch=8), seed=0).run()
    same = torch.cat([(was == now).flatten() for was, now in zip(before, adapters(net), strict=True)])
    assert 0.4 < same.double().mean() < 0.6
    assert all(not torch.equal(value, net.heads[0].state_dict()[name]) for name, value in head.items())


def gradients(program, net: ExitNet, recipe: Any, weights: list[float]) -> dict[str, Tensor]:
    images, targets = batch(8)
    logits = program("learning").forward(net, images, recipe)
    loss = program("learning").loss_of(logits, targets, torch.tensor(weights), recipe)
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if any(p is own for own in adapters(net))}


def of_block(found: dict[str, Tensor], block: int) -> list[Tensor]:
    return [value for name, value in found.items() if f"blocks.{block}." in name]


def test_rescaled_gradients_are_means_over_the_exits_behind(program, build):
    (net, plain), (_, rescaled) = build(), build(rescale=True)
    summed = gradients(program, net, plain, [1, 1, 1])
    meant = gradients(program, net, rescaled, [1, 1, 1])
    for block, exits in ((0, 3), (2, 2), (4, 1)):
        assert of_block(summed, block)
        for one, other in zip(of_block(meant, block), of_block(summed, block), strict=True):
            torch.testing.assert_close(one * exits, other, rtol=1e-4, atol=1e-7)


def test_gradients_within_a_stage_are_those_of_its_exit(program, build):
    (net, plain), (_, within) = build(), build(within=True)
    inside = gradients(program, net, within, [1, 1, 1])
    alone = gradients(program, net, plain, [1, 0, 0])
    for one, other in zip(of_block(inside, 1), of_block(alone, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    images = batch(4)[0]
    torch.testing.assert_close(program("learning").forward(net, images, within), net(images))


def test_early_adapters_can_be_wider_and_weigh_more(program, build):
    (plain, _), (wide, _) = build(), build(early_width=4, early_scale=3.0)
    sizes = [[p.numel() for p in net.parameters() if any(p is own for own in adapters(net))] for net in (plain, wide)]
    ratios = [large / small for small, large in zip(*sizes, strict=True)]
    assert ratios == [4.0] * (len(ratios) // 3) + [1.0] * (2 * len(ratios) // 3)  # the first two of six blocks


# ---- sub-networks that learn from the whole one


def test_a_sub_network_that_lacks_nothing_learns_the_last_exits_answer(program, build):
    net, _ = build()
    images, weights = batch(6)[0], torch.tensor([0.5, 0.3, 0.2])
    logits = net(images).detach().requires_grad_()
    how = program("structured").StructuredDropout(rate=0.0, weight=3.0, part=0.5, temperature=4.0)
    loss = how.loss(net, images, logits, weights)
    wanted, answers = (logits[-1] / 4).softmax(-1), (logits / 4).log_softmax(-1)
    apart = (wanted * (answers[-1] - answers[:-1])).sum(-1)[:, :3].mean(1)  # half of the batch
    torch.testing.assert_close(loss, 3 * 16 * (0.5 * apart[0] + 0.3 * apart[1]))
    loss.backward()
    assert logits.grad is None  # the teacher learns nothing
    learns = {name.split(".")[2] for name, p in net.named_parameters() if "blocks" in name and p.grad is not None}
    assert learns == {"0", "1", "2", "3"}  # and neither do the blocks behind the last early exit
    static, _ = build(exits=())
    nothing = program("structured").StructuredDropout().loss(static, images, logits[:1], weights[:1])
    assert nothing.item() == 0


@pytest.mark.parametrize("method", ["lora", "adapter", "repadapter"])
def test_heads_and_hidden_units_are_left_out_whole(program, build, method):
    structured = program("structured")
    net, _ = build(method)
    seen: dict[int, list[Tensor]] = {k: [] for k in range(6)}
    places = [
        (part, k)
        for k, block in enumerate(net.backbone.blocks)
        for name, part in block.named_modules()
        if name.endswith((".proj", ".fc2"))
    ]
    assert len(places) == 12
    torch.manual_seed(0)
    with structured.StructuredDropout(rate=0.5).dropping(net):
        handles = [
            part.register_forward_pre_hook(lambda _, x, k=k: seen[k].append(x[0].detach())) for part, k in places
        ]
        net(batch(64)[0])
    for handle in handles:
        handle.remove()
    for k, rate in enumerate([0.5, 0.5, 0.25, 0.25, 0.0, 0.0]):  # three stages of two blocks
        heads, hidden = seen[k]
        heads = heads.unflatten(-1, (3, -1)).movedim(2, 1).flatten(2)  # (images, heads, tokens and channels)
        for units in (heads, hidden.transpose(1, 2)):
            gone = (units == 0).all(-1)
            assert torch.equal(gone, (units == 0).any(-1))  # for all tokens alike
            assert gone.double().mean().item() == pytest.approx(rate, abs=0.1 if rate else 0)
            assert not rate or len(gone.unique(dim=0)) > 1  # each image its own
    assert not any(part._forward_pre_hooks for part, _ in places)  # nothing stays behind


def test_what_is_left_makes_up_for_what_is_gone(program):
    x = torch.rand(4000, 2, 6, generator=torch.Generator().manual_seed(0)) + 1
    torch.manual_seed(0)
    found = program("structured")._without(x, 0.3, 2)
    torch.testing.assert_close(found.mean(0), x.mean(0), rtol=0.1, atol=0)
    kept = found != 0
    torch.testing.assert_close(found[kept], x[kept] / 0.7)


def test_what_sub_networks_are_asked_is_reproducible_and_can_be_refused(program, build):
    structured, (net, _) = program("structured"), build()
    images, weights = batch(8)[0], torch.ones(3)
    logits, losses = net(images).detach(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(structured.StructuredDropout(rate=0.5).loss(net, images, logits, weights).item())
    assert losses[0] == losses[1] != losses[2]
    for change, message in (
        ({"rate": 1.0}, "rate=1.0 must be in"),
        ({"weight": -1.0}, "weight=-1.0 must be 0 or more"),
        ({"part": 0.0}, "part=0.0 must be in"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            structured.StructuredDropout(**change)
    convolutions = ExitNet(timm.create_model("convnext_atto", dims=(8,) * 4, depths=(1,) * 4, num_classes=2), every=1)
    with pytest.raises(ValueError, match="a ConvNeXt has no attention heads"):
        structured.StructuredDropout().loss(convolutions, torch.rand(2, 3, 32, 32), logits, weights)


# ---- the log


def test_a_run_that_is_done_or_begun_is_not_done_again(program, tmp_path):
    runs = program("runs")
    one, other = runs.Runs(tmp_path / "log.jsonl"), runs.Runs(tmp_path / "log.jsonl")
    key = {"task": "cars", "seed": 0}
    with one.claim(key) as mine, other.claim(key) as theirs, other.claim({"task": "birds"}) as free:
        assert (mine, theirs, free) == (True, False, True)
        one.add(key, value=3)
    with other.claim(key) as again:
        assert not again
    assert other.find(key)["value"] == 3
    assert len(runs.read_lines(tmp_path / "log.jsonl")) == 1
    assert runs.matching(other.lines, task="cars") == other.lines
    assert runs.matching(other.lines, task="birds") == []


def test_a_line_that_was_cut_short_is_named(program, tmp_path):
    runs = program("runs")
    runs.Runs(tmp_path / "log.jsonl").add({"seed": 0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"key": {"se')
    with pytest.raises(ValueError, match=r"log\.jsonl:2 is no line of a run"):
        runs.Runs(tmp_path / "log.jsonl")


# ---- outcomes


def test_thresholds_keep_what_they_promise(program):
    outcomes = program("outcomes")
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % CLASSES
    logits = torch.randn(3, 60, CLASSES, generator=generator) * 2
    logits[:, torch.arange(60), targets] += torch.tensor([1.0, 2.0, 3.0])[:, None]
    costs = ExitCosts((34, 67, 101), (0, 0, 0), 100, (2, 4, 6))
    found = outcomes.calibrated(logits, targets, costs)
    last = outcomes.exit_accuracy(logits, targets)[-1]
    for rule, goals in found.items():
        assert goals["25"] is None  # below the first exit
        for goal, one in goals.items():
            if one is None:
                continue
            assert one["cost"] == pytest.approx(costs.average(one["shares"]) / costs.backbone)
            if goal != "drop 0":
                assert one["cost"] <= float(goal) / 100 + 1e-9
            elif not outcomes.RULES[rule].running:
                assert one["accuracy"] >= last
    assert outcomes.applied(found, logits, targets, costs) == found


def test_the_running_mean_is_over_the_exits_so_far(program):
    logits = torch.randn(3, 5, CLASSES, generator=torch.Generator().manual_seed(0))
    found = program("outcomes").running_mean(logits)
    torch.testing.assert_close(found[2], logits.log_softmax(-1).mean(0))
    torch.testing.assert_close(found[0], logits[0].log_softmax(-1))


# ---- transfer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of generated images in the layout of VTAB-1k."""
    root = tmp_path_factory.mktemp("tasks")
    draw = np.random.default_rng(0)
    (root / "colours" / "images").mkdir(parents=True)
    for k in range(48):
        pixels = draw.integers(0, 100, (16, 16, 3)) + np.array([40 * (k % CLASSES), 150 - 40 * (k % CLASSES), 0])
        Image.fromarray(pixels.astype(np.uint8)).save(root / "colours" / "images" / f"{k}.png")
    parts = {"train800": range(16), "val200": range(16, 32), "train800val200": range(32), "test": range(32, 48)}
    for name, part in parts.items():
        lines = [f"images/{k}.png {k % CLASSES}" for k in part]
        (root / "colours" / f"{name}.txt").write_text("\n".join(lines))
    return root


def test_transfer_goes_from_search_to_speed_and_on_where_it_stopped(program, backbone, tasks, tmp_path, capsys):
    log, keep = tmp_path / "log.jsonl", tmp_path / "kept"
    common = ["--data", str(tasks), "--backbone", str(backbone), "--out", str(log), "--epochs", "2", "--batch", "8"]
    common += ["--device", "cpu", "--groups", "colours=Natural", "--scales", "1", "--rounds", "1"]

    def run(*phases: str, methods: str = "lora probe", **more: Any) -> str:
        options = [text for name, value in more.items() for text in (f"--{name}", str(value))]
        program("transfer").main([*common, "--methods", *methods.split(), *options, "--phase", *phases])
        return capsys.readouterr().out

    assert "left out: colours lora static: no search run" in run("final")
    assert "search: 4 runs, 4 of them to do" in run("search")
    assert "final: 4 runs, 4 of them to do" in run("final", keep=keep)
    assert "speed: 1 runs, 1 of them to do" in run("speed", methods="lora", keep=keep)
    assert "search: 4 runs, 0 of them to do" in run("search")
    lines = program("runs").read_lines(log)
    assert len(lines) == 9
    one = next(line for line in lines if line["key"]["phase"] == "final" and line["arm"] == "dynamic")
    assert (one["group"], one["samples"], one["exits"]) == ("Natural", 16, [3, 6])
    with np.load(keep / f"{program('transfer').kept_name(one['key'])}.npz") as kept:
        hits = (kept["logits"].argmax(-1) == kept["targets"]).mean(1)
    assert hits.tolist() == pytest.approx(one["exit_accuracy"])
    # the same key gives the same numbers, whoever runs it
    log.unlink()
    run("search")
    again = program("runs").read_lines(log)
    searched = [line for line in lines if line["key"]["phase"] == "search"]
    same = ("key", "losses", "exit_accuracy", "routed", "trainable")
    assert [{n: x.get(n) for n in same} for x in again] == [{n: x.get(n) for n in same} for x in searched]
    # another length of training takes the scale that these searches chose
    said = run("search", "final", methods="lora", epochs=1, scale_epochs=2, scales=7)
    assert "search: 2 runs, 2 of them to do" in said
    assert "final: 2 runs, 2 of them to do" in said
    longer = [line for line in program("runs").read_lines(log) if line["key"]["epochs"] == 1]
    assert [line["key"]["scale"] for line in longer] == [1.0] * 4
    finals = [line for line in longer if line["key"]["phase"] == "final"]
    assert [(line["scales_searched"], line["scales_epochs"]) for line in finals] == [([1.0], 2)] * 2
    assert "no search run of static" in run("final", methods="lora", epochs=1, scale_epochs=3)


@pytest.mark.slow
def test_two_processes_share_the_runs(program, backbone, tasks, tmp_path):
    log = tmp_path / "log.jsonl"
    common = ["--data", str(tasks), "--backbone", str(backbone), "--out", str(log), "--epochs", "1", "--batch", "8"]
    program("transfer").main([*common, "--device", "cpu", "--methods", "lora", "--jobs", "2"])
    keys = [json.dumps(line["key"]) for line in program("runs").read_lines(log)]
    assert len(keys) == len(set(keys)) == 8  # two arms, four scales


# ---- 8 bits


class Told(Runner):
    """A runner whose stages give logits (exits, images, classes) that are known beforehand; an image is its number."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.num_exits = logits.numpy(), len(logits)
        self.class_names, self.chunk = [str(k) for k in range(logits.shape[-1])], None

    def _checked(self, images: Any) -> Any:
        return images

    def stage(self, k: int, held: Any) -> Any:
        return held, self.logits[k, held[0][:, 0].astype(int)]


def test_what_8_bits_change_is_told_of_every_exit_and_of_routing(program):
    quantised, generator = program("quantised"), torch.Generator().manual_seed(0)
    logits, images = torch.randn(2, 80, 3, generator=generator), np.arange(80, dtype=np.float32)[:, None]
    targets, costs = torch.arange(80) % 3, ExitCosts(macs=(25, 100), light=(0, 0), backbone=100, exit_depths=(1, 2))
    other = logits.clone()
    other[1, :8] = -other[1, :8]  # other answers of the last exit for a tenth of the images
    for changed in (logits, other):
        runners = {"float32": Told(logits), "int8": Told(changed)}
        found = quantised.answers(runners, images, targets, costs)
        assert found["exit_accuracy"]["int8"] == (changed.argmax(-1) == targets).double().mean(1).tolist()
        assert found["same_class"] == [1.0, 1.0 if changed is logits else 0.9]
        assert found["same_alone"] == 1
        assert found["routed"]["int8"]["same_exit"] == 1  # the exit that decides says the same
        assert 0.9 <= found["routed"]["int8"]["same_class"] <= 1
        assert abs(found["routed"]["float32"]["cost"] - quantised.BUDGET) < 0.1
        assert json.loads(json.dumps(found)) == found
    # thresholds of one half route the other
    halves = quantised.split_halves(80, targets=targets)
    hits = 0
    for chosen, held_out in (halves, halves[::-1]):
        policy = quantised.thresholds(logits[:, chosen], targets[chosen], costs)
        taken = route(policy, logits[:, held_out])
        hits += (logits[taken, held_out].argmax(-1) == targets[held_out]).sum().item()
    assert found["routed"]["float32"]["accuracy"] == pytest.approx(hits / 80)


@pytest.mark.slow
def test_a_trained_network_is_exported_in_both_precisions(program, backbone, tasks, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    quantised, log = program("quantised"), tmp_path / "log.jsonl"
    monkeypatch.setattr(quantised, "BATCHES", (2,))
    monkeypatch.setattr(quantised, "BUDGET", 0.8)  # with two exits the first costs half
    argv = ["--data", str(tasks), "--backbone", str(backbone), "--out", str(log), "--methods", "lora"]
    argv += ["--epochs", "1", "--batch", "8", "--rounds", "2", "--scale", "1"]
    quantised.main(argv)
    first = capsys.readouterr().out
    monkeypatch.setattr(quantised, "case", None)  # is not called again
    quantised.main(argv)
    assert capsys.readouterr().out == first
    (line,) = (json.loads(text) for text in log.read_text().splitlines())
    assert (line["key"]["task"], line["key"]["method"], line["samples"]) == ("colours", "lora", 16)
    assert line["products"] > 0
    assert line["bytes"]["int8"] < line["bytes"]["float32"]
    assert set(line["times"]["2"]["int8_over_float32"]) == {"whole", "routed"}
    assert "colours" in first


# ---- pre-training


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images twice: in a folder for each class, and as mosaics."""
    root, draw = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            pixels = draw.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
            (root / "folder" / split / name).mkdir(parents=True)
            (root / "mosaic" / split).mkdir(parents=True, exist_ok=True)
            for k, one in enumerate(pixels):
                Image.fromarray(one).save(root / "folder" / split / name / f"{k}.png")
            grid = pixels.reshape(2, -1, 12, 12, 3).swapaxes(1, 2).reshape(24, -1, 3)
            Image.fromarray(grid).save(root / "mosaic" / split / f"{name}.png")
    return root


def test_folders_and_mosaics_are_the_same_set(program, source):
    read = program("mosaics").read
    (train, val, names), other = read(source / "folder", 12), read(source / "mosaic", 12)
    assert names == other[2] == ["cat", "dog"]
    assert torch.equal(train.pixels, other[0].pixels)
    assert torch.equal(val.pixels, other[1].pixels)
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    with pytest.raises(ValueError, match="is no grid of tiles of 7 x 7"):
        read(source / "mosaic", 7)
    with pytest.raises(ValueError, match="has no folder 'train'"):
        read(source, 12)


def test_merged_tokens_at_the_own_classes_of_a_backbone(program, source, tmp_path, capsys, monkeypatch):
    tokens, out, log = program("tokens"), tmp_path / "made", tmp_path / "log.jsonl"
    program("pretrain").main(small_run(source, out))
    (about,) = out.glob("*.json")
    monkeypatch.setattr(tokens, "MERGINGS", (((0,), 0.5), ((1,), 0.25)))
    argv = ["tokens.py", "--data", str(source / "folder"), "--backbone", str(about), "--out", str(log)]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    tokens.main()
    first = capsys.readouterr().out
    monkeypatch.setattr(tokens, "right", None)  # is not called again
    tokens.main()
    assert capsys.readouterr().out == first
    every, *merged = (json.loads(line) for line in log.read_text().splitlines())
    assert (every["images"], every["cost"], len(merged)) == (8, 1.0, 4)
    assert all(line["cost"] < 1 for line in merged)
    model, file = tokens.pretrained(about)
    _, images, _ = program("mosaics").read(source / "folder", 12)
    with torch.no_grad():
        answers = model(normalize(images.pixels, file.preprocess)).argmax(-1)
    assert every["accuracy"] == (answers == images.labels).double().mean().item()


def test_pretraining_goes_on_as_if_it_had_never_stopped(program, source, tmp_path, capsys):
    pretrain = program("pretrain")
    small = "--size 12 --patch 6 --width 16 --heads 2 --depth 2 --batch 4 --mix 0.5 --ops 0.5 --drop_path 0.1"
    common = [
        "--data",
        str(source / "folder"),
        "--epochs",
        "3",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        *small.split(),
    ]
    pretrain.main([*common, "--out", str(tmp_path / "whole")])
    for _ in range(3):
        pretrain.main([*common, "--out", str(tmp_path / "parts"), "--stop_after", "0.000001"])
        assert "stopped and saved" in capsys.readouterr().out
    pretrain.main([*common, "--out", str(tmp_path / "parts")])
    whole, parts = (tmp_path / name / "micro.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    logs = [
        [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()] for path in (whole, parts)
    ]
    assert [(one["epoch"], one["loss"], one["val_acc"]) for one in logs[0]] == [
        (one["epoch"], one["loss"], one["val_acc"]) for one in logs[1]
    ]
    backbone = program("learning").BackboneFile.read(whole.with_suffix(".json"))
    assert backbone.preprocess.image_size == 12
    about = json.loads(whole.with_suffix(".json").read_text())
    model = backbone.build(2, seed=0)
    assert sum(p.numel() for p in model.parameters()) == sum(about["parameters"][n] for n in ("backbone", "classifier"))
    with pytest.raises(SystemExit):
        pretrain.main([*common, "--out", str(tmp_path / "parts"), "--width", "32"])
    assert "was begun with width=16, not 32" in capsys.readouterr().err
    whole.write_bytes(whole.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match="is not the file that"):
        program("learning").BackboneFile.read(whole.with_suffix(".json"))


def small_run(source: Path, out: Path, more: str = "") -> list[str]:
    """The options of a run of some tenths of a second."""
    common = "--size 12 --patch 6 --heads 2 --depth 2 --batch 4 --epochs 2 --precision fp32 --device cpu --threads 1"
    width = "" if "--width" in more else "--width 16"
    return ["--data", str(source / "folder"), "--out", str(out), *f"{common} {width} {more}".split()]


def refused(program, capsys, argv: list[str]) -> str:
    """Runs pretrain.py, which is to end with one line and exit code 2; gives the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        program("pretrain").main(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pretrain.py: error: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def earlier(program, source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that a run without early classifiers left."""
    out = tmp_path_factory.mktemp("earlier")
    program("pretrain").main(small_run(source, out))
    return out / "micro.safetensors"


def timm_model(**shape: Any) -> Any:
    given = {"img_size": 12, "patch_size": 6, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 2}
    return timm.create_model("vit_tiny_patch16_224", **(given | shape))


def test_with_early_classifiers_it_goes_on_as_well_and_leaves_timms_tensors(program, source, tmp_path, capsys):
    pretrain, more = program("pretrain"), "--exits 1 --mix 0.5 --drop_path 0.1 --merged 0.5"
    pretrain.main(small_run(source, tmp_path / "whole", more))
    for _ in range(2):
        pretrain.main(small_run(source, tmp_path / "parts", f"{more} --stop_after 0.000001"))
        assert "stopped and saved" in capsys.readouterr().out
    held = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["learner"]["early"]
    assert {name.split(".")[0] for name in held} == {"1"}  # after the first of two blocks
    pretrain.main(small_run(source, tmp_path / "parts", more))
    whole, parts = (tmp_path / name / "micro.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    ends = [torch.load(file.with_name("checkpoint.pt"), weights_only=True)["learner"] for file in (whole, parts)]
    for name, one in ends[0]["early"].items():
        assert torch.equal(one, ends[1]["early"][name])
        assert not torch.equal(one, held[name])  # it learned
    found, model = safetensors.torch.load_file(whole), timm_model()
    assert {name: one.shape for name, one in found.items()} == {n: p.shape for n, p in model.state_dict().items()}
    model.load_state_dict(found)
    about = json.loads(whole.with_suffix(".json").read_text())
    assert (about["recipe"]["exits"], about["start"]) == (1, None)
    other = small_run(source, whole.parent, more.replace("--exits 1", "--exits 0"))
    assert "was begun with exits=1, not 0" in refused(program, capsys, other)


@pytest.mark.parametrize("mixed", [False, True])
def test_what_early_classifiers_learn_is_labels_and_the_last_ones_answer(program, mixed):
    pretrain, generator = program("pretrain"), torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    labels, own = torch.tensor([3, 0, 0, 4]), torch.tensor([1.0, 0.7, 0.2, 0.5], dtype=torch.float64)
    settings = {"smoothing": 0.1, "exits": 1, "exit_weight": 0.3, "exit_teaching": 0.25}
    recipe = pretrain.Recipe(batch=4, lr=1e-3, width=16, heads=2, **settings)
    logs, last = logits.log_softmax(-1), logits[-1].softmax(-1)
    expected = 0.0
    for place in range(3):
        for k in range(4):
            wanted = torch.full((5,), 0.1 / 5, dtype=torch.float64)
            wanted[labels[k]] += 0.9 * (own[k] if mixed else 1)
            wanted[labels[3 - k]] += 0.9 * (1 - own[k] if mixed else 0)
            told = -(wanted * logs[place, k]).sum()
            distance = (last[k] * (logs[2, k] - logs[place, k])).sum()
            expected += (told if place == 2 else 0.3 * (0.75 * told + 0.25 * distance)) / 4
    given = logits.clone().requires_grad_()
    loss = pretrain.taught_loss(given, labels, own if mixed else None, recipe)
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    loss.backward()  # the last classifier teaches, and does not learn from its pupils
    alone = logits[-1].clone().requires_grad_()
    pretrain.soft_loss(alone, labels, own if mixed else None, 0.1).backward()
    torch.testing.assert_close(given.grad[-1], alone.grad)


def test_early_classifiers_without_weight_leave_the_backbone_alone(program):
    pretrain = program("pretrain")
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 12, 12), generator=draw, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])

    def gradients(**changes: Any) -> dict[str, Tensor]:
        shape = {"batch": 4, "lr": 1e-3, "width": 16, "heads": 2, "depth": 3, "size": 12, "patch": 6}
        recipe = pretrain.Recipe(**shape, **changes)
        learner = pretrain.Learner(recipe, 2, torch.device("cpu"), compiled=False)
        logits = learner.supervised(images.float() / 255)
        assert len(logits) == 1 + len(learner.supervised.early)
        assert torch.equal(logits[-1], learner.model(images.float() / 255))
        pretrain.taught_loss(logits, labels, None, recipe).backward()
        return {name: one.grad for name, one in learner.model.named_parameters()}

    without, weightless, weighty = gradients(), gradients(exits=1, exit_weight=0.0), gradients(exits=1)
    assert all(torch.equal(one, weightless[name]) for name, one in without.items())
    for name, one in without.items():  # behind the last early classifier nothing changes
        behind = name.startswith(("blocks.2.", "norm.", "head."))
        assert torch.equal(one, weighty[name]) == behind, name


def test_early_classifiers_leave_the_last_one(program):
    shape = {"batch": 4, "lr": 1e-3, "width": 16, "heads": 2, "depth": 3}
    for changes, message in (
        ({"exits": 3}, "--exits 3 must be from 0 to below --depth 3"),
        ({"exit_weight": -1.0}, "--exit_weight must be 0 or more"),
        ({"exit_teaching": 1.5}, "--exit_teaching is a share from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            program("pretrain").Recipe(**(shape | changes))


def test_the_backbone_beside_the_benchmarks_is_what_its_files_say(program):
    file = program("learning").BackboneFile.read(BENCHMARKS / "backbones" / "tiny.json")  # compares the hash
    about = json.loads((BENCHMARKS / "backbones" / "tiny.json").read_text())
    model = file.build(3, seed=0).eval()
    classifier = sum(p.numel() for p in model.head.parameters())
    assert sum(p.numel() for p in model.parameters()) - classifier == about["parameters"]["backbone"]
    with torch.no_grad():
        assert model(torch.randn(2, 3, 48, 48)).isfinite().all()
    assert about["sha256"] in (BENCHMARKS / "backbones" / "tiny.md").read_text()


def test_a_run_can_begin_with_an_earlier_ones_weights(program, source, earlier, tmp_path, capsys):
    pretrain, more = program("pretrain"), f"--start {earlier} --exits 1"
    recipe = pretrain.Recipe(batch=4, lr=1e-3, width=16, heads=2, depth=2, size=12, patch=6, exits=1)
    learner = pretrain.Learner(recipe, 2, torch.device("cpu"), compiled=False, start=earlier)
    for model in (learner.model, learner.ema.module):
        for name, one in safetensors.torch.load_file(earlier).items():
            assert torch.equal(model.state_dict()[name], one.float())
    pretrain.main(small_run(source, tmp_path / "on", f"{more} --stop_after 0.000001"))
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(timm_model().state_dict(), other)
    for elsewhere in (f"--start {other}", ""):
        error = refused(program, capsys, small_run(source, tmp_path / "on", f"{elsewhere} --exits 1"))
        assert "was begun with start=" in error
    pretrain.main(small_run(source, tmp_path / "on", more))
    digest = hashlib.sha256(earlier.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "on" / "micro.json").read_text())["start"] == digest
    assert digest[:12] in (tmp_path / "on" / "micro.md").read_text()


@pytest.mark.parametrize(("width", "heads"), [(32, 4), (32, 2), (48, 6), (64, 4)])
def test_a_wider_model_computes_what_the_narrow_one_did_and_can_go_other_ways(program, monkeypatch, width, heads):
    widening = program("widening")
    torch.manual_seed(0)
    narrow = timm_model().double().eval()
    for one in narrow.parameters():  # fresh norms and biases would hide a wrong order
        nn.init.normal_(one, std=0.3)
    wide = timm_model(embed_dim=width, num_heads=heads).double().eval()
    images = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    monkeypatch.setattr(widening, "NOISE", 0.0)
    wide.load_state_dict(widening.widened(narrow.state_dict(), 2, width, heads))
    torch.testing.assert_close(wide(images), narrow(images))
    monkeypatch.undo()
    wide.load_state_dict(widening.widened(narrow.state_dict(), 2, width, heads))
    assert (wide(images) - narrow(images)).abs().max() < 0.2 * narrow(images).abs().max()
    wide(images).square().sum().backward()
    for name, one in wide.named_parameters():  # no two copies learn alike
        if one.ndim == 2 and "norm" not in name:
            assert len(torch.unique(one.grad.round(decimals=9), dim=0)) == len(one), name


def test_a_wider_run_begins_with_a_narrow_ones_weights(program, source, earlier, tmp_path, capsys):
    pretrain = program("pretrain")
    recipe = pretrain.Recipe(batch=4, lr=1e-3, width=32, heads=4, depth=2, size=12, patch=6)
    wide = pretrain.Learner(recipe, 2, torch.device("cpu"), compiled=False, start=earlier).model.eval()
    narrow = timm_model().eval()
    narrow.load_state_dict({name: one.float() for name, one in safetensors.torch.load_file(earlier).items()})
    images = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(wide(images), narrow(images), rtol=1e-4, atol=1e-5)

    pretrain.main(small_run(source, tmp_path / "wide", f"--start {earlier} --width 32 --heads 4"))
    assert "widened from 16" in (tmp_path / "wide" / "micro.md").read_text()

    def error(start: Path, more: str) -> str:
        return refused(program, capsys, small_run(source, tmp_path / "out", f"--start {start} {more}"))

    assert "width 16 with 2 heads cannot become 40 with 2" in error(earlier, "--width 40")
    assert "width 16 with 2 heads cannot become 32 with 8" in error(earlier, "--width 32 --heads 8")
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes(earlier.read_bytes())
    assert "lonely.json does not say its num_heads" in error(lonely, "--width 32")


def test_merged_tokens_count_in_pre_training_as_they_do_afterwards(program):
    pretrain = program("pretrain")
    shape = {"batch": 4, "lr": 1e-3, "width": 16, "heads": 2, "depth": 5, "size": 24, "patch": 6, "merged": 1.0}
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for counted in (False, True):
        recipe = pretrain.Recipe(**shape, counted=counted)
        learner = pretrain.Learner(recipe, 2, torch.device("cpu"), compiled=False)
        for merging in learner.mergings:
            assert merging.proportional == counted
            net = ExitNet(learner.model, LinearHeads(), 5, (), merging).eval()
            learner.supervised.eval().merging = merging
            torch.testing.assert_close(learner.supervised(images)[-1], net(images)[-1])


def test_what_a_run_cannot_begin_with_is_refused_in_one_line(program, source, earlier, tmp_path, capsys):
    def error(start: Path, more: str = "") -> str:
        return refused(program, capsys, small_run(source, tmp_path / "out", f"--start {start} {more}"))

    assert "missing.safetensors cannot be read" in error(tmp_path / "missing.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(earlier.read_bytes()[:-1])
    assert "damaged.safetensors cannot be read" in error(tmp_path / "damaged.safetensors")
    safetensors.torch.save_file({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    assert "is another model's: blocks.0" in error(tmp_path / "foreign.safetensors")
    assert "is another model's" in error(earlier, "--width 8")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_equal_weights_are_the_static_arms(program):
    assert program("recipes").recipe("static").weighting == Uniform()
