"""What 8 bits change: answers, size and time of exported stages in int8 beside those in float32, on tasks.

    python benchmarks/quantised.py --data TASKS

``--data`` holds tasks in the layout of VTAB-1k. For each task and kind of adapter a network learns from train800, as
``transfer.py`` trains it by its default recipe. The product's own export then writes it twice, in float32 and in int8,
and its runner answers for val200 from both folders; test is not read. Of the log's values:

- ``exit_accuracy`` and ``same_class`` are those of every exit, 16 images a batch.
- ``routed`` is real routing, with a threshold for 35 % of the cost that was set on the other half of val200: on
  float32's logits for both folders, and on int8's own ("int8, own threshold").
- ``same_alone``: an 8-bit scale is found anew for each batch, so an answer may depend on the images beside it. This is
  the share whose routed class stays where each image is asked alone.
- ``times``: as in ``latency.py``, one thread, CPU seconds, arms interleaved call by call, medians of the ratios round
  by round, with a control arm; "whole" runs every stage for all images, "routed" lets them leave.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import IMAGES, Log, arguments, interleave, mark, ratio
from learning import BackboneFile, Fit, Protocol, Task, build, normalized
from outcomes import exit_accuracy
from recipes import DEFAULT, METHODS, recipe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dynadapter import Confidence, ExitCosts, exit_costs
from dynadapter.calibrate import split_halves, to_cost
from dynadapter.exits.policies import Policy
from dynadapter.serve.export import export_onnx
from dynadapter.serve.runtime import Policy as RunnerPolicy
from dynadapter.serve.runtime import Runner

BACKBONE = Path(__file__).parents[1] / "src" / "dynadapter" / "backbones" / "weights" / "micro.json"
BATCH = 16
BATCHES = (1, 8, 64)
"""Images a call, for time."""
BUDGET = 0.35
"""Average cost that thresholds are set for, as a share of the whole network's with every token."""
KINDS = ("float32", "int8")


def ask(runner: Runner, policy: Policy) -> Runner:
    """Lets a runner route by a policy."""
    settings = {"kind": type(policy).__name__, **dataclasses.asdict(policy)}
    runner.policy = RunnerPolicy(settings, runner.num_exits)
    return runner


