"""The order of the training images and its loaders; equal for any number of processes and after a resume."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from dynadapter.data.dataset import ImageDataset, Padded
from dynadapter.data.identity import list_hash
from dynadapter.data.workers import too_late

ORDER_SETTINGS = {
    "images": "{} training images",
    "listing": "the list of images and labels {}",
    "global_batch": "batches of {} images",
    "epoch_images": "{} images in an epoch",
    "repeats": "augment.repeats={}",
    "balanced": "balanced={}",
}
"""What the order and the number of an epoch's batches depend on, beside the seed and the epoch, for a message."""


class EpochOrder(DistributedSampler):
    """The order of the training images in an epoch; each process takes its share of every batch.

    The order depends only on the seed and the epoch. In each step all processes together use the same images as one
    process with the same global batch. The remaining images at the end of an epoch, fewer than a batch, are not used.
    Each index has a random number for this epoch, which determines the augmentation.

    Lightning does not replace a `DistributedSampler` and calls `set_epoch`; in a plain loop each pass is the next
    epoch.

    >>> [[index for index, _ in EpochOrder(range(10), 2, seed=0, processes=2, rank=rank)] for rank in (0, 1)]
    [[4, 7, 3, 0], [1, 5, 9, 8]]
    >>> [index for index, _ in EpochOrder(range(10), 4, seed=0)]
    [4, 1, 7, 5, 3, 9, 0, 8]

    Args:
        dataset: Anything with a length.
        batch_size: Images in a batch of one process.
        seed: Seed of the order.
        processes: Number of processes that share the images.
        rank: Index of this process, from 0.
        accumulated: Number of batches in an optimiser step. An epoch ends with a complete step if it has at least one.
        repeats: How often each image occurs in an epoch, each time with another random number. The length of the epoch
            does not change.
        classes: Class index of each image: draw images with replacement, each class equally likely. None draws each
            image once.

    Attributes:
        start: Number of batches to skip at the start of the epoch, because they were used before a resume.

    Raises:
        ValueError: There are fewer images than processes.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int,
        processes: int = 1,
        rank: int = 0,
        accumulated: int = 1,
        repeats: int = 1,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, seed=seed)
        self.batch_size = batch_size
        self.repeats = repeats
        self.chances: Tensor | None = None  # of each image
        if classes is not None:
            labels = torch.tensor(classes)
            self.chances = 1 / torch.bincount(labels)[labels].double()
        self.start = 0
        self.count = count = len(dataset)
        together = batch_size * processes
        if count < processes:
            raise ValueError(f"{count} training image(s) for {processes} processes; train on at most {count}")
        for unit in (together * accumulated, together, 1):  # fewer images than a step are still trained on
            if whole := count // unit * unit:
                self.images = whole
                break

    @property
    def weight(self) -> float:
        """Factor that turns the mean over this process's images into its part of the mean over all processes.

        It is 1 unless the only batch does not divide by the number of processes.
        """
        return len(self) * self.num_replicas / self.images

    def __len__(self) -> int:
        return len(range(self.rank, self.images, self.num_replicas))

    def _shuffled(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return all image indices of an epoch in order, and their random numbers."""
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
        if self.chances is None:
            order = torch.randperm(self.count, generator=generator)
        else:
            order = torch.multinomial(self.chances, self.count, replacement=True, generator=generator)
        numbers = torch.randint(2**62, (self.count,), generator=generator)
        if self.repeats == 1 and self.chances is None:
            return order[: self.images], numbers[order[: self.images]]
        return order.repeat_interleave(self.repeats)[: self.images], numbers[: self.images]

    def next_epoch(self) -> tuple[Tensor, Tensor]:
        """Return this process's image indices of the epoch and their random numbers, then advance to the next epoch."""
        done = self.start * self.batch_size
        indices, numbers = (part[self.rank :: self.num_replicas][done:] for part in self._shuffled(self.epoch))
        self.epoch += 1
        return indices, numbers

    def __iter__(self) -> Iterator[tuple[int, int]]:
        indices, numbers = self.next_epoch()
        return zip(indices.tolist(), numbers.tolist(), strict=True)

    def batch(self, epoch: int, step: int) -> list[int]:
        """Return the image indices of a batch of this process."""
        indices = self._shuffled(epoch)[0][self.rank :: self.num_replicas]
        return indices[step * self.batch_size : (step + 1) * self.batch_size].tolist()


