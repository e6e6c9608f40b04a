"""Time token merging against the static backbone with every token, and compare the speed-up with the ratio of GMACs.

    python benchmarks/token_merging.py

Protocol as in ``latency.py``: one thread, CPU seconds of the process, arms interleaved call by call, medians of the
ratios round by round, void where the control differs from 1 by more than 3 %; random weights. "efficiency" is the
speed-up over the static backbone divided by the speed-up in GMACs. "of dropping" is the time of a backbone that drops
as many tokens at the same places without choosing them, divided by the time of token merging: 1 means that choosing and
averaging cost nothing. "routed" has four exits as well, at the shares 50/30/15/5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from common import (
    SHARES,
    Line,
    Log,
    Row,
    arguments,
    backbones,
    control,
    images_a_call,
    interleave,
    noise,
    shares_of,
    show,
    thresholds,
)
from latency import run_static
from torch import Tensor

from dynadapter import ExitNet, LinearHeads, TokenMerging, create_backbone, exit_costs
from dynadapter.bench.timing import best_chunk, ratio

BATCHES = (1, 8, 64)
MERGINGS = (TokenMerging(after=(1, 4), share=0.4), TokenMerging())
"""Two large steps, and four small ones that leave as many tokens."""


@dataclass(frozen=True)
class Dropping(TokenMerging):
    """Keep as many tokens as token merging does, the first ones."""

    def __call__(self, x: Tensor, prefix: int, logs: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x[:, : x.shape[1] - int(self.share * (x.shape[1] - prefix))].contiguous(), None


@torch.inference_mode()
def case(options: dict[str, Any], merging: TokenMerging, batch: int, rounds: int) -> Line:
    """Time one backbone at one batch size."""
    backbone: Any = create_backbone(num_classes=10, **options)
    kinds = {"static": None, "merged": merging, "dropped": Dropping(merging.after, merging.share)}
    nets = {
        name: ExitNet(backbone, LinearHeads(), exit_depths=[], token_merging=kind).eval()
        for name, kind in kinds.items()
    }
    torch.manual_seed(0)
    routed = ExitNet(backbone, LinearHeads(), every=max(len(backbone.blocks) // 4, 1), token_merging=merging).eval()
    images = noise(images_a_call(batch), int(options["img_size"]))
    policy = thresholds(routed, images, SHARES["50/30/15/5"])

    def route() -> Tensor:
        return torch.cat([routed.early(part, policy).exit_index for part in images.split(batch)])

    arms: dict[str, Callable[[], Any]] = {"routed": route}
    for name, net in nets.items():
        chunk = best_chunk(lambda n, net=net: partial(run_static, net, images, batch, n), batch)
        arms[name] = partial(run_static, net, images, batch, chunk)
    seconds = interleave(arms | {"control": arms["static"]}, rounds)
    costs = exit_costs(routed, class_first=routed.prefers_class_first(routed.embed(images[:batch])))
    average = costs.average_run(shares_of(route(), routed.num_exits))
    promise = {"merged": costs.static / exit_costs(nets["merged"]).macs[-1], "routed": costs.static / average}
    speedups = {name: ratio(seconds["static"], seconds[name]) for name in promise}
    return {
        "control": ratio(seconds["control"], seconds["static"]),
        "mac_speedup": promise,
        "speedup": speedups,
        "efficiency": {name: speedups[name] / promise[name] for name in promise},
        "of_dropping": ratio(seconds["dropped"], seconds["merged"]),
    }


def rows(line: Line) -> list[Row]:
    """Return the table rows of a line."""
    first: Row = {name: line["key"][name] for name in ("backbone", "batch", "token_merging")}
    found = []
    for arm in line["speedup"]:
        row: Row = {"arm": arm, "GMACs speed-up": line["mac_speedup"][arm], "speed-up": line["speedup"][arm]}
        row |= {"efficiency": line["efficiency"][arm]}
        found.append(row | ({"of dropping": line["of_dropping"]} if arm == "merged" else {}))
    return [first | {"control": control(line)} | found[0], *found[1:]]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the table."""
    args = arguments(__doc__ or "", "token_merging.jsonl").parse_args(argv)
    args.device = "cpu"
    torch.set_num_threads(1)
    log, table = Log(args.out), []
    batches = (2,) if args.tiny else BATCHES
    mergings = (TokenMerging(after=(1, 2), share=0.3),) if args.tiny else MERGINGS
    for (name, options), batch, merging in product(backbones(args).items(), batches, mergings):
        key = {"backbone": name, "batch": batch, "rounds": args.rounds, "token_merging": str(merging)}
        table += rows(log.find(key) or log.add(key, **case(options, merging, batch, args.rounds)))
    show(table)


if __name__ == "__main__":
    main()
