"""Check that the runs of a sweep can stand in one table."""

from collections.abc import Mapping

from dynadapter.sweep.plan import SEARCH, Arm, Line, Split, Sweep, Unit


def check_lines(sweep: Sweep, done: Mapping[Unit, Line]) -> None:
    """Check that runs were measured on the same images, and count their cost against the network that the sweep names.

    The settings of a run do not tell: its root and ``scale_from`` are not among them.

    Raises:
        ValueError: Two runs do not fit.
    """
    first: dict[tuple[str, Split], Unit] = {}
    for unit, line in done.items():
        if "images_hash" in line:
            other = first.setdefault((unit.task, unit.split), unit)
            if done[other]["images_hash"] != line["images_hash"]:
                raise ValueError(
                    f"{unit.name} was measured on other images than {other.name}; give the root of the former runs, "
                    "or another out"
                )
        if "static_macs" in line and not _has_static(sweep, unit, line, done):
            source = sweep.scale_from.get(unit.recipe)
            raise ValueError(
                f"{unit.name} counts its cost against another static network than scale_from={source or 'null'} asks "
                f"for; give the former scale_from of {unit.recipe}, or another out"
            )


def _has_static(sweep: Sweep, unit: Unit, line: Line, done: Mapping[Unit, Line]) -> bool:
    """Check whether the cost of a run is relative to its own static network, or to that of ``scale_from``."""
    if unit.recipe not in sweep.scale_from:
        return "scale_from" not in line
    source = sweep.source(Arm(unit.task, unit.adapter, unit.recipe))
    same = (done.get(sweep.unit(source, unit.scale, seed, SEARCH), {}) for seed in sweep.search_seeds)
    return all(one.get("static_macs", line["static_macs"]) == line["static_macs"] for one in same)