def share_batch(size: int, together: int | None, processes: int, accumulated: int) -> int:
    """Return the batch size of one process, and print how a step is divided among processes.

    Args:
        size: Images in a batch of one process, if `together` is None.
        together: Images in a step over all processes and accumulated batches.
        processes: Number of processes.
        accumulated: Batches of a step.
    """
    rest = 0
    if together is not None:
        size, rest = divmod(together, processes * accumulated)
    if rest or not size:
        raise ValueError(
            f"global_batch_size={together} does not divide by {processes} process(es) x {accumulated} accumulated "
            f"batch(es); give a multiple of {processes * accumulated}"
        )
    if together is not None or processes * accumulated > 1:
        parts = f"{processes} process{'es' if processes > 1 else ''} x {size} (x {accumulated} accumulated)"
        rank_zero_info(f"batches: {processes * accumulated * size} images = {parts}")
    return size


class ResumableLoader(DataLoader):
    """A loader that saves its position in the epoch; a resumed training uses exactly the remaining batches."""

    _seen: tuple[int, int] | None = None  # the epoch, and how many of its batches were seen
    _restored: dict[str, Any] | None = None
    _listing: str | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts with the first batch. Lightning asks for an iterator before it sets the epoch or restores
        # a checkpoint.
        order = self.sampler
        if not isinstance(order, EpochOrder):  # evaluation; or Lightning's own sampler for overfit_batches
            yield from self._batches()
            return
        epoch, state, self._restored = order.epoch, self._restored, None
        order.start = self._batches_seen(state) if state is not None and state["epoch"] == epoch else 0
        self._seen = epoch, order.start
        for batch in self._batches():
            self._seen = epoch, self._seen[1] + 1
            yield batch

    def _batches(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if (late := too_late(error)) is None:
                raise
            raise late from error

    def _batches_seen(self, state: dict[str, Any]) -> int:
        """Return how many batches of this epoch were used before a saved state."""
        for key, now in self.state_dict().items():
            if state["batches"] and key in ORDER_SETTINGS and state.get(key) != now:
                then, now = ORDER_SETTINGS[key].format(state.get(key)), ORDER_SETTINGS[key].format(now)
                raise ValueError(
                    f"the checkpoint was saved in the middle of epoch {state['epoch']} with {then}, and it would "
                    f"go on with {now}; give the same again, or a checkpoint from the end of an epoch"
                )
        return state["batches"]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch, and everything it depends on; empty if the order is not an `EpochOrder`."""
        order = self.sampler
        if self._restored is not None or not isinstance(order, EpochOrder):
            return self._restored or {}
        epoch, batches = self._seen or (order.epoch, 0)
        if self._listing is None:
            self._listing = list_hash(getattr(self.dataset, "samples", ()), getattr(self.dataset, "folder", None))
        return {
            "epoch": epoch,
            "batches": batches,
            "seed": order.seed,
            "images": order.count,
            "listing": self._listing,
            "global_batch": order.batch_size * order.num_replicas,
            "epoch_images": order.images,
            "repeats": order.repeats,
            "balanced": order.chances is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position.

        The first batch raises a ValueError if the position is in the middle of an epoch whose order or number of
        batches has changed.
        """
        if state and isinstance(self.sampler, EpochOrder):
            self._restored = state
            self.sampler.seed = state["seed"]
            self.sampler.set_epoch(state["epoch"])


class CachedLoader(ResumableLoader):
    """A loader of images in memory: a batch is one `index_select` and one normalisation on the device of the images.

    Batches, order and saved positions equal those of :class:`ResumableLoader`. There are no worker processes and no
    Python code per sample.
    """

    dataset: ImageDataset | Padded

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        cached = self.dataset.cached
        batches: Any = self.batch_sampler  # Lightning's own in predict, which leaves batch_size out
        size = self.batch_size or batches.batch_size
        assert cached is not None
        if isinstance(self.sampler, EpochOrder):
            indices, numbers = self.sampler.next_epoch()
        else:
            indices = torch.tensor(list(self.sampler), dtype=torch.int64)
            numbers = torch.zeros_like(indices)
        parts = zip(indices.to(cached.device).split(size), numbers.to(cached.device).split(size), strict=True)
        for part, part_numbers in parts:
            images, targets = self.dataset.batch(part, part_numbers)
            pin = self.pin_memory and not images.is_cuda
            yield (images.pin_memory(), targets.pin_memory()) if pin else (images, targets)
