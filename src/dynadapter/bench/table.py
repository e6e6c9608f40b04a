"""The results of one batch size as a table."""

from typing import Any

from rich.table import Table


def bench_table(batch: dict[str, Any], result: dict[str, Any]) -> Table:
    """Create the table of one batch size."""
    shares = "/".join(f"{100 * share:.0f}" for share in batch["shares"])
    table = Table(
        title=f"batch {batch['batch']}: {batch['images']} images a round, exit shares {shares} %, control "
        f"{batch['control']:.3f}{' VOID' if batch['void'] else ''}",
        caption=f"ms: wall-clock milliseconds; speed-up over static in {result['clock_in_words']}, median of "
        f"{result['settings']['rounds']} ratios; % of static: of the arm static, whose adapters are merged if possible "
        "(calibrate compares with a static network merged as the bundle is); GMACs run: with the class token's row "
        "first, where routing does so; "
        "efficiency: speed-up x cost, of onnx staged over onnx static where that is timed",
    )
    table.add_column("arm")
    for title in ("ms p50", "ms p95", "images/s", "GMACs", "% of static", "GMACs run", "speed-up", "efficiency"):
        table.add_column(title, justify="right")
    for name, row in batch["arms"].items():
        table.add_row(
            f"{name}, {row['detail']}" if row["detail"] else name,
            f"{row['ms_p50']:.2f}",
            f"{row['ms_p95']:.2f}",
            f"{row['images_per_second']:.1f}",
            f"{row['gmacs']:.4g}",
            f"{row['cost']:.1%}",
            f"{row['gmacs_run']:.4g}",
            f"{row['speedup']:.2f}x",
            f"{row['efficiency']:.3f}",
        )
    return table
