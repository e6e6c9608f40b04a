"""What a trained network does: accuracy of every exit, thresholds from validation logits, what they do elsewhere."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynadapter import Confidence, Entropy, ExitCosts, ExitNet, Margin, Policy, exit_costs
from dynadapter.calibrate import (
    Calibrated,
    Outcome,
    curve,
    evaluate,
    fit_temperatures,
    geometric_shares,
    split_halves,
    to_accuracy_drop,
    to_cost,
)
from dynadapter.spec import plain, restore

BUDGETS = (0.25, 0.35, 0.45, 0.5, 0.75, 1.0)
"""Average cost that thresholds are set for, as a share of the static network's."""

GOALS = (*(f"{100 * budget:g}" for budget in BUDGETS), "drop 0")
"""A budget in percent, or the cheapest thresholds that lose no accuracy on the validation images."""


class Rule(NamedTuple):
    """A way to decide who leaves.

    ``kind`` of policy; ``search`` as in :func:`dynadapter.calibrate.to_cost`, or ``geometric``; ``tempered``: a
    temperature per exit; ``running``: an exit answers with the mean of the log-probabilities of all exits so far.
    """

    kind: type[Policy] = Confidence
    search: str = "shared"
    tempered: bool = False
    running: bool = False


RULES = {
    "confidence": Rule(),
    "margin": Rule(Margin),
    "entropy": Rule(Entropy),
    "tempered": Rule(tempered=True),
    "geometric": Rule(search="geometric"),
    "refined": Rule(search="refined"),
    "running": Rule(running=True),
    "running tempered": Rule(running=True, tempered=True),
}
DEFAULT_RULE = "confidence"
"""The rule that tables and figures show."""


def running_mean(logits: Tensor) -> Tensor:
    """Gives at each exit the mean log-probability over the exits so far: (exits, samples, classes)."""
    passed = torch.arange(1, len(logits) + 1, device=logits.device)
    return logits.log_softmax(-1).cumsum(0) / passed[:, None, None]


def costs_of(net: ExitNet) -> ExitCosts:
    """Count what each exit costs, with what routing runs where the class token's row comes first."""
    return exit_costs(net, class_first=True)


def exit_accuracy(logits: Tensor, targets: Tensor) -> list[float]:
    """Gives the share of right answers at each exit."""
    return (logits.argmax(-1) == targets).double().mean(1).tolist()


def calibrated(
    logits: Tensor, targets: Tensor, costs: ExitCosts, goals: Sequence[str] = GOALS
) -> dict[str, dict[str, Any]]:
    """Sets thresholds by every rule for every goal, and says what they do on these samples.

    Returns:
        By rule and goal; a goal that cannot be reached is None.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, rule in RULES.items():
        seen = running_mean(logits) if rule.running else logits
        temperatures = fit_temperatures(seen, targets) if rule.tempered else None
        found[name] = {goal: _calibrated(seen, targets, costs, rule, goal, temperatures) for goal in goals}
    return found


def held_out(logits: Tensor, targets: Tensor, costs: ExitCosts) -> dict[str, dict[str, Any]]:
    """Says what thresholds do that were set on the other half of these samples: by which rules can be compared.

    Returns:
        Accuracy and cost by rule and goal, the means of both halves; None where a goal cannot be reached.
    """
    halves = split_halves(len(targets), targets=targets)
    there = [
        applied(calibrated(logits[:, a], targets[a], costs, ("35", "50", "drop 0")), logits[:, b], targets[b], costs)
        for a, b in (halves, halves[::-1])
    ]
    shares = [len(b) / len(targets) for b in halves[::-1]]

    def mean(rule: str, goal: str) -> dict[str, float] | None:
        parts = [one[rule][goal] for one in there]
        if None in parts:
            return None
        sums = {
            name: sum(w * part[name] for w, part in zip(shares, parts, strict=True)) for name in ("accuracy", "cost")
        }
        return {name: round(value, 5) for name, value in sums.items()}

    return {rule: {goal: mean(rule, goal) for goal in goals} for rule, goals in there[0].items()}


def _calibrated(
    logits: Tensor, targets: Tensor, costs: ExitCosts, rule: Rule, goal: str, temperatures: tuple[float, ...] | None
) -> dict[str, Any] | None:
    options: dict[str, Any] = {"kind": rule.kind, "temperatures": temperatures, "static": costs.static}
    find: Callable[..., Calibrated]
    if goal == "drop 0":
        find, value = to_accuracy_drop, 0.0
    else:
        find, value = to_cost, float(goal) / 100
    if rule.search == "geometric":
        if goal == "drop 0":
            return None
        find = geometric_shares
    else:
        options["search"] = rule.search
    try:
        result = find(logits, targets, costs.macs, value, **options)
    except ValueError:  # a budget below the first exit's cost
        return None
    return {"policy": plain(result.policy), **_outcome(result)}


def applied(
    found: dict[str, dict[str, Any]], logits: Tensor, targets: Tensor, costs: ExitCosts
) -> dict[str, dict[str, Any]]:
    """Says what thresholds that were found elsewhere do on these samples; in the form of :func:`calibrated`."""
    result: dict[str, dict[str, Any]] = {}
    for name, goals in found.items():
        seen = running_mean(logits) if RULES[name].running else logits
        result[name] = {goal: one and _applied(one["policy"], seen, targets, costs) for goal, one in goals.items()}
    return result


def _applied(policy: Any, logits: Tensor, targets: Tensor, costs: ExitCosts) -> dict[str, Any]:
    outcome = evaluate(restore(policy, Policy), logits, targets, costs.macs, static=costs.static)
    return {"policy": policy, **_outcome(outcome)}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {"accuracy": outcome.accuracy, "cost": outcome.cost, "shares": list(outcome.shares)}


def measures(logits: Tensor, targets: Tensor, costs: ExitCosts) -> dict[str, Any]:
    """Says what can be said of a network's answers without thresholds, for a line of the log."""
    result: dict[str, Any] = {
        "samples": len(targets),
        "exits": list(costs.exit_depths),
        "macs": list(costs.macs),
        "macs_class_first": list(costs.class_first_macs or costs.macs),
        "macs_static": costs.static,
        "exit_accuracy": exit_accuracy(logits, targets),
    }
    if len(logits) > 1:
        steps = curve(logits, targets, costs.macs, static=costs.static, points=60).routed
        result["curve"] = [[round(point.cost, 5), round(point.accuracy, 5)] for point in steps]
        result["running_accuracy"] = exit_accuracy(running_mean(logits), targets)
    return result
