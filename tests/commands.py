"""Commands run in this process."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dynadapter.cli import main

TINY = str(Path(__file__).parent / "conf" / "tiny.yaml")
"""A config that trains in a second."""
SMALL = [
    "--model.backbone=vit_tiny_patch16_224",
    "--model.pretrained=false",
    "--model.backbone_args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}",
    "--model.every=1",
    "--data.image_size=32",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]
"""Options of a network that trains as fast; to be given after ``--data``."""


def refused(args: Sequence[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must end with this exit code and one line on stderr; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        main([str(arg) for arg in args])
    shown = capsys.readouterr()
    [line] = [line for line in shown.err.splitlines() if line and not line.startswith("INFO")]  # Lightning's
    assert line.startswith("dynadapter: ")
    assert ending.value.code == code, line
    return line


def printed(args: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that prints and ends at once, such as one with ``--help``; return what it prints."""
    with pytest.raises(SystemExit) as ending:
        main([str(arg) for arg in args])
    assert not ending.value.code
    return capsys.readouterr().out
