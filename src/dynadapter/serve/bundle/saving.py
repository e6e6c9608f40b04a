"""Write a bundle, after checking that it rebuilds the network."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

from torch import nn

from dynadapter.adapters import Adapters, adapter_layers
from dynadapter.backbones import built_for, fixed_size, frames, in_chans
from dynadapter.backbones.stored import check_name
from dynadapter.cost import ExitCosts
from dynadapter.exits.heads import Heads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy
from dynadapter.files import write_folder
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle.card import card
from dynadapter.serve.bundle.config import CARD, CONFIG, MODEL, BackboneSource, Config
from dynadapter.serve.bundle.place import check_place
from dynadapter.serve.bundle.proof import MergeProof
from dynadapter.serve.bundle.rebuilding import check_rebuilt, tensor_type
from dynadapter.serve.bundle.tensors import check_finite as refuse_nonfinite
from dynadapter.serve.bundle.tensors import saved_tensors, to_bytes
from dynadapter.spec import plain, restore

Preprocessing = Preprocess | Mapping[str, Any]


class Parts(TypedDict):
    """The fields of :class:`~dynadapter.serve.bundle.Config` that the writer of a bundle names."""

    backbone: BackboneSource
    adapter: Adapters | None
    heads: Heads
    policy: Policy
    class_names: Sequence[str]
    costs: NotRequired[ExitCosts | None]
    whole: NotRequired[bool]
    merged: NotRequired[bool]
    proof: NotRequired[MergeProof | None]


def save_bundle(
    net: ExitNet,
    folder: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing | None = None,
    measured: Any = None,
    overwrite: bool = False,
    check_finite: bool = True,
    **parts: Unpack[Parts],
) -> Path:
    """Write a network as a bundle, atomically, and return the folder.

    Before the folder gets its name, the network is rebuilt from the files and compared with the given one on the CPU:
    tensor by tensor, and bit by bit on an image of noise. The given network is not changed.

    Args:
        net: The network.
        folder: The folder to write; it must not exist.
        preprocessing: A :class:`~dynadapter.images.preprocess.Preprocess` or its fields; None or empty for a bundle
            that takes only tensors, as the bundle of a backbone of videos always does.
        measured: An :class:`~dynadapter.calibrate.Outcome`, or a mapping with any of ``data`` (its name), ``samples``,
            ``accuracy``, ``shares`` (exits,), ``confidence`` and ``confidence_deviation`` (a server compares with these
            three), ``cost`` (fraction of static), ``milliseconds``, and other entries for the card. Lists with one
            value per exit are shown by exit.
        overwrite: Replace an existing bundle. A reader sees either the old or the new one.
        check_finite: Refuse tensors that hold NaN or infinity.
        parts: Fields of :class:`~dynadapter.serve.bundle.Config`: ``backbone``, ``adapter``, ``heads``, ``policy`` and
            ``class_names``; ``costs``, ``whole``, ``merged`` and ``proof`` if they differ from the defaults.

    Raises:
        ValueError: The folder is in use, parts do not fit each other, or the network cannot be rebuilt from them.
    """
    place = check_place(folder, overwrite)
    config = describe(net, preprocessing=preprocessing, measured=measured, **parts)
    tensors = saved_tensors(net, config.whole)
    if check_finite:
        refuse_nonfinite(tensors, "the network")
    data, sha256 = to_bytes(tensors)
    config = config.stamped(sha256)
    text = config.dumps()
    check_rebuilt(net, Config.loads(text, CONFIG), tensors)
    files = {MODEL: data, CARD: card(config, len(data)).encode(), CONFIG: text.encode()}
    write_folder(place, files, overwrite, check_place)
    return place


def describe(
    net: ExitNet, *, preprocessing: Preprocessing | None = None, measured: Any = None, **parts: Unpack[Parts]
) -> Config:
    """Return the configuration of a bundle of this network; arguments as in :func:`save_bundle`."""
    merged, name = parts.get("merged", False), parts["backbone"].name
    if merged and adapter_layers(net.backbone):
        raise ValueError("merged=True, but the network still has adapters; merge a copy by merged_copy first")
    try:
        check_name(name)
    except ValueError:
        raise ValueError(
            f"the backbone {name!r} is none of timm's own, and a bundle may name no other; name it by its timm "
            "architecture, with backbone_args, and give its file as weights"
        ) from None
    fields: dict[str, Any] = {
        **parts,
        "class_names": tuple(parts["class_names"]),
        "exit_depths": net.exit_depths,
        "num_classes": net.num_classes,
        "preprocessing": as_preprocess(preprocessing, net.backbone),
        "measured": _measured(measured),
        "whole": parts.get("whole", False) or merged,
        "token_merging": net.token_merging,
        "dtype": str(tensor_type(net)).removeprefix("torch."),
    }
    return Config(**fields)


def as_preprocess(given: Preprocessing | None, backbone: nn.Module) -> Preprocess | None:
    """Return the preprocessing as an object, after checking it against the backbone.

    There is none for a backbone of videos: which frames of a file are taken is up to the data.
    """
    fixed_size(backbone)  # refuses a backbone for images that are not square
    if isinstance(given, Preprocess):
        preprocess = given
    elif given:
        preprocess = restore(dict(given), Preprocess, "preprocessing")
    else:
        return None
    if frames(backbone) is not None:
        return None
    built, size, channels = built_for(backbone), preprocess.image_size, in_chans(backbone)
    if built is not None and size != built:
        raise ValueError(
            f"preprocessing gives images of {size} pixels, the backbone was built for {built}; give the same"
        )
    if channels != 3:
        raise ValueError(
            f"preprocessing gives images of 3 channels, the backbone takes {channels}; give preprocessing={{}} for a "
            "bundle that takes only tensors"
        )
    return preprocess


def _measured(given: Any) -> dict[str, Any] | None:
    """Return the measurements as plain data, with None for an accuracy of NaN."""
    if given is None:
        return None
    if not (isinstance(given, Mapping) or (is_dataclass(given) and not isinstance(given, type))):
        raise ValueError(f"measured={given!r} must be a mapping of names and values, or an Outcome of calibration")
    return {name: None if value != value else value for name, value in plain(given).items()}
