"""Time torch.compile by stage against eager routing: decides whether a compiled network belongs in the product.

    python benchmarks/stage_compile.py --device cuda

Protocol as in ``latency.py``, at the shares 50/30/15/5. "compiled" compiles the parts of a stage once for any batch
size; "CUDA graphs" also records them (mode reduce-overhead; for one image alone, on a GPU). "static compiled" is the
whole static backbone, compiled for the one batch size that it gets.

The rule, fixed before any run: a compiled network returns to the product where routing by one of the two ways is at
least 1.15 times as fast as eager routing at half of the batch sizes or more, and no less than 0.95 at any.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    SHARES,
    Line,
    Log,
    Row,
    add_device,
    arguments,
    backbones,
    control,
    images_a_call,
    interleave,
    noise,
    place,
    shares_of,
    show,
    thresholds,
)
from latency import BATCHES, Nets, prepare, run_static
from torch import Tensor

from dynadapter import ExitNet, Policy
from dynadapter.bench.timing import ratio

SHARE = "50/30/15/5"
GAIN, LOSS = 1.15, 0.95
PARTS = ("embed", "begin", "complete", "head")
"""The methods of ExitNet that run layers."""
Arms = dict[str, Callable[[], Any]]
BACKENDS: dict[str, dict[str, Any]] = {"full": {}, "tiny": {"backend": "eager"}}


def compiled(net: ExitNet, **how: Any) -> ExitNet:
    """Return a network that shares its modules with ``net`` and compiles the parts of its stages."""
    again = copy.copy(net)
    for name in PARTS:
        method = getattr(type(net), name).__get__(again)
        setattr(again, name, torch.compile(method, **how))
    return again


def route(net: ExitNet, images: Tensor, batch: int, policy: Policy) -> Tensor:
    """Route whole batches and return the exit indices (images,)."""
    exits = []
    for part in images.split(batch):
        torch.compiler.cudagraph_mark_step_begin()  # recorded outputs are valid until the next batch
        exits.append(net.early(part, policy).exit_index.clone())
    return torch.cat(exits)


def compiled_ways(net: ExitNet, device: str, backend: dict[str, Any]) -> dict[str, ExitNet]:
    """Return the compiled networks by name; they compile when they first run."""
    torch._dynamo.config.recompile_limit = 64  # a stage is compiled for its own blocks
    ways = {"routing compiled": compiled(net, dynamic=True, **backend)}
    if device == "cuda":
        ways["routing CUDA graphs"] = compiled(net, dynamic=False, mode="reduce-overhead")
    return ways


def make_arms(nets: Nets, ways: dict[str, ExitNet], images: Tensor, batch: int, backend: dict[str, Any]) -> Arms:
    """Return the arms of one batch size."""
    policy = thresholds(nets.net, images, SHARES[SHARE])
    static = torch.compile(nets.static, dynamic=False, **backend)
    arms: Arms = {
        "static": partial(run_static, nets.static, images, batch, batch),
        "control": partial(run_static, nets.static, images, batch, batch),
        "static compiled": partial(run_static, static, images, batch, batch),
        "routing": partial(route, nets.net, images, batch, policy),
        "routing compiled": partial(route, ways["routing compiled"], images, batch, policy),
    }
    if batch == 1 and "routing CUDA graphs" in ways:
        arms["routing CUDA graphs"] = partial(route, ways["routing CUDA graphs"], images, batch, policy)
    return arms


@torch.inference_mode()
def case(nets: Nets, ways: dict[str, ExitNet], batch: int, rounds: int, backend: dict[str, Any]) -> Line:
    """Time eager and compiled routing and the static backbone at one batch size."""
    like = next(nets.static.parameters())
    images = noise(images_a_call(batch), nets.size).to(like)
    arms = make_arms(nets, ways, images, batch, backend)
    notes, shares = [], {}
    for name in list(arms):
        try:
            exits = arms[name]()  # compiles
        except Exception as error:  # the compiler fails in many ways
            if name in ("static", "control", "routing"):
                raise
            notes.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
            del arms[name]
            continue
        if isinstance(exits, Tensor):
            shares[name] = shares_of(exits, nets.net.num_exits)
    seconds = interleave(arms, rounds, device=str(like.device))
    speeds = {name: ratio(seconds["static"], seconds[name]) for name in arms if name not in ("static", "control")}
    over = {name: ratio(seconds["routing"], seconds[name]) for name in arms if name.startswith("routing ")}
    same = ratio(seconds["control"], seconds["static"])
    return {
        "control": same,
        "speedup": speeds,
        "over_eager": over,
        "shares": shares,
        "notes": notes,
        "seconds": seconds,
    }


def rows(line: Line) -> list[Row]:
    """Return the table rows of a line."""
    first: Row = {"backbone": line["key"]["backbone"], "batch": line["key"]["batch"], "control": control(line)}
    found = []
    for arm, speed in line["speedup"].items():
        shares = "/".join(f"{100 * share:.0f}" for share in line["shares"].get(arm, ()))
        row = {"arm": arm, "shares, %": shares, "over static": speed, "over eager routing": line["over_eager"].get(arm)}
        found.append(row)
    return [first | found[0], *found[1:]]


def routes_alike(line: Line, way: str) -> bool:
    """Check whether a way of compiling stops the same shares of images as eager routing; else it runs other stages."""
    return way in line["over_eager"] and line["shares"].get(way) == line["shares"].get("routing")


def verdict(lines: list[Line]) -> str:
    """Return whether a compiled network belongs in the product, by the rule above."""
    ways = sorted({way for line in lines for way in line["over_eager"]})
    for way in ways:
        gains = [line["over_eager"][way] for line in lines if routes_alike(line, way)]
        if gains and 2 * sum(gain >= GAIN for gain in gains) >= len(lines) and min(gains) >= LOSS:
            return f"{way} passes: {', '.join(f'{gain:.2f}' for gain in gains)} times as fast as eager routing"
    return f"no way of compiling passes {GAIN} times eager routing at half of the batch sizes"


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the table and the verdict."""
    parser = arguments(__doc__ or "", "stage_compile.jsonl")
    add_device(parser)
    args = parser.parse_args(argv)
    device, log, lines = place(args), Log(args.out), []
    for name, options in backbones(args).items():
        backend = BACKENDS["tiny" if args.tiny else "full"]
        nets: Nets | None = None
        ways: dict[str, ExitNet] = {}
        for batch in args.batches or BATCHES[args.device]:
            key = {"backbone": name, "batch": batch, "rounds": args.rounds, **device}
            line = log.find(key)
            if line is None:
                nets = nets or prepare(options, args.device, args.precision)
                ways = ways or compiled_ways(nets.net, args.device, backend)
                line = log.add(key, **case(nets, ways, batch, args.rounds, backend))
            lines.append(line)
    show([row for line in lines for row in rows(line)])
    print(*dict.fromkeys(note for line in lines for note in line["notes"]), verdict(lines), sep="\n")


if __name__ == "__main__":
    main()
