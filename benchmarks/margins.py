"""The margins of the claims, and which runs decide them, written down before any run that they judge.

The margins are of 2026-11-27. Afterwards the tests of the first four tasks were read, and a rule of choice was added: a
sweep drops a scale of which any training failed or learned nothing. A verdict under that rule needs tasks whose tests
nobody has read. These are the second four, with the protocol below, written on 2026-11-27 before any run on them.
Photographs were added on 2026-11-28, before any network was trained on ``unseen10``, and so were the third four, before
any run on them. The scales of a ViT-S/14 were written on 2026-11-29, before any run on photographs with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# ---- the protocol

FIRST = ("pointer_direction", "scene_distance", "textures", "digits")
SECOND = ("leaves", "cell_division", "chart_trend", "stacked_sheets")
THIRD = ("butterflies", "land_use", "disc_and_frame", "largest_disc")
PHOTOGRAPHS = ("unseen10",)
SETS = {"first": FIRST, "second": SECOND, "third": THIRD, "photographs": PHOTOGRAPHS}
"""The sets of fresh tasks that ``transfer.py --fresh`` knows by name."""

OWN_SWEEPS = ("second", "third", "photographs")
"""The sets that are read in a sweep of their own; the first one is part of the sweep of ``transfer.yaml``."""

SCALES = (10.0, 30.0, 100.0)
"""The scales that static and dynamic choose from, each on val200."""

SCALES_OF = {"vit_small_14": (1.0, 3.0, 10.0)}
"""Scales by the name of a backbone, where they are others."""

SEEDS = {"lora": (0, 1, 2), "adapter": (0, 1), "repadapter": (0, 1)}
"""Seeds of the final runs by adapter; LoRA comes first and decides every claim except *seed* of the others."""

THIRD_SEEDS = dict.fromkeys(SEEDS, (0, 1, 2))
"""Seeds of the third set: from two seeds of Adapter the spread over seeds was known badly."""

EPOCHS = 24


@dataclass(frozen=True)
class Reading:
    """A reading of the tests of a set of fresh tasks.

    Args:
        title: Names the tasks and the rule of choice.
        prefix: The files ``PREFIX_NAME.*`` in the folder of results hold its sweeps, one a backbone.
        tasks: The tasks that decide.
        verdict: Whether its lines are verdicts; where the rule is younger than the reading they are not.
        judges: ``all`` claims; ``seed`` with each adapter alone; or ``ordinary`` backbones alone, where ``micro`` was
            pre-trained on the images.
        seeds: Seeds of the final runs by adapter.
    """

    title: str
    prefix: str
    tasks: tuple[str, ...]
    verdict: bool = True
    judges: str = "all"
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SEEDS)


VERDICT = Reading("Second four under the rule: the verdict", "second", SECOND)
READINGS = (
    VERDICT,
    Reading("Third four: each adapter with three seeds", "third", THIRD, judges="seed", seeds=THIRD_SEEDS),
    Reading("Photographs on an ordinary backbone", "photographs", PHOTOGRAPHS, judges="ordinary"),
    Reading("First four under the rule added later: no verdict", "transfer", FIRST, verdict=False),
    Reading("First four as planned, before the rule", "planned", FIRST),
)

# ---- the margins

NON_INFERIOR = -0.5
"""Non-inferior: the lower end of the interval, in points of the mean over tasks, is above this."""

BETTER = 0.0
"""Better: the lower end of the interval is above this."""

SEED_COST = 50.0
"""*seed* and *ordinary*: greatest mean cost over the tasks in % of static, by exits alone."""

TOKEN_COST = 25.0
"""*beyond*: greatest mean cost over the tasks in % of static, by exits and token merging."""

ROUTING_GAIN = 1.0
"""*routing*: points above the best random mixture at equal cost, at least."""

ROUTING_COSTS = (0.35, 0.5)
"""*routing*: cost goals, as fractions of static, that are averaged; both ends count."""

TIME_OF_ONE = 1.25
"""*elastic*: training time over that of X, at most."""

TIME_OF_ALL = 0.5
"""*elastic*: training time over that of X trained at every depth, at most."""

VALIDATION_SLACK = 1.0
"""A goal is chosen if it costs so many points less than the bound on val200; the cost on the test images decides."""

AIMS = {"exits": (33.0, 45.0), "tokens": (20.0, 30.0)}
"""The aim behind the claims: X's accuracy, and one point more, at most at these costs in % of static."""

AIM_GAIN = 1.0

KNOW_EXITS = ("micro", "tiny")
"""Backbones whose pre-training had exits in its loss; every other one is ordinary."""
