"""What early exits save in time: per-sample routing against the static backbone, beside what the multiply-adds promise.

    python benchmarks/latency.py
    python benchmarks/latency.py --device cuda

Protocol: one thread, CPU seconds of the process, arms interleaved call by call, medians of the ratios round by round.
The static arm cuts its batch where that is faster for it. A control arm, the static one once more, runs in every round:
where its ratio leaves 1 by more than 3 %, the run is void. Per-exit thresholds on the confidence are set so that the
wanted shares leave at the four exits; weights are random, which changes nothing about the time. Efficiency is the
speed-up over the static backbone divided by the speed-up in multiply-adds. "plain" runs whole blocks; "class first"
computes the class token's row of the last block before an exit first, and has its own, smaller count. On a CPU all arms
have their weights laid out for it (`lay_out_for_cpu`) but one, "static as it comes".

Two more arms say where the time goes. "backbone, our blocks" is the whole backbone as ExitNet runs it. "stages alone"
runs the stages on as many images as plain routing does, without heads, policy and gather: what routing could be at
best, for small batches are slower an image than large ones. "of stages alone" is that time over routing's.

On a GPU: ViT-B/16 in bfloat16, seconds between two events on the device, and from which batch on routing pays.
"""

from collections.abc import Callable
from typing import Any

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

from dynadapter import Confidence, ExitNet, Policy, exit_costs
from dynadapter.bench.timing import clock_of, percentile
from dynadapter.exits.net import CPU_CHUNK

CASES = {
    "cpu": (BACKBONES, (1, 8, 64), torch.float32),
    "cuda": (
        {"ViT-B/16, 224": dict(name="vit_base_patch16_224", img_size=224)},
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
        torch.bfloat16,
    ),
}
"""Backbones, batch sizes and type by device."""


@torch.inference_mode()
def case(
    backbone: torch.nn.Module, net: ExitNet, as_it_comes: torch.nn.Module, batch: int, size: int, rounds: int
) -> dict[str, Any]:
    """Times the static backbone, the control and each routing at one batch size, on the network's device."""
    like = next(backbone.parameters())
    images = torch.randn(images_a_call(batch), 3, size, size, generator=torch.Generator().manual_seed(1)).to(like)

    def static(chunk: int, model: torch.nn.Module = backbone) -> Callable[[], object]:
        return lambda: [model(part) for call in images.split(batch) for part in call.split(chunk)]

    def routed(policy: Policy, class_first: bool) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat([net.early(part, policy, class_first).exit_index for part in images.split(batch)])

    routings: dict[str, Callable[[], torch.Tensor]] = {}
    for name, share in SHARES.items():
        policy = thresholds(net, images, share)
        routings[f"{name} plain"], routings[f"{name} class first"] = routed(policy, False), routed(policy, True)
    nobody = Confidence(1.0)  # every head is asked; Never() would run none of the early ones
    routings["all last plain"], routings["all last class first"] = routed(nobody, False), routed(nobody, True)
    parts = [
        part for call in images.split(batch) for part in call.split(CPU_CHUNK if like.device.type == "cpu" else batch)
    ]
    costs = {way: exit_costs(net, size, class_first=way == "class first") for way in ("plain", "class first")}
    reached = {name: shares_of(arm(), net.num_exits) for name, arm in routings.items()}
    chunk = best_chunk(static, batch, clock_of(like.device, 1), like.device)
    alone = {}
    for name in SHARES:
        exits = routings[f"{name} plain"]().split([len(part) for part in parts])
        left = [[int((part >= k).sum()) for k in range(net.num_exits)] for part in exits]
        alone[f"{name} stages alone"] = lambda left=left: [
            _stages(net, part, n) for part, n in zip(parts, left, strict=True)
        ]
    arms = {**routings, **alone, "static": static(chunk), "control": static(chunk)}
    arms |= {"backbone, our blocks": static(chunk, net.at(-1)), "static as it comes": static(chunk, as_it_comes)}
    seconds = interleave(arms, rounds, device=str(like.device))
    result: dict[str, Any] = {
        "control": ratio(seconds["control"], seconds["static"]),
        "static_chunk": chunk,
        "our_blocks": ratio(seconds["static"], seconds["backbone, our blocks"]),
        "laid_out": ratio(seconds["static as it comes"], seconds["static"]),
        "milliseconds": {name: 1000 * percentile(taken, 0.5) / len(images) for name, taken in seconds.items()},
        "seconds": seconds,
    }
    for name in routings:
        cost = costs["class first" if name.endswith("class first") else "plain"]
        promise = cost.backbone / cost.average(reached[name])
        speedup = ratio(seconds["static"], seconds[name])
        result[name] = {
            "shares": reached[name],
            "mac_speedup": promise,
            "speedup": speedup,
            "efficiency": speedup / promise,
            "over_plain": ratio(seconds[name.replace("class first", "plain")], seconds[name]),
        }
    for name in SHARES:
        result[f"{name} plain"]["of_stages_alone"] = ratio(seconds[f"{name} stages alone"], seconds[f"{name} plain"])
    return result


