"""Kinds of adapter × families of backbone × properties, with every kind in its default places."""

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Copies, parting
from test_backbones import ARCHITECTURES

from dynadapter import VPT, Convpass, LoRA, RepAdapter
from dynadapter.adapters import AdapterSpec
from dynadapter.backbones import create_backbone
from dynadapter.exits.policies import read_off

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    kinds: Any = importlib.import_module("kinds")


@functools.cache
def copies(*case: Any) -> Copies:
    return Copies(kinds._built(*case))


kinds.Pair.backbone = lambda self: copies(self.name, tuple(self.options.items()), self.cut)()

NAMES = (
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "vit_small_plus_patch16_dinov3",
    "vit_base_patch16_rope_mixed_224",
    "beitv2_base_patch16_224",
    "naflexvit_base_patch16_map",
    "hiera_tiny_224",
    "maxvit_rmlp_pico_rw_256",
    *(name for name, _, _ in ARCHITECTURES if name == "qwen3_vit_88m"),
    "swinv2_tiny_window8_256",
    "convnext_tiny",
    "test_resnet",
    "regnetv_064",
    "test_efficientnet",
)
FAST = ("identity", "trained", "gradient", "merge")
MERGED = ("LoRA", "DoRA", "FacT", "RepAdapter", "SSF", "BitFit")
WHOLE = ("eva02_tiny_patch14_224", "convnext_tiny")  # costs and saving do not depend on the family
NO_PLACES = {
    VPT: [name for name in NAMES if not name.startswith(("eva", "vit"))],
    Convpass: ["hiera_tiny_224"],
}


def pair(name: str, spec: AdapterSpec) -> Any:
    return kinds.Pair(spec, name, next(options for other, options, _ in ARCHITECTURES if other == name))


@pytest.mark.parametrize("spec", kinds.KINDS, ids=kinds.label)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_in_every_family(name: str, spec: AdapterSpec) -> None:
    case = pair(name, spec)
    if name in NO_PLACES.get(type(spec), ()):
        with pytest.raises(ValueError, match=rf"{type(spec).__name__} has no default places in .*; kinds .*, SSF"):
            case.fresh()
        return
    properties = (*FAST, "cost", "checkpoint") if name in WHOLE else FAST
    missing = {prop for prop in properties if kinds.PROPERTIES[prop](case)}
    unmerged = () if spec.label in MERGED else ("merge",)
    assert missing == {*unmerged, *(("identity",) if isinstance(spec, VPT) else ())}
    with torch.no_grad():
        policy = parting(case.logits[0])
        routed, expected = case.net.early(kinds.images(), policy), read_off(policy, case.logits)
    assert routed.exit_index.equal(expected.exit_index)
    torch.testing.assert_close(routed.logits, expected.logits, rtol=1e-4, atol=1e-5)


# ---- the printed table


@pytest.mark.parametrize(("family", "spec"), [("RegNet", RepAdapter(bottleneck=2)), ("Hiera", Convpass(bottleneck=2))])
def test_printed_table_is_current(family: str, spec: AdapterSpec) -> None:
    lines = [json.loads(text) for text in (BENCHMARKS / "results" / "kinds.jsonl").read_text().splitlines()]
    shown = {(line["key"]["family"], line["key"]["kind"]): line["cells"] for line in lines if "merge" in line["cells"]}
    assert shown.keys() == {(name, kinds.label(kind)) for name in kinds.FAMILIES for kind in kinds.KINDS}
    name, options = kinds.FAMILIES[family]
    found = kinds.case(kinds.Pair(spec, name, options, {"exit_depths": [1]}), kinds.PARTS["torch"])
    # A message also lists what fits, and is cut off; its first clause is the reason
    reasons = [
        {name: cell.partition(";")[0] for name, cell in one.items()}
        for one in (found["cells"], shown[family, spec.label])
    ]
    assert reasons[0] == reasons[1]
    words = {cell for cells in shown.values() for cell in cells.values()}
    assert all(word == "ok" or "not applicable" in word or "has no default places" in word for word in words)


def test_table_has_a_letter_for_each_exception() -> None:
    cells = dict.fromkeys(kinds.PROPERTIES, "ok")
    unmerged = {"merge": "not applicable: x"}
    given = {"A": cells, "B": cells | unmerged, "C": dict.fromkeys(cells, "refused: no places in F; more")}
    given["D"] = dict(list(cells.items())[:-1]) | unmerged | {"cost": "FAILED: z"}
    table, letters = kinds.rows([{"key": {"family": "F", "kind": kind}, "cells": one} for kind, one in given.items()])
    assert table == [{"family": "F", "A": "ok", "B": "ok a", "C": "refused b", "D": "FAILED a, c, d"}]
    notes = ["merge not applicable: x", "refused: no places in this family", "cost FAILED: z", "ONNX not measured yet"]
    assert letters == dict(zip("abcd", notes, strict=True))


@pytest.mark.parametrize("name", ["vit_small_plus_patch16_dinov3", "vit_base_patch16_rope_mixed_224"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    net = pair(name, LoRA(rank=2)).fresh().train()
    gradients = []
    for on in (False, True):
        net.backbone.set_grad_checkpointing(on)
        net.zero_grad()
        net(kinds.images()).pow(2).sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_dinov3_takes_any_square() -> None:
    net = pair("vit_small_plus_patch16_dinov3", LoRA(rank=2)).fresh()
    for size in (32, 48, 80):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(net(x)[-1], net.backbone(x))
    with pytest.raises(ValueError, match="4 x 6 patches do not form a square; give square images"):
        net(torch.randn(1, 3, 32, 48))


def test_patch_dropout_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match=r"leave (patch_drop_rate|it) out"):
        create_backbone("eva02_tiny_patch14_224", num_classes=5, pretrained=False, img_size=28, patch_drop_rate=0.5)
