"""Load a bundle: a network that is ready to serve, without a training framework."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dynadapter.backbones import built_for, fingerprint, input_shape
from dynadapter.cost import ExitCosts
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Policy, Routed, confidence, wide
from dynadapter.images.preprocess import Preprocess
from dynadapter.images.reading import SOURCES, is_source
from dynadapter.images.reading import Source as ImageSource
from dynadapter.serve.backends import Backend, Graphs, use_backend
from dynadapter.serve.bundle.config import MODEL, Config
from dynadapter.serve.bundle.hub import HUB, local
from dynadapter.serve.bundle.reading import read

Source = ImageSource | Tensor
T = TypeVar("T")


class Prediction(NamedTuple):
    """The answer for one image.

    ``label`` is the name of the class, ``confidence`` its softmax probability in [0, 1] after the exit's temperature
    and ``exit_index`` the zero-based exit at which the image stopped.
    """

    label: str
    confidence: float
    exit_index: int


@dataclass(eq=False, repr=False)
class Bundle:
    """A network that is ready to serve, with its policy and configuration.

    Args:
        net: The network, in evaluation mode and frozen. ``net(images)`` computes the logits of all exits (exits, batch,
            classes), ``net.early(images, policy)`` routes; images (batch, 3, size, size) as `preprocess` returns them.
        policy: Decides at which exit a sample stops; a single call of `predict` may use another one.
        config: The content of ``config.json``.
        graphs: The network's exported graphs, which run instead of it
            (:func:`~dynadapter.serve.backends.use_backend`); None to run the network.
    """

    net: ExitNet
    policy: Policy
    config: Config
    graphs: Graphs | None = None

    @property
    def runs(self) -> ExitNet | Graphs:
        """What computes: the graphs if there are any, else the network."""
        return self.graphs or self.net

    @property
    def backend(self) -> str:
        """Name of the program that computes: ``torch``, ``ONNX Runtime`` or ``OpenVINO``."""
        return self.graphs.runner.engine.name if self.graphs else "torch"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their indices."""
        return self.config.class_names

    @property
    def preprocess(self) -> Preprocess | None:
        """Maps a decoded image to (3, size, size) float32; None if the bundle takes only tensors."""
        return self.config.preprocessing

    @property
    def costs(self) -> ExitCosts | None:
        """Cost up to each exit, as stored in the bundle."""
        return self.config.costs

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> "Bundle":
        """Move the network to a device.

        Raises:
            ValueError: Graphs run instead of the network, which do so on a CPU.
        """
        if self.graphs is not None and torch.device(device).type != "cpu":
            raise ValueError(f"the bundle's graphs run on a CPU, not on {device}; load it with backend='torch'")
        self.net.to(device)
        return self

    @torch.inference_mode()
    def predict(
        self, images: Source | Iterable[Source], *, batch_size: int = 32, policy: Policy | None = None
    ) -> list[Prediction]:
        """Classify images; each stops at the first exit where the policy allows it.

        Args:
            images: One or many images as :func:`~dynadapter.images.reading.load_image` takes them (paths, bytes, open
                files, Pillow images, arrays) or preprocessed tensors (3, size, size); or one preprocessed tensor
                (batch, 3, size, size). Everything except tensors is preprocessed as in the training.
            batch_size: Images that are computed at once.
            policy: Policy to use instead of the bundle's own.

        Returns:
            One prediction for each image, in order.

        Raises:
            ValueError: An image cannot be read; a tensor has another shape or type; the policy does not fit; logits are
                not finite.
            OSError: The machine fails to read a file.
            TypeError: An image has another type.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if isinstance(images, Tensor | np.ndarray):
            single = images.ndim != 1 + len(self._shape)
        else:
            single = is_source(images)
        sources: Iterable[Source] = [images] if single else images  # type: ignore[assignment, list-item]
        predictions: list[Prediction] = []
        for group in _groups(sources, batch_size):
            tensors = [self.read(source) for source in group]
            if len({tensor.shape for tensor in tensors}) > 1:
                raise ValueError("the images have several sizes; give one size, or batch_size=1")
            like = next(self.net.backbone.parameters())
            routed = self.route(torch.stack([tensor.to(like.device, like.dtype) for tensor in tensors]), policy)
            if nonfinite := int(routed.nonfinite):
                raise ValueError(
                    f"{nonfinite} of {len(group)} images have logits that are not finite; the network's weights or the "
                    "images' values are broken"
                )
            names = [self.class_names[index] for index in routed.logits.argmax(-1).tolist()]
            values = (names, confidence(routed.logits).tolist(), routed.exit_index.tolist())
            predictions += map(Prediction._make, zip(*values, strict=True))
        return predictions

    @torch.inference_mode()
    def route(self, images: Tensor, policy: Policy | None = None) -> Routed:
        """Route preprocessed images; return the prediction of the exit at which each image stops.

        Args:
            images: (batch, 3, size, size).
            policy: Policy to use instead of the bundle's own, including temperatures.

        Returns:
            Logits (batch, classes), in float32 or wider, and the zero-based exits (batch,).

        Raises:
            ValueError: The images have another shape or type, or the policy does not fit.
        """
        if images.ndim != 1 + len(self._shape):
            raise ValueError(f"images are a tensor {tuple(images.shape)}; give (batch, {self._named_shape})")
        self._check(images[0] if len(images) else images.new_zeros(images.shape[1:]))
        like = next(self.net.backbone.parameters())
        routed = self.runs.early(images.to(like.device, like.dtype), policy or self.policy)
        return Routed(wide(routed.logits), routed.exit_index)

    def read(self, source: Source) -> Tensor:
        """Return one image as input of the network, (channels, height, width); a tensor is only checked.

        Raises:
            ValueError: The image cannot be read, or a tensor has another shape or type.
            OSError: The machine fails to read a file.
            TypeError: The source is neither an image nor a tensor.
        """
        if isinstance(source, Tensor):
            self._check(source)
            return source
        if not is_source(source):
            raise TypeError(f"an image is a {type(source).__name__}; give {SOURCES}, or a tensor")
        if self.preprocess is None:
            raise ValueError(
                f"this bundle has no preprocessing; give preprocessed tensors (batch, {self._named_shape})"
            )
        return torch.from_numpy(self.preprocess.normalize(self.preprocess.read(source)))

    def _check(self, image: Tensor) -> None:
        """Raise a ValueError if a preprocessed image does not fit the network."""
        wanted = self._shape
        fits = image.ndim == len(wanted) and all(
            side in (None, own) for side, own in zip(wanted, image.shape, strict=True)
        )
        if not fits or not image.is_floating_point():
            raise ValueError(
                f"an image is a tensor {tuple(image.shape)} of {image.dtype}; give preprocessed floats "
                f"({self._named_shape}), or (batch, {self._named_shape}) alone"
            )

    @property
    def _shape(self) -> tuple[int | None, ...]:
        """The shape of an image, or of a clip; None for a side of any length."""
        size = self.preprocess.image_size if self.preprocess else built_for(self.net.backbone)
        return (*input_shape(self.net.backbone, 0, 0)[:-2], size, size)

    @property
    def _named_shape(self) -> str:
        *first, height, width = self._shape
        return ", ".join(map(str, (*first, height or "height", width or "width")))

    def __repr__(self) -> str:
        kind = self.config.adapter.label if self.config.adapter else "no adapter"
        merged = " merged" if self.config.merged else ""
        return (
            f"Bundle({self.config.backbone.name}, {kind}{merged}, {len(self.class_names)} classes, "
            f"exits after blocks {self.config.exit_depths}, {self.policy.name}, on {self.device}"
            f"{f' by {self.backend}' if self.graphs else ''})"
        )


def load(
    folder: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool | None = None,
    *,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    backend: Backend = "torch",
    batch_size: int = 32,
) -> Bundle:
    """Load a bundle.

    The hash of its tensors and the fingerprint of the backbone are checked before anything is used. By torch the logits
    of all exits are bit for bit those of the network that was saved (on the same kind of machine, with the same torch).

    Args:
        folder: The folder; or ``hf-hub:owner/name``, or ``hf-hub:owner/name@revision``, on the Hugging Face hub.
        weights: A local file with the backbone's weights; None for the source of the weights in the training.
        pretrained: Whether timm may fetch the backbone's weights or take them from its cache; None for the choice of
            the training. A whole bundle, and a bundle whose backbone was drawn from a seed, need neither ``weights``
            nor ``pretrained``.
        device: Device of the network.
        check_finite: Refuse tensors that hold NaN or infinity.
        backend: What runs the stages: ``torch``, ``onnx``, ``openvino``, or ``auto`` for the fastest; see
            :func:`~dynadapter.serve.backends.use_backend`.
        batch_size: Images at a time, for which ``auto`` chooses.

    Raises:
        ValueError: There is no bundle, it is damaged, its backbone is missing, the backbone is not that of the
            training, or the backend does not fit.
        ImportError: The backend is not installed.
    """
    place = local(folder)
    try:
        config, tensors = read(place, check_finite=check_finite)
        backbone = _backbone(config, place, weights, pretrained)
        net = config.assemble(backbone, tensors, str(place / MODEL))
    except ValueError as error:
        if not str(folder).startswith(HUB):
            raise
        raise ValueError(str(error).replace(str(place), str(folder))) from error  # not as a folder of the hub's cache
    bundle = Bundle(net.to(device), config.policy, config)
    use_backend(bundle, backend, batch_size)
    return bundle


def from_pretrained(repo_id: str, *, revision: str | None = None, **options: Any) -> Bundle:
    """Load a bundle from the hub, or from its cache.

    Args:
        repo_id: ``owner/name``.
        revision: Branch, tag or commit.
        options: Further arguments of :func:`load`: ``weights``, ``pretrained``, ``device`` ...

    Raises:
        ValueError: The bundle cannot be fetched, or as :func:`load`.
    """
    return load(f"{HUB}{repo_id}" + (f"@{revision}" if revision else ""), **options)


def _backbone(
    config: Config, folder: Path, weights: str | os.PathLike[str] | None, pretrained: bool | None
) -> nn.Module:
    """Create the backbone and check that it is that of the training."""
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
        reason = "give the weights of the training"
        if source.origin == "seed" and weights is None:
            reason = (
                f"they are drawn from a seed, by torch {config.versions.get('torch')} then and by torch "
                f"{torch.__version__} now; write the bundle whole, then nothing is drawn"
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
