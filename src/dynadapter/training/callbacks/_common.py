"""Find the network in a module, and the split that a trainer measures; check callbacks."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from dynadapter.exits.net import ExitNet


def require_supported(callbacks: Iterable[Callback]) -> None:
    """Raise a ValueError if a callback of Lightning would spoil the training without an error."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "StochasticWeightAveraging is not supported: no checkpoint would hold its average, and it resets the batch "
            "statistics of the frozen backbone; give WeightAverage"
        )


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
