"""What ``dynadapter bench`` times: the ways to serve a bundle, each as a function of one batch."""

import copy
import math
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from dynadapter.adapters import adapter_layers
from dynadapter.backbones import built_for
from dynadapter.backbones.layout import lay_out_for_cpu
from dynadapter.bench.timing import (
    VOID,
    Clock,
    Times,
    best_chunk,
    clock_of,
    interleave,
    is_void,
    machine,
    percentile,
    ratio,
    representative,
    share_thresholds,
)
from dynadapter.cli.bench import Settings
from dynadapter.cli.errors import Mistake, one_line
from dynadapter.cost import ExitCosts, exit_costs
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import CPU_CHUNK, ExitNet
from dynadapter.exits.policies import Never, Policy, route
from dynadapter.images.reading import UnreadableImage, image_files, load_image
from dynadapter.serve.bundle import Bundle, load
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Runner
from dynadapter.spec import plain

NOISE = 100
"""Images of noise: enough that shares in whole percent come out."""

REAL = 256
"""Files read of a folder at most: they say who leaves where, and some that stand for them are timed."""

IMAGES = 20
"""Images in a round at least, whatever the batch: a call alone would say nothing of the average."""

CLOCKS = {"cpu": "CPU seconds of the process", "wall": "the wall's clock", "device": "events on the device"}


class Absent(Exception):
    """Why there is nothing to time, in one line."""


@dataclass(frozen=True)
class Arm:
    """A way to serve.

    Args:
        serve: From a batch, as a tensor or an array, to the exits (batch,) that its images took, for a static one to
            anything.
        cost: Multiply-adds of an image; by exit where it routes.
        detail: What a reader should know beside the name.
        arrays: Whether it takes numpy arrays.
        rival: The arm by whose time its efficiency is judged.
    """

    serve: Callable[[Any], Any]
    cost: ExitCosts | float
    detail: str = ""
    arrays: bool = False
    rival: str = "static"


def measure(settings: Settings) -> dict[str, Any]:
    """Times what the settings ask for.

    Returns:
        All numbers, as plain data.

    Raises:
        Mistake: If bundle, images and settings do not fit each other.
    """
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Mistake("torch finds no CUDA device here; leave --device out to time on the CPU")
    bundle = load(settings.bundle, settings.weights, settings.pretrained)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with ExitStack() as stack:
            return Bench(bundle, settings, device, stack).result()
    finally:
        torch.set_num_threads(threads)


