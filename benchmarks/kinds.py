"""Check each adapter kind, in its default places, on a small network of each family.

    python benchmarks/kinds.py

Every network is the smallest sensible one of its family, with random weights, none of them zero, at 32 pixels. The
properties of a pair: *identity* (injection leaves the output as it is), *trained* (the adapters' tensors and the heads
are trained, nothing else), *gradient* (it reaches each of these tensors), *merge* (merged, the logits are the same),
*cost* (the adapters' GMACs are counted, and gone once merged), *checkpoint* (what a checkpoint and a bundle hold makes
the same network again), *ONNX* (ONNX Runtime gives the logits of the adapters, not merged, in the blocks of the last
width). `ok` says that all seven hold; a letter names an exception below the table.
"""

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Line, Log, Row, show
from torch import Tensor, nn

from dynadapter import (
    SSF,
    VPT,
    Adapter,
    AdapterPlus,
    AdaptFormer,
    Balanced,
    BitFit,
    Convpass,
    DoRA,
    ExitNet,
    FacT,
    LoRA,
    RepAdapter,
    create_backbone,
    exit_costs,
    inject,
)
from dynadapter.adapters import AdapterSpec, adapter_layers
from dynadapter.backbones import classifier, cut_depth, widths
from dynadapter.exits.policies import Never
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle.tensors import fill, frozen_names, saved_tensors
from dynadapter.spec import plain, restore
from dynadapter.training.contents import frozen_keys

SIZE = 32
CLASSES = 5
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
NAFLEX = {key: value for key, value in VIT.items() if key != "img_size"}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2)}
RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32)}
WINDOWS = {"block_type": ("M", "T"), "transformer_window_size": (2, 2), "transformer_grid_size": (2, 2)}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "VisionTransformer": ("vit_tiny_patch16_224", VIT),
    "VisionTransformerDistilled": ("deit_tiny_distilled_patch16_224", VIT),
    "Eva": ("eva02_tiny_patch14_224", VIT),
    "Beit": ("beitv2_base_patch16_224", VIT),
    "NaFlexVit": ("naflexvit_base_patch16_map", NAFLEX),
    "Qwen3VitClassifier": ("qwen3_vit_88m", NAFLEX),
    "Hiera": ("hiera_tiny_224", dict(img_size=32, embed_dim=16, stages=(1, 1), q_pool=1, mask_unit_attn=(True, False))),
    "MaxxVit": (
        "maxvit_rmlp_pico_rw_256",
        dict(img_size=32, embed_dim=(32, 64), depths=(1, 1), stem_width=16, **WINDOWS),
    ),
    "SwinTransformer": ("swin_tiny_patch4_window7_224", SWIN),
    "SwinTransformerV2": ("swinv2_tiny_window8_256", SWIN),
    "ConvNeXt": ("convnext_tiny", {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)}),
    "ResNet": ("resnet50", RESNET),
    "ResNetV2": ("resnetv2_50", RESNET | {"stem_chs": 16}),
    "RegNet": ("regnety_002", {"w0": 8, "wa": 8, "wm": 2.0, "group_size": 8, "depth": 6}),
    "ByobNet": ("test_byobnet", {}),
    "EfficientNet": ("test_efficientnet", {}),
    "MobileNetV3": ("lcnet_035", {}),
}
KINDS: list[AdapterSpec] = [
    LoRA(rank=2),
    DoRA(rank=2),
    FacT(rank=2),
    RepAdapter(bottleneck=2),
    SSF(std=0.0),
    BitFit(),
    Adapter(bottleneck=2),
    AdapterPlus(bottleneck=2, drop_path=0.0),
    AdaptFormer(bottleneck=16),
    Convpass(bottleneck=2),
    VPT(prompts=3),
    VPT(prompts=3, placement="shallow"),
]
FREE = (SSF, BitFit)  # arithmetic on single elements is not counted


def label(spec: AdapterSpec) -> str:
    """Return the name of a kind, with the placement of VPT."""
    return f"{spec.label} {getattr(spec, 'placement', '')}".strip() if isinstance(spec, VPT) else spec.label


def images(count: int = 4) -> Tensor:
    """Return random images (count, 3, 32, 32)."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def shake(parameters: Iterable[nn.Parameter]) -> None:
    """Move tensors away from zeros, which would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in parameters:
            one.add_(torch.randn(one.shape, generator=generator), alpha=0.1)


