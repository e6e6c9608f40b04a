"""Thresholds from stacked validation logits: to a cost, to an accuracy drop, with a guarantee; and the whole curve.

Everything here is a pure function of the logits of one pass over validation data, and agrees exactly with
:func:`dynadapter.exits.policies.route` on them. What the functions share:

- ``logits`` (exits, samples, classes) of data that the network was not trained on; the last exit is the full depth.
- ``targets`` (samples,) integer classes.
- ``costs`` (exits,): what leaving at each exit costs, cumulative, the heads passed on the way included, strictly
  rising, in any unit; :class:`dynadapter.cost.ExitCosts` has them in multiply-adds as ``macs``.
- ``full``: the cost of the backbone alone in the same unit (``ExitCosts.backbone``), the 1 of every relative cost; the
  default is the cost of the last exit.
- ``kind``: the class of policy to calibrate, one of :data:`KINDS`.
- ``temperatures``: one per exit, from :func:`fit_temperatures`; none leaves the logits as they are.

A sample whose logits are not finite at an exit does not leave there. A row that holds NaN predicts nothing and counts
as wrong. A threshold between the scores of two samples lies in their middle, so that a score whose last bit differs on
another machine decides alike.

    temperatures = fit_temperatures(logits[:, fit], targets[fit])
    found = to_cost(logits[:, fit], targets[fit], costs.macs, 0.5, temperatures=temperatures, full=costs.backbone)
    print(evaluate(found.policy, logits[:, held_out], targets[held_out], costs.macs, full=costs.backbone))
"""

from dynadapter.calibrate.curves import Curve, Point, curve
from dynadapter.calibrate.goals import Search, geometric_shares, to_accuracy_drop, to_cost
from dynadapter.calibrate.guarantee import Loss, Risk, candidates, losses, measured_risk, with_guarantee
from dynadapter.calibrate.ladder import KINDS
from dynadapter.calibrate.stacked import Calibrated, Outcome, evaluate, split_halves
from dynadapter.exits.temperature import Scaled, fit_temperatures

__all__ = [
    "KINDS",
    "Calibrated",
    "Curve",
    "Loss",
    "Outcome",
    "Point",
    "Risk",
    "Scaled",
    "Search",
    "candidates",
    "curve",
    "evaluate",
    "fit_temperatures",
    "geometric_shares",
    "losses",
    "measured_risk",
    "split_halves",
    "to_accuracy_drop",
    "to_cost",
    "with_guarantee",
]
