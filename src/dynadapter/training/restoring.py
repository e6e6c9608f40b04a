"""Build a classifier from its checkpoint alone, without a Trainer."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from dynadapter.backbones import DrawFrom
from dynadapter.exits.policies import Confidence, Policy
from dynadapter.limits import read_yaml
from dynadapter.spec import restore
from dynadapter.training.checkpoints import read
from dynadapter.training.contents import saved_contents
from dynadapter.training.loading import stored_settings
from dynadapter.training.module import ExitClassifier


def load_classifier(
    path: str | Path, weights: str | Path | None = None, pretrained: bool | None = None
) -> ExitClassifier:
    """Build the classifier that a checkpoint describes and load its trained tensors, in evaluation mode.

    Nothing that the checkpoint names is imported: its classes are known already or refused.

    Args:
        path: A checkpoint of ``dynadapter fit`` or of a Trainer.
        weights: A local file with the backbone's weights, instead of the one that the checkpoint names.
        pretrained: Whether timm may fetch the backbone's weights; None for what the training did.

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
    with DrawFrom(0):  # the checkpoint's tensors replace what is drawn
        classifier = ExitClassifier(**settings)
    classifier.on_load_checkpoint(checkpoint)
    classifier.load_state_dict(checkpoint["state_dict"])
    return classifier.eval()


def stored_policy(path: str | Path) -> Policy:
    """Return the first exit policy in the ``config.yaml`` of a checkpoint's run; ``Confidence(0.9)`` if there is none.

    Args:
        path: The checkpoint, in ``RUN/checkpoints``.

    Raises:
        ValueError: The config cannot be read, or names no policy that is known.
    """
    config = Path(path).parent.parent / "config.yaml"
    try:
        policies = read_yaml(config)["early_exit"]["policies"] if config.exists() else None
    except (KeyError, TypeError):
        policies = None
    if not isinstance(policies, list) or not policies:
        return Confidence(0.9)
    return restore(policies[0], Policy, f"{config}: early_exit.policies[0]")
