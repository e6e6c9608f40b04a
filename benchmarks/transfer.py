"""Measure accuracy on six tasks with ``dynadapter sweep``, and keep its lines and tables in ``results/transfer.*``.

    python benchmarks/transfer.py --data TASKS --processes 2

``transfer.yaml`` names tasks, recipes, adapters, scales and seeds. Scale and thresholds are chosen on val200 with a
network trained on train800; the final network is trained on train800val200 and measured on the test images once. The
same command continues an interrupted sweep. ``--tiny`` tries two tasks for one epoch and keeps nothing. Further
arguments, such as ``--dry_run`` or ``--engine ray``, go to ``dynadapter sweep``.
"""

import argparse
import shutil
from pathlib import Path

import yaml

from dynadapter.cli import main as dynadapter

HERE = Path(__file__).parent
KEPT = {
    "results.jsonl": "transfer.jsonl",
    "table.md": "transfer.md",
    "table.csv": "transfer.csv",
    "table.png": "transfer.png",
}


def main(argv: list[str] | None = None) -> None:
    """Run the sweep and keep its lines and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds the tasks, in the layout of VTAB-1k")
    parser.add_argument("--tasks", nargs="+", help="by default those of transfer.yaml")
    parser.add_argument("--out", default="runs/transfer", help="folder of the sweep")
    parser.add_argument(
        "--tiny", action="store_true", help="two tasks and recipes, LoRA, one scale, one seed, one epoch"
    )
    args, others = parser.parse_known_args(argv)
    sweep = yaml.safe_load((HERE / "transfer.yaml").read_text(encoding="utf-8"))
    names = args.tasks or list(sweep["tasks"])[: 2 if args.tiny else None]
    sweep |= {"root": args.data, "out": args.out, "tasks": {name: sweep["tasks"].get(name) for name in names}}
    if args.tiny:
        sweep |= {"adapters": ["lora"], "scales": [10], "seeds": [0]}
        sweep["recipes"] = {name: sweep["recipes"][name] for name in ("dynamic", "static")}
        sweep["settings"]["trainer"]["max_epochs"] = 1
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "transfer.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    dynadapter(["sweep", str(file), *others])
    if not args.tiny and "--dry_run" not in others:
        for name in KEPT:
            shutil.copy(out / name, HERE / "results" / f"transfer{Path(name).suffix}")


if __name__ == "__main__":
    main()
