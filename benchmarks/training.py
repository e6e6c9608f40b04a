"""What four exits cost in training: a step of LoRA with exits against plain LoRA on the same backbone, and its rivals.

    python benchmarks/training.py

Time: one thread, CPU seconds of the process, arms interleaved step by step, medians of the ratios round by round, and
a control arm (the plain LoRA step once more). Memory: each arm in a process of its own, peak resident memory during
five steps after the first, less what the process held between steps (Linux).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import Log, arguments, interleave, ratio
from rich.console import Console
from rich.table import Table
from torch import nn

from dynadapter import ExitNet, LoRA, inject, joint_loss
from dynadapter.backbones import freeze

CASES = {
    "ViT-S/16, 224, batch 16": dict(name="vit_small_patch16_224", img_size=224, batch=16),
    "ViT-Ti, 64 tokens, batch 64": dict(name="vit_tiny_patch16_224", img_size=48, patch_size=6, batch=64),
}
ARMS = ("LoRA", "control", "LoRA + 4 exits", "linear probe", "full fine-tuning", "peft LoRA")
CLASSES = 10


def step(arm: str, name: str, batch: int, **options: object) -> Callable[[], None]:
    """Makes an arm's training step on random images: forward, loss, backward, AdamW."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES, **options)
    net: nn.Module = backbone
    if arm == "full fine-tuning":
        backbone.train()
    else:
        backbone.eval()
        freeze(backbone)
        if arm == "peft LoRA":
            from peft import LoraConfig, inject_adapter_in_model

            config = LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"])
            inject_adapter_in_model(config, backbone)
            for parameter in backbone.head.parameters():
                parameter.requires_grad_(True)
        elif arm != "linear probe":
            inject(backbone, LoRA(rank=8))
        if arm == "LoRA + 4 exits":
            net = ExitNet(backbone, every=3)
        elif arm in ("LoRA", "control"):
            net = ExitNet(backbone, exit_depths=[])
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    size = int(options["img_size"])  # type: ignore[call-overload]
    images, targets = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))

    def run() -> None:
        logits = net(images)
        if isinstance(net, ExitNet):
            loss = joint_loss(logits, targets, net.exit_weights)
        else:
            loss = nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def peak(arm: str, case: str) -> float:
    """Measures in a process of its own by how many MiB the resident memory rises in five steps."""
    command = [sys.executable, __file__, "--peak", arm, case]
    # Tensors straight from the system and back to it at once: else what the allocator keeps hides what a step needs.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout))


def print_peak(arm: str, case: str) -> None:
    """Runs some steps and prints the rise of the peak memory in MiB."""
    torch.set_num_threads(1)
    run = step(arm, **CASES[case])  # type: ignore[arg-type]
    run()  # the optimiser's state and the libraries' own buffers are there from now on
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (Linux)
    before = memory("VmRSS")
    for _ in range(5):
        run()
    print(json.dumps(memory("VmHWM") - before))


def memory(field: str) -> float:
    """Reads a field of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    """Runs what is not done yet and prints the table."""
    parser = arguments(__doc__ or "", "training.jsonl")
    parser.add_argument("--peak", nargs=2, metavar=("ARM", "CASE"), help="measure one arm's memory (used by itself)")
    args = parser.parse_args()
    if args.peak:
        return print_peak(*args.peak)
    torch.set_num_threads(1)
    log = Log(args.out)
    table = Table("case", "arm", "time / LoRA", "memory / LoRA", "MiB")
    for case, options in CASES.items():
        if args.only not in case:
            continue
        key = {"case": case, "rounds": args.rounds}
        line = log.find(key)
        if line is None:
            seconds = interleave({arm: step(arm, **options) for arm in ARMS}, args.rounds)  # type: ignore[arg-type]
            memory = {arm: peak(arm, case) for arm in ARMS}
            line = log.add(key, seconds=seconds, memory_mib=memory)
        seconds, memory = line["seconds"], line["memory_mib"]
        for arm in ARMS[1:]:
            times, more = ratio(seconds[arm], seconds["LoRA"]), memory[arm] / memory["LoRA"]
            table.add_row(case, arm, f"{times:.3f}", f"{more:.3f}", f"{memory[arm]:.0f}")
    Console(width=120).print(table)
    return None


if __name__ == "__main__":
    main()
