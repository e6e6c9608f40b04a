"""Find one threshold per early exit: MSDNet's geometric exit shares, and coordinate ascent on the value of a goal."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dynadapter.calibrate.scores import Scores, first_exit
from dynadapter.calibrate.stacked import Stacked

Value = Callable[[Tensor, Tensor], Tensor]
"""Maps right predictions (...) and average relative costs (...) to values (...) to maximise; -inf if not allowed."""


class Walk:
    """MSDNet's walk over the exits: at each, the highest scores exit, as many as a geometric share allows."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.order = scores.order()

    def cuts(self, log_q: float) -> list[float]:
        """Return one cut per early exit, for exit shares proportional to exp(exit * log_q)."""
        exits, samples = len(self.order) + 1, self.scores.sure.shape[1]
        heaviest = max(0.0, (exits - 1) * log_q)
        weights = [math.exp(k * log_q - heaviest) for k in range(exits)]
        remaining = torch.ones(samples, dtype=torch.bool, device=self.scores.sure.device)
        cuts = []
        for sure, order, weight in zip(self.scores.sure, self.order, weights, strict=False):
            queue = sure[order[remaining[order]]]
            queue = queue[queue > -torch.inf]
            wanted = math.floor(
                samples * weight / sum(weights) + 1e-9
            )  # rounding must not turn 50 samples into 49.999...
            cuts.append(self.scores.cut(queue, min(wanted, len(queue))))
            remaining &= sure < cuts[-1]
        return cuts


class Ascent:
    """Coordinate ascent over one cut per exit: each is set to its best value in turn, the others fixed."""

    def __init__(self, scores: Scores, data: Stacked) -> None:
        self.scores, self.data = scores, data
        self.order = scores.order()
        self.right = data.right.long()
        self.costs = torch.tensor(data.costs, dtype=torch.float64, device=scores.sure.device)

    def value_of(self, cuts: list[float], value: Value) -> float:
        """Return the value of cuts."""
        index = self.scores.exit_index(cuts)
        return value(self.right.gather(0, index[None]).sum().cpu(), self.data.cost(self.data.counts(index))).item()

    def climb(self, cuts: list[float], value: Value, rounds: int = 20) -> list[float]:
        """Change cut after cut until no single change increases the value; of equal cuts the strictest wins."""
        best = self.value_of(cuts, value)
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
        """Try every cut at exit k in one pass; return the highest value and its cut."""
        scores, sure = self.scores, self.scores.sure
        exits = sure >= torch.tensor(cuts, dtype=sure.dtype, device=sure.device)[:, None]
        exits[k] = False
        onward = first_exit(exits)  # the exit index of each sample that does not exit at k
        can_exit = (onward > k) & (sure[k] > -torch.inf)
        queue = self.order[k][can_exit[self.order[k]]]  # highest scores first
        falling, to = sure[k, queue], onward[queue]
        # Results if the first 0, 1, 2 ... of the queue exit here: (queue + 1,)
        right = self.right.gather(0, onward[None]).sum() + _running_sum(self.right[k, queue] - self.right[to, queue])
        cost = self.costs[onward].sum() + _running_sum(self.costs[k] - self.costs[to])
        values = value(right, cost / (self.data.samples * self.data.static)).double()
        values[1:-1][falling[:-1] == falling[1:]] = -torch.inf  # equal scores exit together
        if len(falling) and falling[0] >= scores.strictest:
            values[0] = -torch.inf  # no cut keeps a score this high
        count = int(values.argmax())
        return values[count].item(), scores.cut(falling, count)


def _running_sum(steps: Tensor) -> Tensor:
    return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def geometric(scores: Scores, data: Stacked, budget: float) -> tuple[float, list[float]]:
    """Find geometric shares within a budget by bisection on q.

    Returns:
        Their relative cost, and one cut per early exit; the cheapest shares if none are within the budget.
    """
    walk = Walk(scores)

    def at(log_q: float) -> tuple[float, list[float]]:
        cuts = walk.cuts(log_q)
        return data.cost(data.counts(scores.exit_index(cuts))).item(), cuts

    low, high = -40.0, 40.0  # exp(40) exceeds any number of samples: all at the first exit, or all at the last
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
            best = max(best, tried)  # whole samples and ties: the cost does not quite rise with q
    return best


def refined(scores: Scores, data: Stacked, starts: list[list[float]], value: Value) -> tuple[list[float], float]:
    """Search cuts per exit with a higher value than the given ones.

    Candidates are the given cuts, geometric shares for 33 values of q, and the path of ascents on right - price * cost
    as the price of compute rises. The best of them is then refined for the goal itself.

    Args:
        scores: The scores of the samples.
        data: The samples.
        starts: Cuts to start from, each one per early exit.
        value: The function to maximise.

    Returns:
        The best cuts and their value, which is at least that of each start.
    """
    ascent, walk = Ascent(scores, data), Walk(scores)
    pool = [*starts, *(walk.cuts(step / 4) for step in range(-16, 17))]
    path = starts[0]
    for price in torch.logspace(-3, 1, 17, dtype=torch.float64).tolist():  # in accuracy per cost of static

        def priced(right: Tensor, cost: Tensor, price: float = price) -> Tensor:
            return right - price * data.samples * cost

        path = ascent.climb(path, priced, rounds=3)
        pool.append(path)
    best = max(pool, key=lambda cuts: ascent.value_of(cuts, value))
    best = max(best, ascent.climb(best, value), key=lambda cuts: ascent.value_of(cuts, value))
    return best, ascent.value_of(best, value)
