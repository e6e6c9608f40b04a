"""``dynadapter backbones``: list which of timm's architectures and weights are accepted."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from dynadapter.cli.errors import Mistake, nearest
from dynadapter.cli.parser import CommandParser

if TYPE_CHECKING:  # timm takes seconds to import
    from dynadapter.backbones.coverage import Architecture


def parser() -> CommandParser:
    """Return the parser of the command."""
    made = CommandParser("backbones", "Count the architectures and pretrained weights of timm that work as a backbone.")
    words = "List the names of a family, such as Eva, or those that match a pattern, such as 'vit_small*'."
    made.add_argument("--family", type=str | None, help=words)
    return made


def run(args: list[str]) -> None:
    """Run the command."""
    given = parser().parse_args(args)
    from dynadapter.backbones.coverage import architectures

    found = architectures()
    for line in table(found) if given.family is None else listed(found, given.family):
        print(line)


def table(found: list["Architecture"]) -> list[str]:
    """Return the lines of the table: accepted architectures and weights by family, the largest first."""
    families: dict[str, list[Architecture]] = {}
    for one in found:
        if one.accepted:
            families.setdefault(one.family, []).append(one)
    rows = [(name, len(members), _weights(members)) for name, members in families.items()]
    rows.sort(key=lambda row: (-row[2], row[0]))
    lines = [f"{'family':28}{'architectures':>15}{'weights':>9}"]
    lines += [f"{name:28}{count:>15,}{weights:>9,}" for name, count, weights in rows]
    taken = [one for one in found if one.accepted]
    counts, totals = (len(taken), _weights(taken)), (len(found), _weights(found))
    lines.append(f"{'accepted':28}{counts[0]:>15,}{counts[1]:>9,}")
    lines.append(f"{'in timm':28}{totals[0]:>15,}{totals[1]:>9,}")
    shares = [f"{count / max(1, total):.0%}" for count, total in zip(counts, totals, strict=True)]
    return [*lines, f"{'share':28}{shares[0]:>15}{shares[1]:>9}"]


def listed(found: list["Architecture"], wanted: str) -> list[str]:
    """Return a line for each weight tag, and for each architecture without weights or that is not accepted."""
    few = [one for one in found if wanted.lower() == one.family.lower() or fnmatchcase(one.name, wanted)]
    if not few:
        names = {one.family for one in found if one.accepted} | {one.name for one in found}
        hint = nearest(wanted, names) or "; see dynadapter backbones"
        raise Mistake(f"no family and no architecture of timm matches {wanted!r}{hint}")
    lines = []
    for one in few:
        if one.accepted:
            lines += [f"{one.name}.{tag}" for tag in one.tags] or [f"{one.name} (no weights)"]
        else:
            lines.append(f"{one.name} (not accepted: {one.family or 'a class without a cut'})")
    return lines


def _weights(some: Iterable["Architecture"]) -> int:
    return sum(len(one.tags) for one in some)
