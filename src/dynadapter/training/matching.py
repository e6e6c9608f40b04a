"""Match class names, preprocessing and image size between a model and a data module."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from dynadapter.backbones import fixed_size, frames, set_image_size
from dynadapter.files import listed
from dynadapter.training.class_weights import lists_images, require_one_correction, without_images
from dynadapter.training.contents import different_class


def unnamed(names: Sequence[str]) -> bool:
    """Check whether class names are only the indices "0", "1", ..., which stand for missing names."""
    return list(names) == [str(k) for k in range(len(names))]


def match(module: Any, data: Any, stage: str) -> None:
    """Set preprocessing and classes of the data from the model, or in a first training class names from the data.

    Args:
        module: The model, with ``net``, ``class_names``, ``preprocessing`` (of its training; empty before) and
            ``own_preprocessing``.
        data: A data module; attributes that it does not have are skipped.
        stage: ``fit``, ``validate`` or ``test``.

    Raises:
        ValueError: The classes do not fit, the backbone cannot take the images, or classes are balanced twice.
    """
    if stage == "fit":
        require_one_correction(getattr(module, "class_weights", None), data)
    if hasattr(data, "take_preprocessing"):
        match_images(module, data, stage)
    names = getattr(data, "class_names", None)
    if names is None:
        return
    if stage == "fit" and not module.preprocessing and unnamed(module.class_names):
        module.class_names = _adopted(list(names), module.net.num_classes)
    if hasattr(data, "take_classes"):
        data.take_classes(module.class_names)


def match_images(module: Any, data: Any, stage: str) -> None:
    """Set preprocessing and image size as :func:`match` does, and leave the classes.

    Raises:
        ValueError: The backbone cannot take the images.
    """
    _match_frames(frames(module.net.backbone), getattr(data, "frames", None))
    data.take_preprocessing(module.preprocessing or module.own_preprocessing, bool(module.preprocessing))
    _match_size(module, data.image_size, stage)


def _match_frames(wanted: int | None, given: int | None) -> None:
    if wanted == given:
        return
    ours, theirs = (f"clips of {one} frames" if one else "images" for one in (wanted, given))
    if wanted and given:
        advice = f"set frames={wanted} of the data, or frames={given} in backbone_args"
    else:
        advice = "read them by VideoLists" if wanted else "give a backbone of videos, such as videomae_base_patch16_224"
    raise ValueError(f"the backbone takes {ours}, and the data give {theirs}; {advice}")


def _match_size(module: Any, size: int, stage: str) -> None:
    built = fixed_size(module.net.backbone)
    if stage != "fit":
        set_image_size(module.net.backbone, size)
    elif built not in (None, size):
        raise ValueError(
            f"the data give images of {size} pixels, and the backbone was built for {built}; leave out the data's "
            f"image_size, or give the model image_size={size} too"
        )


def _adopted(names: list[str], classes: int) -> list[str]:
    """Return the class names of a model without names from the data of its first training."""
    if unnamed(names) and len(names) < classes:  # labels of lists, of which the highest are not used
        return [str(k) for k in range(classes)]
    if len(names) <= classes:
        return names + [f"unused {k}" for k in range(len(names), classes)]
    raise ValueError(
        f"the model has {classes} classes and the data have {len(names)} ({listed(names)}); give "
        f"num_classes={len(names)}, or class_names with the names of all classes"
    )


def common_classes(theirs: list[str], ours: list[str], data: Any) -> list[str]:
    """Return the class names of a model that reads a checkpoint."""
    difference = different_class(theirs, ours)
    if not difference:
        return theirs
    if len(theirs) == len(ours):
        if unnamed(ours) or (sorted(theirs) == sorted(ours) and hasattr(data, "take_classes")):
            return theirs
        if unnamed(theirs):
            return ours
    raise ValueError(difference)


def take_from_data(module: Any, data: Any) -> None:
    """Store preprocessing, settings and image keys of a data module in the model, to be saved with it."""
    if lists_images(data) and module.trainer.is_global_zero:  # which writes the checkpoints
        module.images = _images(data.dataset("train"), data.dataset("val"))
    if hasattr(data, "account") and (counted := data.account()) is not None:
        rank_zero_info(str(counted))
    for line in without_images(data):
        rank_zero_info(line)
    settings = getattr(data, "preprocessing", None)
    module.preprocessing = dict(settings) if isinstance(settings, Mapping) else {}
    module.data_config = {
        "class_path": f"{type(data).__module__}.{type(data).__qualname__}",
        "init_args": {name: value for name, value in data.hparams.items() if not name.startswith("_")},
    }


def _images(train: Any, val: Any = None) -> dict[str, Any]:
    """Return the keys of the images of a training; empty if they are not known."""
    if not hasattr(train, "image_keys"):
        return {}
    by, keys = train.image_keys()
    return {"by": by, "train": keys, "val": val.image_keys(by)[1] if val is not None else keys[:0]}


def take_from_loader(module: Any, loader: Any) -> None:
    """Take class names and preprocessing from the dataset of a loader without a data module."""
    dataset = getattr(loader, "dataset", None)
    dataset = getattr(dataset, "dataset", dataset)  # of a Subset or padding
    names = getattr(dataset, "classes", None)
    if unnamed(module.class_names) and isinstance(names, list) and len(names) == len(module.class_names):
        module.class_names = [str(name) for name in names]
    module.images = _images(getattr(loader, "dataset", None))
    if isinstance(settings := getattr(dataset, "preprocessing", None), dict):
        module.preprocessing = settings


def describe_images(preprocessing: dict[str, Any]) -> None:
    """Print in one line how the images of a training are read."""
    size = preprocessing["image_size"]
    names = {"imagenet": "imagenet", "half": "half (mean and deviation 0.5)", "none": "none ([0, 1])"}
    given = preprocessing["normalization"]
    how = names.get(given, str(given)) if isinstance(given, str) else f"mean {given[0]} deviation {given[1]}"
    scaling = f"{preprocessing['resize']}, {preprocessing['interpolation']}"
    rank_zero_info(f"images: {size} x {size} pixels, {scaling}, normalization {how}")
