"""Count MACs by fvcore, or by torch's counter for networks that torch.jit cannot trace."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dynadapter.cost.operators import IGNORED, OPERATORS, Handle, NoCount
from dynadapter.exits.net import ExitNet

Counts = dict[str, Counter[str]]
"""Multiply-adds by part of the network (``embed``, ``begins.0``, ``heads.0``, ``completions.0`` ...) and operator."""


class CannotTrace(Exception):
    """torch.jit cannot trace the network, or the network does not run at all."""


class Part(nn.Module):
    """One method of the network as a module, so that a meter can count it separately."""

    def __init__(self, method: Callable[[Any], Any]) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Any) -> Any:
        """Run the method."""
        return self.method(x)


class Parts(nn.Module):
    """The network's forward as parts: embed once, then begin, head and complete for each exit.

    Args:
        net: The network.
        class_first: Whether the last block before an exit computes the class token's row first, where it can.
    """

    def __init__(self, net: ExitNet, class_first: bool = False) -> None:
        super().__init__()
        exits = range(net.num_exits)
        self.net = net  # the trace must know its parameters
        self.embed = Part(net.embed)
        self.begins = nn.ModuleList(Part(partial(net.begin, k, class_first=class_first)) for k in exits)
        self.heads = nn.ModuleList(Part(partial(net.head, k)) for k in exits)
        self.completions = nn.ModuleList(Part(partial(net.complete, k)) for k in exits)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map an image (1, channels, height, width) to the logits (1, classes) of each exit."""
        x = self.embed(image)
        logits = []
        for begin, head, complete in zip(self.begins, self.heads, self.completions, strict=True):
            head_input, stage_state = begin(x)
            logits.append(head(head_input))
            if len(logits) < len(self.heads):
                x = complete(stage_state)
        return logits

    def named(self) -> dict[str, nn.Module]:
        """Return the parts by name, in no particular order."""
        groups = {"begins": self.begins, "heads": self.heads, "completions": self.completions}
        parts = {f"{group}.{k}": part for group, modules in groups.items() for k, part in enumerate(modules)}
        return {"embed": self.embed, **parts}


def count_by_fvcore(parts: Parts, image: Tensor, handles: Mapping[str, Handle]) -> Counts:
    """Count with one trace by fvcore.

    Args:
        parts: The network.
        image: (1, channels, height, width).
        handles: Counts of operators by traced name; they override the built-in ones.

    Raises:
        CannotTrace: If the trace fails.
        ValueError: If the network runs an operator without a count.
    """
    with warnings.catch_warnings():
        # fvcore calls torch.jit.script at its import and torch.jit's tracer later; torch announces the end of both.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(parts, image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.ancestor_mode("caller")  # whatever runs during a part's call belongs to the part
        analysis.set_op_handle(**{f"aten::{name}": count for name, count in OPERATORS.items()})
        analysis.set_op_handle(**{f"aten::{name}": None for name in IGNORED})
        analysis.set_op_handle(**handles)
        try:
            counts, unknown = analysis.by_module_and_operator(), analysis.unsupported_ops()
        except NoCount:
            raise
        except Exception as error:
            raise CannotTrace(str(error)) from error
    if unknown:
        listed = ", ".join(f"{times}x {name}" for name, times in sorted(unknown.items()))
        raise NoCount(
            f"no count is known for {listed}; pass handles={{{sorted(unknown)[0]!r}: count}} to exit_costs, "
            "where count(inputs, outputs) gives the multiply-adds of one call, 0 for a light one"
        )
    return {name: counts[name] for name in parts.named()}


def count_by_torch(parts: Parts, image: Tensor) -> Counts:
    """Count with one run under torch's ``FlopCounterMode``.

    It counts only products, convolutions and attention; an unknown operator costs 0 without a warning.
    """
    aten = torch.ops.aten
    in_place = {aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
    counts: Counts = {name: Counter() for name in parts.named()}
    before = 0

    def read(part: Counter[str]) -> None:
        nonlocal before
        before, found = counter.get_total_flops(), counter.get_total_flops() - before
        part["products"] += found // 2  # torch counts a multiply-add as 2 FLOPs

    # Attention as plain products: torch before 2.15 has no count for its fused kernel on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        for name, part in parts.named().items():
            part.register_forward_hook(lambda *_, name=name: read(counts[name]))
        parts(image)
    return counts
