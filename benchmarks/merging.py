"""What token merging saves in time, beside what the multiply-adds promise.

    python benchmarks/merging.py

Protocol as in ``latency.py``: one thread, CPU seconds of the process, arms interleaved call by call, medians of the
ratios round by round, void where the control leaves 1 by more than 3 %; random weights. The backbone with every token
is the rival; each static arm cuts its batch where that is faster for it. Efficiency is the speed-up over it divided by
the speed-up in multiply-adds. "of dropping" is the time of a backbone that at the same places drops as many tokens
without a look at them, over that of token_merging: what is left to 1 is what the merging itself costs. "routed" has
four exits, too, at the shares 50/30/15/5, and takes the class token's row first where ExitNet does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from common import BACKBONES, SHARES, Log, arguments, best_chunk, images_a_call, interleave, mark, ratio, thresholds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynadapter import ExitNet, LinearHeads, TokenMerging, create_backbone, exit_costs
from dynadapter.bench.timing import clock_of

BATCHES = (1, 8, 64)
MERGINGS = (TokenMerging(after=(1, 4), share=0.4), TokenMerging())
"""In two large steps, and as many tokens in four small ones."""


@dataclass(frozen=True)
class Dropping(TokenMerging):
    """Leaves as many tokens, the first ones."""

    def __call__(self, x: Tensor, prefix: int, logs: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x[:, : x.shape[1] - int(self.share * (x.shape[1] - prefix))].contiguous(), None


@torch.inference_mode()
def case(options: dict[str, Any], token_merging: TokenMerging, batch: int, rounds: int) -> dict[str, Any]:
    """Times one backbone at one batch size."""
    backbone = create_backbone(num_classes=10, **options)
    kinds = {"backbone": None, "merged": token_merging, "dropped": Dropping(token_merging.after, token_merging.share)}
    nets = {
        name: ExitNet(backbone, LinearHeads(), exit_depths=[], token_merging=kind).eval()
        for name, kind in kinds.items()
    }
    torch.manual_seed(0)
    routed = ExitNet(backbone, LinearHeads(), every=len(backbone.blocks) // 4, token_merging=token_merging).eval()
    images = torch.randn(images_a_call(batch), 3, options["img_size"], options["img_size"])
    policy = thresholds(routed, images, SHARES["50/30/15/5"])

    def static(net: ExitNet, chunk: int) -> None:
        for part in images.split(chunk if chunk < batch else batch):
            net(part)

    def route() -> None:
        for part in images.split(batch):
            routed.early(part, policy)

    clock = clock_of(images.device, threads=1)
    arms: dict[str, Callable[[], None]] = {"routed": route}
    for name, net in nets.items():
        chunk = best_chunk(lambda n, net=net: partial(static, net, n), batch, clock, images.device)
        arms[name] = partial(static, net, chunk)
    times = interleave(arms | {"control": arms["backbone"]}, rounds)
    costs = exit_costs(routed, class_first=routed.prefers_class_first(routed.embed(images[:batch])))
    exits = torch.cat([routed.early(part, policy).exit_index for part in images.split(batch)])
    average = costs.average((exits.bincount(minlength=routed.num_exits).double() / len(exits)).tolist())
    fewer = {"merged": costs.backbone / exit_costs(nets["merged"]).macs[-1], "routed": costs.backbone / average}
    speedups = {name: ratio(times["backbone"], times[name]) for name in fewer}
    return {
        "control": ratio(times["control"], times["backbone"]),
        "mac_speedup": fewer,
        "speedup": speedups,
        "efficiency": {name: speedups[name] / fewer[name] for name in fewer},
        "of_dropping": ratio(times["dropped"], times["merged"]),
    }


def main() -> None:
    """Runs what is not done yet and prints the table."""
    args = arguments(__doc__ or "", "merging.jsonl").parse_args()
    torch.set_num_threads(1)
    log = Log(args.out)
    table = Table(
        "backbone", "batch", "merged after", "control", "arm", "MAC speed-up", "speed-up", "efficiency", "of dropping"
    )
    names = [name for name in BACKBONES if args.only in name]
    for name, batch, merging in product(names, BATCHES, MERGINGS):
        key = {"backbone": name, "batch": batch, "rounds": args.rounds, "token_merging": str(merging)}
        line = log.find(key) or log.add(key, **case(BACKBONES[name], merging, batch, args.rounds))
        for arm in line["speedup"]:
            cells = (f"{line[column][arm]:.2f}x" for column in ("mac_speedup", "speedup"))
            dropping = f"{line['of_dropping']:.3f}" if arm == "merged" else ""
            table.add_row(
                name,
                str(batch),
                ", ".join(map(str, merging.after)),
                mark(line["control"]),
                arm,
                *cells,
                f"{line['efficiency'][arm]:.3f}",
                dropping,
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
