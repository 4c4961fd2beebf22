"""Two tables that pytest prints at the end of a run: the time by file, and the time that starting processes took.

Helpers that start a process and wait until it answers do so within `starting`; `subprocess.run` counts, too, while it
waits for the program's end. A worker of pytest-xdist sends its seconds with the reports of its tests.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

MAX_ROWS = 20
_PHASES = ("setup", "call", "teardown")

Started = dict[str, tuple[int, float]]
"""The name of what was started -> how often, and the seconds until it answered or had ended."""

_started: Started = {}
_depth = 0


@contextmanager
def starting(what: str) -> Iterator[None]:
    """Counts the time of the block as starting this kind of process. Blocks inside of it, or while it waits, count as
    parts of it."""
    global _depth  # noqa: PLW0603  one process runs one test at a time
    _depth += 1
    began = time.monotonic()
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _add(_started, {what: (1, time.monotonic() - began)})


def _add(to: Started, more: Started) -> None:
    for what, (times, seconds) in more.items():
        before = to.get(what, (0, 0.0))
        to[what] = (before[0] + times, before[1] + seconds)


def program(command: Any) -> str:
    """Returns the name under which a command counts.

    >>> program(["/usr/bin/python3.11", "-m", "pip", "wheel"]), program(["/bin/helm", "lint"]), program("ls")
    ('python -m pip', 'helm', 'ls')
    """
    parts = [command] if isinstance(command, str | bytes | os.PathLike) else list(command)
    words = [os.path.basename(os.fsdecode(parts[0])), *map(str, parts[1:3])]
    if words[0].startswith("python"):
        return " ".join(["python", *words[1:]]) if words[1:2] == ["-m"] else "python"
    return words[0]


def _timed(run: Callable[..., Any]) -> Callable[..., Any]:
    def timed_run(*given: Any, **more: Any) -> Any:
        with starting(program(given[0] if given else more["args"])):
            return run(*given, **more)

    return timed_run


@dataclass
class _File:
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0.0))
    starting: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Minutes:
    """The plugin. It adds up the reports of all tests, in the process that prints the summary."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = defaultdict(_File)
        self._started: Started = {}
        self._run = subprocess.run

    def pytest_sessionstart(self) -> None:
        subprocess.run = _timed(self._run)

    def pytest_sessionfinish(self) -> None:
        subprocess.run = self._run

    def pytest_collection_finish(self) -> None:
        _started.clear()  # what collecting has started belongs to no file's tests

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report: Any = yield
        report.started = dict(_started)  # xdist sends it as it sends any attribute of a report
        _started.clear()
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = self._files[report.nodeid.partition("::")[0]]
        file.seconds[report.when or "call"] += report.duration
        started: Started = getattr(report, "started", {})
        file.starting += sum(seconds for _, seconds in started.values())
        _add(self._started, started)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._files:
            return
        total = sum(file.total for file in self._files.values())
        terminalreporter.section(f"where {total / 60:.1f} minutes went")
        for line in [*self.by_file(), "", *self.by_process()]:
            terminalreporter.write_line(line)

    def by_file(self) -> list[str]:
        """Returns the lines of the table by file; `starting` is the part that went into starting processes."""
        files = sorted(self._files.items(), key=lambda item: -item[1].total)
        rows = [
            (name, [file.total, *(file.seconds[phase] for phase in _PHASES), file.starting]) for name, file in files
        ]
        return _table(rows, ["seconds", *_PHASES, "starting"], "file")

    def by_process(self) -> list[str]:
        """Returns the lines of the table by what was started."""
        if not self._started:
            return ["no process was started"]
        started = sorted(self._started.items(), key=lambda item: -item[1][1])
        rows = [(name, [seconds, times]) for name, (times, seconds) in started]
        return _table(rows, ["seconds", "times"], "started")


def _table(rows: Sequence[tuple[str, Sequence[float]]], columns: Sequence[str], names: str) -> list[str]:
    """Returns a heading, the first MAX_ROWS rows, and one row for all others together."""
    shown, others = list(rows[:MAX_ROWS]), rows[MAX_ROWS:]
    if others:
        sums = [sum(values) for values in zip(*(values for _, values in others), strict=True)]
        shown.append((f"({len(others)} others)", sums))
    cells = [[format(value, "d" if isinstance(value, int) else ".1f") for value in values] for _, values in shown]
    lines = ["".join(f"{column:>10}" for column in columns) + f"  {names}"]
    return lines + [
        "".join(f"{cell:>10}" for cell in row) + f"  {name}" for row, (name, _) in zip(cells, shown, strict=True)
    ]
