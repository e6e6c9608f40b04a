"""Write the files of a finished run: the weights in float16, a JSON file about them, and the model card."""

import argparse
import copy
import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch

from dynadapter.backbones import create_backbone
from dynadapter.backbones import fingerprint as fingerprint_of
from dynadapter.bench.timing import machine
from dynadapter.files import write
from tools.pretrain.learner import accuracy
from tools.pretrain.recipe import BASE, Recipe, timm_args
from tools.pretrain.run import Run


def fingerprint(weights: Path, classes: int, recipe: Recipe) -> str:
    """Return the fingerprint by which dynadapter recognises the backbone."""
    return fingerprint_of(create_backbone(BASE, classes, weights=weights, **timm_args(recipe)))


def export(run: Run, args: argparse.Namespace, names: list[str]) -> None:
    """Write the averaged weights in float16, the JSON file and the card."""
    out, recipe, model = Path(args.out), run.learner.recipe, run.learner.ema.module
    state = {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    halved = copy.deepcopy(model)
    halved.load_state_dict(state)
    found = {
        "raw": accuracy(run.learner.model, run.val),
        "ema": accuracy(model, run.val),
        "float16": accuracy(halved, run.val),
    }
    parameters = sum(tensor.numel() for tensor in state.values())
    head = sum(tensor.numel() for name, tensor in state.items() if name.startswith("head."))
    if args.head == "drop":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    content = safetensors.torch.save(state, {"format": "pt"})
    weights = out / f"{args.name}.safetensors"
    write(weights, content)
    about = {
        "name": args.name,
        "architecture": BASE,
        "timm_args": timm_args(recipe),
        "preprocess": {"image_size": recipe.size, "normalization": "half"},
        "parameters": {"backbone": parameters - head, "classifier": head, "classifier_in_file": args.head == "keep"},
        "accuracy": {name: round(value, 5) for name, value in found.items()},
        "validation_images": len(run.val),
        "source": {"name": args.source, "images": len(run.train), "classes": len(names), "licence": args.licence},
        "epochs": run.plan["epochs"],
        "start": run.identity["asked"].get("start"),
        "minutes": round(run.place.total_seconds / 60, 1),
        "recipe": asdict(recipe),
        "plan": run.plan,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "fingerprint": fingerprint(weights, len(names), recipe),
        "machine": machine(("torch", "timm", "dynadapter")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": names,
    }
    write(out / f"{args.name}.json", (json.dumps(about, indent=2) + "\n").encode())
    write(out / f"{args.name}.md", card(about).encode())
    print(f"wrote {weights} ({len(content) / 1e6:.2f} MB): {found['float16']:.2%} of {len(run.val)} validation images")


# ---- the model card


def card(about: dict[str, Any]) -> str:
    """Return the model card."""
    size = about["timm_args"]
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts(about).items())
    recipe = "".join(f"| {name} | {value} |\n" for name, value in about["recipe"].items())
    lines = "".join(f"    {name}={value},\n" for name, value in size.items())
    return f"""# {about["name"]}: a small research backbone

**With a network, use timm's pre-trained models instead: they are much better.** This one lets an example or a benchmark
run on real features where nothing can be downloaded. It is not a product and was tested for nothing else.

| | |
|---|---|
{rows}
The validation images were evaluated after every epoch, but did not choose an epoch: the weights are the last one's.

```python
from dynadapter import create_backbone

backbone = create_backbone(
    "{about["architecture"]}",
    num_classes=10,
    weights="{about["name"]}.safetensors",
{lines})
```

## Terms

{about["source"]["licence"]}

## Recipe

Written by `python -m tools.pretrain`: random resized crops, mirroring, rotation, colours, erasing, mixup and cutmix as
listed below; AdamW, cosine with warm-up, averaged weights.

| | |
|---|---|
{recipe}"""


def facts(about: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the card's first table."""
    source, size, place = about["source"], about["timm_args"], about["machine"]
    accuracy, parameters = about["accuracy"], about["parameters"]
    shape = ", ".join(f"{name}={value}" for name, value in size.items())
    tokens = (size["img_size"] // size["patch_size"]) ** 2
    head = "with" if parameters["classifier_in_file"] else "without"
    training = f"{about['epochs']} epochs, {about['minutes']} minutes on {place.get('gpu', place['cpu'])}, "
    training += about["plan"]["precision"]
    if about["start"]:
        training += f"; started with the weights of SHA-256 `{about['start'][:12]}...`"
    found = {
        "architecture": f"timm `{about['architecture']}` with {shape}: {tokens} patches and a class token",
        "parameters": f"{parameters['backbone']:,}, and {parameters['classifier']:,} of the classifier",
        "file": f"`{about['name']}.safetensors`, float16, {about['bytes'] / 1e6:.2f} MB, {head} the classifier",
        "images": f"{size['img_size']} px, from [0, 1] normalised by mean 0.5 and deviation 0.5 "
        "(`normalization: half`)",
        "trained on": f"{source['name']}: {source['images']:,} images of {source['classes']} classes, with labels, "
        "from scratch",
        f"top-1 on its {about['validation_images']:,} validation images": f"{accuracy['float16']:.2%} "
        f"(averaged weights in float16; in float32 {accuracy['ema']:.2%}, not averaged {accuracy['raw']:.2%})",
        "training": training,
    }
    if prepared := prepared_for(about["recipe"]):
        found["prepared for"] = prepared
    return found | {"sha256": f"`{about['sha256']}`", "fingerprint": f"`{about['fingerprint']}`"}


def prepared_for(recipe: dict[str, Any]) -> str:
    """Return what the backbone was prepared for; empty for an ordinary one."""
    parts = []
    if recipe["exit_every"]:
        parts.append(f"early exits: classifiers after every {recipe['exit_every']} blocks were trained, too")
    if recipe["token_merging"]:
        parts.append(f"token merging: in {recipe['token_merging']:.0%} of the steps with all patches")
    return "; ".join(parts)
