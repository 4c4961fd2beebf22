"""`make site`: the documentation as a site in build/site, with the reference pages made from the code.

MkDocs with the theme Material runs in an environment of its own, build/site-environment. Pages keep their places, so
that their links work in the repository and on the site alike; `--strict` makes a broken link or anchor an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import reference

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
PAGES, SITE, ENVIRONMENT = BUILD / "site-pages", BUILD / "site", BUILD / "site-environment"
REQUIREMENT = "mkdocs-material>=9.6,<10"
FIRST = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *("deploy/README.md", "helm/hemostat/README.md"),
)


def linked(page: Path) -> Iterator[Path]:
    """Files of the repository that the page links to."""
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        path = (page.parent / link).resolve()
        if "://" not in link and path.is_file() and path.is_relative_to(ROOT):
            yield path


def collect() -> None:
    """All pages, and what they link to, below PAGES."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = {ROOT / name for name in FIRST} | set((ROOT / "docs").glob("*.md"))
    for path in pages | {path for page in pages for path in linked(page)}:
        to = PAGES / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    reference.write(PAGES / "docs" / "reference")


def main() -> int:
    program = ENVIRONMENT / "bin" / "mkdocs"
    if not program.exists():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([ENVIRONMENT / "bin" / "pip", "install", "--quiet", REQUIREMENT], check=True)
    collect()
    command = [program, "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    code = subprocess.run(command, env=variables, check=False).returncode
    if code == 0:
        print(f"the site: {(SITE / 'index.html').relative_to(ROOT)}")  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
