"""EarlyExit: one pass gives the same results as routing single samples, for every policy."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, raises_one_line
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import FAMILIES, TinyModule, loader, make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.backbones import blocks
from dynadapter.exits.policies import (
    Confidence,
    Entropy,
    Margin,
    Never,
    Patience,
    Policy,
    confidence,
    entropy,
    margin,
    read_off,
)
from dynadapter.training.callbacks import EarlyExit
from dynadapter.training.module import ExitClassifier


def data(samples: int = 23) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(CLASSES, (samples,), generator=generator)), batch_size=5)


def spread(family: str = "vit", **changes: Any) -> ExitClassifier:
    """Return a model whose exits disagree and whose confidences vary."""
    module = make_classifier(family, **changes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in [*module.net.heads.parameters(), *module.net.backbone.get_classifier().parameters()]:
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 1))
    return module.eval()


@torch.no_grad()
def middle(module: ExitClassifier, score: Callable[[Tensor], Tensor], exit: int = 0) -> float:
    """Return a threshold between the scores of the two middle samples, far from rounding."""
    scores = score(module.net(data().dataset.tensors[0]))[exit].sort().values
    return float(scores[11] + scores[12]) / 2


def policies(module: ExitClassifier) -> list[Policy]:
    return [
        Confidence(middle(module, confidence)),
        Confidence((middle(module, confidence), middle(module, confidence, 1))),
        Entropy(middle(module, entropy)),
        Margin(middle(module, margin)),
        Patience(2),
        Never(),
        Confidence(0.0),
    ]


@torch.no_grad()
def one_by_one(module: ExitClassifier, policy: Policy, batches: DataLoader) -> tuple[list[int], float]:
    """Run each image alone through all exits, and apply the policy exit by exit."""
    left, right = [], 0
    for image, target in zip(*batches.dataset.tensors, strict=True):
        logits = module.net(image[None])
        early = (k for k in range(len(logits) - 1) if bool(policy.should_exit(logits[: k + 1])))
        left.append(next(early, len(logits) - 1))
        right += int(logits[left[-1], 0].argmax()) == int(target)
    return left, right / len(left)


@pytest.mark.parametrize("family", FAMILIES)
def test_results_equal_single_samples(family: str) -> None:
    module, batches = spread(family), data()
    early = EarlyExit(policies(module))
    run = trainer(early)
    for split, loop in (("val", run.validate), ("test", run.test)):
        (logged,) = loop(module, batches, verbose=False)
        assert [result.name for result in early.results] == [policy.name for policy in early.policies]
        for policy, result in zip(early.policies, early.results, strict=True):
            left, accuracy = one_by_one(module, policy, batches)
            shares = [left.count(k) / len(left) for k in range(3)]
            assert result.shares.tolist() == pytest.approx(shares)
            assert float(result.shares.sum()) == pytest.approx(1)
            assert result.accuracy == pytest.approx(accuracy)
            assert result.nonfinite == 0
            assert logged[f"{split}/{policy.name}/acc"] == pytest.approx(accuracy)
            assert [logged[f"{split}/{policy.name}/share_exit{k}"] for k in (1, 2, 3)] == pytest.approx(shares)
            if isinstance(policy, Confidence | Entropy | Margin) and policy != Confidence(0.0):
                assert 0.4 < shares[0] < 0.6


def test_accuracy_by_class() -> None:
    """Each class that occurs has its own; F1 is counted by hand from the same predictions."""
    module, batches = spread("vit"), data()
    policy = Confidence(middle(module, confidence))
    early = EarlyExit([policy], by_class=True)
    (logged,) = trainer(early).test(module, batches, verbose=False)
    images, targets = batches.dataset.tensors
    with torch.no_grad():
        predicted = read_off(policy, module.net(images)).logits.argmax(-1)
    accuracies, scores = {}, []
    for c, name in enumerate(module.class_names):
        of, said = targets == c, predicted == c
        if of.any():
            accuracies[f"test/{policy.name}/acc_of/{name}"] = (of & said).sum().item() / of.sum().item()
        if (of | said).any():
            scores.append(2 * (of & said).sum().item() / (of.sum() + said.sum()).item())
    assert {key: value for key, value in logged.items() if "acc_of" in key} == pytest.approx(accuracies)
    assert logged[f"test/{policy.name}/macro_f1"] == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("loop", ["validate", "test"])
@pytest.mark.parametrize("verify", [False, True])
def test_one_pass_serves_all_policies(loop: str, verify: bool) -> None:
    module = spread("swin")  # no class token: every block runs for all its tokens
    early = EarlyExit(policies(module), verify_routing=verify)
    seen = [0] * 6
    for k, unit in enumerate(blocks(module.net.backbone)):
        unit[-1].register_forward_pre_hook(lambda _, x, k=k: seen.__setitem__(k, seen[k] + len(x[0])))
    getattr(trainer(early), loop)(module, data(), verbose=False)
    passes = 1 + len(early.policies) * verify
    assert seen[0] == 23 * passes
    assert (seen[-1] < 23 * passes) == verify  # routing skips blocks


def test_verify_routing_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = spread()
    early = module.net.early

    def wrong(images: Tensor, policy: Policy) -> Any:
        routed = early(images, policy)
        return routed._replace(exit_index=routed.exit_index.index_fill(0, torch.tensor([1]), 1))

    monkeypatch.setattr(module.net, "early", wrong)
    line = r"^verify_routing: confidence_0 differs for 1 of 5 images in test batch 0; image 1 stops at exit 2 with .*"
    with raises_one_line(ValueError, match=line):
        trainer(EarlyExit([Confidence(0.0)], verify_routing=True)).test(module, data(), verbose=False)


def test_each_split_starts_anew() -> None:
    module, early = spread(), EarlyExit([Confidence(0.5)])
    run = trainer(early, max_epochs=2, num_sanity_val_steps=1)
    assert early.results == []
    run.fit(module, loader(1), data())
    left, accuracy = one_by_one(module.eval(), Confidence(0.5), data())
    (result,) = early.results
    assert result.shares.tolist() == pytest.approx([left.count(k) / 23 for k in range(3)])
    assert result.accuracy == pytest.approx(accuracy)
    assert float(run.callback_metrics["val/confidence_0.5/acc"]) == pytest.approx(accuracy)


def test_accuracy_can_be_monitored(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/confidence_0.5/acc", mode="max", save_weights_only=True)
    run = trainer(EarlyExit([Confidence(0.5)]), best, enable_checkpointing=True)
    run.fit(spread(), loader(1), data())
    assert float(best.best_model_score) == pytest.approx(float(run.callback_metrics["val/confidence_0.5/acc"]), abs=0.3)
    assert Path(best.best_model_path).is_file()


def test_nonfinite_logits_never_exit_early() -> None:
    module, batches = spread(), data()
    images, targets = batches.dataset.tensors
    images[3], images[11] = math.nan, math.inf
    targets[3] = targets[11] = 0  # argmax of a row of NaN
    for policy in (Confidence(0.0), Never()):
        early = EarlyExit([policy])
        for loop in (trainer(early).validate, trainer(early).test):
            with pytest.warns(UserWarning, match=r"2 sample\(s\) have logits that are not finite"):
                loop(module, batches, verbose=False)
            (result,) = early.results
            assert result.nonfinite == 2
            if policy == Confidence(0.0):
                assert result.shares.tolist() == pytest.approx([21 / 23, 0, 2 / 23])
            exits = [0 if policy == Confidence(0.0) else 2] * 23
            with torch.no_grad():
                logits = module.net(images)
            right = [int(logits[k, i].argmax()) == int(targets[i]) for i, k in enumerate(exits) if i not in (3, 11)]
            assert result.accuracy == pytest.approx(sum(right) / 23)


class Images(TensorDataset):
    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return super().__getitem__(i)[0], f"{i}.png"


def test_predictions_follow_the_first_policy() -> None:
    module, images = spread(), data().dataset.tensors[0]
    policy = Confidence(middle(module, confidence))
    out = trainer(EarlyExit([policy, Never()])).predict(module, DataLoader(Images(images), batch_size=5))
    left, _ = one_by_one(module, policy, data())
    assert torch.cat([batch["exit_index"] for batch in out]).tolist() == left
    assert [file for batch in out for file in batch["files"]] == [f"{i}.png" for i in range(23)]


# ---- other modules


class Foreign(TinyModule):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.net(batch[0]), "targets": batch[1]}

    test_step = validation_step


class Silent(TinyModule):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        return None

    def test_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.net(batch[0]).sum()}


def test_any_module_with_these_outputs_works() -> None:
    early = EarlyExit([Confidence(0.3), Confidence(0.0)])
    module = Foreign()
    trainer(early).validate(module, loader(3), verbose=False)
    simulated = [(r.name, r.accuracy, r.shares.tolist()) for r in early.results]
    trainer(early).test(module, loader(3), verbose=False)
    assert [(r.name, r.accuracy, r.shares.tolist()) for r in early.results] == simulated
    assert simulated[1][2] == [1, 0, 0]


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("validate", "EarlyExit needs validation_step to return a mapping with 'logits', not NoneType"),
        ("test", "EarlyExit needs test_step to return a mapping with 'logits', not one with loss"),
    ],
)
def test_steps_that_return_something_else(loop: str, message: str) -> None:
    with raises_one_line(ValueError, match=message):
        getattr(trainer(EarlyExit()), loop)(Silent(), loader(1), verbose=False)


# ---- invalid settings


def test_wrong_thresholds_stop_before_a_run() -> None:
    class Untouched(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            raise AssertionError("something was read")

    batches = DataLoader(Untouched(torch.zeros(4, 3, 32, 32)), batch_size=2)
    run, module = trainer(EarlyExit([Confidence((0.5, 0.6, 0.7))])), make_classifier()
    for loop in (lambda m, b: run.fit(m, b, b), run.validate, run.test, run.predict):
        with raises_one_line(ValueError, match="threshold has 3 values, this network has 2 early exits"):
            loop(module, batches)


def test_a_policy_given_twice() -> None:
    with pytest.raises(ValueError, match=r"give each policy only once; got confidence_0.5, never, confidence_0.5"):
        EarlyExit([Confidence(0.5), Never(), Confidence(0.5)])


def test_the_default_is_confidence() -> None:
    assert EarlyExit().policies == [Confidence(0.9)]
    assert EarlyExit([]).policies == []
    trainer(EarlyExit([])).validate(make_classifier(), data(), verbose=False)


def test_a_config_builds_it() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(EarlyExit, "early_exit")
    given = [
        {"class_path": "Confidence", "init_args": {"threshold": [0.5, 0.9]}},
        {"class_path": "Patience"},
    ]
    config = parser.parse_object({"early_exit": {"policies": given}})
    built = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config).early_exit
    assert built.policies == [Confidence((0.5, 0.9)), Patience()]


def test_static_network_has_one_share() -> None:
    early = EarlyExit([Confidence(0.9), Never()])
    trainer(early).test(make_classifier(exit_depths=[]), data(), verbose=False)
    assert [result.shares.tolist() for result in early.results] == [[1.0], [1.0]]
