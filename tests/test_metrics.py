"""The metrics against a count by hand."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynadapter.training.metrics import ExitUse, SampleMean


@given(st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_shares_are_equal_for_any_batches(batches: list[list[int]]) -> None:
    use = ExitUse(exits=4)
    for batch in batches:
        use.update(torch.tensor(batch, dtype=torch.int64))
    counted = Counter(exit for batch in batches for exit in batch)
    assert use.compute().tolist() == pytest.approx([counted[k] / max(counted.total(), 1) for k in range(4)])


def test_counts_add_up_over_processes() -> None:
    parts = [ExitUse(exits=3) for _ in range(2)]
    parts[0].update(torch.tensor([0, 0, 2]))
    parts[1].update(torch.tensor([1]))
    assert all(
        part._reductions["counts"](torch.stack([p.counts for p in parts])).tolist() == [2, 1, 1] for part in parts
    )


def test_reset_and_forward() -> None:
    use = ExitUse(exits=2)
    assert use(torch.tensor([0, 0])).tolist() == [1, 0]
    assert use(torch.tensor([1, 1])).tolist() == [0, 1]
    assert use.compute().tolist() == [0.5, 0.5]
    use.reset()
    use.update(torch.tensor([1]))
    assert use.compute().tolist() == [0, 1]


@pytest.mark.parametrize("exits", [[3], [-1], [0, 1, 7]])
def test_unknown_exit_is_named(exits: list[int]) -> None:
    with pytest.raises(ValueError, match="exit_index must be from 0 to 2, got"):
        ExitUse(exits=3).update(torch.tensor(exits))


def test_zero_exits_are_refused() -> None:
    with pytest.raises(ValueError, match="exits=0 must be at least 1"):
        ExitUse(exits=0)


@given(st.lists(st.lists(st.floats(-10, 10), max_size=8), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_means_are_equal_for_any_batches(batches: list[list[float]]) -> None:
    mean, values = SampleMean(), [value for batch in batches for value in batch]
    for batch in batches:
        mean.update(torch.tensor(batch).mean(), len(batch))  # NaN for an empty batch
    assert float(mean.compute()) == pytest.approx(sum(values) / max(len(values), 1), abs=1e-5)


def test_mean_of_nonfinite_is_nonfinite() -> None:
    mean = SampleMean()
    mean.update(torch.tensor(1.0), 2)
    mean.update(torch.tensor(float("nan")), 2)
    assert mean.compute().isnan()
