"""Compare rules that choose exits: choose on some images, measure on the others, over many random splits.

    python benchmarks/choosing.py SWEEP... --images 200 --splits 5

SWEEP is the folder of a sweep on development tasks, such as ``runs/recipes_micro``. Its final networks with early exits
take part, on their test images. A row has the accuracy in points above the last exit and the cost in % of static, means
over networks and splits, for each goal;
for accuracy drops also the points by which the goal is missed, averaged over splits, then over networks. The rules are
those of :mod:`dynadapter.calibrate.choosing` with other constants or fewer candidates. "learned" exits by a logistic
regression (scikit-learn) on confidence, margin, entropy and agreement with the exit before, instead of by confidence.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dynadapter.calibrate import Goal, choosing, evaluate, fit_temperatures
from dynadapter.calibrate.choosing import Options, Samples, choose
from dynadapter.calibrate.ladder import ladder
from dynadapter.calibrate.stacked import Stacked
from dynadapter.exits.combining import predicting
from dynadapter.exits.policies import Confidence, Never, confidence, entropy, margin
from dynadapter.sweep import lines
from dynadapter.sweep.plan import FINAL

COSTS = [Goal(cost=cost) for cost in (0.35, 0.51, 0.65)]
GOALS = [*COSTS, *(Goal(accuracy_drop=points) for points in (0.0, 1.0, 2.0))]
ONE = ("one_threshold",)


def fewest_numbers(tried: choosing.Candidates) -> int:
    """Return, of the candidates within one standard error of the best, one with the fewest numbers that were chosen."""
    best = int(tried.credit.mean(1).argmax())
    loss = tried.credit[best] - tried.credit
    near = (loss.mean(1) <= loss.std(1, correction=0) / loss.shape[1] ** 0.5 + 1e-9).nonzero()[:, 0].tolist()
    fewest = min(choosing.freedom(tried.settings[i]) for i in near)
    near = [i for i in near if choosing.freedom(tried.settings[i]) == fewest]
    return max(near, key=lambda i: tried.credit[i].mean().item())


def spent(tried: choosing.Candidates) -> int:
    """Return the most accurate of the candidates with thresholds that spend the budget, one of each kind."""
    kinds = {(one.by, one.slope): i for i, one in enumerate(tried.settings) if one.search != "one_exit"}
    return max(kinds.values(), key=lambda i: tried.credit[i].mean().item())


RULES: dict[str, tuple[Options, dict[str, Any]]] = {
    "default": (Options(), {}),
    "labels alone": (Options(), {"PRIOR": 0}),
    "labels alone, budget spent": (Options(), {"PRIOR": 0, "most_accurate": spent}),
    "budget spent": (Options(), {"most_accurate": spent}),
    "fewest numbers within 1 error": (Options(), {"most_accurate": fewest_numbers}),
    "drop without safety": (Options(), {"SAFETY": 0}),
    "drop by 1 standard error": (Options(), {"SAFETY": 1}),
    "one threshold among them": (Options(searches=choosing.SEARCHES), {}),
    "one threshold": (Options(searches=ONE), {}),
    "one threshold, own logits": (Options(searches=ONE, combines=("own",)), {}),
    "own logits": (Options(combines=("own",)), {}),
    "thresholds by exit": (Options(searches=("thresholds",)), {}),
    "all at one exit": (Options(searches=("one_exit",)), {}),
    "no temperatures": (Options(temperatures=False), {}),
}


def measured(logits: Tensor, targets: Tensor, costs: list[float], rows: Tensor, rest: Tensor) -> np.ndarray:
    """Return the gain in points and the cost in % of static of each rule for each goal: (rules, goals, 2)."""
    last = (logits[-1, rest].argmax(-1) == targets[rest]).double().mean().item()
    table = np.full((len(RULES) + 2, len(GOALS), 2), math.nan)
    for i, (options, constants) in enumerate(RULES.values()):
        data = Samples(logits[:, rows], targets[rows], costs, 100.0, None, options)
        with mock.patch.multiple(choosing, LEVELS=choosing.LEVELS, **constants):
            for j, goal in enumerate(GOALS):
                try:
                    policy = choose(data, goal).found.policy
                except ValueError:  # nothing is within the goal
                    policy = Never()
                found = evaluate(policy, logits[:, rest], targets[rest], costs, static=100.0)
                table[i, j] = 100 * (found.accuracy - last), 100 * found.cost
    for i, (learned, accuracy, cost) in enumerate(compared(logits, targets, costs, rows, rest)):
        table[len(RULES) + learned, i % len(COSTS)] = 100 * (accuracy - last), 100 * cost
    return table


def compared(
    logits: Tensor, targets: Tensor, costs: list[float], rows: Tensor, rest: Tensor
) -> Iterator[tuple[int, float, float]]:
    """Yield accuracy and cost by the confidence and by a learned score, for each budget, on the same predictions."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    prediction = predicting("geometric", fit_temperatures(logits[:, rows], targets[rows]))
    data = Stacked(logits, targets, costs, 100.0, prediction)
    scores = {0: confidence(data.predicted[:-1]), 1: torch.empty(data.exits - 1, data.samples)}
    for k in range(data.exits - 1):
        p = data.predicted[k]
        agrees = (data.predictions[k] == data.predictions[max(k - 1, 0)]).float() * (k > 0)
        odds = confidence(p).clamp(1e-6, 1 - 1e-6).logit()
        features = torch.stack([odds, margin(p), entropy(p), agrees, data.logits[k].softmax(-1).amax(-1)], -1).numpy()
        scale, right = StandardScaler().fit(features[rows]), data.right[k, rows].numpy()
        if right.all() or not right.any():
            scores[1][k] = float(right[0])
            continue
        fitted = LogisticRegression(C=0.1).fit(scale.transform(features[rows]), right)
        scores[1][k] = torch.from_numpy(fitted.predict_proba(scale.transform(features))[:, 1]).float()
    for learned, score in scores.items():
        for goal in COSTS:
            p = score.clamp(1e-6, 1 - 1e-6)  # as logits of two classes, whose confidence is at least 1/2
            two = torch.stack([(0.5 + p / 2).logit(), torch.zeros_like(p)], -1)
            two = torch.cat([two, two[-1:]])
            part = Stacked(two[:, rows], targets[rows].clamp(max=1), costs, 100.0)
            policy = choosing.levels(ladder(Confidence, part), goal.amount)[-1]
            index = choosing.exit_indices([policy], Stacked(two[:, rest], None, costs, 100.0))[0]
            right = data.right[:, rest].gather(0, index[None])[0]
            yield (
                learned,
                right.double().mean().item(),
                torch.tensor(costs, dtype=torch.float64)[index].mean().item() / 100,
            )


