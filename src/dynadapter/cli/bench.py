"""``dynadapter bench``: the milliseconds of a bundle beside its multiply-adds, and beside other ways to serve it."""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dynadapter.cli.errors import Mistake, nearest
from dynadapter.cli.parser import CommandParser

ARMS = ("static", "smaller static", "unmerged", "merged", "onnx static", "onnx staged")
"""What can be timed; static, which all others are measured by, always is."""

DESCRIPTION = """\
Times a bundle against its static backbone and other ways to serve it, side by side, and writes a table and JSON.

static: the whole backbone, adapters merged. smaller static: as many of its blocks as routing costs on average.
unmerged,
merged: routing with the adapters beside the backbone or in it.  onnx static, onnx
staged: ONNX Runtime with one graph, or with one a stage and routing between them.
"""


@dataclass(frozen=True)
class Settings:
    """What the command line says, checked.

    Args:
        bundle: The folder.
        batch_sizes: Images a call.
        rounds: Counted rounds of every arm.
        threads: Of torch and of ONNX Runtime.
        device: Where the arms run.
        precision: Type of the network's tensors.
        images: Folder of real images, or None for noise.
        shares: Of images that are to leave at each exit, or None for the bundle's own policy.
        arms: What to time.
        weights: The backbone's file, for a bundle that needs one.
        pretrained: Whether timm may fetch the backbone's weights; None for what the training did.
        out: Where to write the numbers.
        overwrite: Whether a file there may be replaced.
    """

    bundle: str
    batch_sizes: list[int]
    rounds: int
    threads: int
    device: Literal["cpu", "cuda"]
    precision: Literal["32", "bf16"]
    images: str | None
    shares: list[float] | None
    arms: list[str]
    weights: str | None
    pretrained: bool | None
    out: str
    overwrite: bool

    @classmethod
    def read(cls, args: list[str]) -> "Settings":
        """Takes the settings from a command line.

        Raises:
            Mistake: If one of them cannot be used.
        """
        given = _parser().parse_args(args)
        settings = cls(**{name: given[name] for name in cls.__dataclass_fields__ if name != "arms"}, arms=_arms(given))
        for name in ("rounds", "threads"):
            if (value := getattr(settings, name)) < 1:
                raise Mistake(f"{name}={value} must be at least 1")
        if not settings.batch_sizes or min(settings.batch_sizes) < 1:
            raise Mistake(
                f"batch_sizes={settings.batch_sizes} must be some whole numbers of at least 1, such as [1, 8]"
            )
        if settings.shares is not None and not (
            all(share >= 0 for share in settings.shares) and abs(sum(settings.shares) - 1) <= 1e-3
        ):
            raise Mistake(f"shares={settings.shares} must be at least 0 and sum to 1, as in [0.5, 0.3, 0.15, 0.05]")
        if settings.images is not None and not Path(settings.images).expanduser().is_dir():
            raise Mistake(f"images={settings.images} is no folder; give one with images of the task")
        _check_out(settings.place, settings.overwrite)
        return settings

    @property
    def place(self) -> Path:
        """The file to write."""
        return Path(self.out).expanduser()


def _parser() -> CommandParser:
    parser = CommandParser("bench", DESCRIPTION)
    add = parser.add_argument
    add("--bundle", type=str, required=True, help="The folder that calibrate or save_bundle wrote, or hf-hub:NAME.")
    add("--batch_sizes", type=list[int], default=[1, 8], help="Images a call, such as [1,8,64].")
    add("--rounds", type=int, default=20, help="Counted rounds; every arm runs once in each.")
    add("--threads", type=int, default=1, help="Threads of torch and of ONNX Runtime.")
    add("--device", type=Literal["cpu", "cuda"], default="cpu", help="Where to run.")
    add("--precision", type=Literal["32", "bf16"], default="32", help="Type of the network's tensors.")
    add("--images", type=str | None, help="Folder of images of the task, for real exit shares; noise if not given.")
    words = "Shares that leave at the exits, as in [0.5,0.3,0.15,0.05]: thresholds on the confidence are set for them."
    add("--shares", type=list[float] | None, help=words)
    add("--arms", type=list[str], default=list(ARMS), help=f"What to time, of: {', '.join(ARMS)}.")
    add("--weights", type=str | None, help="The backbone's file of weights, for a bundle that needs one.")
    add(
        "--pretrained",
        type=bool | None,
        help="Whether timm may fetch the backbone's weights; as in training if not given.",
    )
    add("--out", type=str, default="bench.json", help="Where to write all numbers.")
    add("--overwrite", type=bool, default=False, help="Replace a file that is there.")
    return parser


