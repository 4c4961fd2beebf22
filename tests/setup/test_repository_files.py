"""The files that a code host, package indexes and pre-commit read: they are valid, and what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.paths import ROOT

GITHUB = ROOT / ".github"
SCHEMAS = {
    "vendor.github-workflows": sorted((GITHUB / "workflows").glob("*.yml")),
    "vendor.github-issue-forms": [path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"],
    "vendor.github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def hooks() -> dict[str, dict[str, Any]]:
    """Returns the hooks of pre-commit by id."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local", "hooks from elsewhere would be downloaded, in versions of their own"
    return {hook["id"]: hook for hook in repository["hooks"]}


HOOKS = hooks()


def validate(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Runs check-jsonschema with a schema that it brings, so that nothing is downloaded."""
    program = Path(sys.executable).parent / "check-jsonschema"
    command = [str(program), "--builtin-schema", schema, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_valid_by_the_schema_of_the_code_host(schema: str, tmp_path: Path) -> None:
    assert SCHEMAS[schema]
    said = validate(schema, *SCHEMAS[schema])
    assert said.returncode == 0, said.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("- 1\n")
    assert validate(schema, wrong).returncode == 1


def test_the_workflow_runs_the_one_check() -> None:
    (job,) = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_a_report_of_a_bug_has_the_output_of_check_and_the_versions() -> None:
    body = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))["body"]
    asked = {item["id"]: item for item in body if "id" in item}
    assert {name for name, item in asked.items() if item.get("validations", {}).get("required")} >= {
        "check",
        "versions",
    }
    assert "hemostat check" in asked["check"]["attributes"]["label"]
    assert "hemostat --version" in asked["versions"]["attributes"]["description"]


def test_paths_with_an_owner_exist() -> None:
    rules = re.findall(r"^(?:# )?(/\S+) @", (GITHUB / "CODEOWNERS").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rules) > 3
    assert [rule for rule in rules if not (ROOT / rule[1:]).exists()] == []


# --- pre-commit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_runs_what_make_runs_in_the_projects_environment(name: str) -> None:
    hook = HOOKS[name]
    assert hook["language"] == "system"
    program, *arguments = hook["entry"].split()
    recipe = f"$(BIN)/{' '.join([program.removeprefix('.venv/bin/'), *arguments]).removesuffix(' --force-exclude')}"
    assert re.search(
        rf"^\t@?{re.escape(recipe)}( --check)?$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert (Path(sys.executable).parent / Path(program).name).is_file()
    assert all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".py"))


@pytest.mark.parametrize("name", HOOKS)
def test_the_files_of_a_hook_exist(name: str) -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no clone")
    hook = HOOKS[name]
    assert ("files" in hook) != ("types_or" in hook)
    for alternative in hook.get("files", r"\.py$").split("|^"):
        assert re.search(alternative, listed.stdout, re.MULTILINE), alternative


def test_hooks_find_what_is_wrong(tmp_path: Path) -> None:
    """The two hooks that get names of files: they refuse a file, or rewrite it, and accept what they have written."""
    file = tmp_path / "wrong.py"
    file.write_text("import os\nx = {  'a':1 }\n")

    def run(name: str) -> int:
        program, *arguments = HOOKS[name]["entry"].split()
        command = [str(Path(sys.executable).parent / Path(program).name), *arguments, str(file)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode

    assert run("ruff-check") == 1
    file.write_text("x = {  'a':1 }\n")
    assert run("ruff-check") == 0
    assert run("ruff-format") == 0
    assert file.read_text() == 'x = {"a": 1}\n'


# --- what others are told about the project ---------------------------------------------------------------------------


def test_the_citation_is_of_the_newest_release() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    found = re.search(r"^## \[(\d\S*)\] - (\S+)$", CHANGELOG, re.MULTILINE)
    assert found is not None
    assert (str(cited["version"]), cited["date-released"]) == found.groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["license"] == project["license"]


@pytest.mark.parametrize("folder", ["", "calibration", "middleware/lab"])
def test_each_distribution_names_the_paper(folder: str) -> None:
    """There is no public address of the project yet; these are all."""
    project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (reference,) = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    assert project["urls"] == {"Paper": reference["url"]}
