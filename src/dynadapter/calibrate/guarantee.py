"""Find the cheapest policy whose expected loss against the last exit is bounded, from finitely many samples.

**The guarantee.** Assume that the samples are drawn independently from the distribution of future samples, and that
the network, the temperatures and the tested policies with their order were fixed without them. Then, with
probability at least ``confidence`` over the draw of these samples, the returned policy has

    E[loss on a new sample of that distribution] <= risk,

for any number of samples, any network and any distribution. :func:`losses` defines the loss. With ``lost``, routing
is wrong where the last exit is right on at most a fraction ``risk`` of all samples, so the accuracy is at most
``risk`` below the last exit's. The guarantee does not cover a single class or sample, nor another distribution.
Samples that stopped the training or selected the checkpoint violate the assumption, and so does a stratified split:
split at random.

**The method.** The policies are tested in their order, each at the full level 1 - ``confidence``, up to the first whose
test does not reject a risk above ``risk``; the one before it is returned. This fixed-sequence test needs no correction
for the number of policies, and the risk need not increase from one policy to the next. If none is certified, for
example because the samples are too few, the result is :class:`~dynadapter.exits.policies.Never`, whose risk is 0, with
a note.

Source: Jazbec et al. 2024, Fast yet safe: early-exiting with risk control (the application; its performance gap and
consistency risks are ``accuracy_gap`` and ``inconsistency``); Angelopoulos et al. 2021, Learn then test
(fixed-sequence testing); Bates et al. 2021, Distribution-free, risk-controlling prediction sets (the same
procedure, seen as an upper confidence bound that must stay below the risk).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dynadapter.calibrate.risk import Bound, p_value, samples_needed, upper_bound
from dynadapter.calibrate.scores import exit_indices, thresholded
from dynadapter.calibrate.stacked import Calibrated, Stacked
from dynadapter.exits.policies import Confidence, Never, Patience, Policy, route

Loss = Literal["lost", "accuracy_gap", "inconsistency"]


def losses(policy: Policy, logits: Tensor, targets: Tensor | None, loss: Loss = "lost") -> Tensor:
    """Compute the loss of routing against the last exit, by its own logits, sample by sample.

    - ``lost``: 1 where the last exit is right and routing is wrong, else 0.
    - ``accuracy_gap``: 1 where only the last exit is right, -1 where only routing is, else 0; its mean is the drop in
      accuracy.
    - ``inconsistency``: 1 where routing predicts another class than the last exit, else 0; needs no targets.

    For every sample accuracy_gap <= lost <= inconsistency.

    Args:
        policy: Routes these logits.
        logits: (exits, samples, classes).
        targets: (samples,), or None for ``inconsistency``.
        loss: Which loss.

    Returns:
        (samples,), float64.
    """
    data = Stacked(logits, targets, range(1, len(logits) + 1), view=policy)
    return losses_by_exit(data, loss).gather(0, route(policy, data.logits)[None])[0]


def losses_by_exit(data: Stacked, loss: str) -> Tensor:
    """Return the loss of each sample at each exit, (exits, samples) float64."""
    if loss == "inconsistency":
        return (data.predictions != data.last).double()
    if loss not in ("lost", "accuracy_gap"):
        raise ValueError(f"loss={loss!r} is not known; choose 'lost', 'accuracy_gap' or 'inconsistency'")
    if not data.labelled:
        raise ValueError(f"loss={loss!r} needs targets; without them use 'inconsistency'")
    gap = data.right_last.double() - data.right.double()
    return gap.clamp(min=0) if loss == "lost" else gap


class _Scale(NamedTuple):
    """How a loss is mapped to [0, 1], as ``(loss - least) / (1 - least)``, and the default test for it."""

    least: float
    bound: Bound


_SCALES = {"lost": _Scale(0, "binomial"), "accuracy_gap": _Scale(-1, "betting"), "inconsistency": _Scale(0, "binomial")}


class Risk(NamedTuple):
    """The mean loss on a set of samples, and an upper bound of the expected loss."""

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
    """Measure the risk of a policy on held-out samples, which were not used to choose it.

    Args:
        policy: Routes these logits.
        logits: (exits, samples, classes).
        targets: (samples,), or None for ``inconsistency``.
        loss: See :func:`losses`.
        confidence: Probability that the upper bound holds, between 0 and 1.
        bound: See :func:`dynadapter.calibrate.risk.p_value`; None for the exact test of a loss of 0 or 1, and for
            betting otherwise.
    """
    values = losses(policy, logits, targets, loss)
    least, best = _SCALES[loss]
    upper = upper_bound((values - least) / (1 - least), confidence, bound or best)
    return Risk(values.mean().item(), upper * (1 - least) + least)


def candidates(kind: type[Policy], exits: int) -> tuple[Policy, ...]:
    """Return the policies of a kind that :func:`with_guarantee` tests by default, from strict to lax.

    The guarantee needs them fixed beforehand: every patience, or 203 shared thresholds from 0.9999999 down to 0, where
    all samples exit at exit 1; their odds fall by 10 % from one to the next.
    """
    if kind is Patience:
        return tuple(Patience(patience) for patience in range(exits - 1, 0, -1))
    known = thresholded(kind)
    values = [1.0, *torch.linspace(16, -4, 201, dtype=torch.float64).sigmoid().tolist(), 0.0]
    return tuple(known(value if known.certain_above else 1 - value) for value in values)


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
    view: Policy | None = None,
    ways: int = 1,
    policies: Sequence[Policy] | None = None,
    static: float | None = None,
) -> Calibrated:
    """Find the cheapest policy whose risk against the last exit is certified to be at most ``risk`` (see the module).

    Args:
        logits: (exits, samples, classes).
        targets: (samples,); None for ``inconsistency``.
        costs: (exits,), cumulative.
        risk: Greatest expected loss, between 0 and 1; 0.02 are two percentage points.
        confidence: The probability that the guarantee holds, between 0 and 1.
        kind: Confidence, Entropy, Margin or Patience.
        loss: The bounded loss; see :func:`losses`.
        bound: See :func:`measured_risk`.
        view: A policy whose temperatures, fitted on **other** samples, and combination of exits are applied.
        ways: Number of views or kinds that are tried on these samples to choose one; they share the error probability.
        policies: The policies to test, from strict to lax, chosen on **other** samples; their temperatures and
            combination come from ``view``. None for :func:`candidates`.
        static: Cost of the static network; None for that of the last exit.

    Raises:
        ValueError: If arguments are out of range or do not fit.
    """
    _check_shares(risk=risk, confidence=confidence)
    data = Stacked(logits, targets, costs, static, view)
    loss_by_exit = losses_by_exit(data, loss)
    least, best = _SCALES[loss]
    limit, level, bound = (risk - least) / (1 - least), (1 - confidence) / ways, bound or best
    tried = candidates(kind, data.exits) if policies is None else tuple(policies)
    chosen = "given policies" if policies is not None else kind.__name__.lower()
    method = f"{chosen}, {loss} at most {risk:g} with confidence {confidence:g}"
    found: tuple[Policy, float] | None = None
    for policy, exit_index in zip(tried, exit_indices(tried, data), strict=True):
        sample_losses = loss_by_exit.gather(0, exit_index[None])[0]
        if p_value((sample_losses - least) / (1 - least), limit, level, bound) > level:
            break
        found = policy, sample_losses.mean().item()
    if found:
        note = (
            f"with probability at least {confidence:g} over the draw of these {data.samples} samples, the expected "
            f"loss ({loss}) against the last exit is at most {risk:g}; its mean on them is {found[1]:.4g}"
        )
        return data.calibrated(found[0], method, note, risk=found[1])
    note = "no policy could be certified, so every sample takes the last exit"
    note += _too_few(data.samples, samples_needed(limit, level, bound, loss=-least / (1 - least)))
    return Stacked(logits, targets, costs, static).calibrated(Never(), method, note, risk=0.0)


def _check_shares(**given: float) -> None:
    for name, value in given.items():
        if not 0 < value < 1:  # NaN fails as well
            raise ValueError(f"{name}={value} must be between 0 and 1, both excluded, e.g. risk 0.02, confidence 0.9")


def _too_few(samples: int, needed: int) -> str:
    if samples >= needed:
        return ""
    return f": {samples} samples are too few, {needed} are needed even with no loss at all"
