"""What serving gains beside plain calls: a router for a flow, ONNX Runtime, and what a user would pick instead.

    python benchmarks/serving.py
    python benchmarks/serving.py --only "ViT-S" --parts onnx

Protocol: as in latency.py: one thread, CPU seconds of the process, arms interleaved call by call, medians of the ratios
round by round, a control arm in every run, which is void where the control leaves 1 by more than 3 %. Thresholds are
set so that the wanted shares leave; weights are random, and torch's arms have theirs laid out for a CPU.

stream: images come one at a time; `Stream` against routing each alone with whole blocks. How many later images an
answer waits for stands beside it.
onnx: ONNX Runtime with a graph a stage against ONNX Runtime with one graph, each cut to the chunks that suit it best.
Efficiency is that speed-up over the one in multiply-adds.
rivals: one run with peft's LoRA on the same backbone, the package earlyon around the same backbone, and torch.compile.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    BACKBONES,
    SHARES,
    Log,
    arguments,
    best_chunk,
    build,
    images_a_call,
    interleave,
    mark,
    ratio,
    shares_of,
    thresholds,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynadapter import Confidence, ExitNet, LoRA, Never, Stream, exit_costs, inject
from dynadapter.bench.timing import share_thresholds
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Policy as RunnerPolicy
from dynadapter.serve.runtime import Runner

FLOWS = {"ViT-Ti, 64 tokens": 128, "ViT-S/16, 224": 64}
"""Images of a flow."""
STREAMS = (8, 16)
"""Samples with which a stage of the stream is full."""
BATCHES = (1, 8, 64)
RIVAL_SHARES = "50/30/15/5"
COMPILE: dict[str, Any] = {}
"""Further arguments of torch.compile."""


def noise(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---- a flow of single images


@torch.inference_mode()
def stream_case(net: ExitNet, size: int, flow: int, rounds: int) -> dict[str, Any]:
    """Times a flow at batch 1: the backbone, plain routing one by one, and the stream."""
    images = noise(flow, size).split(1)
    static = net.at(-1)

    def streamed(policy: Confidence, batch: int) -> list[tuple[int, int, int]]:
        """Gives ticket, exit and the arrivals that the answer waited for."""
        stream, given = Stream(net, policy, batch=batch), []
        for arrived, image in enumerate(images):
            stream.push(image)
            given += [(answer.ticket, answer.exit, arrived - answer.ticket) for answer in stream.pop()]
        last = len(images) - 1
        return given + [(answer.ticket, answer.exit, last - answer.ticket) for answer in stream.flush()]

    def plain(policy: Confidence) -> Tensor:
        return torch.cat([net.early(image, policy, class_first=False).exit_index for image in images])

    arms: dict[str, Callable[[], Any]] = {"static": lambda: [static(image) for image in images]}
    arms["control"] = arms["static"]
    result: dict[str, Any] = {}
    for name, shares in SHARES.items():
        policy = thresholds(net, torch.cat(images), shares)
        arms[f"{name} plain"] = lambda policy=policy: plain(policy)
        reached = plain(policy)
        result[f"{name} plain"] = {"shares": shares_of(reached, net.num_exits)}
        for batch in STREAMS:
            arm = f"{name} Stream of {batch}"
            arms[arm] = lambda policy=policy, batch=batch: streamed(policy, batch)
            tickets, exits, waits = zip(*streamed(policy, batch), strict=True)
            assert list(tickets) == list(range(flow)), "answers out of order"
            result[arm] = {
                "shares": shares_of(torch.tensor(exits), net.num_exits),
                "same_exits": (torch.tensor(exits) == reached).double().mean().item(),
                "waits_for": {"mean": sum(waits) / flow, "most": max(waits)},
            }
    seconds = interleave(arms, rounds)
    for arm, got in result.items():
        got["speedup"] = ratio(seconds["static"], seconds[arm])
        got["over_plain"] = ratio(seconds[f"{arm.split()[0]} plain"], seconds[arm])
    return {"control": ratio(seconds["control"], seconds["static"]), "seconds": seconds, **result}


# ---- ONNX Runtime


class Exported:
    """A network's graphs, one a stage and one for all, opened by ONNX Runtime on one thread.

    Args:
        net: The network.
        size: Pixels of its images.
        folder: Where to write.
    """

    def __init__(self, net: ExitNet, size: int, folder: Path) -> None:
        names = [str(k) for k in range(net.num_classes)]
        common: dict[str, Any] = {"class_names": names, "preprocessing": {"image_size": size}, "policy": Never()}
        whole = copy.deepcopy(net.backbone)
        export_onnx(ExitNet(whole, exit_depths=[]).eval(), folder / "static", class_first=False, **common)
        self.static = Runner(folder / "static", threads=1).load()
        self.staged = {}
        for way in ("plain", "class first"):
            export_onnx(net, folder / way, class_first=way == "class first", **common)
            self.staged[way] = Runner(folder / way, threads=1).load()

    def ask(self, policy: Confidence) -> None:
        """Lets the stages' runners route by this policy."""
        for runner in self.staged.values():
            settings = {"kind": "Confidence", "threshold": list(policy.threshold)}  # type: ignore[arg-type]
            runner.policy = RunnerPolicy(settings, runner.num_exits)


