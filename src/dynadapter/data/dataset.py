"""Images of a split: decoded one by one, or decoded once and kept in memory as one tensor."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dynadapter.data.normalize import normalize
from dynadapter.images.preprocess import Preprocess
from dynadapter.training.losses import IGNORED

Sample = tuple[Path | Image.Image, int | str]
"""Where the pixels are, and the class index; for predict the path instead of a class."""

Item = tuple[Tensor, int | str]


class ImageDataset(Dataset[Item]):
    """Images with their class indices or paths, decoded one by one or, with `cache`, once.

    An item is requested by its index, or by its index and a random number that decides about augmentation. Without a
    number an image is not augmented.

    Args:
        samples: Pairs (file or image, class index or path).
        preprocess: From image to tensor.
        flip: Mirror the images that come with an odd number.
        cache: Keep all resized images in memory as bytes: 147 MiB for 1000 images of 224 px.

    Attributes:
        cached: The resized images ``(samples, 3, size, size)`` uint8; None without `cache`.
    """

    def __init__(
        self, samples: Sequence[Sample], preprocess: Preprocess, *, flip: bool = False, cache: bool = False
    ) -> None:
        self.preprocess = preprocess
        self.flip = flip
        self.cached: Tensor | None = None
        self.relabel(samples)
        if cache and samples:
            self.cached = torch.empty(len(samples), 3, preprocess.image_size, preprocess.image_size, dtype=torch.uint8)
            with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
                for row, pixels in zip(self.cached, pool.map(self.pixels, [s for s, _ in samples]), strict=True):
                    row.copy_(pixels)

    def relabel(self, samples: Sequence[Sample]) -> None:
        """Replace the samples by the same images with other class indices."""
        self.samples = samples
        labels = [label for _, label in samples if isinstance(label, int)]
        device = None if self.cached is None else self.cached.device
        self._targets = torch.tensor(labels, dtype=torch.int64, device=device)

    def pixels(self, source: Path | Image.Image) -> Tensor:
        """Return the resized bytes of one image, ``(3, size, size)`` uint8."""
        return torch.from_numpy(self.preprocess.read(source))

    def move_to(self, device: torch.device, room: int) -> None:
        """Move the cached images to a device if they take at most `room` bytes there."""
        if self.cached is not None and self.cached.device != device and self.cached.nbytes <= room:
            self.cached = self.cached.to(device)
            self._targets = self._targets.to(device)

    def batch(self, indices: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return a batch of cached images, equal to the stacked items.

        Args:
            indices: ``(batch,)`` int64, on the device of the images.
            numbers: ``(batch,)`` int64, the numbers that decide about augmentation; None augments nothing.

        Returns:
            Images ``(batch, 3, size, size)`` float32 and class indices ``(batch,)`` int64.
        """
        assert self.cached is not None
        pixels = self.cached.index_select(0, indices)
        if self.flip and numbers is not None:
            pixels = torch.where((numbers % 2 == 1)[:, None, None, None], pixels.flip(-1), pixels)
        return normalize(pixels, self.preprocess), self._targets.index_select(0, indices)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: int | tuple[int, int]) -> Item:
        index, number = item if isinstance(item, tuple) else (item, 0)
        source, target = self.samples[index]
        pixels = self.pixels(source) if self.cached is None else self.cached[index]
        if self.flip and number % 2:
            pixels = pixels.flip(-1)
        return normalize(pixels, self.preprocess), target


class Padded(Dataset[Item]):
    """Images followed by padding samples up to a multiple of the number of processes.

    Every process then has equally many batches, and none waits for another. Padding samples repeat images and have the
    class `IGNORED` or the path "".

    Args:
        dataset: Images with class indices or paths.
        multiple: Its length becomes a multiple of this.
    """

    def __init__(self, dataset: ImageDataset, multiple: int) -> None:
        self.dataset = dataset
        self.count = len(dataset)
        self.padded_count = -(-self.count // multiple) * multiple

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
        image, target = self.dataset[index % self.count]
        return image, "" if isinstance(target, str) else IGNORED


def collate(items: list[Item]) -> tuple[Tensor, Tensor | list[str]]:
    """Stack items to images ``(batch, 3, size, size)`` and class indices ``(batch,)`` int64, or a list of paths."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets) if isinstance(targets[0], str) else torch.tensor(targets)
