"""What runs a bundle's stages: torch, or its exported graphs in ONNX Runtime or OpenVINO."""

import hashlib
import os
import shutil
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

import dynadapter
from dynadapter.backbones import built_for
from dynadapter.exits.policies import Never, Policy, Routed
from dynadapter.exits.stages import run_stages
from dynadapter.files import locked
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.runtime import Runner
from dynadapter.serve.runtime.manifest import FORMAT

if TYPE_CHECKING:
    from dynadapter.serve.bundle import Bundle

Backend = Literal["torch", "onnx", "openvino", "auto"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino")}
"""Packages that a backend needs; ONNX Runtime compares every exported graph with the network."""


class Graphs:
    """The exported graphs of a network with the methods of :class:`~dynadapter.exits.net.ExitNet` that serving calls.

    Args:
        runner: The graphs; its own policy and preprocessing have no part here.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def step(self, k: int, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run stage ``k`` and its head; see :meth:`~dynadapter.exits.net.ExitNet.step`."""
        rest, logits = self.runner.stage(k, [part.cpu().float().numpy() for part in inputs])
        return tuple(map(torch.from_numpy, rest)), torch.from_numpy(logits)

    def early(self, images: Tensor, policy: Policy) -> Routed:
        """Stop each image at the first exit whose policy condition it meets."""
        exits = self.runner.num_exits
        policy.check(exits)
        if not len(images):
            return Routed(images.new_zeros(0, len(self.runner.class_names)), images.new_zeros(0, dtype=torch.int64))
        chunks = images.split(self.runner.chunk or len(images))
        parts = [run_stages(self.step, exits, (part,), policy) for part in chunks]
        return Routed(torch.cat([part.logits for part in parts]), torch.cat([part.exit_index for part in parts]))

    def __call__(self, images: Tensor) -> Tensor:
        """Run every exit; return logits (exits, batch, classes)."""
        return torch.from_numpy(self.runner.every_exit(images.cpu().float().numpy()))


def missing(backend: str) -> list[str]:
    """Return the packages that a backend needs and that are not installed."""
    return [name for name in NEEDED.get(backend, ()) if find_spec(name) is None]


def version_of(module: str) -> str:
    """Return the version of an installed module.

    A package may have another name than its module: onnxruntime-gpu provides onnxruntime.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return version(module)
    except PackageNotFoundError:
        return str(import_module(module).__version__)


def use_backend(bundle: "Bundle", backend: Backend, batch_size: int = 32) -> str:
    """Run a bundle's stages by a backend.

    The graphs are exported once for each bundle and kept in a cache, ``~/.cache/dynadapter`` or what the environment
    variable ``DYNADAPTER_CACHE`` names. They are compared with the network when they are written, and their hashes are
    checked at each use. Adapters are merged in them where possible.

    Args:
        bundle: It is changed in place. Its network stays in memory beside the graphs.
        backend: ``torch``; ``onnx``: ONNX Runtime; ``openvino``; or ``auto``: the fastest of those that are installed,
            as measured once on this machine (:func:`~dynadapter.serve.fastest.fastest`). On a GPU ``auto`` is torch.
        batch_size: Images at a time, for ``auto``.

    Returns:
        One line that names the backend, and for ``auto`` the measured times.

    Raises:
        ValueError: There is no such backend, `batch_size` is below 1, the bundle is not on a CPU, or its network cannot
            be exported.
        OSError: The cache cannot be written.
        ImportError: A package is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose from: {', '.join(BACKENDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    on_gpu = bundle.device.type != "cpu"
    if on_gpu and backend not in ("torch", "auto"):
        raise ValueError(f"backend={backend} runs on a CPU, and the network is on {bundle.device}; set device to cpu")
    words = f"backend {backend}"
    if backend == "auto" and on_gpu:
        backend, words = "torch", "backend torch (auto: on a GPU)"
    elif backend == "auto":
        from dynadapter.serve.fastest import fastest

        backend, words = fastest(bundle, batch_size)
    bundle.graphs = None if backend == "torch" else open_graphs(bundle, backend)
    return words


def open_graphs(bundle: "Bundle", backend: str) -> Graphs:
    """Open a bundle's graphs, which are exported at the first use.

    Raises:
        ValueError: The network cannot be exported.
        OSError: The cache cannot be written.
        ImportError: A package is missing.
    """
    if lacking := missing(backend):
        raise ImportError(f"backend={backend} needs {', '.join(lacking)}: pip install 'dynadapter[{backend}]'")
    folder = cache_of(bundle) / "graphs"
    engine = "openvino" if backend == "openvino" else "onnxruntime"

    def found() -> "Runner | None":
        with suppress(ValueError):  # missing or damaged
            return Runner(folder, threads=torch.get_num_threads(), engine=engine)
        return None

    if (runner := found()) is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.parent, wait=True):  # another process or thread may export at this moment
                if (runner := found()) is None:
                    if os.path.lexists(folder):
                        shutil.rmtree(folder)
                    _export(bundle, folder)
                    runner = Runner(folder, threads=torch.get_num_threads(), engine=engine)
        except OSError as error:
            raise OSError(
                f"the cache of graphs cannot be written; set DYNADAPTER_CACHE to a folder that can: {error}"
            ) from error
    return Graphs(runner.load())


def cache_of(bundle: "Bundle") -> Path:
    """Return the folder for what is derived from a bundle: its name depends on the network and on the packages."""
    given = os.environ.get("DYNADAPTER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    packages = [f"{name} {version_of(name)}" for name in ("torch", "timm", *NEEDED["onnx"]) if find_spec(name)]
    own = f"dynadapter {dynadapter.__version__}, format {FORMAT}"
    named = "\n".join([bundle.config.dumps(), str(image_size(bundle)), own, *packages])
    root = Path(given) if given else Path(base) / "dynadapter"
    return Path(os.path.expanduser(root)) / hashlib.sha256(named.encode()).hexdigest()[:32]


def image_size(bundle: "Bundle") -> int:
    """Return the height and width in pixels of the images that a bundle's graphs take."""
    size = bundle.preprocess.image_size if bundle.preprocess else built_for(bundle.net.backbone)
    if not size:
        raise ValueError("graphs have one image size, and this bundle names none; write it with its preprocessing")
    return int(size)


def _export(bundle: "Bundle", folder: Path) -> None:
    from dynadapter.serve.export import export_onnx

    export_onnx(
        bundle.net,
        folder,
        policy=Never(),  # the bundle's own decides, in torch
        class_names=bundle.class_names,
        preprocess=bundle.preprocess or Preprocess(image_size(bundle)),
    )
