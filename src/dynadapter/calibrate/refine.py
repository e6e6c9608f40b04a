"""One threshold per early exit: MSDNet's geometric exit shares, and coordinate ascent on what a goal is worth."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dynadapter.calibrate.scores import Scores, first_exit
from dynadapter.calibrate.stacked import Stacked

Value = Callable[[Tensor, Tensor], Tensor]
"""What a number of right predictions (...) at an average relative cost (...) is worth (...); -inf if not allowed."""


class Walk:
    """MSDNet's walk: at each exit the surest of those still in leave, so many that geometric shares come about."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.order = scores.order()

    def cuts(self, log_q: float) -> list[float]:
        """Gives one cut per early exit, for shares proportional to exp(exit * log_q)."""
        exits, samples = len(self.order) + 1, self.scores.sure.shape[1]
        heaviest = max(0.0, (exits - 1) * log_q)
        weights = [math.exp(k * log_q - heaviest) for k in range(exits)]
        still = torch.ones(samples, dtype=torch.bool, device=self.scores.sure.device)
        cuts = []
        for sure, order, weight in zip(self.scores.sure, self.order, weights, strict=False):
            queue = sure[order[still[order]]]
            queue = queue[queue > -torch.inf]
            wanted = math.floor(samples * weight / sum(weights) + 1e-9)  # 50 of 203 samples must not become 49.999...
            cuts.append(self.scores.cut(queue, min(wanted, len(queue))))
            still &= sure < cuts[-1]
        return cuts


class Ascent:
    """Coordinate ascent over one cut per exit: sets one exit's cut to its best value, the others fixed, and so on."""

    def __init__(self, scores: Scores, data: Stacked) -> None:
        self.scores, self.data = scores, data
        self.order = scores.order()
        self.right = data.right.long()
        self.costs = torch.tensor(data.costs, dtype=torch.float64, device=scores.sure.device)

    def worth(self, cuts: list[float], value: Value) -> float:
        """Says what cuts are worth."""
        taken = self.scores.taken(cuts)
        return value(self.right.gather(0, taken[None]).sum().cpu(), self.data.cost(self.data.counts(taken))).item()

    def climb(self, cuts: list[float], value: Value, rounds: int = 20) -> list[float]:
        """Changes cut after cut until no single one brings more; of equals the strictest wins."""
        best = self.worth(cuts, value)
        for _ in range(rounds):
            before = best
            for k in range(len(cuts)):
                found, cut = self._best(k, cuts, value)
                if found > best + 1e-9:  # a gain, not a rounding
                    best, cuts = found, [*cuts[:k], cut, *cuts[k + 1 :]]
            if best == before:
                break
        return cuts

    def _best(self, k: int, cuts: list[float], value: Value) -> tuple[float, float]:
        """Tries every cut at exit k in one pass: what the best is worth, and the cut."""
        scores, sure = self.scores, self.scores.sure
        leaves = sure >= torch.tensor(cuts, dtype=sure.dtype, device=sure.device)[:, None]
        leaves[k] = False
        onward = first_exit(leaves)  # where each sample leaves, unless at k
        comes_by = (onward > k) & (sure[k] > -torch.inf)
        queue = self.order[k][comes_by[self.order[k]]]  # the surest first
        falling, to = sure[k, queue], onward[queue]
        # What it comes to if the first 0, 1, 2 ... of the queue leave here: (queue + 1,)
        right = self.right.gather(0, onward[None]).sum() + _running(self.right[k, queue] - self.right[to, queue])
        cost = self.costs[onward].sum() + _running(self.costs[k] - self.costs[to])
        worth = value(right, cost / (self.data.samples * self.data.full)).double()
        worth[1:-1][falling[:-1] == falling[1:]] = -torch.inf  # ties leave together
        if len(falling) and falling[0] >= scores.strictest:
            worth[0] = -torch.inf  # there is no cut that holds them
        leavers = int(worth.argmax())
        return worth[leavers].item(), scores.cut(falling, leavers)


def _running(steps: Tensor) -> Tensor:
    return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def geometric(scores: Scores, data: Stacked, budget: float) -> tuple[float, list[float]]:
    """Finds geometric shares that spend a budget, by bisection on q: their relative cost, and one cut per early exit.

    Where not even the cheapest are within the budget, these are given.
    """
    walk = Walk(scores)

    def at(log_q: float) -> tuple[float, list[float]]:
        cuts = walk.cuts(log_q)
        return data.cost(data.counts(scores.taken(cuts))).item(), cuts

    low, high = -40.0, 40.0  # exp(40) is more than there are samples: everybody at the first exit, or at the last
    best, dearest = at(low), at(high)
    if dearest[0] <= budget:
        return dearest
    for _ in range(40):
        middle = (low + high) / 2
        tried = at(middle)
        if tried[0] > budget:
            high = middle
        else:
            low = middle
            best = max(best, tried)  # whole samples and ties: the cost need not quite rise with q
    return best


def refined(scores: Scores, data: Stacked, starts: list[list[float]], value: Value) -> tuple[list[float], float]:
    """Looks for cuts per exit that are worth more than those to start from.

    Candidates are the starts, geometric shares for 33 values of q, and the path of ascents on right - price * cost as
    the price of compute rises; the best of them is then refined for the goal itself. Ours.

    Args:
        scores: Of the samples.
        data: The samples.
        starts: One cut per early exit, each.
        value: What an outcome is worth.

    Returns:
        The best cuts and what they are worth, at least what each of the starts is worth.
    """
    ascent, walk = Ascent(scores, data), Walk(scores)
    pool = [*starts, *(walk.cuts(step / 4) for step in range(-16, 17))]
    path = starts[0]
    for price in torch.logspace(-3, 1, 17, dtype=torch.float64).tolist():  # in accuracy per full backbone

        def worth(right: Tensor, cost: Tensor, price: float = price) -> Tensor:
            return right - price * data.samples * cost

        path = ascent.climb(path, worth, rounds=3)
        pool.append(path)
    best = max(pool, key=lambda cuts: ascent.worth(cuts, value))
    best = max(best, ascent.climb(best, value), key=lambda cuts: ascent.worth(cuts, value))
    return best, ascent.worth(best, value)
