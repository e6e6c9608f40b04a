"""Two counts of multiply-adds that share nothing with dynadapter.cost: formulas by hand, torch's FlopCounterMode."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynadapter.exits.net import ExitNet

HIDDEN = 64  # of the MLP heads


@dataclass(frozen=True)
class ViT:
    """Patches, then equal blocks over all tokens; ``latent``: at the end one learned token attends to all others."""

    width: int
    patch: int = 16
    prefix: int = 1
    latent: bool = False
    mlp: int = 4
    depth: int = 12

    def parts(self, side: int) -> tuple[int, list[int], int, list[int]]:
        patches = (side // self.patch) ** 2
        tokens, d = patches + self.prefix, self.width
        embed = patches * 3 * self.patch**2 * d
        block = tokens * (3 * d * d + d * d + 2 * self.mlp * d * d) + 2 * tokens * tokens * d
        # q and proj of the latent, k and v of all tokens, two products, an MLP on the latent
        finish = 2 * d * d + tokens * 2 * d * d + 2 * tokens * d + 2 * self.mlp * d * d if self.latent else 0
        return embed, [block] * self.depth, finish, [d] * self.depth


@dataclass(frozen=True)
class Swin:
    """Attention inside windows; between stages a linear layer merges four tokens into one of twice the width."""

    width: int
    depths: tuple[int, ...]
    window: int = 7
    patch: int = 4

    def parts(self, side: int) -> tuple[int, list[int], int, list[int]]:
        tokens, d = (side // self.patch) ** 2, self.width
        embed = tokens * 3 * self.patch**2 * d
        blocks, widths = [], []
        for stage, depth in enumerate(self.depths):
            merging = 0
            if stage:
                tokens //= 4
                merging, d = tokens * 4 * d * 2 * d, 2 * d
            block = tokens * 12 * d * d + 2 * tokens * self.window**2 * d
            blocks += [merging + block] + [block] * (depth - 1)
            widths += [d] * depth
        return embed, blocks, 0, widths


@dataclass(frozen=True)
class ConvNeXt:
    """A depthwise 7x7 convolution and an MLP a block; 2x2 convolutions with stride 2 between stages."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    patch: int = 4

    def parts(self, side: int) -> tuple[int, list[int], int, list[int]]:
        places = (side // self.patch) ** 2
        embed = places * 3 * self.patch**2 * self.widths[0]
        blocks, widths = [], []
        for stage, (d, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            downsample = 0
            if stage:
                places //= 4
                downsample = places * 4 * self.widths[stage - 1] * d
            block = places * (49 * d + 8 * d * d)
            blocks += [downsample + block] + [block] * (depth - 1)
            widths += [d] * depth
        return embed, blocks, 0, widths


# Ten models of three families; all at 224 pixels.
MODELS: dict[str, ViT | Swin | ConvNeXt] = {
    "vit_tiny_patch16_224": ViT(192),
    "vit_small_patch16_224": ViT(384),
    "vit_base_patch16_224": ViT(768),
    "deit3_small_patch16_224": ViT(384),
    "vit_small_patch14_reg4_dinov2": ViT(384, patch=14, prefix=5),
    "vit_base_patch16_siglip_224": ViT(768, prefix=0, latent=True),
    "swin_tiny_patch4_window7_224": Swin(96, (2, 2, 6, 2)),
    "swin_small_patch4_window7_224": Swin(96, (2, 2, 18, 2)),
    "convnext_tiny": ConvNeXt((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnextv2_atto": ConvNeXt((40, 80, 160, 320), (2, 2, 6, 2)),
}
SIDE = 224


def build(name: str, classes: int = 100) -> nn.Module:
    """Create a timm model with all weights zero; a trace and a counter read only shapes."""
    size = {"img_size": SIDE} if "dinov2" in name else {}  # made for 518 pixels
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes, **size)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model


def by_hand(architecture: ViT | Swin | ConvNeXt, exits: tuple[int, ...], classes: int = 100) -> list[int]:
    """Count products, convolutions and attention up to each exit, with the Balanced heads on the way."""
    embed, blocks, finish, widths = architecture.parts(SIDE)
    stages = [sum(blocks[start:end]) for start, end in pairwise((0, *exits))]
    stages[0] += embed
    for k, blocks_so_far in enumerate(exits):
        width = widths[blocks_so_far - 1]
        mlp = k < len(exits) // 2 and k < len(exits) - 1
        stages[k] += width * HIDDEN + HIDDEN * classes if mlp else width * classes
    stages[-1] += finish
    return list(accumulate(stages))


def by_torch(net: ExitNet, side: int = SIDE) -> list[int]:
    """Count the same in an eager run by torch's own counter, which is read at each exit."""
    weight = next(net.backbone.parameters())
    images = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
    counts = []
    with torch.no_grad(), counting() as counter:
        x = net.embed(images)
        for k in range(net.num_exits):
            x = net.stage(k, x)
            net.head(k, x)
            counts.append(halved(counter))
    return counts


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Start torch's counter, with formulas that it lacks: products in place, and before 2.15 attention on a CPU."""

    def addmm(_, left, right, out_shape=None, **__) -> int:
        return 2 * left[0] * left[1] * right[1]

    def baddbmm(_, left, right, out_shape=None, **__) -> int:
        return 2 * left[0] * left[1] * left[2] * right[2]

    def attention(query, key, value, *_, out_shape=None, **__) -> int:
        (batch, heads, rows, width), (columns, out) = query, value[-2:]
        return 2 * batch * heads * rows * columns * (width + out)

    lacking = {torch.ops.aten.addmm_: addmm, torch.ops.aten.baddbmm_: baddbmm}
    lacking[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = attention
    with FlopCounterMode(display=False, custom_mapping=lacking) as counter:
        yield counter


def halved(counter: FlopCounterMode) -> int:
    """Return multiply-adds; torch counts each as 2 FLOPs."""
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2
