"""The images of a calibration: check that the network was not trained on them, and run them through it once."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from dynadapter.cli.errors import Mistake, one_line
from dynadapter.cli.safety import data_class
from dynadapter.data import ImageData
from dynadapter.data.dataset import ImageDataset, collate
from dynadapter.training.callbacks.stacked_logits import StackedLogits
from dynadapter.training.module import ExitClassifier

Split = Literal["val", "test", "train"]

WORDS = {"val": "validation", "test": "test", "train": "training"}


def check_images(data: ImageData, split: Split, ckpt_path: str) -> tuple[str, ...]:
    """Check that a split has images, and that the network was not trained on those of the validation split.

    Args:
        data: The images.
        split: val, test or train.
        ckpt_path: The checkpoint, which names the images of its training.

    Returns:
        A note if the images of the training are unknown.

    Raises:
        Mistake: If there are no images, or the network was trained on some of them.
    """
    images = data.dataset(split)
    if not len(images):
        switch = f" with {data.validation_switch}" if data.validation_switch else ""
        raise Mistake(
            f"{type(data).__name__} has no {WORDS[split]} images; calibrate a checkpoint that was trained{switch}, and "
            "use its policy for this network too"
        )
    if split != "val":
        return ()
    try:
        trained = _trained_on(ckpt_path, data)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return (f"the images of the training are unknown, and may be among these: {one_line(error)}",)
    both = sum(source in trained for source, _ in images.samples if isinstance(source, Path))
    if both:
        raise Mistake(
            f"the network was trained on {both} of these {len(images)} validation images; leave out the settings of "
            "data that differ from the training's, or calibrate a checkpoint that was trained without them"
        )
    return ()


def _trained_on(ckpt_path: str, data: ImageData) -> set[Path]:
    """Return the image files of the training, as its checkpoint names them; none if it has no image data."""
    saved = torch.load(ckpt_path, map_location="cpu", weights_only=True)["dynadapter"]["data"]
    if saved is None:
        return set()
    cls, arguments = data_class(saved["class_path"]), dict(saved["init_args"])
    if cls is None:
        raise ValueError(f"the training read its data with {saved['class_path']!r:.200}, which is not known here")
    if isinstance(data, cls) and "root" in arguments:
        arguments["root"] = data.hparams["root"]  # the images may have moved since
    return {source for source, _ in cls(**arguments).samples("train") if isinstance(source, Path)}


def stack_logits(
    trainer: Trainer, model: ExitClassifier, data: ImageData, split: Split, ckpt_path: str
) -> tuple[Tensor, Tensor]:
    """Run the images of a split through the network once.

    Args:
        trainer: Runs the network.
        model: Its tensors are read from the checkpoint.
        data: The images.
        split: val, test or train.
        ckpt_path: The checkpoint.

    Returns:
        Logits (exits, samples, classes) float32 and targets (samples,), on the CPU.

    Raises:
        Mistake: If there are fewer than 2 images.
    """
    stacked = StackedLogits()
    trainer.callbacks.append(stacked)  # type: ignore[attr-defined]
    evaluate = partial(trainer.validate, model, ckpt_path=ckpt_path, verbose=False)
    if split == "val":
        evaluate(datamodule=data)
    elif split == "test":
        trainer.test(model, datamodule=data, ckpt_path=ckpt_path, verbose=False)
    else:  # the training's own loader shuffles, augments and drops images
        images = ImageDataset(data.dataset("train").samples, data.preprocess)
        evaluate(DataLoader(images, data.batch_size, num_workers=data.num_workers, collate_fn=collate))
    trainer.callbacks.remove(stacked)  # type: ignore[attr-defined]
    if len(stacked.targets) < 2:
        raise Mistake("one image cannot calibrate and measure; raise trainer.limit_val_batches or add images")
    return stacked.logits, stacked.targets


def some_images(data: ImageData, split: Split, most: int = 64) -> Tensor:
    """Return images (images, 3, size, size), evenly spread over a split, to compare a merged network on."""
    images = ImageDataset(data.dataset(split).samples, data.preprocess)
    count = min(most, len(images))
    return collate([images[k * len(images) // count] for k in range(count)])[0]
