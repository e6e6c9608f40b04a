"""FlopsReport: average cost over the exit shares, in any module, and the tables."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, raises_one_line
from lightning.pytorch import Callback, LightningDataModule
from rich.console import Console
from rich.table import Table
from tiny import FAMILIES, TinyModule, loader, make_classifier, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.cost import exit_costs
from dynadapter.data import Shapes
from dynadapter.exits.heads import Balanced
from dynadapter.exits.policies import Confidence, Never, Patience, Policy, Routed
from dynadapter.training.callbacks import EarlyExit, FlopsReport


def data(samples: int = 11) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(CLASSES, (samples,), generator=generator)), batch_size=4)


def rows(table: Table) -> list[dict[str, str]]:
    """Return the table's cells by column heading."""
    columns = {str(column.header): list(column.cells) for column in table.columns}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


class Alternating(Policy):
    """Every second sample stops at exit 1, whatever its logits."""

    name = "alternating"

    def meets_condition(self, history: Tensor) -> Tensor:
        return torch.arange(history.shape[1]) % 2 == 0 if len(history) == 1 else torch.zeros(history.shape[1]).bool()


SHARES = [6 / 11, 0, 5 / 11]  # of batches of 4, 4 and 3


@pytest.mark.parametrize(("family", "order"), [*((family, 1) for family in FAMILIES), ("vit", -1)])
def test_average_weights_costs_by_shares(family: str, order: int) -> None:
    module, report = make_classifier(family), FlopsReport(show=False)
    early = EarlyExit([Alternating(), Never(), Confidence(0.0)])
    run = trainer(*[early, report][::order])
    macs = exit_costs(module.net, 32).macs
    expected = {
        "alternating": sum(share * count for share, count in zip(SHARES, macs, strict=True)) / 1e9,
        "never": macs[-1] / 1e9,
        "confidence_0": macs[0] / 1e9,
    }
    for split, loop in (("val", run.validate), ("test", run.test)):
        (logged,) = loop(module, data(), verbose=False)
        assert report.costs.macs == macs
        assert report.average_gmacs == pytest.approx(expected)
        assert {name: logged[f"{split}/{name}/gmacs"] for name in expected} == pytest.approx(expected)
        assert f"{split}/gmacs" not in logged


class Foreign(TinyModule):
    """A module whose steps route and return the result."""

    def test_step(self, batch: list[Tensor], batch_idx: int) -> Routed:
        return self.net.early(batch[0], Alternating())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        routed = self.net.early(batch[0], Alternating())
        return {"loss": routed.logits.sum(), "exit_index": routed.exit_index.tolist()}

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Routed:
        return self.test_step(batch, batch_idx)


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_any_module_without_early_exit_works(loop: str) -> None:
    module, report = Foreign(), FlopsReport(show=False)
    run = trainer(report)
    assert report.average_gmacs == {}
    options = {} if loop == "predict" else {"verbose": False}
    got = getattr(run, loop)(module, data(), **options)
    macs = exit_costs(module.net).macs
    average = sum(share * count for share, count in zip(SHARES, macs, strict=True)) / 1e9
    assert report.average_gmacs == {"": pytest.approx(average)}
    if loop != "predict":
        assert got[0][f"{'val' if loop == 'validate' else 'test'}/gmacs"] == pytest.approx(average)
    exits, routing = report.tables(run, module, loop)
    assert [row["share"] for row in rows(exits)] == ["54.5%", "0.0%", "45.5%"]
    assert "accuracy" not in rows(exits)[0]
    assert rows(routing)[0]["exit shares"] == "54.5% / 0.0% / 45.5%"


class Plain(TinyModule):
    def test_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).sum()


def test_without_policies_costs_are_shown() -> None:
    module, report = Plain(), FlopsReport(show=False)
    run = trainer(report)
    (logged,) = run.test(module, data(), verbose=False)
    assert logged == {}
    assert report.average_gmacs == {}
    (table,) = report.tables(run, module, "test")
    assert list(rows(table)[0]) == ["exit", "after block", "GMACs", "% of static", "parameters"]


