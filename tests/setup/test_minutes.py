"""The tables that pytest prints at the end of a run: where the minutes went."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import minutes
from tests.support.paths import ROOT

CONFTEST = """
from tests.support.minutes import Minutes

def pytest_configure(config):
    config.pluginmanager.register(Minutes(), "minutes")
"""
FIRST = """
import subprocess, sys, time
import pytest
from tests.support.minutes import starting

@pytest.fixture(scope="module")
def server():
    with starting("a server"):
        time.sleep(0.3)
        with starting("a part of it"):
            time.sleep(0.1)
    yield
    time.sleep(0.2)

def test_1(server): ...
def test_2(server): subprocess.run([sys.executable, "-m", "this"], stdout=subprocess.DEVNULL)
"""
SECOND = "import time\ndef test_3(): time.sleep(0.1)\n"


def rows(text: str) -> dict[str, list[float]]:
    """Returns the rows of both tables: the last column -> the others."""
    table = text.partition("minutes went")[2]
    found = re.findall(r"^((?: +[\d.]+)+)  (\S.*)$", table, re.MULTILINE)
    return {name: [float(cell) for cell in cells.split()] for cells, name in found}


@pytest.mark.parametrize("parallel", [[], ["-n", "2"]], ids=["one process", "workers"])
def test_a_run_prints_its_minutes_by_file_and_by_process(parallel: list[str], tmp_path: Path) -> None:
    for name, text in (("conftest.py", CONFTEST), ("test_first.py", FIRST), ("test_second.py", SECOND)):
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    plugin = ["-p", "xdist", "--dist", "loadfile"] if parallel else []
    command = [sys.executable, "-m", "pytest", *plugin, *parallel, str(tmp_path)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables |= {"PYTHONPATH": paths, "PYTEST_ADDOPTS": "-p no:langsmith_plugin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stdout
    made = rows(done.stdout)
    total, setup, call, teardown, starting = made["test_first.py"]
    assert total == pytest.approx(setup + call + teardown, abs=0.2)
    assert setup >= 0.4
    assert teardown >= 0.2
    assert starting == pytest.approx(made["a server"][0] + made["python -m this"][0], abs=0.2)
    assert made["a server"][0] >= 0.4
    assert (made["a server"][1], made["python -m this"][1]) == (1, 1)
    assert "a part of it" not in made
    assert made["test_second.py"][4] == 0


def test_the_table_has_twenty_rows_and_the_sum_of_the_others() -> None:
    plugin = minutes.Minutes()
    for n in range(minutes.MAX_ROWS + 3):
        report = pytest.TestReport(f"test_{n}.py::test", ("", 0, ""), {}, "passed", None, "call", (), float(n + 1))
        plugin.pytest_runtest_logreport(report)
    heading, first, *others, last = plugin.by_file()
    assert heading.split() == ["seconds", "setup", "call", "teardown", "starting", "file"]
    assert first.split() == ["23.0", "0.0", "23.0", "0.0", "0.0", "test_22.py"]
    assert len(others) == minutes.MAX_ROWS - 1
    assert last.split() == ["6.0", "0.0", "6.0", "0.0", "0.0", "(3", "others)"]
    assert plugin.by_process() == ["no process was started"]


def test_examples() -> None:
    assert doctest.testmod(minutes).failed == 0
