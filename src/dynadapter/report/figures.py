"""The figures of a report, one function each, in colours of Okabe and Ito, which colour-blind readers tell apart."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from dynadapter.calibrate.curves import curve
from dynadapter.calibrate.report import cap_accuracy
from dynadapter.images.reading import UnreadableImage, is_source, load_image
from dynadapter.report.measured import Measured, confusion, recall, reliability
from dynadapter.report.run import Run

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7A00", "#444444")
GREY, CHOSEN = "#777777", "#D55E00"
MARKERS = "osD^vP*X"
NUMBERED, NAMED = 12, 40
"""A confusion matrix of more classes has no numbers, one of even more no names."""
LOWEST = 24
"""Of more classes the figure of recall shows the lowest."""
ROW = 8
"""Images in a row of the gallery."""
THUMBNAIL = 112


@contextmanager
def quiet_fonts() -> Iterator[None]:
    """Draw missing characters as boxes without a warning, and do not parse text as formulas."""
    with warnings.catch_warnings(), rc_context({"text.parse_math": False, "font.size": 9.5, "axes.titlesize": 10.5}):
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    file = BytesIO()
    with quiet_fonts():
        figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def figures_of(run: Run, measured: Measured | None) -> dict[str, Figure]:
    """Draw all figures for which there are measurements."""
    figures: dict[str, Figure] = {}
    with quiet_fonts():
        if run.exits or run.series("train/loss")[0]:
            figures["learning"] = learning(run)
        if measured is not None:
            if measured.exits > 1:
                figures["cost"] = accuracy_over_cost(measured)
                figures["shares"] = exit_shares(measured)
            figures["confusion"] = confusions(measured)
            figures["recall"] = recalls(measured)
            figures["reliability"] = reliabilities(measured)
            figures["images"] = gallery(measured)
    return figures


def learning(run: Run) -> Figure:
    """Draw training loss, validation loss and validation accuracy of each exit over epochs."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs, losses = run.series("train/loss")
    left.plot(epochs, losses, color=GREY, linewidth=1, label="training, weighted sum")
    for k in range(run.exits):
        style: dict[str, Any] = {
            "color": COLOURS[k % len(COLOURS)],
            "marker": MARKERS[k % len(MARKERS)],
            "markersize": 4,
            "markevery": max(run.epochs // 15, 1),
        }
        left.plot(*run.series(f"val/loss_exit{k + 1}"), label=f"exit {k + 1}, validation", **style)
        right.plot(*run.series(f"val/acc_exit{k + 1}"), **style)
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy", title="Validation accuracy")
    for axes, percent in ((left, ""), (right, "y")):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _tidy(axes, percent)
    cap_accuracy(right)
    _legend_below(figure)
    return figure


def accuracy_over_cost(measured: Measured) -> Figure:
    """Draw the exits, random mixtures of them, all thresholds of the confidence, and the policy's point."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    found = curve(
        measured.logits, measured.targets, torch.tensor(measured.costs), prediction=measured.policy, static=1.0
    )
    axes.plot(
        [point.cost for point in found.routed],
        [point.accuracy for point in found.routed],
        color=COLOURS[0],
        label="routed, every threshold of the confidence",
    )
    hull = mixtures(measured.costs, [point.accuracy for point in found.anytime])
    axes.plot(*zip(*hull, strict=True), "--", color=GREY, label="random mixtures of exits")
    points = [(point.cost, point.accuracy) for point in found.anytime]
    axes.plot(*zip(*points, strict=True), "o", color=GREY, label="all images at one exit")
    for k, (cost, accuracy) in enumerate(points):
        axes.annotate(
            f"{k + 1}", (cost, accuracy), xytext=(0, -13), textcoords="offset points", ha="center", color=GREY
        )
    whose = measured.origin.partition(":")[0]  # "calibrated", without the place
    words = f"{whose} policy: {measured.accuracy:.1%} at {measured.cost:.1%}"
    axes.plot([measured.cost], [measured.accuracy], "*", markersize=15, color=CHOSEN, label=words)
    axes.margins(y=0.12)
    cap_accuracy(axes)
    axes.set(
        xlabel="mean cost, % of the static network", ylabel="accuracy", title=f"Accuracy over cost ({measured.split})"
    )
    _tidy(axes, percent="xy")
    _legend_below(figure, columns=2)
    return figure


def mixtures(costs: tuple[float, ...], accuracies: list[float]) -> list[tuple[float, float]]:
    """Return the corners of the best random mixtures of exits: the upper hull of cost and accuracy, costs rising."""
    hull: list[tuple[float, float]] = []
    for cost, accuracy in sorted(zip(costs, accuracies, strict=True)):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (cost - hull[-2][0]) <= (accuracy - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((cost, accuracy))
    return hull


def exit_shares(measured: Measured) -> Figure:
    """Draw how many images stop at each exit, and how many of these are right."""
    figure = Figure(figsize=(6.4, 1.5 + 0.45 * measured.exits), layout="constrained")
    axes = figure.subplots()
    right = (measured.predicted == measured.targets).double()
    for k in range(measured.exits):
        here = measured.routed.exit_index == k
        share, correct = here.double().mean().item(), (here * right).mean().item()
        axes.barh(k, correct, color=COLOURS[2], label="right" if k == 0 else None)
        axes.barh(k, share - correct, left=correct, color=COLOURS[5], hatch="///", label="wrong" if k == 0 else None)
        words = f"{share:.1%}" + (f", {correct / share:.1%} right" if share else "")
        axes.annotate(words, (share, k), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
    names = [f"exit {k + 1}, {cost:.0%} of static" for k, cost in enumerate(measured.costs)]
    axes.set_yticks(range(measured.exits), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.28), xlabel="share of images", title=f"Where images stop ({measured.split})")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    _tidy(axes, percent="x", grid=False)
    _legend_below(figure)
    return figure


def confusions(measured: Measured) -> Figure:
    """Draw the confusion matrix under the policy, and of each exit: rows are true classes, each scaled to 1."""
    names, count = measured.class_names, len(measured.class_names)
    parts = [("routed", measured.predicted)]
    if measured.exits > 1:
        parts += [(f"exit {k + 1}", measured.predictions[k]) for k in range(measured.exits)]
    columns = min(len(parts), 3 if count <= NUMBERED else 2)
    rows = -(-len(parts) // columns)
    side = min(max(2.6, 0.34 * min(count, NAMED)), 6.5) + 0.5
    figure = Figure(figsize=(columns * side, rows * side), layout="constrained")
    shown = [_short(name) for name in names]
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, predicted) in zip(panels, parts, strict=False):
        counts = confusion(predicted, measured.targets, count)
        total = np.bincount(measured.targets.numpy(), minlength=count)[:, None]
        scaled = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
        axes.imshow(scaled, cmap="Blues", vmin=0, vmax=1)
        axes.set(title=title, xlabel="predicted", ylabel="true")
        if count <= NAMED:
            axes.set_xticks(range(count), shown, rotation=90, fontsize=7.5)
            axes.set_yticks(range(count), shown, fontsize=7.5)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        if count <= NUMBERED:
            for (i, j), number in np.ndenumerate(counts):
                if number:
                    axes.text(
                        j,
                        i,
                        str(number),
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color="white" if scaled[i, j] > 0.55 else "black",
                    )
    for axes in panels[len(parts) :]:
        axes.set_axis_off()
    return figure


def recalls(measured: Measured) -> Figure:
    """Draw the recall of each class under the policy and at the last exit; of many classes only the lowest."""
    count = len(measured.class_names)
    routed = recall(measured.predicted, measured.targets, count)
    last = recall(measured.predictions[-1], measured.targets, count)
    known = np.flatnonzero(~np.isnan(routed))
    order = known[np.argsort(routed[known], kind="stable")][:LOWEST]
    figure = Figure(figsize=(6.4, 1.5 + 0.27 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.hlines(range(len(order)), 0, 1, color="#dddddd", linewidth=0.8)
    axes.plot(last[order], range(len(order)), "o", color=GREY, markerfacecolor="white", label="last exit")
    if measured.exits > 1:
        axes.plot(routed[order], range(len(order)), "D", color=COLOURS[0], label="routed")
    axes.set_yticks(range(len(order)), [_short(measured.class_names[k]) for k in order], fontsize=8.5)
    what = f", the lowest {LOWEST} of {len(known)} classes" if len(order) < len(known) else ""
    axes.set(xlim=(-0.02, 1.02), xlabel="recall: share of the class that is right", title=f"Recall by class{what}")
    _tidy(axes, percent="x", grid=False)
    axes.invert_yaxis()
    _legend_below(figure)
    return figure


def reliabilities(measured: Measured) -> Figure:
    """Draw accuracy over confidence of each exit, in bins; the area of a bin shows its number of images."""
    columns = min(measured.exits, 4)
    rows = -(-measured.exits // columns)
    figure = Figure(figsize=(2.5 * columns + 0.4, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for k, axes in enumerate(panels):
        if k >= measured.exits:
            axes.set_axis_off()
            continue
        found = reliability(measured.logits[k], measured.targets)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
        sizes = 12 + 220 * found.counts / max(found.counts.sum(), 1)
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "alpha": 0.8, "edgecolors": "white"}
        axes.scatter(found.confidence, found.accuracy, s=sizes, clip_on=False, **style)  # whole at 100 %
        axes.set(
            title=f"exit {k + 1}, ECE {found.error:.1%}", xlabel="confidence", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04)
        )
        axes.set_aspect("equal")
        if k % columns == 0:
            axes.set_ylabel("accuracy")
        _tidy(axes, percent="xy")
    return figure


def gallery(measured: Measured) -> Figure:
    """Draw images by exit, evenly spread over the confidences at the exit; wrong predictions have a thick frame."""
    exits = [k for k in range(measured.exits) if (measured.routed.exit_index == k).any()]
    figure = Figure(figsize=(ROW * 1.15 + 0.7, 1.55 * len(exits)), layout="constrained")
    panels = figure.subplots(len(exits), ROW, squeeze=False)
    confidence = measured.routed.logits.softmax(-1).max(-1).values
    for row, k in zip(panels, exits, strict=True):
        members = (measured.routed.exit_index == k).nonzero()[:, 0]
        members = members[confidence[members].argsort(descending=True, stable=True)]
        places = np.linspace(0, len(members) - 1, min(ROW, len(members))).round().astype(int)
        for j, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(j < len(places))
            if j < len(places):
                _show(axes, measured, int(members[places[j]]), confidence)
        row[0].set_ylabel(f"exit {k + 1}\n{len(members):,} image{'s' * (len(members) != 1)}", fontsize=8.5)
    return figure


def _show(axes: Any, measured: Measured, index: int, confidence: torch.Tensor) -> None:
    """Draw one image with its prediction and, if that is wrong, its class."""
    axes.imshow(_thumbnail(measured.sources[index]))
    predicted, target = int(measured.predicted[index]), int(measured.targets[index])
    right, names = predicted == target, measured.class_names
    words = f"{_short(names[predicted], 14) if predicted >= 0 else 'none'} {confidence[index]:.0%}"
    axes.set_title(
        words if right else f"{words}\nis {_short(names[target], 14)}", fontsize=7, color="black" if right else CHOSEN
    )
    axes.spines[:].set(color=COLOURS[2] if right else CHOSEN, linewidth=1.2 if right else 3.2)


def _thumbnail(source: Any) -> Image.Image:
    if not is_source(source):
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    try:
        image = load_image(source)
    except (UnreadableImage, OSError):
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _short(name: str, most: int = 22) -> str:
    name = " ".join(name.split())
    return name if len(name) <= most else name[: most - 1] + "…"


def _legend_below(figure: Figure, columns: int = 3) -> None:
    if any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _tidy(axes: Any, percent: str = "", grid: bool = True) -> None:
    """Take frame lines away, and label the axes named in `percent` in percent."""
    axes.spines[["top", "right"]].set_visible(False)
    for name in percent:
        getattr(axes, f"{name}axis").set_major_formatter(PercentFormatter(1, decimals=0))
    if grid:
        axes.grid(alpha=0.25, linewidth=0.6)


def compared(runs: Sequence[tuple[str, Measured]]) -> Figure:
    """Draw accuracy over cost of several runs: exits, the best random mixtures of them, and the policy's point."""
    with quiet_fonts():
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, (name, one) in enumerate(runs):
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            if one.exits == 1:  # a static network
                axes.axhline(one.accuracies[0], linewidth=0.9, linestyle=":", color=style["color"])
            hull = mixtures(one.costs, one.accuracies)
            axes.plot(*zip(*hull, strict=True), linewidth=0.9, color=style["color"])
            axes.plot(one.costs, one.accuracies, linestyle="none", markersize=4, **style)
            axes.plot(
                [one.cost],
                [one.accuracy],
                linestyle="none",
                markersize=11,
                markeredgecolor="white",
                label=_short(name, 40),
                **style,
            )
        axes.set(xlabel="mean cost, % of the static network", ylabel="accuracy", title="Accuracy over cost")
        cap_accuracy(axes)
        _tidy(axes, percent="xy")
        _legend_below(figure)
    return figure
