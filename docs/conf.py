"""Settings of the documentation; build it with `nox -s docs`."""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
project = "dynadapter"
author = "the dynadapter authors"
release = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # LoRA() in a signature, not the repr of its fields
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as one list
highlight_language = "none"  # a block without a language is a command
default_role = "code"  # `name` in a docstring
html_theme = "furo"
html_show_copyright = False  # LICENSE has it
html_title = f"dynadapter {release}"
exclude_patterns = ["_build"]

INCLUDED = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md", "benchmarks/RESULTS.md": "results.md"}
"""Pages of the repository outside docs/, and the page here that includes each."""
LINK = re.compile(r"\]\((?![\w+]+:|#)([^)#\s]+)")


def links_in_site(text: str, file: Path, page: str) -> str:
    """Return a text with links that are right in the site; in the files they are right on a code host.

    Args:
        text: Markdown.
        file: Where it stands.
        page: The page of the site that shows it.
    """

    def changed(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(file.parent / link[1]))
        included = INCLUDED.get(target.relative_to(ROOT).as_posix()) if target.is_relative_to(ROOT) else None
        target = ROOT / "docs" / included if included else target
        return "](" + Path(os.path.relpath(target, (ROOT / "docs" / page).parent)).as_posix()

    return LINK.sub(changed, text)


def read_page(_app: Any, page: str, source: list[str]) -> None:
    """Change the links of a page."""
    source[0] = links_in_site(source[0], ROOT / "docs" / f"{page}.md", page)


def read_included(_app: Any, path: Path, page: str, source: list[str]) -> None:
    """Change the links of a file that a page includes."""
    source[0] = links_in_site(source[0], Path(os.path.normpath(ROOT / "docs" / path)), page)


def setup(app: Any) -> None:
    """Connect the changes of links."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
