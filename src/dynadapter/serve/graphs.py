"""Write the stages of a network as ONNX graphs."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dynadapter.adapters import adapter_layers
from dynadapter.backbones import written_out_attention
from dynadapter.exits.net import ExitNet

LARGEST = 2 * 1024**3 - 64 * 1024**2
"""Bytes of weights in one ONNX file: protobuf ends at 2 GiB, and the graph itself needs some room."""


def standalone(net: ExitNet, images: Tensor, merge: bool) -> tuple[ExitNet, ExitNet]:
    """Copy a network to the CPU in float32.

    Args:
        net: The network.
        images: (images, 3, size, size); the first one is tried on the copy.
        merge: Merge the adapters of the second copy if all of them can be merged.

    Returns:
        The network as it is, and as it is to be exported.

    Raises:
        ValueError: The network does not take such images.
    """
    reference = copy.deepcopy(net).to("cpu", torch.float32).eval()
    try:
        with torch.no_grad():
            reference(images[:1])
    except Exception as error:  # timm asserts its sizes, convolutions raise a RuntimeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shape = " x ".join(map(str, images.shape[1:]))
        raise ValueError(f"the network does not take images of {shape} ({reason}); see preprocessing") from error
    adapters = adapter_layers(reference.backbone).values()
    if merge and adapters and all(layer.mergeable for layer in adapters):
        return reference, copy.deepcopy(reference).merge()
    return reference, reference


def write_graphs(net: ExitNet, folder: Path, images: Tensor, class_first: bool, opset: int) -> list[dict[str, Any]]:
    """Write ``stage0.onnx``, ``stage1.onnx``, ... with their weights inside.

    Returns:
        For each stage the name of its file and its ``inputs`` and ``outputs``.

    Raises:
        ValueError: A stage is too large for one file.
    """
    stages = []
    with written_out_attention(net.backbone):
        for k, program, tensors in _programs(net, images, class_first):
            file = folder / f"stage{k}.onnx"
            _write(program, file, tensors, opset)
            stages.append({"file": file.name, **tensors})
    return stages


class _Stage(nn.Module):
    """One stage of a network: maps the outputs of the stage before to its own outputs and logits."""

    def __init__(self, net: ExitNet, k: int, class_first: bool) -> None:
        super().__init__()
        self.net = net
        self.k = k
        self.class_first = class_first

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, logits = self.net.step(self.k, inputs, self.class_first)
        return (logits,) if self.k == self.net.num_exits - 1 else (*outputs, logits)


def _programs(
    net: ExitNet, images: Tensor, class_first: bool
) -> Iterator[tuple[int, ExportedProgram, dict[str, list[dict[str, Any]]]]]:
    """Trace the stages in order, each with the manifest's entries for its inputs and outputs."""
    inputs = {"images": images.new_zeros(2, *images.shape[1:])}  # torch.export would treat a batch of 1 as a constant
    for k in range(net.num_exits):
        module, values = _Stage(net, k, class_first), tuple(inputs.values())
        with torch.no_grad():
            *rest, logits = module(*values)
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(module, values, dynamic_shapes=(tuple({0: batch} for _ in values),))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths on this machine
        outputs = {f"x{k}" if i == 0 else f"keys_values{k}": x for i, x in enumerate(rest)}
        yield k, program, {"inputs": _described(inputs), "outputs": _described(outputs | {f"logits{k}": logits})}
        inputs = outputs


def _described(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    # None stands for the batch
    return [{"name": name, "shape": [None, *x.shape[1:]], "type": "float32"} for name, x in tensors.items()]


def _write(program: ExportedProgram, file: Path, tensors: Mapping[str, Any], opset: int) -> None:
    unused, weights = _unused(program), {**program.state_dict, **program.constants}
    size = sum(tensor.nbytes for name, tensor in weights.items() if name not in unused)
    if size > LARGEST:
        raise ValueError(
            f"{file.stem} has {size / 1e9:.1f} GB of weights, one file holds {LARGEST / 1e9:.1f}; set more exits for "
            "smaller stages"
        )
    with quiet("onnxscript"):
        graph = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=({0: "batch"}, *({} for _ in tensors["inputs"][1:])),  # names the dynamic size
            input_names=[tensor["name"] for tensor in tensors["inputs"]],
            output_names=[tensor["name"] for tensor in tensors["outputs"]],
            opset_version=opset,
            verbose=False,
        )
    assert graph is not None  # None belongs to the signature of the older exporter
    model = graph.model.graph
    parts: list[Any] = [model, *model.all_nodes(), *model.inputs, *model.initializers.values()]
    for part in parts:
        part.metadata_props.clear()  # the source lines of each operator, a quarter of a small file
    graph.save(file, external_data=False)


def _unused(program: ExportedProgram) -> set[str]:
    """Return the names of tensors that a program stores but never reads."""
    nodes = {node.name: node for node in program.graph.nodes}
    specs = program.graph_signature.input_specs
    return {spec.target for spec in specs if spec.target is not None and not nodes[spec.arg.name].users}


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silence a library that logs remarks and tracebacks; the graphs are run afterwards, which shows real errors."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
