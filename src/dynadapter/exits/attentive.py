"""Early heads that learn which tokens to read: a few queries attend over all tokens between two stages."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynadapter.adapters.base import MAX_COUNT, check_size
from dynadapter.exits.heads import Heads, linear


class AttentiveHead(nn.Module):
    """LayerNorm, attention of learned queries over all tokens, then a linear layer over the results.

    This is attention with learned queries. Its key projection is part of the queries, because a learned query times a
    learned projection is one learned vector. Its value projection is part of the linear layer, because both are linear.
    So there is no projection of each token.

    Args:
        width: Channels of a token.
        num_classes: Number of classes.
        queries: Number of queries.
        class_token: Whether the linear layer also reads the first token.
    """

    def __init__(self, width: int, num_classes: int, queries: int, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.queries = nn.Parameter(torch.empty(queries, width))
        nn.init.trunc_normal_(self.queries, std=0.02)  # at first nearly the mean of all tokens
        self.classify = linear((queries + class_token) * width, num_classes)

    def forward(self, tokens: Tensor, logs: Tensor | None = None) -> Tensor:
        """Map tokens to logits (batch, classes).

        Args:
            tokens: (batch, tokens, width).
            logs: (batch, tokens), after token merging the logarithm of the number of tokens that each token stands for;
                None counts each token once.
        """
        x = self.norm(tokens)
        scores = x @ self.queries.T  # (batch, tokens, queries)
        if logs is not None:
            scores = scores + logs[..., None]
        features = (scores.softmax(1).transpose(1, 2) @ x).flatten(1)  # (batch, queries * width)
        if self.class_token:
            features = torch.cat([x[:, 0], features], -1)
        return self.classify(features)


@dataclass(frozen=True)
class Attentive(Heads):
    """Heads with learned queries over all tokens at every early exit.

    In shallow layers the class token holds little information about the label, and the patch tokens hold more. The
    pooling is the attention pooling of CaiT and CoCa, without projections of the tokens.

    Args:
        queries: Number of learned queries of a head, from 1 to 64.
    """

    queries: int = 6

    def __post_init__(self) -> None:
        check_size("queries", self.queries, MAX_COUNT)

    def build(
        self, exit: int, exits: int, width: int, num_classes: int, prefix_tokens: int, class_token: bool
    ) -> AttentiveHead:
        return AttentiveHead(width, num_classes, self.queries, class_token)
