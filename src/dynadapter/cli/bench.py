"""``dynadapter bench``: time a bundle against its static network and other ways to serve it."""

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from dynadapter.bench.settings import ARMS, Settings
from dynadapter.cli.errors import Mistake, nearest
from dynadapter.cli.networks import BUNDLE, check_network
from dynadapter.cli.parser import CommandParser
from dynadapter.files import write

DESCRIPTION = """\
Time a bundle against its static network and other ways to serve it, side by side; write a table and JSON.

static: the whole backbone, adapters merged.  smaller static: the number of its blocks that costs what routing costs on
average.  static token merging: the whole backbone, which merges tokens as routing does.  unmerged, merged: routing with
the adapters beside the backbone, or merged into it.  onnx static, onnx staged: ONNX Runtime with one graph, or with one
graph per stage and routing between them.  openvino staged: the same graphs in OpenVINO.
"""
ARGUMENTS: dict[str, tuple[Any, Any, str]] = {
    "batch_sizes": (list[int], [1, 8], "Images per call, such as [1,8,64]."),
    "rounds": (int, 20, "Counted rounds; every arm runs once in each."),
    "threads": (int, 1, "Threads of torch and of ONNX Runtime."),
    "device": (Literal["cpu", "cuda"], "cpu", "Where to run."),
    "precision": (Literal["32", "bf16"], "32", "Type of the network's tensors."),
    "images": (str | None, None, "Folder of images of the task, for real exit shares; noise if not given."),
    "shares": (
        list[float] | None,
        None,
        "Exit shares, as in [0.5,0.3,0.15,0.05]; thresholds on the confidence are set for them.",
    ),
    "arms": (list[str], list(ARMS), f"What to time, of: {', '.join(ARMS)}."),
    "weights": (str | None, None, "File of the backbone's weights, for a bundle that needs one."),
    "pretrained": (bool | None, None, "Whether timm may fetch the backbone's weights; by default as in training."),
    "out": (str, "bench.json", "File for all results."),
    "overwrite": (bool, False, "Replace an existing file."),
}
"""The settings beside the bundle: type, default, help."""


def run(args: list[str]) -> None:
    """Run the command.

    Raises:
        Mistake: If a setting is invalid.
    """
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
    made.add_argument("--bundle", type=str, required=True, help=f"The network: {BUNDLE}.")
    for name, (kind, default, words) in ARGUMENTS.items():
        made.add_argument(f"--{name}", type=kind, default=default, help=words)
    return made


def read(args: list[str]) -> Settings:
    """Return the settings of a command line.

    Raises:
        Mistake: If one of them is invalid.
    """
    given = {name: value for name, value in vars(parser().parse_args(args)).items() if name in ("bundle", *ARGUMENTS)}
    try:
        settings = Settings(**given | {"arms": _arms(given["arms"])})
    except ValueError as error:
        raise Mistake(str(error)) from error
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
