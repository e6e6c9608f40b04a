"""What early exits save in time: per-sample routing against the static trunk, beside what the multiply-adds promise.

    python benchmarks/latency.py

Protocol: one thread, CPU seconds of the process, arms interleaved call by call, medians of the ratios round by round.
The static arm cuts its batch where that is faster for it. A control arm, the static one once more, runs in every round:
where its ratio leaves 1 by more than 3 %, the run is void. Per-exit thresholds on the confidence are set so that the
wanted shares leave at the four exits; weights are random, which changes nothing about the time. Efficiency is the
speed-up over the static trunk divided by the speed-up in multiply-adds. "plain" runs whole blocks; "class first"
computes the class token's row of the last block before an exit first, and has its own, smaller count.
"""

import statistics
from collections.abc import Callable

import timm
import torch
from common import Log, arguments, interleave, ratio
from rich.console import Console
from rich.table import Table

from dynadapter import Balanced, Confidence, ExitNet, Never, Policy, exit_costs
from dynadapter.policies import confidence

TRUNKS = {
    "ViT-Ti, 64 tokens": dict(name="vit_tiny_patch16_224", img_size=48, patch_size=6),
    "ViT-S/16, 224": dict(name="vit_small_patch16_224", img_size=224),
}
SHARES = {"50/30/15/5": (0.5, 0.3, 0.15, 0.05), "25/25/25/25": (0.25, 0.25, 0.25, 0.25)}
IMAGES = {1: 20, 8: 24, 64: 64}
"""Images a call by batch size: enough that the shares come out whole, or nearly."""
CHUNKS = (8, 16, 32, 64)
VOID = 0.03


def build(name: str, **options: object) -> tuple[torch.nn.Module, ExitNet]:
    """Makes a trunk and the network with four exits around it."""
    torch.manual_seed(0)
    trunk = timm.create_model(name, num_classes=10, **options).eval()
    return trunk, ExitNet(trunk, Balanced(), every=3).eval()


def thresholds(net: ExitNet, images: torch.Tensor, shares: tuple[float, ...]) -> Confidence:
    """Finds per-exit thresholds such that the shares leave (MSDNet's walk over the exits)."""
    with torch.no_grad():
        scores = confidence(torch.cat([net(part) for part in images.split(8)], dim=1))  # (exits, images)
    inside = torch.ones(len(images), dtype=torch.bool)
    found = []
    for k, share in enumerate(shares[:-1]):
        count = min(round(share * len(images)), int(inside.sum()))
        ranked = scores[k][inside].sort(descending=True).values
        found.append(float((ranked[count - 1] + ranked[min(count, len(ranked) - 1)]) / 2))
        inside &= scores[k] < found[-1]
    return Confidence(tuple(found))


def case(trunk: torch.nn.Module, net: ExitNet, batch: int, size: int, rounds: int) -> dict[str, object]:
    """Times the static trunk, the control and each routing at one batch size."""
    torch.manual_seed(1)
    images = torch.randn(IMAGES[batch], 3, size, size)

    def static(chunk: int) -> Callable[[], object]:
        return lambda: [trunk(part) for part in images.split(chunk)]

    def routed(policy: Policy, class_first: bool) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat([net.early(part, policy, class_first).exits for part in images.split(batch)])

    arms: dict[str, Callable[[], object]] = {}
    for name, share in SHARES.items():
        policy = thresholds(net, images, share)
        arms[f"{name} plain"], arms[f"{name} class first"] = routed(policy, False), routed(policy, True)
    arms["all last plain"], arms["all last class first"] = routed(Never(), False), routed(Never(), True)
    names = list(arms)
    costs = {way: exit_costs(net, size, class_first=way == "class first") for way in ("plain", "class first")}
    with torch.inference_mode():
        reached = {n: (arms[n]().bincount(minlength=net.num_exits) / len(images)).tolist() for n in names}  # type: ignore[attr-defined]
        chunks = {chunk: static(chunk) for chunk in CHUNKS if chunk < batch} | {batch: static(batch)}
        trial = interleave({str(c): arm for c, arm in chunks.items()}, 5) if len(chunks) > 1 else {str(batch): [0.0]}
        chunk = min(chunks, key=lambda c: statistics.median(trial[str(c)]))
        arms["static"], arms["control"] = static(chunk), static(chunk)
        seconds = interleave(arms, rounds)
    result: dict[str, object] = {
        "control": ratio(seconds["control"], seconds["static"]),
        "static_chunk": chunk,
        "seconds": seconds,
    }
    for name in names:
        cost = costs["class first" if name.endswith("class first") else "plain"]
        promise = cost.trunk / cost.average(reached[name])
        speedup = ratio(seconds["static"], seconds[name])
        plain = ratio(seconds[name.replace("class first", "plain")], seconds[name])
        result[name] = {
            "shares": reached[name],
            "mac_speedup": promise,
            "speedup": speedup,
            "efficiency": speedup / promise,
            "over_plain": plain,
        }
    return result


def main() -> None:
    """Runs what is not done yet and prints the table."""
    parser = arguments(__doc__ or "", "latency.jsonl")
    parser.add_argument("--batches", type=int, nargs="+", default=list(IMAGES), choices=list(IMAGES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    log = Log(args.out)
    table = Table(
        "trunk", "batch", "control", "routing", "shares", "MAC speed-up", "speed-up", "efficiency", "over plain"
    )
    for name, options in TRUNKS.items():
        if args.only not in name:
            continue
        trunk, net = build(**options)  # type: ignore[arg-type]
        for batch in args.batches:
            key = {"trunk": name, "batch": batch, "rounds": args.rounds, "arms": "plain and class first"}
            line = log.find(key) or log.add(key, **case(trunk, net, batch, int(options["img_size"]), args.rounds))
            void = " VOID" if abs(line["control"] - 1) > VOID else ""
            for routing, got in line.items():
                if isinstance(got, dict) and "efficiency" in got:
                    shares = "/".join(f"{100 * s:.0f}" for s in got["shares"])
                    factors = (f"{got[key]:.2f}x" for key in ("mac_speedup", "speedup"))
                    cells = (*factors, f"{got['efficiency']:.3f}", f"{got['over_plain']:.3f}")
                    table.add_row(name, str(batch), f"{line['control']:.3f}{void}", routing, shares, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
