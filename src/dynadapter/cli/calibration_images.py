"""The images of a calibration: check that the network was not trained on them, and compute their logits."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dynadapter.cli.errors import Mistake, mistakes, nearest_place
from dynadapter.cli.networks import check_network, load_bundle, load_checkpoint
from dynadapter.data import ImageData
from dynadapter.data.dataset import ImageDataset, collate
from dynadapter.exits.policies import Never
from dynadapter.serve.bundle import Bundle
from dynadapter.training.callbacks.stacked_logits import StackedLogits
from dynadapter.training.checkpoints import read
from dynadapter.training.contents import saved_contents
from dynadapter.training.module import ExitClassifier

Split = Literal["val", "test", "train"]

SOME_COPIES = 0.05
"""A larger fraction of validation images that the network was trained on is an error."""
WORDS = {"val": "validation", "test": "test", "train": "training"}


def check_images(data: ImageData, split: Split, ckpt_path: str, guarantee: bool = False) -> tuple[str, ...]:
    """Compare a split with the images of the training, whose keys are in the checkpoint.

    A few validation images that are copies of training images are left out.

    Returns:
        Notes about the images.
    """
    images = data.dataset(split)
    if not len(images):
        switch = f" with {data.validation_switch}" if data.validation_switch else ""
        raise Mistake(
            f"{type(data).__name__} has no {WORDS[split]} images; calibrate a checkpoint that was trained{switch}, and "
            "use its policy for this network too"
        )
    if (known := _images_of_the_training(ckpt_path)) is None:
        return ("the images of the training are unknown, and may be among these",)
    by, train, held_out = known
    keys = images.image_keys(by)[1]
    trained = torch.isin(keys, train)
    both, what = int(trained.sum()), f"the {len(images)} {WORDS[split]} images"
    if both and guarantee:
        raise Mistake(
            f"the network was trained on {both} of {what}, and a guarantee for future images needs others; leave these "
            "images out"
        )
    if both and split == "val":
        if both > SOME_COPIES * len(images):
            raise Mistake(
                f"the network was trained on {both} of {what}; leave out the settings of data that differ from the "
                "training's, or calibrate a checkpoint that was trained without them"
            )
        pairs = zip(images.samples, trained.tolist(), strict=True)
        images.relabel([sample for sample, known in pairs if not known])
        return (f"{both} of {what} equal training images and are left out",)
    if both and split == "test":
        return (f"the network was trained on {both} of {what}",)
    return _compare_held_out(keys, held_out) if split == "val" else ()


def _images_of_the_training(ckpt_path: str) -> tuple[Literal["content", "path"], Tensor, Tensor] | None:
    """Return the keys of the training and validation images in a checkpoint; None if they are missing or not valid."""
    with mistakes(kinds=(ValueError, OSError)):
        checkpoint = read(ckpt_path)
    with mistakes(f"{ckpt_path}: "):
        saved = saved_contents(checkpoint)["images"]
    by: Any = saved.get("by")
    keys = [one for one in (saved.get("train"), saved.get("val")) if isinstance(one, Tensor)]
    if by not in ("content", "path") or [one.dtype for one in keys] != [torch.int64, torch.int64]:
        return None
    return by, keys[0], keys[1]


def _compare_held_out(keys: Tensor, held_out: Tensor) -> tuple[str, ...]:
    """Return a note if the validation images are not the ones that the training held out."""
    new = int((~torch.isin(keys, held_out)).sum())
    missing = int((~torch.isin(held_out, keys)).sum())
    if not len(held_out) or not (new or missing):
        return ()
    return (f"of these validation images {new} were not held out in the training, and {missing} that were are missing",)


def stack_logits(
    trainer: Trainer, model: ExitClassifier, data: ImageData, split: Split, ckpt_path: str
) -> tuple[Tensor, Tensor]:
    """Run the images of a split through the network once.

    Returns:
        Logits (exits, samples, classes) float32 and targets (samples,), on the CPU.
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
        evaluate(data.loader(images, data.batch_size))
    trainer.callbacks.remove(stacked)  # type: ignore[attr-defined]
    if len(stacked.targets) < 2:
        raise Mistake("one image cannot calibrate and measure; raise trainer.limit_val_batches or add images")
    return stacked.logits, stacked.targets


def some_images(data: ImageData, split: Split) -> Tensor:
    """Return at most 64 images (images, 3, size, size), evenly spread over a split, to compare a merged network on."""
    images = ImageDataset(data.dataset(split).samples, data.preprocess)
    count = min(64, len(images))
    return collate([images[k * len(images) // count] for k in range(count)])[0]


def load_reference(
    place: str, data: ImageData, split: Split, class_names: Sequence[str]
) -> tuple[Bundle, tuple[str, ...]]:
    """Load another network, such as a static one, and check that it is a reference for the images of a split.

    Args:
        place: Its checkpoint or bundle.
        data: The images.
        split: val, test or train.
        class_names: The classes; those of the other network are matched by name.

    Returns:
        The network, and notes about its images.
    """
    given, path = f"goal.reference={place}", Path(os.path.expanduser(place))
    if not path.exists():
        raise Mistake(f"{given} does not exist{nearest_place(place) or '; give a checkpoint or a bundle'}")
    if path.is_dir():
        check_network(place)
        network, known = load_bundle(place, None, None), None
    else:
        known = _images_of_the_training(str(path))  # its checksums first
        network = load_checkpoint(place, None, None)[0]
    if set(network.class_names) != set(class_names):
        raise Mistake(f"{given} has other classes; give a network that was trained for the same ones")
    if network.preprocess is None:
        raise Mistake(f"{given} takes only tensors, no image files; leave it out")
    if known is None:
        return network, (f"the images of the training of {given} are unknown, and may be among these",)
    images = data.dataset(split)
    if both := int(torch.isin(images.image_keys(known[0])[1], known[1]).sum()):
        raise Mistake(
            f"{given} was trained on {both} of the {len(images)} {WORDS[split]} images; give a network that was "
            "trained with the same split"
        )
    return network, ()


def reference_classes(
    network: Bundle, data: ImageData, split: Split, class_names: Sequence[str], targets: Tensor
) -> Tensor:
    """Run the images of a split through a network of :func:`load_reference`, as reference of the accuracy.

    Args:
        network: The network, which uses its own preprocessing.
        data: The images.
        split: val, test or train.
        class_names: The classes, in the order of their indices.
        targets: Targets of the images that were run (samples,): the first ones of the split.

    Returns:
        The classes that its last exit predicts (samples,).
    """
    samples = data.dataset(split).samples[: len(targets)]
    if [label for _, label in samples] != targets.tolist():
        raise Mistake(f"goal.reference: the {WORDS[split]} images were not run in their order; report this bug")
    number = {name: index for index, name in enumerate(class_names)}
    found = network.predict([source for source, _ in samples], policy=Never())
    return torch.tensor([number[one.label] for one in found])
