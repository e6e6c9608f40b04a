"""An exported folder written by hand, whose logits are the pixels of its images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynadapter.files import sha256
from dynadapter.serve.runtime.manifest import FORMAT
from dynadapter.serve.runtime.policies import Policy

onnx = pytest.importorskip("onnx")

EXITS, WIDTH = 3, 4  # of the folder written by hand: an image's 12 numbers are the logits of its exits


def write_folder(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """Write a folder whose stage k returns the numbers 4k to 4k + 3 of an image (3, 2, 2)."""
    folder.mkdir(exist_ok=True)
    stages = []
    for k in range(EXITS):
        inputs, outputs = ("images" if k == 0 else f"x{k - 1}",), (*([f"x{k}"] if k < EXITS - 1 else []), f"logits{k}")
        tensor = onnx.helper.make_tensor_value_info
        shape = onnx.numpy_helper.from_array(np.array([0, 12], np.int64), "shape")
        columns = onnx.numpy_helper.from_array(np.arange(WIDTH * k, WIDTH * (k + 1)), "columns")
        nodes = [
            onnx.helper.make_node("Reshape", [inputs[0], "shape"], ["flat"]),
            onnx.helper.make_node("Gather", ["flat", "columns"], [outputs[-1]], axis=1),
        ]
        if k < EXITS - 1:
            nodes.append(onnx.helper.make_node("Identity", [inputs[0]], [outputs[0]]))
        graph = onnx.helper.make_graph(
            nodes,
            f"stage{k}",
            [tensor(inputs[0], onnx.TensorProto.FLOAT, ["batch", 3, 2, 2])],
            [
                tensor(name, onnx.TensorProto.FLOAT, ["batch", *([WIDTH] if "logits" in name else [3, 2, 2])])
                for name in outputs
            ],
            [shape, columns],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        file = folder / f"stage{k}.onnx"
        onnx.save(model, file)
        stages.append(
            {
                "file": file.name,
                "bytes": file.stat().st_size,
                "sha256": sha256(file),
                "inputs": [{"name": name, "shape": [None, 3, 2, 2]} for name in inputs],
                "outputs": [
                    {"name": name, "shape": [None, *([WIDTH] if "logits" in name else [3, 2, 2])]} for name in outputs
                ],
            }
        )
    content = {
        "format": FORMAT,
        "stages": stages,
        "files": {},
        "policy": settings,
        "temperatures": None,
        "class_names": list("abcd"),
        "preprocessing": {"image_size": 2, "interpolation": "nearest", "resize": "stretch", "normalization": "none"},
    }
    (folder / "manifest.json").write_text(json.dumps(content | changes))
    return folder


def as_images(logits: np.ndarray) -> np.ndarray:
    """Return logits (exits, samples, classes) as images (samples, 3, 2, 2) of the folder written by hand."""
    return np.ascontiguousarray(logits.transpose(1, 0, 2).reshape(-1, 3, 2, 2), np.float32)


def taken(policy: Policy, logits: np.ndarray) -> np.ndarray:
    """Return each sample's exit index (samples,) from the logits of all exits (exits, samples, classes)."""
    found = np.full(logits.shape[1], len(logits) - 1)
    for k in reversed(range(len(logits) - 1)):  # the earliest exit writes last
        found[policy.stops(logits[: k + 1])] = k
    return found
