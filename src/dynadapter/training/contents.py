"""The content of a checkpoint of an ExitClassifier, and whether it fits a model: tensors, backbone and classes."""

import textwrap
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from dynadapter.exits.net import ExitNet
from dynadapter.exits.token_merging import TokenMerging
from dynadapter.limits import require_bounded, require_few_classes
from dynadapter.serve.bundle.tensors import frozen_names
from dynadapter.spec import plain, restore
from dynadapter.training.callbacks.early_exit import EarlyExit
from dynadapter.training.entries import MODEL, OURS, require_entries
from dynadapter.training.sharding import local_part

FORMAT = 2
"""Version of what this package adds to a checkpoint under the key ``dynadapter``. 2 renamed settings."""

ADVICE = "Give the adapter, heads, exit_depths and depth of the training"


# ---- which tensors


def trainable_only(module: nn.Module) -> None:
    """Reduce a module's state dict to the trained tensors: the frozen tensors of its :class:`ExitNet` are left out.

    Loading then accepts that only these are missing. A module whose ``full_checkpoint`` is true saves everything.
    """
    module.register_state_dict_post_hook(_drop_frozen)
    module.register_load_state_dict_post_hook(_allow_frozen)


def frozen_keys(module: nn.Module) -> set[str]:
    """Return the state-dict keys of a module that belong to a frozen backbone, as :func:`frozen_names` does."""
    nets = {path: net for path, net in module.named_modules() if isinstance(net, ExitNet)}
    return {f"{path}.{name}".lstrip(".") for path, net in nets.items() for name in frozen_names(net)}


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    if not getattr(module, "full_checkpoint", False):
        for key in frozen_keys(module):
            state.pop(prefix + key, None)


def _allow_frozen(module: nn.Module, keys: _IncompatibleKeys) -> None:
    # The hook does not get its prefix (an averaging wrapper adds one), hence the match by ending.
    frozen = tuple(frozen_keys(module))
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(frozen)]


def require_keys(found: AbstractSet[str], module: nn.Module) -> None:
    """Check that a checkpoint holds all trained tensors, and nothing unknown."""
    own = module.state_dict().keys()
    faults = [f"Missing: {key}." for key in own - found]
    faults += [f"Unknown: {key}." for key in found - own - frozen_keys(module)]
    if faults:
        more = f" And {len(faults) - 3} more like this." if len(faults) > 3 else ""
        raise ValueError(f"the checkpoint does not fit this model: {' '.join(sorted(faults)[:3])}{more} {ADVICE}")


def describe_mismatch(error: RuntimeError) -> str:
    """Return torch's report of tensors that do not fit as one line."""
    lines = str(error).splitlines()[1:]
    faults = [_shorten(line) for line in lines[:3]]
    if len(lines) > 3:
        faults.append(f"And {len(lines) - 3} more like this.")
    return f"the checkpoint does not fit this model: {' '.join(faults)} {ADVICE}"


# ---- what else


def contents_of(module: Any) -> dict[str, Any]:
    """Return the content of a checkpoint of an ExitClassifier under the key ``dynadapter``, as plain data.

    These are the backbone's name and hash, class names, preprocessing, the data module's settings, the batches of an
    epoch, and the policies of the trainer's :class:`EarlyExit`.
    """
    callbacks = getattr(module._trainer, "callbacks", [])
    return {
        "format": FORMAT,
        "backbone": module.backbone_name,
        "backbone_hash": module.backbone_hash,
        "full": module.full_checkpoint,
        "class_names": module.class_names,
        "preprocessing": module.preprocessing,
        "data": module.data_config,
        "images": module.images,
        "batches": getattr(module._trainer, "num_training_batches", None),
        "policies": [plain(policy) for one in callbacks if isinstance(one, EarlyExit) for policy in one.policies],
    }


def saved_contents(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint under the key ``dynadapter``.

    Raises:
        ValueError: The checkpoint was not written by this package, has another format, or lacks an entry.
    """
    saved = checkpoint.get("dynadapter")
    if not isinstance(saved, Mapping):
        raise ValueError(
            "this checkpoint was not written by dynadapter: it names no backbone; load its weights with torch.load"
        )
    if (format := saved.get("format")) != FORMAT:
        newer = isinstance(format, int) and format > FORMAT
        advice = "update dynadapter" if newer else "train again, or use the version of dynadapter that wrote it"
        raise ValueError(f"this checkpoint has format {format!r:.40}, this dynadapter reads {FORMAT}; {advice}")
    require_entries(checkpoint, MODEL)
    require_entries(saved, OURS, "dynadapter.")
    require_bounded(saved, "the checkpoint")
    require_few_classes(len(saved["class_names"]))
    return dict(saved)


def require_finite(checkpoint: Mapping[str, Any]) -> None:
    """Check that no tensor of a checkpoint holds NaN or infinity."""
    state = checkpoint.get("state_dict", {})
    broken = [name for name, x in state.items() if isinstance(x, Tensor) and not local_part(x).isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(state)} tensors of the checkpoint hold NaN or infinity, {broken[0]} among them: "
            "its network predicts nothing; use an earlier checkpoint, or train again"
        )


def compare_backbones(saved: Mapping[str, Any], name: str, fingerprint: str) -> None:
    """Check that a checkpoint without the frozen tensors was trained on this backbone."""
    if saved["backbone_hash"] != fingerprint and not saved["full"]:
        raise ValueError(
            f"the checkpoint was trained on backbone {saved['backbone']!r} with weights "
            f"{saved['backbone_hash'][:12]}, this model has {name!r} with {fingerprint[:12]}; give the backbone, "
            "weights, backbone_args and depth of the training"
        )


def compare_token_merging(settings: Mapping[str, Any], ours: TokenMerging | None) -> None:
    """Warn if token merging differs from the training: all tensors fit, but the logits differ."""
    theirs = restore(settings.get("token_merging"), TokenMerging | None, "token_merging")
    if theirs != ours:
        rank_zero_warn(
            f"the checkpoint was trained with token_merging={theirs}, this model has token_merging={ours}: earlier "
            "measurements do not hold; give the token_merging of the training, or measure again"
        )


def different_class(theirs: list[str], ours: list[str]) -> str:
    """Return a message on how the class names of a checkpoint and a model differ; empty if they are equal."""
    both = f"the checkpoint has {_listed(theirs)}; this model has {_listed(ours)}"
    advice = "use data with the classes of the training, in its order"
    if len(theirs) != len(ours):
        return f"the checkpoint knows {len(theirs)} classes, this model {len(ours)}; {both}; {advice}"
    for k, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their != our:
            return f"class {k} is {their!r} in the checkpoint and {our!r} in this model; {both}; {advice}"
    return ""


def _shorten(line: str) -> str:
    """Return the beginning of a message, with the number of keys that it names."""
    count = line.count('", "') + 1
    short = textwrap.shorten(line, 200, placeholder=" ...")
    return f"{short} ({count} keys)" if short.endswith(" ...") and count > 1 else short


def _listed(names: list[str]) -> str:
    """Return the first eight names as text, and the number of the others.

    >>> _listed(["cat", "dog"])
    "'cat', 'dog'"
    """
    named = [textwrap.shorten(repr(name), 30, placeholder="...") for name in names[:8]]
    return ", ".join(named) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
