"""Early exits of random sub-networks that learn from the whole network's last exit: structured dropout, distilled."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynadapter import Distillation, ExitNet
from dynadapter.spec import Spec


@dataclass(frozen=True)
class StructuredDropout(Spec):
    """Adds what the early exits of random sub-networks have yet to learn from the whole network's last exit.

    A part of the batch goes through the backbone once more, as far as the last early exit, and each image through a
    sub-network of its own: whole attention heads and whole hidden units of the MLPs are left out, for all tokens alike.
    A stage in front of many exits, whose gradients meet there, loses more of them than one in front of few.

    Source: EnViT (Dong et al., AAAI 2026), of which we know the abstract alone: the full model teaches its own virtual
    sub-models, which structured dropout makes, and that spares the late exits because the exits' gradients conflict
    less. Units, rates, the part of the batch and the loss are our choices.

    Args:
        rate: Share of the units that the first stage loses, in [0, 1); a stage loses by the number of early exits that
            it serves, the last stage none.
        weight: Of the divergence beside the other losses, 0 or more; it is weighed by exit as they are.
        part: Share of the batch that goes through the backbone again, above 0 and at most 1.
        temperature: Of both answers, above 0.

    Raises:
        ValueError: If one of them cannot be.
    """

    rate: float = 0.2
    weight: float = 1.0
    part: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate={self.rate} must be in [0, 1)")
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight} must be 0 or more")
        if not 0 < self.part <= 1:
            raise ValueError(f"part={self.part} must be in (0, 1]")
        Distillation(temperature=self.temperature)  # which checks it

    def rates(self, exits: int) -> list[float]:
        """Gives each stage's share of units to leave out.

        >>> StructuredDropout(rate=0.3).rates(4)[::3]
        [0.3, 0.0]
        """
        return [self.rate * (exits - 1 - k) / max(1, exits - 1) for k in range(exits)]

    def loss(self, net: ExitNet, images: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
        """Gives the loss to be added to that of the whole network.

        Nothing here waits for the device, so that a step with it can be recorded.

        Args:
            net: In training.
            images: (batch, channels, height, width), in random order.
            logits: The whole network's, (exits, batch, classes); it teaches, and gets no gradient from here.
            weights: The exits' (exits,).

        Returns:
            Scalar.

        Raises:
            ValueError: If the backbone has nothing that could be left out.
        """
        if net.num_exits == 1:
            return logits.new_zeros(())
        count = max(1, round(self.part * len(images)))
        with self.dropping(net):
            x, answers = net.embed(images[:count]), []
            for k in range(net.num_exits - 1):
                x = net.stage(k, x)
                answers.append(net.head(k, x))
        told = torch.stack([*answers, logits[-1, :count].detach()])
        apart = Distillation(share=1.0, temperature=self.temperature).mix(torch.zeros_like(weights), told)
        return self.weight * (weights[:-1] * apart[:-1]).sum()

    @contextmanager
    def dropping(self, net: ExitNet) -> Iterator[None]:
        """Lets every forward pass with gradients inside draw a sub-network for each image."""
        handles = []
        for k, rate in enumerate(self.rates(net.num_exits)):
            for layer, size in _readers(net, k) if rate else ():
                # bound now, not when the hook is called
                handles.append(layer.register_forward_pre_hook(lambda _, x, r=rate, s=size: (_without(x[0], r, s),)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _readers(net: ExitNet, k: int) -> list[tuple[nn.Module, int]]:
    """Lists the layers of a stage that read heads or hidden units, with how many channels such a unit has."""
    found = []
    for module in net.stage_modules(k):
        for part in module.modules():
            layers: Any = part
            if hasattr(part, "num_heads") and hasattr(part, "proj"):
                found.append((layers.proj, _inputs(layers.proj) // layers.num_heads))
            elif hasattr(part, "fc1") and hasattr(part, "fc2") and _inputs(layers.fc2):
                found.append((layers.fc2, 1))
    if not found:
        raise ValueError(f"a {type(net.backbone).__name__} has no attention heads and no MLP of linear layers to drop")
    return found


def _inputs(layer: nn.Module) -> int:
    """How many channels a linear layer reads, wrapped by an adapter or not; 0 for any other layer."""
    base = getattr(layer, "base_layer", layer)
    return base.in_features if isinstance(base, nn.Linear) else 0


def _without(x: Tensor, rate: float, size: int) -> Tensor:
    """Leaves units of so many channels out of (batch, ..., channels), each image's own; the rest makes up for them."""
    units = torch.rand(len(x), *[1] * (x.ndim - 2), x.shape[-1] // size, device=x.device) >= rate
    return x * units.repeat_interleave(size, -1).to(x.dtype) / (1 - rate)
