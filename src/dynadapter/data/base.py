"""The base of the data modules: settings, splits, class names, loaders and unreadable images."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from dynadapter.data.account import account_of
from dynadapter.data.augment import Augment, Augmentation
from dynadapter.data.classes import match_classes, renumbered
from dynadapter.data.dataset import ImageDataset, Padded, Sample, collate, room_on
from dynadapter.data.preprocessing import Auto, Wanted, differences
from dynadapter.data.readable import readable
from dynadapter.data.samplers import CachedLoader, EpochOrder, ResumableLoader, share_batch
from dynadapter.data.shots import few_shot
from dynadapter.data.workers import TIMEOUT, check_shared_memory
from dynadapter.images.accounting import Account
from dynadapter.images.preprocess import Interpolation, Normalization, Resize
from dynadapter.images.values import Range
from dynadapter.training.matching import match_images, unnamed

Split = Literal["train", "val", "test"]

STAGES: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ImageData(LightningDataModule, ABC):
    """Base of the data modules: a subclass sets `class_names` in its ``__init__`` and lists its `samples`.

    Batches are (images ``(batch, 3, size, size)`` float32, class indices ``(batch,)`` int64). Training shuffles,
    and drops the incomplete last batch unless it is the only one.

    Several processes share each training batch. Together they use the same images as one process with the same global
    batch. Evaluation counts every image once: if their number does not divide, batches are padded with samples of class
    -100, which are ignored.

    Args:
        batch_size: Images in a batch, on each device.
        global_batch_size: Images in an optimiser step of training, over all processes and accumulated batches. It
            replaces `batch_size` in training; evaluation still uses `batch_size`.
        num_workers: Worker processes that read images; 0 reads in the main process. Cached images need none.
        image_size: Height and width in pixels. For this and the next three settings, ``auto`` takes the model's value:
            that of the backbone's pre-training, and after a training that of the training. A value that differs from
            the training's is used, with one warning. Without a model ``auto`` is 224, imagenet, bicubic and stretch.
        normalization: ``imagenet`` or ``half`` (mean and deviation 0.5), ``none`` for [0, 1], or a pair of (mean,
            deviation) with three values each. The accuracy depends strongly on it.
        interpolation: How pixels are resampled; bicubic and bilinear are antialiased.
        resize: ``stretch`` to a square, as in VTAB-1k, or ``crop`` the centre after the shorter side is resized;
            ``auto`` is ``stretch`` in training.
        value_range: The values (low, high) that become 0 and 255 in images of more than 8 bits, such as (0, 4095);
            None, and ``auto`` in training, for the whole range of 16 bits.
        augment: ``none``, as in VTAB-1k; ``flip`` to mirror each training image with probability 0.5; or
            :class:`~dynadapter.data.augment.Augment` for timm's transforms.
        shots: Number of training images of each class, drawn by a hash of their names; a smaller class is used whole.
            None for all images.
        shots_seed: Seed of the draw.
        balanced: Draw training images with replacement, each class equally likely, instead of each image once per
            epoch.
        cache: Decode training and validation images once and keep them as one uint8 tensor (144 MiB for 1000 images of
            224 px): on the GPU if they take at most a quarter of its free memory, else in main memory.
        on_error: ``raise`` at the first unreadable image, or ``skip``: read every image once before use, and leave out
            and list the unreadable ones.
        max_skipped: With ``skip``, more unreadable images than this are an error.
    """

    class_names: list[str]
    test_label: str = "test"  # where the metrics of a test are logged
    validation_switch: ClassVar[str] = ""  # the setting to name when there are no validation images
    without_model: ClassVar[dict[str, Any]] = {}  # what ``auto`` means then, if not the defaults of `Preprocess`

    def __init__(
        self,
        *,
        batch_size: int = 64,
        global_batch_size: int | None = None,
        num_workers: int = 0,
        image_size: int | Auto = "auto",
        normalization: Normalization | Auto = "auto",
        interpolation: Interpolation | Auto = "auto",
        resize: Resize | Auto = "auto",
        value_range: Range | Auto | None = "auto",
        augment: Literal["none", "flip"] | Augment = "none",
        shots: int | None = None,
        shots_seed: int = 0,
        balanced: bool = False,
        cache: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped: int = 10,
    ):
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("global_batch_size", 1 if global_batch_size is None else global_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_skipped", max_skipped, 0),
            ("shots", 1 if shots is None else shots, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if not isinstance(augment, Augment) and augment not in ("none", "flip"):
            raise ValueError(f"unknown augment {augment!r}; choose from: none, flip, Augment")
        if isinstance(augment, Augment) and cache:
            raise ValueError(
                "cache keeps resized images, and Augment needs whole ones; set cache: false, or augment: flip"
            )
        if on_error not in ("raise", "skip"):
            raise ValueError(f"unknown on_error {on_error!r}; choose from: raise, skip")
        # The run's record holds the protocol. A logger would refuse names that the model has too.
        self.save_hyperparameters(logger=False)
        self.hparams.update({name: _plain(value) for name, value in self.hparams.items()})
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.wanted = Wanted(image_size, interpolation, resize, normalization, value_range)
        self.preprocess = self.wanted.resolve(self.without_model)
        self.augment = augment
        self.shots, self.shots_seed = shots, shots_seed
        self.balanced = balanced
        self.cache = cache
        self.on_error = on_error
        self.max_skipped = max_skipped
        self.skipped: dict[str, str] = {}
        self._datasets: dict[Split, ImageDataset] = {}
        self._own_classes: list[str] | None = None  # in the order of `samples`, if a model has another order
        self._index: list[int] = []  # then the model's index of each of these
        self._warned = ""
        self._train_loader: ResumableLoader | None = None
        self._restored: dict[str, Any] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes, known before `setup`."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height and width of the images in a batch, in pixels."""
        return self.preprocess.image_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The settings of `Preprocess` as plain values, to be stored with a model."""
        return asdict(self.preprocess)

    @abstractmethod
    def samples(self, split: Split) -> list[Sample]:
        """List the images of a split with their class indices; empty for ``val`` if no images are held out."""

    def used(self, split: Split) -> list[Sample]:
        """List the used images of a split: all `samples`, or the drawn `shots` of ``train``."""
        shots = self.shots if split == "train" else None
        return few_shot(self.samples(split), shots, self.shots_seed, getattr(self, "folder", None))

    def further_tests(self) -> list["ImageData"]:
        """Return a data module for each further test set; its test images are measured."""
        return []

    def listed(self) -> list[Path]:
        """List the files that the data's lists name, in any split."""
        return []

    def setup(self, stage: str) -> None:
        """Find the images of a stage: ``fit``, ``validate`` or ``test``.

        Raises:
            ValueError: The stage is unknown or has no images, or the trainer's model cannot take them.
        """
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; choose from: {', '.join(STAGES)}")
        module = getattr(self.trainer, "lightning_module", None)
        if hasattr(module, "own_preprocessing"):  # its classes may change with a checkpoint, which is read later
            match_images(module, self, stage)
        for split in STAGES[stage]:
            if not len(self.dataset(split)) and (split != "val" or stage == "validate"):
                advice = f"; set {self.validation_switch}" if split == "val" and self.validation_switch else ""
                raise ValueError(f"{type(self).__name__} has no image for {split}{advice}")

    def dataset(self, split: Split) -> ImageDataset:
        """Return the images of ``train``, ``val`` or ``test``; the first call finds them."""
        if split not in self._datasets:
            samples = self._labelled(split)
            if self.on_error == "skip":
                value_range = self.preprocess.value_range
                samples = readable(split, samples, value_range, self.skipped, self.max_skipped)
            fitting = split in ("train", "val")  # read many times
            changes = self.augment if split == "train" else "none"
            dataset = ImageDataset(
                samples,
                self.preprocess,
                flip=changes == "flip",
                augment=Augmentation(changes, self.preprocess) if isinstance(changes, Augment) else None,
                cache=self.cache and fitting,
            )
            dataset.classes, dataset.folder = self.class_names, getattr(self, "folder", None)
            self._datasets[split] = dataset
        return self._datasets[split]

    def take_preprocessing(self, own: Mapping[str, Any], trained: bool) -> None:
        """Use a model's own preprocessing for every setting that is ``auto``.

        Args:
            own: Settings of `Preprocess`.
            trained: Whether `own` are the settings of a training; then given settings that differ cause one warning.
        """
        now = self.wanted.resolve(own)
        if trained and (words := differences(now, Wanted().resolve(own))) != self._warned:
            self._warned = words
            if words:
                rank_zero_warn(
                    f"images are not read as in the training: {words}; results may differ by points: leave the setting "
                    "out to use the training's"
                )
        if now != self.preprocess:
            self.preprocess = now
            self._datasets.clear()

    def take_classes(self, names: Sequence[str]) -> None:
        """Use the class indices of a model in all splits, matched as :func:`match_classes` does.

        Args:
            names: The model's class names in the order of their indices; the data need not have all of them.

        Raises:
            ValueError: The data have a class that the model does not know.
        """
        own = self._own_classes or self.class_names
        index = match_classes(own, names)
        if unnamed(names) and len(own) == len(names) and index == list(range(len(own))):
            names = own  # a model without names
        change = dict(zip(self._index or range(len(own)), index, strict=True))
        self._own_classes, self._index, self.class_names = own, index, list(names)
        for dataset in self._datasets.values():
            dataset.classes = self.class_names
            if any(before != after for before, after in change.items()):
                dataset.relabel(renumbered(dataset.samples, change))

    def _labelled(self, split: Split) -> list[Sample]:
        """Return the samples of a split with the class indices of `class_names`."""
        with self.own_classes():
            samples = self.used(split)
            self._require_classes(split, samples)
        return samples if self._own_classes is None else renumbered(samples, self._index)

    @contextmanager
    def own_classes(self) -> Iterator[None]:
        """Have the data's class names for a while, not a model's: a subclass's `samples` may look labels up in them."""
        names = self.class_names
        self.class_names = self._own_classes or names
        try:
            yield
        finally:
            self.class_names = names

    def _require_classes(self, split: str, samples: list[Sample]) -> None:
        for index, (source, label) in enumerate(samples):
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"label {label} of {_named(index, source)} for {split} is not a class; "
                    f"valid are classes 0 to {self.num_classes - 1}"
                )

    def _match_model(self) -> None:
        """Get preprocessing and classes from the trainer's model, which has read its checkpoint by now."""
        match = getattr(getattr(self.trainer, "lightning_module", None), "match_data", None)
        if match is not None:
            match(self)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training images, at the restored position in the epoch if there is one."""
        self._match_model()
        dataset, accumulated, seed = self.dataset("train"), 1, torch.initial_seed()
        processes, rank = self._processes()
        if self.trainer is not None:
            accumulated = self.trainer.accumulate_grad_batches
            callbacks = getattr(self.trainer, "callbacks", [])
            changes = any(isinstance(one, GradientAccumulationScheduler) for one in callbacks)
            if changes and self.global_batch_size is not None:
                raise ValueError(
                    "global_batch_size is the number of images of a step, which GradientAccumulationScheduler changes; "
                    "give batch_size instead"
                )
            seed = self.trainer.strategy.broadcast(seed)  # a launcher may have started each process without a seed
        batch_size = share_batch(self.batch_size, self.global_batch_size, processes, accumulated)
        if self.global_batch_size is None:
            accumulated = 1  # use every batch; the last step takes those that are left
        repeats = self.augment.repeats if isinstance(self.augment, Augment) else 1
        order = EpochOrder(
            dataset,
            batch_size,
            seed=seed,
            processes=processes,
            rank=rank,
            accumulated=accumulated,
            repeats=repeats,
            classes=[int(label) for _, label in dataset.samples] if self.balanced else None,
        )
        loader = self._train_loader = self.loader(dataset, batch_size=batch_size, sampler=order)
        loader.load_state_dict(self._restored)
        self._restored = {}
        return loader

    # Lightning restores a loader's state by itself, but not if a module counts the batches for its schedules: then the
    # loader exists before the state does.

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch, which Lightning saves in a checkpoint."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the middle of an epoch; ignored outside fit."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        if self._train_loader is None:
            self._restored = state_dict
        else:
            self._train_loader.load_state_dict(state_dict)

    def _processes(self) -> tuple[int, int]:
        """Return how many processes share the images, and the index of this one."""
        shares = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return shares["num_replicas"], shares["rank"]

    def files(self, epoch: int, batch: int) -> list[str]:
        """Return the names of the images in a training batch of this process; empty if they are not known."""
        order = self._train_loader and self._train_loader.sampler
        if not isinstance(order, EpochOrder) or getattr(self.trainer, "overfit_batches", False):
            return []
        samples = self.dataset("train").samples
        return [_named(index, samples[index][0]) for index in order.batch(epoch, batch)]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the validation images; an empty list if there are none."""
        self._match_model()
        if len(self.dataset("val")):
            return self._evaluation_loader("val")
        # Lightning warns because an empty list could be a mistake; here it is intended.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test images."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: Split) -> DataLoader:
        self._match_model()
        dataset, (processes, rank) = self.dataset(split), self._processes()
        if processes == 1:
            return self.loader(dataset, batch_size=self.batch_size)
        padded = Padded(dataset, processes)
        sampler: Sampler[int] = DistributedSampler(padded, processes, rank, shuffle=False)
        return self.loader(padded, batch_size=self.batch_size, sampler=sampler)

    def loader(
        self, dataset: ImageDataset | Padded, batch_size: int, sampler: Sampler[Any] | None = None
    ) -> ResumableLoader:
        """Return a loader of images, with the settings of this module."""
        pin_memory = torch.cuda.is_available()
        if dataset.cached is not None:
            device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
            dataset.move_to(device, room_on(device))
            return CachedLoader(dataset, batch_size=batch_size, sampler=sampler, pin_memory=pin_memory)
        shared = getattr(self, "frames", 1) * getattr(self.trainer, "num_devices", 1)  # a clip is as many images
        check_shared_memory(self.num_workers, len(dataset), batch_size, self.image_size, shared)
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            timeout=TIMEOUT if self.num_workers else 0,
            persistent_workers=self.num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=collate,
        )

    def account(self) -> Account | None:
        """Count the files of the data's folder, as :func:`account_of` does."""
        return account_of(self)


def _named(index: int, source: Any) -> str:
    return f"image {index}" if isinstance(source, Image.Image) else str(source)


def _plain(value: Any) -> Any:
    """Convert paths to text, which loads with ``weights_only``."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