@cache
def _built(name: str, options: tuple[tuple[str, Any], ...], cut: bool) -> nn.Module:
    """Return a network; a copy of it takes a tenth of the time of a build."""
    model = create_backbone(name, CLASSES, pretrained=False, **dict(options))
    shake(model.parameters())
    if cut:
        channels = widths(model)
        cut_depth(model, channels.index(channels[-1]) + 1)
    return model.eval()


@dataclass
class Pair:
    """A kind of adapter in a network.

    Args:
        spec: The kind.
        name: timm's name of the network.
        options: What makes it small.
        exits: How :class:`ExitNet` places the exits.
        cut: Leave as few blocks as the network's own head allows.
    """

    spec: AdapterSpec
    name: str
    options: dict[str, Any]
    exits: dict[str, Any] = field(default_factory=lambda: {"every": 1})
    cut: bool = False

    def backbone(self) -> nn.Module:
        """Return the network without adapters."""
        return copy.deepcopy(_built(self.name, tuple(self.options.items()), self.cut))

    def fresh(self) -> ExitNet:
        """Return the network as injection leaves it, with exits.

        Raises:
            ValueError: If the kind is refused.
        """
        model = self.backbone()
        inject(model, self.spec)
        return ExitNet(model, Balanced(), **self.exits).eval()

    @cached_property
    def net(self) -> ExitNet:
        """The network beside its start, where half of the adapters' tensors have no gradient."""
        net = self.fresh()
        shake(p for p in net.parameters() if p.requires_grad)
        return net

    @cached_property
    def merged(self) -> ExitNet | None:
        """The same with merged adapters; None if they cannot be merged."""
        mergeable = all(layer.mergeable for layer in adapter_layers(self.net.backbone).values())
        return copy.deepcopy(self.net).merge(1e-4) if mergeable else None

    @cached_property
    @torch.no_grad()
    def logits(self) -> Tensor:
        """The network's logits (exits, images, classes)."""
        return self.net(images())

    def own(self) -> list[nn.Parameter]:
        """List the trained tensors of the adapters."""
        layers = adapter_layers(self.net.backbone).values()
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]


# ---- the properties; each returns why it does not apply, or nothing, and raises an AssertionError if it does not hold


@torch.no_grad()
def identity(pair: Pair) -> str:
    """Injection leaves the output as it is."""
    if isinstance(pair.spec, VPT):
        return "adds tokens"
    torch.testing.assert_close(pair.fresh().backbone(images()), pair.backbone()(images()))
    return ""


def trained(pair: Pair) -> str:
    """The adapters' tensors, the heads and the classifier are trained, and nothing else."""
    layers = [pair.net.heads, *classifier(pair.net.backbone)]
    heads = {id(p) for layer in layers for p in layer.parameters()}
    assert {id(p) for p in pair.net.parameters() if p.requires_grad} == {id(p) for p in pair.own()} | heads
    return ""


def gradient(pair: Pair) -> str:
    """Each tensor of the adapters has a gradient."""
    pair.net.train()
    try:
        pair.net(images()).pow(2).sum().backward()
        assert pair.own()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.own())
    finally:
        pair.net.zero_grad()
        pair.net.eval()
    return ""


@torch.no_grad()
def merge(pair: Pair) -> str:
    """Merged, no adapter is left and the logits are the same."""
    if pair.merged is None:
        return "cannot be merged"
    assert not adapter_layers(pair.merged.backbone)
    torch.testing.assert_close(pair.merged(images()), pair.logits, rtol=1e-3, atol=1e-4)
    return ""


def cost(pair: Pair) -> str:
    """The adapters' multiply-adds are counted, on top of the bare network's; merged, none is left."""
    found = exit_costs(pair.net, SIZE)
    bare = exit_costs(ExitNet(pair.backbone(), Balanced(), **pair.exits).eval(), SIZE)
    assert (found.macs[-1] > bare.macs[-1]) is not isinstance(pair.spec, FREE)
    assert found.macs[-1] >= bare.macs[-1]
    assert found.relative[-1] > 1  # the heads of the early exits
    if pair.merged is not None:
        assert exit_costs(pair.merged, SIZE).macs == bare.macs
    return ""


def checkpoint(pair: Pair) -> str:
    """A bundle's file and a checkpoint hold the same tensors, which make the same network again."""
    assert restore(plain(pair.spec), AdapterSpec) == pair.spec
    assert frozen_names(pair.net) == frozen_keys(pair.net)
    fresh = pair.fresh()
    fill(fresh, saved_tensors(pair.net, whole=False), False, "bundle")
    with torch.no_grad():
        torch.testing.assert_close(fresh(images()), pair.logits)
    return ""


