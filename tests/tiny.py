"""A LightningModule of a user's own, and a short training, for the tests of the callbacks."""

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import CLASSES, CONVNEXT, SWIN, VIT, Copies, make_vit
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dynadapter.adapters import AdapterLayer, LoRA, inject
from dynadapter.backbones import create_backbone
from dynadapter.exits.heads import LinearHeads
from dynadapter.exits.net import ExitNet
from dynadapter.training.losses import joint_loss
from dynadapter.training.module import ExitClassifier

QUIET = [
    "ignore:Found .* in eval mode",  # the frozen backbone
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",  # Lightning 2.6 on torch 2.15
]

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


class TinyModule(LightningModule):
    """LoRA on a tiny ViT with three exits; no adapter tensor is zero, so that every element has a gradient."""

    def __init__(self, optimizer: Optimizers = adamw) -> None:
        super().__init__()
        torch.manual_seed(0)
        backbone = make_vit()
        inject(backbone, LoRA(rank=2))
        self.net = ExitNet(backbone, LinearHeads(), every=2)
        for element in self.adapter_tensors():
            nn.init.normal_(element, std=0.2)
        self.optimizer = optimizer
        self.seen: list[tuple[float, ...]] = []

    def adapter_tensors(self) -> list[nn.Parameter]:
        layers = [layer for layer in self.net.modules() if isinstance(layer, AdapterLayer)]
        assert layers
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        torch.manual_seed(self.global_step)  # the same random numbers after a resume

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        self.seen.append(tuple(self.net.exit_weights.tolist()))
        return joint_loss(self.net(images), targets, self.net.exit_weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class ByHand(TinyModule):
    """Manual optimisation: two optimisers, each stepping once a batch, that of the heads first."""

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

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        heads = list(self.net.heads.parameters())
        return self.optimizer(heads), self.optimizer(self.adapter_tensors())


FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT},
    "swin": {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": SWIN},
    "convnext": {
        "backbone": "convnext_tiny",
        "backbone_args": CONVNEXT,
        "adapter": LoRA(rank=2, targets=("*.mlp.fc1",)),
    },
}


@functools.cache
def _copies(name: str, num_classes: int, options: tuple[tuple[str, Any], ...]) -> Copies:
    return Copies(create_backbone(name, num_classes, **dict(options)))


def drawn(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Return the backbone that ``create_backbone`` returns, as a copy where a seed draws it."""
    if options["pretrained"] or options["weights"] is not None or options["image_size"] is not None:
        return create_backbone(name, num_classes, **options)
    return _copies(name, num_classes, tuple(options.items()))()


def make_classifier(family: str = "vit", **changes: Any) -> ExitClassifier:
    """Return an ExitClassifier with three exits on a tiny backbone; its tensors are always the same."""
    options: dict[str, Any] = {"num_classes": CLASSES, "pretrained": False, "adapter": LoRA(rank=2), "every": 2}
    with torch.random.fork_rng(devices=[]), patch("dynadapter.training.module.create_backbone", drawn):
        torch.default_generator.manual_seed(0)
        return ExitClassifier(**(options | FAMILIES[family] | changes))


def write_checkpoint(module: ExitClassifier, path: Path, *callbacks: Any, **options: Any) -> Path:
    """Save a checkpoint as a training would at its start."""
    module.trainer = fitting = trainer(*callbacks)
    fitting.strategy.connect(module)
    fitting.save_checkpoint(path, **options)
    return path


def loader(batches: int = 3) -> DataLoader:
    return noise_batches(2 * batches, 2)


def noise_batches(samples: int, batch_size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


def shaken(module: ExitClassifier, by: float = 0.3) -> ExitClassifier:
    """Change all trained tensors, so that exits differ and logits are not uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * by)
    return module


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | options))


class SaveFirstEpoch(Callback):
    """Write a checkpoint after the first epoch, without the state of a ModelCheckpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        assert float(trainer.callback_metrics["train/loss"]) == float(outputs["loss"])
        self.seen.append(float(outputs["loss"]))


class Named(IterableDataset):
    """A batch of images with the names of their files."""

    def __iter__(self) -> Any:
        yield torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a", "b", "c", "d"]


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> float:
    """Return the mean over a batch, computed sample by sample."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        log_p = [z - math.log(sum(math.exp(other) for other in row)) for z in row]
        wanted = [smoothing / len(row) + (1 - smoothing) * (k == target) for k in range(len(row))]
        total -= sum(w * p for w, p in zip(wanted, log_p, strict=True))
    return total / len(targets)
