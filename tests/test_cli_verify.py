"""The command ``dynadapter verify``: tables, exit codes, the JSON report, and one line for each mistake."""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from commands import printed
from rich.console import Console
from test_data_verify import make_folder, make_task

from dynadapter.cli import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two tasks, one of them with an image that cannot be read."""
    make_task(tmp_path / "root", "toys")
    (make_task(tmp_path / "root", "games") / "images" / "12.png").write_bytes(b"")
    return tmp_path / "root"


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command and return its exit code, its output, and what it wrote to standard error."""
    code = 0
    try:
        main(["verify", *shlex.split(line)])
    except SystemExit as ending:
        code = ending.code
    written = capsys.readouterr()
    return code, written.out, written.err


def test_data_without_faults_exit_with_0(root, capsys):
    code, out, err = run(f"--data VTAB1k --data.root {root} --data.task toys", capsys)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].strip() == f"VTAB1k, 3 classes, {root}/toys"
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "9", "0", "3", "to", "3", "7x5", "9x5"] in [row[:8] for row in rows]
    assert ["red", "3", "1", "2"] in rows
    assert out.splitlines()[-1] == "0 errors, 0 warnings"


def test_help_is_for_users(capsys):
    text = printed(["verify", "--help"], capsys)
    assert "--data CLASS" in text
    assert "ImageFolder" in text
    assert all(words not in text for words in ("subclass sets", "Optional[", "init_args", "INIT_ARG"))


def test_errors_exit_with_1(root, capsys):
    code, out, _ = run(f"--data=dynadapter.VTAB1k --data.root={root} --data.task=games", capsys)
    assert code == 1
    assert "  error: test: 1 image cannot be read\n      images/12.png: the file is empty\n" in out
    assert out.splitlines()[-1] == "1 error, 0 warnings"


def test_broken_lists_exit_with_2(root, capsys):
    (root / "toys" / "test.txt").write_text("images/12.png\n")
    code, out, err = run(f"--data VTAB1k --data.root {root} --data.task toys", capsys)
    assert (code, out) == (2, "")
    assert "test.txt:1: 'images/12.png' is not 'PATH LABEL'" in err


def test_report_holds_what_the_screen_cuts(root, capsys):
    for k in range(12, 18):
        (root / "games" / "images" / f"{k}.png").unlink()
    line = f"--data VTAB1k --data.root {root} --data.task games --out {root}/report.json"
    code, out, _ = run(line, capsys)
    assert code == 1
    assert "and 1 more; --out report.json lists all\n" in out
    content = json.loads((root / "report.json").read_text())
    assert (content["errors"], content["warnings"], content["data"]) == (1, 0, "VTAB1k")
    assert content["splits"][0]["classes"] == {"red": 3, "green": 3, "blue": 3}
    (finding,) = content["findings"]
    assert finding["items"] == [f"images/{k}.png: No such file or directory" for k in range(12, 18)]
    code, _, err = run(line, capsys)
    assert code == 2
    assert "report.json exists; give a new file" in err


