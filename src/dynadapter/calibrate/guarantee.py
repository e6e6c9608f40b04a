"""Settings whose risk against the last exit is certified from a finite number of samples."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.risk import Bound, p_value, samples_needed, upper_bound
from dynadapter.calibrate.scores import RULES, Scores, thresholded
from dynadapter.calibrate.stacked import Calibrated, Stacked
from dynadapter.exits.policies import Confidence, Never, Patience, Policy, Thresholded, route

Loss = Literal["lost", "accuracy_gap", "inconsistency"]


def losses(policy: Policy, logits: Tensor, targets: Tensor | None, loss: Loss = "lost") -> Tensor:
    """Says what routing costs each sample against the last exit.

    - ``lost``: 1 where the last exit is right and routing is wrong, else 0.
    - ``accuracy_gap``: 1 where only the last exit is right, -1 where only routing is, else 0; its mean is the drop in
      accuracy.
    - ``inconsistency``: 1 where routing predicts another class than the last exit, else 0; needs no targets.

    For every sample accuracy_gap <= lost <= inconsistency.

    Args:
        policy: Ready to route these logits.
        logits: (exits, samples, classes).
        targets: (samples,), or None for ``inconsistency``.
        loss: Which loss.

    Returns:
        (samples,), float64.
    """
    data = Stacked(logits, targets, costs=range(1, len(logits) + 1))
    return _table(data, loss).gather(0, route(policy, data.logits)[None])[0]


def _table(data: Stacked, loss: str) -> Tensor:
    """What it would cost each sample to leave at each exit: (exits, samples) float64."""
    if loss == "inconsistency":
        return (data.predictions != data.predictions[-1]).double()
    if loss not in ("lost", "accuracy_gap"):
        raise ValueError(f"loss={loss!r} is not known; choose 'lost', 'accuracy_gap' or 'inconsistency'")
    if not data.labelled:
        raise ValueError(f"loss={loss!r} needs targets; without them use 'inconsistency'")
    gap = data.right[-1].double() - data.right.double()
    return gap.clamp(min=0) if loss == "lost" else gap


class _Scale(NamedTuple):
    """How a loss becomes one in [0, 1]: ``(loss - least) / (1 - least)``; and the test that suits it best."""

    least: float
    bound: Bound


_SCALES = {"lost": _Scale(0, "binomial"), "accuracy_gap": _Scale(-1, "betting"), "inconsistency": _Scale(0, "binomial")}


class Risk(NamedTuple):
    """Mean loss on some samples, and what the expected loss exceeds with probability 1 - confidence at most."""

    mean: float
    upper: float


def measured_risk(
    policy: Policy,
    logits: Tensor,
    targets: Tensor | None,
    *,
    loss: Loss = "lost",
    confidence: float = 0.9,
    bound: Bound | None = None,
) -> Risk:
    """Measures the risk of a policy on held-out samples that had no part in choosing it.

    Args:
        policy: Ready to route these logits.
        logits: (exits, samples, classes).
        targets: (samples,), or None for ``inconsistency``.
        loss: See :func:`losses`.
        confidence: Of the upper bound, between 0 and 1.
        bound: See :func:`dynadapter.calibrate.risk.p_value`; the default is exact for a loss of 0 or 1, and betting
        else.
    """
    values = losses(policy, logits, targets, loss)
    least, best = _SCALES[loss]
    upper = upper_bound((values - least) / (1 - least), confidence, bound or best)
    return Risk(values.mean().item(), upper * (1 - least) + least)


def candidates(kind: type[Policy], exits: int) -> tuple[Policy, ...]:
    """Gives the settings of a kind that :func:`with_guarantee` tests by default, from strict to lax.

    They are fixed beforehand, as the guarantee wants it: every patience, or shared thresholds whose odds fall by 10 %
    from one to the next, from 0.9999999 down to everybody leaves. The grid is ours.
    """
    if kind is Patience:
        return tuple(Patience(patience) for patience in range(exits - 1, 0, -1))
    known = thresholded(kind)
    values = [1.0, *torch.linspace(16, -4, 201, dtype=torch.float64).sigmoid().tolist(), 0.0]
    return tuple(known(value if RULES[kind].sign > 0 else 1 - value) for value in values)


def with_guarantee(
    logits: Tensor,
    targets: Tensor | None,
    costs: Sequence[float] | Tensor,
    risk: float = 0.02,
    confidence: float = 0.9,
    *,
    kind: type[Policy] = Confidence,
    loss: Loss = "lost",
    bound: Bound | None = None,
    temperatures: Sequence[float] | None = None,
    settings: Sequence[Policy] | None = None,
    full: float | None = None,
) -> Calibrated:
    """Finds the laxest setting whose risk against the last exit is certified to be at most ``risk``.

    **What is guaranteed.** Let the samples be drawn independently from the distribution that the network will meet, and
    let the network, the temperatures and the settings with their order have been fixed without them. Then, with
    probability at least ``confidence`` over the draw of these samples, the returned policy has

        E[loss on a new sample of that distribution] <= risk,

    for any number of samples, any network and any distribution. The loss is defined in :func:`losses`: with ``lost``,
    at most a share ``risk`` of all samples is answered wrongly by routing and rightly by the last exit, and so the
    accuracy is at most ``risk`` below the last exit's too. Nothing is said of a single class or sample, or after the
    distribution has moved. Samples that stopped the training or picked the checkpoint weaken the premise, and so does a
    stratified split: halve at random for this.

    **How.** The settings are tested in their order, each at the full level 1 - ``confidence``, up to the first whose
    risk cannot be told from more than ``risk``; the one before it is returned. This fixed-sequence test needs neither a
    correction for the number of settings nor a risk that grows from one to the next. Where nothing is certified, e.g.
    because the samples are too few, the result is the full depth, :class:`~dynadapter.exits.policies.Never`, whose risk
    is 0, and a note says so.

    Args:
        logits: (exits, samples, classes).
        targets: (samples,); None for ``inconsistency``.
        costs: (exits,), cumulative.
        risk: Greatest expected loss, between 0 and 1; 0.02 are two percentage points.
        confidence: The probability that the promise holds, between 0 and 1.
        kind: Confidence, Entropy, Margin or Patience.
        loss: What is bounded.
        bound: The test; see :func:`dynadapter.calibrate.risk.p_value`. The default is exact ("binomial") for a loss of
            0 or 1 and "betting" for the accuracy gap.
        temperatures: (exits,), fitted on **other** samples, or none.
        settings: What to test instead of :func:`candidates`, strict to lax, without temperatures; e.g. thresholds per
            exit that were found on **other** samples.
        full: Cost of the full backbone.

    Raises:
        ValueError: If arguments are out of range or do not fit.

    Source: Jazbec et al. 2024, Fast yet safe: early-exiting with risk control (the application; its performance gap and
    consistency risks are ``accuracy_gap`` and ``inconsistency``); Angelopoulos et al. 2021, Learn then test
    (fixed-sequence testing); Bates et al. 2021, Distribution-free, risk-controlling prediction sets (the same
    procedure, seen as an upper confidence bound that must stay below the risk).
    """
    for name, given in (("risk", risk), ("confidence", confidence)):
        if not 0 < given < 1:  # NaN fails as well
            raise ValueError(f"{name}={given} must be between 0 and 1, both excluded, e.g. risk 0.02, confidence 0.9")
    data = Stacked(logits, targets, costs, full, temperatures)
    table = _table(data, loss)
    least, best = _SCALES[loss]
    limit, level, bound = (risk - least) / (1 - least), 1 - confidence, bound or best
    tried = candidates(kind, data.exits) if settings is None else tuple(settings)
    chosen = "given settings" if settings is not None else kind.__name__.lower()
    method = f"{chosen}, {loss} at most {risk:g} with confidence {confidence:g}"

    found: tuple[Policy, float] | None = None
    for setting, taken in zip(tried, _taken(tried, data), strict=True):
        suffered = table.gather(0, taken[None])[0]
        if p_value((suffered - least) / (1 - least), limit, level, bound) > level:
            break
        found = setting, suffered.mean().item()
    if found:
        note = (
            f"with probability at least {confidence:g} over the draw of these {data.samples} samples, the expected "
            f"loss ({loss}) against the last exit is at most {risk:g}; its mean on them is {found[1]:.4g}"
        )
        return data.calibrated(found[0], method, note, risk=found[1])
    note = "nothing could be certified, so every sample goes the full depth"
    needed = samples_needed(limit, level, bound, loss=-least / (1 - least))
    if data.samples < needed:
        note += f": {data.samples} samples are too few, {needed} are needed even if routing never errs"
    return data.calibrated(Never(), method, note, risk=0.0)


def _taken(policies: Sequence[Policy], data: Stacked) -> Iterator[Tensor]:
    """Gives for each policy the exits (samples,) at which the samples leave; a kind's scores are computed once."""
    scores: dict[type[Policy], Scores] = {}
    for policy in policies:
        kind = type(policy)
        if kind in RULES and isinstance(policy, Thresholded):
            policy.check(data.exits)
            scores[kind] = scores.get(kind) or Scores(kind, data)
            yield scores[kind].taken(scores[kind].cuts(policy))
        else:
            yield route(data.complete(policy), data.logits)
