"""``init_from``: a training that starts from the adapters of another one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, refused
from tiny import CLASSES, make_classifier, shaken, trainer
from torch.utils.data import DataLoader, TensorDataset

from dynadapter.adapters import LoRA, RepAdapter
from dynadapter.cli import main
from dynadapter.exits.heads import LinearHeads
from dynadapter.training.starting import start_from

NAMES = [f"class {k}" for k in range(CLASSES)]
MICRO = {"backbone": "micro", "backbone_args": None, "pretrained": True, "every": 6}
"""Its weights do not depend on the number of classes, as drawn ones do."""


def save(path: Path, **settings: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save a checkpoint whose trained tensors are all random; return it and these."""
    module = shaken(make_classifier(class_names=NAMES, **(MICRO | settings)))
    run = trainer(max_steps=1)
    images = DataLoader(TensorDataset(torch.randn(2, 3, 48, 48), torch.tensor([0, 1])), batch_size=2)
    run.fit(module, images, images)
    run.save_checkpoint(path)
    return path, {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint whose trained tensors are all random, and these."""
    return save(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("classes", "names", "same"),
    [(CLASSES, NAMES, True), (CLASSES, NAMES[::-1], False), (3, ["x", "y", "z"], False)],
)
def test_heads_are_taken_from_the_same_classes(saved, classes, names, same):
    path, state = saved
    module = make_classifier(num_classes=classes, class_names=names, **MICRO)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    line = start_from(module, path)
    assert line.startswith(f"starting from {path}: ")
    assert line.endswith("with its heads" if same else "with new heads, because the classes are others")
    for name, tensor in module.state_dict().items():
        if name == "net.exit_weights":
            continue
        taken = same or not name.startswith(("net.heads.", "net.backbone.head."))
        assert torch.equal(tensor, state[name] if taken else before[name]), name
    assert any("lora" in name for name in state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": RepAdapter()}, " lacks net.backbone.blocks.0."),
        ({"adapter": LoRA(rank=3)}, " has another shape of net.backbone.blocks.0.attn.qkv.lora_"),
        ({"adapter": None}, " holds net.backbone.blocks.0.attn.qkv.lora_"),
        ({"heads": LinearHeads()}, " has another shape of net.heads.0."),
        ({"pretrained": False}, "was trained on backbone 'micro' with weights"),
    ],
)
def test_other_parts_are_named(saved, changes, words):
    path, _ = saved
    module = make_classifier(class_names=NAMES, **(MICRO | changes))
    with pytest.raises(ValueError, match=re.escape(f"init_from={path}")) as caught:
        start_from(module, path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ours", [False, True])
def test_full_checkpoint_of_another_backbone(ours, tmp_path):
    """Its frozen tensors are not loaded, so the adapters would stand on another backbone."""
    path, _ = save(tmp_path / "full.ckpt", full_checkpoint=True)
    module = make_classifier(class_names=NAMES, **(MICRO | {"pretrained": False, "full_checkpoint": ours}))
    with pytest.raises(ValueError, match="was trained on backbone 'micro' with weights"):
        start_from(module, path)


def test_merged_checkpoint_names_the_way_out(tmp_path):
    module = make_classifier(class_names=NAMES, **MICRO)
    run = trainer(max_steps=1)
    images = DataLoader(TensorDataset(torch.randn(2, 3, 48, 48), torch.tensor([0, 1])), batch_size=2)
    run.fit(module, images, images)
    module.merge()
    run.save_checkpoint(tmp_path / "merged.ckpt")
    with pytest.raises(ValueError, match="if its adapters were merged, start from the checkpoint before the merge"):
        start_from(make_classifier(class_names=NAMES, **MICRO), tmp_path / "merged.ckpt")


@pytest.mark.parametrize(("theirs", "ours"), [(False, True), (True, False), (True, True)])
def test_full_checkpoints_start_as_others(theirs, ours, tmp_path):
    path, state = save(tmp_path / "a.ckpt", full_checkpoint=theirs)
    module = make_classifier(class_names=NAMES, **(MICRO | {"full_checkpoint": ours}))
    assert start_from(module, path).endswith("with its heads")
    loaded = module.state_dict()
    names = (state.keys() & loaded.keys()) - {"net.exit_weights"}
    assert any("lora" in name for name in names)
    assert all(torch.equal(loaded[name], state[name]) for name in names)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no\.ckpt is not a file; give a checkpoint"):
        start_from(make_classifier(), tmp_path / "no.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"b\.ckpt"):
        start_from(make_classifier(), tmp_path / "b.ckpt")


def test_it_is_an_option_of_fit(tmp_path, capsys):
    common = ["fit", "-c", TINY, f"--trainer.default_root_dir={tmp_path}", "--epochs=1"]
    main([*common, "--lr=0"])
    first = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    main([*common, "--lr=0", f"--init_from={first}", "--seed_everything=3"])
    assert f"starting from {first}: " in capsys.readouterr().out
    states = [
        torch.load(tmp_path / f"version_{k}" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for k in (0, 1)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] if name != "net.exit_weights")
    main(["fit", "--resume", str(tmp_path / "version_1"), "--epochs=2"])
    assert "starting from" not in capsys.readouterr().out
    assert "init_from=no.ckpt is not a file" in refused([*common, "--init_from=no.ckpt"], capsys)
