"""Normalise a batch of pixels with torch, on its device."""

import torch
from torch import Tensor

from dynadapter.images.preprocess import Preprocess


def normalize(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Return pixels as normalised floats, bit-equal to :meth:`~dynadapter.images.preprocess.Preprocess.normalize`.

    Args:
        pixels: ``(..., 3, size, size)`` uint8, on any device.
        preprocess: The preprocessing of these pixels.

    Returns:
        float32 of the same shape, on the same device.
    """
    mean, deviation = torch.tensor(preprocess.statistics, dtype=torch.float32, device=pixels.device)[..., None, None]
    # The same four steps in the same order as numpy's: each is rounded on its own, so the results are equal.
    return pixels.to(torch.float32).mul_(1 / 255).sub_(mean).div_(deviation)
