"""What the training callbacks share: finding the network, and knowing how far training has come."""

import math

from lightning.pytorch import LightningModule, Trainer

from dynadapter.exits.net import ExitNet


def exit_net(module: LightningModule, caller: object) -> ExitNet:
    """Finds the one :class:`ExitNet` in a module.

    Raises:
        ValueError: If there is none, or more than one.
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
    """Says how many optimiser steps the whole training takes; ``None`` if it has no end that can be known.

    In manual optimisation each optimiser is taken to step once per batch.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:  # Lightning says -1 for a loader without a length and no max_steps
        return None
    if not trainer.lightning_module.automatic_optimization:  # global_step counts the steps of every optimiser there
        steps *= len(trainer.optimizers)
        if trainer.max_steps != -1:
            steps = min(steps, trainer.max_steps)
    return int(steps)


def require_end(trainer: Trainer, caller: object, varies: bool) -> int:
    """Gives :func:`total_steps`, or 1 where it is unknown and nothing varies with progress.

    Raises:
        ValueError: If it is unknown and something does vary.
    """
    steps = total_steps(trainer)
    if steps is None and varies:
        raise ValueError(
            f"{type(caller).__name__} follows the progress of training, and this training has no known end; "
            "set max_steps (or max_epochs, with a data loader that has a length), or choose values that stay constant"
        )
    return steps or 1


def progress(trainer: Trainer, steps: int, every: int = 1) -> float:
    """Gives how far training has come, from 0 at the first optimiser step to 1 at the last.

    It is a function of ``trainer.global_step`` alone, so a resumed training goes on exactly, and all batches of one
    accumulation window see the same value.

    Args:
        trainer: The trainer, in fit.
        steps: Optimiser steps of the whole training.
        every: The value changes only every so many steps.
    """
    done = trainer.global_step // every * every
    return min(done / max(steps - 1, 1), 1.0)
