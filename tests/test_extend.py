"""The page *Extend it*: its blocks run as pasted, and each part on it keeps what the page promises."""

import copy
import importlib
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import TINY, refused
from conftest import BACKBONES, CLASSES, make_vit
from PIL import Image
from saved import fitted
from timm.models.densenet import DenseNet
from tiny import TinyModule, loader, make_classifier, shaken, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter import (
    AdapterLayer,
    AdapterSpec,
    ExitNet,
    ExitWeights,
    Goal,
    Heads,
    LoRA,
    Policy,
    Weighting,
    backbones,
    bundle_from_classifier,
    create_backbone,
    inject,
    joint_loss,
    merge,
    read_off,
    solve,
)
from dynadapter.adapters import adapter_layers
from dynadapter.cli import main
from dynadapter.cli.imports import VARIABLE
from dynadapter.training.restoring import load_classifier

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
MODULE = [block for language, block in BLOCKS if block.startswith("# my_parts.py")]
USES = [block for language, block in BLOCKS if language == "python" and block not in MODULE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with my_parts.py and own.yaml as a reader pastes them."""
    place = tmp_path_factory.mktemp("mine")
    (place / "my_parts.py").write_text("".join(MODULE))
    (place / "own.yaml").write_text(next(block for _, block in BLOCKS if block.startswith("# own.yaml")))
    (place / "my_photos").mkdir()
    for k in range(2):
        Image.new("RGB", (40, 40), (90 * k, 10, 80)).save(place / "my_photos" / f"{k}.png")
    before = Path.cwd(), list(sys.path)
    os.chdir(place)
    yield place
    os.chdir(before[0])
    sys.path[:] = before[1]
    os.environ.pop(VARIABLE, None)


@pytest.fixture(scope="module")
def parts(folder: Path) -> ModuleType:
    sys.path.append(str(folder))
    return importlib.import_module("my_parts")


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- the blocks


@pytest.mark.parametrize("block", USES[:-1], ids=range(len(USES) - 1))
def test_block_prints_what_it_says(block: str, parts: ModuleType, capsys: pytest.CaptureFixture) -> None:
    exec(compile(block, "block", "exec"), {})
    out = capsys.readouterr().out.splitlines()
    for promised in re.findall(r"# prints (.+)", block):
        assert promised in out


def test_commands_and_the_files_they_write(folder: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        if " fit " in line:
            line = line.replace("--config quickstart", f"--config {TINY}")
        line = line.replace("runs/quickstart/", "runs/").replace("--goal.cost 0.5", "--goal.cost 0.9")
        try:
            main(shlex.split(line)[1:])
        except SystemExit:
            pytest.fail(capsys.readouterr().err)
    assert len((folder / "labels.csv").read_text().splitlines()) == 3
    exec(compile(USES[-1], "block", "exec"), used := {})
    config = used["bundle"].config
    kinds = [type(part).__name__ for part in (config.heads, config.adapter)]
    assert kinds == ["MaxHeads", "ScaleShift"]
    assert "error" not in capsys.readouterr().err


# ---- a head


@pytest.mark.parametrize("family", BACKBONES)
def test_head_trains_on_every_family(family: str, parts: ModuleType, images: Tensor) -> None:
    torch.manual_seed(0)
    net = ExitNet(BACKBONES[family](), parts.MaxHeads(), every=2)
    targets = torch.arange(len(images))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        logits = net(images)
        assert logits.shape == (net.num_exits, len(images), CLASSES)
        losses.append(joint_loss(logits, targets, net.exit_weights))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad.abs().sum() > 0 for p in net.heads.parameters())


# ---- an adapter kind


def test_adapter_starts_as_identity(parts: ModuleType, vit: nn.Module, images: Tensor) -> None:
    expected = vit(images)
    assert len(inject(vit, parts.ScaleShift())) == 12
    assert torch.equal(vit(images), expected)
    F.cross_entropy(vit(images), torch.arange(len(images))).backward()
    own = [p for layer in adapter_layers(vit).values() for p in (layer.gain, layer.shift)]
    assert all(p.grad.abs().sum() > 0 for p in own)
    assert all(p.grad is None for name, p in vit.named_parameters() if "base_layer" in name)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}])
def test_adapter_merges_into_timms_keys(options: dict, parts: ModuleType, images: Tensor) -> None:
    model = make_vit(**options)
    keys = set(model.state_dict())
    inject(model, parts.ScaleShift(scale=0.5))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.gain)
        nn.init.normal_(layer.shift)
    expected = model(images)
    merge(model)
    assert keys <= set(model.state_dict())
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


class UnmergedLayer(AdapterLayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@dataclass(frozen=True, kw_only=True)
class Unmerged(AdapterSpec):
    """A kind that wraps norms, which hold no matrix."""

    wrong: str = ""

    @property
    def places(self) -> tuple[str, ...]:
        return ("*.norm1",)

    def fits(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.LayerNorm)

    def wrap(self, model: nn.Module, name: str) -> AdapterLayer:
        if self.wrong == "module":
            return nn.Linear(2, 2)  # type: ignore[return-value]
        return UnmergedLayer(nn.Identity() if self.wrong == "layer" else model.get_submodule(name), self)


def test_adapter_without_merged_says_so(vit: nn.Module, images: Tensor) -> None:
    expected = vit(images)
    inject(vit, Unmerged())
    assert torch.equal(vit(images), expected)
    with pytest.raises(ValueError, match="Unmerged cannot be merged") as error:
        merge(vit)
    assert "LoRA" in one_line(error)


# ---- an exit policy


def exit_by_loop(history: list[list[float]], policy: Policy) -> int:
    """One sample's exit, from its logits at all exits, in plain Python."""
    sure: list[tuple[float, int]] = []
    for k, logits in enumerate(history[:-1]):
        powers = [math.exp(z - max(logits)) for z in logits]
        p = [power / sum(powers) for power in powers]
        if type(policy).__name__ == "Purity":
            if sum(x * x for x in p) >= policy.threshold:
                return k
            continue
        sure.append((max(p), p.index(max(p))))
        if k and sure[-1][1] == sure[-2][1] and min(sure[-1][0], sure[-2][0]) >= policy.probability:
            return k
    return len(history) - 1


@pytest.mark.parametrize("name", ["Purity", "SureTwice"])
def test_policy_routes_as_a_loop_does(name: str, parts: ModuleType, images: Tensor) -> None:
    policy = getattr(parts, name)(0.45)
    logits = torch.randn(4, 300, 3, generator=torch.Generator().manual_seed(0)) * 2
    expected = [exit_by_loop(logits[:, i].tolist(), policy) for i in range(300)]
    assert read_off(policy, logits).exit_index.tolist() == expected
    assert len(set(expected)) > 2
    net = shaken(make_classifier()).net.eval()
    with torch.no_grad():
        assert torch.equal(net.early(images, policy).exit_index, read_off(policy, net(images)).exit_index)


def test_policy_calibrated_or_refused(parts: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 400, 5, generator=generator) * torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    arguments = (logits, logits[-1].argmax(-1), [1.0, 2.0, 3.0], Goal(cost=0.7))
    found = solve(*arguments, kind=parts.Purity, searches=["one_threshold"], combines=["own"], with_temperatures=False)
    policy = found.found.policy
    assert isinstance(policy, parts.Purity)
    cost = (read_off(policy, logits).exit_index.double() + 1).mean() / 3
    assert 0.65 < cost < 0.7 + 1e-9
    with pytest.raises(ValueError, match="SureTwice cannot be calibrated") as error:
        solve(*arguments, kind=parts.SureTwice, searches=["one_threshold"])
    assert "Thresholded" in one_line(error)


# ---- a loss-weight schedule


def test_schedule_reaches_the_joint_loss(parts: ModuleType) -> None:
    module = TinyModule()
    run = trainer(ExitWeights(parts.Bump(width=0.5)), max_epochs=1)
    run.fit(module, loader(batches=3))
    for step, seen in enumerate(module.seen):
        raw = [math.exp(-(((k / 2 - (1 - step / 2)) / 0.5) ** 2)) for k in range(3)]
        assert seen == pytest.approx([value / sum(raw) for value in raw], abs=1e-6)
    assert len({max(range(3), key=seen.__getitem__) for seen in module.seen}) > 1


# ---- a backbone family


@pytest.mark.parametrize("depths", [(2, 2, 3, 2), (1, 1, 1, 1)])
def test_family_is_bit_equal_to_timm(depths: tuple[int, ...], parts: ModuleType, images: Tensor) -> None:
    backbone = create_backbone("densenet121", CLASSES, block_config=depths)
    net = ExitNet(copy.deepcopy(backbone), parts.MaxHeads(), every=1).eval()
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(logits[-1], backbone(images))
        x = backbones.embed(backbone, images)
        for unit, width in zip(backbones.blocks(backbone), backbones.widths(backbone), strict=True):
            for part in unit:
                x = part(x)
            assert backbones.tokens(backbone, x).shape[::2] == (len(images), width)
        assert torch.equal(backbones.finish(backbone, x), backbone.forward_features(images))


def test_class_registered_by_two_modules(parts: ModuleType) -> None:
    def _(model: DenseNet) -> list[int]:
        return []

    before = backbones.widths.registry[DenseNet]
    with pytest.raises(ValueError, match="widths of DenseNet, which my_parts has registered") as error:
        backbones.widths.register(DenseNet, _)
    one_line(error)
    with pytest.raises(ValueError, match="my_parts has registered"):
        backbones.widths.register(DenseNet)(_)
    assert backbones.widths.registry[DenseNet] is before
    importlib.reload(parts)  # as a cell of a notebook that runs twice
    assert backbones.widths.registry[DenseNet] is not before


def test_family_that_lacks_a_function() -> None:
    class Half(nn.Module):
        pass

    backbones.blocks.register(Half, lambda model: [])
    with pytest.raises(TypeError, match="family of Half is not whole; also register embed, finish, tokens, widths"):
        ExitNet(Half())


# ---- contracts


@dataclass(frozen=True)
class WrongHeads(Heads):
    what: str

    def build(self, exit: int, exits: int, width: int, num_classes: int, **_: object) -> nn.Module:
        made = {"each token": nn.Linear(width, num_classes), "widths": nn.Flatten(), "none": None}
        return made[self.what]  # type: ignore[return-value]


@dataclass(frozen=True)
class WrongPolicy(Policy):
    what: str
    name = "wrong"

    def meets_condition(self, history: Tensor) -> Tensor:
        sure = history[-1].amax(-1)
        made = {"numbers": sure, "column": sure[:, None] > 0, "none": None, "combine": sure > 0}
        return made[self.what]  # type: ignore[return-value]

    def combine(self, history: Tensor) -> Tensor:
        return history[-1] if self.what == "combine" else history


@dataclass(frozen=True)
class WrongWeights(Weighting):
    values: tuple[float, ...]

    def profile(self, progress: float, exits: int) -> tuple[float, ...]:
        return self.values


class Undecorated(Heads):
    def __init__(self, size: int) -> None: ...

    def build(self, **_: object) -> nn.Module:
        return nn.Identity()


def net_with(heads: Heads) -> None:
    ExitNet(make_vit(), heads, every=3)(torch.zeros(4, 3, 32, 32))


def routed_by(policy: Policy) -> None:
    read_off(policy, torch.randn(3, 4, 5))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: net_with(WrongHeads("each token")), ("head Linear", "(4, 17, 5)", "(batch, classes)", "(4, 5)")),
        (lambda: net_with(WrongHeads("widths")), ("head Flatten", "(4, 816)", "(4, 5)")),
        (lambda: net_with(WrongHeads("none")), ("WrongHeads.build", "NoneType", "nn.Module")),
        (lambda: net_with(nn.Linear(2, 2)), ("heads=Linear", "Balanced()")),
        (lambda: net_with(Undecorated(2)), ("Undecorated", "@dataclass(frozen=True)")),
        (lambda: inject(make_vit(), Unmerged(wrong="module")), ("Unmerged.wrap", "Linear", "AdapterLayer")),
        (lambda: inject(make_vit(), Unmerged(wrong="layer")), ("Unmerged.wrap", "UnmergedLayer", "blocks.0.norm1")),
        (lambda: inject(make_vit(), LoRA), ("not an adapter kind", "LoRA(rank=8)")),
        (lambda: routed_by(WrongPolicy("numbers")), ("WrongPolicy.meets_condition", "torch.float32 (4,)", "bool")),
        (lambda: routed_by(WrongPolicy("column")), ("WrongPolicy.meets_condition", "torch.bool (4, 1)", "(4,)")),
        (lambda: routed_by(WrongPolicy("none")), ("WrongPolicy.meets_condition", "NoneType")),
        (lambda: routed_by(WrongPolicy("combine")), ("WrongPolicy.combine", "(4, 5)", "(3, 4, 5)")),
        (lambda: WrongWeights((1.0,))(0.0, 3), ("WrongWeights", "1 weights", "3 exits")),
        (lambda: WrongWeights((1.0, -1.0))(0.0, 2), ("WrongWeights", "-1.0", "at least 0")),
        (lambda: WrongWeights((1.0, math.nan))(0.0, 2), ("WrongWeights", "nan", "finite")),
    ],
)
def test_broken_contract_is_one_line(wrong, words: tuple[str, ...]) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        wrong()
    assert all(word in one_line(error) for word in words), error.value


