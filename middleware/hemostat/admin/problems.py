"""The problems of the deployment now, worst first: the one list that the status, the console and `hemostat engines`
show. Each problem has the name of the alert that Prometheus raises for it; `alerts` says what that alert is about, and
`problem_sources` finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from hemostat.admin.alerts import ALERTS, Severity

log = logging.getLogger("hemostat.control")

LOGGED = {
    "HemostatUpstreamDown": "vLLM answers again",
    "HemostatEngineEjected": "all engines that are not drained get requests again",
}
"""The alerts of which no other part writes a line -> what the log says once the problem is over."""


class OwnershipView(Protocol):
    """The part of `hemostat.control.ownership.Ownership` that is read here."""

    @property
    def state(self) -> str: ...

    @property
    def why(self) -> str: ...

    @property
    def knows(self) -> bool: ...

    def require_active(self) -> None:
        """Raises NotActiveError if this process is not the active one."""


class Problem(msgspec.Struct, frozen=True):
    alert: str
    severity: Severity
    since: float
    """The Unix time at which the problem was first found."""
    text: str
    """One line for people."""
    runbook: str
    """The alert's section, relative to the address of the admin port."""
    area: str
    """The part of the deployment."""
    clients: str
    """The answer to the question if clients are affected."""
    act: str
    """The answer to the question if one has to act now or tomorrow."""
    advice: str
    """The first thing to do."""
    page: list[str]
    """The console's page that helps, as the parts of its path; empty: none does."""


class DeploymentState(msgspec.Struct, frozen=True):
    level: Literal["ok", "warning", "critical"]
    """The severity of the worst problem."""
    problems: list[Problem]
    """The present problems, worst first."""


class Found(NamedTuple):
    alert: str
    text: str
    since: float | None = None
    """The Unix time since when the problem is there; None if that is not known: then it is when the problem was found
    first.
    """
    page: tuple[str, ...] = ()
    """A page of the console that fits better than the alert's."""


def problem(found: Found, since: float) -> Problem:
    """Returns the problem with all that its alert says. since: Unix time."""
    alert = ALERTS[found.alert]
    return Problem(
        alert=alert.name,
        severity=alert.severity,
        since=since,
        text=found.text,
        runbook=alert.runbook,
        area=alert.area,
        clients=alert.clients,
        act=alert.act,
        advice=alert.advice,
        page=list(found.page or alert.page),
    )


class ProblemSource(Protocol):
    """One part of the deployment, which reports its own problems."""

    def problems(self, now: float, wall: float) -> Iterator[Found]:
        """Yields the present problems. now: monotonic seconds. wall: Unix time."""
        ...


class Problems:
    """Owns since when each problem is there. sources: they are asked in this order. clock: monotonic seconds. wall:
    Unix time."""

    def __init__(
        self,
        ownership: OwnershipView,
        sources: Sequence[ProblemSource],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._ownership = ownership
        self._sources = sources
        self._clock = clock
        self._wall = wall
        self._found_at: dict[str, tuple[float, float]] = {}
        """Each alert -> monotonic seconds and Unix time at which the problem was found first, without a pause since."""
        self._since: dict[str, float] = {}
        """Each alert that is shown -> Unix time."""

    def look(self) -> DeploymentState:
        """Returns the present state. Called about once a second: what relays count is compared with a minute ago."""
        now, wall = self._clock(), self._wall()
        found = {found.alert: found for source in self._sources for found in source.problems(now, wall)}
        self._found_at = {alert: self._found_at.get(alert, (now, wall)) for alert in found}
        raised = {
            alert: found[alert] for alert, (first, _) in self._found_at.items() if now - first >= ALERTS[alert].lasting
        }
        for alert, over in LOGGED.items():
            if alert in raised and alert not in self._since:
                level = logging.ERROR if ALERTS[alert].severity == "critical" else logging.WARNING
                log.log(level, "%s", raised[alert].text)
            elif alert in self._since and self._ownership.knows and not LOGGED.keys() & raised.keys():
                log.info("%s", over)
        self._since = {alert: what.since or self._found_at[alert][1] for alert, what in raised.items()}
        problems = [problem(raised[alert], self._since[alert]) for alert in ALERTS if alert in raised]
        return DeploymentState(problems[0].severity if problems else "ok", problems)
