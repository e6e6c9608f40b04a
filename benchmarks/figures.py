"""The figures of the report, as SVG or PNG by the name of the file. The same lines give the same bytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from findings import LAST, NAMES, Compared, Difference, Setting, dyn, mean, paired, read
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from runs import Line

COLORS = {"adapter": "#0072b2", "lora": "#c8500a", "repadapter": "#00805f"}
EXITS = ("#08306b", "#2f7ebc", "#94c4df", "#e8b45a", "#c8701e", "#7f3b08")
"""From the first exit to the last; blue is early. Of few exits the last is still brown."""
INK, FAINT = "#222222", "#b8b8b8"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "grid.color": "#ececec",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks the same everywhere
    "svg.hashsalt": "dynadapter",
}


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Gives a figure of a size in inches, and writes it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        quiet = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=130, metadata=quiet)


def exit_colors(count: int) -> list[str]:
    """Gives each exit a colour."""
    return [EXITS[round(k * (len(EXITS) - 1) / max(count - 1, 1))] for k in range(count)]


def exit_names(blocks: Sequence[int]) -> list[str]:
    """Names exits by their blocks."""
    return [f"after block {block}" for block in blocks]


# ---- accuracy and cost -----------------------------------------------------------------------------------------------


def swept(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray] | None:
    """Averages the curves of runs over all costs that they all reach: costs and accuracies."""
    curves = [np.array(sorted(line["curve"])) for line in lines if line.get("curve")]
    if not curves:
        return None
    low, high = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    grid = np.linspace(low, high, 120)
    return grid, np.mean([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)


def frontier(path: Path, setting: Setting) -> bool:
    """Draws accuracy over cost for each kind; false where no kind has both arms."""
    panels = []
    for method in setting.petl:
        last, static = setting.values(method, setting.recipe), setting.values(method, "static")
        tasks = [task for task in setting.tasks if task in last and task in static]
        if tasks:
            panels.append((method, tasks, static))
    if not panels:
        return False
    with drawing(path, 3.1 * len(panels) + 0.6, 3.5) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (method, tasks, static) in zip(axes, panels, strict=True):
            _frontier(ax, setting, method, tasks, static)
        axes[0].set_ylabel("accuracy on test in %, mean over tasks")
        figure.supxlabel("average multiply-adds in % of the network without exits", fontsize=9)
        figure.legend(handles=_keys(), loc="outside upper center", ncols=4, fontsize=8.5)
    return True


def _keys() -> list[Line2D]:
    """What stands for what, in no kind's colour."""
    grey = "#666666"
    return [
        Line2D([], [], color=grey, lw=1.8, label="leaving by one threshold, swept"),
        Line2D(
            [],
            [],
            color=grey,
            marker="o",
            ls="",
            ms=7,
            mec="white",
            label="set on validation, for so many %",
        ),
        Line2D([], [], color=FAINT, marker="s", ls="--", mfc="white", mec="#888888", ms=5, label="all at one exit"),
        Line2D([], [], color=INK, marker="D", ls="", ms=6.5, label="without exits"),
    ]


def _frontier(ax: Axes, setting: Setting, method: str, tasks: list[str], static: Any) -> None:
    color, marks = COLORS[method], []

    def point(reading: str | int, recipe: str) -> tuple[float, float] | None:
        values = setting.values(method, recipe, reading)
        costs = mean(values, lambda p: 100 * p.cost, tasks)
        accuracies = mean(values, lambda p: 100 * p.accuracy, tasks)
        return (costs.value, accuracies.value) if costs and accuracies else None

    lines = [line for task in tasks for line in setting.finals(method, setting.recipe, task).values()]
    curve = swept(lines)
    if curve is not None:
        ax.plot(100 * curve[0], 100 * curve[1], color=color, lw=1.8, zorder=3)
    exits = min(len(line["exits"]) for line in lines)
    anytime = [one for k in range(exits) if (one := point(k, setting.recipe))]
    ax.plot(*zip(*anytime, strict=True), "s--", color=FAINT, mfc="white", mec="#888888", ms=5)
    for goal in setting.goals():
        one = point(goal, setting.recipe)
        if one and goal.isdigit() and int(goal) < 100:
            marks.append((goal, one))
    if marks:
        xs, ys = zip(*(one for _, one in marks), strict=True)
        ax.plot(xs, ys, "o", color=color, mec="white", mew=0.8, ms=7, zorder=4)
    places = sorted(dict.fromkeys(one for _, one in marks))
    for place in places:  # more than one where a larger budget is not used
        goal = "/".join(sorted((goal for goal, one in marks if one == place), key=int))
        # the dearest stands at the other side: the curve is flat there, and the labels would lie on each other
        where, side = ((4, -11), "left") if place == places[-1] else ((-6, 3), "right")
        ax.annotate(goal, place, xytext=where, textcoords="offset points", ha=side, fontsize=7.5, color=color)
    level = mean(static, lambda p: 100 * p.accuracy, tasks)
    assert level is not None, "tasks are those that it has"
    ax.axhline(level.value, color=INK, lw=0.8, ls=":", zorder=1)
    ax.plot([100], [level.value], "D", color=INK, ms=6.5, zorder=5)
    ax.set_title(f"{dyn(method)} and {NAMES[method]}" + ("" if tasks == setting.tasks else f", {len(tasks)} tasks"))
    ax.set_xlim(min(20.0, anytime[0][0] - 4), 107)
    ax.axvline(50, color="#dddddd", lw=1, zorder=0)


