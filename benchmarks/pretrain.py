"""Pre-trains a small ViT from scratch on a folder of images: a backbone for a machine without a network.

    python benchmarks/pretrain.py --data tiny-imagenet-48 --arch micro --out runs/micro
    python benchmarks/pretrain.py --data tiny-imagenet-48 --arch micro --out runs/micro --minutes 150 --patch_drop 0.5

The first line is for a GPU (300 epochs), the second for a processor: as many epochs as fit into the minutes. The same
command goes on where the last one stopped or was killed. ``--data`` takes mosaics or ``train/CLASS/*`` and
``val/CLASS/*`` (see mosaics.py). The whole set lies on the device as bytes, and is augmented there batch by batch.

``--out`` gets ``checkpoint.pt``, ``log.jsonl`` (a line an epoch) and at the end NAME.safetensors (the averaged weights
in float16, under timm's names), NAME.json (architecture, recipe, accuracies, hashes, machine) and NAME.md (the card).
Needs torch, timm, safetensors, numpy and Pillow; with dynadapter on the path, NAME.json gets the backbone's
fingerprint.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from mosaics import Images, read
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from widening import widened

BASE = "vit_tiny_patch16_224"  # timm's name; width, heads, depth, image and patch size are set by its arguments
MEAN = DEVIATION = 0.5  # "half", as timm prescribes for that name
WHOLE = 0.15  # the last part of the training in which no patches are dropped
TINY_IMAGENET = (
    "The images are Tiny ImageNet's, which come from ImageNet and are for non-commercial research and education. "
    "Whether weights trained on them are bound by that is unsettled, so use them for research."
)
UNKNOWN = "Look up under which terms the source's images may be used; they were not recorded with this run."


# ---- the recipe ------------------------------------------------------------------------------------------------------


def said(text: str, **default: Any) -> Any:
    """A field with its help."""
    return field(metadata={"help": text}, **default)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights but the data and the number of epochs; each field is an option of the program."""

    batch: int = said("images a step")
    lr: float = said("highest learning rate; by default the architecture's, times the root of batch / 1024")
    width: int = said("width of the tokens")
    heads: int = said("attention heads")
    depth: int = said("blocks", default=12)
    size: int = said("height and width of the images in pixels", default=48)
    patch: int = said("height and width of a patch in pixels", default=6)
    muon: bool = said("Muon for the blocks' matrices, AdamW for the rest; without it AdamW for all", default=False)
    weight_decay: float = said("not on norms, biases, class token and position embedding", default=0.05)
    warmup: float = said("share of the steps in which the rate rises, before its cosine", default=0.05)
    clip: float = said("largest norm of the gradient", default=1.0)
    smoothing: float = said("label smoothing", default=0.1)
    ema: float = said("the averaged weights' memory, as a share of all steps", default=0.02)
    drop_path: float = said("stochastic depth: the last block's rate, less before it", default=0.0)
    patch_drop: float = said("share of the patches left out, but in the last 15 % of the training", default=0.0)
    area: float = said("smallest share of an image that a crop keeps", default=0.25)
    tilt: float = said("largest angle in degrees by which half of the images are turned", default=10.0)
    jitter: float = said("largest change of brightness, contrast and saturation", default=0.3)
    ops: float = said("share of images that are made grey, solarised or blurred", default=0.5)
    erase: float = said("share of images with an erased rectangle", default=0.25)
    mix: float = said("share of images mixed with another, half by mixup and half by cutmix", default=0.8)
    exits: int = said(
        "a classifier after every so many blocks too, which learns along and is left out of the file; 0: none",
        default=0,
    )
    merged: float = said(
        "share of the steps with all patches, those of the last 15 %, in which like tokens are merged as "
        "dynadapter.TokenMerging does it, so that the backbone knows such tokens",
        default=0.0,
    )
    counted: bool = said("such a token counts as often as it stands for tokens", default=False)
    exit_weight: float = said("weight of each such classifier's loss beside the last one's 1", default=0.5)
    exit_teaching: float = said(
        "share of such a loss that is the distance to the last classifier's answer", default=0.5
    )
    seed: int = said("decides first weights, order and augmentation", default=0)

    def __post_init__(self) -> None:
        for name in ("batch", "lr", "width", "heads", "depth", "size", "patch", "clip", "area"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("area", "ema", "ops", "erase", "mix", "merged", "exit_teaching"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is a share from 0 to 1, not {getattr(self, name)}")
        for name in ("warmup", "smoothing", "drop_path", "patch_drop", "jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} is a share from 0 to less than 1, not {getattr(self, name)}")
        if not 0 <= self.exits < self.depth:
            raise ValueError(f"--exits {self.exits} must be from 0 to below --depth {self.depth}")
        if not 0 <= self.exit_weight < math.inf:
            raise ValueError(f"--exit_weight must be 0 or more, not {self.exit_weight}")
        for whole, part in (("size", "patch"), ("width", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"--{whole} {getattr(self, whole)} is no multiple of --{part} {getattr(self, part)}; change one"
                )


ARCHS: dict[str, dict[str, Any]] = {
    "micro": dict(width=96, heads=3, lr=2e-3, mix=0.5),
    "tiny": dict(width=192, heads=3, lr=1e-3, drop_path=0.1),
}
STRENGTHS: dict[str, dict[str, Any]] = {
    "full": {},
    # For some tens of epochs, in which so small a model does not overfit
    "light": dict(area=0.4, tilt=0.0, jitter=0.2, ops=0.0, erase=0.0, mix=0.0, drop_path=0.0),
}


def settle(args: argparse.Namespace, device: torch.device) -> Recipe:
    """Puts together what the options name and the defaults for the architecture, the strength and the device."""
    gpu = device.type != "cpu"
    chosen = ARCHS[args.arch] | STRENGTHS[args.augment or ("full" if gpu else "light")]
    chosen |= {"batch": 1024 if gpu else 256}
    given = {one.name: value for one in fields(Recipe) if (value := getattr(args, one.name)) is not None}
    if "lr" not in given:
        chosen["lr"] *= math.sqrt(given.get("batch", chosen["batch"]) / 1024)
    return Recipe(**(chosen | given))


def timm_args(recipe: Recipe) -> dict[str, Any]:
    """Gives the arguments of timm's model, and of create_backbone."""
    shape = {"img_size": recipe.size, "patch_size": recipe.patch}
    return shape | {"embed_dim": recipe.width, "depth": recipe.depth, "num_heads": recipe.heads}


# ---- augmentation: batches of images on the device, each image by its own random numbers -----------------------------


def uniform(images: Tensor, low: float, high: float) -> Tensor:
    """Draws a number an image, (batch, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Augments bytes (batch, 3, size, size) into normalised floats of that shape."""
    x = crop(images.float() / 255, recipe.area, recipe.tilt)
    x = jitter(x, recipe.jitter) if recipe.jitter else x
    x = simple_ops(x, recipe.ops) if recipe.ops else x
    x = (x - MEAN) / DEVIATION
    return erase(x, recipe.erase) if recipe.erase else x


def crop(x: Tensor, area: float, tilt: float) -> Tensor:
    """Crops at random, resizes back, mirrors half of the images and turns half of them: one affine map each."""
    share, ratio = uniform(x, area, 1), uniform(x, math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (share * ratio).sqrt().clamp(max=1), (share / ratio).sqrt().clamp(max=1)
    left, top = uniform(x, -1, 1) * (1 - width), uniform(x, -1, 1) * (1 - height)
    width = torch.where(uniform(x, 0, 1) < 0.5, -width, width)
    angle = uniform(x, -1, 1) * math.radians(tilt) * (uniform(x, 0, 1) < 0.5)
    sin, cos = angle.sin(), angle.cos()
    maps = torch.stack([cos * width, -sin * height, left, sin * width, cos * height, top], -1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """Gives the brightness of each pixel, (batch, 1, height, width)."""
    red, green, blue = x.split(1, dim=1)  # no tensor of factors: to copy it would make a GPU wait
    return 0.299 * red + 0.587 * green + 0.114 * blue


def jitter(x: Tensor, most: float) -> Tensor:
    """Changes brightness, saturation and contrast by factors around 1."""
    x = x * uniform(x, 1 - most, 1 + most)
    tone = grey(x)
    x = tone + (x - tone) * uniform(x, 1 - most, 1 + most)
    level = tone.mean((2, 3), keepdim=True)
    return (level + (x - level) * uniform(x, 1 - most, 1 + most)).clamp(0, 1)


def simple_ops(x: Tensor, share: float) -> Tensor:
    """Makes a third of the share grey, a third solarised, a third blurred (the three of DeiT III)."""
    kind = uniform(x, 0, 3 / share).floor()
    x = torch.where(kind == 0, grey(x), x)
    x = torch.where((kind == 1) & (x > 0.5), 1 - x, x)
    return torch.where(kind == 2, F.avg_pool2d(F.pad(x, [1] * 4, mode="reflect"), 3, 1), x)


def boxes(x: Tensor, area: Tensor, ratio: Tensor) -> Tensor:
    """Draws a rectangle an image, cut off at the border: (batch, 1, height, width), true inside."""
    height, width = (area * ratio).sqrt(), (area / ratio).sqrt()
    rows, columns = (torch.arange(n, device=x.device).add(0.5) / n for n in x.shape[2:])
    inside = (rows.view(1, 1, -1, 1) - uniform(x, 0, 1)).abs() < height / 2
    return inside & ((columns.view(1, 1, 1, -1) - uniform(x, 0, 1)).abs() < width / 2)


def erase(x: Tensor, share: float) -> Tensor:
    """Puts noise into a rectangle of some images."""
    box = boxes(x, uniform(x, 0.02, 0.25), uniform(x, -1.2, 1.2).exp())
    return torch.where(box & (uniform(x, 0, 1) < share), torch.randn_like(x), x)


def mix(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mixes some images with their partner of the reversed batch, by mixup or by cutmix.

    Returns:
        The images, and the share (batch,) that each kept of itself.
    """
    alpha = x.new_full((len(x), 1, 1, 1), 0.8)
    weight = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
    cut = boxes(x, uniform(x, 0, 1), x.new_ones(()))
    kind = uniform(x, 0, 1)
    weight = torch.where(kind < share / 2, weight, torch.where(kind < share, (~cut).float(), 1.0))
    return x.flip(0).lerp(x, weight), weight.mean((1, 2, 3))


def soft_loss(logits: Tensor, labels: Tensor, own: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy with the labels, and where images are mixed with their partners' in the shares they have."""
    of = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if own is not None:
        partners = F.cross_entropy(logits, labels.flip(0), reduction="none", label_smoothing=smoothing)
        of = own * of + (1 - own) * partners
    return of.mean()


# ---- training --------------------------------------------------------------------------------------------------------


def rate(progress: float, warmup: float) -> float:
    """Gives the learning rate as a share of the highest: a line up, then a cosine down to a hundredth."""
    if progress < warmup:
        return progress / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


class Supervised(nn.Module):
    """timm's model, and classifiers at earlier blocks that are there while it learns, and no longer.

    A backbone that answers at its last block alone has no reason to make an early block's class token useful; one that
    is asked there too has. Source: Lee et al. 2015 (Deeply-Supervised Nets); Zhang et al. 2019 (Be Your Own Teacher).
    """

    def __init__(self, model: Any, every: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.token_merging: Any = None  # a dynadapter.TokenMerging in the steps that merge
        width, places = model.embed_dim, range(every, len(model.blocks), every) if every else ()
        self.early = nn.ModuleDict(
            {str(n): nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes)) for n in places}
        )

    def forward(self, images: Tensor) -> Tensor:
        """Gives every classifier's logits, (classifiers, batch, classes), timm's own as the last."""
        model, found, logs = self.model, [], None
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for number, block in enumerate(model.blocks, 1):
            if self.token_merging is not None and number - 1 in self.token_merging.after:
                x, logs = self.token_merging(x, model.num_prefix_tokens, logs)
            # A merged token that counts n times weighs log n more as a key
            x = block(x) if logs is None else block(x, attn_mask=logs[:, None, None].expand(-1, 1, x.shape[1], -1))
            if str(number) in self.early:
                found.append(self.early[str(number)](x[:, 0]))
        return torch.stack([*found, model.forward_head(model.norm(x))])


def taught_loss(logits: Tensor, labels: Tensor, own: Tensor | None, recipe: Recipe) -> Tensor:
    """Gives the last classifier's loss, and by weight the early ones', which learn from it and from the labels."""
    loss = soft_loss(logits[-1], labels, own, recipe.smoothing)
    answer = logits[-1].detach().log_softmax(-1)
    for early in logits[:-1]:
        told = soft_loss(early, labels, own, recipe.smoothing)
        distance = F.kl_div(early.log_softmax(-1), answer, reduction="batchmean", log_target=True)
        loss = loss + recipe.exit_weight * torch.lerp(told, distance, recipe.exit_teaching)
    return loss


def optimizers_of(model: Any, early: nn.Module, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """Gives the optimisers by name; with Muon, whose step has the size of AdamW's, both take one learning rate."""
    matrices = [one for one in model.blocks.parameters() if one.ndim == 2] if recipe.muon else []
    taken = {id(one) for one in matrices}
    groups = param_groups_weight_decay(model, recipe.weight_decay, model.no_weight_decay())
    groups += param_groups_weight_decay(early, recipe.weight_decay) if recipe.exits else []
    rest = [group | {"params": [one for one in group["params"] if id(one) not in taken]} for group in groups]
    found: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(rest, lr=recipe.lr, fused=True)}
    if matrices:
        decay = {"weight_decay": recipe.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        found["muon"] = torch.optim.Muon(matrices, lr=recipe.lr, **decay)
    return found


class Learner:
    """Model, averaged weights and optimiser, and one step of them.

    A step's random numbers follow from the seed and the step's number, so there is no random state to keep.
    """

    def __init__(
        self, recipe: Recipe, classes: int, device: torch.device, compiled: bool, start: Path | None = None
    ) -> None:
        torch.manual_seed(recipe.seed)
        drops: dict[str, Any] = {"drop_path_rate": recipe.drop_path, "patch_drop_rate": recipe.patch_drop}
        self.model: Any = timm.create_model(BASE, num_classes=classes, **timm_args(recipe), **drops).to(device)
        if start is not None:
            begin_with(self.model, start, recipe)
        self.supervised = Supervised(self.model, recipe.exits, classes).to(device)
        self.mergings = mergings(recipe.counted) if recipe.merged else []
        self.ema = ModelEmaV3(self.model, use_warmup=True)
        self.optimizers = optimizers_of(self.model, self.supervised.early, recipe)
        self.recipe, self.device, self.precision, self.total = recipe, device, "fp32", 1
        if compiled:
            self.supervised.compile(dynamic=False)  # in place: the names of the weights stay

    def schedule(self, precision: str, total: int) -> None:
        """Takes over what the schedules need to know: the number of all steps."""
        self.precision, self.total = precision, total
        self.ema.decay = 1 - 1 / max(self.recipe.ema * total, 1)

    def step(self, images: Tensor, labels: Tensor, number: int) -> Tensor:
        """Trains on a batch of bytes and their labels; gives the loss."""
        recipe, progress = self.recipe, (number + 1) / self.total
        torch.manual_seed(recipe.seed * 1_000_003 + number)
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = recipe.lr * rate(progress, recipe.warmup)
        if recipe.patch_drop:
            self.model.patch_drop.prob = 0.0 if progress > 1 - WHOLE else recipe.patch_drop
        if self.mergings:
            whole = not recipe.patch_drop or progress > 1 - WHOLE
            kind = int(float(torch.rand(())) / recipe.merged * len(self.mergings))
            self.supervised.merging = self.mergings[kind] if whole and kind < len(self.mergings) else None
        self.supervised.train()
        x, own = augment(images, recipe), None
        if recipe.mix:
            x, own = mix(x, recipe.mix)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.supervised(x)
        loss = taught_loss(logits.float(), labels, own, recipe)
        loss.backward()
        nn.utils.clip_grad_norm_(self.supervised.parameters(), recipe.clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.model, number + 1)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Gives what a checkpoint keeps."""
        early = {"early": self.supervised.early} if self.recipe.exits else {}
        parts = {"model": self.model, "ema": self.ema.module, **early, **self.optimizers}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint kept."""
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        if self.recipe.exits:
            self.supervised.early.load_state_dict(state["early"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def mergings(counted: bool) -> list[Any]:
    """Gives dynadapter's token merging, early and a little later; a step draws one of them.

    Raises:
        ValueError: It is not installed.
    """
    try:
        from dynadapter import TokenMerging
    except ImportError:
        raise ValueError("--merged needs dynadapter on the path; install it, or leave --merged out") from None
    return [TokenMerging((0,), 0.5, counted), TokenMerging((1, 4), 0.4, counted)]


def begin_with(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Gives a model the weights of a file, as an earlier run left it; those of a narrower one are widened.

    Raises:
        ValueError: The file cannot be read, or is another model's.
    """
    try:
        found = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"--start {path} cannot be read ({error}); give the .safetensors of an earlier run") from None
    own = model.state_dict()
    token = found.get("cls_token")
    if token is not None and 0 < token.shape[-1] < recipe.width:
        found = widened(
            {name: one.float() for name, one in found.items()}, narrow_heads(path), recipe.width, recipe.heads
        )
    other = sorted(name for name in own.keys() | found.keys() if name not in own or name not in found)
    other += [name for name in own if name in found and own[name].shape != found[name].shape]
    if other == ["head.bias", "head.weight"]:
        raise ValueError(f"--start {path} has no classifier of these classes; give a file written with --head keep")
    if other:
        raise ValueError(f"--start {path} is another model's: {', '.join(other[:3])} differ; give one of this --arch")
    model.load_state_dict({name: found[name].to(own[name]) for name in own})


def narrow_heads(path: Path) -> int:
    """Looks up how many attention heads a file's model has, in the JSON file beside it.

    Raises:
        ValueError: It is not there, or does not say.
    """
    about = path.with_suffix(".json")
    try:
        return int(json.loads(about.read_text())["timm_args"]["num_heads"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--start {path} is narrower, and {about} does not say its num_heads; put it there") from None


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, batch: int = 500) -> float:
    """Gives the share of images whose class the model names, in full precision."""
    model.eval()
    parts = zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    # forward, not the call: what is compiled is compiled for training
    hits = [(model.forward((x.float() / 255 - MEAN) / DEVIATION).argmax(1) == y).sum() for x, y in parts]
    return float(torch.stack(hits).sum()) / len(images)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_step(learner: Learner, train: Images, number: int) -> float:
    """Times training steps: the median of three rounds, or of fewer where they are long."""
    gpu, times = learner.device.type != "cpu", []
    count = learner.recipe.batch
    for _ in range(4):
        synchronize(learner.device)
        start = time.perf_counter()
        for _ in range(20 if gpu else 1):
            learner.step(train.pixels[:count], train.labels[:count], number)
        synchronize(learner.device)
        times.append((time.perf_counter() - start) / (20 if gpu else 1))
        if len(times) > 1 and sum(times) > 10:
            break
    return statistics.median(times[1:])  # the first round also compiles and allocates


def make_plan(learner: Learner, train: Images, val: Images, asked: dict[str, Any]) -> dict[str, Any]:
    """Times some steps, which leave no trace, and fixes precision and number of epochs.

    Returns:
        precision, epochs, steps (an epoch) and what was measured.

    Raises:
        ValueError: If not even one epoch fits into the minutes.
    """
    before = copy.deepcopy(learner.state())
    auto = ["bf16"] if learner.device.type == "cuda" and torch.cuda.is_bf16_supported() else ["fp32", "bf16"]
    seconds = {}
    for precision in auto if asked["precision"] == "auto" else [asked["precision"]]:
        learner.schedule(precision, 1000)
        seconds[precision] = seconds_a_step(learner, train, number=100)
    precision = min(seconds, key=seconds.__getitem__)
    learner.schedule(precision, 1000)
    mean = seconds[precision]
    if learner.recipe.patch_drop:
        mean += WHOLE * (seconds_a_step(learner, train, number=999) - mean)
    start = time.perf_counter()
    accuracy(learner.model, val)
    evaluation = 2 * (time.perf_counter() - start)
    learner.load(before)
    steps = len(train) // learner.recipe.batch
    epoch = steps * mean + evaluation
    fitting = int(0.97 * 60 * asked["minutes"] / epoch) if asked["minutes"] else asked["epochs"]
    if fitting < 1:
        raise ValueError(f"an epoch takes {epoch / 60:.1f} minutes, and none fits into --minutes {asked['minutes']}")
    epochs = min(fitting, asked["epochs"] or fitting)
    rates = {kind: round(learner.recipe.batch / each, 1) for kind, each in seconds.items()}
    return {
        "precision": precision,
        "epochs": epochs,
        "steps": steps,
        "images_per_second": rates,
        "epoch_seconds": round(epoch, 2),
        "minutes": round(epochs * epoch / 60, 1),
    }


@dataclass
class Place:
    """Where a run stands: so many whole epochs, and in the one begun so many steps, their losses' sum and time."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    total_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """A folder with a checkpoint and a log, and the training that goes on from there."""

    def __init__(self, out: Path, learner: Learner, train: Images, val: Images, identity: dict[str, Any]) -> None:
        self.checkpoint, self.log = out / "checkpoint.pt", out / "log.jsonl"
        self.learner, self.train, self.val, self.identity = learner, train, val, identity
        self.plan: dict[str, Any] = {}
        self.place = Place()
        out.mkdir(parents=True, exist_ok=True)

    def begin(self) -> None:
        """Goes on from the checkpoint, or makes the plan.

        Raises:
            ValueError: If the checkpoint is another run's, or cannot be read.
        """
        if self.checkpoint.exists():
            try:
                held = torch.load(self.checkpoint, map_location=self.learner.device, weights_only=True)
            except Exception as error:  # torch, zipfile and pickle each have their own
                raise ValueError(
                    f"cannot read {str(self.checkpoint)!r} ({type(error).__name__}); take it away to start anew"
                ) from None
            self.check(held["identity"])
            self.learner.load(held["learner"])
            self.plan, self.place = held["plan"], Place(**held["place"])
        else:
            self.plan = make_plan(self.learner, self.train, self.val, self.identity["asked"])
        self.learner.schedule(self.plan["precision"], self.plan["epochs"] * self.plan["steps"])
        self.write_log()

    def check(self, other: dict[str, Any]) -> None:
        """Refuses to go on with another recipe, other data or another plan."""
        before = {one.name: one.default for one in fields(Recipe)}  # of options that a checkpoint is older than
        for group, own in self.identity.items():
            for name, value in own.items():
                held = other[group].get(name, before.get(name))
                if held != value:
                    raise ValueError(
                        f"{str(self.checkpoint)!r} was begun with {name}={held!r:.60}, not {value!r:.60}; "
                        "give the options it was begun with to go on, or another --out"
                    )

    def go(self, stop: Callable[[], bool], save_every: float) -> bool:
        """Trains until the plan is done (true) or it is told to stop (false); saves in either case."""
        place, steps, learner = self.place, self.plan["steps"], self.learner
        batch, device = learner.recipe.batch, learner.device
        saved = time.monotonic()
        while place.epoch < self.plan["epochs"]:
            generator = torch.Generator().manual_seed(learner.recipe.seed * 1_000_003 + place.epoch)
            order = torch.randperm(len(self.train), generator=generator).to(device)
            before, started = place.seconds, time.monotonic()
            losses = torch.tensor(place.loss, dtype=torch.float64, device=device)
            while place.step < steps:
                index = order[place.step * batch : (place.step + 1) * batch]
                number = place.epoch * steps + place.step
                losses += learner.step(self.train.pixels[index], self.train.labels[index], number)
                place.step += 1
                halt = stop()
                if halt or time.monotonic() - saved > save_every:
                    place.loss, place.seconds = float(losses), before + time.monotonic() - started
                    self.save()
                    saved = time.monotonic()
                    speed = place.step * batch / place.seconds
                    print(f"epoch {place.epoch + 1} step {place.step}/{steps}: {speed:.0f} images/s", flush=True)
                    if halt:
                        return False
            place.loss, place.seconds = float(losses), before + time.monotonic() - started
            self.end_epoch()
        self.save()
        return True

    def end_epoch(self) -> None:
        """Evaluates, writes the epoch's line and turns to the next."""
        place, learner, steps = self.place, self.learner, self.plan["steps"]
        self.check_finite()
        started = time.monotonic()
        found = {"val_acc": accuracy(learner.model, self.val), "val_acc_ema": accuracy(learner.ema.module, self.val)}
        place.total_seconds += place.seconds + time.monotonic() - started
        line = {
            "epoch": place.epoch + 1,
            "loss": round(place.loss / steps, 5),
            **{name: round(value, 5) for name, value in found.items()},
            "lr": round(learner.optimizers["adamw"].param_groups[0]["lr"], 7),
            "seconds": round(place.seconds, 2),
            "images_per_second": round(steps * learner.recipe.batch / place.seconds, 1),
            "total_minutes": round(place.total_seconds / 60, 2),
        }
        place.history.append(line)
        place.epoch, place.step, place.loss, place.seconds = place.epoch + 1, 0, 0.0, 0.0
        self.write_log()
        print(json.dumps(line), flush=True)

    def check_finite(self) -> None:
        """Raises ValueError where the loss is no number any more, so that nothing good is overwritten."""
        if not math.isfinite(self.place.loss):
            raise ValueError(f"the loss is not finite in epoch {self.place.epoch + 1}; begin anew with a lower --lr")

    def save(self) -> None:
        """Writes the checkpoint, all of it or nothing."""
        self.check_finite()
        content = {"identity": self.identity, "plan": self.plan, "place": vars(self.place)}
        part = self.checkpoint.with_suffix(".part")
        torch.save(content | {"learner": self.learner.state()}, part)
        os.replace(part, self.checkpoint)

    def write_log(self) -> None:
        """Writes the lines of all epochs that are done; those that a killed run had past its checkpoint come again."""
        write(self.log, "".join(json.dumps(line) + "\n" for line in self.place.history).encode())


# ---- what a finished run leaves --------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Writes a file, all of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def machine(device: torch.device) -> dict[str, Any]:
    """Names the machine and the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    found = {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def fingerprint(weights: Path, classes: int, recipe: Recipe) -> str | None:
    """Names the backbone as dynadapter does; None where it is not installed."""
    try:
        from dynadapter import backbone
    except ImportError:
        return None
    return backbone.fingerprint(backbone.create_backbone(BASE, classes, weights=weights, **timm_args(recipe)))


def export(run: Run, args: argparse.Namespace, names: list[str]) -> None:
    """Writes the weights in float16, what is known of them, and the card."""
    out, recipe, model = Path(args.out), run.learner.recipe, run.learner.ema.module
    state = {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    halved = copy.deepcopy(model)
    halved.load_state_dict(state)
    found = {
        "raw": accuracy(run.learner.model, run.val),
        "ema": accuracy(model, run.val),
        "float16": accuracy(halved, run.val),
    }
    parameters = sum(tensor.numel() for tensor in state.values())
    head = sum(tensor.numel() for name, tensor in state.items() if name.startswith("head."))
    if args.head == "drop":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    content = safetensors.torch.save(state, {"format": "pt"})
    weights = out / f"{args.name}.safetensors"
    write(weights, content)
    about = {
        "name": args.name,
        "architecture": BASE,
        "timm_args": timm_args(recipe),
        "preprocess": {"image_size": recipe.size, "normalization": "half"},
        "parameters": {"backbone": parameters - head, "classifier": head, "classifier_in_file": args.head == "keep"},
        "accuracy": {name: round(value, 5) for name, value in found.items()},
        "validation_images": len(run.val),
        "source": {"name": args.source, "images": len(run.train), "classes": len(names), "licence": args.licence},
        "epochs": run.plan["epochs"],
        "start": run.identity["asked"].get("start"),
        "start_width": safetensors.torch.load_file(args.start)["cls_token"].shape[-1] if args.start else None,
        "minutes": round(run.place.total_seconds / 60, 1),
        "recipe": asdict(recipe),
        "plan": run.plan,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "fingerprint": fingerprint(weights, len(names), recipe),
        "machine": machine(run.learner.device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": names,
    }
    write(out / f"{args.name}.json", (json.dumps(about, indent=2) + "\n").encode())
    write(out / f"{args.name}.md", card(about).encode())
    print(f"wrote {weights} ({len(content) / 1e6:.2f} MB): {found['float16']:.2%} of {len(run.val)} validation images")


def card(about: dict[str, Any]) -> str:
    """Writes the model card."""
    source, size, machine = about["source"], about["timm_args"], about["machine"]
    call = ", ".join(f"{name}={value}" for name, value in size.items())
    lines = "".join(f"    {name}={value},\n" for name, value in size.items())
    tokens = (size["img_size"] // size["patch_size"]) ** 2
    recipe = "".join(f"| {name} | {value} |\n" for name, value in about["recipe"].items())
    head = "with" if about["parameters"]["classifier_in_file"] else "without"
    begun = f"; begun with the weights of SHA-256 `{about['start'][:12]}...`" if about["start"] else ""
    if about["start"] and about["start_width"] < size["embed_dim"]:
        begun += f", widened from {about['start_width']}"
    return f"""# {about["name"]}: a small research backbone

**With a network, use timm's pre-trained models instead: they are better by far.** This one exists so that an example or
a benchmark runs on real features where nothing can be downloaded. It is no product and was tested for nothing else.

| | |
|---|---|
| architecture | timm `{about["architecture"]}` with {call}: {tokens} patches and a class token |
| parameters | {about["parameters"]["backbone"]:,}, and {about["parameters"]["classifier"]:,} of the classifier |
| file | `{about["name"]}.safetensors`, float16, {about["bytes"] / 1e6:.2f} MB, {head} the classifier |
| images | {size["img_size"]} px, from [0, 1] normalised by mean 0.5 and deviation 0.5 (`normalization: half`) |
| trained on | {source["name"]}: {source["images"]:,} images of {source["classes"]} classes, labels used, from scratch |
| top-1 on its {about["validation_images"]:,} validation images | {about["accuracy"]["float16"]:.2%} \
(averaged weights in float16; in float32 {about["accuracy"]["ema"]:.2%}, not averaged {about["accuracy"]["raw"]:.2%}) |
| training | {about["epochs"]} epochs, {about["minutes"]} minutes on {machine.get("gpu", machine["cpu"])}, \
{about["plan"]["precision"]}{begun} |
{prepared(about["recipe"])}| sha256 | `{about["sha256"]}` |
| fingerprint | `{about["fingerprint"]}` |

The validation images were looked at after every epoch, but no epoch was chosen by them: the weights are the last one's.

```python
from dynadapter import create_backbone

backbone = create_backbone(
    "{about["architecture"]}",
    num_classes=10,
    weights="{about["name"]}.safetensors",
{lines})
```

## Terms

{source["licence"]}

## Recipe

Written by `benchmarks/pretrain.py`: random resized crops, mirroring, turning, colours, erasing, mixup and cutmix as far
as named below; AdamW, cosine with warm-up, averaged weights.

| | |
|---|---|
{recipe}"""


def prepared(recipe: dict[str, Any]) -> str:
    """Says on a row of the card what the backbone was prepared for; empty where for nothing."""
    parts = []
    if recipe["exits"]:
        parts.append(f"early exits: classifiers after every {recipe['exits']} blocks learned along")
    if recipe["merged"]:
        parts.append(f"merged tokens: in {recipe['merged']:.0%} of the steps with all patches")
    return f"| prepared for | {'; '.join(parts)} |\n" if parts else ""


# ---- the program -----------------------------------------------------------------------------------------------------


def positive(text: str) -> float:
    """Reads a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def count(text: str) -> int:
    """Reads a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--out", required=True, help="folder for checkpoint, log and results")
    parser.add_argument("--arch", choices=ARCHS, default="micro", help="micro: 1.4 M parameters, tiny: 5.4 M")
    parser.add_argument("--name", help="name of the resulting files; by default --arch")
    parser.add_argument("--classes", type=count, default=0, help="take the first so many classes only")
    parser.add_argument("--epochs", type=count, default=0, help="passes over the data; by default 300, on a GPU")
    parser.add_argument("--minutes", type=positive, help="as many epochs as fit, at most --epochs; on a CPU 150")
    parser.add_argument("--augment", choices=STRENGTHS, help="full on a GPU, light on a CPU for few epochs")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the faster one")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", help="by default cuda where there is one")
    parser.add_argument("--threads", type=count, help="threads on a CPU; by default torch's")
    parser.add_argument("--cache", action="store_true", help="keep the decoded set in --out/data.pt")
    parser.add_argument("--save_every", type=positive, default=60, help="seconds between checkpoints")
    parser.add_argument(
        "--stop_after",
        type=positive,
        default=math.inf,
        help="save and stop so many seconds after the start; leave some for the imports before, and the file after",
    )
    parser.add_argument("--start", type=Path, help="begin with these weights, an earlier run's .safetensors")
    parser.add_argument("--head", choices=("keep", "drop"), default="keep", help="the classifier in the weight file")
    parser.add_argument("--source", help="the data's name for the card; by default the folder's")
    parser.add_argument("--licence", help="a sentence on the terms of the data, for the card")
    parser.add_argument("--measure", action="store_true", help="print the plan and its images/s, and train nothing")
    group = parser.add_argument_group("recipe")
    for one in fields(Recipe):
        kind = {"action": argparse.BooleanOptionalAction} if one.type is bool else {"type": one.type}
        group.add_argument(f"--{one.name}", default=None, **kind, help=one.metadata["help"])
    args = parser.parse_args(argv)
    args.name = args.name or args.arch
    folder = Path(args.data).resolve().name
    args.source = args.source or folder
    known = "tiny-imagenet" in f"{folder} {args.source}".lower().replace(" ", "-")
    args.licence = args.licence or (TINY_IMAGENET if known else UNKNOWN)
    return args


@contextlib.contextmanager
def stopping(at: float) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether to stop: the time is over, or a signal came (a second one ends at once)."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caught: list[int] = []

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        restore()

    for number in previous:
        signal.signal(number, catch)
    try:
        yield lambda: bool(caught) or time.monotonic() > at
    finally:
        restore()


def device_of(name: str | None) -> torch.device:
    """Takes the named device, or a GPU where there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); leave it out") from None
    return device


def pretrain(args: argparse.Namespace) -> None:
    """Trains, or goes on; writes the results when all is done."""
    started, out = time.monotonic(), Path(args.out)
    device = device_of(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = settle(args, device)
    train, val, names = read(args.data, recipe.size, args.classes, out / "data.pt" if args.cache else None)
    if recipe.batch > len(train):
        raise ValueError(f"--batch {recipe.batch} is more than the {len(train)} training images; give a smaller one")
    print(f"{len(train)} + {len(val)} images of {len(names)} classes, {time.monotonic() - started:.1f} s", flush=True)
    asked = {"precision": args.precision, "epochs": args.epochs, "minutes": args.minutes}
    if not (args.epochs or args.minutes):
        asked |= {"epochs": 300} if device.type != "cpu" else {"minutes": 150.0}
    data = {"classes": names, "images": [len(train), len(val)]}
    learner = Learner(recipe, len(names), device, args.compile, args.start)
    asked |= {"start": hashlib.sha256(args.start.read_bytes()).hexdigest() if args.start else None}
    run = Run(out, learner, train.to(device), val.to(device), {"recipe": asdict(recipe), "data": data, "asked": asked})
    run.begin()
    print(json.dumps({"plan": run.plan, "done": run.place.epoch, "machine": machine(device)}), flush=True)
    if args.measure:
        return
    with stopping(started + args.stop_after) as stop:
        if run.go(stop, args.save_every):
            export(run, args, names)
        else:
            print("stopped and saved; the same command goes on", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Runs the program; a user's mistake is one line and exit code 2."""
    args = arguments(argv)
    try:
        pretrain(args)
    except (ValueError, OSError) as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
