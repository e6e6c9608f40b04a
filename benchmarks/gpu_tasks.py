"""Train three arms of the accuracy table on one backbone and one GPU by ``dynadapter sweep``: part `tasks` of gpu.sh.

    python benchmarks/gpu_tasks.py --data TASKS --weights small.safetensors --out runs/gpu_tasks_small

The JSON file that tools/pretrain writes beside the weights says how the backbone is built. The same command continues
an interrupted sweep.
"""

import argparse
import json
from pathlib import Path

import yaml

from dynadapter.cli import main as dynadapter

RECIPES = {
    "static": ["vtab", "static"],
    "static, tokens merged": ["vtab", "token_merging", "static"],
    "dynamic": ["vtab"],
}


def main(argv: list[str] | None = None) -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that holds the tasks, in the layout of VTAB-1k"
    )
    parser.add_argument("--weights", type=Path, required=True, help="NAME.safetensors, with NAME.json beside it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--processes", type=int, default=4, help="processes that share the GPU (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="one scale, one seed and one epoch, to try the program")
    args = parser.parse_args(argv)
    about = json.loads(args.weights.with_suffix(".json").read_text(encoding="utf-8"))
    shape = {key: value for key, value in about["timm_args"].items() if key != "img_size"}
    depth = shape.get("depth", 12)
    model = {"backbone": about["architecture"], "pretrained": False, "weights": str(args.weights.absolute())}
    data = {"image_size": about["timm_args"]["img_size"], "normalization": about["preprocess"]["normalization"]}
    sweep = {
        "root": str(args.data),
        "tasks": sorted(path.parent.name for path in args.data.glob("*/train800.txt")),
        "recipes": RECIPES,
        "adapters": ["lora"],
        "scales": [10] if args.tiny else [1, 10, 30],
        "seeds": [0] if args.tiny else [0, 1, 2],
        "search_seeds": [0],
        "goal": {"cost": 0.5},
        "settings": {
            "model": {**model, "backbone_args": shape, "every": max(depth // 4, 1)},
            "data": {"init_args": data | ({"batch_size": 8} if args.tiny else {})},
            "trainer": {"max_epochs": 1 if args.tiny else 24},
        },
        "out": str(args.out),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    dynadapter(["sweep", str(file), "--processes", str(args.processes)])


if __name__ == "__main__":
    main()
