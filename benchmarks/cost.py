"""Three counts of the multiply-adds up to each exit of ten timm models, which must be the same integers.

    python benchmarks/cost.py

Protocol: 224 pixels, 100 classes, an exit after every quarter of the blocks, Balanced heads on the way, no adapters.
dynadapter.cost traces once with fvcore; torch's FlopCounterMode, halved, counts an eager run and is read at each exit;
the formulas are written by hand. Compared is what all three count exactly: products, convolutions and attention. The
light part, normalisation and pooling, is fvcore's estimate and stands beside. Shapes decide, so the weights are zeros.
It takes about 20 s on one core.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import RESULTS, machine
from rich.console import Console
from rich.table import Table

from dynadapter import ExitNet, exit_costs

# The references are the tests' own.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from cost_references import MODELS, SIDE, build, by_hand, by_torch

CLASSES = 100


def measure(name: str) -> dict[str, Any]:
    """Counts one model in the three ways."""
    architecture = MODELS[name]
    depth = len(architecture.parts(SIDE)[1])
    net = ExitNet(build(name, CLASSES), every=depth // 4)
    start = time.perf_counter()
    costs = exit_costs(net, SIDE)
    seconds = time.perf_counter() - start
    row = {
        "exits": net.exit_depths,
        "fvcore": [macs - light for macs, light in zip(costs.macs, costs.light, strict=True)],
        "torch": by_torch(net),
        "by_hand": by_hand(architecture, net.exit_depths, CLASSES),
        "light": costs.light,
        "backbone": costs.backbone,
        "trace_seconds": round(seconds, 2),
    }
    return row | {"agree": row["fvcore"] == row["torch"] == row["by_hand"]}


def lay_out(models: dict[str, dict[str, Any]]) -> Table:
    """Makes a row for each exit of each model."""
    table = Table(title=f"Multiply-adds up to each exit at {SIDE} px, heads on the way included")
    table.add_column("model")
    for title in ("after block", "fvcore", "FlopCounterMode / 2", "by hand", "agree", "with light, GMACs"):
        table.add_column(title, justify="right")
    for name, row in models.items():
        for k, block in enumerate(row["exits"]):
            counts = [row[counter][k] for counter in ("fvcore", "torch", "by_hand")]
            agree = "yes" if len(set(counts)) == 1 else "NO"
            total = f"{(row['fvcore'][k] + row['light'][k]) / 1e9:.3f}"
            table.add_row(name if k == 0 else "", str(block), *(f"{count:,}" for count in counts), agree, total)
        table.add_section()
    return table


def main() -> None:
    """Counts, prints and writes; the exit status is 1 where the counts differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json", help="the file to write")
    parser.add_argument("--only", default="", help="count only the models whose name contains this, and write nothing")
    arguments = parser.parse_args()
    models = {name: measure(name) for name in MODELS if arguments.only in name}
    Console(width=None if sys.stdout.isatty() else 130).print(lay_out(models))
    if not arguments.only:
        protocol = " ".join((__doc__ or "").partition("Protocol: ")[2].split())
        now = datetime.now(UTC).isoformat(timespec="seconds")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"protocol": protocol, "machine": machine(), "time": now, "models": models}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(row["agree"] for row in models.values()):
        raise SystemExit("the counts differ")


if __name__ == "__main__":
    main()
