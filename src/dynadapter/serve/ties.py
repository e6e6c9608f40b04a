"""Find images for which rounding decides which tokens are merged: two correct programs can compute different logits."""

from typing import Any

import torch
from torch import Tensor

from dynadapter.exits.net import ExitNet
from dynadapter.exits.token_merging import TokenMerging, smallest_gap

TIE = 1e-5
"""Difference of two similarities, in [-1, 1], that rounding can turn round after some blocks in float32."""


class _Watched:
    """Token merging that records the smallest gap of each image."""

    def __init__(self, merging: TokenMerging) -> None:
        self.after, self.proportional, self.merging = merging.after, merging.proportional, merging
        self.gaps: list[Tensor] = []

    def __call__(self, x: Tensor, prefix: int, logs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.gaps.append(smallest_gap(x, int(self.merging.share * (x.shape[1] - prefix)), prefix))
        return self.merging(x, prefix, logs)


@torch.no_grad()
def tied_images(net: ExitNet, images: Tensor, batch_size: int = 32) -> Tensor:
    """Find the images with a tie in token merging.

    Returns:
        (images,) bool, on the CPU.
    """
    merging: Any = net.token_merging
    if merging is None:
        return torch.zeros(len(images), dtype=torch.bool)
    tied = []
    try:
        for part in images.split(batch_size):
            watched: Any = _Watched(merging)
            net.token_merging = watched
            net(part)
            tied.append((torch.stack(watched.gaps).amin(0) < TIE).cpu())
    finally:
        net.token_merging = merging
    return torch.cat(tied)
