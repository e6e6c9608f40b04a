"""Find the network in a module, and the split that a trainer measures, for the callbacks."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dynadapter.exits.net import ExitNet


def exit_net(module: LightningModule, caller: object) -> ExitNet:
    """Return the one :class:`ExitNet` in a module."""
    nets = [part for part in module.modules() if isinstance(part, ExitNet)]
    if len(nets) != 1:
        found = "none" if not nets else f"{len(nets)} of them"
        raise ValueError(
            f"{type(caller).__name__} needs one ExitNet in {type(module).__name__} and found {found}; "
            "make it an attribute in __init__, as in self.net = ExitNet(backbone)"
        )
    return nets[0]


def test_label(trainer: object) -> str:
    """Return the prefix of the metrics of a test: ``test``, or ``test/NAME`` for a further test set."""
    return getattr(data_module(trainer), "test_label", "test")


def data_module(trainer: object) -> Any:
    """Return the data module of the running call, None for loaders; `trainer.datamodule` may be of an earlier call."""
    if not isinstance(trainer, Trainer):
        return getattr(trainer, "datamodule", None)
    return getattr(trainer._data_connector._datahook_selector, "datamodule", None)


def split_of(trainer: Trainer) -> str:
    """Return the prefix of the metrics of a trainer: ``val``, in fit too, that of the test, or ``predict``."""
    function = trainer.state.fn
    return test_label(trainer) if function == "test" else "predict" if function == "predict" else "val"
