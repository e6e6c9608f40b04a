"""Read and check the batches of a loader: images, and class indices or file names."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynadapter.training.losses import IGNORED
from dynadapter.training.processes import is_distributed


def named_images(batch: Any, clips: bool = False) -> tuple[Tensor, list[str | None]]:
    """Return the images of a batch, and the name of each image's file.

    Args:
        batch: Images ``(batch, channels, height, width)``, alone or first in a sequence. The second part are file
            names, or class indices ``(batch,)``, which are ignored.
        clips: Whether the network takes clips ``(batch, frames, channels, height, width)`` instead of images.

    Returns:
        The images, and for each image its name, "" without names, or None for padding.
    """
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, Sequence) else []
    if not parts or not isinstance(parts[0], Tensor) or parts[0].dim() != 4 + clips:
        wanted = (
            "clips (batch, frames, channels, height, width)" if clips else "images (batch, channels, height, width)"
        )
        raise ValueError(
            f"a batch to predict is {_kind(batch)}; give {wanted}, alone or followed by file names or class indices"
        )
    images, second = parts[0], parts[1] if len(parts) > 1 else None
    if isinstance(second, Sequence) and all(isinstance(name, str) for name in second):
        return images, list(second)
    if isinstance(second, Tensor) and is_distributed():
        return images, [None if label == IGNORED else "" for label in second.reshape(len(images), -1)[:, 0].tolist()]
    return images, [""] * len(images)


def require_classes(targets: Tensor, classes: int) -> None:
    """Raise a ValueError if a class index ``(batch,)`` is out of range for the number of classes."""
    wrong = targets[(targets < 0) | (targets >= classes)]
    if len(wrong):
        raise ValueError(
            f"label {wrong[0].item()} in a batch; this model has classes 0 to {classes - 1}; correct the labels, or "
            "give the model more classes"
        )


def _kind(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    inside = ", ".join(type(part).__name__ for part in batch) if isinstance(batch, list | tuple) else ""
    return f"a {type(batch).__name__}{f' of {inside}' if inside else ''}"
