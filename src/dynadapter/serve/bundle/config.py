"""The content of ``config.json`` as one object, and the network that it describes."""

import json
import platform
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

import dynadapter
from dynadapter.adapters import Adapters, inject
from dynadapter.backbones import DrawFrom, LimitedMemory, create_backbone, cut_depth, stored_in
from dynadapter.backbones.stored import check_arguments, check_name
from dynadapter.cost import ExitCosts
from dynadapter.exits.heads import Heads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.files import checksum
from dynadapter.images.preprocess import Preprocess
from dynadapter.limits import require_bounded, require_few_classes
from dynadapter.serve.bundle.proof import MergeProof
from dynadapter.serve.bundle.tensors import fill
from dynadapter.spec import plain, restore

FORMAT = 3
"""Version of the layout; readers accept only this version."""

CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
FILES = (MODEL, CARD, CONFIG)
"""The files of a bundle in the order in which they are written: without the last one it is not a bundle."""


@dataclass(frozen=True)
class BackboneSource:
    """The source of the frozen backbone, and its fingerprint.

    Args:
        name: The timm name with its weights' tag.
        fingerprint: :func:`dynadapter.backbones.fingerprint` before adapters were injected and anything was trained.
        origin: ``pretrained``: timm fetches the weights of this name; ``file``: the user of the bundle gives a weight
            file; ``seed``: the weights are drawn from ``seed``, no file is needed.
        timm_args: Further arguments of :func:`~dynadapter.backbones.create_backbone` for timm's model.
        image_size: Pixels of the square input; None for the backbone's own.
        seed: Random seed of the tensors that no weights set.
        file: Name of the weight file in the training, as information.
        depth: Blocks of the backbone that were kept; None for all.
    """

    name: str
    fingerprint: str
    origin: Literal["pretrained", "file", "seed"]
    timm_args: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    seed: int = 0
    file: str | None = None
    depth: int | None = None

    def create(self, num_classes: int, *, pretrained: bool = False, weights: str | Path | None = None) -> nn.Module:
        """Create the bare backbone; see :func:`~dynadapter.backbones.create_backbone`.

        Raises:
            ValueError: A file may not name this backbone or argument, or as
                :func:`~dynadapter.backbones.create_backbone`.
        """
        check_name(self.name)
        check_arguments(self.timm_args)
        model = create_backbone(
            self.name,
            num_classes,
            pretrained=pretrained,
            weights=weights,
            image_size=self.image_size,
            seed=self.seed,
            **self.timm_args,
        )
        if self.depth is not None:
            cut_depth(model, self.depth)
        return model


