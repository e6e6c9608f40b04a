"""README's commands run as they stand there, top to bottom; its set-up commands stand in the project, too."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

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
    for name in re.findall(r"(?:configs|examples|benchmarks|docs)/[\w./-]+\.(?:yaml|py|md|png)", text):
        assert (ROOT / name).is_file(), name


def test_python_block_runs(capsys):
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([")


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_commands_run_as_pasted(tmp_path):
    """All blocks but the installation and the test command, from a built wheel, in a folder that holds images."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    wheel.unlink()
    for label, name in enumerate(("cups", "forks", "knives")):
        (tmp_path / "my_photos" / name).mkdir(parents=True)
        for k in range(12):
            Image.new("RGB", (60, 80), (90 * label, 20 * k, 60)).save(tmp_path / "my_photos" / name / f"{k}.jpg")
    (tmp_path / "my_shapes").mkdir()
    Image.new("RGB", (48, 48), (200, 30, 60)).save(tmp_path / "my_shapes" / "red.png")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.strip().splitlines() if "pytest" not in line]
    lines = [line.removeprefix("pip install -e . && ") for line in lines]
    assert len(lines) >= 8
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": scripts, "PYTHONPATH": str(tmp_path / "installed")}
    where = "import dynadapter; print(dynadapter.__file__)"
    found = subprocess.run([sys.executable, "-c", where], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path / "installed"))
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
    assert (tmp_path / "runs" / "my_photos" / "version_0" / "report" / "report.html").is_file()
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 37
