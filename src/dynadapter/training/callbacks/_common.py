"""Find the network in a module, and compute the progress of training, for the callbacks."""

import math

from lightning.pytorch import LightningModule, Trainer

from dynadapter.exits.net import ExitNet


def exit_net(module: LightningModule, caller: object) -> ExitNet:
    """Return the one :class:`ExitNet` in a module.

    Raises:
        ValueError: There is none, or more than one.
    """
    nets = [part for part in module.modules() if isinstance(part, ExitNet)]
    if len(nets) != 1:
        found = "none" if not nets else f"{len(nets)} of them"
        raise ValueError(
            f"{type(caller).__name__} needs one ExitNet in {type(module).__name__} and found {found}; "
            "make it an attribute in __init__, as in self.net = ExitNet(backbone)"
        )
    return nets[0]


def total_steps(trainer: Trainer) -> int | None:
    """Return the number of optimiser steps of the whole training; ``None`` if its end is unknown.

    In manual optimisation each optimiser is assumed to step once per batch.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:  # Lightning returns -1 for a loader without a length and no max_steps
        return None
    if not trainer.lightning_module.automatic_optimization:  # global_step then counts the steps of every optimiser
        steps *= len(trainer.optimizers)
        if trainer.max_steps != -1:
            steps = min(steps, trainer.max_steps)
    return int(steps)


def require_end(trainer: Trainer, caller: object, varies: bool) -> int:
    """Return :func:`total_steps`, or 1 if it is unknown and nothing varies with progress.

    Raises:
        ValueError: It is unknown and something varies.
    """
    steps = total_steps(trainer)
    if steps is None and varies:
        raise ValueError(
            f"{type(caller).__name__} follows the progress of training, and this training has no known end; "
            "set max_steps (or max_epochs, with a data loader that has a length), or choose values that stay constant"
        )
    return steps or 1


def progress(trainer: Trainer, steps: int, every: int = 1) -> float:
    """Return the progress of training, from 0 at the first optimiser step to 1 at the last.

    It depends on ``trainer.global_step`` alone: a resumed training continues exactly, and all batches of one optimiser
    step see the same value.

    Args:
        trainer: The trainer, in fit.
        steps: Optimiser steps of the whole training.
        every: Steps between changes of the value.
    """
    done = trainer.global_step // every * every
    return min(done / max(steps - 1, 1), 1.0)
