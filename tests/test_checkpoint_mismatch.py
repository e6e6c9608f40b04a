"""Checkpoints that do not fit: changed ones, those of another model, and older formats."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, VIT, raises_one_line
from saved import fitted, read
from tiny import FAMILIES, loader, make_classifier, trainer

from dynadapter.adapters import Adapter, LoRA
from dynadapter.exits.heads import LinearHeads
from dynadapter.training.module import ExitClassifier

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = read(path)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


LORA_B = "net.backbone.blocks.3.attn.qkv.lora_b"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["state_dict"].pop(LORA_B), rf"Missing key\(s\) in state_dict: \"{LORA_B}\""),
        (lambda c: c["state_dict"].pop("net.backbone.head.bias"), "net.backbone.head.bias"),
        (lambda c: c["state_dict"].update(extra=torch.zeros(1)), r"Unexpected key\(s\) in state_dict: \"extra\""),
        (lambda c: c["state_dict"].update({LORA_B: torch.zeros(1)}), f"size mismatch for {LORA_B}"),
        (lambda c: c.pop("dynadapter"), "not written by dynadapter: it names no backbone"),
        (lambda c: c["dynadapter"].update(format=99), "format 99, this dynadapter reads 2; update dynadapter"),
        (lambda c: c["dynadapter"].update(format=1), "format 1, this dynadapter reads 2; train again, or use the ver"),
        (lambda c: c["dynadapter"].pop("format"), "format None, this dynadapter reads 2; train again"),
    ],
)
@pytest.mark.parametrize("way", ["python", "trainer"])
def test_changed_checkpoint_is_refused(edit: Any, message: str, way: str, tmp_path: Path) -> None:
    path = change(fitted(make_classifier(), tmp_path / "a.ckpt"), edit)
    ways = {
        "python": lambda: ExitClassifier.load_from_checkpoint(path),
        "trainer": lambda: trainer().validate(make_classifier(), loader(1), ckpt_path=path, weights_only=True),
    }
    with raises_one_line(ValueError, match=message):
        ways[way]()


ABC = [f"class {k}" for k in range(CLASSES)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone_seed": 1},
            r"trained on backbone 'vit_tiny_patch16_224' with weights \w{12}, this model has 'vit_tiny",
        ),
        (FAMILIES["swin"], "this model has 'swin_tiny"),
        ({"backbone_args": VIT | {"depth": 3}}, "give the backbone, weights, backbone_args and depth of"),
        ({"num_classes": 9, "class_names": None}, "the checkpoint knows 5 classes, this model 9"),
        ({"class_names": [*ABC[:4], "other"]}, "class 4 is 'class 4' in the checkpoint and 'other' in this model"),
        ({"class_names": ABC[::-1]}, "class 0 is 'class 0' in the checkpoint and 'class 4' in this model"),
        ({"adapter": LoRA(rank=3)}, "does not fit this model: size mismatch for net.backbone.blocks.0.attn.qkv.lora_a"),
        (
            {"adapter": Adapter()},
            r"Missing key\(s\).*Unexpected key\(s\).*Give the adapter, heads, exit_depths",
        ),
        ({"adapter": None}, r"Unexpected key\(s\) .*lora_a"),
        ({"every": 3}, r"Unexpected key\(s\) .*net.heads.1"),
        ({"heads": LinearHeads()}, r"net.heads.0"),
    ],
)
def test_checkpoint_of_another_model(changes: dict, message: str, tmp_path: Path) -> None:
    path = fitted(make_classifier(class_names=ABC), tmp_path / "a.ckpt")
    with raises_one_line(ValueError, match=message) as error:
        ExitClassifier.load_from_checkpoint(path, **changes)
    assert len(str(error.value)) < 700


def test_missing_keys_are_counted(tmp_path: Path) -> None:
    path = fitted(make_classifier(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"Missing key\(s\).* \.\.\. \((\d+) keys\)") as error:
        ExitClassifier.load_from_checkpoint(path, adapter=Adapter())
    whole = str(error.value.__cause__)
    missing = next(line for line in whole.splitlines() if "Missing" in line)
    assert f"({missing.count('net.')} keys)" in str(error.value)
    with pytest.raises(ValueError, match=r"And \d+ more like this\."):  # one line each
        ExitClassifier.load_from_checkpoint(path, adapter=LoRA(rank=3))


def test_other_classes_are_listed(tmp_path: Path) -> None:
    path = fitted(make_classifier(class_names=ABC), tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"the checkpoint has 'class 0', 'class 1', .*; this model has 'a', 'b', 'c', "
    ):
        ExitClassifier.load_from_checkpoint(path, class_names=list("abcde"))
    with pytest.raises(ValueError, match=r"this model has '0', '1', .*, '7' and 92 more"):
        ExitClassifier.load_from_checkpoint(path, num_classes=100, class_names=None)
