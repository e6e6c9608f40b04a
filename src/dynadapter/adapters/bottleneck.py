"""Adapters with a nonlinear bottleneck: sequential (Houlsby et al.) and parallel (AdaptFormer)."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter.adapters.base import (
    AdapterLayer,
    AdapterSpec,
    channels,
    check_choice,
    check_names,
    check_size,
    keeps_grid,
    matrices,
    parameter,
)
from dynadapter.adapters.lowrank import add_product, project


class BottleneckLayer(AdapterLayer):
    """A down-projection and an up-projection that starts at zero, both with biases.

    Args:
        base_layer: The layer of the backbone.
        spec: The adapter's configuration.
        width: Input channels of the down-projection.
        out: Output channels of the up-projection.
        bottleneck: Output channels of the down-projection.

    Attributes:
        down: (bottleneck, width).
        down_bias: (bottleneck,).
        up: (out, bottleneck).
        up_bias: (out,).
    """

    def __init__(self, base_layer: nn.Module, spec: AdapterSpec, width: int, out: int, bottleneck: int) -> None:
        super().__init__(base_layer, spec)
        like = next(base_layer.parameters())
        self.down = parameter(like, bottleneck, width)
        self.down_bias = parameter(like, bottleneck)
        self.up = parameter(like, out, bottleneck)
        self.up_bias = parameter(like, out)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def project_down(self, x: Tensor) -> Tensor:
        """Map tokens (..., width) to the bottleneck (..., bottleneck), before its activation."""
        return project(x, self.down, self.down_bias, self.channels_first)

    def add_up_projection(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Add the scaled up-projection of the bottleneck to ``x`` (..., out)."""
        return add_product(x, hidden, self.up, self.up_bias, self.scale, self.channels_first)


class SequentialLayer(BottleneckLayer):
    """``u + s * (up @ drop(gelu(down @ u + down_bias)) + up_bias)``, where u is the base layer's output."""

    kind = "Adapter"

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Map the base layer's input to its adapted output; ``context`` passes an attention mask through."""
        x = self.base_layer(x, **context)
        return self.add_up_projection(x, self.dropout(F.gelu(self.project_down(x))))


@dataclass(frozen=True, kw_only=True)
class Adapter(AdapterSpec):
    """Sequential adapter: a bottleneck with GELU after the MLP, or after attention and after the MLP.

    Sources: Houlsby et al. 2019 (arXiv 1902.00751) for both places; papers on vision transformers use only the place
        after the MLP. The down-projection is initialised like ``nn.Linear``, every other tensor with zeros (ours).

    Args:
        bottleneck: Channels of the bottleneck.
        placement: ``mlp``, or ``houlsby`` for a second adapter after attention.
        targets: Patterns of linear layers, 1x1 convolutions, MLPs or attentions; empty means the layers of
        ``placement``.
    """

    bottleneck: int = 8
    placement: Literal["mlp", "houlsby"] = "mlp"

    takes = "an nn.Linear, an nn.Conv2d in one group, or a module that holds matrices, such as an MLP"
    once_a_block = True

    def __post_init__(self) -> None:
        check_size("bottleneck", self.bottleneck)
        check_choice("placement", self.placement, "mlp", "houlsby")
        super().__post_init__()

    @property
    def places(self) -> tuple[str, ...]:
        """After the MLP of each block, and after its attention."""
        after_attention = ("*.attn.proj",) if self.placement == "houlsby" else ()
        return (*after_attention, "*blocks.*.mlp")

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the layer or one of its children is a matrix."""
        return bool(matrices(layer))

    def wrap(self, model: nn.Module, name: str) -> SequentialLayer:
        """Build the wrapper of one layer."""
        layer = model.get_submodule(name)
        _, out = channels(layer)
        return SequentialLayer(layer, self, out, out, self.bottleneck)


class ParallelLayer(BottleneckLayer):
    """``layer(norm(x)) + s * (up @ drop(relu(down @ x + down_bias)) + up_bias)``, where x is not normalised.

    The block calls its norm before the layer, so the layer never receives x. The wrapper therefore takes over the norm
    and puts an identity in its place.

    Args:
        base_layer: The layer of the backbone.
        norm: The norm that the block applies before this layer.
        norm_name: The norm's full name in the model; empty if the layer's input is not normalised.
        spec: The adapter's configuration.
        bottleneck: Channels of the bottleneck.
    """

    kind = "AdaptFormer"
    base_parts = ("base_layer", "norm")

    def __init__(
        self, base_layer: nn.Module, norm: nn.Module, norm_name: str, spec: AdapterSpec, bottleneck: int
    ) -> None:
        super().__init__(base_layer, spec, *channels(base_layer), bottleneck)
        self.norm = norm
        self.norm_name = norm_name

    def install(self, model: nn.Module, name: str) -> None:
        """Replace the layer with this wrapper and the norm with an identity."""
        super().install(model, name)
        if self.norm_name:
            model.set_submodule(self.norm_name, nn.Identity())

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """Map the norm's input to the adapted output; ``context`` passes an attention mask through."""
        y = self.base_layer(self.norm(x), **context)
        return self.add_up_projection(y, self.dropout(F.relu(self.project_down(x))))


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(AdapterSpec):
    """Parallel adapter: a bottleneck with ReLU beside the norm and the MLP, on tokens that are not normalised.

    Source: Chen et al. 2022, AdaptFormer (arXiv 2205.13535). If the block scales its MLP's output (LayerScale in
    DINOv2, gamma in ConvNeXt) or normalises it (Swin v2), it does the same to the update (ours). Beside a convolution
    the bottleneck reads the convolution's own input.

    Args:
        bottleneck: Channels of the bottleneck.
        norms: Possible names of the norm; the first one that the block has before its target is used. A norm after the
            target normalises the output; then the target's input is not normalised.
        targets: Patterns of layers that directly follow their norm; empty means the blocks' MLPs.
    """

    scale: float = 0.1
    dropout: float = 0.1
    bottleneck: int = 64
    norms: tuple[str, ...] = ("norm2", "norm")

    takes = f"{Adapter.takes}; a convolution must keep the number of pixels"
    places = ("*blocks.*.mlp",)
    once_a_block = True

    def __post_init__(self) -> None:
        check_size("bottleneck", self.bottleneck)
        check_names("norms", self.norms, "norm2")
        super().__post_init__()

    def fits(self, layer: nn.Module) -> bool:
        """Check whether the layer or one of its children is a matrix, or it is a convolution that keeps the grid."""
        return keeps_grid(layer)

    def wrap(self, model: nn.Module, name: str) -> ParallelLayer:
        """Build the wrapper of one layer.

        Raises:
            ValueError: If the block has no norm of these names.
        """
        block_name, _, key = name.rpartition(".")
        children = [child for child, _ in model.get_submodule(block_name).named_children()]
        layer, before = model.get_submodule(name), children[: children.index(key)]
        norm = next((norm for norm in self.norms if norm in before), None)
        after = norm is None and any(norm in children for norm in self.norms)  # a block that normalises after its MLP
        if after or isinstance(layer, nn.Conv2d):
            return ParallelLayer(layer, nn.Identity(), "", self, self.bottleneck)
        if norm is None:
            raise ValueError(
                f"AdaptFormer finds none of norms={self.norms} beside {name}; its block holds {', '.join(children)}; "
                "name the norm that feeds it, if there is one"
            )
        norm_name = f"{block_name}.{norm}".lstrip(".")
        return ParallelLayer(layer, model.get_submodule(norm_name), norm_name, self, self.bottleneck)
