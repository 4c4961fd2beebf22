"""The helm that these tests run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.helm.chart import ROOT, Helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    found = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "setup" / "helm.py")], check=False, capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip(f"no helm here; install one: {found.stderr.strip()}")
    return Helm(found.stdout.strip(), tmp_path_factory.mktemp("helm"))
