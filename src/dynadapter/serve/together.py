"""Several tasks in one batch: bundles of one backbone whose low-rank adapters differ by row."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dynadapter.adapters import AdapterLayer, LoRA, adapter_layers
from dynadapter.adapters.lora import LowRankLayer
from dynadapter.adapters.lowrank import add_product, some_outputs
from dynadapter.exits.net import ExitNet
from dynadapter.exits.policies import combined, confidence, wide
from dynadapter.serve.bundle import Bundle, Prediction
from dynadapter.serve.bundle.loading import Source
from dynadapter.serve.bundle.tensors import frozen_names
from dynadapter.serve.sharing import share_backbones
from dynadapter.serve.stages import lengthened


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
    """Bundles of one backbone as one network, which takes images of all tasks in one batch.

    The frozen layers run once for the whole batch. LoRA, and every other low-rank kind, acts on the rows of its own
    task; heads, temperatures, exit policies and classes are those of each bundle.

    >>> both = Together([flowers, birds])                                     # doctest: +SKIP
    >>> both.predict(["rose.jpg", "robin.jpg"], [0, 1])                       # doctest: +SKIP

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

    def predict(self, images: Sequence[Source], tasks: Sequence[int], *, batch_size: int = 32) -> list[Prediction]:
        """Classify images; each is read, routed and named as by its own bundle.

        Args:
            images: As of :meth:`Bundle.predict`.
            tasks: The place of each image's bundle, from 0.
            batch_size: Images that are computed at once.

        Returns:
            One prediction for each image, in order.

        Raises:
            ValueError: As of :meth:`Bundle.predict`, a task index is out of range, or `batch_size` is below 1.
            OSError: The machine fails to read a file.
            TypeError: An item is not an image.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self._check(len(images), tasks)
        predictions: list[Prediction] = []
        like = next(self.net.backbone.parameters())
        for start in range(0, len(images), batch_size):
            part = range(start, min(start + batch_size, len(images)))
            tensors = torch.stack([self.bundles[tasks[i]].read(images[i]) for i in part])
            logits, exits = self.route(tensors.to(like.device, like.dtype), [tasks[i] for i in part])
            for i, row, place in zip(part, logits, exits.tolist(), strict=True):
                if not row.isfinite().all():
                    raise ValueError(
                        f"the logits of image {i} are not finite; check the image, and the bundle's weights"
                    )
                label = self.bundles[tasks[i]].class_names[int(row.argmax())]
                predictions.append(Prediction(label, float(confidence(row[None])[0]), place))
        return predictions

    @torch.inference_mode()
    def route(self, images: Tensor, tasks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Route preprocessed images of several tasks.

        Args:
            images: (batch, channels, height, width).
            tasks: The place of each image's bundle, from 0.

        Returns:
            The logits of each image (classes of its task,), in float32 or wider, and the zero-based exits (batch,).

        Raises:
            ValueError: There are more or fewer tasks than images, or a task index is out of range.
        """
        self._check(len(images), tasks)
        found: list[Tensor] = [images.new_empty(0)] * len(images)
        exits = torch.zeros(len(images), dtype=torch.int64)
        rows = sorted(range(len(images)), key=tasks.__getitem__)  # the rows of a task are neighbours
        for start in range(0, len(rows), chunk := self.net.chunk_for(images)):
            part = rows[start : start + chunk]
            for row, logits, place in self._routed(images[part], [(row, tasks[row]) for row in part]):
                found[row], exits[row] = wide(logits), place
        return found, exits

    def step(
        self, k: int, inputs: tuple[Tensor, ...], counts: Sequence[int], class_first: bool | None = True
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Run stage ``k`` for rows of several tasks, and the head of each task for its own rows.

        Args:
            k: Exit index, from 0.
            inputs: The first result for stage ``k - 1``, one row for each sample; the images for stage 0. The rows of a
                task are neighbours, in the order of the tasks.
            counts: Rows of each task.
            class_first: See :meth:`ExitNet.early`; None decides by :meth:`ExitNet.prefers_class_first`.

        Returns:
            What the next stage takes, and by task the logits (rows, classes) of those that have rows.
        """
        self.batch.counts = list(counts)
        x = self.net.complete(k - 1, inputs) if k else self.net.embed(*inputs)
        first = self.net.prefers_class_first(x) if class_first is None else class_first
        head_input, stage_state = self.net.begin(k, x, first)
        tasks = self.batch.slices(len(head_input))
        return stage_state, {task: self.bundles[task].net.head(k, head_input[rows]) for task, rows in tasks}

    def _routed(self, images: Tensor, owners: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor, int]]:
        """Yield the row, logits and exit of each sample of a chunk.

        Args:
            images: (batch, channels, height, width), in the order of the tasks.
            owners: The row and the task of each.
        """
        inputs: tuple[Tensor, ...] = (images,)
        history: dict[int, Tensor] = {}  # by task, (exits so far, samples, classes)
        for k in range(self.net.num_exits):
            inputs, logits = self.step(k, inputs, self._counted(owners), None)
            stay: list[int] = []
            for task, rows in list(self.batch.slices(len(owners))):
                policy = self.bundles[task].policy
                history[task] = lengthened(history.get(task), logits[task])
                last = k == self.net.num_exits - 1
                stops = [True] * (rows.stop - rows.start) if last else policy.should_exit(history[task]).tolist()
                answers = combined(policy, history[task])[-1]
                for place, (stop, answer) in enumerate(zip(stops, answers, strict=True)):
                    if stop:
                        yield owners[rows.start + place][0], answer, k
                going = [place for place, stop in enumerate(stops) if not stop]
                history[task] = history[task][:, going]
                stay += [rows.start + place for place in going]
            if not stay:
                return
            owners = [owners[place] for place in stay]
            index = torch.tensor(stay, device=images.device)
            inputs = tuple(part.index_select(0, index) for part in inputs)

    def _counted(self, owners: list[tuple[int, int]]) -> list[int]:
        tasks = [task for _, task in owners]
        return [tasks.count(task) for task in range(len(self.bundles))]

    def _check(self, images: int, tasks: Sequence[int]) -> None:
        if len(tasks) != images:
            raise ValueError(f"{images} images and {len(tasks)} tasks; give one task for each image")
        if wrong := [task for task in tasks if not 0 <= task < len(self.bundles)]:
            last = len(self.bundles) - 1
            raise ValueError(f"task {wrong[0]} names none of the {last + 1} bundles; give 0 to {last}")


def _differs(first: Bundle, other: Bundle) -> str | None:
    """Return what keeps two bundles out of one batch, None if nothing does."""
    a, b = first.net, other.net
    if other.graphs is not None:
        return f"it runs by {other.backend}, and only torch runs several tasks in one batch"
    for layer in adapter_layers(b.backbone).values():
        if not isinstance(layer, LowRankLayer):
            return f"its adapter is {layer.kind}, and only low-rank ones, such as LoRA, differ by row"
    if first.config.backbone.fingerprint != other.config.backbone.fingerprint:
        return "their backbones differ"
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
            return f"{_bare(name)} differs, because a bundle is merged or on another device"
    return None


def _bare(name: str) -> str:
    return name.replace(".base_layer.", ".")
