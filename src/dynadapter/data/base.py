"""The base of the data modules: settings, splits, class names, loaders and unreadable images."""

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from dynadapter.data.dataset import ImageDataset, Padded, Sample, collate
from dynadapter.data.samplers import CachedLoader, EpochOrder, ResumableLoader
from dynadapter.images.preprocess import Interpolation, Normalization, Preprocess, Resize
from dynadapter.images.reading import find_images, shown, why_unreadable

Split = Literal["train", "val", "test"]

STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}

GPU_SHARE = 0.25
"""Fraction of a GPU's free memory that the cached images of a split may take."""


class ImageData(LightningDataModule, ABC):
    """Base of the data modules: a subclass sets `class_names` in its ``__init__`` and lists its `samples`.

    Batches are (images ``(batch, 3, size, size)`` float32, class indices ``(batch,)`` int64); in predict the second
    part is the list of paths. Training shuffles and drops the last incomplete batch, unless it is the only one.

    Several processes share each batch of training. Together they use the images that one process with the
    same global batch uses. Evaluation counts every image once: where their number does not divide, batches are padded
    with samples of class -100 or path "", which are ignored.

    Args:
        batch_size: Images in a batch, on each device.
        global_batch_size: Images in an optimiser step of training, over all processes and accumulated batches. It
            replaces `batch_size` in training; evaluation still uses `batch_size`.
        num_workers: Worker processes that read images; 0 reads in the main process. Cached images need none.
        image_size: Height and width that the backbone takes, in pixels.
        normalization: ``imagenet`` or ``half`` (mean and deviation 0.5) as in the backbone's pre-training, ``none``
            for [0, 1], or a pair of (mean, deviation) with three values each. Results differ by points: report it.
        interpolation: How pixels are resampled; bicubic and bilinear are antialiased.
        resize: ``stretch`` to a square, as in VTAB-1k, or ``crop`` the centre after the shorter side fits.
        augment: ``none``, as in VTAB-1k, or ``flip`` to mirror each training image with probability 0.5.
        cache: Decode training and validation images once and keep them as one uint8 tensor (147 MiB for 1000 images of
            224 px): on the GPU if they take at most a quarter of its free memory, else in main memory.
        on_error: ``raise`` at the first image that cannot be read, or ``skip``: read every image once before use, leave
            the unreadable ones out and list them.
        max_skipped: With ``skip``, more unreadable images than this are an error.
        predict_images: For predict: a folder (searched with its subfolders), or a list of files.
    """

    class_names: list[str]
    validation_switch: ClassVar[str] = ""  # the setting to name when there are no validation images

    def __init__(
        self,
        *,
        batch_size: int = 64,
        global_batch_size: int | None = None,
        num_workers: int = 0,
        image_size: int = 224,
        normalization: Normalization = "imagenet",
        interpolation: Interpolation = "bicubic",
        resize: Resize = "stretch",
        augment: Literal["none", "flip"] = "none",
        cache: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped: int = 10,
        predict_images: list[str] | str | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("global_batch_size", 1 if global_batch_size is None else global_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_skipped", max_skipped, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for name, word, choices in (
            ("augment", augment, ("none", "flip")),
            ("on_error", on_error, ("raise", "skip")),
        ):
            if word not in choices:
                raise ValueError(f"unknown {name} {word!r}; choose from: {', '.join(choices)}")
        # The run's record holds the protocol. A logger would refuse names that the model has too.
        self.save_hyperparameters(logger=False)
        self.hparams.update({name: _plain(value) for name, value in self.hparams.items()})
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.preprocess = Preprocess(image_size, interpolation, resize, normalization)
        self.augment = augment
        self.cache = cache
        self.on_error = on_error
        self.max_skipped = max_skipped
        self.predict_images = predict_images
        self.skipped: dict[str, str] = {}
        self._datasets: dict[str, ImageDataset] = {}
        self._own_classes: list[str] | None = None  # in the order of `samples`, if a model has another order
        self._train_loader: ResumableLoader | None = None
        self._restored: dict[str, int] = {}

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
        """List the images of a split with their class indices; empty for ``val`` when nothing is held out."""

    def setup(self, stage: str) -> None:
        """Find the images of a stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            ValueError: The stage is unknown, or has no images.
        """
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; choose from: {', '.join(STAGES)}")
        for split in STAGES[stage]:
            if not len(self.dataset(split)) and (split != "val" or stage == "validate"):
                advice = f"; set {self.validation_switch}" if split == "val" and self.validation_switch else ""
                raise ValueError(f"{type(self).__name__} has no image for {split}{advice}")

    def dataset(self, split: str) -> ImageDataset:
        """Return the images of ``train``, ``val``, ``test`` or ``predict``; the first call finds them."""
        if split not in self._datasets:
            samples = self._predict_samples() if split == "predict" else self._labelled(split)  # type: ignore[arg-type]
            if self.on_error == "skip":
                samples = self._readable(split, samples)
            fitting = split in ("train", "val")  # read many times
            flip = split == "train" and self.augment == "flip"
            self._datasets[split] = ImageDataset(samples, self.preprocess, flip=flip, cache=self.cache and fitting)
        return self._datasets[split]

    def take_classes(self, names: Sequence[str]) -> None:
        """Use the class indices of a model, matched by class name, in all splits.

        If the names of the model or of the data are only numbers ("0", "1", ...), the indices stay as they are.

        Args:
            names: The model's class names in the order of their indices; the data may lack some of them.

        Raises:
            ValueError: The data have a class that the model does not know.
        """
        now, own = self.class_names, self._own_classes or self.class_names
        if list(names) == now or (_numbered(names) and len(own) <= len(names)):
            return
        if not _numbered(own) or len(own) > len(names):
            if unknown := [name for name in own if name not in names]:
                raise ValueError(
                    f"the data have classes that the model does not know: {_listed(unknown)}; the model "
                    f"has {_listed(names)}; the data have {_listed(own)}"
                )
            self._own_classes = own
            for split, dataset in self._datasets.items():
                if split != "predict":
                    dataset.relabel(_renumbered(dataset.samples, now, names))
        self.class_names = list(names)

    def _labelled(self, split: Split) -> list[Sample]:
        """Return the samples of a split with the class indices of `class_names`."""
        names, own = self.class_names, self._own_classes
        if own is None:
            samples = self.samples(split)
            self._require_classes(split, samples)
            return samples
        self.class_names = own  # `samples` of a subclass may read it
        try:
            samples = self.samples(split)
            self._require_classes(split, samples)
        finally:
            self.class_names = names
        return _renumbered(samples, own, names)

    def _require_classes(self, split: str, samples: list[Sample]) -> None:
        for index, (source, label) in enumerate(samples):
            if isinstance(label, int) and not 0 <= label < self.num_classes:
                raise ValueError(
                    f"label {label} of {_named(index, source)} for {split} is no class; "
                    f"valid are classes 0 to {self.num_classes - 1}"
                )

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training images, at the restored place in the epoch if there is one."""
        dataset, accumulated, seed = self.dataset("train"), 1, torch.initial_seed()
        processes, rank = self._processes()
        if self.trainer is not None:
            accumulated = self.trainer.accumulate_grad_batches
            seed = self.trainer.strategy.broadcast(seed)  # a launcher may have started each process without a seed
        batch_size = self._train_batch_size(processes, accumulated)
        if self.global_batch_size is None:
            accumulated = 1  # use every batch; the last step takes those that are left
        order = EpochOrder(dataset, batch_size, seed=seed, processes=processes, rank=rank, accumulated=accumulated)
        loader = self._train_loader = self._loader(dataset, batch_size=batch_size, sampler=order)
        loader.load_state_dict(self._restored)
        self._restored = {}
        return loader

    # Lightning restores a loader's state by itself, but not if a module counts the batches for its schedules: then the
    # loader exists before the state does.

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch of training, which Lightning saves in a checkpoint."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
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

    def _train_batch_size(self, processes: int, accumulated: int) -> int:
        """Return the batch size of one process, and print how the images of a step are divided."""
        size, rest = self.batch_size, 0
        if self.global_batch_size is not None:
            size, rest = divmod(self.global_batch_size, processes * accumulated)
        if rest or not size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} does not divide by {processes} process(es) x "
                f"{accumulated} accumulated batch(es); give a multiple of {processes * accumulated}"
            )
        if self.global_batch_size is not None or processes * accumulated > 1:
            parts = f"{processes} process{'es' if processes > 1 else ''} x {size} (x {accumulated} accumulated)"
            rank_zero_info(f"batches: {processes * accumulated * size} images = {parts}")
        return size

    def files(self, epoch: int, batch: int) -> list[str]:
        """Return the names of the images in a training batch of this process; empty if they are not known."""
        order = self._train_loader and self._train_loader.sampler
        if not isinstance(order, EpochOrder) or getattr(self.trainer, "overfit_batches", False):
            return []
        samples = self.dataset("train").samples
        return [_named(index, samples[index][0]) for index in order.batch(epoch, batch)]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the validation images; an empty list if there are none."""
        if len(self.dataset("val")):
            return self._evaluation_loader("val")
        # Lightning warns because an empty list could be a mistake; here it is intended.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test images."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of the images to predict."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str) -> DataLoader:
        dataset, (processes, rank) = self.dataset(split), self._processes()
        if processes == 1:
            return self._loader(dataset, batch_size=self.batch_size)
        padded = Padded(dataset, processes)
        sampler: Sampler[int] = DistributedSampler(padded, processes, rank, shuffle=False)
        return self._loader(padded, batch_size=self.batch_size, sampler=sampler)

    def _loader(
        self, dataset: ImageDataset | Padded, batch_size: int, sampler: Sampler[Any] | None = None
    ) -> ResumableLoader:
        pin_memory = torch.cuda.is_available()
        if dataset.cached is not None:
            device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
            dataset.move_to(device, _room_on(device))
            return CachedLoader(dataset, batch_size=batch_size, sampler=sampler, pin_memory=pin_memory)
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=collate,
        )

    def _predict_samples(self) -> list[Sample]:
        if self.predict_images is None:
            raise ValueError("predict needs predict_images: a folder of images or a list of files")
        return [(path, str(path)) for path in find_images(self.predict_images)]

    def _readable(self, split: str, samples: list[Sample]) -> list[Sample]:
        """Decode every image once and return the samples that can be read.

        This happens before any worker process starts, so that the list of unreadable images is complete.
        """
        with ThreadPoolExecutor() as pool:
            reasons = list(pool.map(why_unreadable, [source for source, _ in samples]))
        broken = {str(source): why for (source, _), why in zip(samples, reasons, strict=True) if why}
        self.skipped |= broken
        if len(self.skipped) > self.max_skipped:
            raise ValueError(
                f"{len(self.skipped)} images cannot be read, more than max_skipped={self.max_skipped}: "
                + _shortened(self.skipped)
            )
        if len(broken) == len(samples) > 0:
            raise ValueError(f"no image of {split} can be read: {_shortened(broken)}")
        if broken:
            rank_zero_warn(f"{split}: skipped {len(broken)} unreadable image(s): {_shortened(broken)}")
        return [sample for sample, why in zip(samples, reasons, strict=True) if not why]


def _room_on(device: torch.device) -> int:
    """Return how many bytes of images may be kept on a device: any number in main memory, none on unknown devices."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return sys.maxsize if device.type == "cpu" else 0


def _numbered(names: Sequence[str]) -> bool:
    return list(names) == [str(k) for k in range(len(names))]


def _renumbered(samples: Sequence[Sample], old: Sequence[str], new: Sequence[str]) -> list[Sample]:
    index = {name: label for label, name in enumerate(new)}
    return [(source, index[old[label]] if isinstance(label, int) else label) for source, label in samples]


def _listed(names: Sequence[str], most: int = 10) -> str:
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + rest


def _named(index: int, source: Path | Image.Image) -> str:
    return f"image {index}" if isinstance(source, Image.Image) else str(source)


def _plain(value: Any) -> Any:
    """Turn paths into text, which a checkpoint can hold and load with ``weights_only``."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _shortened(broken: dict[str, str], most: int = 20) -> str:
    lines = [f"{path} ({why})" for path, why in broken.items()]
    rest = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "; ".join(lines[:most] + rest)
