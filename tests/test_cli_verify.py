"""``dynadapter verify`` as its user sees it: tables, exit codes, reports, and a line for each mistake."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_data_verify import make_folder, make_task

from dynadapter.cli import main
from dynadapter.cli import verify as command
from dynadapter.data.report import check_report


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two tasks, one of them with an image that cannot be read."""
    make_task(tmp_path / "root", "toys")
    (make_task(tmp_path / "root", "games") / "images" / "12.png").write_bytes(b"")
    return tmp_path / "root"


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Runs the command; gives the exit code, what it printed and what it said of errors."""
    code = 0
    try:
        main(["verify", *shlex.split(line)])
    except SystemExit as ending:
        code = ending.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_what_is_whole_is_zero(root, capsys):
    code, out, err = run(f"--data VTAB1k --data.root {root} --data.task toys", capsys)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].strip() == "toys, 3 classes"
    rows = {line.split()[0]: line.split() for line in out.splitlines()[4:8]}
    assert rows["train800"][1:7] == ["9", "9", "3", "7x5", "9x5", "RGB"]
    assert set(rows) == {"train800", "val200", "train800val200", "test"}
    assert out.splitlines()[-1] == "no error, 0 warnings"


def test_an_error_is_one(root, capsys):
    code, out, _ = run(f"--data=dynadapter.VTAB1k --data.root={root}", capsys)
    assert code == 1
    assert "  error: test: 1 image cannot be read\n      images/12.png: the file is empty\n" in out
    assert "none of the 19 tasks of VTAB-1k is there" in out
    assert out.splitlines()[-1] == "1 error, 0 warnings; --out report.json writes down all that they name"


def test_only_what_is_missing_of_the_nineteen_is_listed(root, capsys):
    (root / "toys").rename(root / "svhn")
    _, out, _ = run(f"--data VTAB1k --data.root {root}", capsys)
    assert "18 of the 19 tasks of VTAB-1k are missing: cifar, caltech101," in out


def test_a_long_list_is_cut_on_the_screen_and_whole_in_the_report(root, capsys):
    for k in range(12, 18):
        (root / "games" / "images" / f"{k}.png").unlink()
    report = root / "report.json"
    code, out, _ = run(f"--data VTAB1k --data.root {root} --out {report}", capsys)
    assert code == 1
    assert "test.txt:5: images/16.png\n      and 1 more\n" in out
    assert out.splitlines()[-2:] == ["1 error, 0 warnings", f"report in {report}"]
    content = check_report(json.loads(report.read_text()))
    assert (content["errors"], content["warnings"], content["data"]) == (1, 0, "VTAB1k")
    (fault,) = content["sets"][0]["faults"]
    assert fault["items"] == [f"test.txt:{k - 11}: images/{k}.png" for k in range(12, 18)]


def test_a_report_is_compared_and_never_lost(root, capsys):
    line = f"--data VTAB1k --data.root {root} --data.task toys --out {root}/report.json"
    assert run(line, capsys)[0] == 0
    before = (root / "report.json").read_bytes()
    code, _, err = run(line, capsys)
    assert code == 2
    assert "report.json exists; give another --out, or --overwrite true to replace it" in err
    expect = f"--data VTAB1k --data.root {root} --data.task toys --expect {root}/report.json"
    assert run(expect, capsys)[:2][0] == 0
    text = (root / "toys" / "test.txt").read_text()
    (root / "toys" / "test.txt").write_text(text.replace("images/12.png 0", "images/12.png 1"))
    code, out, _ = run(expect, capsys)
    assert code == 1
    assert "error: test: not the data as then, hash " in out
    assert (root / "report.json").read_bytes() == before
    assert run(f"{line} --overwrite true", capsys)[0] == 0
    assert (root / "report.json").read_bytes() != before


def test_settings_of_a_config(root, capsys):
    config = {"data": {"class_path": "VTAB1k", "init_args": {"root": str(root), "task": "games", "image_size": 32}}}
    (root / "a.yaml").write_text(yaml.safe_dump(config | {"model": {"every": 3}}))
    assert run(f"-c {root}/a.yaml", capsys)[0] == 1
    assert run(f"-c {root}/a.yaml --data.task toys", capsys)[0] == 0
    (root / "b.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"task": "toys"}}}))
    assert run(f"--config {root}/a.yaml --config={root}/b.yaml", capsys)[0] == 0
    make_folder(root / "folder")
    (root / "c.yaml").write_text(yaml.safe_dump({"data": "ImageFolder"}))
    assert run(f"-c {root}/c.yaml --data.root {root}/folder --data.val_fraction 0.3", capsys)[0] == 0


def test_strange_names_do_not_reach_the_terminal(root, capsys):
    """Names of files may hold control sequences, and what rich would take for its own markup."""
    (root / "toys" / "images" / "\x1b[31m[red].png").write_bytes(b"")
    (root / "toys").rename(root / "[bold]toys")
    _, out, _ = run(f"--data VTAB1k --data.root {root} --data.task [bold]toys", capsys)
    assert "\x1b" not in out
    assert "images/\\x1b[31m[red].png" in out
    assert out.splitlines()[0].strip() == "[bold]toys, 3 classes"


def test_a_terminal_sees_a_bar(root, capsys, monkeypatch):
    seen = Console(force_terminal=True, width=100, record=True, stderr=True)
    monkeypatch.setattr(command, "error_console", lambda: seen)
    assert run(f"--data VTAB1k --data.root {root} --data.task toys", capsys)[0] == 0
    assert "18/18" in seen.export_text()


TABLE = [
    ("", "data is missing; give --data VTAB1k or --data ImageFolder"),
    ("--data VTAB", "data: expected one of VTAB1k, ImageFolder, not 'VTAB'; did you mean 'VTAB1k'?"),
    ("--data.class_path Foo", "data: expected one of VTAB1k, ImageFolder, not 'Foo'"),
    ("--data Shapes", "data: expected one of VTAB1k, ImageFolder, not 'Shapes'"),
    ("--data", "--data needs a value"),
    ("--data VTAB1k", "data.root is missing; give --data.root, the folder that holds the tasks"),
    ("--data ImageFolder", "data.root is missing; give --data.root, the folder that holds train"),
    ("--data VTAB1k --data.rot {R}", "there is no key 'data.rot'; did you mean 'data.root'?"),
    ("--dta VTAB1k", "there is no key 'dta'"),
    ("--data VTAB1k --data.root", "--data.root needs a value"),
    ("--data VTAB1k --data.root {R}/no", "{R}/no does not exist or is no folder"),
    ("--data VTAB1k --data.root {R} --data.task toy", "no task toy in {R}; there are: games, toys; did you mean toys?"),
    ("--data VTAB1k --data.root {R}/toys", "itself holds the lists of a task: set root to {R} and task to toys"),
    ("--data VTAB1k --data.root {R}/toys/images", "holds VTAB lists such as cifar/train800.txt"),
    ("--data ImageFolder --data.root {R}", "for lists such as train800.txt give --data VTAB1k"),
    ("--data ImageFolder --data.root {R} --data.task toys", "ImageFolder has no setting 'task'; leave out --data.task"),
    ("--data VTAB1k --data.root {R} --data.split_seed 1", "VTAB1k has no setting 'split_seed'"),
    ("--data ImageFolder --data.root {F} --data.val_fraction 2", "val_fraction must lie in [0, 1), not 2.0"),
    ("--data ImageFolder --data.root {F} --data.val_fraction half", "data.val_fraction: expected a number, not 'half'"),
    ("--data VTAB1k --data.root {R} --threads 0", "threads=0 must be at least 1"),
    ("--data VTAB1k --data.root {R} --threads many", "threads: expected a whole number, not 'many'"),
    ("--data VTAB1k --data.root {R} --thread 2", "there is no key 'thread'; did you mean 'threads'?"),
    ("--data VTAB1k --data.root {R} --out {R}", "is a folder; give a file, such as {R}/report.json"),
    ("--data VTAB1k --data.root {R} --out {R}/no/r.json", "there is no folder {R}/no; make it first"),
    ("--data VTAB1k --data.root {R} --expect {R}/no.json", "cannot be read: No such file or directory"),
    ("--data VTAB1k --data.root {R} --expect {R}/empty.json", "is no report of verify: Expecting value"),
    ("--data VTAB1k --data.root {R} --expect {R}/list.json", "is no report of verify: it was not written by"),
    ("--data VTAB1k --data.root {R} --expect {R}/deep.json", "is no report of verify"),
    ("-c {R}/no.yaml", "there is no config file '{R}/no.yaml'"),
    ("-c", "-c needs a value"),
    ("-c {R}/wrong.yaml", "data cannot be 'Shapes'; verify checks VTAB1k and ImageFolder"),
    ("-c {R}/none.yaml", "has no data section"),
    ("-c {R}/type.yaml", "data.root cannot be 3"),
    ("toys", "'toys' belongs to no setting; settings are given as --KEY VALUE"),
]


@pytest.mark.parametrize(("line", "words"), TABLE)
def test_a_mistake_is_one_line(line, words, root, capsys):
    make_folder(root.parent / "folder")
    for name, content in {
        "empty.json": "",
        "list.json": "[]",
        "deep.json": "[" * 100_000,
        "wrong.yaml": "data: Shapes",
        "none.yaml": "model: {every: 3}",
        "type.yaml": "data: {class_path: VTAB1k, init_args: {root: 3}}",
    }.items():
        (root / name).write_text(content)
    places = {"{R}": str(root), "{F}": str(root.parent / "folder")}
    for key, place in places.items():
        line, words = line.replace(key, place), words.replace(key, place)
    code, out, err = run(line, capsys)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("dynadapter: error: ")
    assert words in err


def test_debug_shows_where(root):
    with pytest.raises(ValueError, match="no task toy"):
        main(["verify", "--data", "VTAB1k", "--data.root", str(root), "--data.task", "toy", "--debug"])


def test_a_slip_of_the_pen_is_answered_without_torch():
    code = "import sys\nfrom dynadapter.cli import main\ntry: main(['verify', '--help'])\nexcept SystemExit: pass\n"
    code += "try: main(['verify', '--data', 'VTAB'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stdout.startswith("usage: dynadapter verify --data CLASS --data.root FOLDER")
