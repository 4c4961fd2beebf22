"""Progress on standard error: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Between two lines, where standard error is not a terminal."""


class Reporter:
    """Use as a context; `log` prints a line, `step` advances the bar of a stage."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._stages: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        """When a stage was first heard of, and what it had finished by then."""
        self._last_line = time.monotonic()

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def log(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, stage: str, done: int, total: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._stages[stage], completed=done, total=total)
        now = time.monotonic()
        self._begun.setdefault(stage, (now, done))
        if not self._console.is_terminal and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self.log(f"{stage}: {done} of {total}{self._left(stage, now, done, total)}")

    def _left(self, stage: str, now: float, done: int, total: int) -> str:
        """`, about 3 minutes left`; empty while nothing is known."""
        began, before = self._begun[stage]
        if done <= before:
            return ""
        seconds = (now - began) / (done - before) * (total - done)
        return f", about {seconds:.0f} s left" if seconds < 120.0 else f", about {seconds / 60.0:.0f} minutes left"
