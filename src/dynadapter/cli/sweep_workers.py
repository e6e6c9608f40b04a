"""Execute the runs of a sweep in this process, in several processes, or by Ray, all with the same function."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from dynadapter.cli.errors import Failed, Mistake, Stopped, one_line
from dynadapter.cli.ray_session import ray_session
from dynadapter.cli.sweep_file import SweepFile
from dynadapter.images.memory import usable_cores
from dynadapter.sweep.plan import Unit

WAIT = 1.0
"""Seconds between looks at the results while other processes do the runs that are left."""


def work(file: SweepFile, say: Callable[[str], None]) -> dict[Unit, str]:
    """Execute every run that no other process executes, until all are finished; return those that failed, and why."""
    from dynadapter.cli.sweep_unit import remove_lost, run_unit

    failed: dict[Unit, str] = {}
    while todo := [unit for unit in file.sweep.ready(file.done()) if unit not in failed]:
        for unit in todo:
            try:
                mine = run_unit(file, unit)
            except Stopped as stopped:
                raise Stopped("stopped; give the same command again to continue", stopped.code) from stopped
            except Mistake:
                raise
            except Exception as error:
                failed[unit] = one_line(error)
                say(f"{unit.name} failed: {failed[unit]}")
                break
            if mine:
                say(summary(file.done(), unit))
                remove_lost(file)
                break  # it may have made other runs possible
        else:
            time.sleep(WAIT)
    return failed


def summary(done: Mapping[Unit, Any], unit: Unit) -> str:
    """Return one line about a finished run."""
    line = done[unit]
    if "failed" in line:
        return f"{unit.name}: {line['failed']}"
    exits = " / ".join(f"{100 * entry['accuracy']:.1f}" for entry in line["exits"])
    goal, policy = next(iter(line["policies"].items()))
    routed = f"{100 * policy['accuracy']:.1f} % at {policy['percent_of_static']:.0f} % of static ({goal})"
    return f"{unit.name}: {line['measured_on']} {exits}; by the policy {routed} ({line['seconds']['all']:.0f} s)"


def spread(path: str, processes: int) -> None:
    """Work at a sweep with several processes of this command; wait for all of them."""
    environment = {"OMP_NUM_THREADS": str(max(1, usable_cores() // processes)), **os.environ}
    command = [sys.executable, "-P", "-m", "dynadapter.cli", "sweep", path, "--no_table"]  # -P: as in predict
    started = [subprocess.Popen(command, env=environment) for _ in range(processes)]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if any(codes):
        raise Failed(f"{sum(map(bool, codes))} of {processes} processes failed; the same command runs the rest again")


def run_on_ray(file: SweepFile, cpus: float, gpus: float, say: Callable[[str], None]) -> dict[Unit, str]:
    """Run the sweep on Ray, as many runs at a time as its resources allow; return those that failed, and why.

    All machines of a cluster must see the folders of the sweep and of the data under the same paths.
    """
    failed: dict[Unit, str] = {}
    running: dict[Any, Unit] = {}
    with ray_session() as ray:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(do_unit)
        while True:
            ready = file.sweep.ready(file.done())
            for unit in ready:
                if unit not in failed and unit not in running.values():
                    running[remote.remote(file, unit)] = unit
            if not running:
                return failed
            for handle in ray.wait(list(running), num_returns=1)[0]:
                unit = running.pop(handle)
                try:
                    mine = ray.get(handle)
                except Exception as error:
                    failed[unit] = one_line(getattr(error, "cause", None) or error)
                    say(f"{unit.name} failed: {failed[unit]}")
                else:
                    if mine:
                        say(summary(file.done(), unit))
                    elif unit not in file.done():
                        time.sleep(WAIT)  # a process outside of Ray does this run


def do_unit(file: SweepFile, unit: Unit) -> bool:
    """Execute one run, as a task on a worker of Ray; return whether it was done here."""
    from dynadapter.cli import quiet
    from dynadapter.cli.imports import import_own
    from dynadapter.cli.sweep_unit import run_unit

    import_own()
    with quiet():
        return run_unit(file, unit)
