"""The settings of a pre-training: all that decides the weights, except the data and the number of epochs."""

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

BASE = "vit_tiny_patch16_224"
"""timm's name; its arguments set width, heads, depth, image and patch size."""
MEAN = DEVIATION = 0.5
"""The normalisation that timm prescribes for that name."""
WHOLE = 0.15
"""The last fraction of the steps, in which no patches are dropped."""


def option(text: str, **default: Any) -> Any:
    """Return a field with its help text."""
    return field(metadata={"help": text}, **default)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, except data and epochs; each field is an option of the program."""

    batch: int = option("images a step")
    lr: float = option("highest learning rate; default: the architecture's, times the root of batch / 1024")
    width: int = option("width of the tokens")
    heads: int = option("attention heads")
    depth: int = option("blocks", default=12)
    size: int = option("height and width of the images in pixels", default=48)
    patch: int = option("height and width of a patch in pixels", default=6)
    muon: bool = option(
        "Muon for the matrices of the blocks, AdamW for the rest; default: AdamW for all", default=False
    )
    weight_decay: float = option("not for norms, biases, class token and position embedding", default=0.05)
    warmup: float = option("fraction of the steps in which the rate rises, before its cosine", default=0.05)
    clip: float = option("largest norm of the gradient", default=1.0)
    smoothing: float = option("label smoothing", default=0.1)
    ema: float = option("memory of the averaged weights, as a fraction of all steps", default=0.02)
    drop_path: float = option("stochastic depth: rate of the last block, rising linearly with depth", default=0.0)
    patch_drop: float = option("fraction of patches dropped, except in the last 15 %% of the steps", default=0.0)
    area: float = option("smallest fraction of an image that a crop keeps", default=0.25)
    tilt: float = option("largest rotation in degrees, for half of the images", default=10.0)
    jitter: float = option("largest change of brightness, contrast and saturation", default=0.3)
    ops: float = option("fraction of images that become grey, solarised or blurred", default=0.5)
    erase: float = option("fraction of images with an erased rectangle", default=0.25)
    mix: float = option("fraction of images mixed with another, half by mixup and half by cutmix", default=0.8)
    exit_every: int = option(
        "train a classifier after every so many blocks, too; they are not in the file; 0: none", default=0
    )
    exit_weight: float = option("weight of the loss of each such classifier; the last one has 1", default=0.5)
    exit_teaching: float = option(
        "fraction of such a loss that is the distance to the last classifier's prediction", default=0.5
    )
    token_merging: float = option(
        "fraction of the steps with all patches in which similar tokens are merged, as by dynadapter.TokenMerging",
        default=0.0,
    )
    proportional: bool = option("attention counts a merged token as many times as the tokens in it", default=False)
    seed: int = option("random seed: first weights, order and augmentation", default=0)

    def __post_init__(self) -> None:
        for name in ("batch", "lr", "width", "heads", "depth", "size", "patch", "clip", "area"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0")
        for name in ("area", "ema", "ops", "erase", "mix", "token_merging", "exit_teaching"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be a fraction from 0 to 1")
        for name in ("warmup", "smoothing", "drop_path", "patch_drop", "jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be a fraction from 0 to less than 1")
        if not 0 <= self.exit_every < self.depth:
            raise ValueError(f"--exit_every {self.exit_every} must be from 0 to below --depth {self.depth}")
        if not 0 <= self.exit_weight < math.inf:
            raise ValueError(f"--exit_weight {self.exit_weight} must be 0 or more")
        for whole, part in (("size", "patch"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"--{whole} {getattr(self, whole)} must be a multiple of --{part} {getattr(self, part)}; change one"
                )


ARCHS: dict[str, dict[str, Any]] = {
    "micro": {"width": 96, "heads": 3, "lr": 2e-3, "mix": 0.5},
    "tiny": {"width": 192, "heads": 3, "lr": 1e-3, "drop_path": 0.1},
    "small": {"width": 256, "heads": 4, "lr": 1e-3, "drop_path": 0.1},
}
STRENGTHS: dict[str, dict[str, Any]] = {
    "full": {},
    # For some tens of epochs, in which so small a model does not overfit
    "light": {"area": 0.4, "tilt": 0.0, "jitter": 0.2, "ops": 0.0, "erase": 0.0, "mix": 0.0, "drop_path": 0.0},
}


def make_recipe(args: argparse.Namespace, device: torch.device) -> Recipe:
    """Return the recipe of the options given, over the defaults of architecture, augmentation and device."""
    gpu = device.type != "cpu"
    chosen = ARCHS[args.arch] | STRENGTHS[args.augment or ("full" if gpu else "light")]
    chosen |= {"batch": 1024 if gpu else 256}
    given = {one.name: value for one in fields(Recipe) if (value := getattr(args, one.name)) is not None}
    if "lr" not in given:
        chosen["lr"] *= math.sqrt(given.get("batch", chosen["batch"]) / 1024)
    return Recipe(**(chosen | given))


def timm_args(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of timm's model and of create_backbone."""
    shape = {"img_size": recipe.size, "patch_size": recipe.patch}
    return shape | {"embed_dim": recipe.width, "depth": recipe.depth, "num_heads": recipe.heads}
