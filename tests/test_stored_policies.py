"""Which exit policy a command uses: given, named, calibrated beside the checkpoint, the training's, or the default."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused
from test_cli_calibrate import QUIET
from tiny import make_classifier, write_checkpoint

from dynadapter import load
from dynadapter.calibrate.stored import calibration_of, calibration_path
from dynadapter.cli import main
from dynadapter.cli.policies import policy_from
from dynadapter.data import Shapes
from dynadapter.exits.policies import Confidence, Margin, Never, Policy
from dynadapter.spec import plain, restore
from dynadapter.training.callbacks import EarlyExit
from dynadapter.training.restoring import load_classifier, stored_policies


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "a.png"
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def change(path: Path, **changes: Any) -> None:
    held = torch.load(path, weights_only=True)
    held["dynadapter"] |= changes
    torch.save(held, path)


def test_training_policies_are_in_its_checkpoint(tmp_path: Path) -> None:
    given = [Margin(0.25), Confidence((0.5, 0.75))]
    module, path = make_classifier(), tmp_path / "a.ckpt"
    write_checkpoint(module, path, EarlyExit(given), weights_only=True)  # without the state of callbacks
    assert stored_policies(path) == (tuple(given), "the training's")
    change(path, policies=[])
    assert stored_policies(path) == ((Confidence(0.9),), "the default")
    change(path, policies=[{"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "made")}}])
    with pytest.raises(ValueError, match=r"there is no Policy 'os\.mkdir'"):
        stored_policies(path)
    assert not (tmp_path / "made").exists()


def test_commands_use_the_training_policies(checkpoint, photo, tmp_path, capsys):
    change(checkpoint, policies=[plain(Margin(0.0)), plain(Never())])
    main(["test", "--ckpt_path", str(checkpoint), *QUIET])
    assert "exit policies margin_0, never (the training's)" in capsys.readouterr().out
    main(["test", "--ckpt_path", str(checkpoint), *QUIET, "--early_exit.policies=[{class_path: Never}]"])
    assert "exit policies never (as given)" in capsys.readouterr().out
    main(["predict", "--ckpt_path", str(checkpoint), f"--images={photo}", f"--out={tmp_path / 'a.csv'}"])
    assert "exit policy margin_0 (the training's)" in capsys.readouterr().out
    with (tmp_path / "a.csv").open() as file:
        assert [row["exit"] for row in csv.DictReader(file)] == ["1"]


def test_calibrated_policy_is_used(checkpoint, photo, tmp_path, capsys, recwarn):
    out = tmp_path / "out"
    main(["calibrate", "--ckpt_path", str(checkpoint), *QUIET, "--goal.cost=0.9", "--combine=own", f"--out={out}"])
    near = checkpoint.with_name("last.calibration.json")
    assert near.read_bytes() == (out / "calibration.json").read_bytes()
    policy = restore(json.loads(near.read_text())["policy"], Policy)
    assert f"beside the checkpoint for predict and test: {near}" in capsys.readouterr().out
    main(["predict", "--ckpt_path", str(checkpoint), f"--images={photo}", f"--out={tmp_path / 'a.csv'}"])
    assert f"exit policy {policy.name} (calibrated: {near})" in capsys.readouterr().out
    main(["test", "--ckpt_path", str(checkpoint), *QUIET])
    printed = capsys.readouterr().out
    assert re.search(rf"exit policies {re.escape(policy.name)}, .*\(calibrated: {re.escape(str(near))}\)", printed)
    shares = [row for row in printed.splitlines() if policy.name in row and "/" in row and "│" in row]
    assert shares  # measured, too
    change(checkpoint, policies=[plain(Never())])  # another checkpoint by now
    assert calibration_of(checkpoint) is None
    with pytest.warns(UserWarning, match="has changed since it was calibrated"):
        assert stored_policies(checkpoint).policies == (Never(),)
    # named: whatever lies beside the checkpoint
    assert all(policy_from(str(place)).policy == policy for place in (out, near, checkpoint, checkpoint.parent.parent))
    main(["validate", "--ckpt_path", str(checkpoint), *QUIET, "--policy_from", str(out)])
    assert f"exit policies {policy.name} (" in capsys.readouterr().out
    near.write_text("{}")
    with pytest.raises(ValueError, match=r"last.calibration.json is damaged .*; calibrate again"):
        stored_policies(checkpoint)


def test_policy_from_its_twin(checkpoint, tmp_path, capsys):
    """The twin was trained on the validation images too, which cannot calibrate it."""
    first = tmp_path / "first"
    main(["calibrate", "--ckpt_path", str(checkpoint), *QUIET, "--goal.cost=0.9", f"--bundle={first}"])
    policy = load(first).policy
    twin = checkpoint.with_name("twin.ckpt")
    held = torch.load(checkpoint, weights_only=True)
    held["state_dict"] = {name: 1.01 * x if x.is_floating_point() else x for name, x in held["state_dict"].items()}
    torch.save(held, twin)
    capsys.readouterr()
    for number, place in enumerate((checkpoint, first, checkpoint.parents[2] / "calibrate_0")):
        second = tmp_path / f"second_{number}"
        args = ["calibrate", "--ckpt_path", str(twin), *QUIET, "--policy_from", str(place), f"--bundle={second}"]
        main([*args, f"--merge={'true' if number == 2 else 'false'}"])
        assert "nothing was measured for this network" in capsys.readouterr().out
        bundle = load(second)
        assert bundle.policy == policy
        assert "accuracy" not in bundle.config.measured
    images = torch.stack([Shapes(image_size=32, normalization="half").dataset("val")[i][0] for i in range(8)])
    net = load_classifier(twin).net
    with torch.no_grad():
        torch.testing.assert_close(bundle.net(images), net(images), atol=1e-4, rtol=1e-4)  # its own tensors
    assert stored_policies(twin).policies[0] == policy
    change(twin, backbone_hash="0" * 64)
    content = json.loads(calibration_path(checkpoint).read_text())
    for changes, words in (
        ({"costs": {"exit_depths": [1, 2, 9]}}, "exits after blocks"),
        ({"class_names": ["a"]}, "the classes"),
        ({"backbone_hash": "0" * 64}, "the backbone 000000000000, this one has"),
    ):
        file = tmp_path / "other.json"
        file.write_text(json.dumps(content | changes))
        for command in ("validate", "test", "calibrate"):
            args = [command, "--ckpt_path", str(checkpoint), *QUIET, "--policy_from", str(file)]
            assert words in refused(args, capsys)
    assert "give only one of them" in refused([*args, "--goal.cost=0.5"], capsys)
    assert "holds no calibration" in refused([*args[:-1], str(tmp_path)], capsys)
