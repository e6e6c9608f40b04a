"""The arms of a benchmark: ways to serve a bundle, each as a function of one batch of images."""

import tempfile
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynadapter.bench.subject import Subject
from dynadapter.bench.timing import best_chunk
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Never, Policy
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Runner


class Absent(Exception):
    """An arm cannot be timed; the message is the reason in one line, empty where the reason is plain."""


@dataclass(frozen=True)
class Arm:
    """One way to serve a bundle.

    Args:
        serve: Maps a batch, a tensor or an array, to the exit indices (batch,) of its images; the result of a static
            arm is not used.
        cost: MACs of an image; one value per exit if the arm routes.
        detail: Further information to print with the name.
        arrays: Whether the arm takes numpy arrays.
        baseline: The arm with which its efficiency is compared.
    """

    serve: Callable[[Any], Any]
    cost: ExitCosts | float
    detail: str = ""
    arrays: bool = False
    baseline: str = "static"


@dataclass(frozen=True)
class Work:
    """The images of a round at one batch size.

    Args:
        subject: The networks.
        batch: Images per call.
        images: (images, channels, height, width), on the device.
        class_first: Whether routing computes the class token's row first.
        average: Average MACs of an image in merged routing.
    """

    subject: Subject
    batch: int
    images: Tensor
    class_first: bool
    average: float

    def batches(self, arrays: bool) -> list[Any]:
        """Cut the images of a round into batches, as tensors or as arrays."""
        parts = self.images.split(self.batch)
        return [part.float().cpu().numpy() for part in parts] if arrays else list(parts)

    def costs(self, merged: bool) -> ExitCosts:
        """Count the MACs of the merged or unmerged network as routing runs it at this batch size."""
        return self.subject.costs(merged, self.class_first)

    def static_arm(self, serve: Callable[[Any], Any], cost: float, detail: str = "", arrays: bool = False) -> Arm:
        """Create a static arm, which may split its batch into chunks of the fastest size."""
        [part, *_] = self.batches(arrays)
        with torch.inference_mode():
            chunk = best_chunk(
                lambda n: partial(_in_chunks, serve, n, part), self.batch, self.subject.clock, self.subject.device
            )
        words = [*([detail] if detail else []), *([f"{chunk} at a time"] if chunk < self.batch else [])]
        return Arm(partial(_in_chunks, serve, chunk), cost, ", ".join(words), arrays)


def build(name: str, work: Work) -> Arm:
    """Create an arm."""
    return BUILDERS[name](work)


def _static(work: Work) -> Arm:
    net = work.subject.net
    return work.static_arm(cut_after(net, net.depth).at(-1), float(work.costs(True).static))


def _smaller(work: Work) -> Arm:
    """Create the backbone cut after the block at which its MACs are nearest to the average of routing."""
    net, exact, size = work.subject.net, work.subject.exact, work.subject.size

    @cache
    def cost(depth: int) -> int:
        return exit_costs(cut_after(exact, depth), size).macs[0]

    above = min(bisect_left(range(1, net.depth + 1), work.average, key=cost) + 1, net.depth)
    depth = min((max(above - 1, 1), above), key=lambda d: abs(cost(d) - work.average))
    if depth == net.depth:
        raise Absent("routing costs nearly as much as the whole backbone, which the arm static runs")
    words = f"{depth} {'block' if depth == 1 else 'blocks'}"
    return work.static_arm(cut_after(net, depth).at(0), float(cost(depth)), words)


def _static_merging(work: Work) -> Arm:
    net, exact = work.subject.net, work.subject.exact
    if net.token_merging is None:
        raise Absent
    static, counted = (ExitNet(one.backbone, exit_depths=[], token_merging=one.token_merging) for one in (net, exact))
    cost = exit_costs(counted.eval(), work.subject.size).macs[0]
    return work.static_arm(static.eval().requires_grad_(False).at(-1), float(cost))


