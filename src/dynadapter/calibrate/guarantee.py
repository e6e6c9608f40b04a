"""Find the cheapest policy whose expected loss against the last exit is bounded, from finitely many samples.

**The guarantee.** Assume that the samples are drawn independently from the distribution of future samples, and that
the network, the temperatures and the tested policies with their order were fixed without them. Then, with
probability at least ``confidence`` over the draw of these samples, the returned policy has

    P[a new sample of that distribution is lost] <= risk,

for any number of samples, any network and any distribution. A sample is lost where routing is wrong and the last exit,
by its own logits, is right; so the accuracy is at most ``risk`` below the last exit's. The guarantee does not cover a
single class or sample, nor another distribution.
Samples that stopped the training or selected the checkpoint violate the assumption, and so does a stratified split:
split at random.

**The method.** The policies are tested in their order, each at the full level 1 - ``confidence``, up to the first whose
test does not reject a risk above ``risk``; the one before it is returned. This fixed-sequence test needs no correction
for the number of policies, and the risk need not increase from one policy to the next. If none is certified, for
example because the samples are too few, the result is :class:`~dynadapter.exits.policies.Never`, whose risk is 0, with
a note.

Source: Jazbec et al. 2024, Fast yet safe: early-exiting with risk control (the application); Angelopoulos et al. 2021,
Learn then test (fixed-sequence testing); Bates et al. 2021, Distribution-free, risk-controlling prediction sets (the
same procedure, seen as an upper confidence bound that must stay below the risk).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dynadapter.calibrate.scores import exit_indices, thresholded
from dynadapter.calibrate.stacked import Calibrated, Stacked
from dynadapter.exits.policies import Confidence, Never, Patience, Policy


@lru_cache(maxsize=8)
def binomial_cdf(samples: int, p: float) -> Tensor:
    """Return P(X <= k) for k = 0 .. samples, X binomial with probability ``p`` in (0, 1): (samples + 1,) float64."""
    k = torch.arange(samples + 1, dtype=torch.float64)
    n = torch.tensor(float(samples), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().cumsum(0).clamp(max=1)


def p_value(lost: int, samples: int, limit: float) -> float:
    """Return the p-value of the hypothesis that a sample is lost with a probability of at least ``limit``.

    If it is, and the samples are independent, the p-value is at most ``a`` with probability at most ``a``, for every
    ``a`` and every number of samples: the exact test of Clopper and Pearson 1934.

    >>> p_value(0, 114, limit=0.02) <= 0.1  # 0.98 ** 114 = 0.09993
    True
    """
    return binomial_cdf(samples, limit)[lost].item()


def samples_needed(limit: float, level: float) -> int:
    """Return how many samples are needed to reject at a level when none is lost.

    >>> samples_needed(0.02, level=0.1)  # 0.98 ** 114 < 0.1 < 0.98 ** 113
    114
    """
    return math.ceil(math.log(level) / math.log1p(-limit))


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
    targets: Tensor,
    costs: Sequence[float] | Tensor,
    risk: float = 0.02,
    confidence: float = 0.9,
    *,
    kind: type[Policy] = Confidence,
    prediction: Policy | None = None,
    comparisons: int = 1,
    policies: Sequence[Policy] | None = None,
    static: float | None = None,
) -> Calibrated:
    """Find the cheapest policy whose risk against the last exit is certified to be at most ``risk`` (see the module).

    Args:
        logits: (exits, samples, classes).
        targets: (samples,).
        costs: (exits,), cumulative.
        risk: Greatest probability that a sample is lost, between 0 and 1; 0.02 are two percentage points.
        confidence: The probability that the guarantee holds, between 0 and 1.
        kind: A kind in :data:`~dynadapter.calibrate.ladder.KINDS`.
        prediction: Policy that gives temperatures, fitted on **other** samples, and combination; its thresholds are
            ignored.
        comparisons: Number of candidates tested on these samples; the error probability is divided by it.
        policies: The policies to test, from strict to lax, chosen on **other** samples; their temperatures and
            combination come from ``prediction``. None for :func:`candidates`.
        static: Cost of the static network; None for that of the last exit.

    Raises:
        ValueError: If arguments are out of range or do not fit.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:  # NaN fails as well
            raise ValueError(f"{name}={value} must be between 0 and 1, both excluded, e.g. risk 0.02, confidence 0.9")
    data, level = Stacked(logits, targets, costs, static, prediction), (1 - confidence) / comparisons
    if not data.labelled:
        raise ValueError("a guarantee needs targets; give the class of each sample")
    lost = data.right_last & ~data.right  # (exits, samples)
    tried = candidates(kind, data.exits) if policies is None else tuple(policies)
    chosen = "given policies" if policies is not None else kind.__name__.lower()
    method = f"{chosen}, lost at most {risk:g} with confidence {confidence:g}"
    found: tuple[Policy, float] | None = None
    for policy, exit_index in zip(tried, exit_indices(tried, data), strict=True):
        count = int(lost.gather(0, exit_index[None]).sum())
        if p_value(count, data.samples, risk) > level:
            break
        found = policy, count / data.samples
    if found:
        note = (
            f"with probability at least {confidence:g} over the draw of these {data.samples} samples, at most {risk:g} "
            f"of future samples are lost against the last exit; of these {found[1]:.4g} are"
        )
        return data.calibrated(found[0], method, note, risk=found[1])
    note = "no policy could be certified, so every sample takes the last exit"
    if data.samples < (needed := samples_needed(risk, level)):
        note += f": {data.samples} samples are too few, {needed} are needed even with no loss at all"
    return Stacked(logits, targets, costs, static).calibrated(Never(), method, note, risk=0.0)
