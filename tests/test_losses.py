"""The joint loss against the formula of cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from dynadapter.training.losses import exit_losses, joint_loss


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_equal_the_formula(logits, targets, smoothing: float) -> None:
    soft = F.one_hot(targets, 5) * (1 - smoothing) + smoothing / 5
    by_hand = -(soft * logits.log_softmax(-1)).sum(-1).mean(-1)
    torch.testing.assert_close(exit_losses(logits, targets, smoothing), by_hand)
    torch.testing.assert_close(exit_losses(logits, F.one_hot(targets, 5).float(), smoothing), by_hand)
    torch.testing.assert_close(exit_losses(logits, soft), by_hand)


def test_joint_is_the_weighted_sum(logits, targets) -> None:
    weights = torch.tensor([0.2, 0.5, 0.3])
    one_by_one = [F.cross_entropy(one, targets) for one in logits]
    expected = 0.2 * one_by_one[0] + 0.5 * one_by_one[1] + 0.3 * one_by_one[2]
    torch.testing.assert_close(joint_loss(logits, targets, weights), expected)


def test_weight_zero_stays_in_the_graph(logits, targets) -> None:
    exits = [one.detach().requires_grad_() for one in logits]
    joint_loss(torch.stack(exits), targets, torch.tensor([0.0, 1.0, 0.0])).backward()
    assert [one.grad is not None for one in exits] == [True] * 3
    assert [bool(one.grad.any()) for one in exits] == [False, True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(logits, targets, dtype: torch.dtype) -> None:
    half = logits.detach().to(dtype)
    assert torch.equal(exit_losses(half, targets), exit_losses(half.float(), targets))
    assert exit_losses(half.double(), targets).dtype == torch.float64


@pytest.mark.parametrize("shape", [(5,), (6, 4), (3, 6), ()])
def test_targets_of_a_wrong_shape(logits, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"targets .* do not fit logits \(3, 6, 5\)") as error:
        exit_losses(logits, torch.zeros(shape, dtype=torch.int64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1,), (4,), ()])
def test_weights_of_a_wrong_shape(logits, targets, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights .* must be one per exit: \(3,\)"):
        joint_loss(logits, targets, torch.ones(shape))
