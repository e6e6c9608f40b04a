"""Test whether an expected loss is below a limit; valid for every finite number of independent losses."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Bound = Literal["binomial", "betting", "hoeffding_bentkus"]


def p_value(losses: Tensor, limit: float, level: float, bound: Bound = "betting") -> Tensor:
    """Compute p-values of the hypothesis that the expected loss is at least ``limit``.

    The losses must be drawn independently from one distribution. If its mean is ``limit`` or more, a p-value is at most
    ``a`` with probability at most ``a``, for every ``a`` and every number of samples.

    - ``binomial``: exact, for losses that are 0 or 1 (Clopper and Pearson 1934).
    - ``hoeffding_bentkus``: for losses in [0, 1] (Bates et al. 2021, section 3.1; Angelopoulos et al. 2021).
    - ``betting``: for losses in [0, 1], much sharper if their variance is small: the inverse of the greatest wealth of
      a betting process that bets, sample by sample, on losses below the limit, with stakes from the samples before
      (Waudby-Smith and Ramdas 2024, predictable plug-in bets, one-sided). The samples are first shuffled by a fixed
      permutation, because they often come sorted by class.

    >>> p_value(torch.zeros(114), limit=0.02, level=0.1, bound="binomial") <= 0.1  # 0.98 ** 114 = 0.09993
    tensor(True)

    Args:
        losses: (..., samples) in [0, 1].
        limit: Between 0 and 1.
        level: The intended level of the test; only ``betting`` uses it, for the size of its bets.
        bound: The test.

    Returns:
        (...), float64, in [0, 1].

    Raises:
        ValueError: If an argument is out of range, or the bound does not allow these losses.
    """
    if not 0 < limit < 1:
        raise ValueError(f"limit={limit} must be between 0 and 1, both excluded")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1, both excluded")
    if not losses.ndim or not losses.shape[-1]:
        raise ValueError(f"losses have shape {tuple(losses.shape)}; give (..., samples) with at least one sample")
    if not ((losses >= 0) & (losses <= 1)).all():  # NaN fails as well
        raise ValueError("losses must lie in [0, 1]; map others there first, the limit likewise")
    if bound not in _TESTS:
        raise ValueError(f"bound={bound!r} is not known; choose one of {list(_TESTS)}")
    return _TESTS[bound](losses.double(), limit, level)


def _binomial(losses: Tensor, limit: float, level: float) -> Tensor:
    if not ((losses == 0) | (losses == 1)).all():
        raise ValueError("bound='binomial' needs losses that are 0 or 1; use 'betting' for losses in [0, 1]")
    return binomial_cdf(losses.shape[-1], limit).to(losses.device)[losses.sum(-1).long()]


def _hoeffding_bentkus(losses: Tensor, limit: float, level: float) -> Tensor:
    n, mean = losses.shape[-1], losses.mean(-1)
    a = mean.clamp(max=limit)
    divergence = torch.xlogy(a, a / limit) + torch.xlogy(1 - a, (1 - a) / (1 - limit))
    hoeffding = (-n * divergence).exp()
    # Rounding must not turn a sum of 7 into 8.
    bentkus = math.e * binomial_cdf(n, limit).to(losses.device)[(losses.sum(-1) - 1e-9).ceil().clamp(min=0).long()]
    return torch.minimum(hoeffding, bentkus).clamp(max=1)


def _betting(losses: Tensor, limit: float, level: float) -> Tensor:
    samples = losses.shape[-1]
    shuffled = losses[..., torch.randperm(samples, generator=torch.Generator().manual_seed(0)).to(losses.device)]
    seen = torch.arange(1, samples + 1, dtype=torch.float64, device=losses.device)
    mean = (0.5 + shuffled.cumsum(-1)) / (seen + 1)
    variance = (0.25 + (shuffled - mean).square().cumsum(-1)) / (seen + 1)
    before = torch.cat(
        [torch.full_like(variance[..., :1], 0.25), variance[..., :-1]], -1
    )  # a bet depends on the past only
    bet = (2 * math.log(1 / level) / (samples * before)).sqrt()
    # A lost bet leaves at least 1 % of the capital. Apart from this cap, bets do not depend on the limit, so the
    # capital rises with the limit and the p-value falls.
    bet = bet.clamp(max=0.99 / (1 - limit))
    capital = torch.log1p(bet * (limit - shuffled)).cumsum(-1)
    # A run of small losses at the start could reject a limit that is below the mean of these very losses. That keeps
    # the error rate, but contradicts the data.
    return torch.where(losses.mean(-1) < limit, (-capital.amax(-1)).exp().clamp(max=1), 1.0)


_TESTS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "binomial": _binomial,
    "betting": _betting,
    "hoeffding_bentkus": _hoeffding_bentkus,
}


@lru_cache(maxsize=8)
def binomial_cdf(samples: int, p: float) -> Tensor:
    """Return P(X <= k) for k = 0 .. samples, X binomial with probability ``p`` in (0, 1): (samples + 1,) float64."""
    k = torch.arange(samples + 1, dtype=torch.float64)
    n = torch.tensor(float(samples), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().cumsum(0).clamp(max=1)


def upper_bound(losses: Tensor, confidence: float, bound: Bound = "betting") -> float:
    """Return an upper bound that the expected loss exceeds with probability at most 1 - ``confidence``.

    It is the greatest limit that :func:`p_value` does not reject at level 1 - ``confidence``; with ``binomial``, the
    one-sided Clopper-Pearson bound. It holds for one policy fixed before these losses were drawn.

    Args:
        losses: (samples,) in [0, 1].
        confidence: Between 0 and 1.
        bound: The test.

    Raises:
        ValueError: See :func:`p_value`.
    """
    level = 1 - confidence
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if p_value(losses, middle, level, bound).item() <= level:
            high = middle
        else:
            low = middle
    return high


def samples_needed(limit: float, level: float, bound: Bound = "betting", loss: float = 0.0) -> int:
    """Return how many samples are needed to reject when every loss equals ``loss``.

    >>> samples_needed(0.02, level=0.1, bound="binomial")  # 0.98 ** 114 < 0.1 < 0.98 ** 113
    114

    Args:
        limit: The expected loss to stay below, between ``loss`` and 1.
        level: The level of the test.
        bound: The test.
        loss: The smallest possible loss, in [0, limit).

    Raises:
        ValueError: If ``loss`` is not below the limit, so that no number of samples is enough.
    """
    if not 0 <= loss < limit:
        raise ValueError(
            f"loss={loss} must be at least 0 and below limit={limit}; otherwise no number of samples is enough"
        )

    def enough(samples: int) -> bool:
        return bool(p_value(torch.full((samples,), loss, dtype=torch.float64), limit, level, bound) <= level)

    high = 1
    while not enough(high):
        high *= 2
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
