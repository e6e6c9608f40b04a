"""Show a solution as a table, as plain data, and as a figure."""

from collections.abc import Sequence
from typing import Any, BinaryIO

from rich.table import Table

from dynadapter.calibrate.solve import Solution
from dynadapter.exits.combining import decision
from dynadapter.exits.policies import Patience, Policy, Thresholded
from dynadapter.exits.temperature import Scaled
from dynadapter.spec import plain


def thresholds(policy: Policy, exits: int) -> list[float | None]:
    """Return the threshold of a policy at each exit, or the exits that must agree; None at exits without one."""
    policy = decision(policy)
    if isinstance(policy, Thresholded):
        return [*(policy.threshold_at(k) for k in range(exits - 1)), None]
    if isinstance(policy, Patience):
        return [*[float(policy.patience)] * (exits - 1), None]
    return [None] * exits


def temperatures(policy: Policy, exits: int) -> tuple[float, ...]:
    """Return the temperature of each exit; 1 if the policy has none."""
    given = policy.temperatures if isinstance(policy, Scaled) else 1.0
    return given if isinstance(given, tuple) else (given,) * exits


def solution_table(solution: Solution, exit_depths: Sequence[int], title: str) -> Table:
    """Create a table of both measurements: cost, accuracy, and each exit's share, threshold and temperature."""
    both = solution.calibration, solution.cross_fitted
    table = Table(title=title)
    table.add_column("")
    for name in ("calibration images", "cross-fitted", "threshold", "temperature"):
        table.add_column(name, justify="right")
    table.add_row("images", *(str(one.samples) for one in both))
    table.add_row("cost, % of static", *(f"{one.cost:.2%}" for one in both))
    crossed = solution.cross_fitted
    low, high = crossed.accuracy_interval
    measure = solution.goal.measure
    table.add_row(measure, *(f"{one.accuracy:.2%}" for one in both))
    table.add_row("its interval of 95 %", "", f"{low:.2%} to {high:.2%}")
    table.add_row(f"{measure} of the last exit", *(f"{one.accuracy_last_exit:.2%}" for one in both))
    if solution.goal.reference:
        table.add_row(f"{measure} of the reference", *(f"{one.accuracy_reference:.2%}" for one in both))
    low, high = (100 * end for end in crossed.difference_interval)
    gains = (100 * (one.accuracy - one.accuracy_reference) for one in both)
    against = "the reference" if solution.goal.reference else "the last exit"
    table.add_row(f"points above {against}", *(f"{gain:+.2f}" for gain in gains))
    table.add_row("their interval of 95 %", "", f"{low:+.2f} to {high:+.2f}")
    table.add_row("lost against the last exit", *(f"{one.lost:.2%}" for one in both), end_section=True)
    by_exit = thresholds(solution.found.policy, len(exit_depths))
    heats = temperatures(solution.found.policy, len(exit_depths))
    for k, (depth, threshold) in enumerate(zip(exit_depths, by_exit, strict=True)):
        shares = [f"{one.shares[k]:.1%}" for one in both]
        shown = "" if threshold is None else f"{threshold:.4g}"
        table.add_row(f"exit {k + 1}, after block {depth}", *shares, shown, f"{heats[k]:.3f}")
    return table


def solution_data(solution: Solution) -> dict[str, Any]:
    """Return the solution as plain data for JSON, without the curve."""
    found, exits = solution.found, len(solution.found.shares)
    data: dict[str, Any] = plain(
        {
            "goal": solution.goal.given,
            "policy": found.policy,
            "thresholds": thresholds(found.policy, exits),
            "temperatures": temperatures(found.policy, exits),
            "method": found.method,
            "notes": solution.notes,
            "calibration": solution.calibration,
            "cross_fitted": solution.cross_fitted,
            "samples": solution.calibration.samples,
            "nonfinite": solution.nonfinite,
            "protocol": solution.protocol,
        }
    )
    return data


def measured_data(solution: Solution, split: str, data: str) -> dict[str, Any]:
    """Return the measured accuracy and cost for a bundle, as plain data.

    They are cross-fitted. Exit shares and confidence are those of the policy itself on all samples, because a server
    compares them with its own.
    """
    crossed = solution.cross_fitted
    in_words = {  # a list of two numbers would look like one for each of two exits
        "accuracy_interval": "{:.1%} to {:.1%}, at 95 %".format(*crossed.accuracy_interval),
        "difference_interval": "{:+.1%} to {:+.1%}, at 95 %".format(*crossed.difference_interval),
    }
    own = {name: getattr(solution.calibration, name) for name in ("shares", "confidence", "confidence_deviation")}
    measured = plain(crossed) | plain(own) | in_words
    if solution.goal.balanced:
        measured = {f"balanced_{name}" if name.startswith("accuracy") else name: measured[name] for name in measured}
    return {
        "data": data,
        "split": split,
        **measured,
        "goal": str(solution.goal),
        "protocol": f"{solution.protocol}; exit shares and confidence are those of the policy itself on all images",
        **({"notes": "; ".join(solution.notes)} if solution.notes else {}),
    }


def cap_accuracy(axes: Any, full: float = 1.0) -> None:
    """End an axis of accuracy just above 100 %, which is ``full``, so that markers there stay whole."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, full + 0.05 * (full - low)))


def draw_curve(file: BinaryIO, solution: Solution, title: str) -> None:
    """Draw accuracy against cost on the calibration images, and the cross-fitted result."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for points, style, label in (
        (solution.curve.routed, "-", "routed"),
        (solution.curve.anytime, "o--", "all at one exit"),
        ([solution.cross_fitted], "*", "calibrated, cross-fitted"),
    ):
        x, y = [100 * point.cost for point in points], [100 * point.accuracy for point in points]
        axes.plot(x, y, style, label=label, markersize=14 if style == "*" else None)
    axes.set(xlabel="cost in % of static", ylabel=f"{solution.goal.measure} in %", title=title)
    cap_accuracy(axes, 100)
    axes.legend()
    figure.savefig(file, dpi=150, format="png")
