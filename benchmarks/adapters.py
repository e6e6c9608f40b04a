"""Time one ViT block with each kind of adapter against the bare block.

    python benchmarks/adapters.py

Protocol as in ``latency.py``: one thread, CPU seconds of the process, arms interleaved call by call, medians of the
ratios round by round, and a control arm, the bare block again; where its ratio differs from 1 by more than 3 %, the run
is void. Every arm has its own block with the same weights, 197 tokens an image, and runs it several times a call. The
kinds have their defaults: rank 8 for LoRA, a bottleneck of 8, AdaptFormer's 64. Baselines: peft's LoRA, and RepAdapter
as in its authors' code, two convolutions over transposed tokens.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from common import Line, Log, Row, arguments, control, interleave, show
from torch import Tensor, nn

from dynadapter import Adapter, AdapterSpec, AdaptFormer, LoRA, RepAdapter, inject, lay_out_for_cpu, merge
from dynadapter.bench.timing import ratio

BLOCKS: dict[str, dict[str, Any]] = {
    "ViT-S": dict(name="vit_small_patch16_224"),
    "ViT-B": dict(name="vit_base_patch16_224"),
}
TINY: dict[str, dict[str, Any]] = {
    "tiny": dict(name="vit_tiny_patch16_224", embed_dim=48, num_heads=3, img_size=32, patch_size=8)
}
BATCHES = (1, 8)
TOKENS = 197
ROWS = {"ViT-S": 24 * TOKENS, "ViT-B": 8 * TOKENS}
"""Tokens in a call, at least: a tenth of a second or more."""


class Convolutions(nn.Module):
    """RepAdapter in front of a linear layer, as two convolutions of width 1 over transposed tokens.

    Args:
        base: The linear layer.
        hidden: Channels in the middle.
        groups: Groups of the second convolution.
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


def adapted(backbone: nn.Module, kind: AdapterSpec, merged: bool = False) -> nn.Module:
    """Inject a kind of adapter with random weights, none of them zero."""
    known = {id(p) for p in backbone.parameters()}
    inject(backbone, kind)
    for p in backbone.parameters():
        if id(p) not in known:
            nn.init.normal_(p, std=0.02)
    if merged:
        merge(backbone)
    return backbone


def peft_lora(backbone: nn.Module) -> nn.Module:
    """Inject peft's LoRA of rank 8."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], init_lora_weights=False)
    return inject_adapter_in_model(config, backbone)


def convolutions(backbone: nn.Module) -> nn.Module:
    """Put RepAdapter's convolutional form in front of attention and of the MLP."""
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1"):
        backbone.set_submodule(name, Convolutions(backbone.get_submodule(name)))  # type: ignore[arg-type]
    return backbone


ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda backbone: backbone,
    "control": lambda backbone: backbone,
    "LoRA merged": lambda backbone: adapted(backbone, LoRA(), merged=True),
    "RepAdapter merged": lambda backbone: adapted(backbone, RepAdapter(), merged=True),
    "LoRA": lambda backbone: adapted(backbone, LoRA()),
    "RepAdapter": lambda backbone: adapted(backbone, RepAdapter()),
    "Adapter": lambda backbone: adapted(backbone, Adapter()),
    "AdaptFormer": lambda backbone: adapted(backbone, AdaptFormer()),
    "peft LoRA": peft_lora,
    "RepAdapter as conv1d": convolutions,
}


def make(arm: str, name: str, **options: Any) -> nn.Module:
    """Return an arm's block, in evaluation mode and laid out for a CPU."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, depth=1, **options)
    return lay_out_for_cpu(ARMS[arm](backbone).eval().get_submodule("blocks.0"))


def repeat(block: nn.Module, x: Tensor, times: int) -> Callable[[], None]:
    """Return a call that runs a block several times."""

    def run() -> None:
        for _ in range(times):
            block(x)

    return run


@torch.inference_mode()
def case(options: dict[str, Any], batch: int, rounds: int, rows: int, tokens: int = TOKENS) -> Line:
    """Time all arms at one batch size; arms whose package is missing are named in ``notes``."""
    notes, blocks = [], {}
    for arm in ARMS:
        try:
            with torch.inference_mode(False):
                blocks[arm] = make(arm, **options)
        except ImportError as error:
            notes.append(f"{arm}: {error}")
    bare: Any = blocks["bare"]
    x = torch.randn(batch, tokens, len(bare.norm1.weight), generator=torch.Generator().manual_seed(1))
    times = max(rows // (batch * tokens), 1)
    seconds = interleave({arm: repeat(block, x, times) for arm, block in blocks.items()}, rounds)
    ratios = {arm: ratio(seconds[arm], seconds["bare"]) for arm in blocks if arm != "bare"}
    return {"control": ratios.pop("control"), "repeats": times, "ratios": ratios, "notes": notes, "seconds": seconds}


def rows(line: Line) -> list[Row]:
    """Return the table row of a line: time divided by the bare block's."""
    first: Row = {"block": line["key"]["block"], "batch": line["key"]["batch"], "control": control(line)}
    return [first | line["ratios"]]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and print the table."""
    args = arguments(__doc__ or "", "adapters.jsonl").parse_args(argv)
    torch.set_num_threads(1)
    log, lines = Log(args.out), []
    for block, options in (TINY if args.tiny else BLOCKS).items():
        for batch in BATCHES:
            if args.only in f"{block}, batch {batch}":
                key = {"block": block, "batch": batch, "tokens": TOKENS, "rounds": args.rounds}
                size = ROWS.get(block, TOKENS)
                lines.append(log.find(key) or log.add(key, **case(options, batch, args.rounds, size)))
    show((row for line in lines for row in rows(line)), "time / time of the bare block")
    print(*dict.fromkeys(note for line in lines for note in line["notes"]), sep="\n")


if __name__ == "__main__":
    main()
