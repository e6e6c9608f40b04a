"""README's two set-up commands stand in the project as they stand there."""

import re
from pathlib import Path

import yaml

from dynadapter.cli.configs import find_config

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """The bash blocks of the README, in their order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block.strip() for block in blocks]


def test_the_first_block_starts_the_quick_start():
    found = re.search(r"dynadapter fit --config (\S+)", commands()[0])
    assert found
    config = yaml.safe_load(find_config(found[1]).read_text())
    assert config["data"]["class_path"] == "Shapes"


def test_continuous_integration_runs_the_readmes_test_command():
    command = commands()[1]
    assert command == "pip install -e '.[test]' && pytest"
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_what_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"(?:configs|examples|benchmarks|docs)/[\w./-]+\.(?:yaml|py|md)", text):
        assert (ROOT / name).is_file(), name
