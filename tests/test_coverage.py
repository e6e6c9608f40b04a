"""Which of timm's architectures are accepted: against timm's own builder, and against the table in the documents."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from commands import refused
from conftest import CLASSES, raises_one_line
from timm.models import model_entrypoint
from torch import nn

from dynadapter import ExitNet, create_backbone
from dynadapter.backbones import blocks
from dynadapter.backbones.coverage import architectures, is_accepted, model_class
from dynadapter.cli import main
from dynadapter.cli.backbones import listed, table

SHARE = 0.6
PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"


class Building(BaseException):
    """Carries the class that timm was about to build."""


def test_class_is_what_timm_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(kind: type[nn.Module], *args: Any, **options: Any) -> None:
        raise Building(kind)

    for module in [module for name, module in sys.modules.items() if name.startswith("timm.models.")]:
        if hasattr(module, "build_model_with_cfg"):
            monkeypatch.setattr(module, "build_model_with_cfg", stop)
    wrong = []
    for one in architectures():
        with pytest.raises(Building) as building:
            model_entrypoint(one.name)()
        kind = building.value.args[0]
        inner = one.family != kind.__name__ and kind.__name__ == "ResNet"  # the stem of a hybrid ViT is built first
        if one.accepted != (one.family == "VisionTransformer" if inner else is_accepted(kind)):
            wrong.append(one.name)
    assert not wrong


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "hiera_tiny_224", "resmlp_12_224", "levit_128s"])
def test_accepted_is_what_can_be_created(name: str) -> None:
    accepted = next(one.accepted for one in architectures() if one.name == name)
    assert accepted == (not name.startswith(("resmlp", "levit")))
    if not accepted:
        with pytest.raises(TypeError, match="no cut is known for"):
            create_backbone(name, CLASSES)


def test_most_weights_are_accepted() -> None:
    found = architectures()
    weights = [(one.accepted, len(one.tags)) for one in found]
    assert sum(count for _, count in weights) == len(timm.list_pretrained())
    assert sum(count for accepted, count in weights if accepted) >= SHARE * len(timm.list_pretrained())


def test_table_in_the_documents() -> None:
    text = PAGE.read_text()
    if f"timm {timm.__version__}" not in text:
        pytest.skip("the page shows another release of timm")
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    own = [one._replace(accepted=one.accepted and is_own(one.name)) for one in architectures()]
    assert shown[1].splitlines() == table(own)


def is_own(name: str) -> bool:
    """Check that no other test of this process has registered the family."""
    kind = model_class(name)
    return kind is not None and blocks.dispatch(kind).__module__.startswith("dynadapter.")


def test_command_lists_names(capsys: pytest.CaptureFixture) -> None:
    main(["backbones", "--family", "hiera"])
    lines = capsys.readouterr().out.splitlines()
    assert "hiera_tiny_224.mae" in lines
    assert all(line.startswith("hiera_") for line in lines)
    assert listed(architectures(), "resmlp_12*") == ["resmlp_12_224 (not accepted: MlpMixer)"]
    assert "did you mean 'Hiera'?" in refused(["backbones", "--family", "Hierra"], capsys)


@pytest.mark.parametrize("module", ["torchvision.models.vision_transformer", "transformers.models.vit"])
def test_class_of_the_same_name_is_refused(module: str) -> None:
    other = type("VisionTransformer", (nn.Module,), {"__module__": module})()
    with raises_one_line(TypeError, match=rf"no cut is known for {module}\.VisionTransformer; known: "):
        ExitNet(other)
