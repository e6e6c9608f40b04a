"""Time ways of serving against plain calls: a stream of images, ONNX Runtime, and other packages.

    python benchmarks/serving.py
    python benchmarks/serving.py --only "ViT-S" --parts onnx

Protocol as in ``latency.py``: one thread, CPU seconds of the process, arms interleaved call by call, medians of the
ratios round by round, a control arm in every run, void where it differs from 1 by more than 3 %. Thresholds are set so
that the given shares exit; weights are random, and torch's arms have theirs laid out for a CPU.

stream: images come one at a time; `Stream` against routing each alone with whole blocks. "waits for" is the number of
later images that arrive before an answer.
onnx: ONNX Runtime with a graph a stage against ONNX Runtime with one graph, each in the chunks that are fastest for it.
baselines: peft's LoRA on the same backbone, the package earlyon around the same backbone, and torch.compile. earlyon
routes image by image at batch 1; above it a whole batch exits together if every image in it reaches the threshold.
shipped: the recipes of ``configs/`` with merged LoRA by torch, ONNX Runtime and OpenVINO, beside the static backbone, a
smaller one of equal average cost, static token merging and peft merged, at the exit shares of a calibrated run, which
the key of a line names. "efficiency" is the speed-up over torch's static backbone divided by that in GMACs.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    SHARES,
    Line,
    Log,
    Row,
    arguments,
    backbones,
    build,
    control,
    images_a_call,
    interleave,
    noise,
    shares_of,
    show,
    thresholds,
)
from latency import run_routed, run_static
from shipped import shipped_lines
from torch import Tensor, nn

from dynadapter import Confidence, ExitNet, LoRA, Never, Stream, exit_costs, inject
from dynadapter.bench.timing import best_chunk, ratio, share_thresholds
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Runner
from dynadapter.serve.runtime.policies import Policy as RunnerPolicy

STREAM_IMAGES = {"ViT-Ti, 64 tokens": 128, "ViT-S/16, 224": 64}
STAGE_SIZES = (8, 16)
"""Samples with which a stage of the stream is full."""
BATCHES = (1, 8, 64)
BASELINE_SHARES = "50/30/15/5"
COMPILE: dict[str, Any] = {}
"""Further arguments of torch.compile."""


# ---- images that come one at a time


def answers(net: ExitNet, images: tuple[Tensor, ...], policy: Confidence, size: int) -> list[tuple[int, int, int]]:
    """Push all images through a stream; return ticket, exit index and later arrivals until the answer."""
    stream, found = Stream(net, policy, batch=size), []
    for arrived, image in enumerate(images):
        stream.push(image)
        found += [(answer.ticket, answer.exit_index, arrived - answer.ticket) for answer in stream.pop()]
    last = len(images) - 1
    return found + [(answer.ticket, answer.exit_index, last - answer.ticket) for answer in stream.flush()]


@torch.inference_mode()
def stream_case(net: ExitNet, size: int, count: int, rounds: int) -> Line:
    """Time images one by one: the static backbone, plain routing, and the stream."""
    pool = noise(count, size)
    images = pool.split(1)
    arms: dict[str, Callable[[], Any]] = {"static": partial(run_static, net.at(-1), pool, 1, 1)}
    arms["control"] = arms["static"]
    line: Line = {}
    for name, shares in SHARES.items():
        policy = thresholds(net, pool, shares)
        arms[f"{name} plain"] = partial(run_routed, net, pool, 1, policy, False)
        reached = arms[f"{name} plain"]()
        line[f"{name} plain"] = {"shares": shares_of(reached, net.num_exits)}
        for full in STAGE_SIZES:
            arm = f"{name} Stream of {full}"
            arms[arm] = partial(answers, net, images, policy, full)
            tickets, exits, waits = map(torch.tensor, zip(*arms[arm](), strict=True))
            assert torch.equal(tickets, torch.arange(count)), "answers out of order"
            line[arm] = {
                "shares": shares_of(exits, net.num_exits),
                "same_exits": (exits == reached).double().mean().item(),
                "waits_for": {"mean": waits.double().mean().item(), "most": int(waits.max())},
            }
    seconds = interleave(arms, rounds)
    for arm, got in line.items():
        got["speedup"] = ratio(seconds["static"], seconds[arm])
        got["over_plain"] = ratio(seconds[f"{arm.split()[0]} plain"], seconds[arm])
    return {"control": ratio(seconds["control"], seconds["static"]), "seconds": seconds, **line}


# ---- ONNX Runtime


class Exported:
    """A network's graphs, one a stage and one for all, opened by ONNX Runtime on one thread.

    Args:
        net: The network.
        size: Height and width of its images in pixels.
        folder: Where to write.
    """

    def __init__(self, net: ExitNet, size: int, folder: Path) -> None:
        names = [str(k) for k in range(net.num_classes)]
        shared: dict[str, Any] = {"class_names": names, "preprocess": Preprocess(size), "policy": Never()}
        whole = ExitNet(copy.deepcopy(net.backbone), exit_depths=[]).eval()
        export_onnx(whole, folder / "static", class_first=False, **shared)
        self.static = Runner(folder / "static", threads=1).load()
        self.staged = {}
        for way in ("plain", "class first"):
            export_onnx(net, folder / way, class_first=way == "class first", **shared)
            self.staged[way] = Runner(folder / way, threads=1).load()


def chunks_of(arrays: list[np.ndarray], chunk: int) -> Iterator[np.ndarray]:
    """Yield batches cut into chunks."""
    for array in arrays:
        for start in range(0, len(array), chunk):
            yield array[start : start + chunk]


def run_onnx(runner: Runner, arrays: list[np.ndarray], chunk: int) -> None:
    """Run the one graph of the static backbone."""
    for part in chunks_of(arrays, chunk):
        runner.stage(0, [part])


def route_onnx(runner: Runner, policy: RunnerPolicy, arrays: list[np.ndarray], chunk: int) -> Tensor:
    """Route by a graph a stage; return the exit indices (images,)."""
    runner.policy = policy
    return torch.from_numpy(np.concatenate([runner.route(part)[1] for part in chunks_of(arrays, chunk)]))


@torch.inference_mode()
def onnx_case(net: ExitNet, exported: Exported, size: int, batch: int, rounds: int) -> Line:
    """Time both ways to run graphs at one batch size, and torch's static backbone."""
    images = noise(images_a_call(batch), size)
    arrays = [part.numpy() for part in images.split(batch)]
    makers: dict[str, Callable[[int], Callable[[], Any]]] = {
        "static": lambda chunk: partial(run_onnx, exported.static, arrays, chunk),
        "torch static": lambda chunk: partial(run_static, net.at(-1), images, batch, chunk),
    }
    for name, shares in SHARES.items():
        threshold = list(thresholds(net, images, shares).threshold)  # type: ignore[arg-type]
        policy = RunnerPolicy({"kind": "Confidence", "threshold": threshold}, net.num_exits)
        for way, runner in exported.staged.items():
            makers[f"{name} {way}"] = lambda chunk, r=runner, p=policy: partial(route_onnx, r, p, arrays, chunk)
    chunks = {name: best_chunk(make, batch) for name, make in makers.items()}
    arms = {name: make(chunks[name]) for name, make in makers.items()}
    seconds = interleave(arms | {"control": arms["static"]}, rounds)
    line: Line = {"torch static": {"speedup": ratio(seconds["static"], seconds["torch static"])}}
    for name in [name for name in arms if name.startswith(tuple(SHARES))]:
        reached = shares_of(arms[name](), net.num_exits)
        costs = exit_costs(net, size, class_first=name.endswith("class first"))
        promise, speedup = costs.static / costs.average_run(reached), ratio(seconds["static"], seconds[name])
        line[name] = {"shares": reached, "mac_speedup": promise, "speedup": speedup, "efficiency": speedup / promise}
        line[name]["over_torch_static"] = ratio(seconds["torch static"], seconds[name])
    same = ratio(seconds["control"], seconds["static"])
    return {"control": same, "chunks": chunks, "seconds": seconds, **line}


