"""Read and check a calibrated policy from ``calibration.json`` or from the file next to the calibrated checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynadapter.exits.policies import Policy
from dynadapter.files import sha256
from dynadapter.spec import restore

RESULT = "calibration.json"
LARGEST = 2**20
"""Bytes of a file that is read; a calibration has a few thousand."""


@dataclass(frozen=True)
class Calibration:
    """A policy, and the network that it was calibrated for.

    Args:
        policy: The policy.
        where: The file, for messages.
        exit_depths: Exit depths of that network.
        class_names: Class names of that network.
        backbone_hash: Hash of its frozen backbone.
        checkpoint_sha256: SHA-256 of its checkpoint; empty for a bundle.
    """

    policy: Policy
    where: str
    exit_depths: tuple[int, ...]
    class_names: tuple[str, ...]
    backbone_hash: str
    checkpoint_sha256: str = ""

    def require_twin(self, exit_depths: tuple[int, ...], class_names: tuple[str, ...], backbone_hash: str) -> None:
        """Check that a network has the exits, classes and backbone of the calibrated one."""
        for what, ours, theirs in (
            ("exits after blocks", list(exit_depths), list(self.exit_depths)),
            ("the classes", list(class_names), list(self.class_names)),
            ("the backbone", backbone_hash[:12], self.backbone_hash[:12]),
        ):
            if ours != theirs:
                raise ValueError(
                    f"the policy of {self.where} was calibrated for a network with {what} {theirs!s:.80}, this one has "
                    f"{ours!s:.80}; give the calibration of a network that differs in its training images alone"
                )


def calibration_path(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's calibration: ``last.calibration.json`` for ``last.ckpt``."""
    return checkpoint.with_name(f"{checkpoint.stem}.{RESULT}")


def read_calibration(file: Path) -> Calibration:
    """Read a file that ``calibrate`` wrote."""
    if not file.is_file() or file.stat().st_size > LARGEST:
        raise ValueError(f"{file} is not a calibration: give a file or folder that dynadapter calibrate wrote")
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        policy = restore(content["policy"], Policy, "policy")
        depths = restore(content["costs"]["exit_depths"], tuple[int, ...], "exit_depths")
        names = restore(content["class_names"], tuple[str, ...], "class_names")
        hashes = [restore(content[name], str, name) for name in ("backbone_hash", "checkpoint_sha256")]
        policy.check(len(depths))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); calibrate again") from error
    return Calibration(policy, str(file), depths, names, *hashes)


def calibration_of(checkpoint: Path) -> Calibration | None:
    """Return the calibration of a checkpoint; None if there is none, or the checkpoint has changed since."""
    file = calibration_path(checkpoint)
    if not file.exists():
        return None
    found = read_calibration(file)
    return found if found.checkpoint_sha256 == sha256(checkpoint) else None
