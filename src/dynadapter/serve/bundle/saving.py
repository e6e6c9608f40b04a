"""Writing a bundle, and making sure before it gets its name that it rebuilds the network."""

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dynadapter.adapters import AdapterSpec, adapter_layers
from dynadapter.backbones import built_for, fingerprint
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.exits.heads import Heads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import load_image
from dynadapter.serve.bundle.card import card
from dynadapter.serve.bundle.config import CARD, CONFIG, FILES, MODEL, BackboneSource, Config
from dynadapter.serve.bundle.folder import check_place, write_folder
from dynadapter.serve.bundle.proof import MergeProof, merged_copy
from dynadapter.serve.bundle.tensors import check_finite as refuse_nonfinite
from dynadapter.serve.bundle.tensors import frozen_names, saved_tensors, to_bytes
from dynadapter.spec import plain, restore

Preprocessing = Preprocess | Mapping[str, Any]


class Classifier(Protocol):
    """What :func:`bundle_from_classifier` reads of an :class:`~dynadapter.training.module.ExitClassifier`."""

    net: ExitNet
    backbone_name: str
    backbone_hash: str
    class_names: list[str]
    preprocessing: dict[str, Any]

    @property
    def hparams(self) -> Any: ...


def save_bundle(
    net: ExitNet,
    folder: str | os.PathLike[str],
    *,
    backbone: BackboneSource,
    adapter: AdapterSpec | None,
    heads: Heads,
    policy: Policy,
    class_names: Sequence[str],
    preprocessing: Preprocessing | None = None,
    costs: ExitCosts | None = None,
    measured: Any = None,
    whole: bool = False,
    merged: bool = False,
    proof: MergeProof | None = None,
    overwrite: bool = False,
    check_finite: bool = True,
) -> Path:
    """Writes a network as a bundle, whole or not at all.

    Before the folder gets its name, the network is built again from what is to be written and compared with the given
    one, tensor by tensor and bit by bit on an image of noise, on the CPU. The given one is left as it is.

    Args:
        net: The network.
        folder: Where to write; must not exist.
        backbone: Where its backbone comes from.
        adapter: Kind of adapter, or None; of a merged network the kind that was folded in.
        heads: Kind of the early heads.
        policy: Who leaves where, with its temperatures (:class:`~dynadapter.exits.temperature.Scaled`) where it has
        some.
        class_names: In the order of their indices.
        preprocessing: A :class:`~dynadapter.images.preprocess.Preprocess` or its fields; None or empty for a bundle
            that takes tensors alone.
        costs: :func:`~dynadapter.cost.exit_costs` of this network.
        measured: What was measured on data: an :class:`~dynadapter.calibrate.Outcome` or a mapping with any of ``data``
            (which), ``samples``, ``accuracy``, ``shares`` (exits,), ``cost`` (relative to the backbone),
            ``milliseconds``, and whatever else belongs on the card. Lists with a value for each exit are shown by exit.
        whole: Write all tensors, so that nobody needs a backbone file.
        merged: The adapters were folded into the backbone; such a network is written whole.
        proof: What :func:`~dynadapter.serve.bundle.merged_copy` said.
        overwrite: Replace a bundle that is there. A reader sees the old one or the new one.
        check_finite: Refuse tensors that hold NaN or infinity.

    Returns:
        The folder.

    Raises:
        ValueError: If the place is taken, parts do not fit each other, or the network cannot be rebuilt from them.
    """
    place = Path(os.path.realpath(Path(folder).expanduser()))
    check_place(place, FILES, overwrite)
    if merged and adapter_layers(net.backbone):
        raise ValueError("merged=True, but the network still has adapters; merge a copy by merged_copy first")
    if backbone.name.startswith("local-dir:"):
        raise ValueError(
            f"the backbone {backbone.name!r} is a folder that the bundle's user does not have; name it by its timm "
            "architecture, with backbone_args, and give its file as weights"
        )
    config = Config(
        backbone=backbone,
        adapter=adapter,
        heads=heads,
        exit_depths=net.exit_depths,
        num_classes=net.num_classes,
        class_names=tuple(class_names),
        policy=policy,
        preprocessing=_preprocess(preprocessing, net.backbone),
        costs=costs,
        measured=_measured(measured),
        whole=whole or merged,
        merged=merged,
        proof=proof,
        token_merging=net.token_merging,
        dtype=str(_type(net)).removeprefix("torch."),  # type: ignore[arg-type]
    )
    tensors = saved_tensors(net, config.whole)
    if check_finite:
        refuse_nonfinite(tensors, "the network")
    data, sha256 = to_bytes(tensors)
    config = config.stamped(sha256)
    text = config.dumps()
    _check_rebuilt(net, Config.loads(text, CONFIG), tensors)
    write_folder(place, {MODEL: data, CARD: card(config, len(data)).encode(), CONFIG: text.encode()})
    return place


