"""Count the multiply-adds of one image up to each exit, and of the static network."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isclose
from typing import Literal

import torch
from torch import Tensor, nn

from dynadapter.backbones import built_for, input_shape
from dynadapter.cost.meters import CannotTrace, Counts, Parts, count_by_fvcore, count_by_torch
from dynadapter.cost.operators import Handle, NoCount
from dynadapter.exits.net import ExitNet


@dataclass(frozen=True)
class ExitCosts:
    """Multiply-adds (MACs) of one image.

    >>> costs = ExitCosts(macs=(40, 110), light=(0, 0), static=100, exit_depths=(6, 12))
    >>> costs.relative
    (0.4, 1.1)
    >>> costs.average([0.5, 0.5])
    75.0

    Args:
        macs: MACs up to each exit, (exits,), of whole blocks: embedding, blocks, adapters (merged or not, as they are)
            and all heads on the way.
        light: The part of ``macs`` for normalisation, pooling and resampling, which is an estimate (5 for each element
            of a LayerNorm). ``macs - light`` counts products, convolutions and attention exactly.
        static: MACs of the static network: the same backbone and adapters, no early heads, every token.
        exit_depths: After how many blocks each exit stands, (exits,).
        class_first_macs: MACs that routing runs up to each exit if the last block before it computes the class token's
            row first, (exits,); None if not counted. Relative costs never use them.
        meter: "fvcore", or "torch" if fvcore cannot count the network. With "torch", ``light`` is 0.
    """

    macs: tuple[int, ...]
    light: tuple[int, ...]
    static: int
    exit_depths: tuple[int, ...]
    class_first_macs: tuple[int, ...] | None = None
    meter: Literal["fvcore", "torch"] = "fvcore"

    @property
    def gmacs(self) -> tuple[float, ...]:
        """Cost up to each exit in GMACs (10^9 MACs)."""
        return tuple(macs / 1e9 for macs in self.macs)

    @property
    def relative(self) -> tuple[float, ...]:
        """Cost up to each exit as a fraction of static. The last is above 1, because it includes the early heads."""
        return tuple(macs / self.static for macs in self.macs)

    def average(self, shares: Sequence[float] | Tensor) -> float:
        """Compute the average MACs of an image from the exit shares.

        Args:
            shares: (exits,), the fraction of samples that exit at each exit; sums to 1.

        Raises:
            ValueError: If there is not one share per exit, or they do not sum to 1.
        """
        return self._average(shares, self.macs)

    def average_run(self, shares: Sequence[float] | Tensor) -> float:
        """Compute :meth:`average` from ``class_first_macs``, or from ``macs`` if those were not counted."""
        return self._average(shares, self.class_first_macs or self.macs)

    def _average(self, shares: Sequence[float] | Tensor, costs: tuple[int, ...]) -> float:
        parts = [float(share) for share in shares]
        if len(parts) != len(costs):
            raise ValueError(f"got {len(parts)} shares for {len(costs)} exits; give one for each, the last included")
        # 1e-4: shares printed with a few digits, or divided in float32, do not sum to 1 exactly.
        if not all(part >= 0 for part in parts) or not isclose(sum(parts), 1, abs_tol=1e-4):
            raise ValueError(
                f"shares={parts} must be at least 0 and sum to 1, not to {sum(parts):g}; divide by their sum"
            )
        return sum(part * macs for part, macs in zip(parts, costs, strict=True))


def exit_costs(
    net: ExitNet,
    image_size: int | tuple[int, int] | None = None,
    handles: Mapping[str, Handle] | None = None,
    class_first: bool = False,
) -> ExitCosts:
    """Count the multiply-adds of one image up to each exit, with one trace for all exits.

    The network is counted in evaluation mode, on its device and dtype, with adapters injected or merged. Its modes and
    the random state do not change. If torch.jit cannot trace it, or it runs an operator without a count, torch's
    ``FlopCounterMode`` counts instead, and a warning names the reason.

    Args:
        net: The network.
        image_size: Height and width in pixels, or one number for both; None for the backbone's own input size.
        handles: Counts for further operators, or instead of the built-in ones, by traced name such as ``aten::einsum``.
        class_first: Also count ``class_first_macs``, which takes a second trace.

    Raises:
        TypeError: If ``net`` is not an :class:`~dynadapter.exits.net.ExitNet`.
        ValueError: If the network does not run at this size, or runs an operator without a count although ``handles``
            are given.
    """
    if not isinstance(net, ExitNet):
        raise TypeError(f"exit_costs takes an ExitNet, not {type(net).__name__}; pass the ExitNet inside it")
    image = _image(net.backbone, image_size)
    with _undisturbed(net):
        count: Callable[[Parts, Tensor], Counts] = partial(count_by_fvcore, handles=handles or {})
        meter: Literal["fvcore", "torch"] = "fvcore"
        try:
            whole = count(Parts(net), image)
        except (CannotTrace, NoCount) as reason:
            meter, count = "torch", count_by_torch
            whole = _count_without_trace(net, image, reason, given=bool(handles))
        rows = count(Parts(net, class_first=True), image) if class_first else None
        alone, exits = whole, net.num_exits
        if net.token_merging is not None or net.beside is not None:
            alone, exits = count(Parts(_without_exits(net)), image), 1
    return ExitCosts(
        macs=up_to_each_exit(net.num_exits, _totals(whole)),
        light=up_to_each_exit(net.num_exits, {name: part["light"] for name, part in whole.items()}),
        static=_of_static(exits, alone),
        exit_depths=net.exit_depths,
        class_first_macs=None if rows is None else up_to_each_exit(net.num_exits, _totals(rows)),
        meter=meter,
    )


def _count_without_trace(net: ExitNet, image: Tensor, reason: CannotTrace | NoCount, given: bool) -> Counts:
    """Count by torch's counter, with a warning.

    Raises:
        ValueError: If the network does not run on the image, or ``given``.
    """
    try:
        if given:
            raise reason
        counts = count_by_torch(Parts(net), image)
    except Exception as error:
        height, width = image.shape[-2:]
        raise ValueError(
            f"cannot count an image of {height} x {width} pixels through the network: {_first_line(error)}"
        ) from error
    why = _first_line(reason)
    if isinstance(reason, CannotTrace):
        why = f"torch.jit cannot trace this network ({why})"
    warnings.warn(
        f"{why}; torch's FlopCounterMode counted instead: products, convolutions and attention, but no normalisation, "
        "pooling or unknown operators",
        stacklevel=3,
    )
    return counts


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _totals(counts: Counts) -> dict[str, int]:
    return {name: part.total() for name, part in counts.items()}


def _of_static(exits: int, counts: Counts) -> int:
    """Add up the embedding, all blocks, and the backbone's own head."""
    last = f"heads.{exits - 1}"
    return sum(part.total() for name, part in counts.items() if name in ("embed", last) or name.startswith("begins."))


