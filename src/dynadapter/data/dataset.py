"""Images of a split: decoded one by one, or decoded once and kept in memory as one tensor."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dynadapter.data.augment import Augmentation
from dynadapter.data.clips import Clip
from dynadapter.data.identity import image_keys
from dynadapter.data.library_images import LibraryImage
from dynadapter.data.normalize import normalize
from dynadapter.images.preprocess import Preprocess
from dynadapter.training.losses import IGNORED

Sample = tuple[Path | Image.Image | LibraryImage | Clip, int]
"""Where the pixels are, and the class index."""

Item = tuple[Tensor, int]

GPU_SHARE = 0.25
"""Fraction of a GPU's free memory that the cached images of a split may take."""


class ImageDataset(Dataset[Item]):
    """Images with their class indices, decoded one by one or, with `cache`, once.

    An item is requested by its index, or by its index and a random number that determines the augmentation. Without a
    number an image is not augmented.

    Args:
        samples: Pairs (file or image, class index).
        preprocess: Maps an image to pixels.
        flip: Mirror the images that are requested with an odd number.
        augment: Maps an image and its number to an augmented image; not possible with `cache`.
        cache: Keep all resized images in memory as bytes: 144 MiB for 1000 images of 224 px.

    Attributes:
        classes: Names of the class indices; empty if unknown.
        folder: The folder of all images; None if there is none.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        *,
        flip: bool = False,
        augment: Augmentation | None = None,
        cache: bool = False,
    ) -> None:
        self.preprocess = preprocess
        self.flip = flip
        self.augment = augment
        self.classes: list[str] = []
        self.folder: Path | None = None
        self._cache = cache and bool(samples)
        self._cached: Tensor | None = None
        self.relabel(samples)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The settings of `Preprocess` as plain values, to be stored with a model."""
        return asdict(self.preprocess)

    def image_keys(self, by: Literal["content", "path"] | None = None) -> tuple[Literal["content", "path"], Tensor]:
        """Return a number for each image, as :func:`~dynadapter.data.identity.image_keys` does."""
        return image_keys([source for source, _ in self.samples], by, self.folder)

    @property
    def cached(self) -> Tensor | None:
        """The resized images ``(samples, 3, size, size)`` uint8, decoded at the first use; None without `cache`."""
        if self._cache and self._cached is None:
            size, sources = self.preprocess.image_size, [source for source, _ in self.samples]
            cached = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
            with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
                for row, pixels in zip(cached, pool.map(self.pixels, sources), strict=True):
                    row.copy_(pixels)
            self._cached = cached
        return self._cached

    def relabel(self, samples: Sequence[Sample]) -> None:
        """Replace the samples by the same images with other class indices."""
        self.samples = samples
        labels = [label for _, label in samples]
        device = None if self._cached is None else self._cached.device
        self._targets = torch.tensor(labels, dtype=torch.int64, device=device)

    def pixels(self, source: Path | Image.Image | LibraryImage | Clip, number: int | None = None) -> Tensor:
        """Return the resized bytes of an image, ``(3, size, size)`` uint8; of clips: ``(frames, 3, size, size)``."""
        if isinstance(source, Clip):
            return torch.stack([torch.from_numpy(self.preprocess.pixels(frame)) for frame in source.read(number)])
        return torch.from_numpy(self.preprocess.read(source))

    def move_to(self, device: torch.device, room: int) -> None:
        """Move the cached images to a device if they take at most `room` bytes there."""
        cached = self.cached
        if cached is not None and cached.device != device and cached.nbytes <= room:
            self._cached = cached.to(device)
            self._targets = self._targets.to(device)

    def batch(self, indices: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a batch of cached images, equal to the stacked items.

        Args:
            indices: ``(batch,)`` int64, on the device of the images.
            numbers: ``(batch,)`` int64, the numbers that determine the augmentation; None for no augmentation.

        Returns:
            Images ``(batch, 3, size, size)`` float32 and class indices ``(batch,)`` int64.
        """
        cached = self.cached
        assert cached is not None
        pixels = cached.index_select(0, indices)
        if self.flip and numbers is not None:
            pixels = torch.where((numbers % 2 == 1)[:, None, None, None], pixels.flip(-1), pixels)
        return normalize(pixels, self.preprocess), self._targets.index_select(0, indices)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: int | tuple[int, int]) -> Item:
        index, number = item if isinstance(item, tuple) else (item, None)
        source, target = self.samples[index]
        if self.augment is not None and number is not None:
            if isinstance(source, Clip):  # the same number draws the same changes for all frames
                return torch.stack([self.augment(frame, number) for frame in source.read(number)]), target
            return self.augment(source, number), target
        cached = self.cached
        pixels = self.pixels(source, number) if cached is None else cached[index]
        if self.flip and number is not None and number % 2:
            pixels = pixels.flip(-1)
        return normalize(pixels, self.preprocess), target


class Padded(Dataset[Item]):
    """Images followed by padding samples up to a multiple of the number of processes.

    Every process then has the same number of batches, and no process waits for another. Padding samples repeat images
    and have the class `IGNORED`.

    Args:
        dataset: Images with class indices.
        multiple: Its length becomes a multiple of this.
    """

    def __init__(self, dataset: ImageDataset, multiple: int) -> None:
        self.dataset = dataset
        self.count = len(dataset)
        self.padded_count = -(-self.count // multiple) * multiple

    def image_keys(self, by: Literal["content", "path"] | None = None) -> tuple[Literal["content", "path"], Tensor]:
        """Return a number for each image, as :func:`~dynadapter.data.identity.image_keys` does."""
        return self.dataset.image_keys(by)

    @property
    def cached(self) -> Tensor | None:
        """The cached images without padding."""
        return self.dataset.cached

    def move_to(self, device: torch.device, room: int) -> None:
        """Move the cached images to a device if they take at most `room` bytes there."""
        self.dataset.move_to(device, room)

    def batch(self, indices: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a batch of cached images as :meth:`ImageDataset.batch` does, the padding with class `IGNORED`."""
        images, targets = self.dataset.batch(indices % self.count, numbers)
        return images, targets.masked_fill(indices >= self.count, IGNORED)

    def __len__(self) -> int:
        return self.padded_count

    def __getitem__(self, index: int) -> Item:
        if index < self.count:
            return self.dataset[index]
        if index >= self.padded_count:
            raise IndexError(index)
        return self.dataset[index % self.count][0], IGNORED


def collate(items: list[Item]) -> tuple[Tensor, Tensor]:
    """Stack items to images ``(batch, 3, size, size)`` or clips, and class indices ``(batch,)`` int64."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(targets)


def room_on(device: torch.device) -> int:
    """Return how many bytes of images may be kept on a device: any number in main memory, none on unknown devices."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return sys.maxsize if device.type == "cpu" else 0
