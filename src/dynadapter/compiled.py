"""Stages compiled one by one, survivors padded to a few batch sizes, so that routing never compiles anew."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynadapter import trunk as cut
from dynadapter.net import ExitNet, Routed
from dynadapter.policies import Policy


class CompiledNet:
    """Routes like :class:`ExitNet`, each stage and head through ``torch.compile``.

    How many samples go on is known only while routing. Each part is compiled for a few batch sizes once; a batch in
    between is padded with copies of its first row to the next size, and the answers of the padding are dropped.
    Compaction and policies stay outside the graphs. Changes to the network's tensors in place take effect; replaced
    layers do not.

    Args:
        net: The network, in evaluation mode, adapters injected or merged.
        buckets: The batch sizes to compile for, each part once a size; a larger batch goes in chunks of the largest.
        class_first: See :meth:`ExitNet.early`.
        options: Further arguments of ``torch.compile``, such as ``mode="max-autotune"``.

    Raises:
        ValueError: If the buckets are not rising sizes of at least 1, or more than torch keeps compiled.
    """

    def __init__(
        self, net: ExitNet, buckets: Sequence[int] = (1, 2, 4, 8, 16, 32), class_first: bool = True, **options: Any
    ) -> None:
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"buckets={list(buckets)} must be rising batch sizes of at least 1, such as (1, 8, 32)")
        if len(buckets) > torch._dynamo.config.recompile_limit:
            raise ValueError(
                f"{len(buckets)} buckets are more than the {torch._dynamo.config.recompile_limit} versions that torch "
                "keeps of a graph; give fewer, or raise torch._dynamo.config.recompile_limit"
            )
        self.net = net
        self.buckets = tuple(buckets)
        self.num_exits = net.num_exits
        self.num_classes = net.num_classes
        self.class_first = class_first

        def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
            # Torch counts versions by code object: four exits that shared one would use up its limit together.
            part.__code__ = part.__code__.replace()
            return torch.compile(part, dynamic=False, **options)

        for function in (cut.embed, cut.blocks, cut.finish, cut.tokens, cut.reads_class_row, cut.prefix_tokens):
            function.dispatch(type(net.trunk))  # a first look-up inside a graph would be guarded and compiled anew
        exits = range(net.num_exits)
        self._embed = compiled(lambda images: net.embed(images))
        self._begin = [compiled(lambda x, k=k: net.begin(k, x, class_first)) for k in exits]
        self._head = [compiled(lambda seen, k=k: net.head(k, seen)) for k in exits]
        self._complete = [compiled(lambda *held, k=k: net.complete(k, held)) for k in exits]

    def _padded(self, part: Callable[..., Any], *tensors: Tensor) -> Any:
        """Runs a part on tensors with one row a sample, at the next batch size that it was compiled for."""
        rows = len(tensors[0])
        size = next(bucket for bucket in self.buckets if bucket >= rows)
        if size > rows:
            tensors = tuple(torch.cat([t, t[:1].expand(size - rows, *t.shape[1:])]) for t in tensors)
        result = part(*(t.contiguous() for t in tensors))  # another memory layout would be compiled for anew
        if isinstance(result, Tensor):
            return result[:rows]
        return result[0][:rows], tuple(held[:rows] for held in result[1])

    def embed(self, images: Tensor) -> Tensor:
        """See :meth:`ExitNet.embed`."""
        return self._padded(self._embed, images)

    def begin(self, k: int, x: Tensor, class_first: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :meth:`ExitNet.begin`; what was chosen when compiling holds."""
        return self._padded(self._begin[k], x)

    def head(self, k: int, seen: Tensor) -> Tensor:
        """See :meth:`ExitNet.head`."""
        return self._padded(self._head[k], seen)

    def complete(self, k: int, held: tuple[Tensor, ...]) -> Tensor:
        """See :meth:`ExitNet.complete`."""
        return held[0] if len(held) == 1 else self._padded(self._complete[k], *held)

    def onward(self, k: int, x: Tensor) -> Tensor:
        """See :meth:`ExitNet.onward`; from the parts that are compiled."""
        return self.complete(k, self.begin(k, x)[1])

    def early(
        self, images: Tensor, policy: Policy, class_first: bool | None = None, chunk: int | None = None
    ) -> Routed:
        """See :meth:`ExitNet.early`; what was compiled holds, and chunks are at most the largest size."""
        chunk = min(chunk or self.buckets[-1], self.buckets[-1])
        return ExitNet.early(self, images, policy, self.class_first, chunk)  # type: ignore[arg-type]

    def warm_up(self, image: Tensor) -> "CompiledNet":
        """Compiles every part at every size.

        Args:
            image: One image (channels, height, width) of the size, type and device to come.
        """
        with torch.no_grad():
            for size in self.buckets:
                x = self.embed(image.repeat(size, 1, 1, 1))
                for k in range(self.num_exits):
                    seen, held = self.begin(k, x)
                    self.head(k, seen)
                    x = self.complete(k, held) if k < self.num_exits - 1 else x
        return self
