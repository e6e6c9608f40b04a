"""Lines as benchmarks/transfer.py writes them, from drawn logits: what the report is tested with. No training."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynadapter import ExitCosts

GROUPS = {"cars": "Natural", "birds": "Natural", "tiles": "Specialized", "dots": "Structured"}
METHODS = ("probe", "adapter", "lora", "repadapter", "full")
INGREDIENTS = ("linear-heads", "uniform", "late-to-early", "linear-in-depth", "no-forward", "no-backward")
KEY = {"epochs": 100, "batch": 64, "backbone": "small:0123abcd"}
MACHINE = {"cpu": "A Processor", "cores": 2, "python": "3.11.9", "torch": "2.14.1", "timm": "1.0.31"}
COSTS = tuple(int(1e6 * cost) for cost in (25.4, 50.5, 75.6, 100.7))


def number(*about: Any) -> int:
    """A seed for whatever this is about."""
    return int(hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8], 16)


def drawn(method: str, task: str, recipe: str, seed: int, samples: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits (exits, samples, classes) of a network whose exits get better, and targets (samples,)."""
    generator = torch.Generator().manual_seed(number(method, task, recipe, seed, samples))
    exits = 1 if recipe == "static" or method == "full" else 4
    targets = torch.arange(samples) % classes
    shared = torch.randn(1, samples, classes, generator=generator)
    noise = 0.8 * shared + 0.6 * torch.randn(exits, samples, classes, generator=generator)
    level = 2.0 + number(task) % 100 / 60 + {"probe": -1.0, "full": -0.3}.get(method, 0.0)
    level += 0.0 if recipe == "static" else -0.1 if recipe in INGREDIENTS else 0.05
    strength = torch.linspace(0.6, 1.0, exits) * level if exits > 1 else torch.tensor([level])
    ease = 0.4 + 1.2 * torch.rand(samples, generator=generator)
    noise[:, torch.arange(samples), targets] += strength[:, None] * ease
    return 2 * noise, targets


class Maker:
    """Makes lines of one setting.

    Args:
        outcomes: The benchmark's module.
        recipes: The benchmark's module.
        samples: Test images a task.
    """

    def __init__(self, outcomes: Any, recipes: Any, samples: int = 120) -> None:
        self.outcomes, self.recipes, self.samples = outcomes, recipes, samples

    def line(
        self, phase: str, task: str, method: str, recipe: str, scale: float = 1.0, seed: int = 0, **more: Any
    ) -> dict[str, Any]:
        """One line; the best scale is 1."""
        from dynadapter.spec import plain

        how = self.recipes.recipe(recipe)
        static = how.static or method == "full"
        key = {"phase": phase, "task": task, "method": method, "recipe": recipe, "scale": scale, "seed": seed} | KEY
        classes = 4 + number(task) % 5
        size = self.samples if phase == "final" else 60
        logits, targets = drawn(method, task, recipe, seed, size, classes)
        if scale != 1:
            logits = logits + 3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(number(scale)))
        whole = ExitCosts(COSTS[-1:] if static else COSTS, (0,) * (1 if static else 4), 100_000_000, (12,))
        if static:
            whole = ExitCosts((100_000_000,), (0,), 100_000_000, (12,))
        first = ExitCosts(
            tuple(int(macs * 0.97) for macs in whole.macs), whole.light, whole.backbone, whole.exit_depths
        )
        found = self.outcomes.measures(logits, targets, (whole, first)) | {"exits": [12] if static else [3, 6, 9, 12]}
        values = {
            "arm": "static" if static else "dynamic",
            "group": GROUPS[task],
            "classes": classes,
            "settings": plain(how),
            "trainable": {
                "adapters": 0 if method in ("probe", "full") else 30_000,
                "heads": 0 if static else 20_000,
                "last_head": 97 * classes,
                "backbone": 1_300_000 if method == "full" else 0,
            },
            **found,
        }
        if not static:
            seen, right = drawn(method, task, recipe, seed, 60, classes)
            routed = self.outcomes.calibrated(seen, right, whole)
            values["routed"] = self.outcomes.applied(routed, logits, targets, whole) if phase == "final" else routed
            if phase == "search":
                values["held_out"] = self.outcomes.held_out(logits, targets, whole)
        if phase == "final":
            values |= {"scales_searched": [0.1, 1.0, 10.0], "calibrated_on_seed": 0}
        line = {"key": key, **values, "losses": [1.0, 0.5], "train_seconds": 9.0, **more}
        return json.loads(json.dumps(line | {"machine": MACHINE, "time": "2026-01-01T00:00:00+00:00"}))

    def speed(self, task: str, method: str, seed: int = 0, control: float = 1.004) -> dict[str, Any]:
        """A line of measured times."""
        key = {"phase": "speed", "task": task, "method": method, "recipe": "base", "scale": 1.0, "seed": seed}
        key |= KEY | {"machine": MACHINE["cpu"]}
        one = {
            "images_per_second": {"static": 400.0, "control": 398.0, "routed": 776.0},
            "control": control,
            "shares": [0.5, 0.2, 0.2, 0.1],
            "promise": 2.0,
            "speedup": 1.94,
            "efficiency": 0.97,
        }
        times = dict.fromkeys(("35", "50", "drop 0"), one)
        line = {"key": key, "arm": "dynamic", "threads": 1, "times": times, "machine": MACHINE, "time": "-"}
        return json.loads(json.dumps(line))

    def log(
        self,
        tasks: Sequence[str] = tuple(GROUPS),
        methods: Sequence[str] = METHODS,
        seeds: Sequence[int] = (0, 1),
        scales: Sequence[float] = (1.0,),
    ) -> Iterator[dict[str, Any]]:
        """A whole log: search, ablation, final, speed."""
        for task in tasks:
            for method in methods:
                arms = ["static"] if method == "full" else ["static", "base"]
                peft = method not in ("probe", "full")
                for recipe in [*arms, *(INGREDIENTS if peft else ())]:
                    for scale in scales if peft and recipe in arms else (1.0,):
                        yield self.line("search", task, method, recipe, scale)
                yield from (self.line("final", task, method, recipe, 1.0, seed) for recipe in arms for seed in seeds)
                if peft:
                    yield self.speed(task, method)


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Writes lines to a log."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
