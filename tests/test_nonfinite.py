"""NaN and infinity in weights and logits end every command in one line, not in a class 0 of confidence nan."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VIT, make_vit
from PIL import Image
from safetensors.torch import save_file
from tiny import make_classifier, noise_batches, trainer

from dynadapter.backbones import create_backbone
from dynadapter.cli import main
from dynadapter.training.module import ExitClassifier
from dynadapter.training.restoring import load_classifier


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    module, path = make_classifier(), tmp_path / "a.ckpt"
    module.preprocessing = {"image_size": 32, "normalization": "half"}
    fitting = trainer()
    fitting.strategy.connect(module)
    module.trainer = fitting
    fitting.save_checkpoint(path)
    return path


def spoil(path: Path, change: Callable[[torch.Tensor], None], name: str = "lora") -> None:
    held = torch.load(path, weights_only=True)
    change(next(x for key, x in held["state_dict"].items() if name in key).data.view(-1))
    torch.save(held, path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_checkpoint_is_not_loaded(checkpoint: Path, value: float) -> None:
    spoil(checkpoint, lambda x: x[:1].fill_(value))
    words = r"1 of \d+ tensors of the checkpoint hold NaN or infinity, .*lora.* among them"
    with pytest.raises(ValueError, match=words):
        load_classifier(checkpoint)
    with pytest.raises(ValueError, match=words):
        ExitClassifier.load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=words):
        trainer().test(make_classifier(), noise_batches(4, 2), ckpt_path=str(checkpoint))


def test_broken_backbone_weights_are_refused(tmp_path: Path) -> None:
    state = make_vit().state_dict()
    state["blocks.1.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"1 weights of 'vit_tiny_patch16_224' hold NaN or infinity, blocks.1.mlp.fc1"):
        create_backbone("vit_tiny_patch16_224", 5, weights=tmp_path / "w.safetensors", **VIT)


def test_predict_stops_at_broken_logits(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are finite, the logits are not."""
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "photo.png")
    args = ["predict", f"--images={tmp_path / 'photo.png'}", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'o.csv'}"]
    spoil(checkpoint, lambda x: x.fill_(3e38), "backbone.head.weight")
    for changed, words in ((False, "1 of 1 images are not finite"), (True, "hold NaN or infinity")):
        if changed:
            spoil(checkpoint, lambda x: x[:1].fill_(torch.nan))
        with pytest.raises(SystemExit) as ending:
            main([*args, "--policy=Never"])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert ending.value.code == 2
        assert line.startswith("dynadapter: error:")
        assert words in line
        assert not (tmp_path / "o.csv").exists()