# ---- files


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_files_import_nothing_of_ones_own(parts: ModuleType, folder: Path, images: Tensor) -> None:
    model = shaken(make_classifier(heads=parts.MaxHeads(eps=1e-5), adapter=parts.ScaleShift(scale=0.5)))
    fitted(model, folder / "own.ckpt")
    bundle_from_classifier(model, "bundle", policy=parts.Purity(0.7), preprocessing={})
    with torch.no_grad():
        torch.save((images, model.eval()(images)), "expected.pt")
        again = load_classifier("own.ckpt")
        assert torch.equal(again(images), model(images))
    code = """
import sys, torch, dynadapter
from dynadapter.training.restoring import load_classifier
for load, place in ((load_classifier, "own.ckpt"), (dynadapter.load, "bundle")):
    try:
        load(place)
    except ValueError as error:
        assert "my_parts" in str(error) and "--import" in str(error) and chr(10) not in str(error), error
    else:
        raise SystemExit("loaded")
assert "my_parts" not in sys.modules
sys.path.append(".")
import my_parts
images, expected = torch.load("expected.pt")
with torch.no_grad():
    assert torch.equal(load_classifier("own.ckpt")(images), expected)
    assert torch.equal(dynadapter.load("bundle").net(images), expected)
assert dynadapter.load("bundle").policy == my_parts.Purity(0.7)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "words"), [("absent_parts", "No module named"), ("my_parts.py", "without .py"), ("", "needs")]
)
def test_import_that_fails_is_one_line(name: str, words: str, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(VARIABLE, "")
    assert words in refused(["predict", f"--import={name}"], capsys)
