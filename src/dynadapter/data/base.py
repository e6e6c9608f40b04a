"""What all image data modules share: reading, batches, order, and what to do with a broken file."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dynadapter.data.normalize import normalize
from dynadapter.data.samplers import EpochOrder, Evened, ResumableLoader
from dynadapter.images.preprocess import Interpolation, Normalization, Preprocess, Resize
from dynadapter.images.reading import find_images, load_image, shown, why_unreadable

Loader = TypeVar("Loader", bound=DataLoader)
Split = Literal["train", "val", "test"]
Sample = tuple[Path | Image.Image, int | str]  # where the pixels are; the class index, or the path under predict

STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ImageDataset(Dataset[tuple[torch.Tensor, int | str]]):
    """Images and what to say about them, decoded one by one or, with `cache`, once.

    An item is asked for by its index, or by its index and a number on which augmentation depends; without a number an
    image comes as it is.

    Args:
        samples: Pairs (file or image, class index or path).
        preprocess: From image to tensor.
        flip: Mirror the images that come with an odd number.
        cache: Keep all resized images in memory as bytes: 147 MiB for 1000 images of 224 px.
    """

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess, *, flip: bool = False, cache: bool = False):
        self.samples = samples
        self.preprocess = preprocess
        self.flip = flip
        self.cached: torch.Tensor | None = None
        if cache and samples:
            self.cached = torch.empty(len(samples), 3, preprocess.image_size, preprocess.image_size, dtype=torch.uint8)
            with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
                for row, pixels in zip(self.cached, pool.map(self.pixels, [s for s, _ in samples]), strict=True):
                    row.copy_(pixels)

    def pixels(self, source: Path | Image.Image) -> torch.Tensor:
        """Return the resized bytes of one image, ``(3, size, size)`` uint8."""
        return torch.from_numpy(self.preprocess.pixels(load_image(source)))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, int | str]:
        index, number = item if isinstance(item, tuple) else (item, 0)
        source, target = self.samples[index]
        pixels = self.pixels(source) if self.cached is None else self.cached[index]
        if self.flip and number % 2:
            pixels = pixels.flip(-1)
        return normalize(pixels, self.preprocess), target


def collate(items: list[tuple[torch.Tensor, int | str]]) -> tuple[torch.Tensor, torch.Tensor | list[str]]:
    """Stack items to images ``(batch, 3, size, size)`` and class indices ``(batch,)`` int64, or a list of paths."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets) if isinstance(targets[0], str) else torch.tensor(targets)


