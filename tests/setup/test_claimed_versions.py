"""The oldest version of vLLM that is claimed to work is one that all tests were run with."""

from __future__ import annotations

import re
import tomllib

from tests.support.paths import ROOT


def test_the_oldest_claimed_version_was_tested() -> None:
    """pyproject.toml, messages and documentation claim the same oldest version; the table in docs says it was run."""
    (claimed,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    oldest = claimed.removeprefix("vllm>=").partition(",")[0]
    files = [path for folder in ("middleware", "calibration") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    result = {
        (str(path.relative_to(ROOT)), version)
        for path in files
        for version in re.findall(r"vLLM (\d[\d.]*\d) or newer", path.read_text(encoding="utf-8"))
    }
    assert {version for _, version in result} == {oldest}, result
    documentation = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(oldest)}(?:\.0)? \| .*$", documentation, re.MULTILINE)
    outcomes = [cell.strip() for cell in row.split("|")][4:9]
    assert outcomes[0] == "yes"
    assert all(re.fullmatch(r"in CI|[1-9]\d* passed, 0 failed.*", cell) for cell in outcomes[1:]), row
