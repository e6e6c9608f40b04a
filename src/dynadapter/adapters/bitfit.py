"""BitFit: train the biases of the backbone, without cost once merged."""

from dataclasses import dataclass

from torch import Tensor, nn

from dynadapter.adapters.affine import AffineLayer, check_no_dropout, is_affine
from dynadapter.adapters.base import AdapterSpec, parameter


class BitFitLayer(AffineLayer):
    """``y + s * shift`` for the base layer's output y, which is the layer with the bias ``b + s * shift``.

    Args:
        base_layer: A linear layer, a convolution or a norm with a bias.
        spec: The adapter's configuration.

    Attributes:
        shift: (out,), what training adds to the bias.
    """

    def __init__(self, base_layer: nn.Module, spec: AdapterSpec) -> None:
        super().__init__(base_layer, spec)
        bias: Tensor = base_layer.bias  # type: ignore[assignment]
        self.shift = parameter(bias, len(bias))

    def offset(self) -> Tensor:
        return self.scale * self.shift


@dataclass(frozen=True, kw_only=True)
class BitFit(AdapterSpec):
    """Train only the biases; once merged, it adds no cost.

    Source: Ben Zaken et al. 2022, BitFit (arXiv 2106.10199). The trained tensor is the change of the bias, so weight
        decay pulls towards the backbone's bias (ours). Biases that belong to no layer stay frozen, such as the biases
        of q and v in EVA-02 and Swin v2.

    Args:
        targets: Patterns of linear layers, convolutions and norms; empty means all that have a bias, except the
            classifier.
    """

    takes = "a linear layer, a convolution or a norm with a bias"
    places = ("*",)

    def __post_init__(self) -> None:
        check_no_dropout(self)
        super().__post_init__()

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the layer has a bias."""
        return is_affine(layer) and getattr(layer, "bias", None) is not None

    def wrap(self, model: nn.Module, name: str) -> BitFitLayer:
        """Build the wrapper of one layer."""
        return BitFitLayer(model.get_submodule(name), self)