@dataclass(frozen=True)
class Config:
    """Everything in a bundle except its tensors.

    Args:
        backbone: The backbone.
        adapter: Kind of adapter; for a merged network the kind that was merged.
        heads: Kind of the early heads.
        exit_depths: After how many blocks the exits are.
        num_classes: Number of classes.
        class_names: In the order of their indices.
        policy: Decides at which exit a sample stops and what it predicts there; it includes the temperatures
            (:class:`~dynadapter.exits.temperature.Scaled`).
        preprocessing: Maps a decoded image to the tensor; None for a bundle that takes only tensors.
        costs: Cost up to each exit; None if it was not counted.
        measured: Measurements on data by name; None if there are none.
        whole: Whether ``model.safetensors`` holds all tensors, so that no backbone file is needed.
        merged: Whether the adapters are merged into the backbone; a merged network is always whole.
        proof: Difference between the merged and the unmerged network; None if they were not compared.
        token_merging: Where similar tokens are merged; None if all are kept.
        dtype: Type of the backbone's tensors.
        versions: Versions of the packages that wrote the bundle.
        sha256: SHA-256 of ``model.safetensors``.
        format: Version of the layout.
    """

    backbone: BackboneSource
    adapter: Adapters | None
    heads: Heads
    exit_depths: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    policy: Policy
    preprocessing: Preprocess | None = None
    costs: ExitCosts | None = None
    measured: dict[str, Any] | None = None
    whole: bool = False
    merged: bool = False
    proof: MergeProof | None = None
    token_merging: TokenMerging | None = None
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    versions: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{len(self.class_names)} class names for {self.num_classes} classes; give one name for each class"
            )
        self.policy.check(len(self.exit_depths))
        if self.costs is not None and self.costs.exit_depths != self.exit_depths:
            raise ValueError(
                f"the costs are of exits after blocks {self.costs.exit_depths}, the network has {self.exit_depths}"
            )
        if self.merged and not self.whole:
            raise ValueError("a merged network has a backbone of its own: merged is true, so whole must be, too")

    def stamped(self, sha256: str) -> "Config":
        """Return a copy with the versions of the installed packages and the hash of the tensors."""
        versions = {
            "dynadapter": dynadapter.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        }
        return replace(self, versions=versions, sha256=sha256)

    def dumps(self) -> str:
        """Return the text of ``config.json``."""
        try:
            content = {"library": "dynadapter"} | plain(self)
            content |= {"checksum": checksum(content)}
            return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        except ValueError as error:
            raise ValueError(f"{CONFIG} cannot be written: {error}") from error

    @classmethod
    def loads(cls, text: str, where: str) -> "Config":
        """Parse the text of ``config.json``.

        Raises:
            ValueError: The text is not JSON, lacks an entry, or was written by another version.
        """
        try:
            given = json.loads(text)
            require_bounded(given, "the file")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where} is not JSON ({error}); the bundle is damaged: fetch or write it again"
            ) from error
        if not isinstance(given, dict) or given.get("library") != "dynadapter":
            raise ValueError(
                f"{where} does not belong to a bundle of dynadapter; give the folder that save_bundle wrote"
            )
        version = given.get("format")
        if version != FORMAT:
            newer = isinstance(version, int) and version > FORMAT
            advice = "update dynadapter" if newer else "write the bundle again from its checkpoint"
            raise ValueError(f"{where} has format {version!r}, this dynadapter reads format {FORMAT}; {advice}")
        if given.pop("checksum", None) not in (None, checksum(given)):
            raise ValueError(
                f"{where} is not as it was written: the bundle is damaged, fetch or write it again; if you changed "
                "it on purpose, remove the entry 'checksum'"
            )
        lacking = [entry.name for entry in fields(cls) if entry.name not in given]
        if lacking:
            raise ValueError(f"{where} lacks {lacking[0]!r}; the bundle is damaged: fetch or write it again")
        del given["library"]
        try:
            require_few_classes(given["num_classes"])
            return restore(given, cls)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def assemble(self, backbone: nn.Module, tensors: dict[str, Tensor], where: str) -> ExitNet:
        """Build the network: add adapters, heads and the saved tensors to the backbone.

        Args:
            backbone: The result of :meth:`BackboneSource.create`; it is changed in place.
            tensors: Names and values of ``model.safetensors``; the network uses them without a copy.
            where: The file's path, for messages.

        Returns:
            The network in evaluation mode, frozen.

        Raises:
            ValueError: Adapter, heads, exits or tensors do not fit.
        """
        backbone.to(getattr(torch, self.dtype))
        # The tensors of the file replace what is drawn
        with DrawFrom(0), stored_in(where, tensors), LimitedMemory(backbone):
            if self.adapter is not None and not self.merged:
                inject(backbone, self.adapter)
            net = ExitNet(backbone, self.heads, exit_depths=self.exit_depths, token_merging=self.token_merging)
        if net.exit_depths != self.exit_depths:  # a backbone deeper than the last exit gets one more
            raise ValueError(
                f"{where}: the exits are after blocks {self.exit_depths}, but the backbone has {net.depth} blocks"
            )
        fill(net, tensors, whole=self.whole, where=where)
        return net.eval().requires_grad_(False)
