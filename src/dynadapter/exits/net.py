"""A frozen backbone cut into stages, with an exit after each: all exits for training, per-sample routing for use."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynadapter import backbones as cut
from dynadapter.adapters import AdapterLayer, merge
from dynadapter.exits.heads import Balanced, Heads
from dynadapter.exits.policies import Policy
from dynadapter.exits.token_merging import TokenMerging

CPU_CHUNK = 32
"""Images that a CPU routes at a time; larger batches leave its caches (ours)."""

CLASS_FIRST_FROM = 4
"""Images from which the class token's row comes first; one alone gains only on a larger backbone."""

CLASS_FIRST_WORK = 20_000_000
"""Tokens of an image times width squared from which one alone gains, too, on a CPU: a ViT-S at 224 px does, with 29
million, a ViT-Ti of 64 tokens, with 2.4, does not (``benchmarks/latency.py``)."""


class Routed(NamedTuple):
    """What routing a batch gave, in the order of its input.

    ``logits`` (batch, classes) are those of the exit at which a sample left, ``exit_index`` (batch,) that exit, counted
    from 0.
    """

    logits: Tensor
    exit_index: Tensor

    @property
    def nonfinite(self) -> Tensor:
        """Counts (scalar) the samples whose last logits were not finite: nobody leaves early with such logits."""
        return (~self.logits.isfinite().all(-1)).sum()


def exit_blocks(depth: int, every: int = 3, exit_depths: Sequence[int] | None = None) -> tuple[int, ...]:
    """Says after how many blocks each exit stands.

    An interval puts an exit after every ``every`` blocks; the backbone's end is always the last exit, so an interval
    that does not divide the depth leaves a shorter last stage.

    >>> exit_blocks(12, every=3)
    (3, 6, 9, 12)
    >>> exit_blocks(12, every=5)
    (5, 10, 12)
    >>> exit_blocks(12, exit_depths=[2, 7])
    (2, 7, 12)

    Args:
        depth: Blocks of the backbone.
        every: The interval in blocks, from 1 to ``depth``; ``depth`` itself gives the static network.
        exit_depths: An explicit list instead: strictly rising block counts; ``depth`` is added where it is missing, and
            an empty list gives the static network.

    Raises:
        ValueError: If the interval or the list does not fit the depth.
    """
    if exit_depths is None:
        if not 1 <= every <= depth:
            raise ValueError(
                f"every={every} puts no exit inside a backbone of {depth} blocks; choose 1 to {depth}, or list "
                f"the exits"
            )
        exit_depths = range(every, depth + 1, every)
    places = list(exit_depths)
    if not places or places[-1] != depth:
        places.append(depth)
    if places[0] < 1 or any(b <= a for a, b in pairwise(places)):
        raise ValueError(
            f"exit_depths={list(exit_depths)} must be strictly rising block counts between 1 and {depth}, the "
            f"depth of this backbone"
        )
    return tuple(places)