def bundle_from_classifier(
    classifier: Classifier,
    folder: str | os.PathLike[str],
    *,
    policy: Policy,
    whole: bool | None = None,
    merge: bool = False,
    check_images: Tensor | Iterable[str | os.PathLike[str] | Image.Image] | None = None,
    tolerance: float = 1e-4,
    preprocessing: Preprocessing | None = None,
    costs: ExitCosts | Literal["count"] | None = "count",
    measured: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes a trained :class:`~dynadapter.training.module.ExitClassifier` as a bundle; see :func:`save_bundle`.

    Args:
        classifier: It is left as it is.
        folder: Where to write; must not exist.
        policy: Who leaves where, for example the policy that calibration found.
        whole: Write all tensors, so that nobody needs a backbone file; by default as the classifier's
        ``full_checkpoint``.
        merge: Fold the adapters of a copy into its backbone, and write it whole.
        check_images: Real images on which the merged network is compared with the unmerged one: files, images, or
            preprocessed (images, channels, height, width).
        tolerance: See :func:`~dynadapter.serve.bundle.merged_copy`.
        preprocessing: Instead of the classifier's own; an empty mapping for a bundle that takes tensors alone.
        costs: Multiply-adds up to each exit; ``count`` counts what is written, None leaves them out.
        measured: What was measured on data.
        overwrite: Replace a bundle that is there.

    Returns:
        The folder.

    Raises:
        ValueError: As :func:`save_bundle`; if the classifier knows no preprocessing; if merging is refused.
    """
    settings, net = classifier.hparams, classifier.net
    check_place(Path(os.path.realpath(Path(folder).expanduser())), FILES, overwrite)
    if preprocessing is None:
        if not classifier.preprocessing:
            raise ValueError(
                "the classifier knows no preprocessing, because its data had none to tell; give preprocessing="
                "{'image_size': ..., 'normalization': ...}, or preprocessing={} for a bundle that takes tensors alone"
            )
        preprocessing = classifier.preprocessing
    preprocess = _preprocess(preprocessing, net.backbone)
    adapter = restore(settings["adapter"], AdapterSpec | None, "adapter")
    proof = None
    if merge:
        if check_images is None:
            raise ValueError(
                "merging is proved on real images of the task: give some as check_images, files or tensors"
            )
        net, proof = merged_copy(net, _images(check_images, preprocess, net), policy, tolerance)
    if costs == "count":
        costs = exit_costs(net, preprocess.image_size if preprocess else None)
    source = _source(classifier)
    return save_bundle(
        net,
        folder,
        backbone=source,
        adapter=adapter,
        heads=restore(settings["heads"], Heads, "heads"),
        policy=policy,
        class_names=classifier.class_names,
        preprocessing=preprocess,
        costs=costs,
        measured=measured,
        whole=settings.get("full_checkpoint", False) if whole is None else whole,
        merged=merge,
        proof=proof,
        overwrite=overwrite,
    )


def _source(classifier: Classifier) -> BackboneSource:
    """Says where a classifier's backbone comes from."""
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
    )
    # A full checkpoint says neither pretrained nor weights, whatever its backbone was made of.
    if source.origin == "seed" and settings.get("full_checkpoint"):
        drawn = fingerprint(source.create(classifier.net.num_classes))
        source = source if drawn == source.fingerprint else replace(source, origin="file")
    return source


