"""Compare an exported folder with the network from which it was exported."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy, read_off
from dynadapter.serve.runtime import Runner
from dynadapter.serve.ties import tied_images


def compare(
    runner: Runner, reference: ExitNet, policy: Policy, images: Tensor, tolerance: float
) -> tuple[Tensor, dict[str, Any]]:
    """Compare the logits of every exit and the exit of every image.

    Args:
        runner: The exported graphs.
        reference: The network, on the CPU in float32.
        policy: The policy that was exported.
        images: (images, 3, size, size) float32 on the CPU.
        tolerance: Largest difference of a logit; relative to the image's largest logit if that is above 1.

    Returns:
        The network's logits (exits, images, classes), and the manifest's entry ``check``.

    Raises:
        ValueError: A logit differs by more than the tolerance, or an image stops at another exit. For an image with a
            tie in token merging, only exit and class must be the same.
    """
    expected = _in_batches(reference, images)
    found = _in_batches(lambda part: torch.from_numpy(runner.every_exit(part.numpy())), images)
    if broken := int((~expected.isfinite().all(-1)).any(0).sum()):
        raise ValueError(
            f"the network's own logits are not finite for {broken} of {len(images)} images: its weights or these "
            "images are broken; nothing was written"
        )
    difference = (found - expected).abs().amax(-1) / expected.abs().amax(-1).clamp_min(1)
    odd = (difference.amax(0) > tolerance) & tied_images(reference, images)
    difference[:, odd] = 0  # judged by exit and class alone
    largest = difference.max().item()
    if not largest <= tolerance:  # NaN is above any tolerance
        exit = int(difference.amax(1).argmax()) + 1
        raise ValueError(
            f"the exported graphs' logits differ from the network's by {largest:.1e} at exit {exit}, more than "
            f"tolerance={tolerance:.0e}; nothing was written: set a larger tolerance or another opset, or keep the "
            "adapters apart (merge=False, --merge false)"
        )
    parts = [_routed(runner, part) for part in _batches(images)]
    logits, taken = (torch.cat(column) for column in zip(*parts, strict=True))
    right = read_off(policy, expected)
    other_exit = taken != right.exit_index
    if others := int((other_exit & ~odd).sum()):
        raise ValueError(
            f"{others} of {len(images)} images stop at another exit in the exported graphs than in the network, though "
            f"logits differ by {largest:.1e} at most: a score equals its threshold; nothing was written: move the "
            "threshold a little, or compare on other images"
        )
    changed = ((other_exit | (logits.argmax(-1) != right.logits.argmax(-1))) & odd).nonzero()[:, 0].tolist()
    if changed:
        raise ValueError(
            f"image {changed[0] + 1} of {len(images)} has a tie in token merging, where rounding decides which tokens "
            "are merged, and gets another exit or class in the exported graphs; nothing was written: leave that image "
            "out of the comparison, or train with another token_merging.share"
        )
    check = {"images": len(images), "largest_difference": largest, "tolerance": tolerance, "ties": int(odd.sum())}
    return expected, check


def quantization_change(
    runner: Runner, expected: Tensor, policy: Policy, images: Tensor, labels: Tensor | None
) -> dict[str, Any]:
    """Measure the effect of quantisation on predictions.

    Args:
        runner: The quantised graphs.
        expected: The network's logits (exits, images, classes).
        policy: The policy that was exported.
        images: (images, 3, size, size) float32 on the CPU.
        labels: Class indices (images,); None if unknown.

    Returns:
        For the manifest's entry ``quantization``: fractions of images, and exit shares from exit 1 on.
    """
    every = torch.arange(len(images))
    before = read_off(policy, expected)
    parts = [_routed(runner, part) for part in _batches(images)]
    logits, after = (torch.cat(column) for column in zip(*parts, strict=True))
    classes = {"float32": before.logits.argmax(-1), "int8": logits.argmax(-1)}
    measured = {
        "images": len(images),
        "same_exit": (before.exit_index == after).double().mean().item(),
        "same_class": (classes["float32"] == classes["int8"]).double().mean().item(),
        "mean_logit_difference": (logits - policy.combine(expected)[after, every]).abs().mean().item(),
        "exit_shares_float32": _shares(before.exit_index, len(expected)),
        "exit_shares_int8": _shares(after, len(expected)),
    }
    if labels is not None:
        measured |= {f"accuracy_{name}": (c == labels).double().mean().item() for name, c in classes.items()}
    return measured


def _batches(images: Tensor) -> list[Tensor]:
    """Split images into batches of 1, 3 and then 32, so that the graphs run at several sizes."""
    return [part for part in (images[:1], images[1:4], *torch.split(images[4:], 32)) if len(part)]


def _in_batches(logits: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits(part) for part in _batches(images)], dim=1)


def _routed(runner: Runner, images: Tensor) -> tuple[Tensor, Tensor]:
    logits, exit_index = runner.route(images.numpy())
    return torch.from_numpy(logits), torch.from_numpy(exit_index)


def _shares(exit_index: Tensor, num_exits: int) -> list[float]:
    shares: list[float] = (torch.bincount(exit_index, minlength=num_exits).double() / len(exit_index)).tolist()
    return shares
