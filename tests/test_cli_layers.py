"""The layers of a configuration: paths in the home folder, parts that are switched off, classes that change."""

from pathlib import Path

import pytest
import yaml
from commands import TINY, printed, refused
from jsonargparse import get_loader

from dynadapter.cli import main
from dynadapter.cli.layers import TRAINING, without_training


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder, and an empty current folder beside it."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # that of the resumed run
def test_tilde_is_the_home_folder(home):
    Path("root.yaml").write_text("trainer: {default_root_dir: ~/runs}")
    main(["fit", "-c", TINY, "-c", "root.yaml", "--checkpoint.dirpath=~/saved"])
    main(["fit", "--resume=~/runs/version_0", "-c", "~/runs/version_0/config.yaml", "--epochs=2"])
    main(["fit", "-c", TINY, "--init_from=~/saved/last.ckpt", "--trainer.default_root_dir=~/runs"])
    main(["test", "--ckpt_path=~/saved/last.ckpt", "--trainer.default_root_dir=~/runs"])
    main(["calibrate", "--ckpt_path=~/saved/last.ckpt", "--goal.cost=0.9", "--out=~/found", "--bundle=~/bundle"])
    assert {path.name for path in home.iterdir()} >= {"runs", "saved", "found", "bundle"}
    assert {path.name for path in (home / "runs").iterdir()} >= {"version_0", "version_1", "version_2", "test_0"}
    assert [path.name for path in Path().iterdir()] == ["root.yaml"]
    assert yaml.safe_load((home / "runs/version_0/config.yaml").read_text())["checkpoint"]["dirpath"].startswith("/")


@pytest.mark.parametrize("more", [[], ["--sparsity.seed=3"]])
def test_printed_config_has_parts_that_are_off(more, capsys):
    config = yaml.safe_load(printed(["fit", "-c", TINY, "--sparsity", "null", *more, "--print_config"], capsys))
    assert config["sparsity"] is None
    assert config["checkpoint"]["filename"] == "last"


def test_text_like_a_number_stays_text(tmp_path, capsys):
    """YAML has several forms of numbers; PyYAML writes ``1e3`` as jsonargparse reads a number."""
    names = ["--data=ImageFolder", "--data.root=1e3", "--trainer.default_root_dir=-2E+4"]
    text = printed(["fit", "-c", TINY, *names, "--model.optimizer.lr=1e-5", "--print_config"], capsys)
    (tmp_path / "saved.yaml").write_text(text)
    config = yaml.safe_load(text)
    assert (config["data"]["init_args"]["root"], config["trainer"]["default_root_dir"]) == ("1e3", "-2E+4")
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-5
    assert printed(["fit", "-c", str(tmp_path / "saved.yaml"), "--print_config"], capsys) == text
    file, read = str(tmp_path / "saved.yaml"), get_loader("yaml")
    [layer], _ = without_training([file], {file: config})  # for the other commands
    assert read(layer) == {key: value for key, value in read(text).items() if key not in TRAINING}


WEIGHTED = "--exit_weights.weighting=LateToEarly --exit_weights.weighting.floor=0.2"
LORA = {"class_path": "LoRA", "init_args": {"targets": ["blocks.*.mlp.fc1"], "scale": 4}}


@pytest.mark.parametrize(
    "args",
    [
        ["--model.adapter", "RepAdapter"],
        ["--model.adapter.class_path", "RepAdapter"],
        ["--model.adapter", "dynadapter.RepAdapter"],
        ["--model.adapter", "{class_path: RepAdapter}"],
        ["--model", "{adapter: {class_path: RepAdapter}}"],
        ["--model", "{adapter: RepAdapter}"],
        ["-c", "other.yaml"],
    ],
)
def test_other_class_keeps_no_argument(args, home, capsys):
    Path("lora.yaml").write_text(yaml.safe_dump({"model": {"adapter": LORA}}))
    Path("other.yaml").write_text("model: {adapter: {class_path: RepAdapter}}")
    command = ["fit", "-c", TINY, "-c", "lora.yaml", *args, "--model.adapter.dropout=0.2", "--print_config"]
    adapter = yaml.safe_load(printed(command, capsys))["model"]["adapter"]
    assert adapter["class_path"] == "dynadapter.RepAdapter"
    assert adapter["init_args"] == {
        "scale": 1.0,
        "dropout": 0.2,
        "targets": [],
        "bottleneck": 8,
        "groups": 2,
        "bias": True,
        "placement": "block",
    }


@pytest.mark.parametrize(
    ("args", "key", "kept"),
    [
        ("--model.adapter.rank=3 --model.adapter=LoRA", "model.adapter", {"rank": 3}),
        ("--model.adapter.dropout=0.2 --model.adapter=RepAdapter", "model.adapter", {"dropout": 0.2, "targets": []}),
        ("--model.heads=Balanced --model.heads.hidden=9 --model.heads=MLPHeads", "model.heads", {"hidden": 64}),
        ("--model.heads.queries=3 --model.heads=Attentive", "model.heads", {"queries": 3}),
        ("--model.lr_schedule=Warmup --model.lr_schedule.then.end=0.5", "model.lr_schedule", {"fraction": 0.1}),
        (WEIGHTED + " --exit_weights.weighting=EarlyToLate", "exit_weights.weighting", {"floor": 0.1}),
        ("--model.optimizer.lr=0.5 --model.optimizer=torch.optim.SGD", "model.optimizer", {"lr": 0.5}),
        ("--data.batch_size=7 --data=ImageFolder --data.root=x", "data", {"batch_size": 7}),
    ],
)
def test_class_keeps_its_arguments(args, key, kept, capsys):
    config = yaml.safe_load(printed(["fit", "-c", TINY, *args.split(), "--print_config"], capsys))
    for part in key.split("."):
        config = config[part]
    assert config["init_args"].items() >= kept.items()


@pytest.mark.parametrize(
    "args",
    ["--model.lr_schedule Cosine --model.lr_schedule.end 0.01", "--model.lr_schedule.then Linear"],
)
def test_schedule_of_another_class_needs_its_start(args, home, capsys):
    assert "start" in refused(["fit", "-c", TINY, *args.split()], capsys)


def test_config_of_a_run_in_other_commands(tiny_run, capsys):
    for command in ("test", "calibrate", "flops"):
        line = [command, "-c", tiny_run / "config.yaml", "--ckpt_path", tiny_run / "checkpoints" / "last.ckpt"]
        config = yaml.safe_load(printed([*line, "--print_config"], capsys))
        assert config["trainer"]["limit_test_batches"] == 2
        assert "resume" not in config


def test_policy_needs_early_exit(tiny_run, capsys):
    checkpoint = tiny_run / "checkpoints" / "last.ckpt"
    line = refused(["test", "--ckpt_path", checkpoint, "--early_exit=null", "--policy_from=x"], capsys)
    assert "early_exit is off; leave one of them out" in line
