"""Count the MACs up to each exit of ten timm models in three ways, which must give the same integers.

    python benchmarks/cost.py

Protocol: 224 pixels, 100 classes, an exit after every quarter of the blocks, Balanced heads, no adapters.
dynadapter.cost traces once with fvcore; torch's FlopCounterMode, halved (1 MAC = 2 FLOPs), counts an eager run and is
read at each exit; the formulas are written by hand. The three are compared on what they all count: products,
convolutions and attention. The light part, normalisation and pooling, is fvcore's estimate and is listed beside. The
counts depend on shapes alone, so the weights are zeros. It takes about 20 s on one core.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import RESULTS, Line, Row, show

from dynadapter import Balanced, ExitNet, exit_costs
from dynadapter.bench.timing import machine

# The references are the tests' own
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from cost_references import MODELS, SIDE, build, by_hand, by_torch

CLASSES = 100
COUNTERS = ("fvcore", "torch", "by_hand")


def measure(name: str) -> dict[str, Any]:
    """Count one model in the three ways."""
    architecture = MODELS[name]
    depth = len(architecture.parts(SIDE)[1])
    net = ExitNet(build(name, CLASSES), Balanced(), every=depth // 4)
    start = time.perf_counter()
    costs = exit_costs(net, SIDE)
    seconds = time.perf_counter() - start
    found = {
        "exit_depths": net.exit_depths,
        "fvcore": [macs - light for macs, light in zip(costs.macs, costs.light, strict=True)],
        "torch": by_torch(net),
        "by_hand": by_hand(architecture, net.exit_depths, CLASSES),
        "light": costs.light,
        "static": costs.static,
        "trace_seconds": round(seconds, 2),
    }
    return found | {"agree": found["fvcore"] == found["torch"] == found["by_hand"]}


def rows(result: Line) -> list[Row]:
    """Return a table row for each exit of each model."""
    found = []
    for name, model in result["models"].items():
        for k, depth in enumerate(model["exit_depths"]):
            counts = {counter: model[counter][k] for counter in COUNTERS}
            row: Row = {"model": "" if k else name, "after block": depth}
            row |= {counter: f"{count:,}" for counter, count in counts.items()}
            row["agree"] = "yes" if len(set(counts.values())) == 1 else "NO"
            found.append(row | {"with light, GMACs": (model["fvcore"][k] + model["light"][k]) / 1e9})
    return found


def main(argv: list[str] | None = None) -> None:
    """Count, print and write; the exit status is 1 where the counts differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json", help="the file to write")
    parser.add_argument("--only", default="", help="count only the models whose name contains this, and write nothing")
    args = parser.parse_args(argv)
    models = {name: measure(name) for name in MODELS if args.only in name}
    result = {"machine": machine(), "time": datetime.now(UTC).isoformat(timespec="seconds"), "models": models}
    show(rows(result))
    if not args.only:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(model["agree"] for model in models.values()):
        raise SystemExit("the counts differ")


if __name__ == "__main__":
    main()