def every_exit(runner: Runner, images: np.ndarray) -> Tensor:
    """Runs all stages on all images: (exits, images, classes)."""
    parts = [runner.every_exit(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return torch.from_numpy(np.concatenate(parts, axis=1))


def routed(runner: Runner, images: np.ndarray, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Routes images: the classes of their answers and the exits that gave them, both (images,)."""
    parts = [runner.route(images[start : start + batch]) for start in range(0, len(images), batch)]
    logits, exits = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return logits.argmax(-1), exits


def thresholds(logits: Tensor, targets: Tensor, costs: ExitCosts) -> Policy:
    """Sets one threshold on the confidence for the budget."""
    return to_cost(logits, targets, costs.macs, BUDGET, kind=Confidence, full=costs.backbone).policy


def answers(runners: dict[str, Runner], images: np.ndarray, targets: Tensor, costs: ExitCosts) -> dict[str, Any]:
    """Compares what both folders say of the same images."""
    logits = {kind: every_exit(runner, images) for kind, runner in runners.items()}
    classes = {kind: one.argmax(-1) for kind, one in logits.items()}
    arms = {"float32": ("float32", "float32"), "int8": ("int8", "float32"), "int8, own threshold": ("int8", "int8")}
    found: dict[str, list[Tensor]] = {arm: [] for arm in arms}
    alone, seen = [], []
    halves = split_halves(len(targets), targets=targets)
    for chosen, held_out in (halves, halves[::-1]):
        there = images[held_out.numpy()]
        for arm, (kind, source) in arms.items():
            policy = thresholds(logits[source][:, chosen], targets[chosen], costs)
            found[arm].append(torch.stack(routed(ask(runners[kind], policy), there)))
            if arm == "int8":
                alone.append(routed(runners[kind], there, 1)[0])
        seen.append(targets[held_out])
    wanted, joined = torch.cat(seen), {arm: torch.cat(parts, 1) for arm, parts in found.items()}
    result: dict[str, Any] = {
        "samples": len(targets),
        "exit_accuracy": {kind: exit_accuracy(one, targets) for kind, one in logits.items()},
        "same_class": (classes["int8"] == classes["float32"]).double().mean(1).tolist(),
        "mean_logit_difference": (logits["int8"] - logits["float32"]).abs().mean((1, 2)).tolist(),
        "mean_logit": logits["float32"].abs().mean((1, 2)).tolist(),
        "same_alone": (torch.cat(alone) == joined["int8"][0]).double().mean().item(),
        "routed": {},
    }
    for arm, (answered, exits) in joined.items():
        shares = (exits.bincount(minlength=len(costs.macs)).double() / len(exits)).tolist()
        result["routed"][arm] = {
            "accuracy": (answered == wanted).double().mean().item(),
            "cost": costs.average(shares) / costs.backbone,
            "shares": shares,
            "same_class": (answered == joined["float32"][0]).double().mean().item(),
            "same_exit": (exits == joined["float32"][1]).double().mean().item(),
        }
    return result


def times(runners: dict[str, Runner], images: np.ndarray, batch: int, rounds: int) -> dict[str, Any]:
    """Times both folders at one batch size, with the policies that they have."""
    calls = [images[start : start + batch] for start in range(0, batch * -(-IMAGES // batch), batch)]

    def over(run: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
        return lambda: [run(call) for call in calls]

    arms = {f"{kind}, whole": over(runner.every_exit) for kind, runner in runners.items()}
    arms |= {f"{kind}, routed": over(runner.route) for kind, runner in runners.items()}
    arms["control"] = arms["float32, whole"]
    seconds = interleave(arms, rounds)
    return {
        "control": ratio(seconds["control"], seconds["float32, whole"]),
        "int8_over_float32": {
            way: ratio(seconds[f"int8, {way}"], seconds[f"float32, {way}"]) for way in ("whole", "routed")
        },
        "seconds": seconds,
    }


def case(args: argparse.Namespace, backbone: BackboneFile, task: Task, method: str) -> dict[str, Any]:
    """Trains one network, exports it twice and compares."""
    how, device = recipe(args.recipe), torch.device("cpu")
    net = build(backbone, task.classes, method, how, args.scale, seed=0)
    split = task.split("train800")
    images = normalized(split, backbone.preprocess, device)
    Fit(net, how, images, split.targets, Protocol(args.epochs, args.batch), seed=0).run()
    split, costs = task.split("val200"), exit_costs(net)
    shown, targets = normalized(split, backbone.preprocess, device), split.targets
    with torch.no_grad():
        logits = torch.cat([net(part) for part in shown.split(BATCH)], 1)
    policy = thresholds(logits, targets, costs)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"class_names": [str(k) for k in range(task.classes)], "policy": policy}
        common |= {"preprocessing": dataclasses.asdict(backbone.preprocess), "check_images": shown}
        places = {kind: Path(folder) / kind for kind in KINDS}
        manifests = {kind: export_onnx(net, place, int8=kind == "int8", **common) for kind, place in places.items()}
        runners = {kind: Runner(place, threads=1).load() for kind, place in places.items()}
        result = answers(runners, shown.numpy(), targets, costs)
        for runner in runners.values():
            ask(runner, policy)
        result["times"] = {str(batch): times(runners, shown.numpy(), batch, args.rounds) for batch in BATCHES}
    sizes = {kind: sum(stage["bytes"] for stage in made["stages"]) for kind, made in manifests.items()}
    return {"bytes": sizes, "products": manifests["int8"]["quantization"]["products"], **result}


def main(argv: list[str] | None = None) -> None:
    """Runs what is not done yet and prints the tables."""
    parser = arguments(__doc__ or "", "quantised.jsonl")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", required=True, help="folder that holds the tasks")
    parser.add_argument("--backbone", default=str(BACKBONE), help="NAME.json of the pre-trained backbone")
    parser.add_argument("--tasks", nargs="+", help="by default all in --data")
    kinds = [method for method, kind in METHODS.items() if kind]
    parser.add_argument("--methods", nargs="+", default=["lora", "repadapter"], choices=kinds, help="kinds of adapters")
    parser.add_argument("--recipe", default=DEFAULT, help="of the training, by its name in recipes.py")
    parser.add_argument("--scale", type=float, default=10.0, help="of the adapters; the search chose it for all tasks")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    log, backbone = Log(args.out), BackboneFile.read(args.backbone)
    names = args.tasks or sorted(path.name for path in Path(args.data).iterdir() if (path / "val200.txt").is_file())
    lines = []
    for name in names:
        for method in args.methods:
            if args.only not in f"{name} {method}":
                continue
            about = {
                "task": name,
                "method": method,
                "recipe": args.recipe,
                "scale": args.scale,
                "backbone": backbone.label,
            }
            key = about | {"epochs": args.epochs, "batch": args.batch, "rounds": args.rounds}
            task = Task(args.data, name, backbone.preprocess)
            lines.append((key, log.find(key) or log.add(key, **case(args, backbone, task, method))))
    show(lines)


def show(lines: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Prints the tables, with the means over all tasks at their end."""
    table = Table("task", "adapter", "kind", "accuracy of exits", "routed", "cost", "same exit", "same class")
    speed = Table("task", "adapter", "batch", "control", "whole: int8 / float32", "routed: int8 / float32", "MB")
    for key, line in lines:
        first = [key["task"], key["method"]]
        for arm, got in line["routed"].items():
            exits = line["exit_accuracy"].get(arm, ())
            shown = "/".join(f"{100 * a:.1f}" for a in exits)
            parts = (f"{100 * got[part]:.1f}" for part in ("accuracy", "cost", "same_exit", "same_class"))
            table.add_row(*first, arm, shown, *parts)
            first = ["", ""]
        first = [key["task"], key["method"]]
        for batch, got in line["times"].items():
            size = " / ".join(f"{line['bytes'][kind] / 1e6:.2f}" for kind in KINDS)
            factors = (f"{got['int8_over_float32'][way]:.3f}" for way in ("whole", "routed"))
            speed.add_row(*first, batch, mark(got["control"]), *factors, size)
            first = ["", ""]
    for method in sorted({key["method"] for key, _ in lines}):
        some = [line for key, line in lines if key["method"] == method]
        for arm in some[0]["routed"] if some else ():
            exits = [line["exit_accuracy"][arm] for line in some] if arm in KINDS else []
            shown = "/".join(f"{100 * sum(column) / len(some):.1f}" for column in zip(*exits, strict=True))
            means = (
                f"{100 * sum(line['routed'][arm][part] for line in some) / len(some):.1f}"
                for part in ("accuracy", "cost", "same_exit", "same_class")
            )
            table.add_row(f"mean of {len(some)}", method, arm, shown, *means)
    for one in (table, speed):
        Console(width=130).print(one)


if __name__ == "__main__":
    main()