# ---- task by task ----------------------------------------------------------------------------------------------------


def rows_of(setting: Setting, tasks: Sequence[str]) -> list[float]:
    """Gives tasks their heights from the top, with a gap between groups."""
    heights, group, at = [], None, 0.0
    for task in tasks:
        here = next(name for name, members in setting.groups.items() if task in members)
        at += 0.0 if group is None else 1.0 if here == group else 1.5
        heights.append(-at)
        group = here
    return heights


def differences(path: Path, setting: Setting, goal: str) -> bool:
    """Draws, task by task, by how much exits change the accuracy: at a goal, and with everyone at the last exit."""
    panels: list[tuple[str, dict[str, Difference]]] = []
    for reading, title in ((goal, f"thresholds set for {goal} % of the cost"), (LAST, "everyone at the last exit")):
        found = {}
        for method in setting.petl:
            one = setting.values(method, setting.recipe, reading)
            apart = paired(one, setting.values(method, "static"), lambda p: p.accuracy)
            if apart is not None:
                found[method] = apart
        if found:
            panels.append((title, found))
    if not panels:
        return False
    tasks = [t for t in setting.tasks if any(t in d.by_task for _, found in panels for d in found.values())]
    heights = rows_of(setting, tasks)
    bottom = heights[-1] - 1.7
    with drawing(path, 8.6, 1.7 + 0.32 * (len(tasks) + 2)) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
        for ax, (title, found) in zip(axes, panels, strict=True):
            ax.axvline(0, color=INK, lw=0.8)
            for number, (method, apart) in enumerate(found.items()):
                shift = 0.2 * ((len(found) - 1) / 2 - number)
                own = [
                    (100 * apart.by_task[t], y + shift)
                    for t, y in zip(tasks, heights, strict=True)
                    if t in apart.by_task
                ]
                ax.plot(*zip(*own, strict=True), "o", color=COLORS[method], ms=5, mec="white", mew=0.6)
                width = 0 if apart.half is None else 100 * apart.half
                where = (100 * apart.mean, bottom + 1.4 * shift)
                style = {"fmt": "D", "color": COLORS[method], "ms": 6, "capsize": 2.5, "lw": 1.4}
                ax.errorbar(*where, xerr=width, label=f"{dyn(method)} minus {NAMES[method]}", **style)
            ax.set_title(title)
            ax.grid(axis="y", visible=False)
            ax.axhspan(bottom - 0.7, bottom + 0.7, color="#f5f5f5", zorder=0)
        axes[0].set_yticks([*heights, bottom], [*tasks, "mean, 95 % interval"])
        axes[0].set_ylim(bottom - 0.8, 0.7)
        figure.supxlabel("points of accuracy on test", fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8.5)
    return True


def exit_use(path: Path, setting: Setting, goal: str) -> bool:
    """Draws which share of the test samples leaves where, task by task."""
    found = {method: setting.values(method, setting.recipe, goal) for method in setting.petl}
    found = {method: values for method, values in found.items() if values}
    if not found:
        return False
    tasks = [task for task in setting.tasks if any(task in values for values in found.values())]
    heights = rows_of(setting, tasks)
    lines = [line for method in found for t in tasks for line in setting.finals(method, setting.recipe, t).values()]
    blocks = max((line["exits"] for line in lines), key=len)
    colors = exit_colors(len(blocks))
    with drawing(path, 3.0 * len(found) + 1.2, 1.4 + 0.34 * len(tasks)) as figure:
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for ax, (method, values) in zip(axes, found.items(), strict=True):
            for task, height in zip(tasks, heights, strict=True):
                if task not in values:
                    ax.text(2, height, "no run", va="center", fontsize=7.5, color="#888888")
                    continue
                shares = np.mean([point.shares for point in values[task].values()], axis=0)
                left = 0.0
                for k, share in enumerate(100 * shares):
                    ax.barh(height, share, left=left, height=0.78, color=colors[k], edgecolor="white", lw=0.6)
                    if share >= 9:
                        ink = INK if sum(to_rgb(colors[k])) > 1.7 else "white"
                        ax.text(
                            left + share / 2, height, f"{share:.0f}", ha="center", va="center", fontsize=7.5, color=ink
                        )
                    left += share
            ax.set_title(dyn(method))
            ax.set_xlim(0, 100)
            ax.grid(visible=False)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        axes[0].set_yticks(heights, tasks)
        figure.supxlabel(f"% of the test samples, thresholds set for {goal} % of the cost", fontsize=9)
        patches = [Patch(color=color, label=name) for color, name in zip(colors, exit_names(blocks), strict=True)]
        figure.legend(handles=patches, loc="outside upper center", ncols=len(blocks), fontsize=8.5)
    return True


