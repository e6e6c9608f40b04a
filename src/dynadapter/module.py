"""The LightningModule: a frozen trunk, adapters and exits, trained with one joint loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from dynadapter.adapters import AdapterSpec, LoRA, adapter_layers, inject
from dynadapter.heads import Balanced, Heads
from dynadapter.losses import exit_losses, joint_loss
from dynadapter.net import ExitNet
from dynadapter.policies import Never, Policy, confidence
from dynadapter.schedules import Cosine, Schedule, Warmup
from dynadapter.spec import Spec
from dynadapter.trunk import classifier, create_trunk, fingerprint

FORMAT = 1
"""Version of what this module adds to a checkpoint under the key ``dynadapter``."""


@dataclass(frozen=True)
class Mixing(Spec):
    """Mixup and CutMix, done by timm on whole batches (of even size).

    Args:
        mixup: Beta parameter of mixup; 0 switches it off.
        cutmix: Beta parameter of CutMix; 0 switches it off.
        prob: Share of the batches that are mixed.
        switch: Share of CutMix among those where both are on.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch: float = 0.5


class ExitClassifier(LightningModule):
    """A frozen timm trunk that learns a task through adapters, with an exit after each stage.

    The loss is the sum of the exits' cross-entropies, weighed by ``net.exit_weights``; the callback
    :class:`~dynadapter.callbacks.ExitWeights` schedules those weights, without it they are equal. A checkpoint holds
    what is trained (adapters, early heads, the trunk's own head) and the name and hash of the trunk that it belongs to.

    Args:
        num_classes: Classes of the task.
        trunk: Name of a timm model with its weights' tag, e.g. ``vit_base_patch16_224.orig_in21k``.
        pretrained: Fetch the weights that belong to the name (needs a network the first time).
        weights: A local file with the trunk's weights instead: ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.npz``.
        image_size: Pixels of the square input, for trunks with position embeddings; None leaves the trunk's own.
        trunk_args: Further arguments of timm's ``create_model``, e.g. ``{patch_size: 4, depth: 6}``.
        trunk_seed: Seed of the trunk's weights where neither ``pretrained`` nor ``weights`` is given.
        adapter: Kind of adapter; None trains the heads alone (a linear probe with exits).
        heads: Kind of the early heads.
        every: An exit after every so many blocks; the trunk's end is always the last exit.
        exits: An explicit list of block counts instead of the interval; an empty list is the static network.
        optimizer: Takes the trainable parameters.
        lr_schedule: Factor on the optimiser's learning rate over the progress of training, step by step.
        label_smoothing: Probability spread over all classes, from 0 to 1.
        mixing: Mixup and CutMix; None leaves images as they are.
        class_names: Names of the classes, in the order of their indices; saved with the model.
        full_checkpoint: Save the frozen trunk as well.
    """

    def __init__(
        self,
        num_classes: int,
        trunk: str = "vit_base_patch16_224.orig_in21k",
        pretrained: bool = True,
        weights: str | None = None,
        image_size: int | None = None,
        trunk_args: dict[str, Any] | None = None,
        trunk_seed: int = 0,
        adapter: AdapterSpec | None = LoRA(),
        heads: Heads = Balanced(),  # noqa: B008  (immutable)
        every: int = 3,
        exits: list[int] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4),
        lr_schedule: Schedule = Warmup(fraction=0.1, start=1e-3, then=Cosine(start=1.0, end=1e-2)),  # noqa: B008
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
        class_names: list[str] | None = None,
        full_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes; give one name a class")
        model = create_trunk(
            trunk,
            num_classes,
            pretrained=pretrained and weights is None,
            weights=weights,
            image_size=image_size,
            seed=trunk_seed,
            **(trunk_args or {}),
        )
        self.trunk_name = trunk
        self.trunk_hash = fingerprint(model)
        if adapter is not None:
            inject(model, adapter)
        self.net = ExitNet(model, heads, every, exits)
        self.class_names = class_names or [str(i) for i in range(num_classes)]
        self.preprocessing: dict[str, Any] = {}
        self.policy: Policy = Never()  # for predict_step; EarlyExit sets it
        self.optimizer_callable = optimizer
        self.lr_schedule = lr_schedule
        self.label_smoothing = label_smoothing
        self.full_checkpoint = full_checkpoint
        self.mixing = mixing and _mixer(mixing, num_classes, label_smoothing)
        for split in ("val", "test"):
            for kind, metric in (("acc", MulticlassAccuracy), ("ece", MulticlassCalibrationError)):
                options = {"average": "micro"} if kind == "acc" else {}
                each = nn.ModuleList(metric(num_classes, **options) for _ in range(self.net.num_exits))
                self.add_module(f"{split}_{kind}", each)
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_allow_frozen)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, channels, height, width) to the logits of every exit (exits, batch, classes)."""
        return self.net(images)

    # ---- training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Gives the joint loss of all exits on a batch of images and class indices."""
        images, targets = batch
        smoothing = self.label_smoothing
        if self.mixing is not None:
            images, targets, smoothing = *self.mixing(images, targets), 0.0  # timm smooths while it mixes
        loss = joint_loss(self.net(images), targets, self.net.exit_weights, smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Hands the trainable parameters to the optimiser and schedules its learning rate over the planned steps."""
        optimizer = self.optimizer_callable([p for p in self.parameters() if p.requires_grad])
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("training without end has no progress to schedule; set trainer.max_epochs or max_steps")
        last = max(1, int(steps) - 1)
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_schedule(min(1.0, step / last)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step", "name": "lr"}}

    # ---- evaluation

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        logits = self.net(images)
        losses = exit_losses(logits, targets)
        on_epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(targets)}
        for k, (exit_logits, loss) in enumerate(zip(logits.float(), losses, strict=True)):
            for kind in ("acc", "ece"):
                metric = getattr(self, f"{split}_{kind}")[k]
                metric.update(exit_logits.softmax(-1), targets)
                self.log(f"{split}/{kind}_exit{k + 1}", metric, **on_epoch)
            self.log(f"{split}/loss_exit{k + 1}", loss, sync_dist=True, **on_epoch)
        self.log(f"{split}/acc", getattr(self, f"{split}_acc")[-1], prog_bar=True, **on_epoch)
        return {"logits": logits, "targets": targets}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures every exit; returns the logits (exits, batch, classes) and targets for callbacks."""
        return self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures every exit; returns the logits (exits, batch, classes) and targets for callbacks."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """Routes a batch of images and file names by ``self.policy``; gives file, class, confidence and exit of each."""
        images, files = batch
        routed = self.net.early(images, self.policy)
        classes = routed.logits.argmax(-1)
        return {
            "files": list(files),
            "classes": [self.class_names[c] for c in classes.tolist()],
            "confidence": confidence(routed.logits),
            "exits": routed.exits,
        }

    # ---- what a checkpoint holds

    def setup(self, stage: str) -> None:
        """Remembers the data's preprocessing, so that it travels with the model."""
        self.preprocessing = dict(getattr(self.trainer.datamodule, "preprocessing", None) or self.preprocessing)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the trunk's name and hash, the class names and the preprocessing."""
        checkpoint["dynadapter"] = {
            "format": FORMAT,
            "trunk": self.trunk_name,
            "trunk_hash": self.trunk_hash,
            "class_names": self.class_names,
            "preprocessing": self.preprocessing,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another trunk or of other classes.

        Raises:
            ValueError: If the checkpoint does not belong to this model.
        """
        saved = checkpoint.get("dynadapter")
        if saved is None:
            raise ValueError("this checkpoint was not written by dynadapter: it names no trunk; load its weights by hand")
        if saved["format"] > FORMAT:
            raise ValueError(
                f"this checkpoint has format {saved['format']}, this dynadapter reads up to {FORMAT}; update dynadapter"
            )
        if saved["trunk_hash"] != self.trunk_hash:
            raise ValueError(
                f"the checkpoint was trained on trunk {saved['trunk']!r} with weights {saved['trunk_hash'][:12]}, this "
                f"model has {self.trunk_name!r} with {self.trunk_hash[:12]}; give the trunk, weights and trunk_args of "
                "the training"
            )
        named = self.class_names != [str(i) for i in range(len(self.class_names))]
        if len(saved["class_names"]) != len(self.class_names) or (named and saved["class_names"] != self.class_names):
            raise ValueError(
                f"the checkpoint knows the classes {_short(saved['class_names'])}, the data has "
                f"{_short(self.class_names)}; test on data with the classes of the training"
            )
        self.class_names = list(saved["class_names"])
        self.preprocessing = dict(saved["preprocessing"])

    def merge(self, tolerance: float = 1e-5) -> "ExitClassifier":
        """Folds the adapters into the trunk; from then on a checkpoint holds the whole model."""
        self.net.merge(tolerance)
        self.full_checkpoint = True
        return self


def frozen_keys(module: nn.Module) -> set[str]:
    """Names the state-dict keys of the frozen trunks in a module: all but adapters, the trunk's own head, and what is trained."""
    keys = set()
    for path, net in module.named_modules():
        if isinstance(net, ExitNet):
            ours = {id(p) for head in classifier(net.trunk) for p in head.parameters()}
            for layer in adapter_layers(net.trunk).values():
                ours |= {id(p) for name, p in layer.named_parameters() if not name.startswith("base_layer.")}
            for name, tensor in net.trunk.state_dict(keep_vars=True).items():
                if id(tensor) not in ours and not tensor.requires_grad:
                    keys.add(f"{path}.trunk.{name}" if path else f"trunk.{name}")
    return keys


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    if not getattr(module, "full_checkpoint", False):
        for key in frozen_keys(module):
            state.pop(prefix + key, None)


def _allow_frozen(module: nn.Module, keys: _IncompatibleKeys) -> None:
    # The hook is not told its prefix (an averaging wrapper adds one), hence the match by ending.
    frozen = tuple(frozen_keys(module))
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(frozen)]


def _mixer(spec: Mixing, num_classes: int, label_smoothing: float) -> Any:
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=spec.mixup,
        cutmix_alpha=spec.cutmix,
        prob=spec.prob,
        switch_prob=spec.switch,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


def _short(names: list[str], most: int = 6) -> str:
    return f"[{', '.join(names[:most])}{', ...' if len(names) > most else ''}] ({len(names)})"
