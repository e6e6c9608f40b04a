"""Load a classifier from an untrusted checkpoint: no code runs, nothing is downloaded, and every setting is checked."""

import inspect
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any, Self, get_type_hints

import torch
from lightning.pytorch import LightningModule

from dynadapter.backbones import stored_in
from dynadapter.backbones.stored import check_arguments, check_name
from dynadapter.backbones.weight_files import require_stored
from dynadapter.files import require_room
from dynadapter.limits import require_bounded, require_few_classes
from dynadapter.spec import plain, restore
from dynadapter.training.checkpoints import read, use_atomic_checkpoints


def stored_settings(
    cls: type[LightningModule], checkpoint: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, Any]:
    """Return the checked arguments of a classifier from a checkpoint.

    Args:
        cls: The class of the classifier.
        checkpoint: The content of the checkpoint.
        given: Names of arguments that the user gives; the checkpoint's values of these are not read.

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
    """A LightningModule that can load untrusted checkpoints."""

    def setup(self, stage: str) -> None:
        """Set :class:`AtomicCheckpointIO` for the trainer before it reads a checkpoint."""
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
            map_location: As in :func:`torch.load`.
            hparams_file: Not supported; give settings as arguments.
            strict: Whether every trained tensor is required; None for the module's ``strict_loading``.
            weights_only: True or None.
            kwargs: Arguments of the class; they override those in the checkpoint. A backbone from outside timm's own
                models is accepted only here.

        Raises:
            ValueError: The file is damaged, not local, contains code or forbidden settings, or does not fit.
        """
        if hparams_file is not None or weights_only is False:
            raise ValueError("hparams_file and weights_only=False are refused; give settings as arguments instead")
        if isinstance(checkpoint_path, str | Path):
            checkpoint = read(checkpoint_path)
        else:
            require_room("the checkpoint", checkpoint_path.seek(0, os.SEEK_END))
            checkpoint_path.seek(0)
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            require_stored(checkpoint, "the checkpoint")
            checkpoint_path.seek(0)
        try:
            settings = stored_settings(cls, checkpoint, kwargs)
        except ValueError as error:
            raise ValueError(f"{checkpoint_path}: {error}") from error
        with stored_in(str(checkpoint_path), checkpoint.get("state_dict", {})):
            del checkpoint  # Lightning reads the file again
            settings |= kwargs
            return super().load_from_checkpoint(checkpoint_path, map_location, None, strict, True, **settings)