def networks(sweep: Path) -> Iterator[tuple[str, Tensor, Tensor, list[float]]]:
    """Yield name, logits (exits, images, classes), targets (images,) and costs in % of static of the final networks."""
    for unit, line in lines.read(sweep).items():
        costs = [one["percent_of_static"] for one in line.get("exits", [])]
        if unit.split != FINAL or len(costs) < 2:
            continue
        place = sweep / "runs" / unit.name
        logits, targets = np.load(place / "logits.npz")["logits"], np.load(place / "predictions.npz")["targets"]
        yield unit.name, torch.from_numpy(logits).float(), torch.from_numpy(targets).long(), costs


def main(argv: list[str] | None = None) -> None:
    """Compare the rules and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--images", type=int, default=200, help="images to choose on")
    parser.add_argument("--splits", type=int, default=10, help="random splits of each file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tables = []
    for name, logits, targets, costs in (one for sweep in args.sweeps for one in networks(sweep)):
        print(name)
        splits = []
        for seed in range(args.splits):
            order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
            splits.append(measured(logits, targets, costs, order[: args.images], order[args.images :]))
        tables.append(np.mean(splits, 0))
    table = np.stack(tables)  # (networks, rules, goals, 2)
    names = [*RULES, "geometric, by confidence", "geometric, learned"]
    print(f"{len(tables)} networks, {args.splits} splits, chosen on {args.images} images")
    print(f"| rule | {' | '.join(map(str, GOALS))} | mean of costs | mean of drops | goal missed by |")
    print("|---" * (len(GOALS) + 4) + "|")
    missed = np.maximum(0, -table[:, :, len(COSTS) :, 0] - [goal.amount for goal in GOALS[len(COSTS) :]]).mean((0, 2))
    for i, name in enumerate(names):
        rows = [*table[:, i].mean(0), table[:, i, : len(COSTS)].mean((0, 1)), table[:, i, len(COSTS) :].mean((0, 1))]
        cells = ["" if math.isnan(gain) else f"{gain:+.2f} at {cost:.1f}" for gain, cost in rows]
        print(f"| {' | '.join([name, *cells])} | {missed[i]:.2f} |")
    wins = (table[:, -1, : len(COSTS), 0].mean(1) > table[:, -2, : len(COSTS), 0].mean(1)).sum()
    print(f"the learned score wins on {wins} of {len(tables)} networks")


if __name__ == "__main__":
    main()
