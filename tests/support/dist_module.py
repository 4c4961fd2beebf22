"""deploy/setup/dist.py as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT

SETUP = ROOT / "deploy" / "setup"


def dist_module(folder: Path) -> ModuleType:
    """It writes below `folder` in place of build/."""
    sys.path.insert(0, str(SETUP))
    try:
        spec = importlib.util.spec_from_file_location("hemostat_dist", SETUP / "dist.py")
        assert spec is not None
        assert spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = made  # dataclasses look their module up
        spec.loader.exec_module(made)
    finally:
        sys.path.remove(str(SETUP))
    made.BUILD, made.DIST = folder, folder / "dist"
    made.LOG, made.TOOLS = folder / "dist.log", folder / "tools"
    return made
