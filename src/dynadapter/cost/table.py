"""Tabulate the costs of the exits and the trained parameters up to each exit."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from rich.table import Table
from torch import Tensor, nn

from dynadapter.cost.costs import ExitCosts
from dynadapter.exits.net import ExitNet


def exit_parameters(net: ExitNet) -> tuple[int, ...]:
    """Count the trainable parameters in use up to each exit: those of embedding, blocks and heads on the way.

    The last exit uses all of them. A parameter that stages share counts once, at its first use.

    Args:
        net: The network.

    Returns:
        (exits,), cumulative.
    """
    stages = [[p for m in net.stage_modules(k) for p in m.parameters()] for k in range(net.num_exits)]
    in_blocks = {id(p) for stage in stages for p in stage}
    # timm registers the embedding before the blocks, and norm and classifier after them.
    embedding = list(takewhile(lambda p: id(p) not in in_blocks, net.backbone.parameters()))
    if net.beside is not None:
        embedding.append(net.beside.first)
    used: dict[int, nn.Parameter] = {}
    totals = []
    for k, stage in enumerate(stages):
        head = net.heads[k] if k < net.num_exits - 1 else net  # all other parameters belong to the last exit
        used |= {id(p): p for p in (*embedding, *stage, *head.parameters()) if p.requires_grad}
        totals.append(sum(p.numel() for p in used.values()))
    return tuple(totals)


def cost_table(costs: ExitCosts, **columns: Sequence[object]) -> Table:
    """Create a table with a row for each exit.

    The columns are exit, after block, GMACs, % of static, GMACs run (if ``costs.class_first_macs`` was counted), and
    the given ones.

    Args:
        costs: The costs.
        columns: Further columns, one value for each exit: ``accuracy=[...]``, ``share=[...]``. An underscore in a name
            becomes a space; fractions are printed with three decimals, whole numbers in groups of three digits.

    Returns:
        The table, to be printed by rich.

    Raises:
        ValueError: If a column does not have one value for each exit.
    """
    for name, values in columns.items():
        if len(values) != len(costs.exit_depths):
            raise ValueError(
                f"column {name!r} has {len(values)} values for {len(costs.exit_depths)} exits; give one for each"
            )
    caption = "GMACs: 10^9 multiply-adds of one image (1 MAC = 2 FLOPs), heads and adapters included"
    counted = "" if costs.meter == "fvcore" else "; counted by torch, without normalisation and pooling"
    table = Table(caption=caption + counted)
    cells: dict[str, Sequence[object]] = {
        "exit": range(1, len(costs.macs) + 1),
        "after block": costs.exit_depths,
        "GMACs": [f"{gmacs:.4g}" for gmacs in costs.gmacs],
        "% of static": [f"{share:.1%}" for share in costs.relative],
    }
    if costs.class_first_macs is not None:
        cells["GMACs run"] = [f"{macs / 1e9:.4g}" for macs in costs.class_first_macs]
    cells |= {name.replace("_", " "): values for name, values in columns.items()}
    for title in cells:
        table.add_column(title, justify="right")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(_cell, row))
    return table


def policy_table(title: str, costs: ExitCosts, routed: Mapping[str, tuple[float | None, Tensor]]) -> Table:
    """Create a table with a row for each exit policy.

    Args:
        title: Title of the table.
        costs: The costs of the exits.
        routed: Accuracy, None if unknown, and exit shares (exits,) by the name of the policy.
    """
    table = Table(title=title)
    for heading in ("policy", "accuracy", "GMACs", "% of static", "exit shares"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, (accuracy, shares) in routed.items():
        shown, average = "" if accuracy is None else f"{accuracy:.1%}", costs.average(shares)
        by_exit = " / ".join(percents(shares))
        table.add_row(name, shown, f"{average / 1e9:.3g}", f"{average / costs.static:.1%}", by_exit)
    return table


def percents(values: Iterable[float | Tensor]) -> list[str]:
    """Return fractions in percent with one decimal."""
    return [f"{float(value):.1%}" for value in values]


def _cell(value: object) -> str:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
