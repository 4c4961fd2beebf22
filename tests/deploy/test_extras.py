"""The processes of `hemostat serve` and the command line can be imported without any extra."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.support.paths import ROOT

EXTRAS = ("jinja2", "opentelemetry", "redis", "torch", "transformers", "vllm", "xgrammar")
PROGRAM = """
import importlib, sys
for name in sys.argv[2:]:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    "module",
    [
        "hemostat.cli",
        "hemostat.supervisor",
        "hemostat.control.process",
        "hemostat.learner.process",
        "hemostat.relay.main",
        "hemostat.doctor",
        "hemostat.demo",
    ],
)
def test_import_without_extras(module: str) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in ("middleware", "calibration"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *EXTRAS],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
