"""Distillation against the formula, and which exit gets which gradient."""

import pytest
import torch
from tiny import loader, make_classifier, trainer
from torch.nn import functional as F

from dynadapter.training.losses import Distillation, exit_losses

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


TARGETS = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_formula(logits: torch.Tensor, share: float, temperature: float) -> None:
    losses = exit_losses(logits, TARGETS)
    expected = []
    for k in range(3):
        teacher, student = (logits[i].detach().div(temperature).softmax(-1) for i in (-1, k))
        apart = (teacher * (teacher / student).log()).sum(-1).mean()
        part = share if k < 2 else 0.0
        expected.append((1 - part) * losses[k] + part * temperature**2 * apart)
    torch.testing.assert_close(Distillation(share, temperature).mix(losses, logits), torch.stack(expected))


def test_teacher_learns_from_labels_only(logits: torch.Tensor) -> None:
    Distillation(0.5).mix(exit_losses(logits, TARGETS), logits).sum().backward()
    alone = logits.detach()[-1].clone().requires_grad_()
    F.cross_entropy(alone, TARGETS).backward()
    torch.testing.assert_close(logits.grad[-1], alone.grad)  # type: ignore[index]


def test_equal_answers_have_no_divergence(logits: torch.Tensor) -> None:
    same = logits.detach()[-1:].expand(3, -1, -1)
    mixed = Distillation(1.0).mix(exit_losses(same, TARGETS), same)
    assert mixed[:-1].abs().max() < 1e-12
    assert mixed[-1] > 0


def test_one_exit_has_no_teacher(logits: torch.Tensor) -> None:
    losses = exit_losses(logits[:1], TARGETS)
    assert torch.equal(Distillation().mix(losses, logits[:1]), losses)


def test_half_precision_becomes_float32(logits: torch.Tensor) -> None:
    half = logits.detach().bfloat16()
    losses = exit_losses(half, TARGETS)
    assert torch.equal(Distillation().mix(losses, half), Distillation().mix(losses, half.float()))


@pytest.mark.parametrize("options", [{"share": -0.1}, {"share": 1.5}, {"temperature": 0.0}, {"share": float("nan")}])
def test_invalid_settings_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        Distillation(**options)
    assert "\n" not in str(error.value)


def test_a_training_step_distils(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    mix = Distillation.mix
    monkeypatch.setattr(Distillation, "mix", lambda *given: seen.append(len(given[1])) or mix(*given))
    module = make_classifier(distillation=Distillation(share=0.7))
    trainer(max_steps=2).fit(module, loader(2))
    assert seen == [module.net.num_exits] * 2
    assert module.hparams["distillation"] == Distillation(share=0.7)
