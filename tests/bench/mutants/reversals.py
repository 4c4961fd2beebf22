"""The last commits that mended a defect, and their reversal in a tree."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.mutants.tree import PRODUCT, Tree, git


@dataclass(frozen=True, slots=True)
class Mended:
    """A commit that added an entry to "Fixed" of the changelog, and changed the product."""

    commit: str
    subject: str
    tests: tuple[str, ...]
    """The files of tests that it changed, by the names that they have in the revision of the tree."""


class ConflictError(Exception):
    """A commit cannot be reversed any more; the text says why."""


def mended(tree: Tree) -> Iterator[Mended]:
    """Yields these commits, the newest first."""
    listed = git(tree.folder, "log", "--no-merges", "--format=%H %s", tree.revision, "--", "CHANGELOG.md")
    for row in listed.splitlines():
        commit, _, subject = row.partition(" ")
        changed = git(tree.folder, "diff-tree", "-r", "--no-commit-id", "--name-only", commit).splitlines()
        if not any(path.startswith(PRODUCT) for path in changed):
            continue
        if fixed(_changelog(tree, commit)) - fixed(_changelog(tree, f"{commit}^")):
            tests = [path for path in changed if re.fullmatch(r"tests/.*test_\w+\.py", path)]
            renamed = _renamed(tree, commit)
            yield Mended(commit, subject, tuple(renamed.get(path, path) for path in tests))


def fixed(changelog: str) -> set[str]:
    """Returns the first lines of the entries below each "Fixed".

    >>> sorted(fixed("## [1]\\n### Added\\n- a\\n### Fixed\\n- b\\n  more\\n- c\\n## [0]\\n- d\\n"))
    ['b', 'c']
    """
    sections = re.findall(r"^### Fixed\n(.*?)(?=^##|\Z)", changelog, re.MULTILINE | re.DOTALL)
    return {entry for section in sections for entry in re.findall(r"^- (.+)$", section, re.MULTILINE)}


def reverse(tree: Tree, commit: str) -> dict[str, list[int]]:
    """Reverses a commit's changes of the product, and of nothing else. Returns module -> lines that change, as they are
    numbered in the revision of the tree. Raises ConflictError."""
    try:
        git(tree.folder, "revert", "--no-commit", commit)
    except subprocess.CalledProcessError:
        conflicts = git(tree.folder, "diff", "--name-only", "--diff-filter=U").splitlines()
        of_product = [path for path in conflicts if path.startswith(PRODUCT)]
        if of_product or not conflicts:
            raise ConflictError(f"conflict in {', '.join(of_product) or 'the commit as a whole'}") from None
    # Everything but the product is the revision's again.
    others = [":/", *(f":(exclude){folder}" for folder in PRODUCT)]
    git(tree.folder, "reset", "--quiet")
    git(tree.folder, "checkout", "--quiet", "--", *others)
    added = git(tree.folder, "ls-files", "--others", "--exclude-standard", "--", "tests").splitlines()
    for path in added:
        (tree.folder / path).unlink()
    difference = git(tree.folder, "diff", "--unified=0", "--no-renames", "--", *PRODUCT)
    result: dict[str, list[int]] = {}
    module = ""
    for line in difference.splitlines():
        if line.startswith("--- "):
            module = line.removeprefix("--- ").removeprefix("a/")
        elif (hunk := re.match(r"@@ -(\d+)(?:,(\d+))? ", line)) and module.endswith(".py"):
            first, count = int(hunk[1]), int(hunk[2] or 1)
            # Where lines are only added, the lines around them are the ones that have to be executed.
            lines = range(first, first + count) if count else range(first, first + 2)
            result.setdefault(module, []).extend(lines)
    if not difference:
        raise ConflictError("nothing of it is left")
    return result


def _renamed(tree: Tree, commit: str) -> dict[str, str]:
    """Returns the names that files of tests had in a commit, and have now."""
    options = ("--find-renames", "--diff-filter=R", "--name-status")
    rows = git(tree.folder, "diff", *options, commit, tree.revision, "--", "tests").splitlines()
    return {before: now for _, before, now in (row.split("\t") for row in rows)}


def _changelog(tree: Tree, revision: str) -> str:
    try:
        return git(tree.folder, "show", f"{revision}:CHANGELOG.md")
    except subprocess.CalledProcessError:  # it was not there yet
        return ""
