"""The wheel with its dependencies, and a clean environment with only these."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
from tests.support.paths import ROOT


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels of the three distributions, built from the tree, of all that Hemostat needs, and of what builds it."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder)]
    wanted = [f"{ROOT}[tracing,postgres]", str(ROOT / "calibration"), "hatchling", "pip"]
    laboratory = [*command, "--no-deps", str(ROOT / "middleware" / "lab")]
    for building in (laboratory, [*command, *wanted]):
        made = subprocess.run(building, capture_output=True, text=True, check=False)
        if made.returncode:
            break
    if made.returncode:
        pytest.skip(f"pip cannot get what would be installed: {made.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="session")
def clean_environment(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with Hemostat as `pip install hemostat` makes it, and nothing else: not even pip."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=True)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*command, "--no-index", "--find-links", str(wheelhouse), "hemostat"], check=True)
    return folder
