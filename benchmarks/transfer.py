"""Transfers a pre-trained backbone to tasks: every kind of adapter without exits and with them, by one protocol.

    python benchmarks/transfer.py --data tasks --backbone runs/micro/micro.json --phase search
    python benchmarks/transfer.py --data tasks --backbone runs/micro/micro.json --phase final --seeds 0 1 2

``--data`` holds tasks in the layout of VTAB-1k. Phases:

- ``search`` trains on train800 and looks at val200: accuracy of every exit, the curve, thresholds. Scales (for full
  fine-tuning: factors on the learning rate) and recipes are chosen by what it finds.
- ``ablation`` does the same for the other recipes, at the scale that was chosen for the default one.
- ``final`` trains on train800val200 at the best scale, and reads test once, with the thresholds of the search.
- ``speed`` times routing beside the static network, on the networks that ``final`` left in ``--keep``.

The protocol: AdamW with 1e-3 and weight decay 1e-4, ten percent of the steps up and then a cosine down, 64 images a
step, the incomplete batch left out, no augmentation, the last epoch counts. Every arm has the same.

A run is one line of JSON in ``--out``; what is there is not done again. Any number of processes may work at the same
file, also by ``--jobs``. On a GPU the network runs in bfloat16 under autocast.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import BackboneFile, Fit, Protocol, Task, build, count_trainable, normalized, stacked_logits, timed
from outcomes import DEFAULT_RULE, applied, calibrated, costs_of, held_out, measures
from recipes import DEFAULT, METHODS, exchanges, recipe
from runs import Key, Line, Runs, matching
from safetensors.torch import load_file, save_file

from dynadapter import ExitNet, Policy, exit_costs, lay_out_for_cpu, route
from dynadapter.adapters import adapter_layers
from dynadapter.bench.timing import best_chunk, clock_of, cpu_name, interleave, ratio, representative
from dynadapter.data import VTAB_TASKS
from dynadapter.data.normalize import normalize
from dynadapter.data.vtab import LISTS, vtab_task
from dynadapter.spec import plain, restore

OUT = Path(__file__).parent / "results" / "transfer.jsonl"
PHASES = ("search", "ablation", "final", "speed")
GROUPS = {
    "cifar10": "Natural",
    "flowers5": "Natural",
    "gtsrb": "Specialized",
    "trashnet": "Specialized",
    "shapes_count": "Structured",
    "sprites_location": "Structured",
    **{name: task.group for name, task in VTAB_TASKS.items()},
}
SCALES = (1.0, 10.0, 30.0, 100.0)
"""What adapters are given to choose from. In short trainings of a small backbone the larger ones win on some tasks."""
FULL_RATES = (0.03, 0.1, 1.0)
"""Factors on the learning rate that full fine-tuning is given to choose from; 1e-3 is the adapters'."""
GOAL = "50"
"""The budget that goes into the choice of a scale."""
TIMED = ("35", "50", "drop 0")
TIMED_IMAGES = 512


@dataclass(frozen=True)
class Run:
    """One run: what decides its outcome."""

    phase: str
    task: str
    method: str
    recipe: str
    scale: float
    seed: int

    def key(self, args: argparse.Namespace, backbone: BackboneFile) -> Key:
        """Gives the key of its line."""
        key = vars(self) | {"epochs": args.epochs, "batch": args.batch, "backbone": backbone.label}
        return key | ({"machine": _machine(args)} if self.phase == "speed" else {})

    def __str__(self) -> str:
        return f"{self.phase} {self.task} {self.method} {self.recipe} s={self.scale:g} seed {self.seed}"


# ---- what there is to do ---------------------------------------------------------------------------------------------


