"""Scenarios for the tests of several processes: run as a program, it forks groups of 2, 1 and 3 processes.

Each process runs every scenario of its group and leaves what it returns in ``FOLDER/<scenario>.<processes>.<rank>.pt``.
"""

import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from PIL import Image
from tiny import make_classifier, trainer

from dynadapter.adapters import LoRA
from dynadapter.data import ImageData
from dynadapter.data.dataset import ImageDataset
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.policies import Confidence, Patience
from dynadapter.exits.temperature import Scaled
from dynadapter.training.callbacks import (
    BidirectionalSparsity,
    EarlyExit,
    ExitWeights,
    FlopsReport,
    WeightAverage,
)
from dynadapter.training.mixing import Mixing
from dynadapter.training.schedules import Constant
from dynadapter.training.weighting import PerExit

NAMES = ["a", "b", "c", "d", "e"]
shaken = partial(tiny.shaken, by=0.1)
PROCESSES = (2, 1, 3)  # the others resume what two have saved


class Noise(ImageData):
    """Images of noise whose brightness depends on the class."""

    def __init__(self, train: int = 22, rest: int = 23, **options: Any) -> None:
        super().__init__(**({"batch_size": 4, "global_batch_size": 6, "image_size": 32, "augment": "flip"} | options))
        self.class_names = NAMES
        self.counts = {"train": train, "val": rest, "test": rest}
        self.broken: int | None = None

    def samples(self, split: str) -> list:
        generator = np.random.default_rng(len(split))
        pixels = [generator.integers(0, 150, (8, 8, 3)) + 20 * (i % 5) for i in range(self.counts[split])]
        return [(Image.fromarray(p.astype(np.uint8)), i % 5) for i, p in enumerate(pixels)]

    def dataset(self, split: str) -> ImageDataset:
        dataset = super().dataset(split)
        if split == "train" and self.broken is not None:
            dataset.__class__, dataset.broken = Broken, self.broken
        return dataset


class Broken(ImageDataset):
    """A dataset with one image that is not finite."""

    broken: int

    def __getitem__(self, item: Any) -> Any:
        image, target = super().__getitem__(item)
        return (image * float("nan") if item[0] == self.broken else image), target


class Where:
    """The process that a scenario runs in.

    Args:
        processes: Number of processes.
        rank: Index of this process.
        folder: Folder for results.
    """

    def __init__(self, processes: int, rank: int, folder: Path) -> None:
        self.processes, self.rank, self.folder = processes, rank, folder

    def trainer(self, *callbacks: Callback, **options: Any) -> Any:
        strategy = DDPStrategy(process_group_backend="gloo") if self.processes > 1 else "auto"
        return trainer(*callbacks, **({"devices": self.processes, "strategy": strategy, "max_epochs": 2} | options))

    def fit(self, *callbacks: Callback, data: Any = None, module: Any = None, checkpoint: Any = None, **options: Any):
        torch.manual_seed(0)
        module = module or shaken(make_classifier())
        run = self.trainer(*callbacks, **({"limit_val_batches": 0} | options))
        run.fit(module, datamodule=data or Noise(), ckpt_path=checkpoint)
        return module.state_dict(), run


class Losses(Callback):
    """Record the values logged in each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train/loss"]))


# ---- scenarios: same weights

SCENARIOS: dict[str, Callable[[Where], Any]] = {}
UNEVEN: set[str] = set()  # scenarios of 3 processes too, among which the samples do not divide


def scenario(run: Callable[[Where], Any]) -> Callable[[Where], Any]:
    SCENARIOS[run.__name__] = run
    return run


def also_of_three(run: Callable[[Where], Any]) -> Callable[[Where], Any]:
    UNEVEN.add(run.__name__)
    return scenario(run)


def runs(name: str, processes: int) -> bool:
    return processes < 3 or name in UNEVEN


@also_of_three
def plain(where: Where) -> Any:
    """Save after every step, also within an epoch."""
    folder, losses = where.folder / f"saved.{where.processes}", Losses()
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    state, _ = where.fit(losses, saving, enable_checkpointing=True)
    return {"state": state, "losses": losses.seen}


@scenario
def a_weight_of_zero(where: Where) -> Any:
    weights = ExitWeights(PerExit([Constant(1.0), Constant(0.0), Constant(0.5)]))
    return {"state": where.fit(weights)[0]}


@scenario
def accumulated_and_clipped(where: Where) -> Any:
    state, run = where.fit(
        data=Noise(train=40, global_batch_size=12), accumulate_grad_batches=2, gradient_clip_val=0.05
    )
    return {"state": state, "steps": run.global_step}


@also_of_three
def one_batch_that_does_not_divide(where: Where) -> Any:
    return {"state": where.fit(data=Noise(train=11, global_batch_size=30))[0]}


@scenario
def masked(where: Where) -> Any:
    return {"state": where.fit(BidirectionalSparsity(shallow=None, keep=Constant(0.5)))[0]}


@scenario
def averaged(where: Where) -> Any:
    module = shaken(make_classifier())
    before = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    state, run = where.fit(WeightAverage(decay=0.8), module=module, limit_val_batches=1.0)
    frozen = all(torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)
    return {"state": state, "frozen": frozen, "val": run.callback_metrics}


@scenario
def bfloat16(where: Where) -> Any:
    return {"state": where.fit(precision="bf16-mixed")[0]}


@scenario
def float16(where: Where) -> Any:
    """Scale gradients; on a CPU the trainer's own option uses bfloat16 instead."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    state, run = where.fit(plugins=MixedPrecision("16-mixed", "cpu", scaler), gradient_clip_val=0.5)
    return {"state": state, "precision": run.precision, "scale": scaler.get_scale()}


