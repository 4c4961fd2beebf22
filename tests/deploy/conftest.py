"""Hemostat's wheels, and a clean environment with only what they bring."""

from __future__ import annotations

import venv
from pathlib import Path

import pytest
from tests.support.paths import ROOT
from tests.support.uv import build_wheel, install


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels of the three distributions, built from the tree."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    for sources in (ROOT, ROOT / "calibration", ROOT / "middleware" / "lab"):
        build_wheel(sources, folder)
    return folder


@pytest.fixture(scope="session")
def clean_environment(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with Hemostat as `pip install hemostat` makes it, and nothing else: not even pip."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=True)
    install(folder / "bin" / "python", "--find-links", str(wheelhouse), *map(str, wheelhouse.glob("hemostat-*.whl")))
    return folder
