"""Token token_merging: like tokens of an image become one on the way, and every block behind is cheaper."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynadapter.spec import Spec


@dataclass(frozen=True)
class TokenMerging(Spec):
    """Merges a share of an image's tokens at some places of a backbone (ToMe, Bolya et al. 2023).

    At a place every other token looks for the most similar one among those in between; the most similar pairs are
    merged into their mean, as many as the share says. Nothing is learnt, and how many tokens are left is known
    beforehand, so that its saving is the same for every image and multiplies with that of early exits.

    A token that stands for n counts n times in later means, and as a key in attention (ToMe's proportional attention):
    every score gets the logarithm of n. It differs from ToMe in that tokens are compared by their own direction and not
    by their keys. Class token and registers are never merged.

    >>> TokenMerging(after=(1, 2, 3, 4), share=0.23).left(64)
    24

    Args:
        after: After how many blocks tokens are merged, rising; 0 is before the first block. An exit at the same place
            still reads all of them.
        share: Part of the tokens that each place takes away, above 0 and at most a half; rounded down. Only every other
            token can go at one place, so a large share merges what is not alike: four places with 0.23 leave as many
            tokens as two with 0.4, and had more accuracy where it was measured (``benchmarks/RESULTS.md``).
        proportional: Whether a token counts as often as it stands for tokens; False counts each once.

    Raises:
        ValueError: If the share or the places cannot be.
    """

    BEFORE: ClassVar[Mapping[str, Any]] = {"proportional": False}

    after: tuple[int, ...] = (1, 2, 3, 4)
    share: float = 0.23
    proportional: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", tuple(self.after))
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share={self.share} must be above 0 and at most 0.5: each token merges with one other")
        steps = zip((-1, *self.after), self.after, strict=False)
        if not self.after or not all(isinstance(place, int) and place > before for before, place in steps):
            raise ValueError(f"after={self.after} must be rising block counts, 0 or more, such as (1, 4)")

    def check(self, depth: int) -> None:
        """Refuses places that a backbone does not have.

        Raises:
            ValueError: If a place has no block behind it.
        """
        if self.after[-1] >= depth:
            raise ValueError(
                f"after={self.after} merges tokens where no block is left: the backbone has {depth}; choose "
                f"places below"
            )

    def left(self, tokens: int) -> int:
        """Says how many of an image's own tokens are left behind the last place."""
        for _ in self.after:
            tokens -= int(self.share * tokens)
        return tokens

    def __call__(self, x: Tensor, prefix: int, logs: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Merges tokens once.

        Args:
            x: (batch, tokens, width).
            prefix: So many tokens in front stay as they are.
            logs: What the place before gave.

        Returns:
            (batch, fewer tokens, width): the prefix, the tokens that were not merged, then those that may have been;
            and (batch, fewer tokens), the logarithms of how many each stands for, to be added to its scores as a key;
            None where each counts once.
        """
        count = int(self.share * (x.shape[1] - prefix))
        if not self.proportional:
            return merge_tokens(x, count, prefix), None
        return merge_counted(x, x.new_zeros(x.shape[:2]) if logs is None else logs, count, prefix)


def merge_tokens(x: Tensor, count: int, prefix: int = 0) -> Tensor:
    """Merges the most similar tokens of each image, by ToMe's bipartite matching; each counts once.

    Args:
        x: (batch, tokens, width).
        count: How many tokens go, at most half of those behind the prefix.
        prefix: So many tokens in front take no part.

    Returns:
        (batch, tokens - count, width). Gradients flow to all tokens; who merges with whom has none.
    """
    if count < 1:
        return x
    with _exactly(x):
        with torch.no_grad():
            joins = _joins(x, count, prefix)
            shares = joins / joins.sum(-1, keepdim=True)
        return torch.bmm(shares, x)


def merge_counted(x: Tensor, logs: Tensor, count: int, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merges as :func:`merge_tokens` does, but into means that count a token as often as it stands for tokens.

    Args:
        x: (batch, tokens, width).
        logs: (batch, tokens), the logarithms of how many each stands for.
        count: How many tokens go, at most half of those behind the prefix.
        prefix: So many tokens in front take no part.

    Returns:
        (batch, tokens - count, width), and their (batch, tokens - count).
    """
    if count < 1:
        return x, logs
    with _exactly(x):
        with torch.no_grad():
            joins = _joins(x, count, prefix) * logs.exp()[:, None]
            sizes = joins.sum(-1)
            shares = joins / sizes[..., None]
        return torch.bmm(shares, x), sizes.log()


def _exactly(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside: likeness in 16 bits would be a matter of rounding."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocast else nullcontext()


def _joins(x: Tensor, count: int, prefix: int) -> Tensor:
    """Says by ones which tokens merge into which, (batch, tokens - count, tokens)."""
    # One product with the shares, not gathers and a scatter: quicker on a CPU, the same result every time on a GPU, and
    # known to exporters
    places = _places(x, count, prefix)
    return x.new_zeros(x.shape[0], x.shape[1] - count, x.shape[1]).scatter_(1, places[:, None], 1.0)


def _places(x: Tensor, count: int, prefix: int) -> Tensor:
    """Says for each token at which place behind the merging it is (batch, tokens); those that merge have one place."""
    own = x[:, prefix:]
    own = own if own.dtype.itemsize > 2 else own.float()
    lengths = torch.linalg.vector_norm(own, dim=-1).clamp_min(1e-12)
    products = torch.bmm(own[:, ::2], own[:, 1::2].transpose(1, 2))  # (batch, sources, targets); @ would copy both
    likeness, partner = (products / lengths[:, None, 1::2]).max(-1)
    likeness = (likeness / lengths[:, ::2]).nan_to_num(2.0)  # what is no number is ranked, too
    # By comparison of all with all: ties go to the first, which not every sort promises, and exporters know no other
    ahead = (likeness[:, None] > likeness[..., None]) | (likeness[:, None] == likeness[..., None]).tril(-1)
    stays = ahead.sum(-1) >= count
    sources, targets = products.shape[1:]
    first = prefix + sources - count  # the place of the first target
    # Sources that stay keep their order, whatever their likeness is: rounding must not decide about the next matching
    places = torch.where(stays, stays.cumsum(-1) + (prefix - 1), first + partner)
    # x.shape[0], because len(x) would be a constant in an exported graph
    fixed = torch.arange(first + targets, device=x.device).expand(x.shape[0], -1)
    pairs = torch.stack([places[:, :targets], fixed[:, first:]], -1).flatten(1)
    return torch.cat([fixed[:, :prefix], pairs, places[:, targets:]], 1)