# ---- the search ------------------------------------------------------------------------------------------------------


def ablation(path: Path, compared: Sequence[Compared], names: dict[str, str], methods: Sequence[str]) -> bool:
    """Draws what the accuracy does when an ingredient is exchanged: bars for the mean, dots for the kinds."""
    shown = [one for one in compared if one.differences["50"].get("all")]
    if not shown:
        return False
    panels = {"50": "at half the cost", LAST: "everyone at the last exit"}
    with drawing(path, 8.6, 1.5 + 0.42 * len(shown)) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
        for ax, (reading, title) in zip(axes, panels.items(), strict=True):
            ax.axvline(0, color=INK, lw=0.8)
            for row, one in enumerate(shown):
                found = one.differences[reading]
                over = found["all"]
                if over is None:
                    continue
                half = None if over.half is None else 100 * over.half
                whisker = {"capsize": 2.5, "lw": 1, "ecolor": INK}
                ax.barh(0.15 - row, 100 * over.mean, height=0.36, color="#cfcfcf", xerr=half, error_kw=whisker)
                for method in methods:
                    own = found.get(method)
                    if own is not None:
                        label = NAMES[method] if row == 0 else None
                        style = {"color": COLORS[method], "ms": 5, "mec": "white", "mew": 0.6}
                        ax.plot(100 * own.mean, -0.22 - row, "o", label=label, **style)
            ax.set_title(title)
            ax.grid(axis="y", visible=False)
        axes[0].set_yticks([-row for row in range(len(shown))], [names.get(one.recipe, one.recipe) for one in shown])
        text = "points of accuracy on validation against the whole recipe; left of zero: the exchange harms"
        figure.supxlabel(text, fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        bar = Patch(color="#cfcfcf", label="mean, 95 % interval over tasks")
        figure.legend([bar, *handles], [bar.get_label(), *labels], loc="outside upper center", ncols=4, fontsize=8.5)
    return True


# ---- images ----------------------------------------------------------------------------------------------------------


def leavers(path: Path, setting: Setting, method: str, goal: str, data: Path, keep: Path, count: int = 8) -> list[str]:
    """Draws images that leave first and last, a row a task; the surest of the first, the most doubtful of the last.

    Mind the images' terms before you pass such a figure on.

    Args:
        path: Where to.
        setting: The final runs.
        method: The kind.
        goal: The target of the thresholds.
        data: Folder that holds the tasks.
        keep: Folder in which ``transfer.py --keep`` left the logits.
        count: Images on either side.

    Returns:
        The tasks that are shown.
    """
    import torch
    from outcomes import DEFAULT_RULE
    from PIL import Image
    from transfer import kept_name

    from dynadapter import Policy, route
    from dynadapter.exits.policies import confidence
    from dynadapter.spec import restore

    rows = []
    for task in setting.tasks:
        for line in setting.finals(method, setting.recipe, task).values():
            place, point = keep / f"{kept_name(line['key'])}.npz", read(line, goal)
            if point is None or not place.is_file() or not (data / task).is_dir():
                continue
            with np.load(place) as arrays:
                logits, files = torch.from_numpy(arrays["logits"]), arrays["files"].tolist()
            policy = restore(line["routed"][DEFAULT_RULE][goal]["policy"], Policy)
            exits, sure = route(policy, logits), confidence(logits)
            first = [i for i in sure[0].argsort(descending=True).tolist() if exits[i] == 0][:count]
            last = [i for i in sure[-2].argsort().tolist() if exits[i] == len(logits) - 1][:count]
            rows.append((task, line, [[data / task / files[i] for i in side] for side in (first, last)]))
            break
    if not rows:
        return []
    blocks = rows[0][1]["exits"]
    titles = (f"leave after block {blocks[0]}, the surest", f"stay to block {blocks[-1]}, the most doubtful")
    with drawing(path, 0.64 * 2 * count + 1.6, 0.66 * len(rows) + 0.4) as figure:
        halves = figure.subfigures(1, 2, width_ratios=(0.64 * count + 1.4, 0.64 * count))
        for number, (half, title) in enumerate(zip(halves, titles, strict=True)):
            half.suptitle(title, fontsize=9, fontweight="bold")
            axes = half.subplots(len(rows), count, squeeze=False)
            for ax in axes.flat:
                ax.set_axis_off()
            for row, (task, _, sides) in zip(axes, rows, strict=True):
                if number == 0:
                    row[0].text(-0.15, 0.5, task, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
                for ax, file in zip(row, sides[number], strict=False):
                    with Image.open(file) as image:
                        ax.imshow(image.convert("RGB"), interpolation="nearest")
    return [task for task, _, _ in rows]
