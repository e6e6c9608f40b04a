"""``dynadapter bench``: time a bundle against its static network and other ways to serve it."""

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynadapter.bench.settings import ARMS, Settings
from dynadapter.cli.errors import Mistake, mistakes, nearest
from dynadapter.cli.networks import check_network
from dynadapter.cli.parser import CommandParser
from dynadapter.files import write

DESCRIPTION = """\
Time a bundle against its static network and other ways to serve it, side by side; write a table and JSON.

static: the whole backbone, adapters merged.  smaller static: the number of its blocks that costs what routing costs on
average.  static token merging: the whole backbone, which merges tokens as routing does.  unmerged, merged: routing with
the adapters beside the backbone, or merged into it.  onnx static, onnx staged: ONNX Runtime with one graph, or with one
graph per stage and routing between them.  openvino staged: the same graphs in OpenVINO.
"""


def run(args: list[str]) -> None:
    """Run the command."""
    settings = read(args)
    # Imported here, because torch takes seconds to load and invalid settings are reported at once.
    from dynadapter.bench.measure import measure

    result = {"settings": asdict(settings)} | measure(settings)
    try:
        _write(settings.place, result, settings.overwrite)
    finally:
        _print(result)
    print(f"all numbers are in {settings.place}")


def parser() -> CommandParser:
    """Return the parser of the command."""
    made = CommandParser("bench", DESCRIPTION)
    made.add_class_arguments(Settings, as_group=False, instantiate=False)
    return made


def read(args: list[str]) -> Settings:
    """Return the settings of a command line."""
    given = vars(parser().parse_args(args))
    with mistakes():
        settings = Settings(**given | {"arms": _arms(given["arms"])})
    check_network(settings.bundle)
    _check_out(settings.place, settings.overwrite)
    return settings


def _arms(given: list[str]) -> list[str]:
    """Return the named arms in the order of :data:`ARMS`, static included."""
    named = {name.replace("_", " ").replace("-", " ") for name in given}
    for name in sorted(named - {*ARMS}):
        hint = nearest(name, ARMS, 0.5)
        raise Mistake(f"there is no arm {name!r}{hint + ' There' if hint else '; there'} are {', '.join(ARMS)}")
    return [name for name in ARMS if name in named or name == "static"]


def _check_out(place: Path, overwrite: bool) -> None:
    """Raise a :class:`Mistake` if the file cannot be written, before anything is measured."""
    if place.is_dir():
        raise Mistake(f"out={place} is a folder; give a file")
    if place.exists() and not overwrite:
        raise Mistake(f"out={place} exists; give another file, or --overwrite true")
    if not os.access(place.absolute().parent, os.W_OK):
        raise Mistake(f"out={place}: the folder {place.absolute().parent} is not there or cannot be written")


def _write(place: Path, result: dict[str, Any], overwrite: bool) -> None:
    """Write the file atomically."""
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    write(draft, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    if place.exists() and not overwrite:
        raise Mistake(f"out={place} was written by another process in the meantime; the numbers are in {draft}")
    draft.replace(place)


def _print(result: dict[str, Any]) -> None:
    from dynadapter.bench.advice import advice
    from dynadapter.bench.table import bench_table
    from dynadapter.printing import print_tables

    print_tables(*(bench_table(batch, result) for batch in result["batches"]), width=120)
    for note in result["notes"]:
        print(f"note: {note}")
    for batch in result["batches"]:
        if batch["void"]:
            print(
                f"warning: at batch {batch['batch']} the static arm timed twice differs from itself by the factor "
                f"{batch['control']:.3f}, outside 1 ± {result['void_beyond']:g}: this run is void; time again on a "
                "quiet machine, or with more --rounds"
            )
    for line in advice(result):
        print(line)