# ---- what a user could take instead


def peft_lora(backbone: nn.Module, merged: bool) -> nn.Module:
    """Put peft's LoRA of rank 8 on a backbone's qkv, as its documentation shows."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(backbone, LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], init_lora_weights=False))
    return (model.merge_and_unload() if merged else model).eval()


def earlyon(backbone: nn.Module, net: ExitNet, images: Tensor, shares: tuple[float, ...]) -> Any:
    """Wrap the backbone by the package earlyon, with exits after the same blocks and thresholds for the same shares.

    Its heads differ: no norm, 128 hidden channels, the class token alone.
    """
    from earlyon.models import custom_ee

    shape, layers = (1, *images.shape[1:]), [f"blocks.{block - 1}" for block in net.exit_depths[:-1]]
    wrapper = custom_ee(backbone, layers, net.num_classes, input_shape=shape, pool_tokens="cls").eval()
    with torch.no_grad():
        logits = torch.cat([torch.stack(wrapper(part, mode="training")) for part in images.split(8)], dim=1)
    wrapper.config.confidence_thresholds = list(share_thresholds(logits, shares).threshold)  # type: ignore[arg-type]
    wrapper(images[:1])  # counts its operations once
    return wrapper


def earlyon_call(options: dict[str, Any], net: ExitNet, images: Tensor, batch: int) -> Callable[[], Tensor]:
    """Return a call that routes by earlyon: image by image at batch 1, above it each batch as a whole."""
    with torch.inference_mode(False):
        wrapper = earlyon(build(**options)[0], net, images.clone(), SHARES[BASELINE_SHARES])
    run = wrapper if batch == 1 else wrapper.forward_inference_batched

    def call() -> Tensor:
        taken = [run(part).exit_taken for part in images.split(batch)]  # -1 for the last
        return torch.tensor(taken).remainder(net.num_exits).repeat_interleave(batch)

    return call


@torch.inference_mode()
def baselines_case(options: dict[str, Any], batch: int, rounds: int) -> Line:
    """Time all at one batch size; what cannot run is named in ``notes``."""
    torch._dynamo.reset()
    backbone, net = build(**options)
    again, unmerged = build(**options)
    inject(again, LoRA(rank=8))
    unmerged.eval()
    size = int(options["img_size"])
    images = noise(images_a_call(batch), size)
    policy = thresholds(net, images, SHARES[BASELINE_SHARES])
    chunk = best_chunk(lambda n: partial(run_static, backbone, images, batch, n), batch)

    def static(model: Any) -> Callable[[], None]:
        return partial(run_static, model, images, batch, chunk)

    def routed(served: ExitNet) -> Callable[[], Tensor]:
        return lambda: torch.cat([served.early(part, policy).exit_index for part in images.split(batch)])

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "static": lambda: static(backbone),
        "control": lambda: static(backbone),
        "routing": lambda: routed(net),
        "routing, LoRA unmerged": lambda: routed(unmerged),
        "LoRA unmerged": lambda: static(unmerged.at(-1)),
        "peft LoRA unmerged": lambda: static(peft_lora(build(**options)[0], merged=False)),
        "peft LoRA merged": lambda: static(peft_lora(build(**options)[0], merged=True)),
        "earlyon": lambda: earlyon_call(options, net, images, batch),
        "torch.compile static": lambda: static(torch.compile(build(**options)[0], dynamic=False, **COMPILE)),
    }
    arms: dict[str, Callable[[], Any]] = {}
    reached: dict[str, list[float]] = {}
    notes: list[str] = []
    for name, maker in makers.items():
        try:
            arms[name] = maker()
            exits = arms[name]()  # compiles, and fails where it cannot run
        except Exception as error:  # other packages fail in many ways
            if name in ("static", "control", "routing"):
                raise
            arms.pop(name, None)
            notes.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        if isinstance(exits, Tensor):
            reached[name] = shares_of(exits, net.num_exits)
    seconds = interleave(arms, rounds)
    line: Line = {}
    full, first = exit_costs(net, size).static, net.prefers_class_first(net.embed(images[:batch]))
    for name in [name for name in arms if name not in ("static", "control")]:
        speedup = ratio(seconds["static"], seconds[name])
        line[name] = {"speedup": speedup}
        if name in reached:
            counted = unmerged if "unmerged" in name else net
            cost = exit_costs(counted, size, class_first=first and name != "earlyon").average_run(reached[name])
            promise = full / cost
            line[name] |= {"shares": reached[name], "mac_speedup": promise, "efficiency": speedup / promise}
    same = ratio(seconds["control"], seconds["static"])
    return {"control": same, "static_chunk": chunk, "notes": notes, "seconds": seconds, **line}


# ---- the program


def stream_lines(name: str, options: dict[str, Any], args: argparse.Namespace, log: Log) -> Iterator[Line]:
    """Yield the line of the part ``stream``."""
    key = {"part": "stream", "backbone": name, "batch": 1, "rounds": args.rounds}
    count, size = STREAM_IMAGES.get(name, 20), int(options["img_size"])
    yield log.find(key) or log.add(key, **stream_case(build(**options)[1], size, count, args.rounds))


def onnx_lines(name: str, options: dict[str, Any], args: argparse.Namespace, log: Log) -> Iterator[Line]:
    """Yield the lines of the part ``onnx``; the graphs are exported once."""
    exported, net, size = None, build(**options)[1], int(options["img_size"])
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batches:
            key = {"part": "onnx", "backbone": name, "batch": batch, "rounds": args.rounds}
            line = log.find(key)
            if line is None:
                exported = exported or Exported(net, size, Path(folder))
                line = log.add(key, **onnx_case(net, exported, size, batch, args.rounds))
            yield line


def baselines_lines(name: str, options: dict[str, Any], args: argparse.Namespace, log: Log) -> Iterator[Line]:
    """Yield the lines of the part ``baselines``."""
    for batch in args.batches:
        key = {"part": "baselines", "backbone": name, "batch": batch, "rounds": args.rounds, "shares": BASELINE_SHARES}
        yield log.find(key) or log.add(key, **baselines_case(options, batch, args.rounds))


PARTS = {"stream": stream_lines, "onnx": onnx_lines, "baselines": baselines_lines}
SHIPPED = "shipped"


def rows(line: Line) -> list[Row]:
    """Return the table rows of a line."""
    first: Row = {"backbone": line["key"]["backbone"], "batch": line["key"]["batch"], "control": control(line)}
    if "recipe" in line["key"]:
        first |= {"recipe": line["key"]["recipe"], "shares of": line["key"]["shares"]}
    found = []
    columns = {"GMACs speed-up": "mac_speedup", "speed-up": "speedup", "efficiency": "efficiency"}
    columns |= {"over plain": "over_plain", "over torch static": "over_torch_static"}
    columns |= {"over onnx static": "over_onnx_static"}
    for arm, got in line.items():
        if isinstance(got, dict) and "speedup" in got:
            row: Row = {"arm": arm, "shares, %": "/".join(f"{100 * share:.0f}" for share in got.get("shares", ()))}
            row |= {title: got[column] for title, column in columns.items() if column in got}
            waits = got.get("waits_for", {})
            found.append(row | {f"waits for, {name}": value for name, value in waits.items()})
    return [first | found[0], *found[1:]]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print a table for each part."""
    parser = arguments(__doc__ or "", "serving.jsonl")
    parser.add_argument("--parts", nargs="+", default=[*PARTS, SHIPPED], choices=[*PARTS, SHIPPED])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="of all parts but stream")
    parser.add_argument(
        "--bundle", help="calibrated bundle whose exit shares `shipped` takes; default: a committed run"
    )
    args = parser.parse_args(argv)
    args.device = "cpu"
    torch.set_num_threads(1)
    log = Log(args.out)
    for part in args.parts:
        if part == SHIPPED:
            lines = list(shipped_lines(args, log))
        else:
            each = backbones(args).items()
            lines = [line for name, options in each for line in PARTS[part](name, options, args, log)]
        show((row for line in lines for row in rows(line)), part)
        print(*dict.fromkeys(note for line in lines for note in line.get("notes", ())), sep="\n")


if __name__ == "__main__":
    main()
