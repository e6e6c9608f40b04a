"""Time per-sample routing against the static backbone, and compare the speed-up with the ratio of GMACs.

    python benchmarks/latency.py
    python benchmarks/latency.py --device cuda

Protocol: one thread, CPU seconds of the process, arms interleaved call by call, medians of the ratios round by round.
The static arm cuts its batch into the chunks that are fastest for it. A control arm, the static one again, runs in
every round; where its ratio differs from 1 by more than 3 %, the run is void. Thresholds per exit are set so that the
given shares of samples exit at the four exits. The weights are random, which does not change the time. On a CPU all
arms but "static as it comes" have their weights laid out for it (`lay_out_for_cpu`).

"efficiency" is the speed-up over the static backbone divided by the speed-up in GMACs. "plain" runs whole blocks.
"class first" computes the class token's row of the last block before an exit first, and has its own, smaller GMACs.
"our blocks" is the static backbone run block by block as ExitNet runs it. "of stages alone" compares routing with its
stages alone, run on as many images without heads, policy and gather: the best that routing could reach.

On a GPU: ViT-B/16 in bfloat16, seconds between two events on the device.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from common import (
    SHARES,
    Line,
    Log,
    Row,
    add_device,
    arguments,
    backbones,
    build,
    control,
    images_a_call,
    interleave,
    noise,
    place,
    shares_of,
    show,
    thresholds,
)
from torch import Tensor, nn

from dynadapter import Confidence, ExitNet, Policy, exit_costs
from dynadapter.bench.timing import best_chunk, clock_of, is_void, percentile, ratio
from dynadapter.exits.net import CPU_CHUNK

BATCHES = {"cpu": (1, 8, 64), "cuda": (1, 8, 64, 256)}
WAYS = ("plain", "class first")
ALL_LAST = Confidence(1.0)
"""Runs every head, and no sample exits early."""


class Nets(NamedTuple):
    """The networks of one backbone, on one device.

    ``static`` is the timm model, ``net`` the network around it, ``as_it_comes`` the same model whose weights are not
    laid out (None on a GPU), ``exact`` a float32 network on the CPU to count GMACs.
    """

    static: nn.Module
    net: ExitNet
    as_it_comes: nn.Module | None
    exact: ExitNet
    size: int


def prepare(options: dict[str, Any], device: str = "cpu", precision: str = "fp32") -> Nets:
    """Build the networks of one backbone."""
    laid_out = device == "cpu" and precision == "fp32"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    static, net = build(**options, laid_out=laid_out)
    other, exact = build(**options, laid_out=False)
    net.to(device, dtype)
    return Nets(static, net, other if laid_out else None, exact, int(options["img_size"]))


def run_static(model: nn.Module, images: Tensor, batch: int, chunk: int) -> None:
    """Run a model on whole batches, cut into chunks."""
    for part in images.split(batch):
        for piece in part.split(chunk):
            model(piece)


def run_routed(net: ExitNet, images: Tensor, batch: int, policy: Policy, class_first: bool) -> Tensor:
    """Route whole batches and return the exit indices (images,)."""
    return torch.cat([net.early(part, policy, class_first).exit_index for part in images.split(batch)])


def run_stages(net: ExitNet, parts: tuple[Tensor, ...], counts: list[list[int]]) -> None:
    """Run the stages alone, each on as many images as routing has left there."""
    for part, left in zip(parts, counts, strict=True):
        x = net.embed(part)
        for k, count in enumerate(left):
            if not count:
                break
            x = net.stage(k, x[:count])


def routings(nets: Nets, images: Tensor, batch: int) -> dict[str, Callable[[], Tensor]]:
    """Return the arms that route, by shares and way."""
    policies: dict[str, Policy] = {name: thresholds(nets.net, images, share) for name, share in SHARES.items()}
    policies["all last"] = ALL_LAST
    return {
        f"{name} {way}": partial(run_routed, nets.net, images, batch, policy, way == "class first")
        for name, policy in policies.items()
        for way in WAYS
    }


def stages_alone(nets: Nets, images: Tensor, batch: int, arms: dict[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Return the arms that run stages alone, on as many images as plain routing leaves to each."""
    chunk = CPU_CHUNK if images.device.type == "cpu" else batch
    parts = tuple(part for call in images.split(batch) for part in call.split(chunk))
    found = {}
    for name in SHARES:
        exits = arms[f"{name} plain"]().split([len(part) for part in parts])
        left = [[int((part >= k).sum()) for k in range(nets.net.num_exits)] for part in exits]
        found[f"{name} stages alone"] = partial(run_stages, nets.net, parts, left)
    return found


