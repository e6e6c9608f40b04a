"""``dynadapter sweep``: tasks, adapters, scales, seeds and recipes from one YAML file to one table."""

from typing import Any

from dynadapter.cli.errors import Failed, Mistake
from dynadapter.cli.parser import CommandParser
from dynadapter.cli.sweep_estimate import estimate
from dynadapter.cli.sweep_file import SweepFile, read
from dynadapter.files import replacing
from dynadapter.sweep import lines
from dynadapter.sweep.plan import FINAL, Unit
from dynadapter.sweep.table import as_csv, as_markdown, draw, mean_of, rows

TABLE = ("table.md", "table.csv", "table.png")


def parser() -> CommandParser:
    """Return the parser of the command."""
    made = CommandParser(
        "sweep",
        "Train every combination that a YAML file names, choose scales and thresholds on val200, and measure the "
        "final networks on the test images once. The same command continues an interrupted sweep. Several processes "
        "may run it at the same time.",
        usage="dynadapter sweep FILE [--KEY VALUE ...]",
    )
    made.add_argument("file", type=str, help="YAML file of the sweep.")
    made.add_argument("--dry_run", action="store_true", help="Print the runs, their estimated time and disk space.")
    made.add_argument("--processes", type=int, default=1, help="Processes that share the work on this machine.")
    made.add_argument("--engine", type=str, default="local", help="local, or ray (RAY_ADDRESS names a cluster).")
    made.add_argument("--cpus", type=float, default=1.0, help="CPUs of a run under Ray.")
    made.add_argument("--gpus", type=float, default=0.0, help="GPUs of a run under Ray, such as 0.25.")
    made.add_argument("--no_table", action="store_true", help="Execute the runs, but write no table.")
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    config = parser().parse_args(args)
    if config.engine not in ("local", "ray"):
        raise Mistake(f"engine={config.engine} is unknown; choose from: local, ray")
    if config.processes < 1 or config.cpus < 0 or config.gpus < 0:
        raise Mistake("processes must be at least 1, cpus and gpus at least 0")
    if config.engine == "local" and (config.gpus or config.cpus != 1):
        raise Mistake("--cpus and --gpus belong to --engine ray; leave them out")
    if config.engine == "ray" and config.processes > 1:
        raise Mistake("--processes belongs to --engine local; on Ray, --cpus and --gpus decide how many runs share it")
    file = read(config.file)
    file.out.mkdir(parents=True, exist_ok=True)
    if config.dry_run:
        print(estimate(file))
        return
    failed = _work(file, config)
    from dynadapter.cli.sweep_unit import remove_lost

    remove_lost(file)
    if not config.no_table:
        print(write_table(file))
    if failed:
        unit, reason = next(iter(failed.items()))
        runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
        raise Failed(f"{runs} failed, {unit.name} among them: {reason}; the same command repeats what failed")


def _work(file: SweepFile, config: Any) -> dict[Unit, str]:
    """Run the sweep; return the failed runs."""
    from dynadapter.cli import quiet, sweep_workers

    with quiet():
        if config.engine == "ray":
            return sweep_workers.run_on_ray(file, config.cpus, config.gpus, _say)
        if config.processes > 1:
            sweep_workers.spread(str(file.path), config.processes)
            return {}
        return sweep_workers.work(file, _say)


def _say(line: str) -> None:
    print(line, flush=True)


# ---- the table


def write_table(file: SweepFile) -> str:
    """Write the table as Markdown, CSV and a figure beside the results; return the Markdown text."""
    done = file.done()
    table = rows(file.sweep, done)
    if not table:
        return "no run that the table shows is finished: there is not a table yet"
    text = as_markdown(table, file.sweep)
    diverged = [f"{arm.task}, {arm.adapter}, {arm.recipe}" for arm in file.sweep.diverged(done)]
    if diverged:
        text += f"\nA training failed at every scale: {'; '.join(diverged)}.\n"
    images = "test" if file.sweep.split == FINAL else "val200"
    figure = draw(table, file.path.stem, mean_of(file.sweep.tasks), images)
    with lines.claim(file.out, wait=True):  # several processes may end together
        for name, data in zip(TABLE, (text.encode(), as_csv(table).encode()), strict=False):
            with replacing(file.out / name) as opened:
                opened.write(data)
        with replacing(file.out / TABLE[2]) as opened:
            figure.savefig(opened, dpi=150, format="png")
    return f"{text}\n{', '.join(TABLE)} and {lines.RESULTS} are in {file.out}"
