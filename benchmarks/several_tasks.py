"""Time several tasks on one backbone: engines that share batches against engines by themselves.

    python benchmarks/several_tasks.py

Four tasks have heads and LoRA of rank 8 of their own, and no early exits. Each has two clients, which send the next
image when the answer to the last one is there. *apart* has an engine for each task, and their stages take turns, as in
`dynadapter serve`. *together* is `Engine.together`, as with `--together true`. One thread of torch, CPU seconds of the
process, arms interleaved, medians of the ratios round by round; *apart* runs twice, and a run is void where the two
differ by more than 3 %. "images in a batch" is the mean over all stages.
"""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from common import Line, Log, Row, arguments, backbones, control, interleave, noise, show
from torch import Tensor, nn

from dynadapter import (
    BackboneSource,
    Bundle,
    Engine,
    ExitNet,
    LinearHeads,
    LoRA,
    Never,
    create_backbone,
    inject,
    lay_out_for_cpu,
)
from dynadapter.backbones import fingerprint
from dynadapter.bench.timing import ratio
from dynadapter.serve.bundle.saving import describe

TASKS = 4
CLIENTS = 2
"""Clients of a task."""
IMAGES = 4
"""Images that a client sends in a round."""
CLASSES = 10


def task(name: str, options: dict[str, Any]) -> Bundle:
    """Return a bundle; all have the same frozen weights, and random heads and adapters of their own."""
    backbone = create_backbone(name, CLASSES, **options)
    source = BackboneSource(name, fingerprint(backbone), "seed")
    inject(backbone, spec := LoRA(rank=8))
    net = ExitNet(backbone, heads := LinearHeads(), every=max(len(backbone.blocks) // 4, 1)).eval()  # type: ignore[arg-type]
    for parameter in (p for p in net.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.02)
    lay_out_for_cpu(net.requires_grad_(False))
    names = tuple(str(k) for k in range(CLASSES))
    config = describe(net, backbone=source, adapter=spec, heads=heads, policy=Never(), class_names=names)
    return Bundle(net, Never(), config)


def send(engine: Engine, images: Tensor) -> None:
    """Send images one after the other, each after the answer to the last."""
    for image in images:
        engine.submit(image).result()


def serve(engines: Iterable[Engine], images: Tensor) -> None:
    """Answer the images of all clients."""
    with ThreadPoolExecutor(TASKS * CLIENTS) as pool:
        for job in [pool.submit(send, engine, images) for engine in engines for _ in range(CLIENTS)]:
            job.result()


class Turns:
    """The lock that an engine holds while a stage runs; it counts the runs."""

    def __init__(self) -> None:
        self.lock, self.runs = threading.Lock(), 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.runs += 1

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def case(options: dict[str, Any], rounds: int) -> Line:
    """Time one backbone."""
    rest = {key: value for key, value in options.items() if key != "name"}
    bundles = {f"task {k + 1}": task(options["name"], rest) for k in range(TASKS)}
    turns, images = {"apart": Turns(), "together": Turns()}, noise(IMAGES, int(options["img_size"]))
    engines = {
        "apart": [Engine(bundle, compute=turns["apart"], name=name) for name, bundle in bundles.items()],
        "together": [*Engine.together(bundles, compute=turns["together"]).values()],
    }
    arms = {arm: partial(serve, each, images) for arm, each in engines.items()}
    try:
        seconds = interleave(arms | {"control": arms["apart"]}, rounds)
    finally:
        for engine in (engine for each in engines.values() for engine in each):
            engine.close()
    images_run = {arm: sum(sum(engine.counts.images) for engine in each) for arm, each in engines.items()}
    return {
        "control": ratio(seconds["control"], seconds["apart"]),
        "speedup": ratio(seconds["apart"], seconds["together"]),
        "batches": {arm: images_run[arm] / turns[arm].runs for arm in engines},
        "seconds": seconds,
    }


def rows(line: Line) -> list[Row]:
    """Return the table row of a line."""
    row: Row = {name: line["key"][name] for name in ("backbone", "tasks", "clients")}
    row |= {f"images in a batch, {arm}": size for arm, size in line["batches"].items()}
    return [row | {"speed-up of together": line["speedup"], "control": control(line)}]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the table."""
    args = arguments(__doc__ or "", "several_tasks.jsonl").parse_args(argv)
    args.device = "cpu"
    torch.set_num_threads(1)
    log, table = Log(args.out), []
    for name, options in backbones(args).items():
        key = {"backbone": name, "tasks": TASKS, "clients": TASKS * CLIENTS, "rounds": args.rounds}
        table += rows(log.find(key) or log.add(key, **case(options, args.rounds)))
    show(table)


if __name__ == "__main__":
    main()
