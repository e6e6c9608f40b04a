"""Several tasks in one batch: bundles of one backbone whose low-rank adapters differ by row."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dynadapter.adapters import AdapterLayer, LoRA, adapter_layers
from dynadapter.adapters.injection import set_called
from dynadapter.adapters.lora import LowRankLayer
from dynadapter.adapters.lowrank import add_product, some_outputs
from dynadapter.exits.net import ExitNet
from dynadapter.serve.bundle import Bundle
from dynadapter.serve.bundle.tensors import frozen_names
from dynadapter.serve.sharing import share_backbones


class TaskRows:
    """How many rows of the present batch belong to each task; the rows of a task are neighbours.

    Attributes:
        counts: Samples of each task, in the order of the tasks.
    """

    def __init__(self, tasks: int) -> None:
        self.counts = [0] * tasks

    def slices(self, rows: int) -> Iterator[tuple[int, slice]]:
        """Yield each task that has samples, and its part of a tensor.

        Args:
            rows: Length of the tensor's first dimension: the samples, or a multiple where each has several windows.
        """
        start, factor = 0, rows // max(1, sum(self.counts))
        for task, count in enumerate(self.counts):
            if count:
                yield task, slice(start, start + count * factor)
                start += count * factor


class ByTaskLayer(AdapterLayer):
    """``W x + b + s_t * up_t @ down_t @ x``, where t is the task of the row.

    The frozen product is computed once for all rows, the small ones for the rows of each task.

    Args:
        base_layer: The layer of the backbone.
        layers: The layer of each task in this place; None where a task has no adapter here.
        batch: The rows of each task.
    """

    def __init__(self, base_layer: nn.Module, layers: Sequence[LowRankLayer | None], batch: TaskRows) -> None:
        super().__init__(base_layer, LoRA())
        self.layers, self.batch = tuple(layers), batch  # a tuple: they are not children, and own the same base layer

    def forward(self, x: Tensor) -> Tensor:
        """Map the base layer's input to its output with the update of each row's task."""
        return self._updated(self.base_layer(x), x, slice(None))

    def some(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Compute only the outputs ``start:stop`` for tokens (..., width)."""
        part = slice(start, stop)
        return self._updated(some_outputs(self.base_layer, x, part), x, part)

    def _updated(self, y: Tensor, x: Tensor, outputs: slice) -> Tensor:
        parts = []
        for task, rows in self.batch.slices(len(x)):
            layer, part = self.layers[task], y[rows]
            if layer is not None:
                up, first = layer.matrix_up()[outputs], layer.channels_first
                part = add_product(part, layer.project_down(x[rows]), up, None, layer.scale, first, own=True)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Together:
    """Bundles of one backbone as one network, whose stages take rows of all tasks in one batch.

    The frozen layers run once for the whole batch. LoRA, and every other low-rank kind, acts on the rows of its own
    task, and so does each bundle's head. :meth:`Engine.together` runs the stages.

    Args:
        bundles: At least two, on one device, run by torch, with their adapters not merged. They are changed in place:
            they hold the frozen tensors once.
        names: Names of the bundles in messages; None for their places.

    Raises:
        ValueError: Something other than adapters, heads and policies differs, or an adapter is not low-rank.
    """

    def __init__(self, bundles: Sequence[Bundle], names: Sequence[str] | None = None) -> None:
        if len(bundles) < 2:
            raise ValueError("bundles: one bundle has batches of its own; give at least two")
        share_backbones(bundles)
        names = names or [f"bundle {place}" for place in range(len(bundles))]
        for place, bundle in enumerate(bundles):
            if reason := _differs(bundles[0], bundle):
                raise ValueError(
                    f"{names[place]} cannot be in one batch with {names[0 if place else 1]}: {reason}; run it by itself"
                )
        self.bundles = tuple(bundles)
        self.batch = TaskRows(len(bundles))
        first = bundles[0].net
        tensors = {id(tensor): tensor for tensor in (*first.parameters(), *first.buffers())}
        self.net: ExitNet = copy.deepcopy(first, tensors)  # new modules, the same tensors
        layers = [adapter_layers(bundle.net.backbone) for bundle in bundles]
        for name in dict.fromkeys(name for one in layers for name in one):
            own = self.net.backbone.get_submodule(name)
            base = own.base_layer if isinstance(own, AdapterLayer) else own
            found = [one.get(name) for one in layers]
            self.net.backbone.set_submodule(name, ByTaskLayer(base, found, self.batch))  # type: ignore[arg-type]
            set_called(self.net.backbone, name, True)

    def step(
        self, k: int, inputs: tuple[Tensor, ...], counts: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Run stage ``k`` for rows of several tasks, and the head of each task for its own rows.

        Args:
            k: Exit index, from 0.
            inputs: The first result for stage ``k - 1``, one row for each sample; the images for stage 0. The rows of a
                task are neighbours, in the order of the tasks.
            counts: Rows of each task.

        Returns:
            What the next stage takes, and by task the logits (rows, classes) of those that have rows.
        """
        self.batch.counts = list(counts)
        x = self.net.complete(k - 1, inputs) if k else self.net.embed(*inputs)
        head_input, stage_state = self.net.begin(k, x, True)
        tasks = self.batch.slices(len(head_input))
        return stage_state, {task: self.bundles[task].net.head(k, head_input[rows]) for task, rows in tasks}


def _differs(first: Bundle, other: Bundle) -> str | None:
    """Return what keeps two bundles out of one batch, None if nothing does."""
    a, b = first.net, other.net
    if other.graphs is not None:
        return f"it runs by {other.backend}, and only torch runs several tasks in one batch"
    for layer in adapter_layers(b.backbone).values():
        if not isinstance(layer, LowRankLayer) or type(layer).forward is not LowRankLayer.forward:  # as that of DoRA
            return f"its adapter is {layer.kind}, and only low-rank ones, such as LoRA, differ by row"
    sources = [bundle.config.backbone for bundle in (first, other)]
    for name in ("fingerprint", "name", "timm_args", "image_size", "depth"):  # the fingerprint is of tensors alone
        if getattr(sources[0], name) != getattr(sources[1], name):
            return f"their backbones differ ({name})"
    if a.exit_depths != b.exit_depths or a.token_merging != b.token_merging:
        return "their exits or their token merging differ"
    if a.beside is not None or b.beside is not None:
        return "exit tokens belong to one task"
    reads = [[net.reads_class_token(k) for k in range(net.num_exits)] for net in (a, b)]
    sizes = [bundle.preprocess.image_size if bundle.preprocess else None for bundle in (first, other)]
    if reads[0] != reads[1] or sizes[0] != sizes[1]:
        return "their heads read other tokens, or their images have another size"
    theirs = {_bare(name): tensor for name, tensor in a.state_dict(keep_vars=True).items() if name in frozen_names(a)}
    ours = b.state_dict(keep_vars=True)
    for name in frozen_names(b):
        if (like := theirs.get(_bare(name))) is None or like.data_ptr() != ours[name].data_ptr():
            return f"{_bare(name)} differs, because a bundle is merged, on another device or of another type"
    return None


def _bare(name: str) -> str:
    return name.replace(".base_layer.", ".")