def plan(
    args: argparse.Namespace, phase: str, lines: list[Line], backbone: BackboneFile
) -> tuple[list[Run], list[str]]:
    """Lists the runs of a phase, and what keeps others from being done."""
    runs, missing = [], []
    same = {"epochs": args.epochs, "batch": args.batch, "backbone": backbone.label}
    for task in args.tasks:
        for method in args.methods:
            for name in _recipes(args, phase, method):
                about = same | {"task": task, "method": method}
                tried = about | {"phase": "search", "epochs": args.scale_epochs or args.epochs}
                if phase == "search" and not args.scale_epochs:
                    scales: Sequence[float] = _scales(args, method)
                elif phase == "speed":
                    scales = sorted(
                        {line["key"]["scale"] for line in matching(lines, phase="final", recipe=name, **about)}
                    )
                else:
                    after = args.scale_epochs or args.epochs
                    source = args.scale_from or (DEFAULT if phase == "ablation" else name)
                    best = chosen_scale(matching(lines, recipe=source, **tried))
                    scales = [] if best is None else [best]
                    dynamic = phase == "final" and not recipe(name).static  # it takes the thresholds of its own search
                    if dynamic and scales and not calibration(lines, same, task, method, name, scales[0], 0):
                        scales, source, after = [], name, args.epochs
                    if not scales:
                        missing.append(
                            f"{task} {method} {name}: no search run of {source} after {after} epochs; do it first"
                        )
                for scale in scales:
                    # the seed varies slowest elsewhere: a log that was cut short has all arms
                    kind = "search" if phase == "ablation" else phase
                    runs += [Run(kind, task, method, name, scale, seed) for seed in args.seeds]
    return sorted(runs, key=lambda run: args.seeds.index(run.seed)), missing


def _recipes(args: argparse.Namespace, phase: str, method: str) -> list[str]:
    if args.recipes:
        names = args.recipes
    elif phase == "ablation":
        names = [DEFAULT, *exchanges(DEFAULT)]
    else:
        names = ["static", DEFAULT]
    if phase == "ablation" and method in ("probe", "full"):
        return []  # the ingredients are about adapters
    if method == "full":  # a reference, trained without exits
        names = [name for name in names if name == "static"]
    return [name for name in names if phase != "speed" or not recipe(name).static]


def _scales(args: argparse.Namespace, method: str) -> Sequence[float]:
    return {"probe": (1.0,), "full": FULL_RATES}.get(method, args.scales)


def score(line: Line) -> float:
    """Says how good a search run is: its accuracy, or with exits the mean of routed at half cost and last."""
    last = line["exit_accuracy"][-1]
    if line["arm"] == "static":
        return last
    routed = line["routed"][DEFAULT_RULE][GOAL]
    return (last + routed["accuracy"]) / 2 if routed else last


def chosen_scale(lines: list[Line]) -> float | None:
    """Gives the scale with the best mean over the seeds; of equals the one nearest to 1. None without a line."""
    scores: dict[float, list[float]] = {}
    for line in lines:
        scores.setdefault(line["key"]["scale"], []).append(score(line))
    return max(scores, key=lambda s: (statistics.fmean(scores[s]), -abs(math.log(s))), default=None)


def calibration(
    lines: list[Line], same: Key, task: str, method: str, name: str, scale: float, seed: int
) -> Line | None:
    """Finds the search run whose thresholds a final run takes: that of its seed, else that of the lowest."""
    about = same | {"task": task, "method": method, "recipe": name, "scale": scale}
    found = sorted(matching(lines, phase="search", **about), key=lambda line: line["key"]["seed"])
    return next((line for line in found if line["key"]["seed"] == seed), found[0] if found else None)


def kept_name(key: Key) -> str:
    """Names what a final run leaves in ``--keep``, without the suffix."""
    name = "{task}-{method}-{recipe}-s{scale:g}-seed{seed}-e{epochs}-{backbone}".format(**key)
    return re.sub(r"[^\w.+-]", "-", name)


def check_recipes(lines: list[Line], names: set[str]) -> None:
    """Makes sure that recipes are what they were when lines were written.

    Raises:
        ValueError: One is not.
    """
    for line in lines:
        name, then = line["key"]["recipe"], line.get("settings")
        if then is None or name not in names:
            continue
        now = plain(recipe(name))
        if any(now[part] != value for part, value in then.items() if part in now):
            raise ValueError(
                f"the recipe {name!r} is no longer what the log was made with; give the new one another name"
            )


# ---- one run ---------------------------------------------------------------------------------------------------------


