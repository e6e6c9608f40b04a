"""What an adapter costs a transformer block: one block of a ViT with each kind against the bare block.

    python benchmarks/adapters.py

Protocol: as in latency.py: one thread, CPU seconds of the process, arms interleaved call by call, medians of the ratios
round by round, a control arm, the bare block once more; where its ratio leaves 1 by more than 3 %, the run is void.
Every arm has a block of its own with the same weights, 197 tokens an image, and runs it several times a call. The kinds
have their defaults: rank 8 for LoRA, a bottleneck of 8, AdaptFormer's 64. Beside ours: peft's LoRA, and RepAdapter as
its authors' code has it, two convolutions over transposed tokens.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from common import Log, arguments, interleave, mark, ratio
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dynadapter import Adapter, AdapterSpec, AdaptFormer, LoRA, RepAdapter, inject, lay_out_for_cpu, merge

BLOCKS = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
BATCHES = (1, 8)
TOKENS = 197
ROWS = {"ViT-S": 24 * TOKENS, "ViT-B": 8 * TOKENS}
"""Tokens a call at least: a tenth of a second or more."""
GOALS = {"LoRA merged": 1.01, "RepAdapter merged": 1.01, "LoRA": 1.03, "RepAdapter": 1.04}


class Convolutions(nn.Module):
    """RepAdapter in front of a linear layer, as two convolutions of width 1 over transposed tokens.

    Args:
        base: The linear layer.
        hidden: Channels in the middle.
        groups: Of the second convolution.
    """

    def __init__(self, base: nn.Linear, hidden: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv1d(base.in_features, hidden, 1)
        self.up = nn.Conv1d(hidden, base.in_features, 1, groups=groups)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = self.up(self.dropout(self.down(x))) + x
        return self.base(x.transpose(1, 2).contiguous())


def ours(backbone: nn.Module, kind: AdapterSpec, merged: bool = False) -> nn.Module:
    """Injects a kind, none of whose tensors stays at zero."""
    known = {id(p) for p in backbone.parameters()}
    inject(backbone, kind)
    for p in backbone.parameters():
        if id(p) not in known:
            nn.init.normal_(p, std=0.02)
    if merged:
        merge(backbone)
    return backbone


def peft_lora(backbone: nn.Module) -> nn.Module:
    """Injects peft's LoRA of rank 8."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], init_lora_weights=False)
    return inject_adapter_in_model(config, backbone)


def convolutions(backbone: nn.Module) -> nn.Module:
    """Puts RepAdapter's convolutional form before attention and before the MLP."""
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1"):
        backbone.set_submodule(name, Convolutions(backbone.get_submodule(name)))  # type: ignore[arg-type]
    return backbone


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda backbone: backbone,
    "control": lambda backbone: backbone,
    "LoRA merged": lambda backbone: ours(backbone, LoRA(), merged=True),
    "RepAdapter merged": lambda backbone: ours(backbone, RepAdapter(), merged=True),
    "LoRA": lambda backbone: ours(backbone, LoRA()),
    "RepAdapter": lambda backbone: ours(backbone, RepAdapter()),
    "Adapter": lambda backbone: ours(backbone, Adapter()),
    "AdaptFormer": lambda backbone: ours(backbone, AdaptFormer()),
    "peft LoRA": peft_lora,
    "RepAdapter as conv1d": convolutions,
}


def make(arm: str, name: str, **options: Any) -> nn.Module:
    """Makes an arm's block, in evaluation mode and laid out for a CPU."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, depth=1, **options)
    return lay_out_for_cpu(ARMS[arm](backbone).eval().get_submodule("blocks.0"))


@torch.inference_mode()
def case(
    name: str, batch: int, rounds: int, rows: int = TOKENS, tokens: int = TOKENS, **options: Any
) -> dict[str, Any]:
    """Times all arms at one batch size; ``options`` are timm's."""
    notes, blocks = [], {}
    for arm in ARMS:
        try:
            with torch.inference_mode(False):
                blocks[arm] = make(arm, name, **options)
        except ImportError as error:
            notes.append(f"{arm}: {error}")
    width = blocks["bare"].norm1.weight.shape[0]  # type: ignore[union-attr, index]
    x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))
    repeats = max(rows // (batch * tokens), 1)

    def call(block: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats):
                block(x)

        return run

    seconds = interleave({arm: call(block) for arm, block in blocks.items()}, rounds)
    result = {arm: ratio(seconds[arm], seconds["bare"]) for arm in blocks if arm != "bare"}
    return {"control": result.pop("control"), "repeats": repeats, "ratios": result, "notes": notes, "seconds": seconds}


def main() -> None:
    """Runs what is not done yet and prints the table."""
    args = arguments(__doc__ or "", "adapters.jsonl").parse_args()
    torch.set_num_threads(1)
    log = Log(args.out)
    table = Table("block", "batch", "control", "arm", "time / bare block", "goal", "reached")
    notes: list[str] = []
    for block, name in BLOCKS.items():
        for batch in BATCHES:
            if args.only not in f"{block}, batch {batch}":
                continue
            key = {"block": block, "batch": batch, "tokens": TOKENS, "rounds": args.rounds}
            line = log.find(key) or log.add(key, **case(name, batch, args.rounds, ROWS[block]))
            notes += line["notes"]
            first = [block, str(batch), mark(line["control"])]
            for arm, times in line["ratios"].items():
                goal = GOALS.get(arm)
                met = [f"{goal:.2f}", "yes" if times <= goal else "no"] if goal else ["", ""]
                table.add_row(*first, arm, f"{times:.3f}", *met)
                first = ["", "", ""]
    Console(width=110).print(table)
    print(*dict.fromkeys(notes), sep="\n")


if __name__ == "__main__":
    main()
