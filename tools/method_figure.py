"""Draw how adapters, exits and routing work: ``python tools/method_figure.py docs/figures/method.png``."""

import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

STOPS = (4, 2, 1, 1)
"""How many images of the batch stop at each exit."""
COLOURS = ("#0072b2", "#009e73", "#f0e442", "#cc79a7")
FROZEN, ADAPTER, INK = "#d4d7dd", "#d55e00", "#333333"
WIDTH, GAP, START, BLOCKS = 2.2, 0.55, 1.75, 3


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", size: int = 9) -> None:
    """Draw a filled rectangle with a text in its middle."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.8))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """Draw an arrow."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.2))


def images(ax: Axes, x: float, y: float, exits: list[int]) -> None:
    """Draw a row of images as squares in the colours of the exits that they take."""
    for place, k in enumerate(exits):
        square = Rectangle((x + place * 0.24, y), 0.2, 0.2, facecolor=COLOURS[k], edgecolor=INK, linewidth=0.6)
        ax.add_patch(square)


def stage(ax: Axes, k: int, x: float, entering: list[int]) -> None:
    """Draw one stage with its adapters, its exit, the images that enter it and those that stop behind it."""
    box(ax, x, 1.35, WIDTH, 1.3, "#f4f5f7")
    for block in range(BLOCKS):
        left = x + 0.1 + block * (WIDTH - 0.15) / BLOCKS
        box(ax, left, 1.75, 0.6, 0.75, FROZEN, f"block\n{k * BLOCKS + block + 1}", 8)
        box(ax, left + 0.08, 1.47, 0.44, 0.2, ADAPTER)
    last = k == len(STOPS) - 1
    ax.text(x, 0.95, f"runs for {len(entering)} image{'s' * (len(entering) > 1)}", fontsize=9, color=INK)
    images(ax, x, 0.62, entering)
    box(ax, x + 0.55, 3.1, 1.1, 0.4, "#ffffff", "backbone's head" if last else f"head {k + 1}", 8 if last else 9)
    arrow(ax, (x + 1.1, 2.65), (x + 1.1, 3.1))
    arrow(ax, (x + 1.1, 3.5), (x + 1.1, 4.15), COLOURS[k])
    ax.text(x + 1.18, 3.8, "the rest" if last else "certain", fontsize=9, va="center", color=INK)
    images(ax, x + 1.1 - STOPS[k] * 0.12, 4.2, [k] * STOPS[k])
    ax.text(x + 1.1, 4.5, f"exit {k + 1}", ha="center", fontsize=10, color=INK, fontweight="bold")
    if not last:
        arrow(ax, (x + WIDTH, 2.12), (x + WIDTH + GAP, 2.12))
        ax.text(x + WIDTH + GAP / 2, 2.2, "not\ncertain", ha="center", va="bottom", fontsize=8, color=INK)


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(12.4, 4.6), layout="constrained")
    ax = figure.add_subplot()
    batch = [k for k, count in enumerate(STOPS) for _ in range(count)]
    ax.text(0.0, 2.3, "batch of 8", fontsize=10, color=INK)
    images(ax, 0.0, 2.0, batch[:4])
    images(ax, 0.0, 1.75, batch[4:])
    arrow(ax, (1.1, 2.12), (START, 2.12))
    for k in range(len(STOPS)):
        stage(ax, k, START + k * (WIDTH + GAP), [image for image in batch if image >= k])
    runs = [sum(STOPS[k:]) for k in range(len(STOPS))]
    share = sum(runs) / (len(runs) * runs[0])
    words = (
        f"blocks run: ({' + '.join(map(str, runs))}) / ({len(runs)} × {runs[0]}) = {share:.0%} of the static network's"
    )
    ax.text(START, 0.15, words, fontsize=10, color=INK)
    box(ax, 8.6, 0.12, 0.3, 0.2, FROZEN)
    ax.text(9.0, 0.15, "frozen", fontsize=9, color=INK)
    box(ax, 9.9, 0.12, 0.3, 0.2, ADAPTER)
    ax.text(10.3, 0.15, "adapter, trained (heads too)", fontsize=9, color=INK)
    ax.set_xlim(-0.1, START + len(STOPS) * (WIDTH + GAP) - GAP + 0.1)
    ax.set_ylim(0, 4.8)
    ax.axis("off")
    return figure


if __name__ == "__main__":
    draw().savefig(sys.argv[1], dpi=110)