def _arms(given: Any) -> list[str]:
    """Gives the arms asked for in the order of :data:`ARMS`, static included."""
    asked = {name.replace("_", " ").replace("-", " ") for name in given.arms}
    for name in sorted(asked - {*ARMS}):
        hint = nearest(name, ARMS, 0.5)
        raise Mistake(f"there is no arm {name!r}{hint + ' There' if hint else '; there'} are {', '.join(ARMS)}")
    return [name for name in ARMS if name in asked or name == "static"]


def _check_out(place: Path, overwrite: bool) -> None:
    """Refuses a place that cannot be written, before anything is measured."""
    if place.is_dir():
        raise Mistake(f"out={place} is a folder; give a file")
    if place.exists() and not overwrite:
        raise Mistake(f"out={place} exists; give another file, or --overwrite true")
    if not os.access(place.absolute().parent, os.W_OK):
        raise Mistake(f"out={place}: the folder {place.absolute().parent} is not there or cannot be written")


def run(args: list[str]) -> None:
    """Runs the command.

    Raises:
        Mistake: If a setting cannot be used.
    """
    settings = Settings.read(args)
    # Here, because torch takes seconds to load and a slip is to be answered at once.
    from dynadapter.bench.arms import measure

    result = {"settings": asdict(settings)} | measure(settings)
    try:
        _write(settings.place, result, settings.overwrite)
    finally:
        _print(result)
    print(f"all numbers are in {settings.place}")


def _write(place: Path, result: dict[str, Any], overwrite: bool) -> None:
    """Writes the whole file or none."""
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    with draft.open("x", encoding="utf-8") as file:
        file.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if place.exists() and not overwrite:
        raise Mistake(f"out={place} has been written by somebody else in the meantime; the numbers are in {draft}")
    draft.replace(place)


# ---- the table -------------------------------------------------------------------------------------------------------


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 110)  # a narrow pipe would fold the names
    for batch in result["batches"]:
        console.print(_table(batch, result))
    for note in result["notes"]:
        print(f"note: {note}")
    for batch in result["batches"]:
        if batch["void"]:
            print(
                f"warning: at batch {batch['batch']} the static arm timed twice differs from itself by the factor "
                f"{batch['control']:.3f}, outside 1 ± {result['void_beyond']:g}: this run is void; time again when the "
                "machine is quiet, or with more --rounds"
            )


def _table(batch: dict[str, Any], result: dict[str, Any]) -> Any:
    from rich.table import Table

    shares = "/".join(f"{100 * share:.0f}" for share in batch["shares"])
    table = Table(
        title=f"batch {batch['batch']}: {batch['images']} images a round, leaving {shares} %, control "
        f"{batch['control']:.3f}{' VOID' if batch['void'] else ''}",
        caption=f"milliseconds on the wall's clock; speed-ups by {result['clock_in_words']}, medians of "
        f"{result['settings']['rounds']} ratios; efficiency: speed-up / MAC speed-up, of onnx staged against "
        "onnx static where that is timed",
    )
    table.add_column("arm")
    for title in ("ms p50", "ms p95", "images/s", "GMACs", "MAC speed-up", "speed-up", "efficiency"):
        table.add_column(title, justify="right")
    for name, row in batch["arms"].items():
        label = f"{name}, {row['detail']}" if row["detail"] else name
        numbers = (f"{row['ms_p50']:.2f}", f"{row['ms_p95']:.2f}", f"{row['images_per_second']:.1f}")
        factors = (f"{row['mac_speedup']:.2f}x", f"{row['speedup']:.2f}x", f"{row['efficiency']:.3f}")
        table.add_row(label, *numbers, f"{row['gmacs']:.4g}", *factors)
    return table