class Bench:
    """Does runs, one after the other.

    Args:
        args: The command line.
        backbone: What is transferred.
    """

    def __init__(self, args: argparse.Namespace, backbone: BackboneFile) -> None:
        self.args, self.backbone = args, backbone
        self.device = torch.device(args.device)
        self.task = lru_cache(maxsize=2)(lambda name: Task(args.data, name, backbone.preprocess))
        self.images = lru_cache(maxsize=2)(self._images)
        self.costs = lru_cache(maxsize=None)(self._costs)

    def _images(self, name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.task(name).split(split)
        return normalized(images, self.backbone.preprocess, self.device), images.targets.to(self.device)

    def _costs(self, classes: int, method: str, name: str) -> Any:
        return costs_of(build(self.backbone, classes, method, recipe(name), 1.0, 0))

    def fit(self, run: Run) -> dict[str, Any]:
        """Trains and evaluates; gives what stands in the line."""
        final = run.phase == "final"
        task, how = self.task(run.task), recipe(run.recipe)
        full = run.method == "full"
        net = build(self.backbone, task.classes, run.method, how, 1.0 if full else run.scale, run.seed).to(self.device)
        protocol = Protocol(self.args.epochs, self.args.batch, lr=1e-3 * (run.scale if full else 1.0))
        images, targets = self.images(run.task, "train800val200" if final else "train800")
        fit = Fit(net, how, images, targets, protocol, run.seed)
        losses, seconds = timed(lambda: fit.run(self.args.replay))
        seen = task.split("test" if final else "val200")
        logits = stacked_logits(net, seen, self.backbone.preprocess, self.device)
        costs = self.costs(task.classes, run.method, run.recipe)
        values: dict[str, Any] = {
            "arm": "static" if how.static else "dynamic",
            "group": self.group(run.task),
            "classes": task.classes,
            "settings": plain(how),
            "trainable": count_trainable(net),
            **measures(logits, seen.targets, costs),
        }
        if final:
            lines = Runs(self.args.out).lines
            same = {name: run.key(self.args, self.backbone)[name] for name in ("epochs", "batch", "backbone")}
            found = calibration(lines, same, run.task, run.method, run.recipe, run.scale, run.seed)
            tried = same | {"epochs": self.args.scale_epochs or self.args.epochs}
            about = matching(lines, phase="search", recipe=run.recipe, task=run.task, method=run.method, **tried)
            values["scales_searched"] = sorted({line["key"]["scale"] for line in about})
            values["scales_epochs"] = tried["epochs"]
            if not how.static:
                assert found is not None, "the plan has made sure of it"
                values["calibrated_on_seed"] = found["key"]["seed"]
                values["routed"] = applied(found["routed"], logits, seen.targets, costs)
        elif not how.static:
            values["routed"] = calibrated(logits, seen.targets, costs)
            values["held_out"] = held_out(logits, seen.targets, costs)
        if final and self.args.keep:
            self._keep(run, net, logits, seen.targets, seen.files)
        return values | {"losses": [round(loss, 4) for loss in losses], "train_seconds": round(seconds, 2)}

    def group(self, task: str) -> str:
        """Names the group of a task."""
        known = vtab_task(task)
        return self.args.groups.get(task) or GROUPS.get(known.name if known else task, "Other")

    def _kept(self, run: Run) -> Path:
        return Path(self.args.keep) / kept_name(run.key(self.args, self.backbone))

    def _keep(self, run: Run, net: ExitNet, logits: torch.Tensor, targets: torch.Tensor, files: list[str]) -> None:
        place = self._kept(run)
        place.parent.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().cpu().clone() for name, p in net.named_parameters() if p.requires_grad}
        save_file(trained, place.with_name(place.name + ".safetensors"))
        arrays = {"logits": logits.numpy(), "targets": targets.numpy(), "files": np.array(files)}
        np.savez_compressed(place.with_name(place.name + ".npz"), **arrays)

    def speed(self, run: Run, line: Line) -> dict[str, Any]:
        """Times the network that a final run left: routed at its thresholds, beside its own backbone without exits."""
        kept = self._kept(run)
        if not kept.with_name(kept.name + ".npz").is_file():
            raise ValueError(f"{run} left nothing in {kept.parent}; train it with --keep {kept.parent}")
        task, how = self.task(run.task), recipe(run.recipe)
        net = build(self.backbone, task.classes, run.method, how, run.scale, run.seed).eval()
        net.load_state_dict(load_file(kept.with_name(kept.name + ".safetensors")), strict=False)
        if all(layer.mergeable for layer in adapter_layers(net.backbone).values()):
            net.merge(1e-4)
        # a policy that asks no exit runs no early head, and splits no block before the last one
        alone = ExitNet(net.backbone, exit_depths=(), token_merging=net.token_merging)
        costs = {asks: exit_costs(what, class_first=True) for asks, what in ((True, net), (False, alone))}
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        lay_out_for_cpu(net.to(self.device, dtype))
        with np.load(kept.with_name(kept.name + ".npz")) as arrays:
            logits = torch.from_numpy(arrays["logits"])
        pixels, batch, result = task.split("test").pixels, self.args.batch, {}
        for goal in TIMED:
            found = line["routed"][DEFAULT_RULE][goal]
            if found is None:
                continue
            policy = restore(found["policy"], Policy)
            rows = representative(route(policy, logits), TIMED_IMAGES)
            images = normalize(pixels[rows], self.backbone.preprocess).to(self.device, dtype)
            result[goal] = time_arms(net, images, policy, batch, self.args.rounds, costs[policy.asks])
        return {"arm": "dynamic", "threads": torch.get_num_threads(), "times": result}


