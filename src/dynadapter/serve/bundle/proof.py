"""Merge adapters into the backbone and compare the merged network with the trained one on real images."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy, read_off
from dynadapter.serve.ties import tied_images


@dataclass(frozen=True)
class MergeProof:
    """Result of comparing a merged network with the unmerged one.

    Args:
        images: Number of images.
        difference: Largest difference of two logits as a fraction of the exit's largest logit, over all exits.
        tolerance: The largest difference that was allowed.
        policy: Name of the policy for which exits and classes of all images agree.
    """

    images: int
    difference: float
    tolerance: float
    policy: str


def merged_copy(net: ExitNet, images: Tensor, policy: Policy, tolerance: float = 1e-4) -> tuple[ExitNet, MergeProof]:
    """Merge the adapters of a copy into its backbone, in float64, and check that its predictions are the same.

    Args:
        net: The network; it is left as it is.
        images: Preprocessed images of the task (images, channels, height, width), or clips, on the network's device.
        policy: The policy that the network will be used with: each image must stop at the same exit.
        tolerance: Largest allowed difference, of each merged layer on random tokens (relative, Frobenius norm) and of
            the logits of each exit on the images (relative to the exit's largest logit).

    Returns:
        The merged network in evaluation mode, and the proof.

    Raises:
        ValueError: A kind of adapter cannot be merged, there are no images, or the networks differ.

    Source: ours; per layer Hu et al. 2021 (LoRA) and Luo et al. 2023 (RepAdapter).
    """
    policy.check(net.num_exits)
    if images.ndim not in (4, 5) or not len(images):
        raise ValueError(
            f"the images to compare on have shape {tuple(images.shape)}; give some of the task's, preprocessed, as "
            "(images, channels, height, width)"
        )
    merged = copy.deepcopy(net).eval()
    before = _logits(merged, images)  # (exits, images, classes), still with adapters
    merged.merge(tolerance)
    after = _logits(merged, images)
    tied = tied_images(net, images)
    largest = before.double().abs().amax((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)
    by_image = (after.double() - before.double()).abs().amax(2) / largest[:, None]
    by_image[:, tied & (by_image.amax(0) > tolerance)] = 0  # judged by exit and class alone
    differences = by_image.amax(1).tolist()
    for k, difference in enumerate(differences):
        if not difference <= tolerance:  # NaN is above any tolerance
            raise ValueError(
                f"merging the adapters changes the logits of exit {k + 1} by {difference:.1e} of the largest on "
                f"{len(images)} images, more than tolerance={tolerance:.0e}; keep the adapters, merge in float32, or "
                "allow more"
            )
    first, second = read_off(policy, before), read_off(policy, after)
    changed = (first.exit_index != second.exit_index) | (first.logits.argmax(-1) != second.logits.argmax(-1))
    if changed.any():
        image = int(changed.nonzero()[0, 0])
        why = ", with a tie in token merging" if tied[image] else ""
        raise ValueError(
            f"merging the adapters changes exit or class of {int(changed.sum())} of {len(images)} images under "
            f"{policy.name} (the first is image {image}{why}); keep the adapters, or move thresholds away from their "
            "scores"
        )
    return merged, MergeProof(len(images), max(differences), tolerance, policy.name)


@torch.no_grad()
def _logits(net: ExitNet, images: Tensor) -> Tensor:
    return torch.cat([net(batch).cpu() for batch in images.split(32)], dim=1)