@scenario
def drawn(where: Where) -> Any:
    """Draw dropout and mixing in each process; the result of a step is equal in all."""
    module = shaken(make_classifier(adapter=LoRA(rank=2, dropout=0.3), mixing=Mixing()))
    return {"state": where.fit(BidirectionalSparsity(), module=module)[0]}


@also_of_three
def resumed(where: Where) -> Any:
    """Resume what two processes saved within the second epoch."""
    return {"state": where.fit(checkpoint=where.folder / "saved.2" / "step=4.ckpt")[0]}


# ---- scenarios: same numbers


def policies() -> list:
    return [Confidence(0.35), Scaled(Patience(2), (2.0, 1.5, 1.0))]


def measured(where: Where, rest: int) -> Any:
    module = shaken(make_classifier(heads=LinearHeads()))
    early, flops = EarlyExit(policies(), by_class=True), FlopsReport(show=False)
    run = where.trainer(early, flops)
    results = {}
    for split in (run.validate, run.test):
        (logged,) = split(module, datamodule=Noise(rest=rest), verbose=False)
        results |= logged
        results |= {f"{split.__name__} {name}": gmacs for name, gmacs in flops.average_gmacs.items()}
        for one in early.results:
            shares = {f"{split.__name__} {one.name} {k}": float(share) for k, share in enumerate(one.shares)}
            results |= shares | {f"{split.__name__} {one.name}": one.accuracy}
            results |= {f"{split.__name__} {one.name} of {c}": value for c, value in enumerate(one.by_class.tolist())}
    return results


@also_of_three
def measured_on_twentythree(where: Where) -> Any:
    return measured(where, 23)


@also_of_three
def measured_on_two(where: Where) -> Any:
    return measured(where, 2)


@scenario
def measured_in_fit(where: Where) -> Any:
    early, flops = EarlyExit(policies()), FlopsReport(show=False)
    _, run = where.fit(early, flops, data=Noise(num_workers=1), limit_val_batches=1.0, num_sanity_val_steps=1)
    return {name: float(value) for name, value in run.callback_metrics.items()}


@scenario
def with_broken_logits(where: Where) -> Any:
    module = shaken(make_classifier())
    with torch.no_grad():
        module.net.heads[0].get_submodule(list(dict(module.net.heads[0].named_modules()))[-1]).bias[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that logits are not finite
        (logged,) = where.trainer(EarlyExit(policies())).test(module, datamodule=Noise(), verbose=False)
    return logged


# ---- scenarios: mistakes


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return "no error"


@scenario
def an_image_that_is_not_finite(where: Where) -> Any:
    """The broken image is in the second epoch, or the first."""
    folder = where.folder / f"finite.{where.processes}"
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="only", enable_version_counter=False)
    data, losses = Noise(), Losses()
    data.broken = 17
    said = message(lambda: where.fit(saving, losses, data=data, enable_checkpointing=True))
    return {
        "said": said,
        "losses": losses.seen,
        "saved": torch.load(folder / "only.ckpt", weights_only=True)["global_step"],
    }


@scenario
def weights_that_are_not_finite(where: Where) -> Any:
    """Refuse to save broken weights over good ones."""

    class Spoil(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                with torch.no_grad():
                    pl_module.net.backbone.head.weight[0, 0] = float("inf")

    folder = where.folder / f"weights.{where.processes}"
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="only", enable_version_counter=False)
    said = message(lambda: where.fit(Spoil(), saving, enable_checkpointing=True))
    state = torch.load(folder / "only.ckpt", weights_only=True)["state_dict"]
    return {"said": said, "finite": all(bool(tensor.isfinite().all()) for tensor in state.values())}


@scenario
def a_global_batch_that_does_not_divide(where: Where) -> Any:
    return message(lambda: where.fit(data=Noise(global_batch_size=7)))


# ---- sharded


