"""The model with classifiers at early blocks, its loss, and the weights that it starts with."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynadapter import TokenMerging
from dynadapter.backbones import classify
from tools.pretrain.recipe import Recipe

PLACES = (((0,), 0.5), ((1, 4), 0.4))
"""After which blocks a step may merge tokens, and which share; a step draws one of them."""


class Supervised(nn.Module):
    """timm's model with classifiers at early blocks, which are used in training alone.

    The loss of a backbone with one classifier does not ask for a useful class token in an early block; the early
    classifiers do. Source: Lee et al. 2015 (Deeply-Supervised Nets); Zhang et al. 2019 (Be Your Own Teacher).

    Attributes:
        token_merging: Merges tokens in the next forward pass; None keeps them all.
    """

    def __init__(self, model: Any, every: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.token_merging: TokenMerging | None = None
        width, depths = model.embed_dim, range(every, len(model.blocks), every) if every else ()
        self.early = nn.ModuleDict(
            {str(depth): nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes)) for depth in depths}
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (classifiers, batch, classes) of every classifier, timm's own as the last."""
        model, found, logs = self.model, [], None
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for number, block in enumerate(model.blocks, 1):
            if self.token_merging is not None and number - 1 in self.token_merging.after:
                x, logs = self.token_merging(x, model.num_prefix_tokens, logs)
            # A merged token of n tokens weighs log n more as a key
            counted = logs is not None and self.token_merging.proportional
            x = block(x, attn_mask=logs[:, None, None].expand(-1, 1, x.shape[1], -1)) if counted else block(x)
            if str(number) in self.early:
                found.append(self.early[str(number)](x[:, 0]))
        return torch.stack([*found, classify(model, model.norm(x), logs)])


def token_mergings(recipe: Recipe) -> list[TokenMerging]:
    """Return the kinds of token merging of which a step draws one."""
    if not recipe.token_merging:
        return []
    return [TokenMerging(after, share, recipe.proportional) for after, share in PLACES]


# ---- the loss


def soft_loss(logits: Tensor, labels: Tensor, own: Tensor | None, smoothing: float) -> Tensor:
    """Return the cross-entropy with the labels, and for mixed images with both labels in the shares ``own``."""
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if own is not None:
        partners = F.cross_entropy(logits, labels.flip(0), reduction="none", label_smoothing=smoothing)
        loss = own * loss + (1 - own) * partners
    return loss.mean()


def supervised_loss(logits: Tensor, labels: Tensor, own: Tensor | None, recipe: Recipe) -> Tensor:
    """Return the last classifier's loss plus the weighted losses of the early ones.

    An early classifier learns from the labels and from the last classifier's prediction, which gets no gradient.
    """
    loss = soft_loss(logits[-1], labels, own, recipe.smoothing)
    answer = logits[-1].detach().log_softmax(-1)
    for early in logits[:-1]:
        labelled = soft_loss(early, labels, own, recipe.smoothing)
        distance = F.kl_div(early.log_softmax(-1), answer, reduction="batchmean", log_target=True)
        loss = loss + recipe.exit_weight * torch.lerp(labelled, distance, recipe.exit_teaching)
    return loss


# ---- the weights to start with


def load_start(model: nn.Module, path: Path) -> None:
    """Load the weights of an earlier run.

    Raises:
        ValueError: If the file cannot be read, or belongs to another model.
    """
    try:
        found = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"--start {path} cannot be read ({error}); give the .safetensors of an earlier run") from None
    own = model.state_dict()
    other = sorted(name for name in own.keys() | found.keys() if name not in own or name not in found)
    other += [name for name in own if name in found and own[name].shape != found[name].shape]
    if other == ["head.bias", "head.weight"]:
        raise ValueError(f"--start {path} has no classifier of these classes; give a file written with --head keep")
    if other:
        raise ValueError(f"--start {path} is another model's: {', '.join(other[:3])} differ; give one of this --arch")
    model.load_state_dict({name: found[name].to(own[name]) for name in own})