def onnx(pair: Pair) -> str:
    """The graph in ONNX Runtime gives the network's logits; ``export_onnx`` compares them."""
    from dynadapter.serve.export import export_onnx

    names = [str(k) for k in range(CLASSES)]
    net = Pair(pair.spec, pair.name, pair.options, {"exit_depths": []}, cut=True).net
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx
        out = Path(folder) / "out"
        export_onnx(net, out, policy=Never(), class_names=names, preprocess=Preprocess(SIZE), merge=False)
    return ""


PROPERTIES: dict[str, Callable[[Pair], str]] = {
    "identity": identity,
    "trained": trained,
    "gradient": gradient,
    "merge": merge,
    "cost": cost,
    "checkpoint": checkpoint,
    "ONNX": onnx,
}


PARTS = {"torch": [name for name in PROPERTIES if name != "ONNX"], "ONNX": ["ONNX"]}
"""Properties by the part of the program that checks them; the second takes seconds a pair."""


def case(pair: Pair, names: Iterable[str] = PROPERTIES) -> Line:
    """Return the cell of each property: ok, or why it does not apply, is refused or fails, in one line."""
    try:
        _ = pair.net
    except ValueError as error:
        return {"cells": dict.fromkeys(names, f"refused: {_line(error)}")}
    cells = {}
    for name in names:
        try:
            reason = PROPERTIES[name](pair)
            cells[name] = f"not applicable: {reason}" if reason else "ok"
        except (ValueError, TypeError, ImportError) as error:
            cells[name] = f"refused: {_line(error)}"
        except Exception as error:  # anything else is a fault, and has its cell, too
            cells[name] = f"FAILED: {type(error).__name__}: {_line(error)}"
    return {"cells": cells}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# ---- the table


def rows(lines: Iterable[Line]) -> tuple[list[Row], dict[str, str]]:
    """Return the table of some lines: a row a family, a column a kind; and what its letters stand for."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        pairs.setdefault((line["key"]["family"], line["key"]["kind"]), {}).update(line["cells"])
    letters: dict[str, str] = {}
    found: dict[str, Row] = {}
    for (family, kind), cells in pairs.items():
        known = {name: cells.get(name, "not measured yet") for name in PROPERTIES}
        notes = [f"{name} {cell}" for name, cell in known.items() if cell != "ok"]
        if len(set(cells.values())) == 1 and "ok" not in cells.values():  # the pair itself is refused
            notes = list(set(cells.values()))
        notes = [note.partition("; ")[0].replace(f"in {family}", "in this family") for note in notes]
        marks = [letters.setdefault(note, _letter(len(letters))) for note in notes]
        word = next((word for word in ("FAILED", "refused") if any(word in note for note in notes)), "ok")
        found.setdefault(family, {"family": family})[kind] = f"{word} {', '.join(marks)}".strip()
    order = {family: place for place, family in enumerate(FAMILIES)}
    table = sorted(found.values(), key=lambda row: order.get(row["family"], len(order)))
    return table, {letter: note for note, letter in letters.items()}


def _letter(number: int) -> str:
    return chr(ord("a") + number % 26) * (number // 26 + 1)


def main(argv: list[str] | None = None) -> None:
    """Check the pairs that have no line yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS / "kinds.jsonl"), help="JSON lines; pairs in it are not repeated")
    parser.add_argument("--only", default="", help="check only what contains this, such as 'LoRA, Eva, ONNX'")
    parser.add_argument("--tiny", action="store_true", help="two kinds and two families, to try the program")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    log, lines = Log(args.out), []
    for part, names in PARTS.items():  # the slow one last
        for spec in KINDS[:2] if args.tiny else KINDS:
            for family, (name, options) in list(FAMILIES.items())[: 2 if args.tiny else None]:
                if args.only in f"{label(spec)}, {family}, {part}":
                    key = {"kind": label(spec), "family": family, "network": name, "part": part}
                    pair = Pair(spec, name, options, {"exit_depths": [1]})
                    lines.append(log.find(key) or log.add(key, **case(pair, names)))
    table, letters = rows(lines)
    show(table, "all seven properties hold: ok")
    print(*(f"{letter}: {note}" for letter, note in letters.items()), sep="\n")


if __name__ == "__main__":
    main()
