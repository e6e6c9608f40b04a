"""Estimate a sweep: the number of its runs, its time and its disk space."""

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynadapter.cli.sweep_file import SweepFile
from dynadapter.sweep.plan import FINAL, SEARCH, Line, Split, as_unit


def estimate(file: SweepFile) -> str:
    """Return the number of runs, and estimates of their time and disk space.

    Time and size come from finished runs of the sweep, or from one short training.
    """
    done = file.done()
    left = file.sweep.remaining(done)
    planned, needed = file.sweep.planned(done), file.sweep.needed(done)
    trained = {unit: line for unit, line in file.trained().items() if unit in needed}
    finished: list[Line] = [
        *(line for unit, line in done.items() if "seconds" in line and unit in planned),
        *trained.values(),
    ]
    text = [
        f"{len(file.sweep.tasks)} tasks, {len(file.sweep.settings)} pairs of adapter and recipe: "
        f"{left[SEARCH]} runs on train800 choose scales and thresholds, {left[FINAL]} final runs on train800val200",
        f"{len(finished) - len(trained)} runs are finished, {sum(left.values())} are left",
    ]
    if trained:
        text.append(f"{len(trained)} runs are trained; their logits give the policies of new goals within seconds")
        left = {split: max(0, left[split] - sum(unit.split == split for unit in trained)) for split in left}
    if not sum(left.values()):
        return "\n".join(text)
    source = f"{len(finished)} finished runs"
    if not finished:
        finished, source = [probe(file)], "a short training"
    test_images = statistics.fmean(count_images(file, task, "test") for task in file.sweep.tasks)
    seconds = sum(left[split] * seconds_of(file, split, finished, test_images) for split in left)
    size = sum(left.values()) * statistics.fmean(line["bytes"] for line in finished)
    text.append(f"about {as_duration(seconds)} in one process, measured by {source}")
    text.append(f"about {size / 1e6:,.0f} MB in {file.out}; the checkpoints of scales that were not chosen are deleted")
    return "\n".join(text)


def seconds_of(file: SweepFile, split: Split, finished: Sequence[Line], test_images: float) -> float:
    """Return the mean time of a run; for final runs, estimated from train800 runs if none is finished."""
    same = [line["seconds"]["all"] for line in finished if line["run"]["split"] == split]
    if same:
        return statistics.fmean(same)
    training = statistics.fmean(line["seconds"]["training"] * _longer(file, line) for line in finished)
    image = statistics.fmean(
        (line["seconds"]["all"] - line["seconds"]["training"]) / line["images"] for line in finished
    )
    return training + test_images * image


def _longer(file: SweepFile, line: Line) -> float:
    """Return the steps of a training on 1000 images over those on 800; the same under ``max_steps``."""
    unit, of_epoch = as_unit(line), line.get("steps_of_epoch")
    if of_epoch is None:  # a line of an earlier version
        return 1.25
    return file.steps(unit, 1.25 * of_epoch) / file.steps(unit, of_epoch)


def count_images(file: SweepFile, task: str, split: str) -> int:
    """Count the images of a task's list."""
    from dynadapter.data.lists import read_list
    from dynadapter.data.vtab import find_task

    folder = find_task(file.root, task)
    return len(read_list(folder / f"{split}.txt", folder))


def probe(file: SweepFile) -> Line:
    """Train the first run for some steps; return a line with the time that all of its steps would take."""
    from dynadapter.cli import quiet
    from dynadapter.cli.sweep_unit import measured

    unit = file.sweep.ready({})[0]
    few, more = 1, 9
    taken: dict[int, Line] = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        for number, steps in enumerate((few, few, more)):  # the first one also warms up
            short = {"trainer": {"max_epochs": -1, "max_steps": steps}}
            layers = {key: [*value, short] for key, value in file.layers.items()}
            place = Path(folder) / str(number)
            place.mkdir()
            taken[steps] = measured(dataclasses.replace(file, layers=layers), unit, place, {})
    line, seconds = taken[more], {steps: line["seconds"] for steps, line in taken.items()}
    step = max(0.0, seconds[more]["training"] - seconds[few]["training"]) / (more - few)
    training = seconds[few]["training"] + step * file.steps(unit, line["steps_of_epoch"])
    measuring = line["seconds"]["all"] - line["seconds"]["training"]
    return {**line, "seconds": {"training": training, "all": training + measuring}}


def as_duration(seconds: float) -> str:
    """Return a duration in a unit that suits it.

    >>> as_duration(5400)
    '1.5 hours'
    """
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
