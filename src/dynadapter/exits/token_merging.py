"""Token merging: average similar tokens of an image, so that every later block costs less."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynadapter.spec import Spec


@dataclass(frozen=True)
class TokenMerging(Spec):
    """Merge a fraction of an image's tokens at some places of a backbone (ToMe, Bolya et al. 2023).

    At each place, every second token (a source) finds the most similar of the other tokens (the targets). The most
    similar pairs are replaced by their mean. Nothing is learned. The number of remaining tokens does not depend on the
    image, so the saving is the same for every image and multiplies with the saving of early exits.

    A token that stands for n tokens counts n times in later means and in the pooling of every exit. With proportional
    attention the logarithm of n is added to its attention score as a key. Unlike in ToMe, tokens are compared by their
    own direction and not by their keys. The class token and registers are never merged.

    >>> TokenMerging(after=(1, 2, 3, 4), share=0.23).left(64)
    24

    Args:
        after: Block counts after which tokens are merged, in increasing order; 0 is before the first block. An exit at
            the same depth reads the tokens before the merge.
        share: Fraction of the patch tokens that each place removes, above 0 and at most 0.5, rounded down. Only sources
            are removed, so several small shares merge more similar tokens than one large share.
        proportional: Whether attention counts a token as often as it stands for tokens; None for yes, except where the
            backbone's own head reads the mean of the patch tokens, as in MAE (ToMe, section 4.2).

    Raises:
        ValueError: If the share or the places are out of range.
    """

    after: tuple[int, ...] = (1, 2, 3, 4)
    share: float = 0.23
    proportional: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", tuple(self.after))
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share={self.share} must be above 0 and at most 0.5: each token merges with one other")
        steps = zip((-1, *self.after), self.after, strict=False)
        if not self.after or not all(isinstance(place, int) and place > before for before, place in steps):
            raise ValueError(f"after={self.after} must be rising block counts, 0 or more, such as (1, 4)")

    def check(self, depth: int) -> None:
        """Check the places against the depth of a backbone.

        Raises:
            ValueError: If no block follows a place.
        """
        if self.after[-1] >= depth:
            raise ValueError(
                f"after={self.after} merges tokens where no block follows: the backbone has {depth} blocks; "
                f"use block counts below {depth}"
            )

    def left(self, tokens: int) -> int:
        """Return the number of patch tokens after the last place."""
        for _ in self.after:
            tokens -= int(self.share * tokens)
        return tokens

    def __call__(self, x: Tensor, prefix: int, logs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Merge tokens once.

        Args:
            x: (batch, tokens, width).
            prefix: Number of first tokens that are never merged.
            logs: Second result of the place before, or None at the first place.

        Returns:
            Tokens (batch, fewer tokens, width): the prefix, the remaining sources and the targets. Also the logarithms
            of the numbers of tokens that each stands for (batch, fewer tokens).
        """
        count = int(self.share * (x.shape[1] - prefix))
        return merge_tokens(x, x.new_zeros(x.shape[:2]) if logs is None else logs, count, prefix)


def merge_tokens(x: Tensor, logs: Tensor, count: int, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge the most similar tokens of each image by ToMe's bipartite matching, into means weighted by their counts.

    Args:
        x: (batch, tokens, width).
        logs: (batch, tokens), the logarithm of the number of tokens that each token stands for.
        count: Number of tokens to remove, at most half of those after the prefix.
        prefix: Number of first tokens that are never merged.

    Returns:
        Tokens (batch, tokens - count, width) and their logarithms (batch, tokens - count). Gradients flow to all tokens
        but not through the matching.
    """
    if count < 1:
        return x, logs
    with _exactly(x):
        with torch.no_grad():
            # One product with a matrix of shares (batch, tokens - count, tokens) instead of gathers and a scatter:
            # faster on a CPU, deterministic on a GPU, exportable. Few operators: each costs time by itself.
            joins = _places(x, count, prefix)[:, None] == torch.arange(x.shape[1] - count, device=x.device)[:, None]
            weights = torch.where(joins, logs.exp()[:, None], 0.0)
            sizes = weights.sum(-1, keepdim=True)
        return torch.bmm(weights / sizes, x), sizes[..., 0].log()


def _exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: 16-bit similarities would depend on rounding."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocast else nullcontext()


def _places(x: Tensor, count: int, prefix: int) -> Tensor:
    """Return each token's position after the merge (batch, tokens); merged tokens share a position."""
    products, lengths = _products(x[:, prefix:])
    similarity, partner = products.max(-1)
    similarity = similarity / lengths
    similarity = torch.where(similarity == similarity, similarity, 2.0)  # NaN gets a rank too
    sources, targets = products.shape[1:]
    # Compare all pairs: ties go to the first token, which not every sort guarantees, and exporters support it
    number = torch.arange(sources, device=x.device)
    own, other = similarity[..., None], similarity[:, None]
    stays = ((other > own) | ((other == own) & (number < number[:, None]))).sum(-1) >= count
    first = prefix + sources - count  # position of the first target
    # Remaining sources keep their order, so that rounding does not change the next matching
    places = torch.where(stays, stays.cumsum(-1) + (prefix - 1), first + partner)
    # x.shape[0] and not len(x), which would be a constant in an exported graph
    fixed = torch.arange(first + targets, device=x.device).expand(x.shape[0], -1)
    pairs = torch.stack([places[:, :targets], fixed[:, first:]], -1).flatten(1)
    return torch.cat([fixed[:, :prefix], pairs, places[:, targets:]], 1)


def _products(own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of sources with directions of targets (batch, sources, targets), and the sources' lengths."""
    own = own if own.dtype.itemsize > 2 else own.float()
    lengths = torch.linalg.vector_norm(own, dim=-1).clamp_min(1e-12)
    products = torch.bmm(own[:, ::2], own[:, 1::2].transpose(1, 2))  # @ would copy both
    return products / lengths[:, None, 1::2], lengths[:, ::2]


def smallest_gap(x: Tensor, count: int, prefix: int = 0) -> Tensor:
    """Return for each image the smallest difference of two similarities that decided a merge (batch,).

    If it is as small as rounding errors, another machine or program can merge other tokens.

    Args:
        x: (batch, tokens, width), as :func:`merge_tokens` gets it.
        count: Number of tokens to remove.
        prefix: Number of first tokens that are never merged.
    """
    products, lengths = _products(x[:, prefix:])
    best = (products / lengths[..., None]).topk(min(2, products.shape[-1]), -1).values
    rank, order = best[..., 0].sort(-1, descending=True)
    gaps = [rank.new_full(rank.shape[:1], torch.inf)]
    if 0 < count < rank.shape[-1]:
        gaps.append(rank[:, count - 1] - rank[:, count])
    if count > 0 and best.shape[-1] > 1:
        gaps.append((best[..., 0] - best[..., 1]).gather(1, order[:, :count]).amin(1))
    return torch.stack(gaps).amin(0)
