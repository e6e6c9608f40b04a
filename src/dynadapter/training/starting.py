"""Start a training from the adapters of another training, which may have other classes."""

from pathlib import Path
from typing import Any

from dynadapter.backbones import classifier
from dynadapter.training.checkpoints import read
from dynadapter.training.contents import ADVICE, compare_backbones, frozen_keys, require_finite, saved_contents


def start_from(module: Any, path: str | Path) -> str:
    """Load the trained tensors of another training, heads only if it had the same classes; return a message.

    Optimiser, schedules and progress start from the beginning.

    Raises:
        ValueError: The file is not a checkpoint, or has another backbone, adapter or depth.
    """
    if not Path(path).is_file():
        raise ValueError(f"init_from={path} is not a file; give a checkpoint, such as RUN/checkpoints/last.ckpt")
    checkpoint = read(path)
    try:
        saved = saved_contents(checkpoint)
        require_finite(checkpoint)
        _require_backbone(saved, module)
    except ValueError as error:
        raise ValueError(f"init_from={path}: {error}") from error
    state, own, frozen = checkpoint["state_dict"], module.state_dict(), frozen_keys(module)
    new: tuple[str, ...] = ("net.exit_weights",)  # their schedule begins anew
    same = list(saved["class_names"]) == list(module.class_names)
    if not same:
        heads = {id(part) for part in classifier(module.net.backbone)}
        new += ("net.heads.", *(f"{name}." for name, part in module.named_modules() if id(part) in heads))
    wanted = [name for name in own if not name.startswith(new) and name not in frozen]
    for name in wanted:
        if name not in state or state[name].shape != own[name].shape:
            what = "lacks" if name not in state else "has another shape of"
            raise ValueError(f"init_from={path} {what} {name}. {ADVICE}, or leave init_from out")
    unknown = {name for name in state if not name.startswith(new)} - own.keys() - frozen
    if unknown:
        raise ValueError(
            f"init_from={path} holds {min(unknown)}, which this model lacks. {ADVICE}, or leave init_from out"
        )
    module.load_state_dict({**own, **{name: state[name] for name in wanted}})
    heads_are = "with its heads" if same else "with new heads, because the classes are others"
    return f"starting from {path}: {len(wanted)} tensors, {heads_are}"


def _require_backbone(saved: dict[str, Any], module: Any) -> None:
    """Check the backbone of a checkpoint, also of a full one, because its frozen tensors are not loaded."""
    try:
        compare_backbones(saved | {"full": False}, module.backbone_name, module.backbone_hash)
    except ValueError as error:
        if saved["full"]:
            way = "if its adapters were merged, start from the checkpoint before the merge"
            raise ValueError(f"{error}; {way}") from error
        raise