def test_settings_come_from_configs(root, capsys):
    config = {"data": {"class_path": "VTAB1k", "init_args": {"root": str(root), "task": "games", "image_size": 32}}}
    (root / "a.yaml").write_text(yaml.safe_dump(config | {"model": {"every": 3}}))
    assert run(f"-c {root}/a.yaml", capsys)[0] == 1
    assert run(f"-c {root}/a.yaml --data.task toys", capsys)[0] == 0
    (root / "b.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"task": "toys"}}}))
    assert run(f"--config {root}/a.yaml --config={root}/b.yaml", capsys)[0] == 0
    make_folder(root / "folder")
    (root / "c.yaml").write_text(yaml.safe_dump({"data": "ImageFolder"}))
    assert run(f"-c {root}/c.yaml --data.root {root}/folder --data.val_fraction 0.3", capsys)[0] == 0


def test_overlay_takes_the_class_of_the_line(root, capsys):
    make_folder(root / "folder")
    code, out, err = run(f"-c augment --data ImageFolder --data.root {root}/folder", capsys)
    assert (code, err) == (0, "")
    assert out.startswith("ImageFolder")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", "augment", "--data=ImageFolder", f"--data.root={root}/folder", "--print_config"])
    assert ended.value.code in (0, None)
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert (data["class_path"], data["init_args"]["cache"]) == ("dynadapter.ImageFolder", False)


@pytest.mark.parametrize("more", ["-c {R}/one.yaml", "--data.class_path ImageFolder --data.root {R}/folder"])
def test_class_after_an_overlay(more, root, capsys):
    make_folder(root / "folder")
    config = {"data": {"class_path": "ImageFolder", "init_args": {"root": str(root / "folder"), "val_fraction": 0.5}}}
    (root / "one.yaml").write_text(yaml.safe_dump(config))
    line = f"-c augment {more.replace('{R}', str(root))}"
    code, out, err = run(line, capsys)
    assert (code, err) == (0, "")
    assert out.startswith("ImageFolder")
    with pytest.raises(SystemExit):
        main(["fit", *shlex.split(line), "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (data["cache"], data["val_fraction"]) == (False, 0.5 if "one.yaml" in more else data["val_fraction"])


@pytest.mark.parametrize("given", ["--data.class_path=ImageFolder", "--data={class_path: ImageFolder}"])
@pytest.mark.parametrize("command", ["fit", "verify"])
def test_class_in_other_spellings(given, command, root, capsys):
    make_folder(root / "folder")
    line = [command, "-c", "augment", given, f"--data.root={root}/folder"]
    with pytest.raises(SystemExit) if command == "fit" else nullcontext():
        main([*line, "--print_config"] if command == "fit" else line)
    assert "ImageFolder" in capsys.readouterr().out


def test_names_are_escaped_on_the_terminal(root, capsys):
    """File names may hold control sequences, and what rich would read as its own markup."""
    (root / "toys" / "images" / "\x1b[31m[red].png").write_bytes(b"")
    (root / "toys").rename(root / "[bold]toys")
    _, out, _ = run(f"--data VTAB1k --data.root {root} --data.task [bold]toys", capsys)
    assert "\x1b" not in out
    assert "images/\\x1b[31m[red].png" in out
    assert out.splitlines()[0].strip().endswith("/[bold]toys")


def test_terminal_shows_a_progress_bar(root, capsys, monkeypatch):
    console = Console(force_terminal=True, width=100, record=True, stderr=True)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    assert run(f"--data VTAB1k --data.root {root} --data.task toys", capsys)[0] == 0
    assert "18/18" in console.export_text()


MISTAKES = [
    ("", "data is missing; give a config file with a data section, or --data"),
    ("--data VTAB", "data cannot be 'VTAB'; did you mean 'VTAB1k'?"),
    ("--data", "--data needs a value"),
    ("--data VTAB1k", "data: root and task must be given"),
    ("--data VTAB1k --data.rot {R}", "data: there is no setting 'rot'; did you mean 'root'?"),
    ("--dta VTAB1k", "there is no key 'dta'; did you mean 'data'?"),
    ("--data VTAB1k --data.root {R}/no --data.task toys", "{R}/no does not exist or is not a folder"),
    ("--data VTAB1k --data.root {R} --data.task toy", "there are: games, toys; did you mean toys?"),
    ("--data VTAB1k --data.root {R}/toys --data.task toys", "set root to {R} and task to toys"),
    ("--data ImageFolder --data.root {R}", "but root contains: games, toys"),
    ("--data ImageFolder --data.root {R} --data.task toys", "has no setting 'task'; VTAB1k has it"),
    ("--data ImageFolder --data.root {F} --data.val_fraction 2", "val_fraction must lie in [0, 1), not 2.0"),
    ("--data ImageFolder --data.root {F} --data.val_fraction half", "expected a number, not 'half'"),
    ("--data ImageFolder --data.root {F} --threads 0", "threads=0 must be at least 1"),
    ("--data ImageFolder --data.root {F} --threads many", "threads: expected a whole number, not 'many'"),
    ("--data ImageFolder --data.root {F} --thread 2", "there is no key 'thread'; did you mean 'threads'?"),
    ("--data ImageFolder --data.root {F} --out {R}", "{R} exists; give a new file"),
    ("--data ImageFolder --data.root {F} --out {R}/no/r.json", "folder {R}/no does not exist; create it first"),
    ("-c {R}/no.yaml", "there is no config file '{R}/no.yaml'"),
    ("-c", "-c needs a file"),
    ("-c {R}/none.yaml", "has no data section"),
    ("-c augment --data.root {F}", "give --data CLASS before its settings"),
    ("-c {R}/type.yaml", "root: Not of type Path"),
    ("toys --data ImageFolder --data.root {F}", "'toys' belongs to no setting"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_mistakes_are_one_line(line, words, root, capsys):
    make_folder(root.parent / "folder")
    (root / "none.yaml").write_text("model: {every: 3}")
    (root / "type.yaml").write_text("data: {class_path: VTAB1k, init_args: {root: [3], task: a}}")
    for key, place in {"{R}": str(root), "{F}": str(root.parent / "folder")}.items():
        line, words = line.replace(key, place), words.replace(key, place)
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("dynadapter: error: ")
    assert words in err


def test_debug_shows_the_traceback(root):
    with pytest.raises(ValueError, match="no task toy"):
        main(["verify", "--data", "VTAB1k", "--data.root", str(root), "--data.task", "toy", "--debug"])
