"""The helm that these tests run, and a cluster for what only renders with one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.helm_api import Cluster, running
from tests.support.helm_chart import ROOT, Helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    result = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "setup" / "helm.py")], check=False, capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"no helm here; install one: {result.stderr.strip()}")
    return Helm(result.stdout.strip(), tmp_path_factory.mktemp("helm"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path) as cluster:
        yield cluster
