"""Images are read with the mean, deviation and size of a backbone's pre-training, as timm's configuration has them."""

from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
import yaml
from PIL import Image
from timm.models import get_pretrained_cfg

from dynadapter.backbones import own_preprocessing
from dynadapter.data import Shapes

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = {
    preset: (model["backbone"], model.get("image_size"))
    for preset in ("vtab", "mae", "dinov2", "clip", "swin", "convnext")
    for model in [yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())["model"]]
}
OTHERS = (
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224.dino",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_clip_224.openai",
    "vit_base_patch16_siglip_224.webli",
    "vit_small_patch14_reg4_dinov2.lvd142m",
)


@pytest.mark.parametrize(("name", "size"), [*PRESETS.values(), *((name, None) for name in OTHERS)])
def test_images_are_read_as_in_pretraining(name, size):
    with torch.device("meta"):
        backbone = timm.create_model(name, **({"img_size": size} if size else {}))
    data = Shapes()
    data.take_preprocessing(own_preprocessing(backbone, name, size), trained=False)
    expected = get_pretrained_cfg(name)
    pixels = size or expected.input_size[-1]
    assert data.image_size == pixels
    transform = timm.data.create_transform(
        (3, pixels, pixels), mean=expected.mean, std=expected.std, interpolation=expected.interpolation, crop_pct=1.0
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8))
    torch.testing.assert_close(torch.from_numpy(data.preprocess(image)), transform(image))


@pytest.mark.parametrize("name", [name for name, _ in PRESETS.values()])
def test_presets_name_weights(name):
    assert "." in name
    assert get_pretrained_cfg(name).has_weights