def _preprocess(given: Preprocessing | None, backbone: nn.Module) -> Preprocess | None:
    """Checks the preprocessing against the backbone."""
    if isinstance(given, Preprocess):
        preprocess = given
    elif given:
        preprocess = restore(dict(given), Preprocess, "preprocessing")
    else:
        return None
    built, size, channels = built_for(backbone), preprocess.image_size, _stem(backbone).in_channels
    if built is not None and size != built:
        raise ValueError(
            f"preprocessing gives images of {size} pixels, the backbone was built for {built}; give the same"
        )
    if channels != 3:
        raise ValueError(
            f"preprocessing gives images of 3 channels, the backbone takes {channels}; give preprocessing={{}} for a "
            "bundle that takes tensors alone"
        )
    return preprocess


def _measured(given: Any) -> dict[str, Any] | None:
    """Turns what was measured into plain data; an accuracy that could not be measured (NaN) is none."""
    if given is None:
        return None
    if not (isinstance(given, Mapping) or (is_dataclass(given) and not isinstance(given, type))):
        raise ValueError(f"measured={given!r} must be a mapping of names and values, or an Outcome of calibration")
    return {name: None if value != value else value for name, value in plain(given).items()}


def _type(net: ExitNet) -> torch.dtype:
    return next(net.backbone.parameters()).dtype


def _stem(backbone: nn.Module) -> nn.Conv2d:
    return next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))


def _images(given: Any, preprocess: Preprocess | None, net: ExitNet) -> Tensor:
    """Gives images to compare on as one tensor beside the network."""
    if not isinstance(given, Tensor):
        if preprocess is None:
            raise ValueError("without preprocessing, check_images must be a tensor (images, channels, height, width)")
        files = [image if isinstance(image, Image.Image) else Path(image) for image in given]
        if not files:
            raise ValueError("check_images is empty; give some real images of the task")
        given = torch.from_numpy(np.stack([preprocess(load_image(file)) for file in files]))
    like = next(net.backbone.parameters())
    return given.to(like.device, like.dtype)


@torch.no_grad()
def _check_rebuilt(net: ExitNet, config: Config, tensors: dict[str, Tensor]) -> None:
    """Builds the network again from what is to be written, and compares.

    Raises:
        ValueError: If it is not the same network.
    """
    net = copy.deepcopy(net).cpu().eval()
    for tensor in net.parameters():  # the order in memory, which decides the last bits, is not written
        tensor.data = tensor.data.contiguous()
    backbone = config.backbone.create(net.num_classes)
    if not config.whole and config.backbone.origin == "seed" and fingerprint(backbone) != config.backbone.fingerprint:
        raise ValueError(
            f"the backbone is not the one that seed {config.backbone.seed} draws, so it cannot be drawn again "
            f"where the "
            "bundle is used; write the bundle whole, or say what the backbone's origin is"
        )
    bare = copy.deepcopy(backbone)
    own = backbone.state_dict(keep_vars=True)  # the bare backbone's names; injection renames, but keeps the tensors
    twin = config.assemble(backbone, dict(tensors), "the network")
    state, frozen = net.state_dict(), frozen_names(twin)
    wrong = set(state) ^ set(twin.state_dict())
    if wrong:
        raise ValueError(
            f"backbone, adapter and heads as given do not rebuild this network: {sorted(wrong)[0]} differs"
        )
    twin.load_state_dict(state)
    image = _noise(net, config)
    if not torch.equal(net(image).nan_to_num(), twin(image).nan_to_num()):
        raise ValueError(
            "backbone, adapter and heads as given do not rebuild this network: the logits differ; give those "
            "that it was "
            "made with (a scale, a pooling or a timm argument is another)"
        )
    # Other types round the backbone's tensors, and tensors of the backbone that were trained are in the file.
    if not config.whole and config.dtype == "float32" and not any(name in frozen for name in tensors):
        bare.load_state_dict(own)
        found = fingerprint(bare)
        if found != config.backbone.fingerprint:
            raise ValueError(
                f"the network's backbone has the weights {found[:12]}, the bundle is to say "
                f"{config.backbone.fingerprint[:12]}: its frozen tensors have changed, or that is another backbone's"
            )


def _noise(net: ExitNet, config: Config) -> Tensor:
    backbone: Any = net.backbone
    size = config.preprocessing.image_size if config.preprocessing else built_for(backbone)
    height, width = (size, size) if size else backbone.pretrained_cfg["input_size"][1:]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, _stem(backbone).in_channels, height, width, generator=generator).to(_type(net))
