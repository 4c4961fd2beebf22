"""A version says if it is a release, and what a release says about itself is complete."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

import pytest
from packaging.version import Version
from tests.support.paths import ROOT

from hemostat import __version__

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", CHANGELOG, re.MULTILINE)
DEVELOPMENT = re.compile(r"\d+\.\d+\.\d+\.dev0")


def problem(version: str, releases: Sequence[str], tags: Sequence[str]) -> str:
    """Returns what is wrong with a version; "" if nothing is.

    releases: the versions in the CHANGELOG, newest first. tags: the tags of the commit.
    """
    if DEVELOPMENT.fullmatch(version):
        ahead = Version(version) > Version(releases[0])
        return "" if ahead else f"{version} is not newer than the release {releases[0]}: set the next version"
    if version != releases[0]:
        return f"the CHANGELOG has no release {version}, or a newer one"
    if f"v{version}" not in tags:
        return f"{version} says that this commit is a release: tag it v{version}, or set the next version with .dev0"
    return ""


@pytest.mark.parametrize(
    ("version", "tags", "named"),
    [
        ("0.3.0.dev0", [], ""),
        ("0.2.0.dev0", [], "set the next version"),
        ("0.2.0", ["v0.2.0"], ""),
        ("0.2.0", ["v0.1.0"], "tag it v0.2.0"),
        ("0.3.0", ["v0.3.0"], "CHANGELOG"),
        ("0.3.0-dev.0", ["v0.3.0"], "CHANGELOG"),
    ],
)
def test_a_version_that_is_wrong_is_found(version: str, tags: list[str], named: str) -> None:
    said = problem(version, ["0.2.0", "0.1.0"], tags)
    assert named in said
    assert bool(named) == bool(said)


def test_the_version_says_if_this_commit_is_a_release() -> None:
    tagged = subprocess.run(
        ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD"], capture_output=True, text=True, check=False
    )
    # An archive of a release has no tags.
    tags = [f"v{__version__}"] if tagged.returncode else tagged.stdout.split()
    assert problem(__version__, RELEASES, tags) == ""


def test_releases_are_listed_newest_first() -> None:
    versions = [Version(release) for release in RELEASES]
    assert versions == sorted(versions, reverse=True)
    assert not any(version.is_prerelease for version in versions)


def opening(release: str) -> list[str]:
    """Returns the lines with which a section of the CHANGELOG opens, up to its first subsection or link to the rest."""
    section = re.split(rf"^## \[{re.escape(release)}\].*\n", CHANGELOG, maxsplit=1, flags=re.MULTILINE)[1]
    lines = re.split(r"^(?:##|\[All changes)", section, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    return [line for line in lines if line]


@pytest.mark.parametrize("release", ["Unreleased", *RELEASES])
def test_a_release_opens_with_at_most_ten_lines(release: str) -> None:
    assert 1 <= len(opening(release)) <= 10


def test_older_releases_have_a_page_of_their_own() -> None:
    for release in RELEASES:
        assert f"(docs/changelog/{release}.md)" in CHANGELOG
        assert f"docs/changelog/{release}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.stem for path in (ROOT / "docs" / "changelog").glob("*.md")}
    assert pages == set(RELEASES)
