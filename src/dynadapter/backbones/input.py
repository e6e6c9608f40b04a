"""The images that a backbone takes: its own preprocessing, and another image size."""

from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dynadapter.backbones.cut import built_for, fixed_size, size_step
from dynadapter.backbones.packaged import find


def own_preprocessing(model: nn.Module, name: str, image_size: int | None = None) -> dict[str, Any]:
    """Return the preprocessing of a backbone's pre-training, from timm's ``pretrained_cfg`` or the package.

    Returns:
        ``image_size``, ``interpolation`` and ``normalization`` as :class:`~dynadapter.images.preprocess.Preprocess`
        takes them. Without a fixed position embedding the size is the one that timm names.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    packaged = find(name)
    own = dict(packaged.preprocess) if packaged is not None else {}
    statistics = [[float(value) for value in config.get(key) or ()] for key in ("mean", "std")]
    normalization = statistics if [len(values) for values in statistics] == [3, 3] else "imagenet"
    interpolation = config.get("interpolation")
    size = built_for(model) or image_size or own.get("image_size") or (config.get("input_size") or [224])[-1]
    return {
        "image_size": int(size),
        "interpolation": interpolation if interpolation in ("bicubic", "bilinear", "nearest") else "bicubic",
        "normalization": own.get("normalization", normalization),
    }


def set_image_size(model: nn.Module, image_size: int) -> None:
    """Make a ViT take images of another size.

    The position embedding is resampled from the one before the first call, unless it was loaded or trained since.

    Raises:
        ValueError: The family cannot change its size, or the patches do not cover the image.
    """
    built = fixed_size(model)
    if built in (None, image_size):
        return
    own: Any = model
    current: Any = getattr(model, "pos_embed", None)
    size, position, resampled = getattr(model, "_own_position", None) or (built, current, None)
    if resampled is not None and (
        current.is_meta or resampled.is_meta or not torch.equal(current, resampled.to(current))
    ):  # loaded or trained
        size, position = built, current
    # Other families have further tensors of one size, such as biases of relative positions
    if not isinstance(model, VisionTransformer | Eva) or image_size % size_step(model) or position is None:
        raise ValueError(
            f"image_size={image_size} does not fit the backbone, which was built for {size} pixels; give that, or "
            "leave it out"
        )
    position.data = position.data.to(own.pos_embed)
    prefix = own.num_prefix_tokens
    try:
        own.num_prefix_tokens = own.pos_embed.shape[1] - own.patch_embed.num_patches  # prompts have no position
        own.set_input_size(img_size=(size, size))
        own.pos_embed = position
        if image_size != size:
            own.set_input_size(img_size=(image_size, image_size))
        own._own_position = size, position, own.pos_embed.detach().clone()
    finally:
        own.num_prefix_tokens = prefix