@torch.inference_mode()
def time_arms(
    net: ExitNet, images: torch.Tensor, policy: Policy, batch: int, rounds: int, costs: Any
) -> dict[str, Any]:
    """Times the static network, itself once more, and routing, arm by arm in turn."""

    def static(chunk: int) -> Any:
        return lambda: [net.backbone(part) for call in images.split(batch) for part in call.split(chunk)]

    def routed() -> torch.Tensor:
        return torch.cat([net.early(part, policy).exit_index for part in images.split(batch)])

    clock = clock_of(images.device, torch.get_num_threads())
    chunk = best_chunk(static, batch, clock, images.device, 3)
    times = interleave({"static": static(chunk), "control": static(chunk), "routed": routed}, rounds, 1, images.device)
    seconds = {name: taken.rounds(clock) for name, taken in times.items()}
    shares = (routed().cpu().bincount(minlength=net.num_exits).double() / len(images)).tolist()
    promise = costs.static / (costs.average_run(shares) if policy.asks else costs.class_first_macs[-1])
    speedup = ratio(seconds["static"], seconds["routed"])
    return {
        "images_per_second": {name: len(images) / statistics.median(taken) for name, taken in seconds.items()},
        "control": ratio(seconds["control"], seconds["static"]),
        "shares": shares,
        "promise": promise,
        "speedup": speedup,
        "efficiency": speedup / promise,
    }


def said(line: Line) -> str:
    """Says what came of a run in a few words."""
    if "times" in line:
        return ", ".join(f"{goal}: {t['speedup']:.2f}x of {t['promise']:.2f}x" for goal, t in line["times"].items())
    text = "/".join(f"{100 * a:.1f}" for a in line["exit_accuracy"])
    routed = line.get("routed", {}).get(DEFAULT_RULE, {}).get(GOAL)
    at = f", {100 * routed['accuracy']:.1f} at {100 * routed['cost']:.0f} %" if routed else ""
    return f"{text}{at} ({line['train_seconds']:.0f} s)"


# ---- the program -----------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace, backbone: BackboneFile, phase: str) -> None:
    """Does the runs of a phase that nobody has done or is doing."""
    runs = Runs(args.out)
    todo, missing = plan(args, phase, runs.lines, backbone)
    check_recipes(runs.lines, {run.recipe for run in todo})
    for text in missing:
        print(f"left out: {text}", flush=True)
    left = [run for run in todo if runs.find(run.key(args, backbone)) is None]
    print(f"{phase}: {len(todo)} runs, {len(left)} of them to do", flush=True)
    if args.dry:
        print(*left, sep="\n", flush=True)
        return
    bench = Bench(args, backbone)
    for number, run in enumerate(left, start=1):
        key = run.key(args, backbone)
        with runs.claim(key) as mine:
            if mine:
                values = bench.speed(run, _final(runs, run, key)) if phase == "speed" else bench.fit(run)
                print(f"[{number}/{len(left)}] {run}: {said(runs.add(key, **values))}", flush=True)


