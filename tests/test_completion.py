"""Completion in a shell: bash itself completes words with the script that the program prints."""

import shutil
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from commands import refused

from dynadapter.cli import COMMANDS, completion, main
from dynadapter.cli.arguments import CALLBACKS, SECTIONS
from dynadapter.spec import Spec

pytest.importorskip("shtab", reason="shtab, which writes the script, is not installed")
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def printed(*args: str) -> str:
    with redirect_stdout(StringIO()) as out:
        main(list(args))
    return out.getvalue()


@pytest.fixture(scope="module")
def script() -> str:
    return printed("--print_shtab=bash")


def completed(script: str, line: str, folder: Path) -> set[str]:
    """Return what bash offers for the last word of a command line."""
    words = line.split(" ")
    asked = f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; _shtab_dynadapter"
    code = f"{script}\n{asked}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash"], input=code, capture_output=True, text=True, check=True, cwd=folder)
    assert all("compopt" in line for line in done.stderr.splitlines())  # which needs a terminal
    return set(done.stdout.split())


ADAPTERS = "AdaptFormer Adapter AdapterPlus BitFit ByBlocks Convpass DoRA FacT LoRA Peft RepAdapter SSF VPT"


@bash
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dynadapter f", {"fit", "flops"}),
        ("dynadapter ", {*COMMANDS}),
        ("dynadapter fit --model.adapter ", {*ADAPTERS.split()}),
        ("dynadapter fit --model.adapter.ra", {"--model.adapter.rank", "--model.adapter.ranges"}),
        ("dynadapter fit --model.heads MLP", {"MLPHeads"}),
        ("dynadapter fit --model.pretrained ", {"true", "false"}),
        ("dynadapter fit --sparsity.masked ", {"frozen", "gradient"}),
        ("dynadapter fit --epo", {"--epochs"}),
        ("dynadapter fit -c vtab_", {"vtab_scales"}),
        ("dynadapter fit --config here", {"here.yaml", "here"}),
        ("dynadapter calibrate --goal.a", {"--goal.accuracy_drop"}),
        ("dynadapter train h", {"here"}),
        ("dynadapter train here --co", {"--config", "--cost"}),
        ("dynadapter test --bundle h", {"here", "here.yaml"}),
        ("dynadapter predict --device ", {"auto", "cpu", "cuda"}),
        ("dynadapter configs quick", {"quickstart"}),
        ("dynadapter sweep h", {"here", "here.yaml"}),
    ],
)
def test_bash_completes(script, line, offered, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here.yaml").touch()
    of_tests = {kind.__name__ for kind in subclasses(Spec) if not kind.__module__.startswith("dynadapter.")}
    assert completed(script, line, tmp_path) - of_tests == offered


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(one) for one in kind.__subclasses__()))


@pytest.mark.parametrize("command", ["fit", "calibrate", "test", "train"])
def test_keys_of_all_sections_are_offered(command):
    parser = completion.program()._subparsers._group_actions[0].choices[command]
    keys = {name.removeprefix("--") for name in parser._option_string_actions}
    assert {*SECTIONS} | {*CALLBACKS} <= keys | {key.partition(".")[0] for key in keys}


def test_zsh_script_has_every_command():
    script = printed("fit", "--print_shtab", "zsh")
    assert script.startswith("#compdef dynadapter")
    assert all(f"_shtab_dynadapter_{command}_options" in script for command in COMMANDS)


@pytest.mark.parametrize("args", [["--print_shtab=fish"], ["--print_shtab"]])
def test_other_shell_is_one_line(args, capsys):
    assert "choose from bash, zsh" in refused(args, capsys)


def test_missing_shtab_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert "pip install 'dynadapter[complete]'" in refused(["--print_shtab=bash"], capsys)
