"""Build a classifier from its checkpoint, without a Trainer."""

from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dynadapter.backbones import DrawFrom, stored_in
from dynadapter.calibrate.stored import calibration_of, calibration_path
from dynadapter.exits.policies import Confidence, Policy
from dynadapter.spec import restore
from dynadapter.training.checkpoints import read
from dynadapter.training.contents import saved_contents
from dynadapter.training.loading import stored_settings
from dynadapter.training.module import ExitClassifier


def load_classifier(
    path: str | Path, weights: str | Path | None = None, pretrained: bool | None = None
) -> ExitClassifier:
    """Build the classifier that a checkpoint describes and load its trained tensors, in evaluation mode.

    Nothing that the checkpoint names is imported: a class that is not known already is an error.

    Args:
        path: A checkpoint of ``dynadapter fit`` or of a Trainer.
        weights: A local file with the backbone's weights, instead of the file that the checkpoint names.
        pretrained: Whether timm may fetch the backbone's weights; None for the choice of the training.

    Raises:
        ValueError: The file is damaged, is not of an :class:`~dynadapter.training.module.ExitClassifier`, or does not
            fit the backbone.
    """
    checkpoint = read(path)
    try:
        names = restore(saved_contents(checkpoint)["class_names"], list[str], "class_names")
        settings = stored_settings(ExitClassifier, checkpoint) | {"num_classes": len(names), "class_names": names}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by dynadapter fit; give a checkpoint that was") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if weights is not None:
        settings |= {"weights": str(weights)}
    elif pretrained is not None:
        settings |= {"weights": None, "pretrained": pretrained}
    elif settings.get("weights"):
        rank_zero_info(f"the backbone's weights come from {settings['weights']}, as the checkpoint says")
    with DrawFrom(0), stored_in(str(path), checkpoint["state_dict"]):  # the checkpoint's tensors replace what is drawn
        classifier = ExitClassifier(**settings)
    classifier.on_load_checkpoint(checkpoint)
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier.eval()


class StoredPolicies(NamedTuple):
    """The exit policies of a checkpoint, and a description of where they come from."""

    policies: tuple[Policy, ...]
    origin: str


def stored_policies(path: str | Path) -> StoredPolicies:
    """Return the exit policies of a checkpoint: the calibrated one if there is one, then those of its training.

    Raises:
        ValueError: The checkpoint or its calibration is damaged, or a policy is unknown.
    """
    given = saved_contents(read(path)).get("policies") or ()
    trained = restore(given, tuple[Policy, ...], f"{path}: policies")
    calibration = calibration_of(Path(path))
    if calibration is not None:
        others = [policy for policy in trained if policy.name != calibration.policy.name]
        return StoredPolicies((calibration.policy, *others), f"calibrated: {calibration.where}")
    if calibration_path(Path(path)).exists():
        rank_zero_warn(f"{calibration_path(Path(path))} is not used: {path} has changed since it was calibrated")
    return StoredPolicies(trained, "the training's") if trained else StoredPolicies((Confidence(0.9),), "the default")
