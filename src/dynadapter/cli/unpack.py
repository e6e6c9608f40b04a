"""``dynadapter unpack``: extracts an archive of images so that nothing of it lands elsewhere."""

import re
from pathlib import Path
from typing import Any

from dynadapter.cli.errors import Mistake
from dynadapter.cli.parser import CommandParser

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parser() -> CommandParser:
    """Makes the command's parser."""
    parser = CommandParser(
        "unpack",
        "Extracts a .zip or .tar archive, plain or compressed, into a new folder, which appears when all is in it. "
        "Members that would land elsewhere, links, and archives that unpack to absurdly much are refused.",
        usage="dynadapter unpack ARCHIVE --out FOLDER [--KEY VALUE ...]",
    )
    parser.add_argument("--archive", type=str, required=True, help="The archive; may stand without its key.")
    parser.add_argument("--out", type=str, required=True, help="The folder to make.")
    parser.add_argument("--max_bytes", type=str, default="200GB", help="Refuse more than this, such as 20GB.")
    parser.add_argument("--max_files", type=int, default=5_000_000, help="Refuse more files and folders than this.")
    words = "Refuse so many times the archive's own size; 64 MiB are always taken."
    parser.add_argument("--max_ratio", type=float, default=200.0, help=words)
    return parser


def run(args: list[str]) -> None:
    """Runs the command."""
    given = parser().parse_args(with_key(args, "archive"))
    limits = {"max_bytes": size(given.max_bytes), "max_files": given.max_files, "max_ratio": given.max_ratio}
    for name, limit in limits.items():
        if not limit > 0:  # nor is NaN
            raise Mistake(f"{name}={limit} must be above 0")
    unpack(given.archive, given.out, limits)


def with_key(args: list[str], key: str) -> list[str]:
    """Puts its key before an argument that stands alone.

    >>> with_key(["a.zip", "--out", "b"], "archive")
    ['--archive=a.zip', '--out', 'b']
    """
    keyed = []
    value_follows = False
    for arg in args:
        keyed.append(arg if value_follows or arg.startswith("-") else f"--{key}={arg}")
        value_follows = arg.startswith("--") and "=" not in arg and arg != "--help" and not value_follows
    return keyed


def size(text: str) -> int:
    """Reads a number of bytes.

    >>> size("1.5 GB")
    1500000000

    Raises:
        Mistake: If it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise Mistake(f"max_bytes: expected bytes such as 20GB or 500MB, not {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def unpack(archive: str, out: str, limits: dict[str, Any]) -> None:
    """Extracts the archive with a progress bar, and says what came out.

    Raises:
        Mistake: If the archive or the folder cannot be taken.
    """
    place = Path(archive).expanduser()
    if not place.exists():
        raise Mistake(f"there is no archive {archive!r}; give the file, as in dynadapter unpack data.zip --out FOLDER")
    if place.is_dir():
        raise Mistake(f"{archive} is a folder, there is nothing to unpack")
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from dynadapter.cli.verify import error_console
    from dynadapter.data.archives import extract
    from dynadapter.data.images import shown

    columns = (TextColumn("unpacking"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console(), transient=True) as bar:
        task = bar.add_task("", total=None)
        done = extract(place, out, **limits, progress=lambda read, whole: bar.update(task, completed=read, total=whole))
    print(f"{done.files:,} files, {done.bytes / 1e6:,.1f} MB, in {shown(done.folder)}")
    if hint := _next(done.folder):
        print(f"check them: {hint}")


def _next(folder: Path) -> str | None:
    """Says how to check what came out, where it looks like data for this package."""
    import shlex

    from dynadapter.data.vtab import LISTS

    for place in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())):
        root = shlex.quote(str(place))
        if any(file.name in LISTS for file in place.glob("*/*.txt")):
            return f"dynadapter verify --data VTAB1k --data.root {root}"
        if (place / "train").is_dir():
            return f"dynadapter verify --data ImageFolder --data.root {root}"
    return None