def sharded_trainer(where: Where, *callbacks: Callback, **options: Any) -> Any:
    strategy: Any = "auto"
    if where.processes > 1:
        strategy = ModelParallelStrategy(
            data_parallel_size=where.processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
        )
    return trainer(*callbacks, **({"devices": where.processes, "strategy": strategy, "max_epochs": 2} | options))


@scenario
def sharded(where: Where) -> Any:
    path = where.folder / f"sharded.{where.processes}.ckpt"
    torch.manual_seed(0)
    module = shaken(make_classifier())
    early, flops = EarlyExit(policies()), FlopsReport(show=False)
    run = sharded_trainer(where, early, flops, gradient_clip_val=0.5)
    run.fit(module, datamodule=Noise())
    fitted = {name: float(value) for name, value in run.callback_metrics.items()}
    run.save_checkpoint(path)
    (tested,) = run.test(module, datamodule=Noise(), verbose=False)
    return {"numbers": fitted | tested, "gmacs": flops.average_gmacs}


@scenario
def sharded_resumed(where: Where) -> Any:
    run = sharded_trainer(where, max_epochs=3)
    run.fit(make_classifier(), datamodule=Noise(), ckpt_path=where.folder / "sharded.2.ckpt")
    run.save_checkpoint(where.folder / f"sharded_resumed.{where.processes}.ckpt")
    return {"steps": run.global_step}


@scenario
def sharded_files(where: Where) -> Any:
    """Save each process's part, and resume from these files."""

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    if where.processes == 1:
        return where.fit(module=shaken(make_classifier()))[0]
    folder, state = where.folder / "parts.ckpt", {}
    for stop, checkpoint in (([Stop()], None), ([], folder)):
        torch.manual_seed(0)
        module = make_classifier() if checkpoint else shaken(make_classifier())
        run = sharded_trainer(where, *stop, strategy=ModelParallelStrategy(2, 1, process_group_backend="gloo"))
        run.fit(module, datamodule=Noise(), ckpt_path=checkpoint)
        run.save_checkpoint(folder)
        state = run.strategy.lightning_module_state_dict()
    return {name: tensor.full_tensor() for name, tensor in state.items()}


@scenario
def sharded_mistakes(where: Where) -> Any:
    def fit(*callbacks: Callback, strategy: Any = None) -> None:
        run = trainer(*callbacks, devices=2, strategy=strategy) if strategy else sharded_trainer(where, *callbacks)
        run.fit(make_classifier(), datamodule=Noise())

    if where.processes != 2:
        return None
    whole = torch.load(where.folder / "sharded.2.ckpt", weights_only=True)
    state = whole["state_dict"]
    name = next(iter(state))
    renamed = {"other" if key == name else key: tensor for key, tensor in state.items()}
    changed = where.folder / f"changed.{where.rank}.ckpt"
    tensors = ModelParallelStrategy(process_group_backend="gloo")
    run = sharded_trainer(where)
    torch.save(whole | {"state_dict": renamed}, changed)
    return [
        message(lambda: fit(BidirectionalSparsity())),
        message(lambda: fit(WeightAverage())),
        message(lambda: fit(strategy=tensors)),
        message(lambda: run.test(make_classifier(), datamodule=Noise(), ckpt_path=changed)).replace(name, "NAME"),
    ]


# ---- processes


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def child(where: Where, names: list[str], port: int) -> int:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if where.processes > 1:
        os.environ |= {"LOCAL_RANK": str(where.rank), "NODE_RANK": "0", "WORLD_SIZE": str(where.processes)}
    for name in names:
        if not runs(name, where.processes):
            continue
        start = time.monotonic()
        try:
            result = SCENARIOS[name](where)
        except BaseException:
            print(f"{name}, process {where.rank} of {where.processes}:\n{traceback.format_exc()}", flush=True)
            return 1
        torch.save(result, where.folder / f"{name}.{where.processes}.{where.rank}.pt")
        if not where.rank:
            print(f"{name} x {where.processes}: {time.monotonic() - start:.1f} s", flush=True)
    return 0


def group(processes: int, folder: Path, names: list[str], limit: float) -> bool:
    """Run scenarios in a number of processes; return True if all succeeded."""
    port, children = free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = child(Where(processes, rank, folder), names, port)
            finally:
                sys.stdout.flush()
                os._exit(code)  # skips the forked program's own exit
        children.append(pid)
    end, well, waiting = time.monotonic() + limit, True, set(children)
    while waiting and well and time.monotonic() < end:
        for pid in sorted(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.discard(pid)
                well &= status == 0
        time.sleep(0.02)
    time.sleep(2 * bool(waiting))  # gives the others time to print their errors
    for pid in waiting:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return well and not waiting


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return 0 if all(group(processes, folder, names, limit=150) for processes in PROCESSES) else 1


if __name__ == "__main__":
    sys.exit(main())
