"""The project's tasks: ``nox -s NAME``; ``nox -l`` lists them.

CI runs ``.ci/run``, which does what ``lint``, ``types``, ``docs`` and ``tests`` do in one environment.
"""

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format with ruff."""
    session.install("ruff>=0.9")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy."""
    session.install("-e", ".[lint]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after ``--`` go to pytest."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build; a warning is an error."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build")


@nox.session(venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest version of each direct dependency that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and the source archive, and check their metadata."""
    session.install("build>=1.2", "twine>=6")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", "dist/*")
