"""Trains one network on one task: everything lies on the device as tensors, and a step waits for nobody."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from recipes import METHODS, Recipe
from torch import Tensor, nn

from dynadapter import Cosine, ExitNet, VTAB1k, Warmup, create_backbone, inject
from dynadapter.adapters import AdapterLayer, AdapterSpec, adapter_layers
from dynadapter.backbones import blocks, classifier
from dynadapter.data.dataset import ImageDataset
from dynadapter.data.normalize import normalize
from dynadapter.exits.net import exit_blocks
from dynadapter.images.preprocess import Preprocess
from dynadapter.training.callbacks.sparsity import _Held, _own_parameters
from dynadapter.training.losses import exit_losses

RATE = Warmup(fraction=0.1, start=1e-3, then=Cosine(start=1.0, end=1e-2))
"""Factor on the learning rate: 10 of 100 epochs up, then a cosine."""


# ---- the backbone and the task ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackboneFile:
    """A pre-trained backbone on the disk, as ``pretrain.py`` leaves it: NAME.json beside NAME.safetensors.

    The JSON file has ``architecture`` (timm's name) and ``timm_args``; it may have ``preprocess`` with ``image_size``
    and ``normalization``, ``weights`` (a file beside it; null draws the tensors at random) and its ``sha256``.
    """

    name: str
    architecture: str
    timm_args: dict[str, Any]
    weights: Path | None
    digest: str
    preprocess: Preprocess

    @classmethod
    def read(cls, path: str | Path) -> "BackboneFile":
        """Reads the JSON file and checks the weights' hash.

        Raises:
            ValueError: A file is missing or is not what it should be.
        """
        path = Path(path)
        try:
            about = json.loads(path.read_text())
            architecture, timm_args = about["architecture"], about["timm_args"]
        except OSError as error:
            raise ValueError(
                f"no backbone in {path}: {error.strerror}; give the NAME.json that pretrain.py wrote"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} describes no backbone ({error}); it needs architecture and timm_args") from None
        file = about.get("weights", f"{path.stem}.safetensors")
        weights = path.parent / file if file else None
        if weights is not None and not weights.is_file():
            raise ValueError(f"{path} names weights {weights}, which are not there")
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights else "random"
        if weights and about.get("sha256", digest) != digest:
            raise ValueError(f"{weights} is not the file that {path} describes: its SHA-256 is {digest[:12]}...")
        given = {"image_size": timm_args.get("img_size", 224)} | about.get("preprocess", {})
        return cls(path.stem, architecture, timm_args, weights, digest, Preprocess(**given))

    @property
    def label(self) -> str:
        """Name and beginning of the hash."""
        return f"{self.name}:{self.digest[:8]}"

    def build(self, classes: int, seed: int) -> nn.Module:
        """Makes the frozen backbone with a new classifier, whose tensors follow from the seed."""
        if self.weights is None:
            seed = 0  # the same backbone for all
        return create_backbone(self.architecture, classes, weights=self.weights, seed=seed, **self.timm_args)


@dataclass(frozen=True)
class Images:
    """Images of a split: bytes (samples, 3, size, size), classes (samples,), and paths within the task's folder."""

    pixels: Tensor
    targets: Tensor
    files: list[str]


class Task:
    """A task in the layout of VTAB-1k; a split is read when it is asked for, and kept.

    Args:
        root: Folder that holds the tasks.
        name: The task's folder.
        preprocess: From image to tensor.
    """

    def __init__(self, root: str | Path, name: str, preprocess: Preprocess) -> None:
        options = {"image_size": preprocess.image_size, "normalization": preprocess.normalization}
        self.name = name
        self.preprocess = preprocess
        self._parts = {split: VTAB1k(root, name, split=split, **options) for split in ("train800", "train800val200")}  # type: ignore[arg-type]
        self.classes = self._parts["train800"].num_classes
        self.group = self._parts["train800"].group
        self._splits: dict[str, Images] = {}

    def split(self, name: str) -> Images:
        """Reads ``train800``, ``val200``, ``train800val200`` or ``test``."""
        if name not in self._splits:
            data = self._parts["train800val200" if name == "train800val200" else "train800"]
            part = {"val200": "val", "test": "test"}.get(name, "train")
            samples = data.samples(part)  # type: ignore[arg-type]
            pixels = ImageDataset(samples, self.preprocess, cache=True).cached
            if pixels is None:
                raise ValueError(f"{data.folder} has no image in {name}")
            files = [str(Path(str(path)).relative_to(data.folder)) for path, _ in samples]
            self._splits[name] = Images(pixels, torch.tensor([int(label) for _, label in samples]), files)
        return self._splits[name]


# ---- the network -----------------------------------------------------------------------------------------------------


def build(backbone: BackboneFile, classes: int, method: str, recipe: Recipe, scale: float, seed: int) -> ExitNet:
    """Makes the network of a method by a recipe; its new tensors follow from the seed.

    For ``full`` the scale is no part of the network: it is a factor on the learning rate.
    """
    model = backbone.build(classes, seed)
    torch.manual_seed(seed)
    kind = METHODS[method]
    if method == "full":
        model.requires_grad_(True)
    if kind is not None:
        first = exit_blocks(len(blocks(model)), recipe.every, recipe.exits)[0]
        _inject(model, kind(scale), recipe, first)
    torch.manual_seed(seed)  # the heads' tensors do not depend on the adapters
    return ExitNet(model, recipe.heads, recipe.every, recipe.exits, recipe.token_merging)


def _inject(model: nn.Module, spec: AdapterSpec, recipe: Recipe, first: int) -> None:
    """Puts adapters into all blocks; those before the first exit may be wider, or weigh more."""
    if recipe.early_scale == 1 and recipe.early_width == 1:
        inject(model, spec)
        return
    size = "rank" if hasattr(spec, "rank") else "bottleneck"
    wider = {size: getattr(spec, size) * recipe.early_width, "scale": spec.scale * recipe.early_scale}
    early = {id(m) for unit in blocks(model)[:first] for part in unit for m in part.modules()}
    names = [(n, id(m) in early) for n, m in model.named_modules() if any(fnmatchcase(n, p) for p in spec.places)]
    for kind, here in ((replace(spec, **wider), True), (spec, False)):
        targets = tuple(name for name, is_early in names if is_early == here)
        if targets:
            inject(model, replace(kind, targets=targets))


def count_trainable(net: ExitNet) -> dict[str, int]:
    """Counts what is trained: adapters, early heads, the last head, and what else of the backbone."""
    own = {id(p): p.numel() for layer in adapter_layers(net.backbone).values() for p in _own_parameters(layer)}
    heads = sum(p.numel() for p in net.heads.parameters())
    last = sum(p.numel() for layer in classifier(net.backbone) for p in layer.parameters())
    total = sum(p.numel() for p in net.parameters() if p.requires_grad)
    adapters = sum(own.values())
    return {"adapters": adapters, "heads": heads, "last_head": last, "backbone": total - adapters - heads - last}


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Gives x as it is, whose gradient is multiplied by a factor."""
    return x * factor + x.detach() * (1 - factor)


def forward(net: ExitNet, images: Tensor, recipe: Recipe) -> Tensor:
    """Runs every exit like :meth:`ExitNet.forward`, with the recipe's paths for gradients; (exits, batch, classes)."""
    if not (recipe.rescale or recipe.within):
        return net(images)
    x, logits = net.embed(images), []
    for k in range(net.num_exits):
        x = net.stage(k, x)
        behind = net.num_exits - k  # exits that this stage serves
        if recipe.rescale and behind > 1:
            logits.append(net.head(k, scaled_gradient(x, 1 / behind)))
            x = scaled_gradient(x, 1 - 1 / behind)
        else:
            logits.append(net.head(k, x))
        if recipe.within:
            x = x.detach()
    return torch.stack(logits)


def loss_of(logits: Tensor, targets: Tensor, weights: Tensor, recipe: Recipe) -> Tensor:
    """Gives the joint loss: the exits' cross-entropies by weight, of which the early ones' may be part distillation."""
    losses = exit_losses(logits, targets)
    if recipe.distillation is not None:
        losses = recipe.distillation.mix(losses, logits)
    return (weights * losses).sum()


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How every arm is trained alike."""

    epochs: int = 100
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4


class Fit:
    """A network's training on images that lie on its device.

    All that changes from step to step stands in tables there, read at a counter: no step needs the host, and so a step
    can be recorded once and replayed. The trained tensors are pieces of two long ones, adapters and the rest, which
    AdamW moves as a whole; it works element by element, so that nothing else comes out.

    Args:
        net: On its device.
        recipe: How.
        images: Normalised (samples, 3, size, size).
        targets: (samples,).
        protocol: Epochs, batch, rate.
        seed: Of order, dropout and masks.
    """

    def __init__(
        self, net: ExitNet, recipe: Recipe, images: Tensor, targets: Tensor, protocol: Protocol, seed: int
    ) -> None:
        self.net, self.recipe, self.images, self.targets = net.train(), recipe, images, targets
        self.device = images.device
        batch = min(protocol.batch, len(images))
        self.steps = protocol.epochs * (len(images) // batch)  # the incomplete batch of an epoch is left out
        self.order = _order(len(images), batch, protocol.epochs, seed).to(self.device)
        self.layers = [layer for layer in net.modules() if isinstance(layer, AdapterLayer)]
        self.masks = bool(self.layers) and any(recipe.keep(t) < 1 for t in self._progress())
        self.table = torch.tensor([self._row(t) for t in self._progress()], device=self.device)
        self.table[:, net.num_exits] *= protocol.lr
        self.rates = torch.zeros(len(self.layers), device=self.device)
        if recipe.shallow is not None:
            for layer, rate in zip(self.layers, self.rates, strict=True):
                layer.dropout.active = bool((self.table[:, net.num_exits + 2 :] > 0).any())
                layer.dropout.rate = rate  # a view: one copy sets them all
        own = [p for layer in self.layers for p in _own_parameters(layer)]
        ids = {id(p) for p in own}
        rest = [p for p in net.parameters() if p.requires_grad and id(p) not in ids]
        self.parts = [_Joined(part) for part in (own, rest) if part]
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            [part.whole for part in self.parts],
            lr=self.lr,
            weight_decay=protocol.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.counter = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(self.steps, device=self.device)
        heads = {id(p) for layer in (net.heads, *classifier(net.backbone)) for p in layer.parameters()}
        learns = any(p.requires_grad and id(p) not in heads for p in net.parameters())
        self.held = None if learns else self._frozen_parts()

    def _progress(self) -> list[float]:
        return [step / max(1, self.steps - 1) for step in range(self.steps)]

    def _row(self, progress: float) -> list[float]:
        """What a step reads: the exits' weights, the factor on the rate, the share kept, each adapter's dropout."""
        recipe = self.recipe
        dropout = []
        if recipe.shallow is not None:
            shallow, deep = recipe.shallow(progress), recipe.deep(progress)
            dropout = [(1 - layer.depth) * shallow + layer.depth * deep for layer in self.layers]
        return [*recipe.weighting(progress, self.net.num_exits), RATE(progress), recipe.keep(progress), *dropout]

    @torch.no_grad()
    def _frozen_parts(self) -> list[Tensor]:
        """What the heads read of every image, where nothing before them learns and nothing is drawn at random."""
        parts: list[list[Tensor]] = [[] for _ in range(self.net.num_exits)]
        for images in self.images.split(256):
            with self.precision():
                x = self.net.embed(images)
                for k in range(self.net.num_exits):
                    x = self.net.stage(k, x)
                    parts[k].append(x[:, :1].clone() if self.net.reads_class_token(k) else x)
        return [torch.cat(part) for part in parts]

    def precision(self) -> torch.autocast:
        """bfloat16 where it pays."""
        # no cache: what a recorded step has cast once it would never cast again
        on = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    def logits(self, rows: Tensor) -> Tensor:
        """Runs every exit on some images: (exits, batch, classes)."""
        if self.held is None:
            return forward(self.net, self.images.index_select(0, rows), self.recipe)
        return torch.stack([self.net.head(k, x.index_select(0, rows)) for k, x in enumerate(self.held)])

    def step(self) -> None:
        """Takes the next step."""
        exits = self.net.num_exits
        now, rows = self.table.index_select(0, self.counter)[0], self.order.index_select(0, self.counter)[0]
        self.net.exit_weights.copy_(now[:exits])
        self.lr.copy_(now[exits])
        if self.recipe.shallow is not None:
            self.rates.copy_(now[exits + 2 :])
        with self.precision():
            logits = self.logits(rows)
        loss = loss_of(logits, self.targets.index_select(0, rows), self.net.exit_weights, self.recipe)
        if self.recipe.structured is not None:
            with self.precision():
                images = self.images.index_select(0, rows)
                loss = loss + self.recipe.structured.loss(self.net, images, logits, self.net.exit_weights)
        for part in self.parts:
            part.slope.zero_()
        loss.backward()
        held = self._mask(now[exits + 1]) if self.masks else None
        self.optimizer.step()
        if held is not None:
            held.restore(self.optimizer)
        self.losses.index_copy_(0, self.counter, loss.detach()[None])
        self.counter += 1

    def _mask(self, keep: Tensor) -> _Held | None:
        """Lets a random part of the adapters' elements rest in this step, as BidirectionalSparsity does."""
        adapters = self.parts[0]
        moves = torch.rand_like(adapters.slope) < keep
        adapters.slope.masked_fill_(~moves, 0)
        return _Held(adapters.whole, moves, self.optimizer) if self.recipe.masked == "frozen" else None

    def run(self, replay: bool = False) -> list[float]:
        """Takes all steps; gives the mean loss of each tenth of them.

        Args:
            replay: Record a step on the GPU and replay it.
        """
        if replay and self.device.type == "cuda":
            self._replay()
        else:
            for _ in range(self.steps):
                self.step()
        self.net.eval()
        return [part.mean().item() for part in self.losses.tensor_split(min(10, self.steps))]

    def _replay(self) -> None:
        stream, first = torch.cuda.Stream(), min(3, self.steps)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(first):  # so that every buffer is there
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        for _ in range(self.steps - first):
            graph.replay()
        torch.cuda.synchronize()


class _Joined:
    """Parameters as pieces of one long tensor, and their gradients of another."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.whole = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        self.slope = torch.zeros_like(self.whole)
        self.whole.grad = self.slope
        sizes = [p.numel() for p in parameters]
        pieces = zip(parameters, self.whole.detach().split(sizes), self.slope.split(sizes), strict=True)
        for parameter, value, slope in pieces:
            parameter.data = value.view(parameter.shape)
            parameter.grad = slope.view(parameter.shape)  # backward adds to it in place


def _order(samples: int, batch: int, epochs: int, seed: int) -> Tensor:
    """Draws which samples each step sees, (steps, batch)."""
    generator = torch.Generator().manual_seed(seed)
    epoch = samples // batch * batch
    orders = [torch.randperm(samples, generator=generator)[:epoch].view(-1, batch) for _ in range(epochs)]
    return torch.cat(orders)


def normalized(images: Images, preprocess: Preprocess, device: torch.device) -> Tensor:
    """Puts all images of a split on the device as the backbone takes them."""
    return normalize(images.pixels.to(device), preprocess)


@torch.no_grad()
def stacked_logits(net: ExitNet, images: Images, preprocess: Preprocess, device: torch.device) -> Tensor:
    """Runs every exit on all images of a split: (exits, samples, classes), float32, on the CPU."""
    on = device.type == "cuda"
    parts = []
    for pixels in images.pixels.split(256):
        with torch.autocast(device.type, torch.bfloat16, enabled=on):
            parts.append(net.eval()(normalize(pixels.to(device), preprocess)).float())
    return torch.cat(parts, 1).cpu()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Runs something; gives its result and the seconds that it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
