"""The short help of a command with a full configuration: the keys that most users need, on two screens."""

import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser, Namespace

TITLES = {
    "model": "the network and how it is trained",
    "data": "the images",
    "early_exit": "the exit policies that validation and test measure",
    "exit_weights": "weights of the exits in the loss, in fit",
    "sparsity": "dropout that falls with depth and masked adapter gradients, in fit",
    "flops_report": "the tables at the end",
    "checkpoint": "what fit saves (Lightning's ModelCheckpoint)",
    "trainer": "hardware, length and precision (Lightning's Trainer)",
}
"""The sections of a config, and what each is about."""

ESSENTIAL = {
    "model.backbone": "A timm model, or one that comes with the package, such as micro.",
    "model.pretrained": "Load the pretrained weights.",
    "model.weights": "A local file of the backbone's weights.",
    "model.adapter": "LoRA, RepAdapter, SSF, ... or null; --model.adapter.help LoRA lists its settings.",
    "model.every": "Number of blocks between exits.",
    "model.exit_depths": "Exits after these blocks instead, as in [3, 6, 9].",
    "model.heads": "The kind of early head: Balanced, LinearHeads, MLPHeads, Attentive, ExitTokens.",
    "model.token_merging": "TokenMerging averages similar tokens between blocks.",
    "model.distillation": "Distillation lets early exits learn from the last one.",
    "model.optimizer": "An optimizer of torch; --model.optimizer.lr VALUE.",
    "model.lr_schedule": "A factor on the learning rate over training: Constant, Linear, Cosine, Cubic, Step, Warmup.",
    "model.label_smoothing": "Share of the target spread over all classes.",
    "model.class_weights": "auto weighs rare classes more in the loss; or {NAME: WEIGHT}.",
    "model.mixing": "Mixing mixes pairs of images (mixup, cutmix).",
    "data": "Shapes, ImageFolder, ImageTable, ImageLists, VideoLists, HubDataset, TorchVisionDataset, VTAB1k; "
    "--data.help CLASS.",
    "early_exit.policies": "A list of Confidence, Entropy, Margin, Patience, AtExit, Combined and Never.",
    "exit_weights.weighting": "EarlyToLate, LateToEarly, LinearInDepth, PerExit or Uniform.",
    "sparsity.shallow": "Dropout in the first block, a schedule.",
    "sparsity.deep": "Dropout in the last block, a schedule.",
    "sparsity.keep": "Probability that a step updates an element, a schedule.",
    "flops_report.show": "Print the tables.",
    "checkpoint.monitor": "Also keep the best checkpoint by this metric, such as val/acc.",
    "checkpoint.mode": "Whether the best is the largest (max) or the smallest (min).",
    "trainer.max_epochs": "Length of the training.",
    "trainer.max_steps": "Length in optimiser steps; -1 leaves it to max_epochs.",
    "trainer.accelerator": "cpu, gpu, mps or auto.",
    "trainer.devices": "How many devices, or a list of their numbers.",
    "trainer.strategy": "auto, ddp (data-parallel) or fsdp2 (sharded).",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed.",
    "trainer.accumulate_grad_batches": "Batches in one optimiser step.",
    "trainer.gradient_clip_val": "Largest norm of the gradient.",
    "trainer.deterministic": "Use deterministic algorithms only.",
    "trainer.logger": "false, or a logger such as TensorBoardLogger instead of metrics.csv.",
    "trainer.callbacks": "More callbacks, such as EarlyStopping or WeightAverage.",
    "trainer.default_root_dir": "The folder that receives the runs' folders.",
    "trainer.fast_dev_run": "Run one batch of everything and save nothing.",
}
"""The keys of the sections that ``--help`` explains; ``--help_all`` shows every key."""

SHORT: dict[str, tuple[str, tuple[str, ...]]] = {
    "epochs": ("trainer.max_epochs", ("fit",)),
    "lr": ("model.optimizer.lr", ("fit",)),
    "batch_size": ("data.batch_size", ("fit", "validate", "test", "calibrate")),
    "threshold": ("early_exit.policies", ("fit", "validate", "test")),
}
"""Short options: the key that each stands for, and the commands that take it."""

FIT_ONLY = ("exit_weights", "sparsity", "checkpoint")
"""Sections that the help of other commands leaves out."""

KEY_WIDTH = 26


def short_help(command: str, description: str, parser: ArgumentParser) -> str:
    """Return the help of a command: its own arguments and :data:`ESSENTIAL`, with their defaults."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [f"usage: dynadapter {command} [--config FILE ...] [--KEY VALUE ...]", ""]
    lines += textwrap.wrap(f"{description} --help_all shows every key.", width)
    defaults = parser.get_defaults()
    own = [action for action in parser._actions if _section(action.dest) not in TITLES and action.option_strings]
    lines.append("")
    for action in own:
        name = next((option for option in action.option_strings if option.startswith("--")), action.option_strings[0])
        lines += _entry(name, str(action.help or ""), defaults.get(action.dest), width)
    for name, (key, commands) in SHORT.items():
        if command in commands:
            what = " with one Confidence of this threshold" if name == "threshold" else ""
            lines += _entry(f"--{name}", f"Short for --{key}{what}.", None, width)
    dests = {action.dest for action in parser._actions}
    for section, title in TITLES.items():
        if section in FIT_ONLY and command != "fit":
            continue
        lines += ["", f"{section}: {title}"]
        for key in (key for key in ESSENTIAL if _section(key) == section and key in dests):
            lines += _entry(f"--{key}", ESSENTIAL[key], defaults.get(key), width)
    return "\n".join(lines)


def _section(key: str) -> str:
    return key.partition(".")[0]


def _entry(name: str, text: str, default: Any, width: int) -> Iterable[str]:
    shown = _as_text(default)
    text = f"{text} [{shown}]" if shown else text
    lines = textwrap.wrap(text.replace("%%", "%"), width - KEY_WIDTH - 4) or [""]
    if len(name) > KEY_WIDTH:
        yield f"  {name}"
        name = ""
    yield f"  {name:{KEY_WIDTH}}  {lines[0]}".rstrip()
    for line in lines[1:]:
        yield f"  {'':{KEY_WIDTH}}  {line}"


def _as_text(value: Any) -> str:
    """Return a default as short text; empty for null and for values without a short form."""
    if isinstance(value, Namespace | dict):
        value = value.get("class_path")
        return str(value).rpartition(".")[2] if value else ""
    return str(value).lower() if isinstance(value, bool) else "" if value in (None, "==SUPPRESS==") else str(value)
