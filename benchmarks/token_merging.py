"""Time token merging against the static backbone with every token, and compare the speed-up with the ratio of GMACs.

    python benchmarks/token_merging.py

Protocol as in ``latency.py``: one thread, CPU seconds of the process, arms interleaved call by call, medians of the
ratios round by round, void where the control differs from 1 by more than 3 %; random weights. "efficiency" is the
speed-up over the static backbone, by torch or by ONNX Runtime as the arm, divided by the speed-up in GMACs. "dropped"
drops as many tokens at the same places without choosing them, so its efficiency is the limit for any way of merging.
"routed" has four exits as well, at the shares 50/30/15/5.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
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
from torch import Tensor

from dynadapter import ExitNet, LinearHeads, Never, TokenMerging, create_backbone, exit_costs
from dynadapter.bench.timing import best_chunk, ratio
from dynadapter.images.preprocess import Preprocess
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Runner

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
    size = int(options["img_size"])
    backbone: Any = create_backbone(num_classes=10, **options)
    kinds = {"static": None, "merged": merging, "dropped": Dropping(merging.after, merging.share)}
    nets = {
        name: ExitNet(backbone, LinearHeads(), exit_depths=[], token_merging=kind).eval()
        for name, kind in kinds.items()
    }
    torch.manual_seed(0)
    routed = ExitNet(backbone, LinearHeads(), every=max(len(backbone.blocks) // 4, 1), token_merging=merging).eval()
    images = noise(images_a_call(batch), size)
    policy = thresholds(routed, images, SHARES["50/30/15/5"])

    def route() -> Tensor:
        return torch.cat([routed.early(part, policy).exit_index for part in images.split(batch)])

    with tempfile.TemporaryDirectory() as place:
        graphs = {f"{name}, ONNX Runtime": one_graph(net, size, Path(place, name)) for name, net in nets.items()}
    arms: dict[str, Callable[[], Any]] = {"routed": route}
    for name, model in (nets | graphs).items():
        inputs = images if name in nets else images.numpy()
        chunk = best_chunk(lambda n, model=model, inputs=inputs: partial(run, model, inputs, batch, n), batch)
        arms[name] = partial(run, model, inputs, batch, chunk)
    seconds = interleave(arms | {"control": arms["static"]}, rounds)
    costs = exit_costs(routed, class_first=routed.prefers_class_first(routed.embed(images[:batch])))
    fewer = costs.static / exit_costs(nets["merged"]).macs[-1]
    promise = {"routed": costs.static / costs.average_run(shares_of(route(), routed.num_exits))}
    promise |= {name: fewer for name in arms if name.startswith(("merged", "dropped"))}
    base = {name: name.replace("merged", "static").replace("dropped", "static") for name in promise} | {
        "routed": "static"
    }
    speedups = {name: ratio(seconds[base[name]], seconds[name]) for name in promise}
    return {
        "control": ratio(seconds["control"], seconds["static"]),
        "mac_speedup": promise,
        "speedup": speedups,
        "efficiency": {name: speedups[name] / promise[name] for name in promise},
    }


def one_graph(net: ExitNet, size: int, folder: Path) -> Callable[[Any], Any]:
    """Return a network as one graph of ONNX Runtime."""
    names = [str(k) for k in range(net.num_classes)]
    export_onnx(net, folder, policy=Never(), class_names=names, preprocess=Preprocess(size), class_first=False)
    runner = Runner(folder, threads=1).load()
    return lambda images: runner.stage(0, [images])


def run(model: Callable[[Any], Any], images: Any, batch: int, chunk: int) -> None:
    """Run a model on whole batches, cut into chunks."""
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        for first in range(0, len(part), chunk):
            model(part[first : first + chunk])


def rows(line: Line) -> list[Row]:
    """Return the table rows of a line."""
    first: Row = {name: line["key"][name] for name in ("backbone", "batch", "token_merging")}
    found: list[Row] = [
        {
            "arm": arm,
            "GMACs speed-up": line["mac_speedup"][arm],
            "speed-up": speedup,
            "efficiency": line["efficiency"][arm],
        }
        for arm, speedup in line["speedup"].items()
    ]
    return [first | {"control": control(line)} | found[0], *found[1:]]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the table."""
    parser = arguments(__doc__ or "", "token_merging.jsonl")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    args = parser.parse_args(argv)
    args.device = "cpu"
    torch.set_num_threads(1)
    log, table = Log(args.out), []
    batches = [2] if args.tiny else args.batches
    mergings = (TokenMerging(after=(1, 2), share=0.3),) if args.tiny else MERGINGS
    for (name, options), batch, merging in product(backbones(args).items(), batches, mergings):
        key = {"backbone": name, "batch": batch, "rounds": args.rounds, "token_merging": str(merging)}
        table += rows(log.find(key) or log.add(key, **case(options, merging, batch, args.rounds)))
    show(table)


if __name__ == "__main__":
    main()
