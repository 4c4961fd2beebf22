"""uv, which builds and installs in a fraction of pip's time. `make setup` has installed it in this environment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT


def setup_module() -> ModuleType:
    """deploy/setup/environment.py as a module."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "deploy" / "setup" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _configured() -> dict[str, str]:
    """Returns what pip is configured with, which uv does not read, as variables for uv."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    variables: dict[str, str] = setup_module().uv_variables(listed.stdout)
    return variables


def uv(
    *arguments: str, variables: Mapping[str, str] | None = None, succeeds: bool = True, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run uv in `folder`. Raises CalledProcessError with its output if it fails and `succeeds` is set."""
    program = os.path.join(sysconfig.get_path("scripts"), "uv")
    environment = _configured() | os.environ | (variables or {})
    ended = subprocess.run(
        [program, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if succeeds and ended.returncode:
        error = subprocess.CalledProcessError(ended.returncode, ended.args, ended.stdout, ended.stderr)
        error.add_note(ended.stderr)
        raise error
    return ended


def build_wheel(sources: Path, folder: Path, variables: Mapping[str, str] | None = None) -> None:
    """Build the wheel of a source tree into `folder`. Raises as `uv`."""
    uv("build", "--wheel", "--quiet", "--out-dir", str(folder), str(sources), variables=variables)


def install(python: Path, *arguments: str, folder: Path | None = None) -> None:
    """Install into the environment of this Python, as `pip install` with these arguments would. Raises as `uv`."""
    # As pip does, take each package from the index that has the newest version.
    strategy = ("--index-strategy", "unsafe-best-match")
    uv("pip", "install", "--quiet", "--python", str(python), *strategy, *arguments, folder=folder)
