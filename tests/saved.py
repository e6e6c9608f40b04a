"""Train, save and read a small checkpoint, for the tests of checkpoints."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from tiny import loader, trainer
from torch import Tensor

from dynadapter.training.module import ExitClassifier


def fitted(module: ExitClassifier, path: Path, *callbacks: Callback) -> Path:
    fitting = trainer(*callbacks, max_steps=2)
    fitting.fit(module, loader(2))
    fitting.save_checkpoint(path)
    return path


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(module: ExitClassifier) -> Tensor:
    with torch.no_grad():
        return module.eval().net(next(iter(loader(3)))[0])