def test_tables_show_the_measurements() -> None:
    module, early = make_classifier(heads=Balanced()), EarlyExit([Alternating(), Patience(2)])
    report = FlopsReport(show=False)
    run = trainer(report, early)
    (logged,) = run.test(module, data(), verbose=False)
    exits, policies = report.tables(run, module, "test")
    assert exits.title == "Exits (test, shares under alternating)"
    macs, static = report.costs.macs, report.costs.static
    # Parameters that are trained and in use up to an exit: adapters of the blocks so far, and heads.
    lora = sum(p.numel() for name, p in module.net.backbone.blocks[0].named_parameters() if "lora" in name)
    heads = [sum(p.numel() for p in head.parameters()) for head in (*module.net.heads, module.net.backbone.head)]
    for k, row in enumerate(rows(exits)):
        assert row["exit"] == str(k + 1)
        assert row["after block"] == str(2 * (k + 1))
        assert row["GMACs"] == f"{macs[k] / 1e9:.4g}"
        assert row["% of static"] == f"{macs[k] / static:.1%}"
        assert row["accuracy"] == f"{logged[f'test/acc_exit{k + 1}']:.1%}"
        assert row["share"] == f"{SHARES[k]:.1%}"
        assert row["parameters"] == f"{2 * (k + 1) * lora + sum(heads[: k + 1]):,}"
    assert int(rows(exits)[-1]["parameters"].replace(",", "")) == sum(
        p.numel() for p in module.parameters() if p.requires_grad
    )
    for row, result in zip(rows(policies), early.results, strict=True):
        assert row["policy"] == result.name
        assert row["accuracy"] == f"{logged[f'test/{result.name}/acc']:.1%}"
        assert float(row["GMACs"]) == pytest.approx(logged[f"test/{result.name}/gmacs"], rel=0.01)
        assert row["% of static"] == f"{1e9 * report.average_gmacs[result.name] / static:.1%}"
        shares = [logged[f"test/{result.name}/share_exit{k}"] for k in (1, 2, 3)]
        assert row["exit shares"] == " / ".join(f"{share:.1%}" for share in shares)
    out = io.StringIO()
    Console(file=out, width=100).print(exits, policies)
    assert "…" not in out.getvalue()  # nothing is cut off


def test_fit_prints_the_last_validation(capsys: pytest.CaptureFixture) -> None:
    module, early, report = make_classifier(), EarlyExit([Confidence(0.3)]), FlopsReport()

    class Seen(Callback):
        def on_train_end(self, *_: Any) -> None:
            assert "Exits" not in capsys.readouterr().out  # not after each validation

    run = trainer(report, early, Seen(), max_epochs=2)
    run.fit(module, loader(2), data())
    out = capsys.readouterr().out
    assert out.count("Exits (val, shares under confidence_0.3)") == 1
    (result,) = early.results
    assert f"{result.accuracy:.1%}" in out
    for k in (1, 2, 3):
        assert f"{float(run.callback_metrics[f'val/acc_exit{k}']):.1%}" in out
    run.validate(module, data(), verbose=False)
    assert capsys.readouterr().out.count("Exits (val") == 1
    run.test(module, data(), verbose=False)
    assert capsys.readouterr().out.count("Exits (test") == 1
    trainer(FlopsReport(show=False)).test(module, data(), verbose=False)
    assert "Exits" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_fit_without_validation_prints_costs(capsys: pytest.CaptureFixture) -> None:
    early = EarlyExit()
    fitting = trainer(FlopsReport(), early, max_epochs=1, num_sanity_val_steps=1, check_val_every_n_epoch=2)
    fitting.fit(make_classifier(), loader(1), loader(1))  # the sanity check is no result
    assert early.results == []
    out = capsys.readouterr().out
    assert "GMACs" in out
    assert "accuracy" not in out
    assert "Early exit" not in out


class Sized(LightningDataModule):
    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(2, 3, self.image_size, self.image_size), torch.zeros(2).long()))


def short(**options: Any) -> Shapes:
    return Shapes(8, 8, 8, batch_size=4, **options)


@pytest.mark.parametrize("loop", ["fit", "validate", "test"])
@pytest.mark.parametrize(("family", "size"), [("vit", 32), ("convnext", 64)])
def test_size_of_the_data_is_that_of_the_model(family: str, size: int, loop: str) -> None:
    """The data's own size is 48."""
    options = {"image_size": size} if family == "convnext" else {}
    module, report = make_classifier(family, num_classes=8, **options), FlopsReport(show=False)
    getattr(trainer(report, max_steps=1), loop)(module, datamodule=short())
    assert report.costs == exit_costs(module.net, size)


@pytest.mark.parametrize("loop", ["fit", "test"])
def test_size_comes_from_the_checkpoint(loop: str, tmp_path: Path) -> None:
    fitting = trainer(max_epochs=1)
    fitting.fit(make_classifier("convnext", num_classes=8, image_size=64), datamodule=short())
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    module, report = make_classifier("convnext", num_classes=8, image_size=32), FlopsReport(show=False)
    run = trainer(report, max_epochs=2, limit_val_batches=0)
    getattr(run, loop)(module, datamodule=short(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert report.costs == exit_costs(module.net, 64)


def test_the_image_size() -> None:
    module = make_classifier("convnext")  # takes any
    for size, report in ((64, FlopsReport(show=False)), (48, FlopsReport(image_size=48, show=False))):
        trainer(report).test(module, datamodule=Sized(64), verbose=False)
        assert report.costs == exit_costs(module.net, size)
    with raises_one_line(ValueError, match="cannot count an image of 48 x 48 pixels"):
        trainer(FlopsReport(image_size=48)).test(make_classifier(), data(), verbose=False)
