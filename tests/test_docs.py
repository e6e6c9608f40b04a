"""The documents are true: public names are in the reference, links lead somewhere, and commands can be parsed."""

import ast
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import dynadapter
from dynadapter.cli import TRAINER, app, arguments, imports, main, train
from dynadapter.cli.completion import program
from dynadapter.cli.configs import config_files, find_config
from dynadapter.cli.errors import Mistake
from dynadapter.cli.parser import CommandParser

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("tools/**/*.md")]
)
OF_OTHERS = {"--shm-size", "--claims", "--exit_every"}
"""Options of Docker, and of the programs in benchmarks/ and tools/."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_public_name_has_a_reference():
    named: set[str] = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        module = ""
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", page.read_text(), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            elif module == "dynadapter":
                named.add(name)
    assert named == set(dynadapter.__all__)


# ---- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and MyST name them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for place, _, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#([^)\s]+))?\)", BLOCK.sub("", page.read_text())):
        target = page.parent / place if place else page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), f"{place}#{anchor}"


# ---- figures


def test_method_figure_is_drawn(tmp_path):
    runpy.run_path(str(ROOT / "tools" / "method_figure.py"))["draw"]().savefig(tmp_path / "method.png", dpi=110)
    with Image.open(tmp_path / "method.png") as drawn, Image.open(ROOT / "docs" / "figures" / "method.png") as shown:
        assert drawn.size == pytest.approx(shown.size, abs=2)  # versions of matplotlib round differently


# ---- messages


def test_messages_are_the_programs():
    """Each part of a message between the dots stands in the source."""
    texts = set()
    for path in (ROOT / "src").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        texts |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    source = "\n".join(texts)
    rows = re.findall(r"^\| `([^|]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for message in rows:
        parts = [part.strip(" ;:") for part in message.split("…")]
        assert max(map(len, parts)) > 9, message
        assert [part for part in parts if part not in source] == [], message


# ---- commands


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page, in its blocks and among its words."""
    text = page.read_text().replace("\\\n", " ")
    for language, block in BLOCK.findall(text):
        if language in ("", "bash", "sh", "console"):
            lines = [part.strip() for line in block.splitlines() for part in re.split(r"&& |^\$ ", line)]
            yield from (line for line in lines if re.match("dynadapter [a-z]", line))
    for span in re.findall(r"`(dynadapter [^`]+)`", BLOCK.sub("", text)):
        if len(span.split()) > 2 and "..." not in span and not span.split()[-1].startswith("--"):
            yield span  # a whole command, and no mention of one


ELSEWHERE = ("CHANGELOG.md", "extend.md")
"""Pages of earlier commands, and of commands with classes of their own, which tests/test_extend.py runs."""
COMMANDS = sorted({command for page in PAGES if page.name not in ELSEWHERE for command in commands(page)})


class Parsed(BaseException):
    """A command line has passed the parser."""


@pytest.fixture
def parse_alone(monkeypatch, tmp_path):
    """End a command as soon as its line is parsed; checkpoints and runs that it names need not exist."""

    def first(kind):
        whole = kind.parse_args

        def parse_args(self, *args, **kwargs):
            found = whole(self, *args, **kwargs)
            if str(self.usage).startswith("dynadapter "):  # jsonargparse makes parsers of this class for its own use
                raise Parsed
            return found

        monkeypatch.setattr(kind, "parse_args", parse_args)

    first(CommandParser)
    first(arguments.ConfigParser)
    monkeypatch.setattr(app, "checkpoint_path", lambda contents, rest: None)
    monkeypatch.setattr(app, "expand_resume", lambda files, rest: (files, rest, None, {}))
    monkeypatch.chdir(tmp_path)


def arguments_of(command: str) -> list[str]:
    """The words of a command, with the folders, config files and settings of a checkpoint that it takes for granted."""
    words = shlex.split(command, comments=True)[1:]
    for file in config_files(words[1:])[0]:
        try:
            find_config(file)
        except Mistake:
            Path(file).write_text("data: Shapes")
    if {"--ckpt_path", "--resume"} & {*words} and words[0] in TRAINER and "--data" not in words:
        sets = any("test_sets" in word for word in words)
        words[1:1] = ["--data=ImageFolder", "--data.root=images"] if sets else ["--data=Shapes"]
    if words[0] == "train":  # it gives most of its options to fit
        Path(words[1]).mkdir()
        words = ["fit", "-c", "own_images", f"--data.root={words[1]}", *train.read(words[1:]).settings]
    return words


@pytest.mark.parametrize("command", COMMANDS)
def test_command_can_be_parsed(command, parse_alone):
    words = arguments_of(command)
    if words[0] == "configs":
        assert len(words) <= 2
    else:
        with pytest.raises(Parsed):
            main(words)


def test_options_among_words_exist():
    known = {*program()._option_string_actions, imports.OPTION}
    for action in program()._actions:
        for parser in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            known |= {option for one in parser._actions for option in one.option_strings}
    for page in (ROOT / "docs").glob("*.md"):
        text = BLOCK.sub("", page.read_text())
        named = {re.sub(r"\+?=.*", "", words.split()[0]) for words in re.findall(r"`(--[a-z][^`]*)`", text)}
        assert sorted(named - known - OF_OTHERS) == [], page.name


@pytest.mark.parametrize("command", ["fit --trainer.epochs 3", "predict --picture a", "calibrate --goal.price 1"])
def test_wrong_command_is_found(command, parse_alone, capsys):
    with pytest.raises(SystemExit):
        main(command.split())
    assert command.split()[0] in TRAINER or "picture" in capsys.readouterr().err
