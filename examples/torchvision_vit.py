"""Register torchvision's Vision Transformer as a backbone family: `python examples/torchvision_vit.py`.

The five required functions are `embed`, `blocks`, `finish`, `tokens` and `widths`. This model has no `forward_head` and
no `get_classifier`, so `classify` and `classifier` are registered too. Such a network is built in Python only.
"""

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from dynadapter import ExitNet, LoRA, exit_costs, inject
from dynadapter.backbones import (
    blocks,
    classifier,
    classify,
    embed,
    finish,
    has_class_token,
    prefix_tokens,
    tokens,
    widths,
)


@embed.register
def _(model: VisionTransformer, images: Tensor) -> Tensor:
    x = model._process_input(images)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1)
    return model.encoder.dropout(x + model.encoder.pos_embedding)


@blocks.register
def _(model: VisionTransformer) -> list[tuple[nn.Module, ...]]:
    return [(layer,) for layer in model.encoder.layers]


@finish.register
def _(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.encoder.ln(x)


@tokens.register
def _(model: VisionTransformer, x: Tensor) -> Tensor:
    return x


@widths.register
def _(model: VisionTransformer) -> list[int]:
    return [model.hidden_dim] * len(model.encoder.layers)


@classify.register
def _(model: VisionTransformer, features: Tensor, logs: Tensor | None = None) -> Tensor:
    return model.heads(features[:, 0])


@classifier.register
def _(model: VisionTransformer) -> list[nn.Module]:
    return list(model.heads)


prefix_tokens.register(VisionTransformer, lambda model: 1)
has_class_token.register(VisionTransformer, lambda model: True)


def main() -> None:
    """Compare the last exit of a small network with torchvision's own forward, and count GMACs up to each exit."""
    sizes = {"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    backbone, images = VisionTransformer(**sizes, num_classes=10), torch.randn(2, 3, 64, 64)
    expected = backbone.eval()(images)
    # Its attention keeps q, k and v in one tensor, which no layer holds
    inject(backbone, LoRA(rank=4, targets=("*.mlp.0",)))
    net = ExitNet(backbone, every=2).eval()
    print(torch.equal(net(images)[-1], expected))  # prints True
    print(len(exit_costs(net, 64).macs))  # prints 2


if __name__ == "__main__":
    main()
