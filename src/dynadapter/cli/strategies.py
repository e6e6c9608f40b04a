"""Values of ``--trainer.strategy``: FSDP2, and checks of trainers that would fail silently."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from dynadapter.cli.errors import Mistake
from dynadapter.cli.resume import Earlier
from dynadapter.images.memory import usable_cores


class FSDP2(ModelParallelStrategy):
    """Shard the network over all processes, block by block (FSDP2); the name on the command line is ``fsdp2``.

    A checkpoint is one file, written atomically. (By default Lightning's class also splits single layers over the
    processes of a machine, and writes checkpoints as folders, which overwrite existing ones.)

    Args:
        process_group_backend: Backend of torch.distributed; null chooses by the device.
        timeout: Greatest time for which a process waits for the others; null is torch's default.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = None) -> None:
        more = {} if timeout is None else {"timeout": timeout}
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            **more,  # type: ignore[arg-type]
        )

    def set_world_ranks(self) -> None:
        """Shard over all processes, as soon as their number is known."""
        super().set_world_ranks()
        self._data_parallel_size = self.num_nodes * self.num_processes


StrategyRegistry.register("fsdp2", FSDP2, description=str(FSDP2.__doc__).splitlines()[0], override=True)


def require_known(strategy: Any, precision: Any) -> None:
    """Refuse a strategy that was never tested with this package, or would silently lose data."""
    name = strategy if isinstance(strategy, str) else ""
    if name.startswith("deepspeed") or isinstance(strategy, DeepSpeedStrategy):
        raise Mistake(
            "DeepSpeed is not supported: it splits the optimiser's state and the gradients, which here are small; "
            "give --trainer.strategy ddp, or fsdp2 to split the backbone, too"
        )
    if (name.startswith("fsdp") and name != "fsdp2") or isinstance(strategy, FSDPStrategy):
        raise Mistake(
            "Lightning's fsdp is the first version of FSDP, which is not supported: it flattens frozen and trained "
            "tensors together; give --trainer.strategy fsdp2"
        )
    sharded = name == "fsdp2" or isinstance(strategy, ModelParallelStrategy)
    if sharded and str(precision) in ("16", "16-mixed"):
        raise Mistake(
            "fsdp2 does not work with precision 16-mixed, whose loss scaling cannot handle sharded tensors; "
            "give --trainer.precision bf16-mixed"
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        raise Mistake(
            "ModelParallelStrategy would save folders, which no other command reads, over existing ones; "
            "give --trainer.strategy fsdp2, or save_distributed_checkpoint: false"
        )


def require_own_processes(trainer: Trainer) -> None:
    """Refuse a trainer that is about to start the wrong processes, before it starts any.

    Strategies for notebooks would lose a run's record and metrics. On a CPU the number of processes has no limit, and a
    typing error could use up the memory.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise Mistake(
            "ddp_spawn, ddp_fork and ddp_notebook are for notebooks: the metrics stay in their processes; "
            "give --trainer.strategy ddp"
        )
    cores = usable_cores()
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > (most := max(8, 2 * cores)):
        raise Mistake(
            f"trainer.devices={trainer.num_devices} would start as many processes on {cores} CPU core(s); "
            f"give at most {most}"
        )


def require_own_folders(trainer: Trainer, before: Earlier | None) -> None:
    """Refuse a folder with the checkpoints of another training: the two would overwrite and continue each other's.

    Args:
        trainer: The trainer of ``fit``.
        before: The run that it continues, whose folder may be the same.
    """
    for saver in trainer.checkpoint_callbacks:
        if not isinstance(saver, ModelCheckpoint) or saver.dirpath is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            continue
        if before is not None and saver is not trainer.checkpoint_callback:  # its folder is that of the earlier run
            continue
        there = sorted(Path(saver.dirpath).glob(f"*{saver.FILE_EXTENSION}"))
        own = before is not None and os.path.realpath(saver.dirpath) == os.path.realpath(before.checkpoint.parent)
        if there and not own:
            raise Mistake(f"dirpath={saver.dirpath} holds {there[0].name} of another training; give another folder")
