"""Exit depths: after how many blocks of a backbone the exits are."""

from collections.abc import Sequence
from itertools import pairwise


def exit_blocks(depth: int, every: int = 3, exit_depths: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the exit depths: after how many blocks each exit is.

    The last exit is always the end of the backbone, so an interval that does not divide the depth gives a shorter last
    stage.

    >>> exit_blocks(12, every=3)
    (3, 6, 9, 12)
    >>> exit_blocks(12, every=5)
    (5, 10, 12)
    >>> exit_blocks(12, exit_depths=[2, 7])
    (2, 7, 12)

    Args:
        depth: Blocks of the backbone.
        every: Interval in blocks, from 1 to ``depth``; ``depth`` gives the static network.
        exit_depths: Strictly increasing block counts instead of the interval; ``depth`` is added if it is missing, and
            an empty list gives the static network.

    Raises:
        ValueError: If the interval or the list does not fit the depth.
    """
    if exit_depths is None:
        if not 1 <= every <= depth:
            raise ValueError(
                f"every={every} fits no exit into a backbone of {depth} blocks; use 1 to {depth}, or give exit_depths"
            )
        exit_depths = range(every, depth + 1, every)
    depths = list(exit_depths)
    if not depths or depths[-1] != depth:
        depths.append(depth)
    if depths[0] < 1 or any(b <= a for a, b in pairwise(depths)):
        raise ValueError(
            f"exit_depths={list(exit_depths)} must be strictly rising block counts from 1 to {depth}, the depth of "
            "this backbone"
        )
    return tuple(depths)