class Bench:
    """The networks of a bundle, and the images that they are timed on.

    Args:
        bundle: It is used up: its network moves to the device.
        settings: Of the command line.
        device: Where to run.
        stack: Closes what has to be closed at the end.
    """

    def __init__(self, bundle: Bundle, settings: Settings, device: torch.device, stack: ExitStack) -> None:
        self.settings, self.device, self.stack = settings, device, stack
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.clock: Clock = clock_of(device, settings.threads)
        self.notes: list[str] = []
        self.runners: dict[tuple[str, bool], Runner] = {}
        self.bundle, self.policy = bundle, bundle.policy
        original = bundle.net.float()
        if device.type == "cpu" and self.dtype == torch.float32:
            lay_out_for_cpu(original)  # all arms alike, static too
        self.has_adapters = bool(adapter_layers(original.backbone))
        self.net, self.unmerged = self._merged(original), original if self.has_adapters else None
        self.size = _image_size(bundle)
        if self.net.token_merging is not None:
            self.notes.append(
                f"the static arms keep every token; all others have token_merging={self.net.token_merging}"
            )
        pool = self._real() if settings.images else self._noise()
        self.exact = copy.deepcopy(self.net) if self.dtype != torch.float32 else self.net  # to be counted and exported
        self.costs = cache(self._costs)
        self.net.to(device, self.dtype)
        if self.unmerged is not None:
            self.unmerged.to(device, self.dtype)
        self.pool = pool.to(device, self.dtype)
        with torch.inference_mode():
            logits = torch.cat([self.net(part) for part in self.pool.split(CPU_CHUNK)], dim=1)
        if settings.shares is not None:
            if len(settings.shares) != self.net.num_exits:
                raise Mistake(
                    f"shares has {len(settings.shares)} numbers, this network has {self.net.num_exits} exits, the last "
                    "included; give one for each"
                )
            self.policy = share_thresholds(logits, settings.shares)
        elif not settings.images:
            self.notes.append(
                "the images are noise, and the shares that leave on noise are not real; give --images FOLDER, or "
                "--shares to set them"
            )
        self.exits = route(self.policy, logits)

    # ---- networks and images

    def _merged(self, net: ExitNet) -> ExitNet:
        """Gives a copy with its adapters folded in, or the network itself where that cannot be done."""
        if not self.has_adapters:
            return net
        try:
            return copy.deepcopy(net).merge(tolerance=1e-4)
        except ValueError as error:
            self.notes.append(f"static and all others keep the adapters: {one_line(error)}")
            return net

    def _noise(self) -> Tensor:
        stem = next(module for module in self.net.backbone.modules() if isinstance(module, torch.nn.Conv2d))
        count = max(NOISE, *map(_in_a_round, self.settings.batch_sizes), 0)
        shape = (count, stem.in_channels, self.size, self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def _real(self) -> Tensor:
        folder, preprocess = Path(self.settings.images or "").expanduser(), self.bundle.preprocess
        if preprocess is None:
            raise Mistake("this bundle has no preprocessing, so it takes no image files; leave --images out")
        files = image_files(folder)
        if not files:
            raise Mistake(f"images={folder} holds no image; give a folder with some, or leave it out")
        if len(files) > REAL:
            self.notes.append(f"{REAL} of the {len(files)} images are read")
            files = [files[i * len(files) // REAL] for i in range(REAL)]
        tensors, broken = [], []
        for file in files:
            try:
                tensors.append(torch.from_numpy(preprocess(load_image(file))))
            except UnreadableImage:
                broken.append(file)
        if not tensors:
            raise Mistake(f"none of the {len(files)} images in {folder} can be read; give others, or leave images out")
        if broken:
            self.notes.append(f"{len(broken)} images cannot be read and are left out, the first is {broken[0]}")
        return torch.stack(tensors)

    def _costs(self, merged: bool, class_first: bool) -> ExitCosts:
        return exit_costs(self.exact if merged else self.unmerged, self.size, class_first=class_first)  # type: ignore[arg-type]

    # ---- what comes out

    def result(self) -> dict[str, Any]:
        """Times all batch sizes."""
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(self.settings.batch_sizes) * (self.settings.rounds + 2))
            batches = [self._batch(batch, progress, task) for batch in self.settings.batch_sizes]
        return {
            "notes": list(dict.fromkeys(self.notes)),
            "policy": plain(self.policy),
            "shares_of_all_images": _shares(self.exits, self.net.num_exits),
            "images": "real" if self.settings.images else "noise",
            "clock": self.clock,
            "clock_in_words": CLOCKS[self.clock],
            "void_beyond": VOID,
            "batches": batches,
            "machine": machine(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _batch(self, batch: int, progress: Progress, task: TaskID) -> dict[str, Any]:
        count = _in_a_round(batch)
        picked = representative(self.exits, count).to(self.pool.device)
        images, shares = self.pool[picked], _shares(self.exits[picked], self.net.num_exits)
        with torch.inference_mode():
            class_first = self.net.prefers_class_first(self.net.embed(images[:batch]))
        work = Work(self, batch, images, class_first, self.costs(True, class_first).average(shares))
        arms: dict[str, Arm] = {}
        reached: dict[str, list[float]] = {}
        for name in self.settings.arms:
            progress.update(task, description=f"batch {batch}: preparing {name}")
            try:
                arm = _BUILDERS[name](work)
                with torch.inference_mode():  # the first time may compile, or fail
                    exits = [arm.serve(part) for part in work.batches(arm)]
            except Exception as error:
                if name == "static":
                    raise
                self.notes.append(f"{name} is not timed at batch {batch}: {_reason(error)}")
                continue
            arms[name] = arm
            if isinstance(arm.cost, ExitCosts):
                reached[name] = _shares(torch.cat([torch.as_tensor(part) for part in exits]), self.net.num_exits)
        progress.update(task, description=f"batch {batch}: timing")
        calls = {name: [partial(arm.serve, part) for part in work.batches(arm)] for name, arm in arms.items()}
        with torch.inference_mode():
            times = interleave(
                calls | {"control": calls["static"]},
                self.settings.rounds,
                device=self.device,
                after=lambda: progress.advance(task),
            )
        seconds = {name: taken.rounds(self.clock) for name, taken in times.items()}
        control = ratio(seconds["control"], seconds["static"])
        rows = {name: self._row(name, arms, reached, times, batch) for name in arms}
        costs = self.costs(True, class_first)
        return {
            "batch": batch,
            "images": count,
            "class_first": class_first,
            "shares": shares,
            "control": control,
            "void": is_void(control),
            "static_gmacs": costs.backbone / 1e9,
            "static_gmacs_class_row_last": None if costs.backbone_class_row is None else costs.backbone_class_row / 1e9,
            "exit_gmacs": costs.gmacs,
            "arms": rows,
            "seconds": {name: _rounded(taken) for name, taken in times.items()},
        }

    def _row(
        self, name: str, arms: dict[str, Arm], reached: dict[str, list[float]], times: dict[str, Times], batch: int
    ) -> dict[str, Any]:
        arm, mine = arms[name], times[name].rounds(self.clock)
        shares = reached.get(name)
        macs = arm.cost.average(shares) if isinstance(arm.cost, ExitCosts) and shares else arm.cost
        rival = arm.rival if arm.rival in arms else "static"
        fewer = self.costs(True, False).backbone / macs  # type: ignore[operator]
        milliseconds = [1000 * seconds for seconds in times[name].calls("wall")]
        p50 = percentile(milliseconds, 0.5)
        return {
            "detail": arm.detail,
            "ms_p50": p50,
            "ms_p95": percentile(milliseconds, 0.95),
            "images_per_second": len(milliseconds) * batch / sum(milliseconds) * 1000,
            "gmacs": macs / 1e9,  # type: ignore[operator]
            "shares": shares,
            "mac_speedup": fewer,
            "speedup": ratio(times["static"].rounds(self.clock), mine),
            "rival": rival,
            "speedup_over_rival": ratio(times[rival].rounds(self.clock), mine),
            "efficiency": ratio(times[rival].rounds(self.clock), mine) / fewer,
        }


@dataclass(frozen=True)
class Work:
    """One batch size.

    Args:
        bench: The networks.
        batch: Images a call.
        images: Of a round (images, channels, height, width), on the device.
        class_first: Whether routing computes the class token's row first.
        average: Multiply-adds of an image in merged routing.
    """

    bench: Bench
    batch: int
    images: Tensor
    class_first: bool
    average: float

    def batches(self, arm: Arm) -> list[Any]:
        """Cuts the images of a round into batches as the arm takes them."""
        parts = self.images.split(self.batch)
        return [part.float().cpu().numpy() for part in parts] if arm.arrays else list(parts)

    def chunk(self, serve: Callable[[Any], Any], arrays: bool = False) -> int:
        """Finds how many images at a time are best for a static arm."""
        [part, *_] = self.batches(Arm(serve, 0.0, arrays=arrays))
        with torch.inference_mode():
            return best_chunk(lambda n: partial(_cut, serve, n, part), self.batch, self.bench.clock, self.bench.device)


# ---- one function an arm ---------------------------------------------------------------------------------------------


def _static(work: Work) -> Arm:
    static = _up_to(work.bench.net, work.bench.net.depth).at(-1)
    chunk = work.chunk(static)
    return Arm(
        partial(_cut, static, chunk), float(work.bench.costs(True, False).backbone), _in_chunks(chunk, work.batch)
    )


def _smaller(work: Work) -> Arm:
    """The backbone cut after the block that brings its multiply-adds nearest to routing's average."""
    net, exact, size = work.bench.net, work.bench.exact, work.bench.size

    @cache
    def cost(depth: int) -> int:
        return exit_costs(_up_to(exact, depth), size).macs[0]

    above = min(bisect_left(range(1, net.depth + 1), work.average, key=cost) + 1, net.depth)
    depth = min((max(above - 1, 1), above), key=lambda d: abs(cost(d) - work.average))
    if depth == net.depth:
        raise Absent("routing costs nearly as much as the whole backbone, which static is")
    smaller = _up_to(net, depth).at(0)
    detail = f"{depth} {'block' if depth == 1 else 'blocks'}"
    chunk = work.chunk(smaller)
    return Arm(partial(_cut, smaller, chunk), float(cost(depth)), detail + _in_chunks(chunk, work.batch, ", "))


def _unmerged(work: Work) -> Arm:
    net = work.bench.unmerged
    if net is None:
        raise Absent("the bundle was merged" if work.bench.bundle.config.merged else "the bundle has no adapters")
    return Arm(partial(_routed, net, work.bench.policy), work.bench.costs(False, work.class_first))


def _merged(work: Work) -> Arm:
    if work.bench.net is work.bench.unmerged:
        raise Absent("the adapters cannot be merged")
    return Arm(partial(_routed, work.bench.net, work.bench.policy), work.bench.costs(True, work.class_first))


def _onnx_static(work: Work) -> Arm:
    static = ExitNet(work.bench.exact.backbone, LinearHeads(), exit_depths=[]).eval()
    runner = _exported(work, "static", static, Never(), False)

    def serve(images: Any) -> Any:
        return runner.stage(0, [images])

    chunk = work.chunk(serve, arrays=True)
    cost = float(work.bench.costs(True, False).backbone)
    return Arm(partial(_cut, serve, chunk), cost, _in_chunks(chunk, work.batch), arrays=True)


def _onnx_staged(work: Work) -> Arm:
    runner = _exported(work, "staged", work.bench.exact, work.bench.policy, work.class_first)
    costs = work.bench.costs(True, work.class_first)
    return Arm(lambda images: runner.route(images)[1], costs, arrays=True, rival="onnx static")


_BUILDERS: dict[str, Callable[[Work], Arm]] = {
    "static": _static,
    "smaller static": _smaller,
    "unmerged": _unmerged,
    "merged": _merged,
    "onnx static": _onnx_static,
    "onnx staged": _onnx_staged,
}


def _routed(net: ExitNet, policy: Policy, images: Tensor) -> Tensor:
    return net.early(images, policy).exit_index


def _cut(serve: Callable[[Any], Any], chunk: int, images: Any) -> list[Any]:
    return [serve(images[start : start + chunk]) for start in range(0, len(images), chunk)]


def _up_to(net: ExitNet, depth: int) -> ExitNet:
    """Gives a network over the same blocks whose first exit stands after so many, with the head that is there.

    It merges no tokens.
    """
    shallow = ExitNet(net.backbone, LinearHeads(), exit_depths=[depth])
    if depth in net.exit_depths[:-1]:
        shallow.heads[0] = net.heads[net.exit_depths.index(depth)]
    like = next(net.backbone.parameters())
    return shallow.to(like.device, like.dtype).eval().requires_grad_(False)


def _exported(work: Work, kind: str, net: ExitNet, policy: Policy, class_first: bool) -> Runner:
    """Exports to a folder that is gone at the end, and opens all stages; once for all batch sizes."""
    bench = work.bench
    if (kind, class_first) in bench.runners:
        return bench.runners[kind, class_first]
    if bench.dtype != torch.float32:
        raise Absent("the exported graphs run in float32; leave --precision out")
    folder = Path(bench.stack.enter_context(tempfile.TemporaryDirectory(prefix="dynadapter-bench-"))) / "exported"
    preprocess = bench.bundle.preprocess
    export_onnx(
        net,
        folder,
        policy=policy,
        class_names=bench.bundle.class_names,
        preprocessing={"image_size": bench.size} if preprocess is None else plain(preprocess),
        class_first=class_first,
        check_images=work.images[:12].float().cpu(),
    )
    providers = ["CUDAExecutionProvider"] if bench.device.type == "cuda" else None
    bench.runners[kind, class_first] = Runner(folder, providers, bench.settings.threads).load()
    return bench.runners[kind, class_first]


# ---- small things ----------------------------------------------------------------------------------------------------


def _image_size(bundle: Bundle) -> int:
    """Pixels of the square images that the network takes."""
    if bundle.preprocess is not None:
        return bundle.preprocess.image_size
    backbone: Any = bundle.net.backbone
    return built_for(backbone) or int(backbone.pretrained_cfg["input_size"][1])


def _in_a_round(batch: int) -> int:
    return batch * math.ceil(IMAGES / batch)


def _in_chunks(chunk: int, batch: int, before: str = "") -> str:
    return f"{before}{chunk} at a time" if chunk < batch else ""


def _shares(exits: Tensor, count: int) -> list[float]:
    return (exits.cpu().bincount(minlength=count).double() / len(exits)).tolist()


def _rounded(times: Times) -> dict[str, list[list[float]]]:
    """Gives the seconds of every call to a tenth of a microsecond."""
    clocks = {clock: getattr(times, clock) for clock in CLOCKS}
    return {
        clock: [[round(call, 7) for call in calls] for calls in rounds] for clock, rounds in clocks.items() if rounds
    }


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
