"""P-values against scipy, and their error rate by simulation."""

import math

import pytest
import torch
from scipy import stats

from dynadapter.calibrate.guarantee import binomial_cdf, p_value, samples_needed


@pytest.mark.parametrize("samples", [1, 10, 137, 20000])
@pytest.mark.parametrize("p", [0.001, 0.02, 0.5, 0.97])
def test_binomial_cdf_is_scipys(samples, p):
    k = torch.arange(samples + 1)
    expected = torch.from_numpy(stats.binom.cdf(k.numpy(), samples, p))
    torch.testing.assert_close(binomial_cdf(samples, p), expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("limit", [0.05, 0.5])
@pytest.mark.parametrize("samples", [30, 400])
def test_false_rejections_are_within_level(limit, samples):
    """At the limit, where a test errs most."""
    draws = 4000
    lost = torch.rand(draws, samples, generator=torch.Generator().manual_seed(1)) < limit
    p = torch.tensor([p_value(count, samples, limit) for count in lost.sum(1).tolist()])
    for level in (0.1, 0.02):
        rejected = (p <= level).double().mean().item()
        assert rejected <= level + 3 * math.sqrt(level * (1 - level) / draws)


@pytest.mark.parametrize(("limit", "level"), [(0.02, 0.1), (0.05, 0.05), (0.3, 0.2)])
def test_samples_needed_is_the_smallest(limit, level):
    needed = samples_needed(limit, level)
    assert p_value(0, needed, limit) <= level < p_value(0, needed - 1, limit)
