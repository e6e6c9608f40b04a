"""The networks of a bundle to time, and the images for it."""

import copy
import math
import os
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynadapter.adapters import adapter_layers
from dynadapter.backbones import built_for, input_shape
from dynadapter.backbones.layout import lay_out_for_cpu
from dynadapter.bench.settings import Settings
from dynadapter.bench.timing import Clock, clock_of, share_thresholds
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.exits.net import CPU_CHUNK, ExitNet
from dynadapter.exits.policies import route
from dynadapter.images.reading import UnreadableImage, image_files
from dynadapter.serve.bundle import Bundle
from dynadapter.serve.runtime import Runner

NOISE = 100
"""Least number of noise images, so that shares of whole percents can be met exactly."""

REAL = 256
"""Greatest number of image files to read for the exit shares; a representative part of them is timed."""

IMAGES = 20
"""Least number of images in a round, whatever the batch size: the average of one call is too noisy."""


class Subject:
    """The networks of a bundle on their device, the images, and the exit of each image.

    Args:
        bundle: The bundle; its network is changed and moved to the device.
        settings: What to time.
        device: Device of the networks.
        stack: Closes temporary folders at the end.

    Attributes:
        net: The network with merged adapters, or with adapters that cannot be merged.
        unmerged: The network with adapters that are not merged; None if it has no adapters.
        exact: ``net`` in float32, for counting and export.
        pool: All images (images, channels, height, width), on the device.
        exit_index: The exit of each image of the pool, (images,).
        notes: Remarks on the results.

    Raises:
        ValueError: If the images or shares do not fit the bundle.
    """

    def __init__(self, bundle: Bundle, settings: Settings, device: torch.device, stack: ExitStack) -> None:
        self.settings, self.device, self.stack = settings, device, stack
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.clock: Clock = clock_of(device, settings.threads)
        self.notes: list[str] = []
        self.runners: dict[tuple[str, bool, str], Runner] = {}
        self.bundle, self.policy = bundle, bundle.policy
        original = bundle.net.float()
        if device.type == "cpu" and self.dtype == torch.float32:
            lay_out_for_cpu(original)  # all arms alike, static too
        self.net, self.unmerged = self._merge(original)
        self.size = _image_size(bundle)
        if self.net.token_merging is not None:
            self.notes.append(
                f"the static arms keep every token; all others have token_merging={self.net.token_merging}"
            )
        pool = self._read(Path(os.path.expanduser(settings.images))) if settings.images else self._noise()
        self.exact = copy.deepcopy(self.net) if self.dtype != torch.float32 else self.net
        self.costs = cache(self._costs)
        self.net.to(device, self.dtype)
        if self.unmerged is not None:
            self.unmerged.to(device, self.dtype)
        self.pool = pool.to(device, self.dtype)
        with torch.inference_mode():
            logits = torch.cat([self.net(part) for part in self.pool.split(CPU_CHUNK)], dim=1)
        self._set_shares(logits)
        self.exit_index = route(self.policy, logits)

    def _merge(self, net: ExitNet) -> tuple[ExitNet, ExitNet | None]:
        """Return the network to serve, merged if possible, and the unmerged one if it has adapters."""
        if not adapter_layers(net.backbone):
            return net, None
        try:
            return copy.deepcopy(net).merge(tolerance=1e-4), net
        except ValueError as error:
            self.notes.append(f"static and all others keep the adapters: {' '.join(str(error).split())}")
            return net, net

    def _set_shares(self, logits: Tensor) -> None:
        """Replace the policy by thresholds for the wanted exit shares, if shares are given."""
        shares, exits = self.settings.shares, self.net.num_exits
        if shares is not None:
            if len(shares) != exits:
                raise ValueError(
                    f"shares has {len(shares)} numbers, this network has {exits} exits, the last included; give one "
                    "for each"
                )
            self.policy = share_thresholds(logits, shares)
        elif not self.settings.images:
            self.notes.append(
                "the images are noise, and exit shares on noise are not real; give --images FOLDER, or set --shares"
            )

    def _noise(self) -> Tensor:
        count = max(NOISE, *map(images_in_a_round, self.settings.batch_sizes), 0)
        shape = (count, *input_shape(self.net.backbone, self.size, self.size))
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def _read(self, folder: Path) -> Tensor:
        """Read the images of a folder, (images, 3, size, size); unreadable ones are noted and left out."""
        preprocess = self.bundle.preprocess
        if preprocess is None:
            raise ValueError("this bundle has no preprocessing, so it takes no image files; leave --images out")
        files = image_files(folder)
        if not files:
            raise ValueError(f"images={folder} holds no image; give a folder with some, or leave it out")
        if len(files) > REAL:
            self.notes.append(f"{REAL} of the {len(files)} images are read")
            files = [files[i * len(files) // REAL] for i in range(REAL)]
        tensors, broken = [], []
        for file in files:
            try:
                tensors.append(torch.from_numpy(preprocess.normalize(preprocess.read(file))))
            except UnreadableImage:
                broken.append(file)
        if not tensors:
            raise ValueError(
                f"none of the {len(files)} images in {folder} can be read; give others, or leave images out"
            )
        if broken:
            self.notes.append(f"{len(broken)} images cannot be read and are left out, the first is {broken[0]}")
        return torch.stack(tensors)

    def _costs(self, merged: bool, class_first: bool) -> ExitCosts:
        net = self.exact if merged else self.unmerged
        assert net is not None
        return exit_costs(net, self.size, class_first=class_first)


def images_in_a_round(batch: int) -> int:
    """Return the number of images in a round: whole batches, at least :data:`IMAGES`."""
    return batch * math.ceil(IMAGES / batch)


def _image_size(bundle: Bundle) -> int:
    """Return the height and width of the network's images in pixels."""
    if bundle.preprocess is not None:
        return bundle.preprocess.image_size
    backbone: Any = bundle.net.backbone
    return built_for(backbone) or int(backbone.pretrained_cfg["input_size"][1])