def _stages(net: ExitNet, images: torch.Tensor, left: list[int]) -> None:
    """Runs each stage on so many images."""
    x = net.embed(images)
    for k, count in enumerate(left):
        if not count:
            break
        x = net.stage(k, x[:count])


def pays_from(lines: dict[int, dict[str, Any]], routing: str) -> int | None:
    """Gives the smallest batch from which on routing is faster than the static backbone at every larger one."""
    found = None
    for batch in sorted(lines, reverse=True):
        if lines[batch][routing]["speedup"] <= 1:
            break
        found = batch
    return found


def main() -> None:
    """Runs what is not done yet and prints the table."""
    parser = arguments(__doc__ or "", "latency.jsonl")
    parser.add_argument("--device", default="cpu", choices=list(CASES))
    parser.add_argument("--batches", type=int, nargs="+", help="images a call; by default those of the device")
    args = parser.parse_args()
    backbones, batches, dtype = CASES[args.device]
    device_key: dict[str, str] = {}
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device here; leave --device out")
        device_key = {"device": "cuda", "gpu": torch.cuda.get_device_name(), "type": str(dtype)}
    torch.set_num_threads(1)
    log = Log(args.out)
    table = Table(
        "backbone",
        "batch",
        "control",
        "routing",
        "shares",
        "ms an image",
        "MAC speed-up",
        "speed-up",
        "efficiency",
        "over plain",
        "of stages alone",
    )
    pays = []
    for name, options in backbones.items():
        if args.only not in name:
            continue
        backbone, net = build(**options, laid_out=args.device == "cpu")
        as_it_comes, _ = build(**options, laid_out=False)
        net.to(args.device, dtype)
        as_it_comes.to(args.device, dtype)
        lines, size = {}, int(options["img_size"])
        for batch in args.batches or batches:
            arms = "plain, class first, stages alone, as it comes"
            key = {"backbone": name, "batch": batch, "rounds": args.rounds, "arms": arms, **device_key}
            line = log.find(key) or log.add(key, **case(backbone, net, as_it_comes, batch, size, args.rounds))
            lines[batch], times = line, line["milliseconds"]
            table.add_row(name, str(batch), mark(line["control"]), "static", "", _milliseconds(times, "static"))
            ours = "backbone, our blocks"
            table.add_row("", "", "", ours, "", _milliseconds(times, ours), "1.00x", f"{line['our_blocks']:.2f}x")
            plain, slower = "static as it comes", f"{1 / line['laid_out']:.2f}x"
            table.add_row("", "", "", plain, "", _milliseconds(times, plain), "1.00x", slower)
            for routing, got in line.items():
                if isinstance(got, dict) and "efficiency" in got:
                    shares = "/".join(f"{100 * s:.0f}" for s in got["shares"])
                    factors = (f"{got[key]:.2f}x" for key in ("mac_speedup", "speedup"))
                    alone = f"{got['of_stages_alone']:.3f}" if "of_stages_alone" in got else ""
                    cells = (*factors, f"{got['efficiency']:.3f}", f"{got['over_plain']:.3f}", alone)
                    table.add_row("", "", "", routing, shares, _milliseconds(times, routing), *cells)
        for share in SHARES:
            batch = pays_from(lines, f"{share} class first")
            words = f"from batch {batch} on" if batch else "at no batch size that was run"
            pays.append(f"{name}: routing at {share} with the class token first is faster than the backbone {words}")
    Console(width=170).print(table)
    print(*pays, sep="\n")


def _milliseconds(times: dict[str, float], name: str) -> str:
    return f"{times[name]:.3f}" if name in times else ""


if __name__ == "__main__":
    main()
