"""Config files by name, the short help, and answers that load neither torch nor Lightning."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from commands import printed, refused
from conftest import raises_one_line

from dynadapter.cli import COMMANDS, TRAINER, main
from dynadapter.cli.configs import find_config, read_config
from dynadapter.cli.errors import Mistake
from dynadapter.cli.help import ESSENTIAL
from dynadapter.limits import read_yaml

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


# ---- found by name


@pytest.mark.parametrize("name", ["lora", "lora.yaml"])
def test_packaged_config_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).read_text() == (CONFIGS / "lora.yaml").read_text()


@pytest.mark.parametrize("name", ["lora", "lora.yaml"])
def test_local_config_wins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.yaml").write_text("model: {every: 2}")
    assert find_config(name) == Path("lora.yaml")
    assert read_config(name, ()) == {"model": {"every": 2}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lroa", r"'lroa'; did you mean 'lora'\? .*: lora, "),
        ("vtabb.yaml", r"'vtabb.yaml'; did you mean 'vtab'\?"),
        ("nothing/lora.yaml", r"there is no config file 'nothing/lora.yaml'; configs that come .*: lora, "),
        (".", "not a file"),
    ],
)
def test_unknown_config_lists_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match=message):
        find_config(name)


def test_wheel_holds_the_configs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["configs"] == "dynadapter/configs"


def test_configs_lists_names_with_comments(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {file.stem for file in CONFIGS.glob("*.yaml")}
    assert all(len(line.split()) > 3 for line in lines)


def test_configs_prints_one(capsys):
    main(["configs", "vtab"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load((CONFIGS / "vtab.yaml").read_text())


@pytest.mark.parametrize("args", [["nope"], ["vtab", "lora"], ["--all"]])
def test_configs_with_invalid_arguments(args, capsys):
    assert refused(["configs", *args], capsys).startswith("dynadapter: error: ")


# ---- answers without torch


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 0, "usage: dynadapter COMMAND"),
        (["--help"], 0, "usage: dynadapter COMMAND"),
        (["--version"], 0, "dynadapter "),
        (["fti"], 2, "did you mean 'fit'"),
        (["configs"], 0, "vtab"),
        *(
            ([command, "-c", "nowhere.yaml"], 2, "no config file 'nowhere.yaml'")
            for command in COMMANDS
            if command != "configs"
        ),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_answer_loads_no_torch(args, code, words):
    program = (
        "import sys; from dynadapter.cli import main\n"
        f"try: main({args!r})\nexcept SystemExit as ending: print(ending.code)\n"
        "print([name for name in ('torch', 'lightning', 'timm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert words in done.stdout + done.stderr
    assert done.stdout.endswith(f"{code}\n[]\n" if code else "[]\n")


def test_usage_names_every_command(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)


# ---- the short help of a command


@pytest.mark.parametrize("command", TRAINER)
def test_help_fits_on_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed([command, "--help"], capsys)
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"--{key}" in text for key in ("ckpt_path", "model.adapter", "data", "trainer.devices"))
    assert ("--sparsity.keep" in text) == (command == "fit")


def test_help_names_no_unknown_key(capsys):
    text = printed(["fit", "--help_all"], capsys)
    assert {key for key in ESSENTIAL if f"--{key}" not in text} == set()
    assert "--trainer.num_sanity_val_steps" in text
    assert "dynadapter.LoRA" in text  # by the name that a config may use


# ---- values that are not of their type


@pytest.mark.parametrize(
    "value",
    ["!!bool maybe", "!!int ''", "!!timestamp x", "2024-13-45", "9" * 5000, "1:" * 300 + "1.5", "'!!timestamp x: '"],
)
def test_value_that_yaml_cannot_read(value, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(f"model: {{weights: {value}}}")
    with raises_one_line(ValueError, match=r"config file .*odd\.yaml (is|has a text that is) not valid YAML: "):
        read_yaml(path)


# ---- short options


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("--epochs 7", "--trainer.max_epochs 7"),
        ("--lr=3e-3 --batch_size 5", "--model.optimizer.lr=3e-3 --data.batch_size 5"),
        ("--threshold 0.8", '--early_exit.policies=[{"class_path":"Confidence","init_args":{"threshold":0.8}}]'),
        (
            "--threshold=[0.9,0.8,0.7]",
            '--early_exit.policies=[{"class_path":"Confidence","init_args":{"threshold":[0.9,0.8,0.7]}}]',
        ),
    ],
)
def test_short_options_are_long_ones(short, long, capsys):
    configs = []
    for line in (short, long):
        configs.append(yaml.safe_load(printed(["fit", "--data=Shapes", *line.split(), "--print_config"], capsys)))
    assert configs[0] == configs[1]
    assert configs[0] != yaml.safe_load(printed(["fit", "--data=Shapes", "--print_config"], capsys))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "fit --data=Shapes --threshold high",
            "early_exit.policies.threshold: expected a number or a list, not 'high'",
        ),
        ("fit --data=Shapes --epochs", "--trainer.max_epochs needs a value"),
        ("flops --data=Shapes --epochs 3", "there is no key 'epochs'"),
    ],
)
def test_wrong_short_options_are_one_line(line, words, capsys):
    assert words in refused(line.split(), capsys)
