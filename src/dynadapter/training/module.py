"""The LightningModule: a frozen backbone, adapters and exits, trained with one joint loss."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from dynadapter.adapters import Adapters, LoRA, inject
from dynadapter.backbones import LimitedMemory, create_backbone, cut_depth, fingerprint, frames, own_preprocessing
from dynadapter.exits.attentive import Attentive
from dynadapter.exits.exit_tokens import ExitTokens  # noqa: F401  # a name for configs
from dynadapter.exits.heads import Heads
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import Never, Policy, Routed, confidence, read_off, wide
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.training.batches import named_images, require_classes
from dynadapter.training.callbacks._common import data_module, require_supported, test_label
from dynadapter.training.callbacks.finite_check import FiniteCheck, require_finite_weights
from dynadapter.training.class_weights import ClassWeights, check_class_weights, class_weights, count_classes
from dynadapter.training.contents import (
    compare_backbones,
    compare_token_merging,
    contents_of,
    describe_mismatch,
    require_finite,
    require_keys,
    saved_contents,
    trainable_only,
)
from dynadapter.training.loading import CheckedLoading
from dynadapter.training.losses import IGNORED, Distillation, exit_losses
from dynadapter.training.matching import common_classes, describe_images, match, take_from_data, take_from_loader
from dynadapter.training.metrics import KINDS, metrics_of_exits
from dynadapter.training.mixing import Mixing, mix
from dynadapter.training.processes import is_distributed, mean_over_processes
from dynadapter.training.progress import progress, start_progress
from dynadapter.training.random_state import seeded, step_seed
from dynadapter.training.schedules import Cosine, Schedule, Warmup
from dynadapter.training.sharding import is_sharded, shard


class ExitClassifier(CheckedLoading):
    """A frozen timm backbone that learns a task through adapters, with an exit after each stage.

    The loss is the sum of the exits' cross-entropies, weighted by ``net.exit_weights``. The callback
    :class:`~dynadapter.training.callbacks.ExitWeights` schedules these weights; without it they are equal. A checkpoint
    holds the trained tensors (adapters, early heads, the backbone's own head) and the name and hash of its backbone.

    The random numbers of a training step (dropout, mixing) depend only on the global seed and the step. A training
    resumed with the same seed therefore equals an uninterrupted one.

    Several processes (``strategy: ddp``) give the same training and metrics as one process with the same global batch.
    Under Lightning's ``ModelParallelStrategy`` the network is sharded block by block (FSDP2), frozen tensors included.
    A sharded training can be resumed sharded or not; a training that was not sharded cannot be resumed sharded.

    Args:
        num_classes: Classes of the task, at least 2.
        backbone: Name of a timm model with its weights' tag, e.g. ``vit_base_patch16_224.orig_in21k``, or of a backbone
            that ships with the package.
        pretrained: Load the pretrained weights of this name (needs internet access the first time).
        weights: A local file with the backbone's weights instead: ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or
            ``.npz``.
        image_size: Pixels of the square input, for backbones with position embeddings; None keeps the backbone's own.
        backbone_args: Further arguments of timm's ``create_model``, e.g. ``{patch_size: 4}``.
        backbone_seed: Seed of the backbone's weights if neither ``pretrained`` nor ``weights`` is given.
        depth: Number of first blocks to keep, followed by the backbone's own norm and head; None keeps all.
        adapter: Kind of adapter, or one for each range of blocks; None trains the heads alone (a linear probe with
            exits).
        heads: Kind of the early heads.
        every: Number of blocks between exits; the end of the backbone is always the last exit.
        exit_depths: List of block counts instead of the interval; an empty list is the static network.
        token_merging: Merge similar tokens between blocks, in training and evaluation; None keeps all. For timm's
            VisionTransformer and VideoMAE, not Eva.
        optimizer: Function from the trainable parameters to an optimiser. It is not saved: give it again to resume.
        lr_schedule: Factor on the optimiser's learning rate as a function of training progress, set at every step.
        label_smoothing: Probability spread evenly over all classes, in [0, 1).
        class_weights: Weights of the classes in the training loss: ``auto`` balances the numbers of training images, or
            a weight by class name. See :func:`~dynadapter.training.class_weights.class_weights`.
        mixing: Mixup and CutMix; None for none.
        distillation: How the early exits learn from the last one; None trains them with the labels only.
        class_names: Names of the classes, in the order of their indices; saved with the model, and read from
            its checkpoint.
        full_checkpoint: Also save the frozen backbone; such a checkpoint loads without a weight file of the backbone.

    Attributes:
        net: The network.
        policy: Decides at which exit a sample stops in ``predict_step``. ``EarlyExit`` sets it; until then every sample
            runs to the last exit.
        preprocessing: Preprocessing settings of the training; empty before a training with a data module.
        data_config: The data module of the training, as in a config file; None if there was none.
        images: A key for each image of the training and validation split; empty if these are not known.
        backbone_hash: Hash of the frozen backbone.
        step_losses: After a training step, the losses of the exits ``(exits,)`` as the mean over all processes, and
            whether the logits of each image are finite ``(batch,)``; for :class:`FiniteCheck`.

    Raises:
        ValueError: A setting is out of range, or does not fit the backbone.
    """

    data_config: dict[str, Any] | None = None
    seed: int = 0  # of the training's random numbers; set when it starts
    step_losses: tuple[Tensor, Tensor] | None = None
    _class_weights: Tensor | None = None  # by class index, once the training images are known
    _batches: int | None = None  # of an epoch, in the training that is resumed

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vit_base_patch16_224.orig_in21k",
        pretrained: bool = True,
        weights: str | None = None,
        image_size: int | None = None,
        backbone_args: dict[str, Any] | None = None,
        backbone_seed: int = 0,
        depth: int | None = None,
        adapter: Adapters | None = LoRA(rank=8),  # noqa: B008 - frozen, as the other defaults
        heads: Heads = Attentive(),  # noqa: B008
        every: int = 3,
        exit_depths: list[int] | None = None,
        token_merging: TokenMerging | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4),
        lr_schedule: Schedule = Warmup(fraction=0.1, start=1e-3, then=Cosine(start=1.0, end=1e-2)),  # noqa: B008
        label_smoothing: float = 0.0,
        class_weights: Literal["auto"] | dict[str, float] | None = None,
        mixing: Mixing | None = None,
        distillation: Distillation | None = None,
        class_names: list[str] | None = None,
        full_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="optimizer")
        _check_settings(num_classes, label_smoothing, class_names, class_weights)
        model = create_backbone(
            backbone,
            num_classes,
            pretrained=pretrained and weights is None,
            weights=weights,
            image_size=image_size,
            seed=backbone_seed,
            **(backbone_args or {}),
        )
        if depth is not None:
            cut_depth(model, depth)
        self.backbone_name = backbone
        self.backbone_hash = fingerprint(model)
        with LimitedMemory(model):
            if adapter is not None:
                inject(model, adapter)
            self.net = ExitNet(model, heads, every, exit_depths, token_merging)
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.own_preprocessing = own_preprocessing(model, backbone, image_size)
        self.preprocessing: dict[str, Any] = {}
        self.images: dict[str, Any] = {}
        self.policy: Policy = Never()
        self.optimizer_callable = optimizer
        self.lr_schedule = lr_schedule
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.mixing = None if mixing is None else mixing.mixer(num_classes)
        self.distillation = distillation
        self.full_checkpoint = full_checkpoint
        for split in ("val", "test"):
            for kind, metrics in metrics_of_exits(self.net.num_exits, num_classes).items():
                self.add_module(f"{split}_{kind}", metrics)
        trainable_only(self)

    def configure_callbacks(self) -> list[Callback]:
        """Add :class:`FiniteCheck` to every trainer."""
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        require_supported(callbacks)
        return [] if any(isinstance(callback, FiniteCheck) for callback in callbacks) else [FiniteCheck()]

    def match_data(self, data: Any) -> None:
        """Match classes, preprocessing and image size with a data module; data modules call it before they read images.

        Raises:
            ValueError: The data have a class that this model does not know, or images that do not fit it.
        """
        function = self._trainer.state.fn if self._trainer is not None else None
        match(self, data, "test" if function is None else function.value)

    @property
    def _datamodule(self) -> Any:
        return data_module(self._trainer)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(exits, batch, classes)`` of images ``(batch, channels, height, width)``."""
        return self.net(images)

    def configure_model(self) -> None:
        """Shard the network if the strategy has a mesh of devices.

        Raises:
            ValueError: Tensor parallelism is requested, which would split single layers over processes.
        """
        mesh = self.device_mesh
        if mesh is None or is_sharded(self.net):
            return
        if (size := mesh["tensor_parallel"].size()) > 1:
            raise ValueError(
                f"tensor_parallel_size={size} is not supported: the backbone's layers cannot be split; "
                f"give ModelParallelStrategy data_parallel_size={mesh.size()} and tensor_parallel_size=1"
            )
        shard(self.net, mesh["data_parallel"])
        self.strict_loading = False  # Lightning would require frozen tensors; on_load_checkpoint checks the others

    # ---- training

    def on_fit_start(self) -> None:
        """Store the global seed, from which the random numbers of all steps follow, and the settings of the data."""
        self.seed = torch.initial_seed()
        if self._datamodule is not None:
            self.match_data(self._datamodule)
            take_from_data(self, self._datamodule)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the joint loss of all exits on a batch of images and class indices."""
        images, targets = batch
        if targets.device.type == "cpu":  # reading them on another device would wait for it
            require_classes(targets, self.net.num_classes)
        draw = self.trainer.fit_loop.total_batch_idx * self.trainer.world_size + self.global_rank
        with seeded(step_seed(self.seed, draw), images.device):
            if self.mixing is not None:
                images, targets = mix(self.mixing, images, targets)
            logits = self.net(images)
        losses = exit_losses(logits, targets, self.label_smoothing, self._class_weights)
        if self.distillation is not None:
            losses = self.distillation.mix(losses, logits)
        # 1 unless the processes have different numbers of images
        losses = losses * getattr(getattr(self.trainer.train_dataloader, "sampler", None), "weight", 1.0)
        shared = mean_over_processes(losses.detach())
        self.step_losses = shared, logits.detach().isfinite().all(-1).all(0)
        self.log("train/loss", (self.net.exit_weights * shared).sum(), prog_bar=True)
        return (self.net.exit_weights * losses).sum()

    def on_train_start(self) -> None:
        """Read the settings of a loader without data module, weigh the classes, and check the progress."""
        if self._datamodule is None:
            take_from_loader(self, self.trainer.train_dataloader)
        if self.class_weights is not None:
            counts = count_classes(self._datamodule, self.net.num_classes)
            self._class_weights = class_weights(self.class_weights, self.class_names, counts).to(self.device)
        if self.preprocessing:
            describe_images(self.preprocessing)
        start_progress(self.trainer, "lr_schedule", self.lr_schedule.varies, self._batches)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Create the optimiser of the trainable parameters, and schedule its learning rate over the training."""
        optimizer = self.optimizer_callable([p for p in self.parameters() if p.requires_grad])
        factor = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.lr_schedule(progress(self.trainer) if step else 0.0)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step", "name": "lr"}}

    # ---- evaluation

    def _evaluate(self, split: str, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        label = test_label(self._trainer) if split == "test" else split
        stacked = self.net(images)
        logits, classes = stacked, targets
        if is_distributed():  # then the batch may contain padding samples
            counted = (targets != IGNORED).nonzero()[:, 0]
            logits, classes = stacked[:, counted], targets[counted]
        require_classes(classes, self.net.num_classes)
        losses = exit_losses(logits, classes) if len(classes) else logits.new_zeros(len(logits))
        on_epoch: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(targets)}
        for k, (exit_logits, exit_loss) in enumerate(zip(wide(logits), losses, strict=True)):
            metrics = {kind: getattr(self, f"{split}_{kind}")[k] for kind in KINDS}
            finite = exit_logits.isfinite().all(-1)  # other logits count as wrong and have no confidence
            predicted = exit_logits.argmax(-1).masked_fill(~finite, -1)
            metrics["acc"].update(predicted == classes)
            metrics["balanced_acc"].update(predicted, classes)
            metrics["macro_f1"].update(predicted, classes)
            metrics["ece"].update(exit_logits[finite].softmax(-1).amax(-1), (predicted == classes)[finite])
            metrics["loss"].update(exit_loss, len(classes))
            for kind, metric in metrics.items():
                self.log(f"{label}/{kind}_exit{k + 1}", metric, **on_epoch)
        for kind in ("acc", "balanced_acc", "macro_f1"):
            self.log(f"{label}/{kind}", metrics[kind], prog_bar=kind == "acc", **on_epoch)
        return {"logits": stacked, "targets": targets}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure every exit; return the logits ``(exits, batch, classes)`` and targets for callbacks."""
        return self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Measure every exit; return the logits ``(exits, batch, classes)`` and targets for callbacks."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Route images by ``self.policy``; return file, class, confidence and exit index of each.

        Args:
            batch: Images ``(batch, channels, height, width)`` or clips ``(batch, frames, channels, height, width)``,
                alone or followed by the names of their files or by their class indices. Without names the files are "".
            batch_idx: Index of the batch.
        """
        images, files = named_images(batch, clips=frames(self.net.backbone) is not None)
        logits, exit_index = self._route(images)
        known = [row for row, file in enumerate(files) if file is not None]  # the others are padding
        if len(known) < len(files):
            logits, exit_index = logits[known], exit_index[known]
        if not logits.isfinite().all():
            raise ValueError(f"logits of a batch with {files[0]!r} are not finite: the weights are broken")
        return {
            "files": [files[row] for row in known],
            "classes": [self.class_names[c] for c in logits.argmax(-1).tolist()],
            "confidence": confidence(logits),
            "exit_index": exit_index,
        }

    def _route(self, images: Tensor) -> Routed:
        if not is_sharded(self.net):
            return self.net.early(images, self.policy)
        logits = self.net(images)  # each process has a part of every tensor, so all must run all blocks
        return read_off(self.policy, logits)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the entry of :func:`contents_of`.

        Raises:
            ValueError: A trained tensor is not finite.
        """
        require_finite_weights(self, checkpoint)
        checkpoint["dynadapter"] = contents_of(self)
        if self.full_checkpoint:  # then the model can be rebuilt without fetching weights
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] |= {"pretrained": False, "weights": None}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that a checkpoint fits this model, and read its class names and preprocessing.

        Raises:
            ValueError: It has another format, backbone or classes, lacks tensors, or holds NaN or infinity.
        """
        sharded = is_sharded(self.net)  # then Lightning has loaded the tensors one by one by now, and checked nothing
        saved = saved_contents({"state_dict": {}, **checkpoint} if sharded else checkpoint)
        require_finite(checkpoint)
        path = self._trainer.ckpt_path if self._trainer is not None else None
        if sharded and path is not None and os.path.isfile(path):
            held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
            require_keys(held.keys(), self)
        class_names = common_classes(list(saved["class_names"]), self.class_names, self._datamodule)
        compare_token_merging(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}), self.net.token_merging)
        compare_backbones(saved, self.backbone_name, self.backbone_hash)
        if saved["backbone_hash"] != self.backbone_hash:  # then only whole checkpoints can be loaded again
            self.full_checkpoint = self.hparams["full_checkpoint"] = True
        self.backbone_hash = saved["backbone_hash"]
        self.class_names = class_names
        self.preprocessing = dict(saved["preprocessing"])
        self.data_config = self.data_config or saved["data"]
        self._batches = saved.get("batches")
        self.images = saved.get("images", {})
        if self._datamodule is not None:
            self.match_data(self._datamodule)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained tensors, and the backbone's tensors if they are given.

        Raises:
            ValueError: A trained tensor is missing, unknown or of another shape.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise ValueError(describe_mismatch(error)) from error

    def merge(self, tolerance: float = 1e-5) -> "ExitClassifier":
        """Merge the adapters into the backbone; from then on a checkpoint holds the whole model.

        Raises:
            ValueError: The kind cannot be merged, or a merged layer differs by more than the relative ``tolerance``.
        """
        self.net.merge(tolerance)
        self.backbone_hash = fingerprint(self.net.backbone)
        self.hparams["adapter"] = None
        self.full_checkpoint = self.hparams["full_checkpoint"] = True
        return self


def _check_settings(
    num_classes: int, label_smoothing: float, class_names: list[str] | None, weights: ClassWeights | None
) -> None:
    check_class_weights(weights)
    if (kind := torch.get_default_dtype()) != torch.float32:  # the hash of the backbone would differ
        raise ValueError(f"{kind} is torch's default type here; create the model outside of trainer.init_module()")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for {num_classes} classes; give one name for each class")
