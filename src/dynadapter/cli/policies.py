"""Read the policy that ``--policy_from`` names: from a calibration, a calibrated checkpoint or run, or a bundle."""

import os
from pathlib import Path

from dynadapter.calibrate.stored import RESULT, Calibration, calibration_path, read_calibration
from dynadapter.cli.errors import Mistake, mistakes


def policy_from(place: str) -> Calibration:
    """Return the policy of a place, with the network for which it was calibrated.

    Args:
        place: A folder that calibrate wrote, its ``calibration.json``, a bundle (also ``hf-hub:``), a calibrated
            checkpoint, or the run of one.
    """
    from dynadapter.cli.resume import checkpoint_folder
    from dynadapter.serve.bundle.hub import HUB, local

    path = Path(os.path.expanduser(place))
    with mistakes("policy_from: "):
        if place.startswith(HUB):
            return _of_bundle(local(place))
        if (path / "config.json").is_file():
            return _of_bundle(path)
        saved = checkpoint_folder(path) if (path / "config.yaml").is_file() else path / "checkpoints"
        runs = sorted(saved.glob(f"*.{RESULT}"), key=lambda file: file.stat().st_mtime)
        for file in (path / RESULT, calibration_path(path) if path.suffix == ".ckpt" else path, *runs[-1:]):
            if file.is_file():
                return read_calibration(file)
    raise Mistake(
        f"policy_from={place} holds no calibration; give a folder that dynadapter calibrate wrote, a bundle, or a "
        "checkpoint or run that was calibrated"
    )


def _of_bundle(folder: Path) -> Calibration:
    from dynadapter.serve.bundle.reading import read

    config, _ = read(folder)
    names = tuple(config.class_names)
    return Calibration(config.policy, str(folder), tuple(config.exit_depths), names, config.backbone.fingerprint)
