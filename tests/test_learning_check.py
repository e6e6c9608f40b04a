"""LearningCheck: a training whose loss did not fall is named, also when it was interrupted."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from dynadapter.training.callbacks import LearningCheck
from dynadapter.training.callbacks.learning_check import LEAST_EPOCHS


def train(check: LearningCheck, losses: list[float], steps: int = 3) -> LearningCheck:
    """Give the check epochs of three steps around a mean loss of the last exit; the first exit's loss falls."""
    for epoch, loss in enumerate(losses):
        for step in range(steps):
            noted = torch.tensor([5.0 - epoch, loss + 0.1 * (step - (steps - 1) / 2)]), torch.tensor(True)
            check.on_train_batch_end(None, SimpleNamespace(step_losses=noted), None, None, step)
        check.on_train_epoch_end(None, None)
    return check


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ([1.8, 1.2, 1.9, 1.8, 1.8], True),
        ([1.8, 1.2, 1.9, 1.8, 1.79], False),
        ([1.8, 1.8, 1.8, 1.8], False),  # too few epochs to check
        ([1.8, float("inf"), 1.0, 0.9, 0.8], False),  # FiniteCheck is there for that
    ],
)
def test_loss_that_did_not_fall_is_named(losses, named):
    finding = train(LearningCheck(), losses).finding
    assert (finding is not None) == named
    if finding is not None:
        assert "1.800 in the last epoch, and was 1.800 in the first" in finding


def test_warning_at_the_end():
    check = train(LearningCheck(), [1.0] * (LEAST_EPOCHS - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check.on_train_end(None, None)
    train(check, [2.0])
    with pytest.warns(UserWarning, match="the training learned nothing"):
        check.on_train_end(None, None)


def test_resumed_within_an_epoch():
    """A state saved after one step of the third epoch goes on to the same means."""
    whole = train(LearningCheck(), [1.8, 1.5, 1.4, 1.9, 2.0])
    first = train(LearningCheck(), [1.8, 1.5])
    for step in range(3):
        noted = torch.tensor([0.0, 1.4 + 0.1 * (step - 1)]), torch.tensor(True)
        first.on_train_batch_end(None, SimpleNamespace(step_losses=noted), None, None, step)
        resumed = LearningCheck()
        resumed.load_state_dict(first.state_dict())
        first = resumed
    first.on_train_epoch_end(None, None)
    assert train(first, [1.9, 2.0]).finding == whole.finding


def test_module_without_losses_is_not_checked():
    check = LearningCheck()
    for _ in range(2 * LEAST_EPOCHS):
        check.on_train_batch_end(None, SimpleNamespace(), None, None, 0)
        check.on_train_epoch_end(None, None)
    assert check.finding is None