class ImageData(LightningDataModule, ABC):
    """Base of the data modules: a subclass sets `class_names` in its ``__init__`` and lists its `samples`.

    Batches are (images ``(batch, 3, size, size)`` float32, class indices ``(batch,)`` int64); under predict the second
    part is the list of paths. Training shuffles and drops the last incomplete batch, unless it is the only one.

    Several processes share each batch of training and see together what one would with a batch as large. In evaluation
    every image is counted once: where their number does not divide, batches are filled up with samples of class -100
    or path "", which count nowhere.

    Args:
        batch_size: Images in a batch, on each device.
        global_batch_size: Images in a step of training, over all processes and accumulated batches; it decides the
            batches of training instead of `batch_size`, which remains for evaluation.
        num_workers: Processes that read images beside the training one; 0 reads in the training process.
        image_size: Height and width that the backbone takes, in pixels.
        normalization: ``imagenet`` or ``half`` (mean and deviation 0.5) as the backbone was pre-trained with, ``none``
            for [0, 1], or a pair of (mean, deviation) with three values each. It moves results by points: name it.
        interpolation: How pixels are resampled; bicubic and bilinear are antialiased.
        resize: ``stretch`` to a square, as in VTAB-1k, or ``crop`` the centre after the shorter side fits.
        augment: ``none``, as in VTAB-1k, or ``flip`` to mirror every second training image by chance.
        cache: Decode training and validation images once and keep them in memory (147 MiB for 1000 images of 224 px).
        on_error: ``raise`` at the first image that cannot be read, or ``skip``: read every image once before use, leave
            the unreadable ones out and list them.
        max_skipped: With ``skip``, more unreadable images than this are an error.
        predict_images: For predict: a folder (searched with its subfolders), or a list of files.
    """

    class_names: list[str]
    validation_switch: ClassVar[str] = ""  # the setting that gives validation images where there are none

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
        # The protocol belongs to a run's record; a logger would refuse names that the model has too.
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
        self._own_classes: list[str] | None = None  # in the order of `samples`, where a model has another
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
        """What happens to every image, as plain settings that travel with a model; `Preprocess` takes them again."""
        return asdict(self.preprocess)

    @abstractmethod
    def samples(self, split: Split) -> list[Sample]:
        """List the images of a split with their class indices; empty for ``val`` when nothing is held out."""

    def setup(self, stage: str) -> None:
        """Find the images of a stage (``fit``, ``validate``, ``test``, ``predict``) and say what is missing."""
        if stage not in STAGES:
            raise ValueError(f"unknown stage {stage!r}; choose from: {', '.join(STAGES)}")
        for split in STAGES[stage]:
            if not len(self.dataset(split)) and (split != "val" or stage == "validate"):
                advice = f"; set {self.validation_switch}" if split == "val" and self.validation_switch else ""
                raise ValueError(f"{type(self).__name__} has no image for {split}{advice}")

    def dataset(self, split: str) -> ImageDataset:
        """Return the images of ``train``, ``val``, ``test`` or ``predict``, looked up once."""
        if split not in self._datasets:
            samples = self._predict_samples() if split == "predict" else self._labelled(split)  # type: ignore[arg-type]
            if self.on_error == "skip":
                samples = self._readable(split, samples)
            fitting = split in ("train", "val")  # what is read many times
            flip = split == "train" and self.augment == "flip"
            self._datasets[split] = ImageDataset(samples, self.preprocess, flip=flip, cache=self.cache and fitting)
        return self._datasets[split]

    def take_classes(self, names: Sequence[str]) -> None:
        """Number the classes as a model does, by their names, in the splits to come and in those that are there.

        Where the one or the other has only numbers for names ("0", "1", ...), these stay what they are.

        Args:
            names: Of the model's classes, in the order of their indices; not all of them have to occur in the data.

        Raises:
            ValueError: The data have a class that the model does not know.
        """
        now, own = self.class_names, self._own_classes or self.class_names
        if list(names) == now or (_numbered(names) and len(own) <= len(names)):
            return
        if not _numbered(own) or len(own) > len(names):
            if unknown := [name for name in own if name not in names]:
                raise ValueError(
                    f"the data have classes that the model does not know: {_told(unknown)}; the model has "
                    f"{_told(names)}; the data have {_told(own)}"
                )
            self._own_classes = own
            for split, dataset in self._datasets.items():
                if split != "predict":
                    dataset.samples = _renumbered(dataset.samples, now, names)
        self.class_names = list(names)

    def _labelled(self, split: Split) -> list[Sample]:
        """List the samples of a split with the labels of `class_names`."""
        names, own = self.class_names, self._own_classes
        if own is None:
            samples = self.samples(split)
            self._require_classes(split, samples)
            return samples
        self.class_names = own  # a subclass may look there
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
                    f"there are classes 0 to {self.num_classes - 1}"
                )

    def train_dataloader(self) -> DataLoader:
        dataset, accumulated, seed = self.dataset("train"), 1, torch.initial_seed()
        processes, rank = self._processes()
        if self.trainer is not None:
            accumulated = self.trainer.accumulate_grad_batches
            seed = self.trainer.strategy.broadcast(seed)  # a launcher may have started each process without a seed
        batch_size = self._train_batch_size(processes, accumulated)
        if self.global_batch_size is None:
            accumulated = 1  # as many batches as there are; the last step takes those that are left
        order = EpochOrder(dataset, batch_size, seed=seed, processes=processes, rank=rank, accumulated=accumulated)
        loader = self._train_loader = self._loader(dataset, ResumableLoader, batch_size=batch_size, sampler=order)
        loader.load_state_dict(self._restored)
        self._restored = {}
        return loader

    # Lightning would give the loader its state back by itself, but not where a module counts the batches to plan its
    # schedules: then there is a loader before there is a state.

    def state_dict(self) -> dict[str, int]:
        """Says how far the epoch of training is; Lightning saves it in a checkpoint."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on in the middle of an epoch."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        if self._train_loader is None:
            self._restored = state_dict
        else:
            self._train_loader.load_state_dict(state_dict)

    def _processes(self) -> tuple[int, int]:
        """Says how many processes share the images, and which of them this is."""
        shares = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return shares["num_replicas"], shares["rank"]

    def _train_batch_size(self, processes: int, accumulated: int) -> int:
        """Divides the global batch where it is given, and says what comes out."""
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
        """Names the images of a batch of training that this process sees; empty where that is not known."""
        order = self._train_loader and self._train_loader.sampler
        if not isinstance(order, EpochOrder) or getattr(self.trainer, "overfit_batches", False):
            return []
        samples = self.dataset("train").samples
        return [_named(index, samples[index][0]) for index in order.batch(epoch, batch)]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        dataset = self.dataset("val")
        if len(dataset):
            return self._evaluation_loader("val")
        # Lightning asks to make sure that this is intended; it is.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str) -> DataLoader:
        dataset, (processes, rank) = self.dataset(split), self._processes()
        if processes == 1:
            return self._loader(dataset)
        evened = Evened(dataset, processes)
        return self._loader(evened, sampler=DistributedSampler(evened, processes, rank, shuffle=False))

    def _loader(self, dataset: Dataset, kind: type[Loader] = DataLoader, **options: Any) -> Loader:  # type: ignore[assignment]
        return kind(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            **{"batch_size": self.batch_size} | options,
        )

    def _predict_samples(self) -> list[Sample]:
        if self.predict_images is None:
            raise ValueError("predict needs predict_images: a folder of images or a list of files")
        return [(path, str(path)) for path in find_images(self.predict_images)]

    def _readable(self, split: str, samples: list[Sample]) -> list[Sample]:
        """Decode every image once and keep the samples that can be read.

        Done before any worker process starts, so that the list, its cap and the length of the set are exact.
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


def _numbered(names: Sequence[str]) -> bool:
    return list(names) == [str(k) for k in range(len(names))]


def _renumbered(samples: Sequence[Sample], old: Sequence[str], new: Sequence[str]) -> list[Sample]:
    index = {name: label for label, name in enumerate(new)}
    return [(source, index[old[label]] if isinstance(label, int) else label) for source, label in samples]


def _told(names: Sequence[str], most: int = 10) -> str:
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
