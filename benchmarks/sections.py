"""What there is to say on one setting, section by section, as Markdown."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
from findings import (
    LAST,
    NAMES,
    READINGS,
    Difference,
    Mean,
    Point,
    Reading,
    Setting,
    Values,
    compare,
    dyn,
    grouped,
    mean,
    paired,
    rules,
    share_of,
    speeds,
    tried,
)
from learning import Protocol
from outcomes import DEFAULT_RULE
from recipes import exchanges
from runs import matching
from transfer import FULL_RATES, GOAL, chosen_scale

from dynadapter.bench.timing import VOID, is_void

SHOWN = ("75", "50", "45", "35", "25", "drop 0")
"""The targets that tables show, where the lines have them."""
INTERVAL = "± behind a difference is half of its 95 % t interval over tasks"


# ---- Markdown --------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]], side: str = "---:") -> str:
    """Lays out a table; numbers stand at the right, as long as ``side`` is not another mark."""
    lines = [header, ["---", *[side] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(value: float | None) -> str:
    """Prints a share in percent."""
    return "–" if value is None else f"{100 * value:.1f}"


def told(found: Mean | None) -> str:
    """Prints a mean share in percent with its deviation over seeds."""
    if found is None:
        return "–"
    return percent(found.value) + ("" if found.deviation is None else f" ± {100 * found.deviation:.1f}")


def gmacs(macs: float) -> str:
    """Prints multiply-adds in GMACs, of a small network with more digits."""
    return f"{macs / 1e9:.{4 if macs < 1e9 else 2}f}"


def thousands(count: float) -> str:
    """Prints a count in thousands."""
    return f"{count / 1e3:,.1f}"


def goal_name(goal: Reading) -> str:
    """Names a way to read a network with exits."""
    if goal == LAST:
        return "all at the last exit"
    return f"at {goal} %" if str(goal).isdigit() else "at no loss"


def listed(values: Iterable[Any]) -> str:
    """Prints values with commas."""
    return ", ".join(map(str, values))


# ---- the sections of a setting ---------------------------------------------------------------------------------------


class Section:
    """Prints what there is to say on one setting.

    Args:
        setting: Its lines.
        figures: Folder for the figures.
        prefix: Of the figures' names.
        link: Path of that folder as the document sees it.
        drawn: The lines of drawn tasks: where this setting has no ablation, theirs counts for goal 4.
    """

    def __init__(self, setting: Setting, figures: Path, prefix: str, link: str, drawn: Setting | None = None) -> None:
        self.setting, self.folder, self.prefix, self.link, self.drawn = setting, figures, prefix, link, drawn
        self.goals = [goal for goal in SHOWN if goal in setting.goals()]
        self.machines = sorted({line["key"]["machine"] for line in setting.phase("speed")})
        self.exchanged = {name: text for name, text in exchanges(setting.recipe).items() if name in tried(setting)}
        self.ablated = [compare(setting, name, setting.recipe) for name in self.exchanged]

    def text(self) -> str:
        """Gives all sections that have something to say."""
        parts = [self.protocol()]
        if self.setting.phase("final"):
            parts += [
                self.missing(),
                self.short(),
                self.verdicts(),
                self.summary(),
                self.against(),
                self.by_task(),
                self.leaving(),
                self.anytime(),
                self.speed(),
                self.others(),
            ]
        else:
            parts.append("No final run yet: nothing of this setting was read on test.\n")
        parts += [self.ablation(), self.recipes(), self.rules(), self.scales()]
        return "\n".join(part for part in parts if part)

    def searched(self) -> str:
        """Gives the sections on searches alone, for tasks that are never read on test."""
        parts = [self.made_on(), self.accuracies(), self.ablation(), self.recipes(), self.rules()]
        return "\n".join(part for part in parts if part)

    def values(self, method: str, reading: Reading = LAST) -> Values:
        """What a kind with exits does on test."""
        return self.setting.values(method, self.setting.recipe, reading)

    def static(self, method: str) -> Values:
        """What it does without."""
        return self.setting.values(method, "static")

    def figure(self, name: str, title: str, draw: Callable[[Path], bool]) -> str:
        """Draws a figure and gives the Markdown that shows it; nothing where there is nothing to draw."""
        file = f"{self.prefix}{name}.svg"
        return f"\n![{title}]({self.link}/{file})\n" if draw(self.folder / file) else ""

    # ---- what it is about

    def protocol(self) -> str:
        """Says how the lines were made, and on which machines."""
        setting, how = self.setting, Protocol()
        searched = setting.phase("search")
        tried = {line["key"]["scale"] for line in searched if line["key"]["method"] in setting.petl}
        finals = [line for line in setting.phase("final") if line["key"]["method"] in setting.petl]
        elsewhere = {line.get("scales_epochs", setting.epochs) for line in finals} - {setting.epochs}
        if elsewhere:  # chosen by shorter trainings
            tried |= {scale for line in finals for scale in line["scales_searched"]}
        seeds = sorted({line["key"]["seed"] for line in searched})
        counts = [f"{len(setting.phase(name))} {name}" for name in ("search", "final", "speed")]
        groups = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in setting.groups.items())
        what = f"seed {listed(seeds)}; scales {', '.join(f'{scale:g}' for scale in sorted(tried))}"
        what += f", chosen after {listed(sorted(elsewhere))} epochs" if elsewhere else ""
        what += f"; for full fine-tuning factors {', '.join(f'{rate:g}' for rate in FULL_RATES)} on the rate"
        read = f", with seed {listed(setting.seeds)}" if setting.seeds else ""
        spread = {0: "", 1: " One seed: no deviation can be told."}.get(
            len(setting.seeds), " ± behind an accuracy is the deviation over seeds."
        )
        return (
            f"Backbone `{setting.backbone}`, {setting.epochs} epochs of batches of {setting.batch}, recipe "
            f"`{setting.recipe}` for networks with exits. {len(setting.tasks)} tasks ({groups}). Lines: "
            f"{', '.join(counts)}.\n\nAdamW, learning rate {how.lr:g}, weight decay {how.weight_decay:g}; a tenth of "
            "the steps up, then a cosine down; incomplete batches left out; no augmentation; the last epoch counts; "
            "every arm alike. Scales and thresholds are chosen on val200 with networks trained on "
            f"train800{f' ({what})' if seeds else ''}. Then train800val200 trains the network that is read on test "
            f"once{read}.{spread}\n\n{self.settings()}\n{self.made_on()}"
        )

    def made_on(self) -> str:
        """Names the machines, with the versions."""
        found: dict[str, list[str]] = {}
        for phase in ("search", "final", "speed"):
            for line in self.setting.phase(phase):
                about = line["machine"]
                place = about.get("gpu") or about["cpu"]
                packages = [f"{n} {about[n]}" for n in ("python", "torch", "timm", "dynadapter") if n in about]
                phases = found.setdefault(f"{place}, {', '.join(packages)}", [])
                if phase not in phases:
                    phases.append(phase)
        return f"Made on: {'; '.join(f'{name} ({listed(phases)})' for name, phases in sorted(found.items()))}.\n"

    def settings(self) -> str:
        """Says what the recipe was when the lines were written, and what plain training is."""
        shown = {name: self.setting_of(name) for name in ("static", self.setting.recipe)}
        known = {name: values for name, values in shown.items() if values}
        if len(known) < 2:
            return ""
        static, own = known["static"], known[self.setting.recipe]
        for one in (static, own):
            if "exits" in one:
                blocks = f"every {one.get('every')} blocks" if one["exits"] is None else brief(one["exits"])
                one["exits"] = "no early one" if one["exits"] == [] else blocks
                one.pop("every", None)
        rows = [[key, brief(static.get(key)), brief(own[key])] for key in own if own[key] != static.get(key)]
        same = listed(f"{key} {brief(own[key])}" for key in own if own[key] == static.get(key))
        head = table(["", "without exits", f"`{self.setting.recipe}`"], rows, ":---")
        return f"{head}\nIn both: {same}.\n"

    def setting_of(self, name: str) -> dict[str, Any]:
        """The settings of a recipe as a line has them."""
        lines = [line for line in self.setting.lines if line["key"]["recipe"] == name and "settings" in line]
        return dict(lines[-1]["settings"]) if lines else {}

    def missing(self) -> str:
        """Names what the log does not have."""
        if not self.setting.missing:
            return ""
        rows = "".join(f"- {text}\n" for text in self.setting.missing)
        return f"**Not there yet**, and left out of what follows:\n\n{rows}"

    def short(self) -> str:
        """The small table that the README shows; empty where there are no final runs of X and Dyn-X."""
        setting, rows = self.setting, []
        for method in setting.petl:
            static, last, routed = self.static(method), self.values(method), self.values(method, GOAL)
            tasks = [task for task in setting.tasks if task in static and task in routed]
            macs, average, share = mean(static, macs_of, tasks), mean(routed, macs_of, tasks), share_of(routed, tasks)
            if macs is None or average is None or share is None:
                continue
            fast = speeds(setting, method, GOAL, self.best_machine()) if self.machines else None
            rows.append(
                [
                    NAMES[method] + ("" if tasks == setting.tasks else f" ({len(tasks)} tasks)"),
                    told(mean(static, accuracy_of, tasks)),
                    gmacs(macs.value),
                    told(mean(routed, accuracy_of, tasks)),
                    f"{gmacs(average.value)} ({100 * share:.0f} %)",
                    told(mean(last, accuracy_of, tasks)),
                    f"{fast.speedup:.2f}×" if fast else "–",
                ]
            )
        if not rows:
            return ""
        head = ["X", "accuracy", "GMACs", "Dyn-X: accuracy", "GMACs", "all at the last exit", "images/s"]
        seeds = f"{len(setting.seeds)} seeds" if len(setting.seeds) > 1 else "one seed"
        speed = f"; images/s against X's, measured on {self.best_machine()}" if self.machines else ""
        text = (
            f"Accuracy on test in %, means over {len(setting.tasks)} tasks ({listed(setting.tasks)}), backbone "
            f"{setting.backbone.partition(':')[0]}, {setting.epochs} epochs, {seeds}; Dyn-X with thresholds set on "
            f"validation images for half of X's multiply-adds{speed}."
        )
        return f"{text}\n\n{table(head, rows)}"

    # ---- the goals

    def verdicts(self) -> str:
        """Says of each goal whether it was reached, or by how much it was missed."""
        rows = [*self._goal1(), *self._goal2(), *self._goal3(), *self._goal4()]
        head = ["goal", "asked", "found", "verdict"]
        return f"### Goals\n\nMeans over tasks; {INTERVAL}.\n\n" + table(head, rows, ":---")

    def _found(self, method: str, reading: Reading) -> tuple[Difference, float] | None:
        one = self.values(method, reading)
        apart = paired(one, self.static(method), lambda point: point.accuracy)
        cost = share_of(one, apart.by_task) if apart else None
        return (apart, cost) if apart and cost is not None else None

    def _count(self, apart: Difference) -> str:
        return "" if len(apart.by_task) == len(self.setting.tasks) else f", {len(apart.by_task)} tasks"

    def _goal1(self) -> list[list[str]]:
        rows = []
        asked = [
            ("1", "50", 0.5, 0.0),
            ("1", "45", 0.5, 0.0),
            ("1, beyond", "35", 0.35, 0.0),
            ("1, beyond", "50", 0.5, 0.01),
        ]
        for method in self.setting.petl:
            for goal, target, most, least in asked:
                found = self._found(method, target)
                if found is None:
                    continue
                apart, cost = found
                lost = [f"accuracy by {100 * (least - apart.mean):.2f} points"] if apart.mean < least else []
                lost += [f"cost by {100 * (cost - most):.2f} % of {NAMES[method]}'s"] if cost > most else []
                rows.append(
                    [
                        f"{goal}: {dyn(method)}, set for {target} %",
                        f"≥ {100 * least:+.1f} points at ≤ {100 * most:.0f} %".replace("+0.0", "0"),
                        f"{apart.text} points at {100 * cost:.1f} %{self._count(apart)}",
                        f"missed: {' and '.join(lost)}" if lost else "**reached**",
                    ]
                )
        return rows

    def _goal2(self) -> list[list[str]]:
        rows = []
        for method in self.setting.petl:
            found = self._found(method, LAST)
            if found:
                apart, lost = found[0], -100 * found[0].mean
                verdict = f"missed by {lost:.2f} points" if lost > 0 else "**reached**"
                asked = "≥ 0 points"
                rows.append(
                    [
                        f"2: {dyn(method)}, all at the last exit",
                        asked,
                        f"{apart.text} points{self._count(apart)}",
                        verdict,
                    ]
                )
        return rows

    def _goal3(self) -> list[list[str]]:
        rows = []
        for machine in self.machines:
            for method in self.setting.petl:
                found = speeds(self.setting, method, GOAL, machine)
                if found:
                    lost = 0.95 - found.efficiency
                    verdict = f"missed by {lost:.3f}" if lost > 0 else "**reached**"
                    text = f"{found.efficiency:.3f} ({found.speedup:.2f}× of {found.promise:.2f}×), {found.tasks} tasks"
                    rows.append([f"3: {dyn(method)} on {machine}, batch {self.setting.batch}", "≥ 0.95", text, verdict])
        return rows or [["3: measured speed", "≥ 0.95 of the promise", "not measured", "–"]]

    def _goal4(self) -> list[list[str]]:
        if not self.ablated and self.drawn is not None:
            there = Section(self.drawn, self.folder, "", "")
            return [
                [*row[:2], f"{row[2]} of drawn tasks" if there.ablated else row[2], row[3]] for row in there._goal4()
            ]
        rows = []
        for one in self.ablated:
            apart = one.differences[GOAL].get("all")
            if apart:
                rows.append(
                    [
                        f"4: {self.exchanged[one.recipe]}",
                        f"worse than `{self.setting.recipe}`",
                        f"{apart.text} points at half the cost, on validation",
                        earned(apart),
                    ]
                )
        return rows or [["4: ablation", "each ingredient helps", "not run", "–"]]

    # ---- tables of test

    def arms(self) -> list[tuple[str, str, Reading, Values]]:
        """All arms with final runs: name, kind, reading, values."""
        found: list[tuple[str, str, Reading, Values]] = []
        for method in self.setting.methods:
            found.append((NAMES[method], method, "static", self.static(method)))
            found += [
                (f"{dyn(method)}, {goal_name(g)}", method, g, self.values(method, g)) for g in (LAST, *self.goals)
            ]
        return [arm for arm in found if arm[3]]

    def summary(self) -> str:
        """The table of means: accuracy by group, cost, exits, speed, trained parameters."""
        setting, rows = self.setting, []
        for name, method, reading, values in self.arms():
            whole = setting.tasks
            cost, first, macs = (mean(values, pick, whole) for pick in (cost_of, class_first_of, macs_of))
            accuracy = [told(one) for one in grouped(values, accuracy_of, setting.groups)]
            rows.append(
                [
                    f"**{name}**" if reading == "static" else name,
                    *accuracy,
                    gmacs(macs.value) if macs else "–",
                    percent(cost.value) if cost else "–",
                    "" if reading == "static" else percent(first.value) if first else "–",
                    "" if reading in ("static", LAST) else shares_text(values, whole),
                    self._images_per_second(method, reading),
                ]
            )
        head = ["", *setting.groups, "mean of groups", "GMACs", "% of X", "% class first", "% by exit", "images/s"]
        note = (
            "Accuracy on test in %. *at 50 %*: thresholds set on validation for half of X's multiply-adds; *at no "
            "loss*: the cheapest that lose nothing there. GMACs: average multiply-adds of an image by whole blocks, "
            "with adapters unmerged and all heads that it passes; *class first*: as routing runs them, the class "
            f"token's row of an exit's last block first, in % of X by whole blocks. Rule for leaving: {DEFAULT_RULE}."
        )
        if self.machines:
            note += f" Images/s on {self.best_machine()}, batch {setting.batch}."
        drawn = self.figure("frontier", "Accuracy over cost", lambda path: figures.frontier(path, setting))
        return f"### Means\n\n{note}\n\n{table(head, rows)}{drawn}\n{self._trained()}"

    def best_machine(self) -> str:
        return max(self.machines, key=lambda m: (len(self.setting.phase("speed", machine=m)), m))

    def _images_per_second(self, method: str, reading: Reading) -> str:
        if not self.machines:
            return ""
        goal = GOAL if reading == "static" else str(reading)
        found = speeds(self.setting, method, goal, self.best_machine())
        return f"{found.static if reading == 'static' else found.routed:,.0f}" if found else ""

    def _trained(self) -> str:
        rows = []
        parts = ("adapters", "heads", "last_head", "backbone")
        for method in self.setting.methods:
            for name, arm in ((NAMES[method], "static"), (dyn(method), self.setting.recipe)):
                by_task = [list(self.setting.finals(method, arm, task).values()) for task in self.setting.tasks]
                counts = [lines[0]["trainable"] for lines in by_task if lines]
                if counts:
                    means = [statistics.fmean(count[part] for count in counts) for part in parts]
                    rows.append([name, *map(thousands, means), thousands(sum(means))])
        head = ["trained, thousand", "adapters", "early heads", "last head", "backbone", "all"]
        return table(head, rows)

    def against(self) -> str:
        """Dyn-X minus X, task by task."""
        setting = self.setting
        readings = [LAST, *(goal for goal in self.goals if goal != "drop 0")]
        rows = []
        for method in setting.petl:
            for reading in readings:
                found = self._found(method, reading)
                if found:
                    apart, cost = found
                    each = [f"{100 * apart.by_task[t]:+.1f}" if t in apart.by_task else "–" for t in setting.tasks]
                    rows.append([f"{dyn(method)} {goal_name(reading)}", *each, f"**{apart.text}**", percent(cost)])
        if not rows:
            return ""
        drawn = self.figure("differences", "Dyn-X minus X", lambda path: figures.differences(path, setting, GOAL))
        head = ["minus X, points", *setting.tasks, "mean", "% of X"]
        return f"### With exits against without\n\n{INTERVAL[0].upper()}{INTERVAL[1:]}.\n\n{table(head, rows)}{drawn}"

    def by_task(self) -> str:
        """A table a group: accuracy of every arm on every task."""
        parts = []
        for group, tasks in self.setting.groups.items():
            rows = []
            for name, _, reading, values in [arm for arm in self.arms() if arm[2] not in ("75", "45", "25")]:
                each = [told(mean(values, accuracy_of, [task])) for task in tasks]
                label = f"**{name}**" if reading == "static" else name
                rows.append([label, *each, told(mean(values, accuracy_of, tasks))])
            parts.append(table([group, *tasks, "mean"], rows))
        return "### Task by task\n\nAccuracy on test in %.\n\n" + "\n".join(parts)

    def leaving(self) -> str:
        """Where samples leave, task by task."""
        setting, rows, exits, goal = self.setting, [], 0, self._goal_that_parts()
        for method in setting.petl:
            values = self.values(method, goal)
            for task in [task for task in setting.tasks if task in values]:
                points = list(values[task].values())
                shares = [statistics.fmean(each) for each in zip(*(p.shares for p in points), strict=True)]
                exits = max(exits, len(shares))
                average = gmacs(statistics.fmean(point.macs for point in points))
                cost = percent(statistics.fmean(point.cost for point in points))
                rows.append([f"{dyn(method)} {task}", average, cost, *(f"{100 * share:.0f}" for share in shares)])
        if not rows:
            return ""
        blocks = max((line["exits"] for line in setting.phase("final")), key=len)
        head = ["", "GMACs", "% of X", *(f"% after block {block}" for block in blocks)]
        drawn = self.figure("exits", "Who leaves where", lambda path: figures.exit_use(path, setting, goal))
        text = f"Test samples, thresholds set on validation for {goal} % of the cost; means over seeds."
        if goal != GOAL:
            text += f" At {GOAL} % nobody leaves early: the whole way is cheaper than that."
        return f"### Who leaves where\n\n{text}\n\n{table(head, rows)}{drawn}"

    def _goal_that_parts(self) -> str:
        """The goal of the tables, or the next tighter one by which somebody leaves early."""
        tighter = [goal for goal in self.goals if goal.isdigit() and int(goal) <= int(GOAL)]
        for goal in sorted(tighter, key=int, reverse=True):
            every = [self.values(method, goal) for method in self.setting.petl]
            if any(p.shares[-1] < 1 for values in every for points in values.values() for p in points.values()):
                return goal
        return GOAL

    def anytime(self) -> str:
        """Accuracy where everybody leaves at the same exit."""
        setting, rows, most = self.setting, [], 0
        for method in setting.methods:
            cells = []
            for k in range(len(setting.phase("final")[0]["exits"]) + 64):
                values = self.values(method, k)
                if not values:
                    break
                found = mean(values, accuracy_of, list(values))
                cost = mean(values, cost_of, list(values))
                cells.append(f"{told(found)} ({100 * cost.value:.0f} %)" if cost else "–")
            if len(cells) > 1:
                rows.append([dyn(method), *cells])
                most = max(most, len(cells))
        if not rows:
            return ""
        head = ["", *(f"exit {k + 1}" for k in range(most))]
        text = "Accuracy on test in %, mean over the tasks that are there, and the cost in % of X."
        filled = [[*row, *["–"] * (len(head) - len(row))] for row in rows]
        return f"### Every exit for itself\n\n{text}\n\n{table(head, filled)}"

    def speed(self) -> str:
        """Measured images per second."""
        rows = []
        for machine in self.machines:
            for method in self.setting.methods:
                for goal in [goal for goal in self.goals if speeds(self.setting, method, goal, machine)]:
                    found = speeds(self.setting, method, goal, machine)
                    assert found is not None, "it was there a line above"
                    times = [
                        f"{found.promise:.2f}×",
                        f"{found.speedup:.2f}×",
                        f"{found.efficiency:.3f}",
                        f"{found.lowest:.3f}",
                    ]
                    rates = [f"{found.static:,.0f}", f"{found.routed:,.0f}"]
                    rows.append([f"{dyn(method)} {goal_name(goal)}, {machine}", str(found.tasks), *rates, *times])
        controls = [one["control"] for line in self.setting.phase("speed") for one in line["times"].values()]
        void = sum(map(is_void, controls))
        if not rows:
            return "### Measured speed\n\nNot measured: the log has no line of phase speed that counts.\n"
        head = ["", "tasks", "images/s, X", "routed", "promise", "speed-up", "of the promise", "lowest task"]
        threads = sorted({line["threads"] for line in self.setting.phase("speed")})
        text = (
            f"Routing beside the network's own backbone without exits, in turn, batch {self.setting.batch}, "
            f"{'/'.join(map(str, threads))} thread(s); adapters merged where they can be, in both. The promise is "
            "what the multiply-adds say (class first); medians of ratios, means over tasks."
        )
        if void:
            off = f"the same arm twice differed by more than {100 * VOID:g} %"
            text += f" {void} of {len(controls)} measurements left out: {off}."
        return f"### Measured speed\n\n{text}\n\n{table(head, rows)}"

    def others(self) -> str:
        """Recipes that were read on test, too, but are not the one that is shown."""
        setting, rows = self.setting, []
        for method in setting.methods:
            done = {line["key"]["recipe"] for line in setting.phase("final", method=method)}
            static = setting.values(method, "static")
            arms = {
                f"`{name}`": partial(setting.values, method, name) for name in sorted(done - {"static", setting.recipe})
            }
            if len(set(setting.preferred(method).values())) > 1:
                arms["*by task*"] = partial(setting.preferred_values, method)
            for name, values in arms.items():
                cells = [told(mean(values(reading), accuracy_of, setting.tasks)) for reading in (LAST, *self.goals)]
                apart = paired(values(GOAL), static, accuracy_of)
                rows.append([f"{NAMES[method]}, {name}", *cells, apart.text if apart else "–"])
        if not rows:
            return ""
        head = ["", *(goal_name(reading) for reading in (LAST, *self.goals)), "at 50 % minus X, points"]
        text = (
            f"Accuracy on test in %, means over the tasks; the shown recipe is `{setting.recipe}`. *By task*: of the "
            "recipes with exits that were read on test, each task has the one that did best on its validation images "
            "(the score of the search)."
        )
        return f"### Other recipes on test\n\n{text}\n\n{table(head, rows)}"

    # ---- the search

    def ablation(self) -> str:
        """What each ingredient of the recipe does."""
        setting, rows = self.setting, []
        for one in [one for one in self.ablated if one.cells]:
            for reading, name in ((GOAL, "half the cost"), (LAST, "last exit")):
                found = one.differences[reading]
                own = [found[m].text if found.get(m) else "–" for m in setting.petl]  # type: ignore[union-attr]
                over = found["all"]
                if over is not None:
                    rows.append([f"{self.exchanged[one.recipe]}: {name}", str(one.cells), *own, f"**{over.text}**"])
        if not rows:
            return ""
        kinds = setting.petl
        draw = lambda path: figures.ablation(path, self.ablated, self.exchanged, kinds)  # noqa: E731
        drawn = self.figure("ablation", "Ablation", draw)
        text = (
            f"One ingredient of `{setting.recipe}` exchanged, at the same scale: points of accuracy on val200 against "
            f"`{setting.recipe}`; at half the cost by thresholds from the other half of val200. Below zero: the "
            f"ingredient helps. {INTERVAL[0].upper()}{INTERVAL[1:]}."
        )
        head = ["", "runs", *(NAMES[method] for method in kinds), "mean"]
        return f"### Ablation\n\n{text}\n\n{table(head, rows)}{drawn}"

    def recipes(self) -> str:
        """All recipes of the search against the one that is shown."""
        setting = self.setting
        found = [compare(setting, name, setting.recipe) for name in tried(setting)]
        found = [one for one in found if one.cells]
        if not found:
            return ""
        readings = {"first": "first exit", "35": "at 35 %", "50": "at 50 %", LAST: "last exit", "score": "score"}

        def rank(one: Any) -> float:
            over = one.differences["score"].get("all")
            return over.mean if over else float("-inf")

        rows = []
        for one in sorted(found, key=rank, reverse=True):
            overall = [one.differences[reading].get("all") for reading in readings]
            rows.append([f"`{one.recipe}`", str(one.cells), *(over.text if over else "–" for over in overall)])
        text = (
            f"Points of accuracy on val200 against `{setting.recipe}`, means over tasks of the means over kinds; each "
            "takes the best of the scales that both were run with. 35 and 50 % by thresholds from the other half of "
            "val200; the score, which orders them, is the mean of last exit and half the cost. `static` has one "
            f"exit. {INTERVAL[0].upper()}{INTERVAL[1:]}."
        )
        head = ["recipe", "runs", *readings.values()]
        return f"### Recipes tried\n\n{text}\n\n{table(head, rows)}"

    def accuracies(self) -> str:
        """What every recipe does on the validation images, task by task."""
        setting, rows = self.setting, []
        for method in setting.petl:
            for name in ["static", setting.recipe, *(name for name in tried(setting) if name != "static")]:
                by_task = {
                    task: setting.phase("search", method=method, task=task, recipe=name) for task in setting.tasks
                }
                best = {task: matching(lines, scale=chosen_scale(lines)) for task, lines in by_task.items() if lines}
                for reading, told_as in ((LAST, goal_name(LAST)), (GOAL, goal_name(GOAL)), ("35", goal_name("35"))):
                    found = {
                        task: statistics.fmean(values)
                        for task, lines in best.items()
                        if (values := [v for line in lines if (v := READINGS[reading](line)) is not None])
                    }
                    if found:
                        each = [percent(found[task]) if task in found else "–" for task in setting.tasks]
                        whole = percent(statistics.fmean(found.values())) if len(found) == len(setting.tasks) else "–"
                        rows.append([f"{NAMES[method]}, `{name}`", told_as if name != "static" else "", *each, whole])
        head = ["", "", *setting.tasks, "mean"]
        return f"### Accuracy on validation\n\nIn %, seeds averaged.\n\n{table(head, rows)}" if rows else ""

    def rules(self) -> str:
        """Which rule for thresholds is best."""
        goals = ("35", "50", "drop 0")
        by_goal = {goal: rules(self.setting, goal) for goal in goals}
        names = list(dict.fromkeys(rule for found in by_goal.values() for rule in found))
        if not names:
            return ""
        rows = []
        for rule in names:
            cells = []
            for goal in goals:
                one = by_goal[goal].get(rule)
                apart = one[2].text if one and one[2] else ""
                cells += (
                    [f"{percent(one[0])} at {percent(one[1])} %", apart if rule != DEFAULT_RULE else ""]
                    if one
                    else ["–", ""]
                )
            rows.append([rule, *cells])
        best = max(by_goal[GOAL], key=lambda rule: by_goal[GOAL][rule][0], default=None)
        head = ["rule", *(part for goal in goals for part in (goal_name(goal), "difference"))]
        text = (
            f"Thresholds of `{self.setting.recipe}` set on one half of val200 and read on the other, both ways; "
            f"accuracy and cost in %, means over tasks and kinds; differences from `{DEFAULT_RULE}` in points."
        )
        text += f" Best at half the cost: **{best}**." if best else ""
        return f"### Rules for leaving\n\n{text}\n\n{table(head, rows)}"

    def scales(self) -> str:
        """The scales that final runs took."""
        setting, columns = self.setting, []
        for method in [method for method in setting.methods if method != "probe"]:
            for arm, name in (("static", NAMES[method]), (setting.recipe, dyn(method))):
                done = {task: setting.finals(method, arm, task) for task in setting.tasks}
                if any(done.values()):
                    columns.append((name, {t: f"{setting.scale(method, arm, t):g}" for t in done if done[t]}))
        if not columns:
            return ""
        rows = [[task, *(by_task.get(task, "–") for _, by_task in columns)] for task in setting.tasks]
        return "### Scales chosen on validation\n\n" + table(["", *(name for name, _ in columns)], rows)


def accuracy_of(point: Point) -> float:
    """Picks the accuracy."""
    return point.accuracy


def cost_of(point: Point) -> float:
    """Picks the cost by whole blocks."""
    return point.cost


def class_first_of(point: Point) -> float:
    """Picks the cost as routing runs it."""
    return point.class_first


def macs_of(point: Point) -> float:
    """Picks the multiply-adds."""
    return point.macs


def shares_text(values: Values, tasks: Sequence[str]) -> str:
    """Prints the mean shares of samples by exit."""
    by_task = [[point.shares for point in values[task].values()] for task in tasks if task in values]
    if len(by_task) < len(tasks) or len({len(shares) for points in by_task for shares in points}) > 1:
        return "–"
    each = [[statistics.fmean(seeds) for seeds in zip(*points, strict=True)] for points in by_task]
    return "/".join(f"{100 * statistics.fmean(parts):.0f}" for parts in zip(*each, strict=True))


def brief(value: Any) -> str:
    """Prints a setting shortly.

    >>> brief({"class_path": "dynadapter.training.schedules.Constant", "init_args": {"value": 0.2}})
    'Constant(0.2)'
    """
    if isinstance(value, dict) and "class_path" in value:
        given = value.get("init_args", {})
        parts = [brief(v) if len(given) == 1 else f"{k}={brief(v)}" for k, v in given.items() if v is not None]
        return f"{value['class_path'].rpartition('.')[2]}({', '.join(parts)})"
    if isinstance(value, list):
        return "(" + ", ".join(map(brief, value)) + ")"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def earned(apart: Difference) -> str:
    """Says whether an ingredient earns its place, by what happens without it."""
    half = apart.half or 0.0
    if apart.mean + half < 0:
        return "**it helps**"
    if apart.mean - half > 0:
        return "it does harm"
    return "no clear effect"
