"""ExitNet: a frozen backbone in stages with an exit after each; it runs all exits, or routes each sample to one."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynadapter import backbones
from dynadapter.adapters import merge, needs_grid
from dynadapter.exits.attentive import Attentive
from dynadapter.exits.depths import exit_blocks
from dynadapter.exits.heads import Heads, build_head, check_logits
from dynadapter.exits.policies import Policy, Routed
from dynadapter.exits.stages import run_stages
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.exits.truncated import Truncated

CPU_CHUNK = 32
"""Images that a CPU routes at a time; larger batches do not fit its caches (measured)."""

CLASS_FIRST_FROM = 4
"""Batch size from which the class token's row is computed first; one image gains only on a larger backbone."""

CLASS_FIRST_WORK = 20_000_000
"""Tokens of an image times width squared from which one image gains too on a CPU. A ViT-S at 224 px has 29 million and
gains; a ViT-Ti of 64 tokens has 2.4 million and does not (``benchmarks/latency.py``)."""


class ExitNet(nn.Module):
    """A timm backbone with an early head after each stage; the last exit is the backbone's own head.

    The backbone is frozen except for its own head and its adapters, and stays in evaluation mode: batch statistics do
    not change and its dropout is off. Only stochastic depth (``drop_path_rate``) works in training.

    A backbone of videos takes clips (batch, frames, channels, height, width) wherever images are named.

    Args:
        backbone: A timm model of a known family, with or without adapters.
        heads: Configuration of the early heads; None for :class:`Attentive`.
        every: Blocks between two exits (the paper's interval T); see :func:`~dynadapter.exits.depths.exit_blocks`.
        exit_depths: Block counts instead of the interval.
        token_merging: Where similar tokens are merged; None keeps all tokens. For timm's VisionTransformer
            and VideoMAE, not Eva.
        freeze: False leaves ``requires_grad`` of the backbone as it is, and the whole backbone follows :meth:`train`.

    Attributes:
        exit_depths: After how many blocks each exit is; the last value is the depth.
        exit_weights: Buffer (exits,), each exit's weight in the joint loss, of at least 32 bits; schedules write it,
            checkpoints leave it out.
        in_chans: Channels of an image.

    Raises:
        TypeError: If no cut is known for the backbone's class, or ``heads`` is not a configuration of heads.
        ValueError: If the exits or the token merging do not fit the backbone, or it has no classifier.
    """

    exit_weights: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        heads: Heads | None = None,
        every: int = 3,
        exit_depths: Sequence[int] | None = None,
        token_merging: TokenMerging | None = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        backbones.check_family(backbone)
        self.num_classes = int(backbone.num_classes)  # type: ignore[arg-type]
        if self.num_classes < 1:
            raise ValueError("the backbone has no classifier; create it with num_classes of at least 1")
        self.depth = len(backbones.blocks(backbone))
        self.exit_depths = exit_blocks(self.depth, every, exit_depths)
        self.backbone = backbone
        self.in_chans = backbones.in_chans(backbone)
        self._frozen = freeze
        if freeze:
            backbones.freeze(backbone)
        classifier = (p for layer in backbones.classifier(backbone) for p in layer.parameters())
        if any(p.requires_grad for p in backbone.parameters()) and not any(p.requires_grad for p in classifier):
            warnings.warn(
                "the adapters are trained and the backbone's classifier is frozen (peft freezes it), so the last exit "
                "stays as it is; to train it, call backbone.get_classifier().requires_grad_(True) before ExitNet",
                stacklevel=2,
            )
        if token_merging is not None:
            token_merging.check(self.depth)
            if needing := backbones.needs_all_tokens(backbone) or needs_grid(backbone):
                raise ValueError(
                    f"token_merging does not fit {needing}, which can need every token in its place; leave "
                    "token_merging out, or use a ViT with timm's own blocks and another adapter than Convpass"
                )
        self.token_merging = token_merging
        widths, heads = backbones.widths(backbone), heads or Attentive()
        self._width = widths[0]
        self.heads = nn.ModuleList(
            build_head(
                heads,
                exit=k,
                exits=self.num_exits,
                width=widths[blocks_so_far - 1],
                num_classes=self.num_classes,
                prefix_tokens=backbones.prefix_tokens(backbone),
                class_token=backbones.has_class_token(backbone),
            )
            for k, blocks_so_far in enumerate(self.exit_depths[:-1])
        )
        early = self.exit_depths[:-1]
        # Checkpoints have the keys `beside.*`
        self.beside: Any = heads.build_exit_tokens(backbone, early[-1]) if early else None
        self.register_buffer(
            "exit_weights", torch.full((self.num_exits,), 1 / self.num_exits, dtype=torch.float32), persistent=False
        )
        self.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExitNet":
        weights = self.exit_weights
        super()._apply(fn, recurse)
        if self.exit_weights.dtype.itemsize < weights.dtype.itemsize:  # 16 bits would change the loss by up to 0.4 %
            self.exit_weights = weights.to(self.exit_weights.device)
        return self

    @property
    def num_exits(self) -> int:
        """Number of exits, the last one included."""
        return len(self.exit_depths)

    def train(self, mode: bool = True) -> "ExitNet":
        """Set the mode of heads, adapters and stochastic depth; the rest of a frozen backbone is in evaluation mode."""
        super().train(mode)
        if self._frozen:
            backbones.set_mode(self.backbone, mode)
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Convert images (batch, channels, height, width) into the input of the first block.

        Raises:
            ValueError: If the backbone does not take images, or clips, of this shape.
        """
        if not torch.jit.is_tracing():
            self.check_images(images)
        x = backbones.embed(self.backbone, images)
        return x if self.beside is None else self.beside.append(x)

    def check_images(self, images: Tensor) -> None:
        """Raise a ValueError if the backbone does not take images of so many channels, or takes clips instead."""
        clips, channels = backbones.frames(self.backbone), images.shape[-3]
        if images.ndim != (4 if clips is None else 5):
            wanted = "images (batch," if clips is None else f"clips (batch, {clips} frames,"
            raise ValueError(
                f"a batch has the shape {tuple(images.shape)}, and the backbone takes {wanted} channels, height, width)"
            )
        if self.in_chans not in (None, channels):
            raise ValueError(
                f"images of {channels} channel{'s' * (channels > 1)} do not fit a backbone with in_chans="
                f"{self.in_chans}; leave in_chans out for images from files, which are read as RGB, or give a data "
                f"loader whose images have {self.in_chans} channel{'s' * (self.in_chans != 1)}"
            )

    def stage_modules(self, k: int) -> Iterator[nn.Module]:
        """Yield the modules of stage ``k``: the updates of exit tokens, then the blocks in order."""
        if self.beside is not None and k < self.num_exits - 1:
            yield from (self.beside.updates[place] for place, _ in self._units(k))
        for _, unit in self._units(k):
            yield from unit

    def _units(self, k: int) -> list[tuple[int, tuple[nn.Module, ...]]]:
        """List the blocks of stage ``k``, each with the number of blocks before it."""
        start = self.exit_depths[k - 1] if k else 0
        return list(enumerate(backbones.blocks(self.backbone)[start : self.exit_depths[k]], start))

    def _merge_tokens(self, place: int, x: Tensor, logs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Merge tokens if ``token_merging`` has a place after this number of blocks."""
        if self.token_merging is None or place not in self.token_merging.after:
            return x, logs
        return self.token_merging(x, backbones.prefix_tokens(self.backbone), logs)

    def _split(self, x: Tensor, ended: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Split the output of a stage into tokens, logarithms of their numbers (see :meth:`stage`), and exit tokens.

        Args:
            x: The output of a stage, or of :meth:`embed`.
            ended: Whether that is the last stage, whose output has no exit tokens.
        """
        exit_tokens = logs = None
        if self.token_merging is not None and x.shape[-1] != self._width:
            x, logs = x[..., :-1], x[..., -1]
        if self.beside is not None and not ended:
            end = x.shape[1] - self.beside.count
            x, exit_tokens, logs = x[:, :end], x[:, end:], None if logs is None else logs[:, :end]
        return x, None if logs is None else logs.contiguous(), exit_tokens

    def _bias(self, logs: Tensor | None) -> Tensor | None:
        """Return the bias of the keys' attention scores: the logarithms, or None if each token counts once."""
        if logs is None or self.token_merging is None:
            return None
        given = self.token_merging.proportional
        return logs if (not backbones.pools_mean(self.backbone) if given is None else given) else None

    @staticmethod
    def _join(x: Tensor, logs: Tensor | None, exit_tokens: Tensor | None = None) -> Tensor:
        """Join the parts of :meth:`_split`, so that between stages a sample is one row of one tensor.

        Exit tokens come after the other tokens; the logarithms are one more channel.
        """
        if exit_tokens is not None:
            x = torch.cat([x, exit_tokens], 1)
            logs = None if logs is None else nn.functional.pad(logs, (0, exit_tokens.shape[1]))
        return x if logs is None else torch.cat([x, logs[..., None]], -1)

    def stage(self, k: int, x: Tensor) -> Tensor:
        """Run the blocks between exit ``k - 1`` and exit ``k``.

        After token merging the result has one more channel: the logarithm of the number of tokens that a token stands
        for. Exit tokens follow the other tokens. :meth:`head` and the next stage expect this layout. The last stage
        runs without exit tokens.
        """
        x, logs, exit_tokens = self._split(x)
        if k == self.num_exits - 1:
            exit_tokens = None
        for place, unit in self._units(k):
            x, logs = self._merge_tokens(place, x, logs)
            if exit_tokens is None:
                x = backbones.run_unit(self.backbone, unit, x, self._bias(logs))
            else:
                x, exit_tokens = self.beside.run(self.backbone, place, x, exit_tokens, self._bias(logs))
        return self._join(x, logs, exit_tokens)

    def head(self, k: int, x: Tensor) -> Tensor:
        """Compute logits (batch, classes) from the output of stage ``k``."""
        last = k == self.num_exits - 1
        x, logs, exit_tokens = self._split(x, ended=last)
        if last:
            return backbones.classify(self.backbone, backbones.finish(self.backbone, x), logs)
        x = backbones.tokens(self.backbone, x)
        more = (logs, exit_tokens) if exit_tokens is not None else () if logs is None else (logs,)
        logits = self.heads[k](x, *more)
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return logits
        return check_logits(logits, self.heads[k], len(x), self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Run every exit.

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
        """Stop each sample at the first exit whose policy condition it meets; the rest continues as a smaller batch.

        A stage runs only for the remaining samples, and not at all if none remain. Each exit needs one synchronisation
        between host and device. :class:`~dynadapter.exits.policies.Never` needs none and runs no early head.

        If a head reads only the class token, the last block before it computes that token's row first, and only samples
        that continue finish the block. The result is equal up to rounding; a sample that exits saves five sixths of a
        block.

        Args:
            images: (batch, channels, height, width); an empty batch gives an empty result.
            policy: The exit policy.
            class_first: Whether to compute the class token's row first where possible; None decides by
                :meth:`prefers_class_first`.
            chunk: Images to route at a time; None uses :meth:`chunk_for`.

        Returns:
            Logits and exit indices of all samples in the order of ``images``.

        Raises:
            ValueError: If the policy's thresholds do not fit the number of exits.
        """
        policy.check(self.num_exits)
        chunk = chunk or self.chunk_for(images)
        if len(images) > chunk:
            parts = [self.early(part, policy, class_first, chunk) for part in images.split(chunk)]
            return Routed(torch.cat([part.logits for part in parts]), torch.cat([part.exit_index for part in parts]))
        if not len(images):  # Swin fails on an empty batch
            return Routed(images.new_zeros(0, self.num_classes), images.new_zeros(0, dtype=torch.int64))
        return self._route(images, policy, class_first)

    def _route(self, images: Tensor, policy: Policy, class_first: bool | None) -> Routed:
        """Route one chunk; see :meth:`early`."""
        x = self.embed(images)
        first = self.prefers_class_first(x) if class_first is None else class_first

        def step(k: int, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
            x = self.complete(k - 1, inputs) if k else inputs[0]
            if k < self.num_exits - 1 and not policy.uses_early_exits:
                return (self.stage(k, x),), None
            head_input, stage_state = self.begin(k, x, first)
            return stage_state, self.head(k, head_input)

        return run_stages(step, self.num_exits, (x,), policy)

    def chunk_for(self, images: Tensor) -> int:
        """Return how many images :meth:`early` routes at a time by default.

        On a CPU these are 32, or 64 with token merging, because more do not fit its caches; on other devices all
        images.
        """
        if images.device.type != "cpu":
            return max(1, len(images))
        return CPU_CHUNK if self.token_merging is None else 2 * CPU_CHUNK

    def prefers_class_first(self, x: Tensor) -> bool:
        """Check whether :meth:`early` computes the class token's row first by default."""
        large = x.device.type == "cpu" and x[:1].numel() * x.shape[-1] >= CLASS_FIRST_WORK
        return large or len(x) >= CLASS_FIRST_FROM

    def begin(self, k: int, x: Tensor, class_first: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run stage ``k`` as far as its head needs.

        Args:
            k: Exit index, from 0.
            x: The output of the stage before, or of :meth:`embed`.
            class_first: See :meth:`early`.

        Returns:
            The input of :meth:`head`, and the input of :meth:`complete`: tensors with one row for each sample.
        """
        if not (class_first and self.splits(k)):
            x = self.stage(k, x)
            return x, (x,)
        *units, (last, (block,)) = self._units(k)
        x, logs, _ = self._split(x)  # the last stage drops exit tokens, and before the others no class token goes first
        for place, unit in units:
            x, logs = self._merge_tokens(place, x, logs)
            x = backbones.run_unit(self.backbone, unit, x, self._bias(logs))
        x, logs = self._merge_tokens(last, x, logs)
        row, keys_values = backbones.class_row(block, x, self._bias(logs))
        return row, (self._join(x, logs), keys_values)

    def complete(self, k: int, stage_state: tuple[Tensor, ...]) -> Tensor:
        """Finish stage ``k``, which :meth:`begin` started, for the given rows of its second result."""
        if len(stage_state) == 1:
            return stage_state[0]
        *_, block = self.stage_modules(k)
        (x, logs, _), keys_values = self._split(stage_state[0], ended=True), stage_state[1]
        return self._join(backbones.other_rows(block, x, keys_values, self._bias(logs)), logs)

    def step(self, k: int, inputs: tuple[Tensor, ...], class_first: bool = True) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run stage ``k`` and its head, for samples that continue.

        Args:
            k: Exit index, from 0.
            inputs: The first result for stage ``k - 1``, one row for each sample; the images for stage 0.
            class_first: See :meth:`early`.

        Returns:
            What the next stage takes, and the logits (batch, classes).
        """
        head_input, stage_state = self.begin(k, self.complete(k - 1, inputs) if k else self.embed(*inputs), class_first)
        return stage_state, self.head(k, head_input)

    def splits(self, k: int) -> bool:
        """Check whether stage ``k`` can compute the class token's row first and its head reads only that row."""
        last = backbones.blocks(self.backbone)[self.exit_depths[k] - 1]
        return self.reads_class_token(k) and backbones.splits(self.backbone, last)

    def reads_class_token(self, k: int) -> bool:
        """Check whether the head of exit ``k`` reads only the class token."""
        if k == self.num_exits - 1:
            return backbones.reads_class_row(self.backbone)
        return bool(getattr(self.heads[k], "reads_class_token", False))

    def at(self, k: int) -> Truncated:
        """Return the static network that ends at exit ``k``; it shares its modules with this network."""
        return Truncated(self, k)

    def merge(self, tolerance: float = 1e-5) -> "ExitNet":
        """Merge the adapters into the backbone; its state dict then has timm's keys.

        Raises:
            ValueError: If a kind cannot be merged, or a merged layer differs by more than the relative ``tolerance``.
        """
        merge(self.backbone, tolerance)
        return self
