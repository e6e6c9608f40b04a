"""Small networks of three families whose exits differ, and the options of an export."""

from collections.abc import Callable
from typing import Any

import torch
from conftest import CLASSES, make_convnext, make_swin, make_vit
from torch import Tensor, nn

from dynadapter.adapters import AdapterSpec, adapter_layers, inject
from dynadapter.exits.exit_tokens import ExitTokens
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence
from dynadapter.images.preprocess import Preprocess

SIZE = 32
POLICY = Confidence(0.7)
NAMES = [f"class {i}" for i in range(CLASSES)]


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def spread(net: ExitNet) -> ExitNet:
    """Give the heads logits that differ from image to image, as after training."""
    last = net.backbone.get_classifier()
    for head, logits in zip([*net.heads, last], net(noise(32, 9)), strict=True):
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            layer.weight *= 2 / logits.std(0)[:, None]
        layers[-1].bias -= 2 * logits.mean(0) / logits.std(0)
    return net.eval()


def network(backbone: nn.Module, every: int = 1, exit_depths: list[int] | None = None) -> ExitNet:
    torch.manual_seed(0)
    return spread(ExitNet(backbone, LinearHeads(), every, exit_depths).eval())


def adapted(*specs: AdapterSpec, exit_depths: list[int] | None = None) -> ExitNet:
    """Return a ViT of two blocks whose adapters change its logits."""
    backbone = make_vit(depth=2)
    for spec in specs:
        inject(backbone, spec)
    generator = torch.Generator().manual_seed(1)
    for layer in adapter_layers(backbone).values():
        for name, tensor in layer.named_parameters():
            if not name.startswith("base_layer."):
                nn.init.normal_(tensor, std=0.05, generator=generator)
    return network(backbone, exit_depths=exit_depths)


NETWORKS: dict[str, Callable[[], ExitNet]] = {
    "vit": lambda: network(make_vit(depth=2)),
    "exit tokens": lambda: spread(ExitNet(make_vit(depth=2), ExitTokens(count=2, rank=2), every=1).eval()),
    "swin": lambda: network(make_swin(depths=(1, 2), num_heads=(2, 2)), exit_depths=[1]),
    "convnext": lambda: network(make_convnext(depths=(1, 1, 1, 1)), every=2),
}


def options(**changes: Any) -> dict[str, Any]:
    return {"policy": POLICY, "class_names": NAMES, "preprocess": Preprocess(SIZE)} | changes
