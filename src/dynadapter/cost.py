"""What each exit costs: multiply-adds up to it, from one trace of the network with fvcore."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from math import isclose, prod
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from dynadapter.exits.net import ExitNet

Handle = Callable[[list[Any], list[Any]], int]
"""Counts one call of an operator from its traced inputs and outputs (values of ``torch.jit``, as in fvcore)."""


@dataclass(frozen=True)
class ExitCosts:
    """Multiply-adds for one image; one multiply-add counts 1, what papers call a "FLOP".

    >>> costs = ExitCosts(macs=(40, 110), light=(0, 0), backbone=100, exit_depths=(6, 12))
    >>> costs.relative
    (0.4, 1.1)
    >>> costs.average([0.5, 0.5])
    75.0

    Args:
        macs: Up to each exit, (exits,): embedding, blocks, adapters as they stand and all heads passed on the way.
        light: The part of ``macs`` that is normalisation, pooling and resampling, estimated as fvcore does it (5 for
            each element of a LayerNorm); ``macs - light`` is the exact count of products, convolutions and attention.
        backbone: The whole path without the early heads and with every token, adapters as they stand; without adapters
            the plain timm model.
        exit_depths: After how many blocks each exit stands.
        backbone_class_row: The same path where its last block computes the class token's row alone, which a static
            backbone could do as well; None where that was not asked for.
    """

    macs: tuple[int, ...]
    light: tuple[int, ...]
    backbone: int
    exit_depths: tuple[int, ...]
    backbone_class_row: int | None = None

    @property
    def gmacs(self) -> tuple[float, ...]:
        """Cost up to each exit in GMACs (10^9 multiply-adds)."""
        return tuple(macs / 1e9 for macs in self.macs)

    @property
    def relative(self) -> tuple[float, ...]:
        """Cost up to each exit as a fraction of the backbone without early heads; the last one is above 1."""
        return tuple(macs / self.backbone for macs in self.macs)

    def average(self, shares: Sequence[float] | Tensor) -> float:
        """Gives the expected cost of an image when samples leave in these shares.

        Args:
            shares: (exits,), the fraction of samples that leave at each exit; sums to 1.

        Returns:
            Multiply-adds for one image.

        Raises:
            ValueError: If there is not one share for each exit, or they are no shares of a whole.
        """
        parts = [float(share) for share in shares]
        if len(parts) != len(self.macs):
            raise ValueError(
                f"got {len(parts)} shares for {len(self.macs)} exits; give one for each, the last included"
            )
        # 1e-4: shares printed with a few digits, or divided in float32, do not sum to 1 exactly.
        if not all(part >= 0 for part in parts) or not isclose(sum(parts), 1, abs_tol=1e-4):
            raise ValueError(
                f"shares={parts} must be at least 0 and sum to 1, not to {sum(parts):g}; divide by their sum"
            )
        return sum(part * macs for part, macs in zip(parts, self.macs, strict=True))


def exit_costs(
    net: ExitNet,
    image_size: int | tuple[int, int] | None = None,
    handles: Mapping[str, Handle] | None = None,
    class_first: bool = False,
) -> ExitCosts:
    """Counts the multiply-adds of one image up to each exit, with one trace for all exits.

    Without ``class_first`` these are the numbers of papers: whole blocks, as :meth:`ExitNet.forward` runs them. With it
    they are what :meth:`ExitNet.early` runs, where the last block before an exit computes the class token's row first.

    What is counted is what runs: in evaluation mode, on the network's device and dtype, attention in either form,
    adapters injected or merged. The network's modes and the random state are left as they were.

    Args:
        net: The network.
        image_size: Height and width in pixels, or one number for both; by default the backbone's own input size.
        handles: Counts for further operators, or instead of the built-in ones, by traced name such as ``aten::einsum``.
        class_first: Whether to count what routing runs by default; takes a second trace, for the static backbone.

    Returns:
        The costs.

    Raises:
        TypeError: If ``net`` is not an :class:`~dynadapter.exits.net.ExitNet`.
        ValueError: If the network does not run at this size, cannot be traced, or runs an operator without a count.
    """
    if not isinstance(net, ExitNet):
        raise TypeError(f"exit_costs takes an ExitNet, not {type(net).__name__}; pass the ExitNet inside it")
    height, width = _size(net.backbone, image_size)
    stem = next((module for module in net.backbone.modules() if isinstance(module, nn.Conv2d)), None)
    image = next(net.backbone.parameters()).new_zeros(1, stem.in_channels if stem else 3, height, width)
    if image.is_meta:
        raise ValueError("the network is on the meta device, where nothing can be traced; move it to a real device")
    with _undisturbed(net, image.device):
        try:
            whole, unknown = _trace(_Parts(net, False), image, handles or {})
            counts, _ = _trace(_Parts(net, True), image, handles or {}) if class_first else (whole, unknown)
            plain, plain_counts = whole, counts  # of the static backbone, which merges no tokens
            if net.token_merging is not None:
                with _every_token(net):
                    plain, _ = _trace(_Parts(net, False), image, handles or {})
                    plain_counts = _trace(_Parts(net, True), image, handles or {})[0] if class_first else plain
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"cannot count an image of {height} x {width} pixels through the network: {reason}"
            ) from error
    if unknown:
        listed = ", ".join(f"{times}x {name}" for name, times in sorted(unknown.items()))
        raise ValueError(
            f"no count is known for {listed}; pass handles={{{sorted(unknown)[0]!r}: count}} to exit_costs, "
            "where count(inputs, outputs) gives the multiply-adds of one call, 0 for a light one"
        )
    last = (f"begins.{net.num_exits - 1}", f"heads.{net.num_exits - 1}")
    backbone = sum(
        part.total() for name, part in plain.items() if name in ("embed", *last) or name.startswith("begins.")
    )
    return ExitCosts(
        macs=_up_to_each_exit(net.num_exits, {name: part.total() for name, part in counts.items()}),
        light=_up_to_each_exit(net.num_exits, {name: part["light"] for name, part in counts.items()}),
        backbone=backbone,
        exit_depths=net.exit_depths,
        backbone_class_row=backbone + sum(plain_counts[n].total() - plain[n].total() for n in last)
        if class_first
        else None,
    )


def _up_to_each_exit(exits: int, count: dict[str, int]) -> tuple[int, ...]:
    """Adds up the parts on the way to each exit: who leaves needs no completion of the last stage."""
    total, totals = count["embed"], []
    for k in range(exits):
        total += count[f"begins.{k}"] + count[f"heads.{k}"]
        totals.append(total)
        total += count[f"completions.{k}"]
    return tuple(totals)


def exit_parameters(net: ExitNet) -> tuple[int, ...]:
    """Counts the trainable parameters in use up to each exit: those of embedding, blocks and heads passed on the way.

    The last exit has all of them. A parameter shared between stages counts once, where it is used first.

    Args:
        net: The network.

    Returns:
        (exits,), cumulative.
    """
    stages = [[p for m in net.stage_modules(k) for p in m.parameters()] for k in range(net.num_exits)]
    in_blocks = {id(p) for stage in stages for p in stage}
    # timm registers the embedding before the blocks, and norm and classifier after them
    embedding = list(takewhile(lambda p: id(p) not in in_blocks, net.backbone.parameters()))
    used: dict[int, nn.Parameter] = {}
    totals = []
    for k, stage in enumerate(stages):
        head = net.heads[k] if k < net.num_exits - 1 else net  # whatever is left belongs to the end
        used |= {id(p): p for p in (*embedding, *stage, *head.parameters()) if p.requires_grad}
        totals.append(sum(p.numel() for p in used.values()))
    return tuple(totals)


def cost_table(costs: ExitCosts, **columns: Sequence[object]) -> Table:
    """Lays out the costs as a table with a row for each exit.

    Args:
        costs: The costs.
        columns: Further columns, one value for each exit: ``accuracy=[...]``, ``share=[...]``. An underscore in a name
            becomes a space; fractions are printed with three decimals, whole numbers in groups of three digits.

    Returns:
        The table, to be printed by rich.

    Raises:
        ValueError: If a column has not one value for each exit.
    """
    table = Table(caption="GMACs: 10^9 multiply-adds for one image, all heads on the way and adapters included")
    for title in ["exit", "after block", "GMACs", "of the backbone", *(name.replace("_", " ") for name in columns)]:
        table.add_column(title, justify="right")
    for name, values in columns.items():
        if len(values) != len(costs.exit_depths):
            raise ValueError(
                f"column {name!r} has {len(values)} values for {len(costs.exit_depths)} exits; give one for each"
            )
    for k, row in enumerate(zip(costs.exit_depths, costs.gmacs, costs.relative, strict=True)):
        block, gmacs, relative = row
        extra = [_cell(values[k]) for values in columns.values()]
        table.add_row(str(k + 1), str(block), f"{gmacs:.4g}", f"{relative:.1%}", *extra)
    return table


def _cell(value: object) -> str:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(backbone: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Finds height and width: the ones asked for, else those the backbone was built with, else those of its weights."""
    if image_size is None:
        built = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        image_size = built or (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size", (None,))[1:]
        if not image_size:
            raise ValueError(
                "the backbone does not say for which image size it was made; pass image_size=224, for example"
            )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size={image_size} must be at least 1 pixel; give one number or (height, width)")
    return height, width


@contextmanager
def _undisturbed(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluates without gradients inside; afterwards modes, hooks, compiled calls and random state are as before."""
    modules = list(net.modules())
    modes = [module.training for module in modules]
    hooks = [(set(module._forward_pre_hooks), set(module._forward_hooks)) for module in modules]
    compiled = [(module, module._compiled_call_impl) for module in modules if module._compiled_call_impl is not None]
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []), torch.no_grad():
        try:
            net.eval()
            for module, _ in compiled:
                module._compiled_call_impl = None  # compiled code cannot be traced
            yield
        finally:
            for module, call in compiled:
                module._compiled_call_impl = call
            for module, training, (before, after) in zip(modules, modes, hooks, strict=True):
                module.training = training
                # fvcore takes its hooks away only after a trace that went well.
                for key in set(module._forward_pre_hooks) - before:
                    del module._forward_pre_hooks[key]
                for key in set(module._forward_hooks) - after:
                    del module._forward_hooks[key]


@contextmanager
def _every_token(net: ExitNet) -> Iterator[None]:
    """Merges no tokens inside."""
    merging, net.token_merging = net.token_merging, None
    try:
        yield
    finally:
        net.token_merging = merging


class _Part(nn.Module):
    """One of the network's methods as a module, so that the trace has a scope for it."""

    def __init__(self, method: Callable[[Any], Any]) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Any) -> Any:
        return self.method(x)


class _Parts(nn.Module):
    """The network's forward with a scope around each call: embed, then begin, head and complete in turn."""

    def __init__(self, net: ExitNet, class_first: bool) -> None:
        super().__init__()
        exits = range(net.num_exits)
        self.net = net  # its parameters must be known to the trace
        self.embed = _Part(net.embed)
        self.begins = nn.ModuleList(_Part(partial(net.begin, k, class_first=class_first)) for k in exits)
        self.heads = nn.ModuleList(_Part(partial(net.head, k)) for k in exits)
        self.completions = nn.ModuleList(_Part(partial(net.complete, k)) for k in exits)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.embed(image)
        logits = []
        for begin, head, complete in zip(self.begins, self.heads, self.completions, strict=True):
            seen, held = begin(x)
            logits.append(head(seen))
            if len(logits) < len(self.heads):
                x = complete(held)
        return logits


def _trace(parts: _Parts, image: Tensor, handles: Mapping[str, Handle]) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Traces once; gives multiply-adds by part and operator, and how often each operator without a count occurs."""
    with warnings.catch_warnings():
        # fvcore calls torch.jit.script at its import and torch.jit's tracer later; torch announces the end of both.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(parts, image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.ancestor_mode("caller")  # whatever runs during a part's call belongs to it
        analysis.set_op_handle(**_counts(), **{f"aten::{operator}": None for operator in _IGNORED.split()})
        analysis.set_op_handle(**handles)
        counts, unknown = analysis.by_module_and_operator(), analysis.unsupported_ops()
    groups = ("begins", "heads", "completions")
    names = ["embed", *(f"{group}.{k}" for group in groups for k in range(len(parts.heads)))]
    return {name: counts[name] for name in names}, unknown


def _counts() -> dict[str, Callable[..., Any]]:
    """The counts that fvcore lacks or has wrong, and the light operators under one name."""
    from fvcore.nn.jit_handles import addmm_flop_jit, batchnorm_flop_jit, elementwise_flop_counter, norm_flop_counter

    heavy = {
        "scaled_dot_product_attention": _attention,
        "matmul": _matmul,
        "mv": _matmul,
        "dot": _matmul,
        "addmm_": addmm_flop_jit,
        "baddbmm": _baddbmm,
        "baddbmm_": _baddbmm,
        "einsum": _einsum,
        "_convolution_mode": _convolution_mode,
    }
    light = {
        "layer_norm": norm_flop_counter(2),
        "rms_norm": norm_flop_counter(2),
        "group_norm": norm_flop_counter(2),
        "instance_norm": norm_flop_counter(1),
        "batch_norm": batchnorm_flop_jit,
        **dict.fromkeys(_REDUCTIONS.split(), elementwise_flop_counter(1, 0)),
        "upsample_nearest2d": elementwise_flop_counter(0, 1),
        **dict.fromkeys(("upsample_bilinear2d", "_upsample_bilinear2d_aa"), elementwise_flop_counter(0, 4)),
        **dict.fromkeys(("upsample_bicubic2d", "_upsample_bicubic2d_aa"), elementwise_flop_counter(0, 16)),
        "grid_sampler": elementwise_flop_counter(0, 4),
    }
    named = heavy | {operator: partial(_as_light, count) for operator, count in light.items()}
    return {f"aten::{operator}": count for operator, count in named.items()}


def _as_light(count: Handle, inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter(light=count(inputs, outputs))


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """Any product that sums over the left factor's last axis; fvcore's own fails on vectors and broadcast factors."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    return _matmul(inputs[1:], outputs)


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Scores and the weighted sum of values; a mask saves nothing, shared keys save nothing."""
    query, key, value = (_shape(x) for x in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Two factors: the product over all labels. fvcore reads a rounded figure off what numpy prints."""
    equation = inputs[0].toIValue().replace(" ", "")
    factors = equation.split("->")[0].split(",")
    if len(factors) != 2 or "." in equation:
        raise ValueError(f"no count for einsum {equation!r}; pass handles={{'aten::einsum': count}} to exit_costs")
    shapes = [_shape(factor) for factor in inputs[1].node().inputs()]
    sizes = dict(zip("".join(factors), [size for shape in shapes for size in shape], strict=True))
    return prod(sizes.values())


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> int:
    """A convolution whose padding is given by name; the weight is (out, in / groups, ...)."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


# Pooling and statistics: one for each element read.
_REDUCTIONS = """
mean sum std var norm linalg_vector_norm
avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
"""

# Arithmetic on single elements, choices, noise, copies and shapes: not counted, as in papers. Whatever is neither here,
# nor in fvcore's own list of the same kind, nor counted, is an error.
_IGNORED = """
add add_ sub sub_ rsub mul mul_ div div_ addcmul addcmul_ pow square sqrt rsqrt reciprocal neg abs sign
exp log sin cos erf sigmoid sigmoid_ tanh tanh_ gelu gelu_ silu silu_ mish elu leaky_relu prelu relu6 hardtanh
hardsigmoid hardswish hardswish_ softplus softmax log_softmax
clamp_min clamp_max maximum minimum min amax amin argmax argmin max_pool2d sort argsort topk cumsum
le lt ne any all isfinite nan_to_num logical_and logical_or logical_not __or__ where masked_fill_
dropout_ feature_dropout bernoulli bernoulli_ rand_like randn_like
alias clone lift_fresh pad tile repeat repeat_interleave expand_as view_as reshape_as unflatten swapaxes movedim flip
squeeze_ transpose_ block_diag numpy_T mT unfold as_strided tensor_split index_select index_copy_ index_put scatter
scatter_ take_along_dim empty_like ones_like new_ones fill_ zero_ linspace scalar_tensor tril triu one_hot meshgrid
numel
"""
