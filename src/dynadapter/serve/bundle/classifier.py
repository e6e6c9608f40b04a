"""Convert a trained classifier into a bundle, in a folder or in memory."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dynadapter.adapters import Adapters
from dynadapter.backbones import fingerprint
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.exits.heads import Heads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import Source
from dynadapter.serve.bundle.config import BackboneSource
from dynadapter.serve.bundle.loading import Bundle
from dynadapter.serve.bundle.place import check_place
from dynadapter.serve.bundle.proof import merged_copy
from dynadapter.serve.bundle.saving import Preprocessing, as_preprocess, describe, save_bundle
from dynadapter.serve.bundle.tensors import saved_tensors, to_bytes
from dynadapter.spec import restore


class Classifier(Protocol):
    """The attributes of an :class:`~dynadapter.training.module.ExitClassifier` that this module reads."""

    net: ExitNet
    backbone_name: str
    backbone_hash: str
    class_names: list[str]
    preprocessing: dict[str, Any]

    @property
    def hparams(self) -> Any: ...


def bundle_from_classifier(
    classifier: Classifier,
    folder: str | os.PathLike[str],
    *,
    policy: Policy,
    whole: bool | None = None,
    merge: bool = False,
    check_images: Tensor | Iterable[Source] | None = None,
    tolerance: float = 1e-4,
    preprocessing: Preprocessing | None = None,
    costs: ExitCosts | Literal["count"] | None = "count",
    measured: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained :class:`~dynadapter.training.module.ExitClassifier` as a bundle, and return the folder.

    Args:
        classifier: The trained classifier; it is not changed.
        folder: The folder to write; it must not exist.
        policy: Decides at which exit a sample stops, for example the policy that calibration found.
        whole: Write all tensors, so that no backbone file is needed; None for the classifier's ``full_checkpoint``.
        merge: Merge the adapters of a copy into its backbone, and write it whole.
        check_images: Real images on which the merged network is compared with the unmerged one: files, images, or
            preprocessed (images, channels, height, width).
        tolerance: See :func:`~dynadapter.serve.bundle.merged_copy`.
        preprocessing: Preprocessing to use instead of the classifier's own; an empty mapping for a bundle that takes
            only tensors.
        costs: Cost up to each exit; ``count`` counts the written network, None stores no cost.
        measured: See :func:`~dynadapter.serve.bundle.save_bundle`.
        overwrite: Replace an existing bundle.

    Raises:
        ValueError: As :func:`~dynadapter.serve.bundle.save_bundle`; the classifier knows no preprocessing; the adapters
            cannot be merged.
    """
    check_place(folder, overwrite)
    net, proof = classifier.net, None
    preprocess = as_preprocess(_preprocessing(classifier, preprocessing), net.backbone)
    if merge:
        if check_images is None:
            raise ValueError("merging is checked on real images of the task: give some as check_images")
        net, proof = merged_copy(net, _images(check_images, preprocess, net), policy, tolerance)
    fields = _fields(classifier) | {"policy": policy, "preprocessing": preprocess, "measured": measured}
    if costs == "count":
        costs = exit_costs(net, preprocess.image_size if preprocess else None)
    full = classifier.hparams.get("full_checkpoint", False) if whole is None else whole
    return save_bundle(net, folder, **fields, costs=costs, whole=full, merged=merge, proof=proof, overwrite=overwrite)


def in_memory(classifier: Classifier, policy: Policy) -> Bundle:
    """Return a classifier as a bundle without writing it; the network is shared."""
    net = classifier.net.eval().requires_grad_(False)
    fields = _fields(classifier) | {"policy": policy, "preprocessing": _preprocessing(classifier, None)}
    config = describe(net, **fields)
    return Bundle(net, policy, config.stamped(to_bytes(saved_tensors(net, whole=True))[1]))


def _preprocessing(classifier: Classifier, given: Preprocessing | None) -> Preprocessing:
    if given is None and not classifier.preprocessing:
        raise ValueError(
            "the classifier knows no preprocessing, because its data had none; give preprocessing="
            "{'image_size': ..., 'normalization': ...}, or preprocessing={} for a bundle that takes only tensors"
        )
    return classifier.preprocessing if given is None else given


def _fields(classifier: Classifier) -> dict[str, Any]:
    """Return the fields of the configuration that the classifier provides."""
    settings = classifier.hparams
    return {
        "backbone": _source(classifier),
        "adapter": restore(settings["adapter"], Adapters | None, "adapter"),
        "heads": restore(settings["heads"], Heads, "heads"),
        "class_names": classifier.class_names,
    }


def _source(classifier: Classifier) -> BackboneSource:
    """Find out where a classifier's backbone comes from."""
    settings = classifier.hparams
    file = settings.get("weights")
    source = BackboneSource(
        name=classifier.backbone_name,
        fingerprint=classifier.backbone_hash,
        origin="file" if file else "pretrained" if settings["pretrained"] else "seed",
        timm_args=settings.get("backbone_args") or {},
        image_size=settings.get("image_size"),
        seed=settings.get("backbone_seed", 0),
        file=Path(file).name if file else None,
        depth=settings.get("depth"),
    )
    # A full checkpoint names neither pretrained nor weights, whatever its backbone was made of.
    if source.origin == "seed" and settings.get("full_checkpoint"):
        drawn = fingerprint(source.create(classifier.net.num_classes))
        source = source if drawn == source.fingerprint else replace(source, origin="file")
    return source


def _images(given: Any, preprocess: Preprocess | None, net: ExitNet) -> Tensor:
    """Return images to compare on as one tensor on the network's device."""
    if not isinstance(given, Tensor):
        if preprocess is None:
            raise ValueError("without preprocessing, check_images must be a tensor (images, channels, height, width)")
        read = [preprocess.read(image) for image in given]
        if not read:
            raise ValueError("check_images is empty; give some real images of the task")
        given = torch.from_numpy(preprocess.normalize(np.stack(read)))
    like = next(net.backbone.parameters())
    return given.to(like.device, like.dtype)
