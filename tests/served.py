"""Bundles of a tiny ViT with three exits that images really take, for the tests of serving."""

import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from conftest import CLASSES, VIT, make_vit
from PIL import Image
from torch import Tensor

from dynadapter.backbones import fingerprint
from dynadapter.cost import ExitCosts
from dynadapter.exits.heads import Balanced
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Confidence, Policy
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.bundle import BackboneSource, Bundle
from dynadapter.serve.bundle.saving import describe

POLICY = Confidence(0.6)
NAMES = tuple("abcde")
COSTS = ExitCosts(macs=(10**9, 2 * 10**9, 3 * 10**9), light=(0, 0, 0), static=28 * 10**8, exit_depths=(2, 4, 6))


def lively(net: ExitNet, seed: int = 0) -> ExitNet:
    """Return the network with other matrices, so that its exits differ from image to image."""
    torch.manual_seed(seed)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return net.eval()


def make_net(seed: int = 0) -> ExitNet:
    return lively(ExitNet(make_vit(), Balanced(), every=2), seed)


def parts_of(net: ExitNet, policy: Policy = POLICY, **more: Any) -> dict[str, Any]:
    """Return what save_bundle takes beside the network, which is written whole."""
    source = BackboneSource("vit_tiny_patch16_224", fingerprint(net.backbone), "seed", VIT)
    parts = {"backbone": source, "adapter": None, "heads": Balanced(), "policy": policy, "class_names": NAMES}
    return parts | {"preprocessing": Preprocess(32), "costs": COSTS, "whole": True} | more


def make_bundle(policy: Policy = POLICY, net: ExitNet | None = None, **more: Any) -> Bundle:
    net = net or make_net()
    return Bundle(net, policy, describe(net, **parts_of(net, policy, **more)))


def fails_at(function: Callable[..., Any], call: int, kind: type[BaseException]) -> Callable[..., Any]:
    """Return the function with an error at one of its calls."""
    calls = itertools.count(1)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise kind("broken")
        return function(*args, **kwargs)

    return fails


def photos(count: int) -> list[bytes]:
    """Return images of noise as PNG files."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def tensors(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Gate:
    """What an engine enters before each stage; closed, it holds the thread that runs the network."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.came = 0

    def __enter__(self) -> None:
        self.came += 1
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    @contextmanager
    def closed(self) -> Iterator[None]:
        with self.lock:
            yield

    def holds(self, before: int = 0) -> None:
        """Wait until the thread is here."""
        until(lambda: self.came > before and self.lock.locked())


assert len(NAMES) == CLASSES
