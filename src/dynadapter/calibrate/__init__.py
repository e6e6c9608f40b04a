"""Choose exits from stacked validation logits, for a cost, an accuracy drop or a guaranteed risk; compute the curve.

:func:`solve` does all of this for one :class:`Goal`. Everything here is a pure function of the logits of one pass over
validation data, and agrees exactly with :func:`dynadapter.exits.policies.route`. Common arguments:

- ``logits`` (exits, samples, classes) of data that the network was not trained on; the last exit is the full depth.
- ``targets`` (samples,) integer classes.
- ``costs`` (exits,): the cost up to each exit with all heads on the way, strictly increasing, in any unit; for example
  ``ExitCosts.macs`` of :func:`dynadapter.cost.exit_costs`.
- ``static``: the cost of the static network in the same unit (``ExitCosts.static``). Relative costs and budgets are
  fractions of it; None stands for the cost of the last exit.
- ``kind``: the class of policy to calibrate, one of :data:`KINDS`.
- ``prediction``: policy that gives temperatures and combination of exits; its thresholds are ignored. See
  :func:`dynadapter.exits.combining.predicting`; None uses the logits themselves.

A sample whose logits are not finite at an exit does not exit there. Such logits predict no class and count as wrong.
A threshold lies halfway between the scores of two samples, so that rounding differences between machines do not
change the decision.

    found = solve(logits, targets, costs.macs, Goal(cost=0.5), static=costs.static)
    print(found.found.policy, found.cross_fitted)
"""

from dynadapter.calibrate.choosing import AUTO, COMBINES, SEARCHES, Search
from dynadapter.calibrate.curves import Curve, Point, curve, curve_rows
from dynadapter.calibrate.goal import Goal
from dynadapter.calibrate.guarantee import candidates, with_guarantee
from dynadapter.calibrate.ladder import KINDS
from dynadapter.calibrate.solve import CrossFitted, Measured, Solution, policy_for, solve
from dynadapter.calibrate.stacked import Calibrated, Outcome, evaluate, split_folds
from dynadapter.exits.temperature import Scaled, fit_temperatures

__all__ = [
    "AUTO",
    "COMBINES",
    "KINDS",
    "SEARCHES",
    "Calibrated",
    "CrossFitted",
    "Curve",
    "Goal",
    "Measured",
    "Outcome",
    "Point",
    "Scaled",
    "Search",
    "Solution",
    "candidates",
    "curve",
    "curve_rows",
    "evaluate",
    "fit_temperatures",
    "policy_for",
    "solve",
    "split_folds",
    "with_guarantee",
]
