"""Load a classifier from a checkpoint of anybody: no code runs, no address is requested, no setting is unchecked."""

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any, Self, get_type_hints

import torch
from lightning.pytorch import LightningModule

from dynadapter.backbones.stored import check_arguments, check_name
from dynadapter.limits import require_bounded, require_few_classes
from dynadapter.spec import plain, restore
from dynadapter.training.checkpoints import read, use_atomic_checkpoints


def stored_settings(
    cls: type[LightningModule], checkpoint: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, Any]:
    """Return the arguments of a classifier that a checkpoint holds, built again and checked.

    Args:
        cls: The class of the classifier.
        checkpoint: The content of the checkpoint.
        given: Names of arguments that the user gives, so that the checkpoint's are not read.

    Raises:
        ValueError: An argument has another type, is too large, or names a class or a backbone that a file may not name.
    """
    held = checkpoint.get("hyper_parameters")
    if not isinstance(held, Mapping) or not {"num_classes", "backbone"} <= held.keys():
        raise ValueError("it was not written by dynadapter fit; give a checkpoint that was")
    if "optimizer" in held:
        raise ValueError("it holds an optimizer among its hyper_parameters, which no checkpoint of dynadapter fit does")
    known = set(inspect.signature(cls).parameters) - {*given}
    settings = {name: value for name, value in held.items() if name in known}
    require_bounded(settings, "its hyper_parameters")
    require_few_classes(settings.get("num_classes", 0))
    if "backbone" in settings:
        check_name(settings["backbone"])
    check_arguments(settings.get("backbone_args"))
    hints = get_type_hints(cls.__init__)
    try:
        # An unpickled object has not checked its own fields
        return {name: restore(plain(value), hints.get(name, Any), name) for name, value in settings.items()}
    except (AttributeError, TypeError) as error:  # such an object lacks fields
        raise ValueError(f"its hyper_parameters are damaged ({error})") from error


class CheckedLoading(LightningModule):
    """A LightningModule that reads checkpoints of anybody."""

    def setup(self, stage: str) -> None:
        """Let the trainer read and write checkpoints safely, before it reads one."""
        use_atomic_checkpoints(self.trainer)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model from a local checkpoint, under ``weights_only=True``.

        Args:
            checkpoint_path: The file.
            map_location: As of :func:`torch.load`.
            hparams_file: Not supported; give settings as arguments.
            strict: Whether every trained tensor is required; None for the module's ``strict_loading``.
            weights_only: True or None.
            kwargs: Arguments of the class that win over those in the checkpoint. Only here a backbone may come from
                outside timm's own models.

        Raises:
            ValueError: The file is damaged, not local, holds code or settings that a file may not hold, or does not
                fit.
        """
        if hparams_file is not None or weights_only is False:
            raise ValueError("hparams_file and weights_only=False are refused; give settings as arguments instead")
        if isinstance(checkpoint_path, str | Path):
            checkpoint = read(checkpoint_path)
        else:
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            checkpoint_path.seek(0)
        try:
            settings = stored_settings(cls, checkpoint, kwargs)
        except ValueError as error:
            raise ValueError(f"{checkpoint_path}: {error}") from error
        return super().load_from_checkpoint(checkpoint_path, map_location, None, strict, True, **{**settings, **kwargs})
