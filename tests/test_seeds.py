"""Several seeds: a training for each, gone on with where it was interrupted, and the mean and deviation of all."""

import csv
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dynadapter.cli import main, seeds

TINY = str(Path(__file__).parent / "conf" / "tiny.yaml")
RESULTS = {0: {"val/acc": 0.5, "val/loss": 1.0}, 1: {"val/acc": 0.75, "val/loss": 2.0}, 5: {"val/acc": 0.7}}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for the processes that train; each leaves a finished run, or does what ``happens`` says of its seed."""
    state: dict[str, Any] = {"commands": [], "happens": {}}

    def run(self: Any, command: list[str]) -> int:
        assert command[:3] == [sys.executable, "-m", "dynadapter.cli"]
        state["commands"].append(command[3:])
        options = dict(arg.partition("=")[::2] for arg in command if "=" in arg)
        home = Path(options["--trainer.default_root_dir"])
        seed = int(options["--seed_everything"])
        assert home.name == f"seed_{seed}"
        folder = home / f"version_{len(list(home.glob('version_*')))}"
        folder.mkdir(parents=True)
        happens: Callable[[Any], int] | None = state["happens"].pop(seed, None)
        code = happens(self) if happens else 0
        record = {"how": "failed", "message": "too\nbad"} if code else {"how": "finished", "results": RESULTS[seed]}
        (folder / "run.json").write_text(json.dumps(record))
        return code

    monkeypatch.setattr(seeds._Children, "run", run)
    return state


def fit(root: Path, *args: str) -> int:
    try:
        main(["fit", "-c", TINY, f"--trainer.default_root_dir={root}", *args])
    except SystemExit as ending:
        return int(ending.code)  # type: ignore[arg-type]
    return 0


def test_mean_and_deviation_of_each_measure(trainings, tmp_path, capsys):
    assert fit(tmp_path, "--seeds", "[0, 1, 5]", "--model.every=2") == 0
    folder = tmp_path / "seeds_0"
    table = json.loads((folder / "summary.json").read_text())["metrics"]
    accuracies = [0.5, 0.75, 0.7]
    assert table["val/acc"]["mean"] == pytest.approx(statistics.fmean(accuracies))
    assert table["val/acc"]["std"] == pytest.approx(torch.tensor(accuracies).std().item())  # with n - 1
    assert (table["val/loss"]["n"], table["val/loss"]["mean"]) == (2, 1.5)
    with (folder / "summary.csv").open(newline="") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    assert (rows["val/acc"]["seed_1"], rows["val/loss"]["seed_5"]) == ("0.75", "")
    out = capsys.readouterr().out
    assert "3 of 3 seeds: 0, 1, 5" in out
    assert "0.65 │ 0.13" in " ".join(out.split())
    assert [command[-1] for command in trainings["commands"]] == ["--seeds=null"] * 3
    assert all("--model.every=2" in command for command in trainings["commands"])


def test_seeds_in_a_config_file(trainings, tmp_path):
    (tmp_path / "seeds.yaml").write_text("seeds: [1, 0]")
    assert fit(tmp_path / "runs", "-c", str(tmp_path / "seeds.yaml")) == 0
    assert {path.name for path in (tmp_path / "runs" / "seeds_0").glob("seed_*")} == {"seed_0", "seed_1"}
    assert fit(tmp_path / "other", "-c", str(tmp_path / "seeds.yaml"), "--seeds=[5]") == 0  # the command line wins
    assert {path.name for path in (tmp_path / "other" / "seeds_0").glob("seed_*")} == {"seed_5"}


def test_one_seed_has_no_deviation():
    assert seeds.summarised({3: {"acc": 0.5}})["acc"]["std"] is None
    nan = seeds.summarised({0: {"acc": 0.5}, 1: {"acc": float("nan")}})["acc"]
    assert nan["mean"] != nan["mean"]
    assert nan["std"] is None


def test_a_seed_that_fails_does_not_keep_the_others(trainings, tmp_path, capsys):
    trainings["happens"][0] = lambda _: 1
    assert fit(tmp_path, "--seeds=[0,1]") == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "dynadapter: error: 1 of 2 trainings failed: seed 0 (exit code 1); the same command runs them again"
    )
    summary = json.loads((tmp_path / "seeds_0" / "summary.json").read_text())
    assert summary["failed"] == {"0": "too bad"}
    assert list(summary["runs"]) == ["1"]
    trainings["commands"].clear()
    assert fit(tmp_path, "--seeds=[0,1]") == 0  # in the same folder, and the other one is not trained again
    assert len(trainings["commands"]) == 1
    assert json.loads((tmp_path / "seeds_0" / "summary.json").read_text())["failed"] == {}
    assert fit(tmp_path, "--seeds=[0,1]") == 0  # all done: a new one, nothing is overwritten
    assert {path.name for path in tmp_path.iterdir()} == {"seeds_0", "seeds_1"}


def test_a_signal_ends_all_of_it(trainings, tmp_path, capsys):
    def terminated(children: Any) -> int:
        children.hand_on(signal.SIGTERM, None)
        return 143

    trainings["happens"][0] = terminated
    assert fit(tmp_path, "--seeds=[0,1]") == 143
    assert "stopped by SIGTERM; give the same command again to go on" in capsys.readouterr().err
    assert len(trainings["commands"]) == 1


def test_other_settings_get_a_folder_of_their_own(trainings, tmp_path):
    trainings["happens"][0] = lambda _: 1
    assert fit(tmp_path, "--seeds=[0]") == 1
    assert fit(tmp_path, "--seeds=[0]", "--model.every=2") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"seeds_0", "seeds_1"}


def test_nobody_else_works_on_the_same_seeds(trainings, tmp_path, capsys):
    pytest.importorskip("fcntl")

    def meanwhile(_: Any) -> int:
        assert fit(tmp_path, "--seeds=[0]") == 2
        assert "is being worked on by another process" in capsys.readouterr().err
        return 0

    trainings["happens"][0] = meanwhile
    assert fit(tmp_path, "--seeds=[0]") == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--seeds=[0,0]"], "name a seed twice"),
        (["--seeds=[-1]"], "must be a list of whole numbers"),
        (["--seeds=many"], "not ['many']"),
        (["--seeds=[0,1.5]"], "such as [0, 1, 2]"),
        (["--seeds=[0]", "--resume=x"], "--seeds goes without --resume"),
        (["--seeds=[0]", "--seed_everything=1"], "--seeds goes without --seed_everything"),
        (["--seeds=[0]", "--model.evry=1"], "did you mean 'model.every'"),
        (["--seeds=[0]", "--trainer.fast_dev_run=true"], "leave nothing"),
    ],
)
def test_mistakes(args, words, trainings, tmp_path, capsys):
    assert fit(tmp_path, *args) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not trainings["commands"]
    assert not list(tmp_path.glob("*"))


@pytest.mark.slow
def test_a_seed_that_was_stopped_is_gone_on_with(tmp_path):
    """The whole of it with real processes: stopped in the first training, and given again."""
    config = yaml.safe_load(Path(TINY).read_text())
    config["trainer"] |= {"max_epochs": 8, "limit_train_batches": 4, "default_root_dir": str(tmp_path / "runs")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "dynadapter.cli", "fit", "-c", str(tmp_path / "tiny.yaml"), "--seeds=[3]"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "seeds_0" / "seed_3" / "version_0"
    while not (run / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 143, errors
    assert json.loads((run / "run.json").read_text())["how"] == "stopped"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fit --resume {run}" in done.stdout
    summary = json.loads((tmp_path / "runs" / "seeds_0" / "summary.json").read_text())
    assert summary["runs"] == {"3": str(run.with_name("version_1"))}
    resumed = json.loads((run.with_name("version_1") / "run.json").read_text())
    assert (resumed["seed"], resumed["how"]) == (3, "finished")
    assert summary["metrics"]["val/acc"]["mean"] == resumed["results"]["val/acc"]
