"""The margins of the claims, written on 2026-11-27, before any run that they judge."""

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