def _final(runs: Runs, run: Run, key: Key) -> Line:
    wanted = {name: value for name, value in key.items() if name != "machine"} | {"phase": "final"}
    found = runs.find(wanted)
    if found is None:
        raise ValueError(f"{run}: there is no final run of this seed; do it first")
    return found


def spread(argv: list[str], jobs: int, phase: str) -> None:
    """Does a phase by several processes of this program; waits for all of them."""
    own = [sys.executable, __file__, *argv, "--phase", phase, "--jobs", "1"]  # what comes last counts
    started = [subprocess.Popen(own) for _ in range(jobs)]
    if failed := [process.returncode for process in started if process.wait()]:
        raise ValueError(f"{len(failed)} of {jobs} processes failed; what they have done is in the log")


def _machine(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else cpu_name()


def _found(root: str) -> Iterator[str]:
    folder = Path(root)
    if folder.is_dir():
        yield from sorted(path.name for path in folder.iterdir() if all((path / name).is_file() for name in LISTS))


def _group(text: str) -> tuple[str, str]:
    task, _, group = text.partition("=")
    if not (task and group):
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=GROUP")
    return task, group


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        ValueError: What is asked for does not exist.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds the tasks")
    parser.add_argument("--backbone", required=True, help="NAME.json of the pre-trained backbone")
    parser.add_argument("--phase", nargs="+", default=["search"], choices=PHASES, help="one or several, in this order")
    parser.add_argument("--tasks", nargs="+", help="by default all in --data")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="by default all")
    parser.add_argument("--recipes", "--recipe", nargs="+", help="by default static and base, or the ablation's")
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES), help="of adapters, to search")
    parser.add_argument("--scale_from", help="take the scale that was best for this recipe instead of the own one")
    parser.add_argument("--scale_epochs", type=int, help="take the scale that was best after so many epochs instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="by default 0 alone")
    parser.add_argument("--epochs", type=int, default=100, help="the same for every arm")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--groups", nargs="+", type=_group, default=[], metavar="TASK=GROUP", help="of unknown tasks")
    parser.add_argument("--out", default=str(OUT), help="JSON lines; runs that are in it are not done again")
    parser.add_argument("--keep", help="folder for logits and trained tensors of final runs, outside the repository")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--replay", action="store_true", help="on a GPU: record a step as a CUDA graph and replay it")
    parser.add_argument("--rounds", type=int, default=7, help="of the phase speed")
    parser.add_argument("--dry", action="store_true", help="list what is to do, and do nothing")
    args = parser.parse_args(argv)
    args.groups = dict(args.groups)
    there = list(_found(args.data))
    args.tasks = args.tasks or there
    if not args.tasks:
        raise ValueError(f"{args.data} holds no task with {', '.join(LISTS)}")
    if unknown := [task for task in args.tasks if not (Path(args.data) / task).is_dir()]:
        raise ValueError(f"there is no task {unknown[0]!r} in {args.data}; there are {', '.join(there) or 'none'}")
    for name in (*(args.recipes or []), *([args.scale_from] if args.scale_from else [])):
        recipe(name)
    if args.epochs < 1 or args.batch < 1 or args.jobs < 1 or min(args.scales) <= 0:
        raise ValueError("--epochs, --batch and --jobs must be at least 1, and --scales above 0")
    if "speed" in args.phase and not args.keep:
        raise ValueError("--phase speed needs --keep, the folder in which --phase final left its networks")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the program; a user's mistake is one line and exit code 2."""
    try:
        args = arguments(argv)
        backbone = BackboneFile.read(args.backbone)
        torch.set_num_threads(args.threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
        for phase in [phase for phase in PHASES if phase in args.phase]:
            if args.jobs > 1 and not args.dry:
                spread(sys.argv[1:] if argv is None else argv, args.jobs, phase)
            else:
                work(args, backbone, phase)
    except ValueError as error:
        raise SystemExit(print(f"transfer.py: error: {error}", file=sys.stderr) or 2) from None


if __name__ == "__main__":
    main()