@torch.inference_mode()
def case(nets: Nets, batch: int, rounds: int) -> Line:
    """Time the static backbone, the control and each routing at one batch size."""
    like = next(nets.static.parameters())
    images = noise(images_a_call(batch), nets.size).to(like)
    routed = routings(nets, images, batch)

    def static(chunk: int, model: nn.Module = nets.static) -> Callable[[], None]:
        return partial(run_static, model, images, batch, chunk)

    chunk = best_chunk(static, batch, clock_of(like.device, 1), like.device)
    arms: dict[str, Callable[[], Any]] = {**routed, **stages_alone(nets, images, batch, routed)}
    arms |= {"static": static(chunk), "control": static(chunk), "our blocks": static(chunk, nets.net.at(-1))}
    if nets.as_it_comes is not None:
        arms["static as it comes"] = static(chunk, nets.as_it_comes)
    seconds = interleave(arms, rounds, device=str(like.device))
    line: Line = {
        "control": ratio(seconds["control"], seconds["static"]),
        "static_chunk": chunk,
        "milliseconds": {name: 1000 * percentile(taken, 0.5) / len(images) for name, taken in seconds.items()},
        "seconds": seconds,
        "our_blocks": ratio(seconds["static"], seconds["our blocks"]),
    }
    if nets.as_it_comes is not None:
        line["laid_out"] = ratio(seconds["static as it comes"], seconds["static"])
    costs = {way: exit_costs(nets.exact, nets.size, class_first=way == "class first") for way in WAYS}
    for name, arm in routed.items():
        way = "class first" if name.endswith("class first") else "plain"
        shares, speedup = shares_of(arm(), nets.net.num_exits), ratio(seconds["static"], seconds[name])
        promise = costs[way].static / costs[way].average_run(shares)
        line[name] = {"shares": shares, "mac_speedup": promise, "speedup": speedup, "efficiency": speedup / promise}
        line[name]["over_plain"] = ratio(seconds[name.replace("class first", "plain")], seconds[name])
    for name in SHARES:
        alone = ratio(seconds[f"{name} stages alone"], seconds[f"{name} plain"])
        line[f"{name} plain"]["of_stages_alone"] = alone
    return line


def rows(line: Line) -> list[Row]:
    """Return the table rows of a line."""
    times = line["milliseconds"]
    first: Row = {"backbone": line["key"]["backbone"], "batch": line["key"]["batch"], "control": control(line)}
    found: list[Row] = [first | {"arm": "static", "ms an image": times["static"]}]
    speeds = {"our blocks": line["our_blocks"]}
    if "laid_out" in line:
        speeds["static as it comes"] = 1 / line["laid_out"]
    found += [{"arm": name, "ms an image": times[name], "speed-up": speed} for name, speed in speeds.items()]
    for name, got in line.items():
        if isinstance(got, dict) and "efficiency" in got:
            row = {"arm": name, "shares, %": "/".join(f"{100 * share:.0f}" for share in got["shares"])}
            columns = {"GMACs speed-up": "mac_speedup", "speed-up": "speedup", "efficiency": "efficiency"}
            columns |= {"over plain": "over_plain", "of stages alone": "of_stages_alone"}
            values = {title: got.get(column) for title, column in columns.items()}
            found.append(row | {"ms an image": times[name]} | values)
    return found


def pays_from(lines: dict[int, Line], routing: str) -> int | None:
    """Return the smallest batch from which on routing is faster than static at every larger one, or None.

    Void lines do not count.
    """
    found = None
    for batch in sorted((batch for batch, line in lines.items() if not is_void(line["control"])), reverse=True):
        if lines[batch][routing]["speedup"] <= 1:
            break
        found = batch
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments(__doc__ or "", "latency.jsonl")
    add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the table."""
    args = parse(argv)
    device, log, table, notes = place(args), Log(args.out), [], []
    for name, options in backbones(args).items():
        lines, nets = {}, None
        for batch in args.batches or BATCHES[args.device]:
            key = {"backbone": name, "batch": batch, "rounds": args.rounds, **device}
            line = log.find(key)
            if line is None:
                nets = nets or prepare(options, args.device, args.precision)
                try:
                    line = log.add(key, **case(nets, batch, args.rounds))
                except torch.OutOfMemoryError:
                    notes.append(f"{name}: a batch of {batch} does not fit in the memory of the device")
                    continue
            lines[batch] = line
            table += rows(line)
        void = ", ".join(str(batch) for batch, line in lines.items() if is_void(line["control"]))
        for share in SHARES:
            first = pays_from(lines, f"{share} class first")
            words = f"from batch {first} on" if first else "at no batch size that was run"
            words += f" (void at {void})" if void else ""
            notes.append(f"{name}: routing at {share}, class first, is faster than static {words}")
    show(table)
    print(*notes, sep="\n")


if __name__ == "__main__":
    main()
