"""The versions of vLLM that are claimed to work are those that `make test-versions` has run."""

from __future__ import annotations

import re
import tomllib

from tests.support.paths import ROOT


def test_the_oldest_claimed_version_was_tested() -> None:
    """pyproject.toml, messages and documentation claim the same oldest version; the table in docs says it was run."""
    (claimed,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    oldest = claimed.removeprefix("vllm>=")
    files = [path for folder in ("middleware", "calibration") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = {
        (str(path.relative_to(ROOT)), version)
        for path in files
        for version in re.findall(r"vLLM (\d[\d.]*\d) or newer", path.read_text(encoding="utf-8"))
    }
    assert {version for _, version in found} == {oldest}, found
    documentation = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    passed = re.findall(r"^\| (\d[\d.]*) \| .* \| yes \| [1-9]\d* passed, 0 failed", documentation, re.MULTILINE)
    assert passed, "docs/operations.md has no table of versions"
    assert min(passed, key=lambda version: [int(number) for number in version.split(".")]) == oldest
