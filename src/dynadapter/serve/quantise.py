"""Quantise the matrix products of exported graphs to 8 bits. The heads keep 32 bits.

Both ways give the weights 7 of 8 bits: CPUs without VNNI add up products in 16 bits, which 8 bits would overflow.
"""

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynadapter.serve.graphs import quiet

ACTIVATIONS = {
    "dynamic": "8 bits, a range for each batch",
    "static": "8 bits, ranges fixed by calibration images",
}
"""By the name of the way, what becomes of the activations."""
FEWEST = 16
"""Outputs of the smallest product that is quantised."""


def quantise_dynamic(file: Path) -> int:
    """Quantise a graph with ONNX Runtime; each batch determines the ranges of its activations.

    Args:
        file: The graph, which is replaced.

    Returns:
        The number of products in 8 bits.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(file)
    products = _products(model)
    if not products:  # onnxruntime would take an empty list for all products
        return 0
    del model.graph.value_info[:]  # onnxruntime transposes the heads' weights and fails at their old shapes
    add_pre_process_metadata(model)  # torch has optimised the graph; without this, onnxruntime asks for that
    quantize_dynamic(
        model,
        file,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=products,
        per_channel=True,
        reduce_range=True,  # 7 bits
        weight_type=QuantType.QInt8,
    )
    return len(products)


def quantise_static(file: Path, batches: Sequence[Mapping[str, NDArray[np.float32]]]) -> int:
    """Quantise a graph with NNCF; the given inputs determine the ranges of the activations.

    Args:
        file: The graph, which is replaced.
        batches: Inputs of the graph by name, each (batch, ...).

    Returns:
        The number of products in 8 bits.
    """
    import onnx

    os.environ.setdefault("NNCF_CI", "1")  # read at the import; otherwise NNCF reports its use to its makers
    import nncf

    model = onnx.load(file)
    products = _products(model)
    if not products:
        return 0
    others = {node.op_type for node in model.graph.node} - {"MatMul"}
    kept = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in products]
    # nncf.set_log_level would change the handlers of every logger; what goes to stdout are progress bars
    with quiet("nncf"), contextlib.redirect_stdout(io.StringIO()):
        quantised = nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=kept, types=sorted(others), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),  # 7 bits
        )
    onnx.save(quantised, file)
    return len(products)


def _products(model: Any) -> list[str]:
    """Return the names of a graph's products of tokens with weights.

    Few outputs, as of the queries of an attentive head, gain nothing in 8 bits.
    """
    outputs = {tensor.name: tensor.dims[-1] for tensor in model.graph.initializer if len(tensor.dims)}
    return [
        node.name for node in model.graph.node if node.op_type == "MatMul" and outputs.get(node.input[1], 0) >= FEWEST
    ]
