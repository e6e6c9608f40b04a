"""VideoMAE: a ViT whose patches span several frames of a clip, in timm's blocks and under timm's registry.

A clip is (frames, channels, height, width). Every token attends to all others, across space and time.
"""

import math
import re
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dynadapter.backbones.cut import convert, frames


class TubeletEmbed(nn.Module):
    """Cut clips into blocks of a few frames by a patch, and project each to a token.

    Args:
        frames: Frames of a clip.
        tubelet_size: Frames of a block.
        img_size: Height and width of a frame in pixels.
        patch_size: Height and width of a block in pixels.
        in_chans: Channels of a frame.
        embed_dim: Channels of a token.
        bias: Add a bias to the projection.
        dynamic_img_pad: timm's setting for images of any size, which clips do not have.
        device: Of the tensors.
        dtype: Of the tensors.

    Attributes:
        grid_size: Tokens along time, height and width.
    """

    def __init__(
        self,
        frames: int,
        tubelet_size: int,
        *,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if tubelet_size < 1 or frames < 1 or frames % tubelet_size:
            raise ValueError(f"frames={frames} must be a multiple of tubelet_size={tubelet_size}")
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad does not fit clips; leave it out")
        self.frames, self.in_chans = frames, in_chans
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        block = (tubelet_size, *self.patch_size)
        clip = (frames, *self.img_size)
        self.grid_size = tuple(whole // part for whole, part in zip(clip, block, strict=True))
        self.num_patches = math.prod(self.grid_size)
        self.proj = nn.Conv3d(
            in_chans, embed_dim, kernel_size=block, stride=block, bias=bias, device=device, dtype=dtype
        )

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips (batch, frames, channels, height, width) to tokens (batch, tokens, width), frame by frame."""
        wanted = (self.frames, self.in_chans, *self.img_size)
        if not torch.jit.is_tracing() and tuple(clips.shape[1:]) != wanted:
            raise ValueError(
                f"a batch has the shape {tuple(clips.shape)}, and the backbone takes clips "
                f"(batch, {', '.join(map(str, wanted))}): frames, channels, height and width"
            )
        # In the order of memory: timm's blocks round otherwise on another one, and are slower
        return self.proj(clips.transpose(1, 2)).flatten(2).transpose(1, 2).contiguous()


def positions(tokens: int, width: int) -> Tensor:
    """Return fixed embeddings (1, tokens, width): sines in even channels, cosines in odd ones.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), over the tokens of a clip in their order, as in VideoMAE.
    """
    channel = torch.arange(width, dtype=torch.float64, device="cpu")
    rates = 10_000 ** (-2 * (channel // 2) / width)
    angles = torch.arange(tokens, dtype=torch.float64, device="cpu")[:, None] * rates
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()[None]


class VideoMAE(VisionTransformer):
    """The encoder of VideoMAE (Tong et al. 2022, arXiv 2203.12602) as it is fine-tuned: mean of the tokens, then norm.

    Args:
        img_size: Height and width of a frame in pixels; the positions belong to this size.
        frames: Frames of a clip.
        tubelet_size: Frames of a token.
        settings: ``patch_size``, ``in_chans``, ``num_classes``, ``embed_dim``, ``depth``, ``num_heads`` and others of
            timm's ViT.
    """

    def __init__(self, img_size: int = 224, frames: int = 16, tubelet_size: int = 2, **settings: Any) -> None:
        super().__init__(
            img_size=img_size,
            embed_layer=partial(TubeletEmbed, frames, tubelet_size),
            class_token=False,
            global_pool="avg",
            pos_embed="none",
            no_embed_class=True,
            **settings,
        )
        del self.pos_embed  # None in timm's class
        self.register_buffer("pos_embed", positions(self.patch_embed.num_patches, self.embed_dim), persistent=False)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Refuse another size, for which the positions of a trained model mean nothing."""
        built = self.patch_embed.img_size[0]
        raise ValueError(f"the backbone takes clips of {built} pixels alone; leave the data's image_size out")


@frames.register
def _(model: VideoMAE) -> int:
    return model.patch_embed.frames


@convert.register
def _(model: VideoMAE, state: dict[str, Any]) -> dict[str, Tensor]:
    """Rename the tensors of a file of the release, or of transformers; the decoder of a pre-training is left out."""
    state = state.get("module", state)
    if any(name.startswith(("encoder.", "videomae.")) for name in state):
        parts = ("encoder.", "videomae.", "embeddings.", "layernorm.", "fc_norm.", "head.", "classifier.")
        state = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    renamed = {_timm_name(name): tensor for name, tensor in state.items()}
    _join_qkv(renamed)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("fc_norm.")}
    if not own.keys() & renamed.keys():  # of a pre-training, whose norm of single tokens goes, as in the release
        renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("norm.")} | own
    return renamed


NAMES = (
    (r"^(encoder(?!\.layer\.)|backbone|videomae)\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\.attention\.attention\.(q|v)_bias$", r".attn.\1_bias"),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.(weight|bias)$", r".attn.\1_\3"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)
"""What differs from timm's names in files of the release and of transformers, applied in this order."""


def _timm_name(name: str) -> str:
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name


def _join_qkv(state: dict[str, Tensor]) -> None:
    """Join the weights of q, k and v, and the biases of q and v, to timm's; the bias of k is zero, as it has none."""
    for name in [name for name in state if name.endswith(".attn.q_weight")]:
        start = name.removesuffix("q_weight")
        state[f"{start}qkv.weight"] = torch.cat([state.pop(f"{start}{part}_weight") for part in "qkv"])
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        start = name.removesuffix("q_bias")
        query, value = state.pop(name), state.pop(f"{start}v_bias")
        state[f"{start}qkv.bias"] = torch.cat([query, state.pop(f"{start}k_bias", torch.zeros_like(query)), value])


SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
"""Width, depth and heads of ViT-S, ViT-B, ViT-L and ViT-H."""
default_cfgs = generate_default_cfgs(
    {
        f"videomae_{size}_patch16_224": {
            "url": "",
            "num_classes": 400,
            "input_size": (3, 224, 224),
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for size in SIZES
    }
)
"""timm reads the preprocessing of its registry's models here. No weights are fetched: give a file."""


def _register(name: str, width: int, depth: int, heads: int) -> None:
    """Add the encoder of one size to timm's registry."""

    def create(pretrained: bool = False, **settings: Any) -> VideoMAE:
        sizes = {"patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads}
        return build_model_with_cfg(VideoMAE, name, pretrained, **(sizes | settings))

    create.__name__ = name
    register_model(create)


for size, numbers in SIZES.items():
    _register(f"videomae_{size}_patch16_224", *numbers)
