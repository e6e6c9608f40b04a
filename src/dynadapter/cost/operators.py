"""The cost of one call of a traced operator: counts that fvcore lacks or has wrong, and operators that cost 0.

A count is a function from the traced inputs and outputs of a call (values of ``torch.jit``) to its MACs.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

Handle = Callable[[list[Any], list[Any]], int]
"""Counts one call of an operator from its traced inputs and outputs (values of ``torch.jit``, as in fvcore)."""


class NoCount(ValueError):
    """An operator has no count."""


def _shape(value: Any) -> list[int]:
    sizes: list[int] = value.type().sizes()
    return sizes


# ---- products and convolutions, counted exactly


def _matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """Count any product that sums over the left factor's last axis; fvcore's fails on vectors and broadcast factors."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _plus_matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a product that is added to the first input."""
    return _matmul(inputs[1:], outputs)


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count scores and the weighted sum of values; a mask or shared keys save nothing."""
    query, key, value = (_shape(x) for x in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _multihead_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the four projections, scores and weighted sum of torch's ``nn.MultiheadAttention`` as one operator."""
    batch, tokens, width = _shape(inputs[0])
    return batch * tokens * width * (4 * width + 2 * tokens)


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the product over all labels of two factors; fvcore parses a rounded number from numpy's printed text."""
    equation = inputs[0].toIValue().replace(" ", "")
    factors = equation.split("->")[0].split(",")
    if len(factors) != 2:
        raise NoCount(f"no count for einsum {equation!r}; pass handles={{'aten::einsum': count}} to exit_costs")
    sizes: dict[str, int] = {}
    for factor, value in zip(factors, inputs[1].node().inputs(), strict=True):
        shape = _shape(value)
        unnamed = "ABCDEFGH"[8 - (len(shape) - len(factor) + 3) :] if "..." in factor else ""  # the same from the right
        for label, size in zip(factor.replace("...", unnamed), shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return prod(sizes.values())


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a convolution whose padding is given by name; the weight is (out, in / groups, ...)."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


# ---- normalisation, pooling and resampling, estimated as fvcore does


def _normalise(weight: int, inputs: list[Any], outputs: list[Any]) -> int:
    """Count 5 for each element, or 4 without a learned scale, which is input number ``weight``."""
    return prod(_shape(inputs[0])) * (5 if inputs[weight].isCompleteTensor() else 4)


def _batch_norm(inputs: list[Any], outputs: list[Any]) -> int:
    """Count one product for stored statistics; with the statistics of the batch it costs as much as a LayerNorm."""
    if inputs[5].toIValue():
        return _normalise(1, inputs, outputs)
    return prod(_shape(inputs[0])) * (2 if inputs[1].isCompleteTensor() else 1)


def _each_input(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(inputs[0]))


def _each_output(times: int, inputs: list[Any], outputs: list[Any]) -> int:
    return times * prod(_shape(outputs[0]))


def _light(count: Handle, inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter(light=count(inputs, outputs))


_HEAVY: dict[str, Handle] = {
    "scaled_dot_product_attention": _attention,
    "_native_multi_head_attention": _multihead_attention,
    "matmul": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "addmm_": _plus_matmul,
    "baddbmm": _plus_matmul,
    "baddbmm_": _plus_matmul,
    "einsum": _einsum,
    "_convolution_mode": _convolution_mode,
}
_REDUCTIONS = """
mean sum std var norm linalg_norm linalg_vector_norm
avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
"""
_LIGHT: dict[str, Handle] = {
    "layer_norm": partial(_normalise, 2),
    "rms_norm": partial(_normalise, 2),
    "group_norm": partial(_normalise, 2),
    "instance_norm": partial(_normalise, 1),
    "batch_norm": _batch_norm,
    **dict.fromkeys(_REDUCTIONS.split(), _each_input),
    "upsample_nearest2d": partial(_each_output, 1),
    **dict.fromkeys(("upsample_bilinear2d", "_upsample_bilinear2d_aa"), partial(_each_output, 4)),
    **dict.fromkeys(("upsample_bicubic2d", "_upsample_bicubic2d_aa"), partial(_each_output, 16)),
    "grid_sampler": partial(_each_output, 4),
}

OPERATORS: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    **_HEAVY,
    **{name: partial(_light, count) for name, count in _LIGHT.items()},
}
"""Counts by operator name without ``aten::``; those of light operators all go under the name ``light``."""

# Arithmetic on single elements, choices, noise, copies and shapes: not counted, as in papers. An operator that is
# neither here, nor in fvcore's own list of the same kind, nor counted, is an error.
_IGNORED = """
add add_ sub sub_ rsub mul mul_ div div_ addcmul addcmul_ pow square sqrt rsqrt reciprocal neg abs sign
exp log sin cos erf sigmoid sigmoid_ tanh tanh_ gelu gelu_ silu silu_ mish elu leaky_relu prelu relu6 hardtanh
hardsigmoid hardswish hardswish_ softplus softmax log_softmax ceil floor
clamp_min clamp_max maximum minimum min amax amin argmax argmin max_pool2d sort argsort topk cumsum
le lt ne any all isfinite nan_to_num logical_and logical_or logical_not __or__ where masked_fill_
dropout_ feature_dropout bernoulli bernoulli_ rand_like randn_like
alias clone lift_fresh pad tile repeat repeat_interleave expand_as view_as reshape_as unflatten swapaxes movedim flip
squeeze_ transpose_ block_diag numpy_T mT unfold as_strided tensor_split index_select index_copy_ index_put scatter
scatter_ take_along_dim empty_like ones_like new_ones fill_ zero_ linspace scalar_tensor tril triu one_hot meshgrid
numel eye
"""
IGNORED = frozenset(_IGNORED.split())
"""Operators, without ``aten::``, that cost 0."""
