"""Early heads, which compute logits from the tokens between two stages of a backbone.

Heads with learned queries are in :mod:`dynadapter.exits.attentive`.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from dynadapter.adapters.base import MAX_SIZE
from dynadapter.backbones import mean_tokens
from dynadapter.spec import Spec, returned


class ExitHead(nn.Module):
    """LayerNorm, pooling, then a linear layer or a narrow MLP.

    Args:
        width: Channels of a token.
        num_classes: Number of classes.
        hidden: Width of the MLP's hidden layer; ``None`` for a single linear layer.
        prefix_tokens: Tokens before the patch tokens (class token, registers); mean pooling leaves them out.
        reads_class_token: Whether the head reads the first token instead of the mean.

    Attributes:
        reads_class_token: As given. Such a head needs only the first row of the block before it.
    """

    def __init__(
        self, width: int, num_classes: int, hidden: int | None, prefix_tokens: int, reads_class_token: bool
    ) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.reads_class_token = reads_class_token
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classify: nn.Module
        if hidden is None:
            self.classify = linear(width, num_classes)
        else:
            self.classify = nn.Sequential(linear(width, hidden), nn.GELU(), linear(hidden, num_classes))

    def forward(self, tokens: Tensor, logs: Tensor | None = None) -> Tensor:
        """Map tokens to logits (batch, classes).

        Args:
            tokens: (batch, tokens, width).
            logs: (batch, tokens), the logarithms of the numbers of tokens that each stands for; None for one each.
        """
        if self.reads_class_token:
            return self.classify(self.norm(tokens[:, 0]))
        own = self.norm(tokens[:, self.prefix_tokens :])
        return self.classify(mean_tokens(own, None if logs is None else logs[:, self.prefix_tokens :]))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer initialised like timm's ViT head: truncated normal(0, 0.02), bias zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def build_head(heads: "Heads", **place: Any) -> nn.Module:
    """Build the head of one early exit, with the arguments of :meth:`Heads.build`."""
    if not isinstance(heads, Heads):
        raise TypeError(f"heads={heads!r:.100} is not a configuration of heads; give an object such as Balanced()")
    head = heads.build(**place)
    if not isinstance(head, nn.Module):
        raise TypeError(f"{type(heads).__name__}.build returned {returned(head)}; return an nn.Module")
    return head


def check_logits(logits: object, head: nn.Module, batch: int, classes: int) -> Tensor:
    """Return the logits of a head."""
    if not isinstance(logits, Tensor) or logits.shape != (batch, classes):
        raise ValueError(
            f"the head {type(head).__name__} returned {returned(logits)}; return logits (batch, classes), here "
            f"({batch}, {classes})"
        )
    return logits


@dataclass(frozen=True)
class Heads(Spec):
    """Configuration of the early heads; the last exit is the backbone's own head."""

    def build_exit_tokens(self, backbone: nn.Module, blocks: int) -> nn.Module | None:
        """Build the exit tokens that the heads read; None for heads without exit tokens.

        Args:
            backbone: The backbone.
            blocks: Number of blocks before the last early exit.

        Raises:
            ValueError: If the backbone cannot have exit tokens.
        """
        return None

    @abstractmethod
    def build(
        self, exit: int, exits: int, width: int, num_classes: int, prefix_tokens: int, class_token: bool
    ) -> nn.Module:
        """Build the head of one early exit: a module from tokens (batch, tokens, width) to logits (batch, classes).

        With token merging the head also receives the second argument of :meth:`ExitHead.forward`. An attribute
        ``reads_class_token`` that is true means that the head reads only the first token; an image can then stop before
        the block is complete.

        Args:
            exit: Exit index, from 0 to ``exits - 2``.
            exits: Number of exits, the last one included.
            width: Channels of a token at this exit.
            num_classes: Classes to tell apart.
            prefix_tokens: Tokens before the patch tokens.
            class_token: Whether the backbone's own head reads a class token.

        Raises:
            ValueError: If the head does not fit the backbone.
        """


@dataclass(frozen=True)
class PooledHeads(Heads):
    """Base of the heads that pool the tokens by a fixed rule.

    Args:
        pooling: Input of a head: ``cls`` the class token, ``mean`` the mean over the patch tokens, ``auto`` the same as
            the backbone's own head.
    """

    pooling: Literal["auto", "cls", "mean"] = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if self.pooling not in ("auto", "cls", "mean"):
            raise ValueError(f"pooling={self.pooling!r} is unknown; choose 'auto', 'cls' or 'mean'")

    @abstractmethod
    def hidden_at(self, exit: int, exits: int) -> int | None:
        """Return the hidden width of the MLP at an exit, or ``None`` for a linear head.

        Args:
            exit: Exit index, from 0.
            exits: Number of exits, the last one included.
        """

    def build(
        self, exit: int, exits: int, width: int, num_classes: int, prefix_tokens: int, class_token: bool
    ) -> ExitHead:
        if self.pooling == "cls" and not class_token:
            raise ValueError(
                "pooling='cls', but this backbone's head reads no class token; use pooling='mean' or 'auto'"
            )
        return ExitHead(
            width=width,
            num_classes=num_classes,
            hidden=self.hidden_at(exit, exits),
            prefix_tokens=prefix_tokens,
            reads_class_token=class_token and self.pooling != "mean",
        )


def _check_hidden(hidden: int) -> None:
    if not 1 <= hidden <= MAX_SIZE:
        raise ValueError(
            f"hidden={hidden} must be at least 1 and at most {MAX_SIZE}; for heads without a hidden layer use "
            "LinearHeads"
        )


@dataclass(frozen=True)
class Balanced(PooledHeads):
    """MLP heads at the early exits, linear heads at the late ones.

    Shallow features hold more information about the input and less about the label (Dyn-Adapter, dynamic-balanced
    heads). The hidden width and the number of MLP heads are ours.

    Args:
        hidden: Width of the MLPs' hidden layer.
        mlp_exits: Number of first exits with an MLP; by default half of all exits, the last one included.
        pooling: Input of a head: ``cls`` the class token, ``mean`` the mean over the patch tokens, ``auto`` the same as
            the backbone's own head.
    """

    hidden: int = 64
    mlp_exits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_hidden(self.hidden)
        if self.mlp_exits is not None and self.mlp_exits < 0:
            raise ValueError(f"mlp_exits={self.mlp_exits} must be at least 0; leave it out for half of the exits")

    def hidden_at(self, exit: int, exits: int) -> int | None:
        mlps = exits // 2 if self.mlp_exits is None else self.mlp_exits
        return self.hidden if exit < mlps else None


@dataclass(frozen=True)
class LinearHeads(PooledHeads):
    """Linear heads at every early exit.

    Args:
        pooling: Input of a head: ``cls`` the class token, ``mean`` the mean over the patch tokens, ``auto`` the same as
            the backbone's own head.
    """

    def hidden_at(self, exit: int, exits: int) -> int | None:
        return None


@dataclass(frozen=True)
class MLPHeads(PooledHeads):
    """MLP heads at every early exit.

    Args:
        hidden: Width of the hidden layer.
        pooling: Input of a head: ``cls`` the class token, ``mean`` the mean over the patch tokens, ``auto`` the same as
            the backbone's own head.
    """

    hidden: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_hidden(self.hidden)

    def hidden_at(self, exit: int, exits: int) -> int | None:
        return self.hidden
