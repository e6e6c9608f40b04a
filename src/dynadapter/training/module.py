"""The LightningModule: a frozen backbone, adapters and exits, trained with one joint loss."""

import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassCalibrationError

from dynadapter.adapters import AdapterSpec, adapter_layers, inject
from dynadapter.backbones import classifier, create_backbone, fingerprint
from dynadapter.exits.heads import Balanced, Heads
from dynadapter.exits.net import ExitNet, Routed
from dynadapter.exits.policies import Never, Policy, route
from dynadapter.exits.temperature import tempered_confidence
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.spec import Spec, restore
from dynadapter.training.distillation import Distillation
from dynadapter.training.losses import IGNORED, exit_losses
from dynadapter.training.metrics import SampleMean
from dynadapter.training.schedules import Cosine, Schedule, Warmup
from dynadapter.training.sharding import is_sharded, shard

FORMAT = 1
"""Version of what this module adds to a checkpoint under the key ``dynadapter``."""


@dataclass(frozen=True)
class Mixing(Spec):
    """Mixup and CutMix, done by timm on whole batches.

    Args:
        mixup: Beta parameter of mixup; 0 switches it off.
        cutmix: Beta parameter of CutMix; 0 switches it off.
        prob: Share of the batches that are mixed, in [0, 1].
        switch: Share of CutMix among those where both are on, in [0, 1].
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        if not (self.mixup >= 0 and self.cutmix >= 0 and self.mixup + self.cutmix > 0):
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} must be at least 0 and one of them above; "
                "for images as they are leave mixing out"
            )
        for name, share in (("prob", self.prob), ("switch", self.switch)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be in [0, 1]")


@dataclass
class _Step:
    """What a step of training has shown, and where in the training it was.

    Args:
        losses: Of each exit (exits,), the mean over all processes.
        finite: Whether the logits of each image of this process are finite (batch,).
        step: Optimiser steps before it.
        epoch: Its epoch.
        batch: Its place in the epoch.
        copied: When ``losses`` can be looked at; None if at once.
    """

    losses: Tensor
    finite: Tensor
    step: int
    epoch: int
    batch: int
    copied: torch.cuda.Event | None = None


class ExitClassifier(LightningModule):
    """A frozen timm backbone that learns a task through adapters, with an exit after each stage.

    The loss is the sum of the exits' cross-entropies, weighed by ``net.exit_weights``; the callback
    :class:`~dynadapter.training.callbacks.ExitWeights` schedules those weights, without it they are equal. A checkpoint
    holds what is trained (adapters, early heads, the backbone's own head) and the name and hash of the backbone that it
    belongs to.

    The random numbers of a training step (dropout, mixing) follow from the global seed and the step's number alone, so
    that a training resumed with the same seed goes on as if it had never stopped.

    Several processes (``strategy: ddp``) train and measure what one would at the same global batch. Under Lightning's
    ``ModelParallelStrategy`` the network is sharded block by block (FSDP2), frozen tensors included. Such a training
    goes on sharded or not; one that was not sharded cannot go on sharded.

    Args:
        num_classes: Classes of the task, at least 2.
        backbone: Name of a timm model with its weights' tag, e.g. ``vit_base_patch16_224.orig_in21k``, or of a backbone
            that ships with the package.
        pretrained: Fetch the weights that belong to the name (needs a network the first time).
        weights: A local file with the backbone's weights instead: ``.safetensors``, ``.pth``, ``.pt``, ``.bin``,
        ``.npz``.
        image_size: Pixels of the square input, for backbones with position embeddings; None leaves the backbone's own.
        backbone_args: Further arguments of timm's ``create_model``, e.g. ``{patch_size: 4, depth: 6}``.
        backbone_seed: Seed of the backbone's weights where neither ``pretrained`` nor ``weights`` is given.
        adapter: Kind of adapter; None trains the heads alone (a linear probe with exits).
        heads: Kind of the early heads.
        every: An exit after every so many blocks; the backbone's end is always the last exit.
        exit_depths: An explicit list of block counts instead of the interval; an empty list is the static network.
        token_merging: Merge like tokens on the way, in training and after; None keeps them all. For backbones of the
        ViT family.
        optimizer: Takes the trainable parameters. It is not saved: give it again to go on training from a checkpoint.
        lr_schedule: Factor on the optimiser's learning rate over the progress of training, step by step.
        label_smoothing: Probability spread over all classes, in [0, 1).
        mixing: Mixup and CutMix; None leaves images as they are.
        distillation: How much the early exits learn from the last one; None lets labels alone teach them.
        class_names: Names of the classes, in the order of their indices; saved with the model, and taken from
            its checkpoint.
        full_checkpoint: Save the frozen backbone as well; such a checkpoint loads without the backbone's weights at
        hand.

    Attributes:
        net: The network.
        policy: Who leaves where in ``predict_step``; nobody leaves early until it is set, as ``EarlyExit`` does.
        preprocessing: How the data module of the training made tensors of images; empty where none was given.
        data_config: The data module of the training as a config file names it; None where none was given.
        backbone_hash: Hash of the frozen backbone.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vit_base_patch16_224.orig_in21k",
        pretrained: bool = True,
        weights: str | None = None,
        image_size: int | None = None,
        backbone_args: dict[str, Any] | None = None,
        backbone_seed: int = 0,
        adapter: AdapterSpec | None = None,
        heads: Heads = Balanced(),  # noqa: B008
        every: int = 3,
        exit_depths: list[int] | None = None,
        token_merging: TokenMerging | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4),
        lr_schedule: Schedule = Warmup(fraction=0.1, start=1e-3, then=Cosine(start=1.0, end=1e-2)),  # noqa: B008
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
        distillation: Distillation | None = None,
        class_names: list[str] | None = None,
        full_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} leaves nothing to tell apart; give at least 2 classes")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes; give one name a class")
        model = create_backbone(
            backbone,
            num_classes,
            pretrained=pretrained and weights is None,
            weights=weights,
            image_size=image_size,
            seed=backbone_seed,
            **(backbone_args or {}),
        )
        self.backbone_name = backbone
        self.backbone_hash = fingerprint(model)
        if adapter is not None:
            inject(model, adapter)
        self.net = ExitNet(model, heads, every, exit_depths, token_merging)
        self.class_names = list(class_names or _numbered(num_classes))
        self.preprocessing: dict[str, Any] = {}
        self.data_config: dict[str, Any] | None = None
        self.policy: Policy = Never()
        self.optimizer_callable = optimizer
        self.lr_schedule = lr_schedule
        self.label_smoothing = label_smoothing
        self.mixing = mixing and _mixer(mixing, num_classes, label_smoothing)
        self.distillation = distillation
        self.full_checkpoint = full_checkpoint
        self.seed = 0  # of the random numbers in training; set when it starts
        self._last: _Step | None = None  # the step that has not been looked at yet
        metrics: dict[str, Callable[[], Metric]] = {
            "acc": MeanMetric,
            "ece": partial(_calibration_error, num_classes),
            "loss": SampleMean,
        }
        for split in ("val", "test"):
            for kind, metric in metrics.items():
                self.add_module(f"{split}_{kind}", nn.ModuleList(metric() for _ in range(self.net.num_exits)))
        trainable_only(self)

    def setup(self, stage: str) -> None:
        """Has the data number their classes as this model does, by their names.

        Raises:
            ValueError: If the data have a class that this model does not know.
        """
        if stage != "predict":
            self._give_classes(self.class_names)

    def _give_classes(self, names: list[str]) -> bool:
        """Tells the data how classes are numbered; says whether there are data that can be told."""
        take = getattr(getattr(self._trainer, "datamodule", None), "take_classes", None)
        if take is not None:
            take(names)
        return take is not None

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, channels, height, width) to the logits of every exit (exits, batch, classes)."""
        return self.net(images)

    def configure_model(self) -> None:
        """Shards the network where the strategy has a mesh of devices.

        Raises:
            ValueError: If single tensors are to be computed by several processes (tensor parallelism).
        """
        mesh = self.device_mesh
        if mesh is None or is_sharded(self.net):
            return
        if (size := mesh["tensor_parallel"].size()) > 1:
            raise ValueError(
                f"tensor_parallel_size={size} is not supported: the backbone's layers are not cut; "
                f"give ModelParallelStrategy data_parallel_size={mesh.size()} and tensor_parallel_size=1"
            )
        shard(self.net, mesh["data_parallel"])
        self.strict_loading = False  # Lightning would ask for frozen tensors; on_load_checkpoint asks for the others

    # ---- training

    def on_fit_start(self) -> None:
        """Remembers the global seed, from which all steps' random numbers follow, the data, and its preprocessing."""
        self.seed = torch.initial_seed()
        data = getattr(self.trainer, "datamodule", None)
        self.preprocessing = dict(getattr(data, "preprocessing", self.preprocessing))
        if data is not None:
            self.data_config = {
                "class_path": f"{type(data).__module__}.{type(data).__qualname__}",
                "init_args": {name: value for name, value in data.hparams.items() if not name.startswith("_")},
            }

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Gives the joint loss of all exits on a batch of images and class indices.

        Raises:
            ValueError: If the loss is not finite, in this process or another; on an accelerator, that of the step
                before.
        """
        self._require_finite()
        images, targets = batch
        if targets.device.type == "cpu":  # elsewhere to look at them is to wait
            self._require_classes(targets)
        smoothing = self.label_smoothing
        with _drawn_from(self._step_seed(), images.device):
            if self.mixing is not None:
                images, targets = _mix(self.mixing, images, targets)
                smoothing = 0.0  # timm smooths while it mixes
            logits = self.net(images)
            losses = exit_losses(logits, targets, smoothing)
            if self.distillation is not None:
                losses = self.distillation.mix(losses, logits)
            losses = losses * self._weight()
        shared = self._over_processes(losses.detach())
        self._notice(shared, logits.detach(), batch_idx)
        if self._known_at_once(shared):
            self._require_finite()
        self.log("train/loss", (self.net.exit_weights * shared).sum(), prog_bar=True)
        return (self.net.exit_weights * losses).sum()

    def _step_seed(self) -> int:
        """Gives the seed of this step in this process, another one for each."""
        draw = self.trainer.fit_loop.total_batch_idx * self.trainer.world_size + self.global_rank
        return (self.seed + 1_000_003 * (draw + 1)) % 2**63

    def _weight(self) -> float:
        """Says what the mean over this process's images counts; 1 where all processes have as many."""
        return getattr(getattr(self.trainer.train_dataloader, "sampler", None), "weight", 1.0)

    # ---- losses that are not finite

    @staticmethod
    def _known_at_once(losses: Tensor) -> bool:
        return losses.device.type == "cpu"

    def _notice(self, losses: Tensor, logits: Tensor, batch: int) -> None:
        """Keeps what a step has shown, to be looked at by :meth:`_require_finite`."""
        # To look at a number on an accelerator is to wait for it. So it is copied as soon as it is there, and looked at
        # when the next step begins, while the accelerator is still busy with this one.
        copied = None
        if losses.device.type == "cuda":
            losses = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True).copy_(losses, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        finite = logits.isfinite().all(-1).all(0)
        self._last = _Step(losses, finite, self.global_step, self.current_epoch, batch, copied)

    def _require_finite(self) -> None:
        """Looks at the last step; all processes come here at the same places and find the same."""
        last, self._last = self._last, None
        if last is None:
            return
        if last.copied is not None:
            last.copied.synchronize()
        if last.losses.isfinite().all():
            return
        exits = [str(k) for k, loss in enumerate(last.losses.tolist(), start=1) if not math.isfinite(loss)]
        where = [part for part in self._from_processes(self._images_of(last)) if part]
        raise ValueError(
            f"the training loss is not finite at step {last.step} (epoch {last.epoch}, exit {', '.join(exits)}"
            f"{', ' if where else ''}{'; '.join(where)}); lower the learning rate, clip gradients, train in bf16 or 32 "
            "bits, or look for images with broken values"
        )

    def _images_of(self, last: _Step) -> str:
        """Names the images of this process whose logits were not finite."""
        broken = (~last.finite).nonzero()[:, 0].tolist()
        if not broken:
            return ""
        known = getattr(getattr(self.trainer, "datamodule", None), "files", None)
        names = known(last.epoch, last.batch) if known is not None else []
        count = f"{len(broken)} of {len(last.finite)} images"
        process = f" in process {self.global_rank}" if _together() else ""
        if len(names) != len(last.finite):
            return count + process
        listed = ", ".join(names[row] for row in broken[:8]) + (" ..." if len(broken) > 8 else "")
        return f"{count}{process}: {listed}"

    def on_validation_start(self) -> None:
        """Looks at the last step before it is measured."""
        self._require_finite()

    def on_train_end(self) -> None:
        """Looks at the very last step."""
        self._require_finite()

    def _require_finite_weights(self, checkpoint: Mapping[str, Any]) -> None:
        trained = {name for name, tensor in self.named_parameters() if tensor.requires_grad}
        states = [checkpoint.get(key, {}) for key in ("state_dict", "current_model_state")]
        broken = [
            name
            for state in states
            for name, tensor in state.items()
            if name in trained and not _own_part(tensor).isfinite().all()
        ]
        named = [name for names in self._from_processes(broken) for name in names]
        if named:
            raise ValueError(
                f"{len(set(named))} trained tensors are not finite after step {self.global_step}, {named[0]} among "
                "them; nothing is saved over what was saved before: go on from that with a lower learning rate, "
                "clipped gradients, or in bf16 or 32 bits"
            )

    # ---- several processes

    def _over_processes(self, values: Tensor) -> Tensor:
        """Gives the mean over all processes."""
        if not _together():
            return values
        values = values / torch.distributed.get_world_size()
        torch.distributed.all_reduce(values)
        return values

    def _from_processes(self, value: Any) -> list[Any]:
        """Gives the values of all processes, in their order."""
        if not _together():
            return [value]
        values = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
        return values

    # ---- the optimiser

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Hands the trainable parameters to the optimiser and schedules its learning rate over the planned steps.

        Raises:
            ValueError: If the learning rate follows the progress of a training that has no known end.
        """
        optimizer = self.optimizer_callable([p for p in self.parameters() if p.requires_grad])
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:  # Lightning says -1 for a loader without a length
            if self.lr_schedule.varies:
                raise ValueError(
                    "lr_schedule follows the progress of training, and this training has no known end; set max_steps "
                    "(or max_epochs, with a data loader that has a length), or choose a Constant schedule"
                )
            steps = 1
        last = max(1, int(steps) - 1)
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_schedule(min(1.0, step / last)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step", "name": "lr"}}

    # ---- evaluation

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        every = self.net(images)
        logits, classes = every, targets
        if _together():  # then some samples may only fill up the batch
            counted = (targets != IGNORED).nonzero()[:, 0]
            logits, classes = every[:, counted], targets[counted]
        self._require_classes(classes)
        losses = exit_losses(logits, classes) if len(classes) else logits.new_zeros(len(logits))
        on_epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(targets)}
        for k, (exit_logits, exit_loss) in enumerate(zip(logits.float(), losses, strict=True)):
            accuracy, calibration, loss = (getattr(self, f"{split}_{kind}")[k] for kind in ("acc", "ece", "loss"))
            finite = exit_logits.isfinite().all(-1)  # what is not finite is a wrong answer and has no confidence
            accuracy.update((exit_logits.argmax(-1) == classes) & finite)
            calibration.update(exit_logits[finite].softmax(-1), classes[finite])
            loss.update(exit_loss, len(classes))
            self.log(f"{split}/acc_exit{k + 1}", accuracy, **on_epoch)
            self.log(f"{split}/ece_exit{k + 1}", calibration, **on_epoch)
            self.log(f"{split}/loss_exit{k + 1}", loss, **on_epoch)
        self.log(f"{split}/acc", accuracy, prog_bar=True, **on_epoch)
        return {"logits": every, "targets": targets}

    def _require_classes(self, targets: Tensor) -> None:
        wrong = targets[(targets < 0) | (targets >= self.net.num_classes)]
        if len(wrong):
            raise ValueError(
                f"label {wrong[0].item()} in a batch; this model has classes 0 to {self.net.num_classes - 1}; correct "
                "the labels, or give the model more classes"
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures every exit; returns the logits (exits, batch, classes) and targets for callbacks."""
        return self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measures every exit; returns the logits (exits, batch, classes) and targets for callbacks."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """Routes images with their file names by ``self.policy``; gives file, class, confidence and exit of each."""
        images, files = batch
        logits, exits = self._routed(images)
        known = [row for row, file in enumerate(files) if file]  # the others only fill up the batch
        if len(known) < len(files):
            logits, exits = logits[known], exits[known]
        return {
            "files": [files[row] for row in known],
            "classes": [self.class_names[c] for c in logits.argmax(-1).tolist()],
            "confidence": tempered_confidence(self.policy, logits, exits),
            "exit_index": exits,
        }

    def _routed(self, images: Tensor) -> Routed:
        if not is_sharded(self.net):
            return self.net.early(images, self.policy)
        logits = self.net(images)  # all processes must run all blocks: each has a part of every tensor
        exits = route(self.policy, logits)
        return Routed(logits[exits, torch.arange(len(images), device=logits.device)], exits)

    # ---- what a checkpoint holds

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the backbone's name and hash, the class names and the preprocessing.

        Raises:
            ValueError: If what was trained is not finite: it would take the place of what was.
        """
        self._require_finite()
        self._require_finite_weights(checkpoint)
        checkpoint["dynadapter"] = {
            "format": FORMAT,
            "backbone": self.backbone_name,
            "backbone_hash": self.backbone_hash,
            "full": self.full_checkpoint,
            "class_names": self.class_names,
            "preprocessing": self.preprocessing,
            "data": self.data_config,
        }
        if self.full_checkpoint:  # then nothing has to be fetched to build the model again
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] |= {"pretrained": False, "weights": None}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another backbone or of other classes.

        Raises:
            ValueError: If the checkpoint does not belong to this model.
        """
        saved = checkpoint.get("dynadapter")
        if saved is None:
            raise ValueError(
                "this checkpoint was not written by dynadapter: it names no backbone; load its weights by hand"
            )
        saved = in_todays_form(saved)
        path = self._trainer.ckpt_path if self._trainer is not None else None
        if is_sharded(self.net) and path is not None and os.path.isfile(path):
            # Lightning has loaded the tensors by now, one by one, and taken none for missing.
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
            self._require_keys(held.keys())
        self._check_classes(saved["class_names"])
        self._compare_merging(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}))
        if saved["backbone_hash"] != self.backbone_hash and not saved["full"]:
            raise ValueError(
                f"the checkpoint was trained on backbone {saved['backbone']!r} with weights "
                f"{saved['backbone_hash'][:12]}, this "
                f"model has {self.backbone_name!r} with {self.backbone_hash[:12]}; give the backbone, weights "
                f"and backbone_args of "
                "the training"
            )
        self.backbone_hash = saved["backbone_hash"]
        self.class_names = list(saved["class_names"])
        self.preprocessing = dict(saved["preprocessing"])
        self.data_config = self.data_config or saved["data"]

    def _compare_merging(self, settings: Mapping[str, Any]) -> None:
        """Says so where tokens were merged otherwise: all tensors fit, and the answers are others."""
        theirs, ours = (
            restore(settings.get("token_merging"), TokenMerging | None, "token_merging"),
            self.net.token_merging,
        )
        if theirs != ours:
            rank_zero_warn(
                f"the checkpoint was trained with token_merging={theirs}, this model has token_merging={ours}: "
                f"what was measured "
                "then does not hold; give the merging of the training, or measure again"
            )

    def _require_keys(self, held: AbstractSet[str]) -> None:
        """Makes sure that a checkpoint holds all that is trained, and nothing that is not known here."""
        own = self.state_dict().keys()
        faults = [f"Missing: {key}." for key in own - held]
        faults += [f"Unknown: {key}." for key in held - own - frozen_keys(self)]
        if faults:
            more = f" And {len(faults) - 3} more like this." if len(faults) > 3 else ""
            raise ValueError(
                f"the checkpoint does not fit this model: {' '.join(sorted(faults)[:3])}{more} Give the adapter, heads "
                "and exits of the training"
            )

    def _check_classes(self, names: list[str]) -> None:
        both = f"the checkpoint has {_listed(names)}; this model has {_listed(self.class_names)}"
        advice = "use data with the classes of the training, in its order"
        if len(names) != len(self.class_names):
            raise ValueError(
                f"the checkpoint knows {len(names)} classes, this model {len(self.class_names)}; {both}; {advice}"
            )
        if self.class_names == _numbered(len(names)):  # this model was told no names
            return
        if sorted(names) == sorted(self.class_names) and self._give_classes(names):
            return
        for k, (theirs, ours) in enumerate(zip(names, self.class_names, strict=True)):
            if theirs != ours:
                raise ValueError(
                    f"class {k} is {theirs!r} in the checkpoint and {ours!r} in this model; {both}; {advice}"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads trained tensors, and those of the backbone where they are there.

        Raises:
            ValueError: In one line, if a trained tensor is missing, unknown or of another shape.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            lines = str(error).splitlines()[1:]
            faults = [_shortened(line) for line in lines[:3]]
            if len(lines) > 3:
                faults.append(f"And {len(lines) - 3} more like this.")
            raise ValueError(
                f"the checkpoint does not fit this model: {' '.join(faults)} Give the adapter, heads and exits of the "
                "training"
            ) from error

    def merge(self, tolerance: float = 1e-5) -> "ExitClassifier":
        """Folds the adapters into the backbone; from then on a checkpoint holds the whole model.

        Raises:
            ValueError: If a kind cannot be merged, or the merged layer strays past the relative ``tolerance``.
        """
        self.net.merge(tolerance)
        self.backbone_hash = fingerprint(self.net.backbone)
        self.hparams["adapter"] = None
        self.full_checkpoint = self.hparams["full_checkpoint"] = True
        return self


def trainable_only(module: nn.Module) -> None:
    """Lets a module's state dict hold what is trained: not the frozen tensors of the :class:`ExitNet` in it.

    Loading allows those to be missing and nothing else. A module with a true ``full_checkpoint`` saves everything.
    """
    module.register_state_dict_post_hook(_drop_frozen)
    module.register_load_state_dict_post_hook(_allow_frozen)


def frozen_keys(module: nn.Module) -> set[str]:
    """Names the state-dict keys of a module that belong to a frozen backbone.

    Those are all of the backbone but the adapters, its own head, and what else is trained.
    """
    keys = set()
    for path, net in module.named_modules():
        if isinstance(net, ExitNet):
            ours = {id(p) for head in classifier(net.backbone) for p in head.parameters()}
            for layer in adapter_layers(net.backbone).values():
                ours |= {id(p) for name, p in layer.named_parameters() if not name.startswith("base_layer.")}
            for name, tensor in net.backbone.state_dict(keep_vars=True).items():
                if id(tensor) not in ours and not tensor.requires_grad:
                    keys.add(f"{path}.backbone.{name}" if path else f"backbone.{name}")
    return keys


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    if not getattr(module, "full_checkpoint", False):
        for key in frozen_keys(module):
            state.pop(prefix + key, None)


def _allow_frozen(module: nn.Module, keys: _IncompatibleKeys) -> None:
    # The hook is not told its prefix (an averaging wrapper adds one), hence the match by ending.
    frozen = tuple(frozen_keys(module))
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(frozen)]


def in_todays_form(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Gives what a checkpoint says of itself as this version would have written it.

    >>> in_todays_form({"backbone": "vit", "backbone_hash": "ab", "class_names": ["cat", "dog"]})["data"] is None
    True

    Args:
        saved: What any version of this package has put under the key ``dynadapter``.

    Raises:
        ValueError: If that version is newer, or did not write what nothing can stand for.
    """
    format = saved.get("format", 0)
    if format > FORMAT:
        raise ValueError(
            f"this checkpoint has format {format}, this dynadapter reads up to {FORMAT}; update dynadapter"
        )
    if missing := [key for key in ("backbone", "backbone_hash", "class_names") if key not in saved]:
        raise ValueError(
            f"this checkpoint has the old format {format}, which does not say its {', '.join(missing)}; read it with "
            "the dynadapter that wrote it, or train again"
        )
    return {"full": False, "preprocessing": {}, "data": None, **saved}


