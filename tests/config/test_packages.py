"""The commands that messages give for installing a package name what pip finds, with the bounds of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement
from tests.support.paths import ROOT

from hemostat.config.packages import install_command, requirements

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
LAB = tomllib.loads((ROOT / "middleware" / "lab" / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(extra: str) -> set[Requirement]:
    result = {Requirement(text) for text in (LAB["dependencies"] if extra == "lab" else EXTRAS[extra])}
    nested = {part for requirement in result if requirement.name == "hemostat" for part in requirement.extras}
    own = {requirement for requirement in result if requirement.name != "hemostat"}
    return own.union(*(declared(part) for part in nested))


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name != "dev"])
def test_a_command_has_the_requirements_of_pyproject(extra: str) -> None:
    program, action, *given = shlex.split(install_command(extra))
    assert (program, action) == ("pip", "install")
    assert {Requirement(text) for text in given} == declared(extra)


def test_only_what_is_missing_is_named() -> None:
    (given,) = shlex.split(install_command("lab", ["compressed-tensors"]))[2:]
    assert Requirement(given) in declared("lab")
    assert Requirement(given).name == "compressed-tensors"


def test_sources_that_are_not_installed_are_installed_from_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert requirements("tracing") == requirements("lab") == {}
    where = ", in the folder of Hemostat's sources"
    assert install_command("tracing") == f"pip install ./calibration '.[tracing]'{where}"
    for only in ([], ["hemostat-lab", "torch"]):
        assert install_command("lab", only) == f"pip install ./calibration . ./middleware/lab{where}"


def test_the_laboratory_itself_is_installed_from_its_folder() -> None:
    """It is on no index, and brings what it needs."""
    missing = ["hemostat-lab", "torch"]
    assert install_command("lab", missing) == "pip install ./middleware/lab, in the folder of Hemostat's sources"


def test_no_text_installs_hemostat_from_an_index() -> None:
    """Hemostat is on no package index; a folder or a wheel's file can be installed."""
    sources = [path for folder in ("middleware", "calibration") for path in (ROOT / folder).rglob("*.py")]
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *sources):
        for command in re.findall(r"pip install [^\n]*", path.read_text(encoding="utf-8")):
            assert not re.search(r"install (-\S+ )*['\"]?hemostat", command), f"{path}: {command}"
            if path.suffix == ".py":
                assert re.search(r"pip install (\"|'?\.|$)", command), f"{path}: use install_command"
