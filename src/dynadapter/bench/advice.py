"""What to use, as plain lines, from what was measured."""

from collections.abc import Iterator, Mapping
from typing import Any

BACKENDS = {"merged": "torch", "unmerged": "torch", "onnx staged": "onnx", "openvino staged": "openvino"}
"""The arms that serve a bundle, and the ``--backend`` that runs them."""
CLOSE = 0.03
"""Speeds that differ by no more than this fraction are taken as equal, and the first one is named."""


def advice(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield recommendations: the backend for each batch size, the batch size, and a smaller static backbone if it wins.

    Args:
        result: As :func:`~dynadapter.bench.measure.measure` returns it. Void batch sizes give no recommendation.
    """
    if result["images"] == "noise" and result["settings"]["shares"] is None:
        yield "no recommendation: exit shares on noise are not real; give --images FOLDER, or set --shares"
        return
    on_cpu = result["settings"]["device"] == "cpu"  # where --backend runs exported graphs
    backends = {name for name, backend in BACKENDS.items() if on_cpu or backend == "torch"}
    best: dict[int, dict[str, Any]] = {}
    for batch in result["batches"]:
        arms, size = batch["arms"], batch["batch"]
        served = {name: row for name, row in arms.items() if name in backends}
        if batch["void"] or not served:
            continue
        name = _fastest(served)
        best[size] = row = served[name]
        saved = f"{row['speedup']:.2f}x the speed of the static network, {row['mac_speedup']:.2f}x by GMACs"
        yield f"batch {size}: use {_how(name)}: {saved}"
        if row["speedup"] <= 1:
            yield f"batch {size}: early exits do not pay here; use the static network, or a larger batch"
        smaller = arms.get("smaller static")
        if smaller is not None and smaller["speedup"] > row["speedup"] * (1 + CLOSE):
            yield (
                f"batch {size}: a static backbone cut to {smaller['detail'].split(',')[0]} is faster, "
                f"{smaller['speedup']:.2f}x; train one and compare its accuracy before you choose"
            )
    if len(best) > 1:
        size = _fastest({size: {"speedup": row["images_per_second"]} for size, row in sorted(best.items())})
        speeds = ", ".join(f"{row['images_per_second']:.0f} at {size}" for size, row in sorted(best.items()))
        yield f"for many images use batch {size} (images a second: {speeds}); batch 1 answers a single image soonest"


def _fastest(rows: Mapping[Any, Mapping[str, Any]]) -> Any:
    """Return the first name whose speed-up is that of the fastest, or close to it."""
    most = max(row["speedup"] for row in rows.values())
    return next(name for name, row in rows.items() if row["speedup"] * (1 + CLOSE) >= most)


def _how(name: str) -> str:
    backend = BACKENDS[name]
    kind = {"merged": " with merged adapters", "unmerged": " with the adapters as they are"}.get(name, "")
    return f"--backend {backend}{kind}"
