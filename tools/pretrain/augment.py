"""Augmentation of batches on the device, each image by its own random numbers."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.pretrain.recipe import DEVIATION, MEAN, Recipe


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Draw a number for each image, (batch, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Augment bytes (batch, 3, size, size) and return normalised floats of that shape."""
    x = crop(images.float() / 255, recipe.area, recipe.tilt)
    x = jitter(x, recipe.jitter) if recipe.jitter else x
    x = simple_ops(x, recipe.ops) if recipe.ops else x
    x = normalize(x)
    return erase(x, recipe.erase) if recipe.erase else x


def normalize(x: Tensor) -> Tensor:
    """Normalise images in [0, 1]."""
    return (x - MEAN) / DEVIATION


def crop(x: Tensor, area: float, tilt: float) -> Tensor:
    """Crop at random, resize back, mirror half of the images and rotate half of them, by one affine map each."""
    share, ratio = uniform(x, area, 1), uniform(x, math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    left, top = uniform(x, -1, 1) * (1 - width), uniform(x, -1, 1) * (1 - height)
    width = torch.where(uniform(x, 0, 1) < 0.5, -width, width)
    angle = uniform(x, -1, 1) * math.radians(tilt) * (uniform(x, 0, 1) < 0.5)
    sin, cos = angle.sin(), angle.cos()
    maps = torch.stack([cos * width, -sin * height, left, sin * width, cos * height, top], -1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """Return the brightness of each pixel, (batch, 1, height, width)."""
    red, green, blue = x.split(1, dim=1)  # no tensor of factors: copying it would make a GPU wait
    return 0.299 * red + 0.587 * green + 0.114 * blue


def jitter(x: Tensor, most: float) -> Tensor:
    """Change brightness, saturation and contrast by factors around 1."""
    x = x * uniform(x, 1 - most, 1 + most)
    tone = grey(x)
    x = tone + (x - tone) * uniform(x, 1 - most, 1 + most)
    level = tone.mean((2, 3), keepdim=True)
    return (level + (x - level) * uniform(x, 1 - most, 1 + most)).clamp(0, 1)


def simple_ops(x: Tensor, share: float) -> Tensor:
    """Make a third of the share grey, solarise a third and blur a third (the three operations of DeiT III)."""
    kind = uniform(x, 0, 3 / share).floor()
    x = torch.where(kind == 0, grey(x), x)
    x = torch.where((kind == 1) & (x > 0.5), 1 - x, x)
    return torch.where(kind == 2, F.avg_pool2d(F.pad(x, [1] * 4, mode="reflect"), 3, 1), x)


def boxes(x: Tensor, area: Tensor, ratio: Tensor) -> Tensor:
    """Draw a rectangle for each image, cut off at the border: (batch, 1, height, width), true inside."""
    height, width = (area * ratio).sqrt(), (area / ratio).sqrt()
    rows, columns = (torch.arange(n, device=x.device).add(0.5) / n for n in x.shape[2:])
    inside = (rows.view(1, 1, -1, 1) - uniform(x, 0, 1)).abs() < height / 2
    return inside & ((columns.view(1, 1, 1, -1) - uniform(x, 0, 1)).abs() < width / 2)


def erase(x: Tensor, share: float) -> Tensor:
    """Fill a rectangle of some images with noise."""
    box = boxes(x, uniform(x, 0.02, 0.25), uniform(x, -1.2, 1.2).exp())
    return torch.where(box & (uniform(x, 0, 1) < share), torch.randn_like(x), x)


def mix(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mix some images with their partner of the reversed batch, by mixup or by cutmix.

    Returns:
        The images, and the fraction (batch,) of itself that each kept.
    """
    alpha = x.new_full((len(x), 1, 1, 1), 0.8)
    weight = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
    cut = boxes(x, uniform(x, 0, 1), x.new_ones(()))
    kind = uniform(x, 0, 1)
    weight = torch.where(kind < share / 2, weight, torch.where(kind < share, (~cut).float(), 1.0))
    return x.flip(0).lerp(x, weight), weight.mean((1, 2, 3))
