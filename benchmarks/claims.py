"""The five claims, judged from the lines of transfer.py: estimate, interval, margin and verdict of each.

    python benchmarks/report.py --claims

The claims are printed for each reading of fresh tasks: the second four tasks under the rule of choice, which is the
verdict; the third four, for *seed* alone; photographs, for *ordinary* alone; the first four under that rule, which was
added after their tests were read, so this is none; and the first four as planned. ``margins.py`` holds the readings,
their protocol and every margin.

Differences are in points of the mean over tasks. The tasks are fixed; a paired bootstrap over test images and seeds
gives the interval (``paired.py``). The tasks of the reading decide, and others of its sweep stand beside them.
Settings come from val200: of the goals of the sweep, the claim takes the one with the best mean accuracy there within
its cost. A claim is open until every run of the protocol is finished. It is missed where the trainings of Dyn-X failed
at every scale, or where exit 1 alone costs more than is allowed. Each failed training is printed. A time is the median
epoch of a run, in CPU seconds on a CPU; a ratio of times is one of medians over runs on one machine, which were not
interleaved.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import margins
import numpy as np
from outcomes import Failed, Line, Missing, Outcomes, by_policy
from paired import Difference, compare

from dynadapter.sweep.baselines import mixture
from dynadapter.sweep.lines import right_of

X, X_MERGED, CUT = "static", "static, tokens merged", "static, cut"
DYN, DYN_MERGED = "dynamic", "dynamic, tokens merged"
MAIN = "micro"
FIRST = "lora"
"""The adapter that has every arm."""

Reading = Callable[[Line], np.ndarray]
"""Whether a run is right on each image (images,), or with which probability."""


@dataclass(frozen=True)
class Claim:
    """One line of the answer.

    Args:
        name: Of the claim.
        estimate: In points, or a ratio.
        low: Lower end of the interval, None where there is none.
        high: Upper end.
        margin: What has to hold, in words.
        verdict: ``held``, ``missed`` or ``open``; ``shown`` where the reading is no verdict.
        note: What stands beside it, or why it is open.
    """

    name: str
    estimate: float | None
    low: float | None
    high: float | None
    margin: str
    verdict: str
    note: str

    def __str__(self) -> str:
        estimate = "-" if self.estimate is None else f"{self.estimate:+.2f}"
        interval = "-" if self.low is None else f"[{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.name:<34} {estimate:>6}  {interval:<16} {self.margin:<52} {self.verdict:<6}  {self.note}"


def claims(found: Mapping[str, Outcomes], reading: margins.Reading) -> Iterator[Claim]:
    """Yield the five claims, one or more lines each.

    Args:
        found: The sweep of each backbone, from ``Outcomes.read_all``.
        reading: The one that they belong to.
    """
    main = found.get(MAIN) or Outcomes.nothing(MAIN)
    if reading.judges != "ordinary":
        for adapter in margins.SEEDS:
            yield _stated(seed(main, f"seed, {adapter}", adapter), main, reading, adapter)
    if reading.judges == "all":
        for claim in (
            elastic(main),
            time_of(main, "elastic, time over X", [], margins.TIME_OF_ONE),
            time_of(main, "elastic, time over all depths", [CUT], margins.TIME_OF_ALL),
            routing(main),
            policy_against(main, "beyond, X", FIRST, DYN_MERGED, X, margins.TOKEN_COST, None),
            beyond_merged(main),
        ):
            yield _stated(claim, main, reading)
    for one in ordinary(found) if reading.judges != "seed" else ():
        yield _stated(seed(one, f"ordinary, {one.name}", FIRST), one, reading)


def aims(found: Mapping[str, Outcomes], reading: margins.Reading) -> Iterator[Claim]:
    """Yield the aim behind the claims; arguments as of :func:`claims`."""
    main = found.get(MAIN) or Outcomes.nothing(MAIN)
    for name, recipe in () if reading.judges != "all" else (("exits", DYN), ("tokens", DYN_MERGED)):
        same, more = margins.AIMS[name]
        for bound, gain in ((same, 0.0), (more, margins.AIM_GAIN)):
            words = f"X{f' {gain:+g}' if gain else ''} at {bound:g} %, {name}"
            yield _stated(policy_against(main, words, FIRST, recipe, X, bound, gain), main, reading)
    for one in ordinary(found) if reading.judges != "seed" else ():
        yield _stated(no_natural_below(one), one, reading)


def ordinary(found: Mapping[str, Outcomes]) -> list[Outcomes]:
    """Return the sweeps of the backbones whose pre-training knew no exits, or an empty one."""
    return [one for name, one in found.items() if name not in margins.KNOW_EXITS] or [
        Outcomes.nothing("no such backbone")
    ]


def failures(found: Mapping[str, Outcomes]) -> Iterator[str]:
    """Yield the trainings that failed, a line each; their scales were dropped."""
    for name, one in found.items():
        for line in one.failures:
            run = line["run"]
            words = ", ".join(run[key] for key in ("task", "adapter", "recipe"))
            where = f"scale {run['scale']:g}, seed {run['seed']}, {run['split']}"
            yield f"scale dropped: {name}: {words}, {where}: {line['failed']}"


def _stated(claim: Claim, of: Outcomes, reading: margins.Reading, adapter: str = FIRST) -> Claim:
    """Return a claim as its reading allows: open off the protocol, and no verdict where the rule is younger."""
    if claim.verdict == "open":
        return claim
    if departures := of.departures(adapter, reading.seeds):
        return replace(claim, verdict="open", note=f"{departures}; otherwise {claim.verdict}; {claim.note}")
    return claim if reading.verdict else replace(claim, verdict="shown")


# ---- the claims


def seed(of: Outcomes, name: str, adapter: str) -> Claim:
    """Judge Dyn-X by exits alone against X."""
    return policy_against(of, name, adapter, DYN, X, margins.SEED_COST, 0.0, strict=True)


def beyond_merged(of: Outcomes) -> Claim:
    """Judge exits and token merging against token-merged X, at its cost."""
    name = "beyond, token-merged X"
    try:
        arm = of.all_of(FIRST, X_MERGED)
    except Missing as error:
        return _unfinished(name, f"lower end > {margins.BETTER:g} at its cost", error)
    bound = statistics.fmean(line["exits"][-1]["percent_of_static"] for task in arm for line in task)
    return policy_against(of, name, FIRST, DYN_MERGED, X_MERGED, bound, None, least=margins.BETTER, slack=0.0)


def policy_against(
    of: Outcomes,
    name: str,
    adapter: str,
    recipe: str,
    other: str,
    bound: float,
    gain: float | None,
    *,
    strict: bool = False,
    least: float = margins.NON_INFERIOR,
    slack: float = margins.VALIDATION_SLACK,
) -> Claim:
    """Judge a recipe by the best policy within a cost against the last exit of another recipe.

    Args:
        of: The lines of a backbone.
        name: Of the claim.
        adapter: The adapter of both.
        recipe: The recipe with policies.
        other: The recipe without.
        bound: Greatest mean cost over the tasks in % of static.
        gain: The estimate must reach this, too; None for no such condition.
        strict: The estimate must be above the gain.
        least: The lower end of the interval must be above this; 0 where a gain is asked for.
        slack: The goal must cost so much less on val200.
    """
    least = margins.BETTER if gain else least
    sign = ">" if strict else ">="
    margin = f"lower end > {least:g}{'' if gain is None else f', estimate {sign} {gain:g}'}, cost <= {bound:.1f} %"
    try:
        if (least_cost := of.least_cost(adapter, recipe)) > bound:
            return Claim(name, None, None, None, margin, "missed", f"exit 1 alone costs {least_cost:.1f} %")
        goal = of.best_goal(adapter, recipe, bound - slack)
        found, beside = _both(of, adapter, (recipe, routed(goal)), (other, last))
        cost = of.cost(adapter, recipe, goal)
    except Missing as error:
        return _unfinished(name, margin, error)
    enough = gain is None or (found.estimate > gain if strict else found.estimate >= gain)
    note = f"{cost:.1f} % by {goal}; {_spread(found)}{beside}"
    return _judged(name, found, margin, found.low > least and enough and cost <= bound, note)


def elastic(of: Outcomes) -> Claim:
    """Judge every exit of Dyn-X against X cut there and trained alone; the worst exit stands in the line."""
    margin = f"lower end > {margins.NON_INFERIOR:g} at every exit"
    worst: tuple[Difference, str] | None = None
    try:
        recipes = {**of.depths(FIRST, CUT), **of.depths(FIRST, X)}
        exits = of.exit_depths(FIRST, DYN)
        if absent := [depth for depth in exits if depth not in recipes]:
            raise Missing(f"X cut at block {absent[0]} is not finished")
        for k, depth in enumerate(exits):
            way = of.best_way(FIRST, DYN, k)
            found, beside = _both(of, FIRST, (DYN, at_exit(way, k)), (recipes[depth], last))
            if worst is None or found.low < worst[0].low:
                worst = found, f"exit {k + 1}, the worst of {len(exits)}; {_spread(found)}{beside}"
    except Missing as error:
        return _unfinished("elastic, accuracy", margin, error)
    assert worst is not None
    return _judged("elastic, accuracy", worst[0], margin, worst[0].low > margins.NON_INFERIOR, worst[1])


def time_of(of: Outcomes, name: str, cut: Sequence[str], most: float) -> Claim:
    """Judge the training time of Dyn-X over that of X, and of X at the other depths."""
    margin = f"median over tasks <= {most:g}"
    try:
        of.all_of(FIRST, DYN)
        recipes = [X, *(recipe for one in cut for recipe in of.depths(FIRST, one).values())]
        if cut and len(recipes) < len(of.exit_depths(FIRST, DYN)):
            raise Missing("X is not trained at every depth")
        ratios = [of.epoch(FIRST, [DYN], recipes, task) for task in of.deciding]
    except Missing as error:
        return _unfinished(name, margin, error)
    found = statistics.median(ratios)
    note = f"{len(ratios)} tasks, {min(ratios):.2f} to {max(ratios):.2f}; medians of epochs on one machine"
    return Claim(name, found, None, None, margin, "held" if found <= most else "missed", note)


def routing(of: Outcomes) -> Claim:
    """Judge the policies between two costs against the best random mixture of exits at the cost of each."""
    low, high = margins.ROUTING_COSTS
    margin = f"lower end > {margins.BETTER:g}, estimate >= {margins.ROUTING_GAIN:g}"
    try:
        goals = of.cost_goals(FIRST, DYN, low, high)

        def gain(line: Line) -> np.ndarray:
            gains = []
            for goal in goals:
                mixed = mixture(line, by_policy(line, goal)["percent_of_static"])
                gains.append(routed(goal)(line) - np.tensordot(mixed, right_of(line)[0], 2))
            return np.mean(gains, axis=0)

        found, beside = _both(of, FIRST, (DYN, gain), (DYN, lambda line: np.zeros(line["images"])))
    except Missing as error:
        return _unfinished("routing", margin, error)
    held = found.low > margins.BETTER and found.estimate >= margins.ROUTING_GAIN
    return _judged("routing", found, margin, held, f"mean of {', '.join(goals)}; {_spread(found)}{beside}")


def no_natural_below(of: Outcomes) -> Claim:
    """Judge the natural task that loses most against X."""
    name, margin = f"no natural task below X, {of.name}", f"estimate >= 0 on each, cost <= {margins.SEED_COST:g} %"
    try:
        natural = of.only(of.group("Natural"))
        goal = of.best_goal(FIRST, DYN, margins.SEED_COST - margins.VALIDATION_SLACK)
        found = {task: compare(_gaps(natural, [task], FIRST, (DYN, routed(goal)), (X, last))) for task in natural.tasks}
        cost = replace(natural, deciding=natural.tasks).cost(FIRST, DYN, goal)
    except Missing as error:
        return _unfinished(name, margin, error)
    task = min(found, key=lambda one: found[one].estimate)
    held = found[task].estimate >= 0 and cost <= margins.SEED_COST
    return _judged(name, found[task], margin, held, f"{task}, the worst of {len(found)}; {cost:.1f} % by {goal}")


# ---- readings


def last(line: Line) -> np.ndarray:
    """Return whether the last exit is right by its own logits."""
    return right_of(line)[0][0, -1]


def routed(goal: str) -> Reading:
    """Return the reading by the policy of a goal; it raises Missing where the goal could not be reached."""

    def read(line: Line) -> np.ndarray:
        by_policy(line, goal)
        return right_of(line)[1][goal]

    return read


def at_exit(way: int, exit: int) -> Reading:
    """Return the reading of an exit, by a way of combining the exits passed."""
    return lambda line: right_of(line)[0][way, exit]


def _gaps(
    of: Outcomes, tasks: Sequence[str], adapter: str, one: tuple[str, Reading], other: tuple[str, Reading]
) -> list[np.ndarray]:
    """Return for each task the difference of two recipes (seeds, images), over the seeds that both have."""
    seeds = [seed for seed in of.seeds(adapter, one[0]) if seed in of.seeds(adapter, other[0])]
    if not seeds:
        raise Missing(f"{adapter}: {one[0]} and {other[0]} have no seed in common")
    gaps = []
    for task in tasks:
        several = []
        for seed in seeds:
            ours, theirs = (of.final(adapter, recipe, task, seed) for recipe, _ in (one, other))
            if ours["images_hash"] != theirs["images_hash"]:
                raise ValueError(f"{task}: {one[0]} and {other[0]} were tested on other images; run one of them again")
            several.append(one[1](ours).astype(float) - other[1](theirs))
        gaps.append(np.stack(several))
    return gaps


def _both(of: Outcomes, adapter: str, one: tuple[str, Reading], other: tuple[str, Reading]) -> tuple[Difference, str]:
    """Compare two recipes on the tasks that decide; return the difference on the others as words."""
    found = compare(_gaps(of, of.deciding, adapter, one, other))
    beside = [task for task in of.tasks if task not in of.deciding]
    if not beside:
        return found, ""
    try:
        others = compare(_gaps(of, beside, adapter, one, other))
    except Missing as error:
        return found, f"; {error}"
    return found, f"; other {len(beside)} tasks {others.estimate:+.2f} [{others.low:+.2f}, {others.high:+.2f}]"


def _spread(found: Difference) -> str:
    seeds = f"{found.seeds} seed{'s' * (found.seeds > 1)}"
    return f"{len(found.tasks)} tasks, {min(found.tasks):+.1f} to {max(found.tasks):+.1f}; {seeds}"


def _unfinished(name: str, margin: str, error: Missing) -> Claim:
    """Return a claim without an estimate; it is missed where Dyn-X could not be trained at any scale."""
    missed = isinstance(error, Failed) and error.recipe in (DYN, DYN_MERGED)
    return Claim(name, None, None, None, margin, "missed" if missed else "open", str(error))


def _judged(name: str, found: Difference, margin: str, held: bool, note: str) -> Claim:
    return Claim(name, found.estimate, found.low, found.high, margin, "held" if held else "missed", note)
