"""Settings of the documentation; build it with `nox -s docs`."""

import re
from pathlib import Path

project = "dynadapter"
author = "the dynadapter authors"
release = re.search(r'^version = "(.+)"', (Path(__file__).parents[1] / "pyproject.toml").read_text(), re.MULTILINE)[1]
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Links to files of the repository outside docs/ are for readers of the source tree
suppress_warnings = ["myst.xref_missing"]
html_theme = "furo"
html_title = f"dynadapter {release}"
exclude_patterns = ["_build"]