def _shortened(line: str) -> str:
    """Cuts a line off, and says how many keys it names."""
    count = line.count('", "') + 1
    short = textwrap.shorten(line, 200, placeholder=" ...")
    return f"{short} ({count} keys)" if short.endswith(" ...") and count > 1 else short


def _listed(names: list[str]) -> str:
    """Lists names, and counts what is too much to list.

    >>> _listed(["cat", "dog"])
    "'cat', 'dog'"
    """
    named = [textwrap.shorten(repr(name), 30, placeholder="...") for name in names[:8]]
    return ", ".join(named) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _together() -> bool:
    """Says whether this process is one of several."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _own_part(tensor: Tensor) -> Tensor:
    """Gives this process's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _numbered(classes: int) -> list[str]:
    return [str(k) for k in range(classes)]


def _calibration_error(num_classes: int) -> MulticlassCalibrationError:
    return MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False)


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


def _mix(mixer: Any, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes images (batch, channels, height, width); their classes (batch,) become probabilities (batch, classes)."""
    batch = len(images)
    # timm mixes in place, and pairs the images off: in an odd batch the last one comes twice.
    rows = [*range(batch), *[batch - 1] * (batch % 2)]
    images, targets = mixer(images[rows], targets[rows])
    return images[:batch], targets[:batch]


@contextmanager
def _drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers follow from the seed alone; outside they go on as if none had been drawn."""
    numpy_state = np.random.get_state()  # noqa: NPY002  (timm's mixing draws from numpy's global numbers)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would seed every accelerator there is
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
