"""SSF: a learned factor and offset for each channel after every layer, without cost once merged."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from dynadapter.adapters.affine import TAKES, AffineLayer, check_no_dropout, is_affine
from dynadapter.adapters.base import AdapterSpec, parameter


class SSFLayer(AffineLayer):
    """``y + s * (gain * y + shift)`` for the base layer's output y.

    Args:
        base_layer: A linear layer, a convolution or a norm.
        spec: The adapter's configuration.

    Attributes:
        gain: (out,).
        shift: (out,), or None if the base layer has no bias into which it could be merged.
    """

    def __init__(self, base_layer: nn.Module, spec: "SSF") -> None:
        super().__init__(base_layer, spec)
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        self.gain = nn.init.normal_(parameter(weight, len(weight)), std=spec.std)
        self.shift = None
        if getattr(base_layer, "bias", None) is not None:
            self.shift = nn.init.normal_(parameter(weight, len(weight)), std=spec.std)

    def factor(self) -> Tensor:
        return 1 + self.scale * self.gain

    def offset(self) -> Tensor | None:
        return None if self.shift is None else self.scale * self.shift


@dataclass(frozen=True, kw_only=True)
class SSF(AdapterSpec):
    """Scale and shift the channels of every layer's output; once merged, it adds no cost.

    Source: Lian et al. 2022, SSF (arXiv 2210.08823), where factors start at N(1, 0.02) and offsets at N(0, 0.02), so
    injection changes the output a little. A layer without a bias gets only factors (ours).

    Args:
        std: Standard deviation of both at the start; 0 keeps the output exactly.
        targets: Patterns of linear layers, convolutions and norms; empty means all except the classifier.
    """

    std: float = 0.02

    takes = TAKES
    places = ("*",)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"std={self.std} must be a finite number of at least 0; 0 starts as the identity")
        check_no_dropout(self)
        super().__post_init__()

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the layer's output can be scaled by its weight."""
        return is_affine(layer)

    def wrap(self, model: nn.Module, name: str) -> SSFLayer:
        """Build the wrapper of one layer."""
        return SSFLayer(model.get_submodule(name), self)
