"""ExitWeights in any LightningModule: values, logs, resume, and trainings without a known end."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import QUIET, SaveFirstEpoch, TinyModule, loader, trainer
from torch import Tensor
from torch.utils.data import IterableDataset

from dynadapter.training.callbacks.loss_weights import ExitWeights
from dynadapter.training.schedules import Constant, Cosine
from dynadapter.training.weighting import EarlyToLate, LateToEarly, LinearInDepth, PerExit, Uniform, Weighting

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def profile(weighting: Weighting, *progress: float) -> list[tuple[float, ...]]:
    return [pytest.approx(weighting(p, 3), abs=1e-6) for p in progress]


@pytest.mark.parametrize("weighting", [EarlyToLate(), LateToEarly(0.0, Cosine(0.0, 1.0)), LinearInDepth()])
def test_each_step_has_its_weights(weighting: Weighting) -> None:
    module = TinyModule()
    buffer = module.net.exit_weights
    trainer(ExitWeights(weighting)).fit(module, loader(3))
    assert module.seen == profile(weighting, *(step / 5 for step in range(6)))
    assert module.net.exit_weights is buffer  # written in place


def test_weights_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(ExitWeights(EarlyToLate()), logger=logger).fit(TinyModule(), loader(3))
    names, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().split()]
    logged = [tuple(float(row[names.index(f"exit_weights/{k}")]) for k in (1, 2, 3)) for row in rows]
    assert logged == profile(EarlyToLate(), *(step / 5 for step in range(6)))


def test_accumulated_batches_share_weights() -> None:
    module = TinyModule()
    # windows of 2 and 1 batches per epoch
    trainer(ExitWeights(EarlyToLate()), accumulate_grad_batches=2).fit(module, loader(3))
    assert module.seen == profile(EarlyToLate(), 0, 0, 2 / 5, 3 / 5, 3 / 5, 1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_keep_32_bits(precision: str) -> None:
    module = TinyModule()
    trainer(ExitWeights(EarlyToLate()), precision=precision, max_epochs=1).fit(module, loader(3))
    assert module.seen == profile(EarlyToLate(), 0, 0.5, 1)


def test_single_step_has_the_first_weights() -> None:
    module = TinyModule()
    trainer(ExitWeights(EarlyToLate()), max_steps=1).fit(module, loader(3))
    assert module.seen == profile(EarlyToLate(), 0)


def test_resume_continues_exactly(tmp_path: Path) -> None:
    straight, resumed = TinyModule(), TinyModule()
    trainer(ExitWeights(EarlyToLate()), SaveFirstEpoch(tmp_path / "0.ckpt")).fit(straight, loader(3))
    trainer(ExitWeights(EarlyToLate())).fit(resumed, loader(3), ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert resumed.seen == straight.seen[3:]


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


class Endless(IterableDataset):
    def __iter__(self):
        batches = list(loader(1))
        while True:
            yield from batches


ENDLESS = [({"max_epochs": -1}, lambda: loader(2)), ({"max_epochs": 1}, Endless)]


def endless(data) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(data, batch_size=None) if isinstance(data, Endless) else data


@pytest.mark.parametrize(("options", "data"), ENDLESS)
def test_endless_training_needs_constants(options: dict, data) -> None:
    with pytest.raises(ValueError, match="no known end; set max_steps") as error:
        trainer(ExitWeights(EarlyToLate()), **options).fit(TinyModule(), endless(data()))
    assert "\n" not in str(error.value)
    for weighting in (Uniform(), LinearInDepth(), EarlyToLate(ease=Constant(0.5)), PerExit((Constant(1.0),) * 3)):
        module = TinyModule()
        trainer(ExitWeights(weighting), StopAfter(3), min_epochs=0, **options).fit(module, endless(data()))
        assert module.seen == profile(weighting, 0, 0, 0)


@pytest.mark.parametrize(("options", "data"), ENDLESS)
def test_max_steps_is_an_end(options: dict, data) -> None:
    module = TinyModule()
    trainer(ExitWeights(EarlyToLate()), max_steps=5, **options).fit(module, endless(data()))
    assert module.seen == profile(EarlyToLate(), 0, 1 / 4, 2 / 4, 3 / 4, 1)


class ByHand(TinyModule):
    """Two optimisers, each stepping once a batch: Lightning counts both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        heads = list(self.net.heads.parameters())
        return self.optimizer(heads), self.optimizer(self.adapter_tensors())


@pytest.mark.parametrize("options", [{}, {"max_steps": 6, "max_epochs": -1}])
def test_manual_optimisation(options: dict) -> None:
    module = ByHand()
    trainer(ExitWeights(EarlyToLate()), **options).fit(module, loader(3))
    batches = options.get("max_steps", 12) // 2
    assert module.seen == profile(EarlyToLate(), *(k / (batches - 1) for k in range(batches)))


def test_callback_serves_a_second_fit() -> None:
    callback, modules = ExitWeights(EarlyToLate()), [TinyModule(), TinyModule()]
    trainer(callback, max_epochs=1).fit(modules[0], loader(2))
    trainer(callback, max_epochs=1).fit(modules[1], loader(3))
    assert modules[0].seen == profile(EarlyToLate(), 0, 1)
    assert modules[1].seen == profile(EarlyToLate(), 0, 0.5, 1)


class NoNet(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net.backbone
        del self.net


class TwoNets(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.other = TinyModule().net


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoNet, "ExitWeights needs one ExitNet in NoNet and found none"),
        (TwoNets, "ExitWeights needs one ExitNet in TwoNets and found 2 of them"),
    ],
)
def test_module_needs_exactly_one_network(module: type[TinyModule], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trainer(ExitWeights(EarlyToLate())).fit(module(), loader())
    assert "\n" not in str(error.value)


def test_wrong_number_of_schedules() -> None:
    module = TinyModule()
    with pytest.raises(ValueError, match="gives 1 weights, this network has 3 exits"):
        trainer(ExitWeights(PerExit((Constant(1.0),)))).fit(module, loader())
    assert not module.seen
