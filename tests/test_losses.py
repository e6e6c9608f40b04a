"""The joint loss and distillation against their formulas, and which exit gets which gradient."""

import pytest
import torch
from conftest import raises_one_line
from tiny import loader, make_classifier, trainer
from torch.nn import functional as F

from dynadapter.training.losses import IGNORED, Distillation, exit_losses, joint_loss

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


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


@pytest.mark.parametrize("classes", [5, 200])  # of 200 classes the padding label -100 would be a valid index
def test_padding_counts_nowhere(classes: int) -> None:
    logits, weights = torch.randn(3, 6, classes), torch.rand(classes)
    targets = torch.tensor([0, IGNORED, 2, IGNORED, 1, 3])
    own = targets != IGNORED
    for given in (None, weights):
        padded = exit_losses(logits, targets, class_weights=given)
        torch.testing.assert_close(padded, exit_losses(logits[:, own], targets[own], class_weights=given))


def test_class_weights_are_exact_in_autocast(logits, targets) -> None:
    weights, mixed = torch.rand(5), F.one_hot(targets, 5).float().lerp(torch.full((6, 5), 0.2), 0.3)
    expected = exit_losses(logits, mixed, class_weights=weights)
    by_hand = -((mixed @ weights)[:, None] * mixed * logits.log_softmax(-1)).sum(-1).mean(-1)
    torch.testing.assert_close(expected, by_hand)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(exit_losses(logits, mixed, class_weights=weights), expected)


@pytest.mark.parametrize("shape", [(5,), (6, 4), (3, 6), ()])
def test_targets_of_a_wrong_shape(logits, shape: tuple[int, ...]) -> None:
    with raises_one_line(ValueError, match=r"targets .* do not fit logits \(3, 6, 5\)"):
        exit_losses(logits, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(1,), (4,), ()])
def test_weights_of_a_wrong_shape(logits, targets, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights .* must be one per exit: \(3,\)"):
        joint_loss(logits, targets, torch.ones(shape))


# ---- distillation


@pytest.fixture
def doubles() -> torch.Tensor:
    return torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


TARGETS = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_the_formula(doubles: torch.Tensor, share: float, temperature: float) -> None:
    losses = exit_losses(doubles, TARGETS)
    expected = []
    for k in range(3):
        teacher, student = (doubles[i].detach().div(temperature).softmax(-1) for i in (-1, k))
        apart = (teacher * (teacher / student).log()).sum(-1).mean()
        part = share if k < 2 else 0.0
        expected.append((1 - part) * losses[k] + part * temperature**2 * apart)
    torch.testing.assert_close(Distillation(share, temperature).mix(losses, doubles), torch.stack(expected))


def test_teacher_learns_from_labels_only(doubles: torch.Tensor) -> None:
    Distillation(0.5).mix(exit_losses(doubles, TARGETS), doubles).sum().backward()
    alone = doubles.detach()[-1].clone().requires_grad_()
    F.cross_entropy(alone, TARGETS).backward()
    torch.testing.assert_close(doubles.grad[-1], alone.grad)  # type: ignore[index]


def test_equal_answers_have_no_divergence(doubles: torch.Tensor) -> None:
    same = doubles.detach()[-1:].expand(3, -1, -1)
    mixed = Distillation(1.0).mix(exit_losses(same, TARGETS), same)
    assert mixed[:-1].abs().max() < 1e-12
    assert mixed[-1] > 0


def test_one_exit_has_no_teacher(doubles: torch.Tensor) -> None:
    losses = exit_losses(doubles[:1], TARGETS)
    assert torch.equal(Distillation().mix(losses, doubles[:1]), losses)


def test_half_precision_distils_in_float32(doubles: torch.Tensor) -> None:
    half = doubles.detach().bfloat16()
    losses = exit_losses(half, TARGETS)
    assert torch.equal(Distillation().mix(losses, half), Distillation().mix(losses, half.float()))


@pytest.mark.parametrize("options", [{"share": -0.1}, {"share": 1.5}, {"temperature": 0.0}, {"share": float("nan")}])
def test_invalid_distillation_is_named(options: dict[str, float]) -> None:
    with raises_one_line(ValueError, match="must be"):
        Distillation(**options)


def test_a_training_step_distils(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    mix = Distillation.mix
    monkeypatch.setattr(Distillation, "mix", lambda *given: seen.append(len(given[1])) or mix(*given))
    module = make_classifier(distillation=Distillation(share=0.7))
    trainer(max_steps=2).fit(module, loader(2))
    assert seen == [module.net.num_exits] * 2
    assert module.hparams["distillation"] == Distillation(share=0.7)
