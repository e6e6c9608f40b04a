"""Train three arms of the accuracy table on one backbone and one GPU by transfer.py: part `tasks` of gpu.sh.

    python benchmarks/gpu_tasks.py --data TASKS --weights small.safetensors --out runs/gpu_tasks_small

The JSON file that tools/pretrain writes beside the weights says how the backbone is built. Scales, seeds, goals and
epochs are those of ``transfer.yaml``, so ``report.py --claims`` judges the lines once they lie in ``results/``. A set
of fresh tasks that is read alone (``margins.py``) gets a sweep of its own, the other tasks share one. The same command
continues an interrupted sweep.
"""

import argparse
import json
from pathlib import Path

import fresh
import margins
import transfer
import yaml

RECIPES = ("static", "static, tokens merged", "dynamic")


def main(argv: list[str] | None = None) -> None:
    """Run the sweeps one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds the tasks, in the layout of VTAB-1k"
    )
    parser.add_argument("--weights", type=Path, required=True, help="NAME.safetensors, with NAME.json beside it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweeps and their tables")
    parser.add_argument("--processes", type=int, default=8, help="processes that share the GPU (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="one scale, one seed and one epoch, to try the program")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    backbone = args.out / f"{args.weights.stem}.yaml"
    backbone.write_text(yaml.safe_dump(settings(args.weights, args.tiny), sort_keys=False), encoding="utf-8")
    options = ["--data", str(args.data), "--backbone", str(backbone), "--adapters", "lora", "--recipes", *RECIPES]
    options += ["--results", str(args.out), "--processes", str(args.processes)] + ["--tiny"] * args.tiny
    for name, tasks in sweeps({path.parent.name for path in args.data.glob("*/train800.txt")}).items():
        transfer.main([*options, *tasks, "--out", str(args.out / name)])


def settings(weights: Path, tiny: bool) -> dict[str, dict]:
    """Return the settings of a backbone, from the JSON file beside its weights."""
    about = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    shape = {key: value for key, value in about["timm_args"].items() if key != "img_size"}
    model = {"backbone": about["architecture"], "pretrained": False, "weights": str(weights), "backbone_args": shape}
    data = {"image_size": about["timm_args"]["img_size"], "normalization": about["preprocess"]["normalization"]}
    return {
        "model": model | {"every": max(shape.get("depth", 12) // 4, 1)},
        "data": {"init_args": data | ({"batch_size": 8} if tiny else {})},
    }


def sweeps(names: set[str]) -> dict[str, list[str]]:
    """Return the options of transfer.py for each sweep over these tasks, by the folder of the sweep."""
    found = {}
    for own in margins.OWN_SWEEPS:
        if names >= set(margins.SETS[own]):
            found[own] = ["--fresh", own]
        names = names - set(margins.SETS[own])
    drawn = sorted(names & fresh.tasks().keys())
    if names:
        found["transfer"] = ["--tasks", *sorted(names - set(drawn)), "--fresh", *drawn]
    return found


if __name__ == "__main__":
    main()