def _unmerged(work: Work) -> Arm:
    net = work.subject.unmerged
    if net is None:
        raise Absent("the bundle was merged" if work.subject.bundle.config.merged else "the bundle has no adapters")
    return Arm(partial(_route, net, work.subject.policy), work.costs(False))


def _merged(work: Work) -> Arm:
    if work.subject.net is work.subject.unmerged:
        raise Absent("the adapters cannot be merged")
    return Arm(partial(_route, work.subject.net, work.subject.policy), work.costs(True))


def _onnx_static(work: Work) -> Arm:
    static = ExitNet(work.subject.exact.backbone, LinearHeads(), exit_depths=[]).eval()
    runner = _exported(work, "static", static, Never(), class_first=False)
    return work.static_arm(lambda images: runner.stage(0, [images]), float(work.costs(True).static), arrays=True)


def _onnx_staged(work: Work, engine: str = "onnxruntime") -> Arm:
    runner = _exported(work, "staged", work.subject.exact, work.subject.policy, work.class_first, engine)
    baseline = "onnx static" if engine == "onnxruntime" else "static"
    return Arm(lambda images: runner.route(images)[1], work.costs(True), arrays=True, baseline=baseline)


BUILDERS: dict[str, Callable[[Work], Arm]] = {
    "static": _static,
    "smaller static": _smaller,
    "static token merging": _static_merging,
    "unmerged": _unmerged,
    "merged": _merged,
    "onnx static": _onnx_static,
    "onnx staged": _onnx_staged,
    "openvino staged": partial(_onnx_staged, engine="openvino"),
}


def _route(net: ExitNet, policy: Policy, images: Tensor) -> Tensor:
    return net.early(images, policy).exit_index


def _in_chunks(serve: Callable[[Any], Any], chunk: int, images: Any) -> list[Any]:
    return [serve(images[start : start + chunk]) for start in range(0, len(images), chunk)]


def cut_after(net: ExitNet, depth: int) -> ExitNet:
    """Return a network over the same blocks with its first exit after ``depth`` blocks, and no token merging.

    The exit has the head of ``net`` at this depth, or a new linear head where there is none or it reads exit tokens.
    """
    shallow = ExitNet(net.backbone, LinearHeads(), exit_depths=[depth])
    if depth in net.exit_depths[:-1] and net.beside is None:
        shallow.heads[0] = net.heads[net.exit_depths.index(depth)]
    like = next(net.backbone.parameters())
    return shallow.to(like.device, like.dtype).eval().requires_grad_(False)


def _exported(
    work: Work, kind: str, net: ExitNet, policy: Policy, class_first: bool, engine: str = "onnxruntime"
) -> Runner:
    """Export to a temporary folder, once for all engines and batch sizes, and load all stages."""
    subject, runners = work.subject, work.subject.runners
    if (key := (kind, class_first, engine)) in runners:
        return runners[key]
    if subject.dtype != torch.float32:
        raise Absent("the exported graphs run in float32; leave --precision out")
    if engine == "openvino" and find_spec("openvino") is None:
        raise Absent("OpenVINO is not installed: pip install 'dynadapter[openvino]'")
    first = next((runner for other, runner in runners.items() if other[:2] == key[:2]), None)
    if first is not None:
        folder = first.manifest.stages[0].file.parent
    else:
        place = subject.stack.enter_context(tempfile.TemporaryDirectory(prefix="dynadapter-bench-"))
        folder = Path(place) / "exported"
        preprocess = subject.bundle.preprocess
        export_onnx(
            net,
            folder,
            policy=policy,
            class_names=subject.bundle.class_names,
            preprocess=Preprocess(subject.size) if preprocess is None else preprocess,
            class_first=class_first,
            check_images=work.images[:12].float().cpu(),
        )
    on_gpu = subject.device.type == "cuda" and engine == "onnxruntime"
    providers = ["CUDAExecutionProvider"] if on_gpu else None
    runners[key] = Runner(folder, providers, subject.settings.threads, engine).load()
    return runners[key]
