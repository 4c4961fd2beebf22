"""A pytest plugin: `-p recording`, with this folder on the path. It imports nothing of the project.

Hypothesis is derandomized. With MUTANTS_RECORD, a file's path, it writes there how long each test took and if it
passed, and tells coverage.py which test runs. Child processes know that from PYTEST_CURRENT_TEST.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """After the project's own profile has been loaded."""
    hypothesis.settings.register_profile("mutants", hypothesis.settings(), derandomize=True, database=None)
    hypothesis.settings.load_profile("mutants")
    if record := os.environ.get("MUTANTS_RECORD"):
        config.pluginmanager.register(_Recording(Path(record)))


class _Recording:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        import coverage  # only the recording needs it

        if (running := coverage.Coverage.current()) is not None:
            running.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:  # skipped ones find nothing either
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        passed = {name: seconds for name, seconds in self._seconds.items() if name not in self._failed}
        self._path.write_text(json.dumps({"passed": passed, "failed": sorted(self._failed)}))
