"""Who sees which image when: the same for any number of processes, and after a training was interrupted."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dynadapter.training.losses import IGNORED

Item = tuple[torch.Tensor, int | str]


class EpochOrder(DistributedSampler):
    """The order of an epoch of training, of which each process takes its share of every batch.

    The order depends on the seed and the epoch alone. All processes together see, step by step, what one process with
    the same global batch sees; what is left over at the end of an epoch, less than a batch, none of them sees. Each
    index comes with a number drawn for it in this epoch, for augmentation.

    Lightning leaves a `DistributedSampler` alone and calls `set_epoch`; in a plain loop each pass is the next epoch.

    >>> [[index for index, _ in EpochOrder(range(10), 2, seed=0, processes=2, rank=rank)] for rank in (0, 1)]
    [[4, 7, 3, 0], [1, 5, 9, 8]]
    >>> [index for index, _ in EpochOrder(range(10), 4, seed=0)]
    [4, 1, 7, 5, 3, 9, 0, 8]

    Args:
        dataset: Anything with a length.
        batch_size: Images in a batch of one process.
        seed: Of the order.
        processes: How many share it.
        rank: Which of them this is.
        accumulated: Batches of an optimiser step; an epoch ends with a whole step where it holds one at all.

    Raises:
        ValueError: If there are fewer images than processes.
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, seed: int, processes: int = 1, rank: int = 0, accumulated: int = 1
    ):
        super().__init__(dataset, num_replicas=processes, rank=rank, seed=seed)
        self.batch_size = batch_size
        self.start = 0  # batches of the epoch to leave out, because they have been seen
        self.count = count = len(dataset)
        together = batch_size * processes
        if count < processes:
            raise ValueError(f"{count} training image(s) for {processes} processes; train on at most {count}")
        for unit in (together * accumulated, together, 1):  # whatever is too little for a step is still trained on
            if whole := count // unit * unit:
                self.images = whole
                break

    @property
    def weight(self) -> float:
        """What the mean over this process's images counts in that over all images of a step.

        It is 1, but where the only batch there is does not divide by the number of processes.
        """
        return len(self) * self.num_replicas / self.images

    def __len__(self) -> int:
        return len(range(self.rank, self.images, self.num_replicas))

    def _shuffled(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives all images of an epoch, and a number for each image of the set."""
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
        order = torch.randperm(self.count, generator=generator)[: self.images]
        return order, torch.randint(2**62, (self.count,), generator=generator)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, numbers = self._shuffled(self.epoch)
        mine = order[self.rank :: self.num_replicas][self.start * self.batch_size :]
        self.epoch += 1
        return zip(mine.tolist(), numbers[mine].tolist(), strict=True)

    def batch(self, epoch: int, step: int) -> list[int]:
        """Names the images of a batch of this process, by their indices."""
        mine = self._shuffled(epoch)[0][self.rank :: self.num_replicas]
        return mine[step * self.batch_size : (step + 1) * self.batch_size].tolist()


class ResumableLoader(DataLoader):
    """A loader that knows how far its epoch is: a training saved in the middle of one sees the rest of it, exactly."""

    _seen: tuple[int, int] | None = None  # the epoch, and how many batches of it
    _restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # As a generator it starts with the first batch: Lightning asks for an iterator before it says which epoch it
        # is, or that there is a checkpoint.
        order = self.sampler
        if not isinstance(order, EpochOrder):  # Lightning puts in another one to overfit a few batches
            yield from super().__iter__()
            return
        epoch, state, self._restored = order.epoch, self._restored, None
        order.start = self._passed(state) if state is not None and state["epoch"] == epoch else 0
        self._seen = epoch, order.start
        for batch in super().__iter__():
            self._seen = epoch, self._seen[1] + 1
            yield batch

    def _passed(self, state: dict[str, int]) -> int:
        """Says how many batches of this epoch have been seen already."""
        for key, what in (("images", "training images"), ("global_batch", "images in a batch of all processes")):
            if state["batches"] and state[key] != (now := self.state_dict()[key]):
                raise ValueError(
                    f"the checkpoint stands in the middle of epoch {state['epoch']}, which had {state[key]} {what}, "
                    f"and now there are {now}; give the same again, or a checkpoint from the end of an epoch"
                )
        return state["batches"]

    def state_dict(self) -> dict[str, int]:
        """Says how far the epoch is."""
        order = self.sampler
        if self._restored is not None or not isinstance(order, EpochOrder):
            return self._restored or {}
        epoch, batches = self._seen or (order.epoch, 0)
        together = order.batch_size * order.num_replicas
        return {
            "epoch": epoch,
            "batches": batches,
            "seed": order.seed,
            "images": order.count,
            "global_batch": together,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where another loader was.

        The first batch raises a ValueError if that was in the middle of an epoch, of other images or with batches of
        another size.
        """
        if state and isinstance(self.sampler, EpochOrder):
            self._restored = state
            self.sampler.seed = state["seed"]
            self.sampler.set_epoch(state["epoch"])


class Evened(Dataset[Item]):
    """A set filled up to a multiple of some number with samples that count nowhere.

    So every process has as many batches as any other, and none waits for one that has finished.

    Args:
        dataset: Images with a class, or with a path.
        multiple: Of this number there is a multiple.
    """

    def __init__(self, dataset: Dataset[Item], multiple: int):
        self.dataset = dataset
        self.count: int = len(dataset)  # type: ignore[arg-type]
        self.filled = -(-self.count // multiple) * multiple

    def __len__(self) -> int:
        return self.filled

    def __getitem__(self, index: int) -> Item:
        if index < self.count:
            return self.dataset[index]
        if index >= self.filled:
            raise IndexError(index)
        image, target = self.dataset[index % self.count]
        return image, "" if isinstance(target, str) else IGNORED
