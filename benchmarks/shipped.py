"""The part ``shipped`` of ``serving.py``: the recipes of ``configs/`` by every backend, beside other ways to serve."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import BACKBONES, GPU_BACKBONES, RESULTS, TINY, Line, Log

from dynadapter import Attentive, ExitNet, LoRA, TokenMerging, create_backbone, inject
from dynadapter.backbones import fingerprint
from dynadapter.bench.arms import BUILDERS, Arm, Work
from dynadapter.bench.measure import measure
from dynadapter.bench.settings import ARMS, Settings
from dynadapter.bench.timing import ratio
from dynadapter.exits.policies import Confidence
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle import BackboneSource, Bundle
from dynadapter.serve.bundle.config import CONFIG, Config
from dynadapter.serve.bundle.saving import describe
from dynadapter.serve.drift import Reference

RECIPES: dict[str, TokenMerging | None] = {"vtab": None, "vtab, token_merging": TokenMerging()}
"""By the configs: LoRA, attentive heads, exits after each quarter of the blocks."""
CALIBRATED = "recipes_heads_micro.jsonl", "dev_view", "cost 0.5"
"""File of results, task and goal of the calibrated run whose exit shares are taken: the default recipe on `micro`,
trained on train800val200 and routed on the task's test images."""


def exit_shares(bundle: str | None) -> tuple[tuple[float, ...], str]:
    """Return exit shares of four exits, and where they were measured.

    Args:
        bundle: Folder of a calibrated bundle; None for the run that ``CALIBRATED`` names.

    Raises:
        SystemExit: The bundle stores none, or of another number of exits.
    """
    if bundle is not None:
        config = Config.loads((Path(bundle) / CONFIG).read_text(), bundle)
        reference = Reference.of(config)
        if reference is None or len(reference.shares) != 4:
            raise SystemExit(f"{bundle} stores no exit shares of four exits; give a bundle that calibrate wrote")
        return reference.shares, f"bundle {Path(bundle).name} ({config.backbone.name})"
    file, task, goal = CALIBRATED
    for line in map(json.loads, (RESULTS / file).read_text().splitlines()):
        run = line["run"]
        if (run["task"], run["recipe"], run["split"]) == (task, "default", "train800val200"):
            return tuple(line["policies"][goal]["exit_shares"].values()), f"{file}: {task}, {goal}"
    raise SystemExit(f"{RESULTS / file} has no line of {task}")


def shipped_bundle(options: dict[str, Any], token_merging: TokenMerging | None) -> Bundle:
    """Build a bundle of a recipe with random weights; its LoRA is merged where that is timed."""
    torch.manual_seed(0)
    given = dict(options)
    name, size = given.pop("name"), int(given["img_size"])
    backbone: Any = create_backbone(name, 10, **given)
    source = BackboneSource(name, fingerprint(backbone), "seed", given)
    inject(backbone, LoRA(rank=8))
    depth, policy = len(backbone.blocks), Confidence(0.9)
    if token_merging is not None:  # the network to try the program with has four blocks
        token_merging = replace(token_merging, after=tuple(place for place in token_merging.after if place < depth))
    net = (
        ExitNet(backbone, Attentive(queries=6), every=max(depth // 4, 1), token_merging=token_merging)
        .eval()
        .requires_grad_(False)
    )
    parts: dict[str, Any] = {"backbone": source, "adapter": LoRA(rank=8), "heads": Attentive(queries=6)}
    parts |= {"policy": policy, "class_names": [str(k) for k in range(10)], "preprocessing": Preprocess(size)}
    return Bundle(net, policy, describe(net, **parts))


def peft_merged(work: Work) -> Arm:
    """Create the arm of peft's LoRA on qkv, merged into the backbone by peft."""
    from serving import peft_lora

    model = peft_lora(copy.deepcopy(work.subject.net.backbone), merged=True)
    return work.static_arm(model, float(work.costs(True).static))


def shipped_case(options: dict[str, Any], recipe: str, batch: int, rounds: int, shares: tuple[float, ...]) -> Line:
    """Time a recipe on a backbone at one batch size."""
    BUILDERS["peft merged"] = peft_merged
    settings = Settings(
        bundle="",
        batch_sizes=[batch],
        rounds=rounds,
        threads=1,
        device="cpu",
        precision="32",
        images=None,
        shares=list(shares),
        arms=[*ARMS, "peft merged"],
        weights=None,
        pretrained=None,
        out="",
        overwrite=False,
    )
    result = measure(settings, shipped_bundle(options, RECIPES[recipe]))
    [found] = result["batches"]
    line: Line = {"control": found["control"], "notes": result["notes"], "static_gmacs": found["static_gmacs"]}
    clock = {name: [sum(calls) for calls in taken["cpu"]] for name, taken in found["seconds"].items()}
    for name, row in found["arms"].items():
        if name != "static":
            line[name] = {key: row[key] for key in ("detail", "gmacs", "gmacs_run", "mac_speedup", "speedup")}
            line[name] |= {"efficiency": row["speedup"] / row["mac_speedup"], "shares": row["shares"] or ()}
            if "onnx static" in clock:
                line[name]["over_onnx_static"] = ratio(clock["onnx static"], clock[name])
    return line | {"seconds": clock}


def shipped_lines(args: Any, log: Log) -> Iterator[Line]:
    """Yield the lines of all backbones, recipes and batch sizes; only what is missing is timed."""
    shares, where = exit_shares(args.bundle)
    found = TINY if args.tiny else {**BACKBONES, **GPU_BACKBONES}
    for name, options in found.items():
        if args.only not in name:
            continue
        for recipe in RECIPES:
            key = {"part": "shipped", "backbone": name, "recipe": recipe, "shares": where, "rounds": args.rounds}
            for batch in args.batches:
                here = key | {"batch": batch}
                yield log.find(here) or log.add(here, **shipped_case(options, recipe, batch, args.rounds, shares))
