"""Model, averaged weights and optimisers, and one training step of them."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dynadapter.training.schedules import Cosine, Warmup
from tools.pretrain.augment import augment, mix, normalize
from tools.pretrain.images import Images
from tools.pretrain.model import Supervised, load_start, supervised_loss, token_mergings
from tools.pretrain.muon import Muon
from tools.pretrain.recipe import BASE, WHOLE, Recipe, timm_args


def make_optimizers(model: Any, early: nn.Module, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Return the optimisers by name. Muon's steps are scaled to AdamW's, so both take one learning rate."""
    matrices = [one for one in model.blocks.parameters() if one.ndim == 2] if recipe.muon else []
    taken = {id(one) for one in matrices}
    groups = param_groups_weight_decay(model, recipe.weight_decay, model.no_weight_decay())
    groups += param_groups_weight_decay(early, recipe.weight_decay) if recipe.exit_every else []
    rest = [group | {"params": [one for one in group["params"] if id(one) not in taken]} for group in groups]
    found: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(rest, lr=recipe.lr, fused=True)}
    if matrices:
        found["muon"] = Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return found


class Learner:
    """Model, averaged weights and optimisers, and one step of them.

    A step's random numbers follow from the seed and the step's number, so a checkpoint keeps no random state.

    Args:
        recipe: The settings.
        classes: Number of classes.
        device: Where to train.
        compiled: Compile the model.
        start: Weights to start with.
    """

    def __init__(
        self, recipe: Recipe, classes: int, device: torch.device, compiled: bool, start: Path | None = None
    ) -> None:
        torch.manual_seed(recipe.seed)
        drops: dict[str, Any] = {"drop_path_rate": recipe.drop_path, "patch_drop_rate": recipe.patch_drop}
        self.model: Any = timm.create_model(BASE, num_classes=classes, **timm_args(recipe), **drops).to(device)
        if start is not None:
            load_start(self.model, start)
        self.supervised = Supervised(self.model, recipe.exit_every, classes).to(device)
        self.mergings = token_mergings(recipe)
        self.ema = ModelEmaV3(self.model, use_warmup=True)
        self.optimizers = make_optimizers(self.model, self.supervised.early, recipe)
        self.recipe, self.device, self.precision, self.total = recipe, device, "fp32", 1
        self.rate = Warmup(recipe.warmup, 0.0, then=Cosine(1.0, 0.01))  # of the highest learning rate
        if compiled:
            self.supervised.compile(dynamic=False)  # in place: the names of the weights stay

    def schedule(self, precision: str, total: int) -> None:
        """Set the precision and the number of all steps, which the schedules need."""
        self.precision, self.total = precision, total
        self.ema.decay = 1 - 1 / max(self.recipe.ema * total, 1)

    def step(self, images: Tensor, labels: Tensor, number: int) -> Tensor:
        """Train on a batch of bytes and their labels, and return the loss."""
        recipe = self.recipe
        self._set_step(number)
        self.supervised.train()
        x, own = augment(images, recipe), None
        if recipe.mix:
            x, own = mix(x, recipe.mix)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.supervised(x)
        loss = supervised_loss(logits.float(), labels, own, recipe)
        loss.backward()
        nn.utils.clip_grad_norm_(self.supervised.parameters(), recipe.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.model, number + 1)
        return loss.detach()

    def _set_step(self, number: int) -> None:
        """Set seed, learning rate, patch dropping and token merging of a step."""
        recipe, progress = self.recipe, (number + 1) / self.total
        torch.manual_seed(recipe.seed * 1_000_003 + number)
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = recipe.lr * self.rate(progress)
        if recipe.patch_drop:
            self.model.patch_drop.prob = 0.0 if progress > 1 - WHOLE else recipe.patch_drop
        if self.mergings:
            whole = not recipe.patch_drop or progress > 1 - WHOLE
            kind = int(float(torch.rand(())) / recipe.token_merging * len(self.mergings))
            self.supervised.token_merging = self.mergings[kind] if whole and kind < len(self.mergings) else None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        early = {"early": self.supervised.early} if self.recipe.exit_every else {}
        parts = {"model": self.model, "ema": self.ema.module, **early, **self.optimizers}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint kept."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        if self.recipe.exit_every:
            self.supervised.early.load_state_dict(state["early"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = 500) -> float:
    """Return the fraction of images whose class the model predicts, in full precision."""
    model.eval()
    parts = zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    # forward, not the call: what is compiled is compiled for training
    hits = [(model.forward(normalize(x.float() / 255)).argmax(1) == y).sum() for x, y in parts]
    return float(torch.stack(hits).sum()) / len(images)
