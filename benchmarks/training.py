"""Time a training step of LoRA with four exits against plain LoRA on the same backbone.

    python benchmarks/training.py
    python benchmarks/training.py --device cuda

Time: one thread, CPU seconds of the process, arms interleaved step by step, medians of the ratios round by round, and a
control arm (the plain LoRA step again). A step is forward, loss, backward and AdamW on random images. Memory on a CPU:
each arm in its own process, peak resident memory during five steps after the first, less what the process held before
(Linux). On a GPU: ViT-B/16 in bfloat16 (autocast), seconds between two events, peak of the allocated memory.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from common import BACKBONES, GPU_BACKBONES, TINY, Line, Log, Row, add_device, arguments, interleave, place, show
from torch import nn

from dynadapter import Balanced, ExitNet, LoRA, inject, joint_loss
from dynadapter.backbones import freeze
from dynadapter.bench.timing import is_void, ratio

CASES: dict[str, list[tuple[str, int]]] = {
    "cpu": [("ViT-S/16, 224", 16), ("ViT-Ti, 64 tokens", 64)],
    "cuda": [("ViT-B/16, 224", 64), ("ViT-B/16, 224", 256)],
}
"""Backbones and batch sizes by device."""
ALL_BACKBONES = BACKBONES | GPU_BACKBONES | TINY
ARMS = ("LoRA", "control", "LoRA + 4 exits", "linear probe", "full fine-tuning", "peft LoRA")
CLASSES = 10


def network(arm: str, name: str, **options: Any) -> nn.Module:
    """Build the network of an arm."""
    torch.manual_seed(0)
    backbone: Any = timm.create_model(name, num_classes=CLASSES, **options)
    if arm == "full fine-tuning":
        return backbone.train()
    freeze(backbone.eval())
    if arm == "linear probe":
        return backbone
    if arm == "peft LoRA":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"]), backbone)
        backbone.head.requires_grad_(True)
        return backbone
    inject(backbone, LoRA(rank=8))
    every = max(len(backbone.blocks) // 4, 1)
    return ExitNet(backbone, Balanced(), every=every) if arm == "LoRA + 4 exits" else ExitNet(backbone, exit_depths=[])


def step(arm: str, batch: int, options: dict[str, Any], device: str = "cpu", bf16: bool = False) -> Callable[[], None]:
    """Return an arm's training step on random images."""
    net = network(arm, **options).to(device)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    size = int(options["img_size"])
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(CLASSES, (batch,), device=device)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = net(images)
        if isinstance(net, ExitNet):
            loss = joint_loss(logits.float(), targets, net.exit_weights)
        else:
            loss = nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


# ---- memory


def gpu_peak(run: Callable[[], None]) -> float:
    """Return by how many MiB the allocated memory of the GPU rises in three steps."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_peak(arm: str, backbone: str, batch: int) -> float:
    """Return by how many MiB the resident memory of a new process rises in five steps."""
    command = [sys.executable, __file__, "--peak", arm, backbone, str(batch)]
    # The allocator returns tensors to the system at once: what it keeps would hide what a step needs
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout))


def print_cpu_peak(arm: str, backbone: str, batch: str) -> None:
    """Run some steps in this process and print the rise of the peak memory in MiB."""
    torch.set_num_threads(1)
    run = step(arm, int(batch), ALL_BACKBONES[backbone])
    run()  # allocates the optimiser's state and the libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    before = resident("VmRSS")
    for _ in range(5):
        run()
    print(json.dumps(resident("VmHWM") - before))


def resident(field: str) -> float:
    """Return a memory field of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# ---- the program


def case(backbone: str, batch: int, args: argparse.Namespace) -> Line:
    """Time all arms and measure their memory; arms whose package is missing are named in ``notes``."""
    options, steps, notes = ALL_BACKBONES[backbone], {}, []
    for arm in ARMS:
        try:
            steps[arm] = step(arm, batch, options, args.device, args.precision == "bf16")
        except ImportError as error:
            notes.append(f"{arm}: {error}")
    seconds = interleave(steps, args.rounds, device=args.device)
    memory = {}
    if args.device == "cuda":
        memory = {arm: gpu_peak(run) for arm, run in steps.items()}
    elif not args.tiny:
        memory = {arm: cpu_peak(arm, backbone, batch) for arm in steps}
    return {"seconds": seconds, "memory_mib": memory, "notes": notes}


def rows(line: Line) -> list[Row]:
    """Return the table rows of a line."""
    seconds, memory = line["seconds"], line["memory_mib"]
    same = ratio(seconds["control"], seconds["LoRA"])
    first: Row = {name: line["key"][name] for name in ("backbone", "batch")}
    first["control"] = f"{same:.3f}{' VOID' if is_void(same) else ''}"
    found = []
    for arm in seconds:
        if arm not in ("LoRA", "control"):
            row = {"arm": arm, "time / LoRA": ratio(seconds[arm], seconds["LoRA"])}
            if memory:
                row |= {"memory / LoRA": memory[arm] / memory["LoRA"], "MiB": round(memory[arm])}
            found.append(row)
    return [first | found[0], *found[1:]]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the table."""
    parser = arguments(__doc__ or "", "training.jsonl")
    add_device(parser)
    parser.add_argument("--peak", nargs=3, metavar=("ARM", "BACKBONE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak:
        print_cpu_peak(*args.peak)
        return
    device, log, table = place(args), Log(args.out), []
    cases = [("tiny", args.batches[0] if args.batches else 4)] if args.tiny else CASES[args.device]
    for backbone, batch in cases:
        if args.only in backbone and batch in (args.batches or [batch]):
            key = {"backbone": backbone, "batch": batch, "rounds": args.rounds, **device}
            try:
                table += rows(log.find(key) or log.add(key, **case(backbone, batch, args)))
            except torch.OutOfMemoryError:
                print(f"{backbone}: a batch of {batch} does not fit in the memory of the device")
    show(table)


if __name__ == "__main__":
    main()