def up_to_each_exit(exits: int, counts: Mapping[str, int]) -> tuple[int, ...]:
    """Add up the parts on the way to each exit; a sample that exits does not complete the last stage."""
    total, totals = counts["embed"], []
    for k in range(exits):
        total += counts[f"begins.{k}"] + counts[f"heads.{k}"]
        totals.append(total)
        total += counts[f"completions.{k}"]
    return tuple(totals)


def _image(backbone: nn.Module, image_size: int | tuple[int, int] | None) -> Tensor:
    """Create a black image (1, channels, height, width), or a clip, on the backbone's device.

    Its size is the given one, else the size for which the backbone was built, else the size of its pretrained weights.
    """
    if image_size is None:
        built = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
        config = getattr(backbone, "pretrained_cfg", None) or {}
        image_size = built or built_for(backbone) or config.get("input_size", (None,))[1:]
        if not image_size:
            raise ValueError("the image size of the backbone is unknown; pass image_size=224, for example")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1:
        raise ValueError(f"image_size={image_size} must be at least 1 pixel; give one number or (height, width)")
    image = next(backbone.parameters()).new_zeros(1, *input_shape(backbone, height, width))
    if image.is_meta:
        raise ValueError("the network is on the meta device, where nothing can be traced; move it to a real device")
    return image


@contextmanager
def _undisturbed(net: nn.Module) -> Iterator[None]:
    """Switch to evaluation without gradients inside the context; restore modes, hooks and compiled calls afterwards."""
    modules = list(net.modules())
    modes = [module.training for module in modules]
    hooks = [(set(module._forward_pre_hooks), set(module._forward_hooks)) for module in modules]
    compiled = [(module, module._compiled_call_impl) for module in modules if module._compiled_call_impl is not None]
    with torch.no_grad():
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
                # fvcore removes its hooks only after a trace without errors.
                for key in set(module._forward_pre_hooks) - before:
                    del module._forward_pre_hooks[key]
                for key in set(module._forward_hooks) - after:
                    del module._forward_hooks[key]


def _without_exits(net: ExitNet) -> ExitNet:
    """Return the static network of the same backbone and adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the classifier is frozen was said when the network was built
        return ExitNet(net.backbone, exit_depths=[], freeze=False).eval()
