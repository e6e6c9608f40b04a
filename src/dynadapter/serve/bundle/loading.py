"""Reading a bundle: a network that is ready to serve, without a training framework."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from dynadapter.backbones import fingerprint
from dynadapter.cost import ExitCosts
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy
from dynadapter.exits.temperature import tempered_confidence
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import load_image
from dynadapter.serve.bundle.config import CONFIG, MODEL, Config
from dynadapter.serve.bundle.folder import left_over
from dynadapter.serve.bundle.tensors import check_finite as refuse_nonfinite
from dynadapter.serve.bundle.tensors import from_bytes

HUB = "hf-hub:"
Source = str | os.PathLike[str] | Image.Image | Tensor
T = TypeVar("T")


class Prediction(NamedTuple):
    """What a bundle says about one image.

    ``label`` is the name of the class, ``confidence`` its softmax probability in [0, 1] after the exit's temperature
    (NaN where the logits were not finite), ``exit`` the zero-based exit at which the image left.
    """

    label: str
    confidence: float
    exit: int


@dataclass(eq=False, repr=False)
class Bundle:
    """A network that is ready to serve, and all that belongs to it.

    Args:
        net: In evaluation mode, nothing asks for gradients. ``net(images)`` gives the logits of all exits (exits,
            batch, classes), ``net.early(images, policy)`` routes; images (batch, 3, size, size) as ``preprocess``
            gives them.
        policy: Who leaves where; a single prediction may ask another one.
        config: All that the bundle says.
    """

    net: ExitNet
    policy: Policy
    config: Config

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their indices."""
        return self.config.class_names

    @property
    def preprocess(self) -> Preprocess | None:
        """From a decoded image to (3, size, size) float32; None if the bundle takes tensors alone."""
        return self.config.preprocessing

    @property
    def costs(self) -> ExitCosts | None:
        """Multiply-adds up to each exit, as written in the bundle."""
        return self.config.costs

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> "Bundle":
        """Moves the network to a device."""
        self.net.to(device)
        return self

    @torch.inference_mode()
    def predict(
        self, images: Source | Iterable[Source], *, batch_size: int = 32, policy: Policy | None = None
    ) -> list[Prediction]:
        """Says what is on images, each leaving at the first exit that is sure.

        Args:
            images: Files, decoded images, and preprocessed tensors (3, size, size), one or many; or one preprocessed
                tensor (batch, 3, size, size). Files and images are read as the training data was.
            batch_size: Images that are run at once.
            policy: Who leaves where, instead of the bundle's own.

        Returns:
            One prediction for each image, in order.

        Raises:
            ValueError: If an image cannot be read, has another shape, or the policy does not fit.
            TypeError: If something is none of these.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        single = isinstance(images, str | os.PathLike | Image.Image) or (
            isinstance(images, Tensor) and images.ndim == 3
        )
        sources: Iterable[Source] = [images] if single else images  # type: ignore[assignment, list-item]
        like = next(self.net.backbone.parameters())
        predictions: list[Prediction] = []
        for group in _groups(sources, batch_size):
            batch = torch.stack([self._tensor(source) for source in group]).to(like.device, like.dtype)
            predictions += self._predicted(batch, policy or self.policy)
        return predictions

    def _predicted(self, batch: Tensor, policy: Policy) -> list[Prediction]:
        routed = self.net.early(batch, policy)
        sure = tempered_confidence(self.policy, routed.logits, routed.exit_index)
        rows = zip(routed.logits.argmax(-1).tolist(), sure.tolist(), routed.exit_index.tolist(), strict=True)
        return [Prediction(self.class_names[index], certainty, exit) for index, certainty, exit in rows]

    def _tensor(self, source: Source) -> Tensor:
        """Gives one image as the network takes it (channels, height, width)."""
        if isinstance(source, Tensor):
            if source.ndim != 3 or not source.is_floating_point():
                raise ValueError(
                    f"an image is a tensor {tuple(source.shape)} of {source.dtype}; give preprocessed floats "
                    "(3, size, size), or (batch, 3, size, size) alone"
                )
            return source
        if not isinstance(source, str | os.PathLike | Image.Image):
            raise TypeError(f"an image is a {type(source).__name__}; give a file, a PIL image, or a tensor")
        if self.preprocess is None:
            raise ValueError(
                "this bundle has no preprocessing; give preprocessed tensors (batch, channels, height, width)"
            )
        return torch.from_numpy(self.preprocess(load_image(source)))

    def __repr__(self) -> str:
        kind = type(self.config.adapter).__name__ if self.config.adapter else "no adapter"
        merged = " merged" if self.config.merged else ""
        return (
            f"Bundle({self.config.backbone.name}, {kind}{merged}, {len(self.class_names)} classes, "
            f"exits after blocks {self.config.exit_depths}, {self.policy.name}, on {self.device})"
        )


def load(
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool | None = None,
    *,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> Bundle:
    """Reads a bundle.

    The hash of its tensors and the fingerprint of the backbone are checked before anything is used. The logits of all
    exits are bit for bit those of the network that was saved (on the same kind of machine, with the same torch).

    Args:
        folder: The folder; or ``hf-hub:owner/name``, or ``hf-hub:owner/name@revision``, on the Hugging Face hub.
        weights: A local file with the backbone's weights; without one, they come from where the training had them.
        pretrained: Whether timm may fetch the backbone's weights, or take them from its cache; None for what the
            training did. A whole bundle, and one whose backbone was drawn from a seed, need neither.
        device: Where to put the network.
        check_finite: Refuse tensors that hold NaN or infinity.

    Returns:
        The network with policy, class names and preprocessing.

    Raises:
        ValueError: If there is no bundle, it is damaged, its backbone is not to be had, or another backbone is given.
    """
    if str(folder).startswith(HUB):
        from dynadapter.serve.bundle.hub import fetch

        folder = fetch(str(folder).removeprefix(HUB))
    place = Path(folder).expanduser()
    config, tensors = read(place, check_finite=check_finite)
    backbone = _backbone(config, place, weights, pretrained)
    net = config.assemble(backbone, tensors, str(place / MODEL))
    return Bundle(net.to(device), config.policy, config)


def read(folder: Path, *, check_finite: bool = True) -> tuple[Config, dict[str, Tensor]]:
    """Reads the configuration and the tensors of a bundle, and checks that they belong together.

    Raises:
        ValueError: If there is no bundle, or it is damaged.
    """
    if not folder.is_dir():
        old = left_over(folder)
        hint = f"; an interrupted overwriting has left the bundle that was there as {old}: rename it" if old else ""
        raise ValueError(
            f"{folder} is no folder{' but a file' if folder.is_file() else ''}; give a bundle's folder{hint}"
        )
    for name in (CONFIG, MODEL):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: it is no bundle, or only a part of one; fetch or write it again")
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON ({error}); the bundle is damaged: fetch it again") from error
    config = Config.loads(text, str(folder / CONFIG))
    where = str(folder / MODEL)
    tensors = from_bytes((folder / MODEL).read_bytes(), config.sha256, where)
    if check_finite:
        refuse_nonfinite(tensors, where)
    return config, tensors


def _backbone(
    config: Config, folder: Path, weights: str | os.PathLike[str] | None, pretrained: bool | None
) -> nn.Module:
    """Creates the bare backbone and makes sure that it is the one of the training."""
    source, classes = config.backbone, config.num_classes
    if config.whole:
        if weights is not None or pretrained:
            raise ValueError(
                f"{folder} is a whole bundle, with a backbone of its own; leave weights and pretrained out"
            )
        return source.create(classes)
    if weights is not None:
        backbone = source.create(classes, weights=Path(weights))
    elif pretrained or (pretrained is None and source.origin == "pretrained"):
        backbone = source.create(classes, pretrained=True)
    elif source.origin == "seed":
        backbone = source.create(classes)
    else:
        file = f" ({source.file} in the training)" if source.file else ""
        raise ValueError(
            f"{folder} needs the weights of its backbone {source.name!r}: give their file{file} as weights='...', or "
            "pretrained=True if they are those that timm has under this name"
        )
    found = fingerprint(backbone)
    if found != source.fingerprint:
        wrote = config.versions
        reason = (
            f"they are drawn from a seed, by torch {wrote.get('torch')} then and by torch {torch.__version__} now; "
            "write the bundle whole, then nothing is drawn"
            if source.origin == "seed" and weights is None
            else "give the weights of the training"
        )
        raise ValueError(
            f"{folder} was made for the backbone {source.name!r} with the weights {source.fingerprint[:12]}, these are "
            f"{found[:12]}; {reason}"
        )
    return backbone


def _groups(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group