@torch.inference_mode()
def onnx_case(net: ExitNet, exported: Exported, size: int, batch: int, rounds: int) -> dict[str, Any]:
    """Times both ways to run graphs at one batch size, and torch's static backbone beside them."""
    images = noise(images_a_call(batch), size)
    arrays = [part.numpy() for part in images.split(batch)]
    backbone = net.at(-1)

    def cut(chunk: int) -> Iterator[np.ndarray]:
        return (call[start : start + chunk] for call in arrays for start in range(0, batch, chunk))

    def static(chunk: int) -> Callable[[], Any]:
        return lambda: [exported.static.stage(0, [part]) for part in cut(chunk)]

    def torch_static(chunk: int) -> Callable[[], Any]:
        return lambda: [backbone(torch.from_numpy(part)) for part in cut(chunk)]

    def staged(runner: Runner, policy: RunnerPolicy, chunk: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            runner.policy = policy
            return torch.from_numpy(np.concatenate([runner.route(part)[1] for part in cut(chunk)]))

        return call

    chunks = {"static": best_chunk(static, batch), "torch static": best_chunk(torch_static, batch)}
    arms: dict[str, Callable[[], Any]] = {"static": static(chunks["static"])}
    arms |= {"control": arms["static"], "torch static": torch_static(chunks["torch static"])}
    result: dict[str, Any] = {}
    for name, shares in SHARES.items():
        exported.ask(thresholds(net, images, shares))
        for way, runner in exported.staged.items():
            arm, policy = f"{name} {way}", runner.policy
            chunks[arm] = best_chunk(lambda n, r=runner, p=policy: staged(r, p, n), batch)
            arms[arm] = staged(runner, policy, chunks[arm])
            reached = shares_of(arms[arm](), net.num_exits)
            costs = exit_costs(net, size, class_first=way == "class first")
            result[arm] = {"shares": reached, "mac_speedup": costs.backbone / costs.average(reached)}
    seconds = interleave(arms, rounds)
    for arm, got in result.items():
        got["speedup"] = ratio(seconds["static"], seconds[arm])
        got["efficiency"] = got["speedup"] / got["mac_speedup"]
        got["over_torch_static"] = ratio(seconds["torch static"], seconds[arm])
    result["torch static"] = {"speedup": ratio(seconds["static"], seconds["torch static"])}
    control = ratio(seconds["control"], seconds["static"])
    return {"control": control, "chunks": chunks, "seconds": seconds, **result}


# ---- what a user would pick instead


def peft_lora(backbone: torch.nn.Module, merged: bool) -> torch.nn.Module:
    """Puts peft's LoRA of rank 8 on a backbone's qkv, as its documentation shows."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(backbone, LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], init_lora_weights=False))
    return (model.merge_and_unload() if merged else model).eval()


def earlyon(backbone: torch.nn.Module, net: ExitNet, images: Tensor, shares: tuple[float, ...]) -> Any:
    """Wraps the backbone by the package earlyon, with exits after the same blocks and thresholds for the same shares.

    Its hooks go on any module, and its heads read the class token without a norm before it.
    """
    from earlyon.models import custom_ee

    shape, layers = (1, *images.shape[1:]), [f"blocks.{block - 1}" for block in net.exit_depths[:-1]]
    wrapper = custom_ee(backbone, layers, net.num_classes, input_shape=shape, pool_tokens="cls").eval()
    with torch.no_grad():
        logits = torch.cat([torch.stack(wrapper(part, mode="training")) for part in images.split(8)], dim=1)
    wrapper.config.confidence_thresholds = list(share_thresholds(logits, shares).threshold)  # type: ignore[arg-type]
    wrapper(images[:1])  # counts its operations once
    return wrapper


EARLYON = {
    1: "earlyon: routes one image, as here; a confident exit raises an exception inside a hook. Its heads differ: no "
    "norm, 128 hidden channels. Multiply-adds are those of dynadapter's network at the same exits",
    2: "earlyon: forward_inference_batched lets a batch leave only as a whole, where every image in it is sure; it has "
    "no routing image by image above batch 1",
}


@torch.inference_mode()
def rivals_case(options: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    """Times all at one batch size; what cannot run is a note."""
    torch._dynamo.reset()
    backbone, net = build(**options)
    size, count = int(options["img_size"]), images_a_call(batch)
    images = noise(count, size)
    calls = images.split(batch)
    shares = SHARES[RIVAL_SHARES]
    policy = thresholds(net, images, shares)
    chunk = best_chunk(lambda n: lambda: [backbone(part) for call in calls for part in call.split(n)], batch)
    arms: dict[str, Callable[[], Any]] = {}
    notes: list[str] = []

    def static(model: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return lambda: [model(part) for call in calls for part in call.split(chunk)]

    def routed(served: ExitNet) -> Callable[[], Tensor]:
        return lambda: torch.cat([served.early(call, policy).exit_index for call in calls])

    def adapted() -> ExitNet:
        again, lora = build(**options)
        inject(again, LoRA(rank=8))
        return lora.eval()

    def hooked() -> Callable[[], Tensor]:
        with torch.inference_mode(False):
            wrapper = earlyon(build(**options)[0], net, images.clone(), shares)
        notes.append(EARLYON[min(batch, 2)])
        run = wrapper if batch == 1 else wrapper.forward_inference_batched

        def call() -> Tensor:
            taken = [run(part).exit_taken for part in calls]  # -1 for the last
            return torch.tensor(taken).remainder(net.num_exits).repeat_interleave(batch)

        return call

    make: dict[str, Callable[[], Callable[[], Any]]] = {
        "static": lambda: static(backbone),
        "control": lambda: static(backbone),
        "routing": lambda: routed(net),
        "routing, LoRA unmerged": lambda: routed(counted["routing, LoRA unmerged"]),
        "LoRA unmerged": lambda: static(counted["routing, LoRA unmerged"].at(-1)),
        "peft LoRA unmerged": lambda: static(peft_lora(build(**options)[0], merged=False)),
        "peft LoRA merged": lambda: static(peft_lora(build(**options)[0], merged=True)),
        "earlyon": hooked,
        "torch.compile static": lambda: static(torch.compile(build(**options)[0], dynamic=False, **COMPILE)),
    }
    counted = dict.fromkeys(("routing", "earlyon"), net) | {"routing, LoRA unmerged": adapted()}
    reached: dict[str, list[float]] = {}
    for name, maker in make.items():
        try:
            arm = maker()
            exits = arm()  # compiles, and fails where it cannot run
        except Exception as error:
            if name in ("static", "control", "routing"):
                raise
            notes.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        arms[name] = arm
        if isinstance(exits, Tensor):
            reached[name] = shares_of(exits, net.num_exits)
    seconds = interleave(arms, rounds)
    result: dict[str, Any] = {}
    full = exit_costs(net, size).backbone
    for name in [name for name in arms if name not in ("static", "control")]:
        result[name] = {"speedup": ratio(seconds["static"], seconds[name])}
        if name in reached:
            cost = exit_costs(counted[name], size, class_first=batch >= 4 and name != "earlyon")
            promise = full / cost.average(reached[name])
            got = {"shares": reached[name], "mac_speedup": promise, "efficiency": result[name]["speedup"] / promise}
            result[name] |= got
    control = ratio(seconds["control"], seconds["static"])
    return {"control": control, "static_chunk": chunk, "notes": notes, "seconds": seconds, **result}


# ---- the program


def main() -> None:
    """Runs what is not done yet and prints a table for each part."""
    parser = arguments(__doc__ or "", "serving.jsonl")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="of onnx and rivals")
    args = parser.parse_args()
    torch.set_num_threads(1)
    log = Log(args.out)
    for part in args.parts:
        table = Table("backbone", "batch", "control", "arm", "shares", *COLUMNS[part], title=part)
        notes: list[str] = []
        for backbone, options in BACKBONES.items():
            if args.only in backbone:
                for key, line in PARTS[part](backbone, options, args, log):
                    _rows(table, part, key, line)
                    notes += line.get("notes", ())
        Console(width=150).print(table)
        print(*dict.fromkeys(notes), sep="\n")


def _stream(backbone: str, options: dict[str, Any], args: Any, log: Log) -> Iterator[tuple[dict, dict]]:
    key = {"part": "stream", "backbone": backbone, "batch": 1, "rounds": args.rounds}
    size = int(options["img_size"])
    yield key, log.find(key) or log.add(key, **stream_case(build(**options)[1], size, FLOWS[backbone], args.rounds))


def _onnx(backbone: str, options: dict[str, Any], args: Any, log: Log) -> Iterator[tuple[dict, dict]]:
    exported, net, size = None, build(**options)[1], int(options["img_size"])
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batches:
            key = {"part": "onnx", "backbone": backbone, "batch": batch, "rounds": args.rounds}
            if not (line := log.find(key)):
                exported = exported or Exported(net, size, Path(folder))
                line = log.add(key, **onnx_case(net, exported, size, batch, args.rounds))
            yield key, line


def _rivals(backbone: str, options: dict[str, Any], args: Any, log: Log) -> Iterator[tuple[dict, dict]]:
    for batch in args.batches:
        key = {"part": "rivals", "backbone": backbone, "batch": batch, "rounds": args.rounds, "shares": RIVAL_SHARES}
        yield key, log.find(key) or log.add(key, **rivals_case(options, batch, args.rounds))


PARTS: dict[str, Callable[[str, dict[str, Any], Any, Log], Iterator[tuple[dict, dict]]]] = {
    "stream": _stream,
    "onnx": _onnx,
    "rivals": _rivals,
}
COLUMNS = {
    "stream": ("speed-up", "over plain", "waits for, mean", "waits for, most"),
    "onnx": ("MAC speed-up", "speed-up", "efficiency", "over torch static"),
    "rivals": ("MAC speed-up", "speed-up", "efficiency"),
}


def _rows(table: Table, part: str, key: dict[str, Any], line: dict[str, Any]) -> None:
    first = [key["backbone"], str(key["batch"]), mark(line["control"])]
    for arm, got in line.items():
        if not (isinstance(got, dict) and "speedup" in got):
            continue
        waits = got.get("waits_for", {})
        cells = {
            "MAC speed-up": got.get("mac_speedup"),
            "speed-up": got["speedup"],
            "efficiency": got.get("efficiency"),
            "over plain": got.get("over_plain"),
            "over torch static": got.get("over_torch_static"),
            "waits for, mean": waits.get("mean"),
            "waits for, most": waits.get("most"),
        }
        shares = "/".join(f"{100 * s:.0f}" for s in got.get("shares", ()))
        values = ("" if cells[c] is None else f"{cells[c]:.3f}" for c in COLUMNS[part])
        table.add_row(*first, arm, shares, *values)
        first = ["", "", ""]


if __name__ == "__main__":
    main()