class ExitNet(nn.Module):
    """A timm backbone with an early head after each stage; the last exit is the backbone's own head.

    Args:
        backbone: A timm model of a family that :mod:`dynadapter.backbones` can cut, with adapters injected or without.
        heads: The kind of the early heads.
        every: An exit after every so many blocks (the paper's interval T); see :func:`exit_blocks`.
        exit_depths: An explicit list of block counts instead of the interval.
        token_merging: Merge like tokens on the way; None keeps them all. For backbones of the ViT family.

    Attributes:
        exit_depths: After how many blocks each exit stands; the last one is the depth.
        exit_weights: Buffer (exits,), each exit's weight in the joint loss; written by schedules, not saved.

    Raises:
        TypeError: If no cut is known for the backbone's class.
        ValueError: If the exits or the merging do not fit the backbone, or it has no classifier.
    """

    exit_weights: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        heads: Heads | None = None,
        every: int = 3,
        exit_depths: Sequence[int] | None = None,
        token_merging: TokenMerging | None = None,
    ) -> None:
        super().__init__()
        blocks = cut.blocks(backbone)
        self.num_classes = int(backbone.num_classes)  # type: ignore[arg-type]
        if self.num_classes < 1:
            raise ValueError("the backbone has no classifier; create it with num_classes of at least 1")
        self.depth = len(blocks)
        self.exit_depths = exit_blocks(self.depth, every, exit_depths)
        self.backbone = backbone
        if token_merging is not None:
            token_merging.check(self.depth)
            if needing := cut.needs_all_tokens(backbone):
                raise ValueError(
                    f"tokens cannot be merged in a {needing}, which may need each of them in its place; leave merging "
                    "out, or take a ViT with timm's own blocks"
                )
        self.token_merging = token_merging
        widths, heads = cut.widths(backbone), heads or Balanced()
        self._width = widths[0]
        self.heads = nn.ModuleList(
            heads.build(
                exit=k,
                exits=self.num_exits,
                width=widths[blocks_so_far - 1],
                num_classes=self.num_classes,
                prefix_tokens=cut.prefix_tokens(backbone),
                class_token=cut.has_class_token(backbone),
            )
            for k, blocks_so_far in enumerate(self.exit_depths[:-1])
        )
        self.register_buffer("exit_weights", torch.full((self.num_exits,), 1 / self.num_exits), persistent=False)
        self.train(self.training)

    @property
    def num_exits(self) -> int:
        """Number of exits, the last one included."""
        return len(self.exit_depths)

    def train(self, mode: bool = True) -> "ExitNet":
        """Sets the heads and adapters to training or evaluation; the frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        for layer in self.backbone.modules():
            if isinstance(layer, AdapterLayer):
                layer.train(mode)
                layer.base_layer.eval()
        for head in cut.classifier(self.backbone):
            head.train(mode)
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Turns images (batch, channels, height, width) into what the first block takes."""
        return cut.embed(self.backbone, images)

    def stage_modules(self, k: int) -> Iterator[nn.Module]:
        """Yields the modules between exit ``k - 1`` and exit ``k`` in the order in which they run."""
        for _, unit in self._units(k):
            yield from unit

    def _units(self, k: int) -> list[tuple[int, tuple[nn.Module, ...]]]:
        """Lists the blocks of stage ``k``, each with the number of blocks before it."""
        start = self.exit_depths[k - 1] if k else 0
        return list(enumerate(cut.blocks(self.backbone)[start : self.exit_depths[k]], start))

    def _merged(self, place: int, x: Tensor, logs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Merges tokens where that is to be done after so many blocks."""
        if self.token_merging is None or place not in self.token_merging.after:
            return x, logs
        return self.token_merging(x, cut.prefix_tokens(self.backbone), logs)

    def _opened(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Parts what :meth:`stage` gave into tokens and the logarithms of how many each stands for, if it has them."""
        if self.token_merging is None or not self.token_merging.proportional or x.shape[-1] == self._width:
            return x, None
        return x[..., :-1], x[..., -1].contiguous()

    @staticmethod
    def _closed(x: Tensor, logs: Tensor | None) -> Tensor:
        """Joins them, the logarithms as one more channel, so that a sample is one row of one tensor between stages."""
        return x if logs is None else torch.cat([x, logs[..., None]], -1)

    def stage(self, k: int, x: Tensor) -> Tensor:
        """Runs the blocks between exit ``k - 1`` and exit ``k``.

        Behind merged tokens that are counted (:class:`~dynadapter.exits.token_merging.TokenMerging`), a token of the
        result has one more channel, the logarithm of how many it stands for; :meth:`head` and the next stage know it.
        """
        x, logs = self._opened(x)
        for place, unit in self._units(k):
            x, logs = self._merged(place, x, logs)
            for module in unit:
                x = cut.run(module, x, logs)
        return self._closed(x, logs)

    def head(self, k: int, x: Tensor) -> Tensor:
        """Reads logits (batch, classes) off the output of stage ``k``."""
        x, _ = self._opened(x)
        if k == self.num_exits - 1:
            return cut.classify(self.backbone, cut.finish(self.backbone, x))
        return self.heads[k](cut.tokens(self.backbone, x))

    def forward(self, images: Tensor) -> Tensor:
        """Runs every exit.

        Args:
            images: (batch, channels, height, width).

        Returns:
            Logits (exits, batch, classes).
        """
        x = self.embed(images)
        logits = []
        for k in range(self.num_exits):
            x = self.stage(k, x)
            logits.append(self.head(k, x))
        return torch.stack(logits)

    def early(
        self, images: Tensor, policy: Policy, class_first: bool | None = None, chunk: int | None = None
    ) -> Routed:
        """Lets each sample leave at the first exit where the policy is sure; the rest goes on as a smaller batch.

        A stage runs only for the samples that are still in, and not at all when nobody is. Per exit there is one
        synchronisation between host and device; a policy that asks no exit (:class:`~dynadapter.exits.policies.Never`)
        has none, and no early head is run.

        Where a head reads the class token alone, the last block before it first computes that token's row; only those
        who go on finish the block. The result is the same to rounding, and whoever leaves saves five sixths of a block.

        Args:
            images: (batch, channels, height, width); an empty batch gives an empty result.
            policy: Decides who leaves.
            class_first: Whether to compute the class token's row first where that can be done; None does so where it
                pays: :meth:`prefers_class_first`.
            chunk: Route so many images at a time; None takes those of :meth:`chunk_for`.

        Returns:
            The logits and exits of all samples in the order of ``images``.

        Raises:
            ValueError: If the policy's thresholds do not fit the number of exits.
        """
        policy.check(self.num_exits)
        chunk = chunk or self.chunk_for(images)
        if len(images) > chunk:
            parts = [self.early(part, policy, class_first, chunk) for part in images.split(chunk)]
            return Routed(torch.cat([part.logits for part in parts]), torch.cat([part.exit_index for part in parts]))
        if not len(images):  # Swin cannot take an empty batch
            return Routed(images.new_zeros(0, self.num_classes), images.new_zeros(0, dtype=torch.int64))
        x = self.embed(images)
        class_first = self.prefers_class_first(x) if class_first is None else class_first
        rows: Tensor | None = None  # where the samples still in stand in the batch; None while all are in
        out, exits = torch.empty(0), torch.empty(0)
        history: Tensor | None = None  # (exits so far, still in, classes)
        for k in range(self.num_exits):
            if k < self.num_exits - 1 and not policy.asks:
                x = self.onward(k, x)
                continue
            seen, held = self.begin(k, x, class_first)
            logits = self.head(k, seen)
            stay = None
            if k < self.num_exits - 1:
                history = logits[None] if history is None else torch.cat([history, logits[None]])
                stay = (~policy.leave(history)).nonzero()[:, 0]
                if len(stay) == len(logits):
                    x = self.complete(k, held)
                    continue
            # Somebody leaves. Everybody who is still in writes here; whoever goes on writes again.
            if rows is None:
                out, exits = logits.clone(), torch.full((len(images),), k, device=logits.device)
            else:
                out.index_copy_(0, rows, logits)
                exits.index_fill_(0, rows, k)
            if stay is None or history is None or not len(stay):
                break
            rows = stay if rows is None else rows.index_select(0, stay)
            history = history.index_select(1, stay)
            x = self.complete(k, tuple(part.index_select(0, stay) for part in held))
        return Routed(out, exits)

    def chunk_for(self, images: Tensor) -> int:
        """Says how many images :meth:`early` routes at a time if it is not told.

        On a CPU 32, for more leave its caches, or 64 where tokens are merged; elsewhere all of them.
        """
        if images.device.type != "cpu":
            return max(1, len(images))
        return CPU_CHUNK if self.token_merging is None else 2 * CPU_CHUNK

    def prefers_class_first(self, x: Tensor) -> bool:
        """Says whether :meth:`early` computes the class token's row first if it is not told.

        Args:
            x: What :meth:`embed` gave for the batch.
        """
        large = x.device.type == "cpu" and x[:1].numel() * x.shape[-1] >= CLASS_FIRST_WORK
        return large or len(x) >= CLASS_FIRST_FROM

    def begin(self, k: int, x: Tensor, class_first: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs stage ``k`` as far as its head needs it.

        Args:
            k: Zero-based exit.
            x: The output of the stage before, or of :meth:`embed`.
            class_first: See :meth:`early`.

        Returns:
            What :meth:`head` reads, and what :meth:`complete` needs: tensors with one row a sample.
        """
        if not (class_first and self.splits(k)):
            x = self.stage(k, x)
            return x, (x,)
        *units, (last, (block,)) = self._units(k)
        x, logs = self._opened(x)
        for place, unit in units:
            x, logs = self._merged(place, x, logs)
            for module in unit:
                x = cut.run(module, x, logs)
        x, logs = self._merged(last, x, logs)
        row, keys_values = cut.class_row(block, x, logs)
        return row, (self._closed(x, logs), keys_values)

    def complete(self, k: int, held: tuple[Tensor, ...]) -> Tensor:
        """Gives the output of stage ``k`` for the samples whose rows of what :meth:`begin` held are given."""
        if len(held) == 1:
            return held[0]
        *_, block = self.stage_modules(k)
        (x, logs), keys_values = self._opened(held[0]), held[1]
        return self._closed(cut.other_rows(block, x, keys_values, logs), logs)

    def onward(self, k: int, x: Tensor) -> Tensor:
        """Runs stage ``k`` for samples that go on whatever its head would say, as :meth:`stage` does."""
        return self.stage(k, x)

    def splits(self, k: int) -> bool:
        """Says whether stage ``k`` can compute the class token's row before the others, and its head needs no more."""
        last = cut.blocks(self.backbone)[self.exit_depths[k] - 1]
        return self.reads_class_token(k) and cut.splits(self.backbone, last)

    def reads_class_token(self, k: int) -> bool:
        """Says whether the head of exit ``k`` reads nothing but the class token."""
        if k == self.num_exits - 1:
            return cut.reads_class_row(self.backbone)
        return self.heads[k].reads_class_token  # type: ignore[return-value]

    def at(self, k: int) -> "Truncated":
        """Gives the static network that ends at exit ``k``; it shares its modules with this one."""
        return Truncated(self, k)

    def merge(self, tolerance: float = 1e-5) -> "ExitNet":
        """Folds the adapters into the backbone, whose keys are timm's own again.

        Raises:
            ValueError: If a kind cannot be merged, or the merged layer strays past the relative ``tolerance``.
        """
        merge(self.backbone, tolerance)
        return self


class Truncated(nn.Module):
    """The part of an :class:`ExitNet` up to one exit, as a plain classifier.

    Args:
        net: The network whose modules it shares.
        k: Zero-based exit; negative counts from the end.

    Raises:
        ValueError: If there is no such exit.
    """

    def __init__(self, net: ExitNet, k: int) -> None:
        super().__init__()
        if not -net.num_exits <= k < net.num_exits:
            raise ValueError(f"there is no exit {k}; this network has {net.num_exits}, from 0 to {net.num_exits - 1}")
        self.net = net
        self.k = k % net.num_exits

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, channels, height, width) to logits (batch, classes)."""
        x = self.net.embed(images)
        for k in range(self.k + 1):
            x = self.net.stage(k, x)
        return self.net.head(self.k, x)
