"""The problems of the deployment now, worst first: the one list that the status, the console and `hemostat engines`
show. Each problem has the name of the alert that Prometheus raises for it; `alerts` says what that alert is about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

import msgspec

from hemostat import __version__
from hemostat.adapters.live.assembly import Adapters
from hemostat.admin.alerts import ALERTS, Severity
from hemostat.admin.configuration import Configuration
from hemostat.admin.proxy_status import RecentRequests
from hemostat.admin.recent import LONG_SECONDS, LOST_SECONDS, Growth, RelayGrowth
from hemostat.canaries.keeper import Canaries
from hemostat.engines.engine import Engine
from hemostat.engines.registry import EngineRegistry
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import OVERHEAD_BUCKETS
from hemostat.measurement.measured import Measured
from hemostat.metrics.reasons import Outcome
from hemostat.profiles.decisions import Decision
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ReferenceState
from hemostat.scoring.pipeline import ScoringPipeline
from hemostat.scoring.records_file import RecordsFile
from hemostat.store.errors import StoreErrorLog
from hemostat_calibration.plugin_version import fits, shown

log = logging.getLogger("hemostat.control")

MAX_FAILED_RATIO, MIN_FAILED = 0.05, 5
"""The limits of the failed requests of a minute. The alert waits for five minutes instead: one failure is no reason to
wake anybody."""
MAX_LOST_RATIO = 0.01
"""The limit of the share of lost captures: a restart of the control process loses a few."""
MAX_DROPPED_RATIO, MIN_DROPPED = 0.2, 5
"""The limits of the captures of LOST_SECONDS that were dropped."""
MAX_REPEATED_RATIO, MAX_REPEATED = 0.005, 20
"""The limits of the requests of LONG_SECONDS that were sent twice."""
MAX_OVERHEAD_SECONDS, MIN_OVERHEAD_REQUESTS = 0.01, 100
"""The limit of the 99 % quantile of the relays' overhead, and how many requests it takes to know one."""
MIN_EXPECTED_SCORES = 10.0
"""The least number of expected scores without any of which there is a problem: the probability that none occurs by
chance is e^-10.
"""

LOGGED = {
    "HemostatUpstreamDown": "vLLM answers again",
    "HemostatEngineEjected": "all engines that are not drained get requests again",
}
"""The alerts of which no other part writes a line -> what the log says once the problem is over."""
ALARMS = {
    "budget": ("HemostatHemorrhage", "ALARM: the divergence is larger than alarm.budget_nats"),
    "change": ("HemostatModelChanged", "ALARM: the compressed model no longer matches its baseline"),
}
"""The alert and the text of the problem for each test of the alarm."""
REFERENCE = {
    ReferenceState.STARTING: "The reference is not ready yet",
    ReferenceState.DOWN: "The reference does not answer",
    ReferenceState.MISMATCH: "The reference and the compressed model cannot be compared",
}

UNDECIDED = ("reading", "suspended")
"""The states of `hemostat.control.ownership` in which something is wrong."""


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


class Problems:
    """Reads the parts of the control process, and owns since when each problem is there.

    records: None if none are written. clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        *,
        ownership: OwnershipView,
        link: RelayLink,
        engines: EngineRegistry,
        monitor: ReferenceMonitor,
        measured: Measured,
        canaries: Canaries,
        pipeline: ScoringPipeline,
        adapters: Adapters,
        profiles: ProfileManager,
        store_errors: StoreErrorLog,
        records: RecordsFile | None,
        configuration: Configuration,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._ownership = ownership
        self._link = link
        self._engines, self._reports = engines, engines.reports
        self._monitor = monitor
        self._measured = measured
        self._canaries = canaries
        self._pipeline = pipeline
        self._adapters = adapters
        self._profiles = profiles
        self._store_errors = store_errors
        self._records = records
        self._configuration = configuration
        self._clock = clock
        self._wall = wall
        self._relays = RelayGrowth()
        self._outage = False
        """It is True if no engine has answered, and not every relay has seen one answer since."""
        self._store_failures = Growth(LOST_SECONDS)
        self._lost_records = Growth(LOST_SECONDS)
        self._dropped, self._scored = Growth(LOST_SECONDS), Growth(LOST_SECONDS)
        self._scored_long = Growth(LONG_SECONDS)
        self._found_at: dict[str, tuple[float, float]] = {}
        """Each alert -> monotonic seconds and Unix time at which the problem was found first, without a pause since."""
        self._since: dict[str, float] = {}
        """Each alert that is shown -> Unix time."""

    @property
    def recent(self) -> RecentRequests:
        """The requests of the last minute, at the last look."""
        return self._relays.figures.minute

    def look(self) -> DeploymentState:
        """Returns the present state. Called about once a second: what relays count is compared with a minute ago."""
        now, wall = self._clock(), self._wall()
        found = {
            found.alert: found
            for found in (*self._of_serving(now), *self._of_the_model(wall), *self._of_measuring(now))
        }
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

    def _of_serving(self, now: float) -> Iterator[Found]:
        """Yields the problems that clients notice."""
        if not self._ownership.knows:
            return  # another process serves
        relays = self._relays
        relays.look(now, self._link.reporting, self._link.total())
        if not self._link.relays:
            yield Found("HemostatNoRelays", "No relay process is connected: whether requests are served is not known")
        engines = {
            name: engine for name, engine in self._engines.current().items() if name not in self._engines.drained
        }
        down = {name: engine for name, engine in engines.items() if engine.health.up < engine.health.relays}
        if engines and not any(engine.health.up for engine in engines.values()):
            self._outage = True
            who = "vLLM does not answer" if len(engines) == 1 else f"None of the {len(engines)} engines answers"
            yield Found("HemostatUpstreamDown", f"{who}: {self._failed()}" if relays.figures.failed else who)
            return
        if self._outage and len(down) < len(engines):
            # What failed before every relay could reach an engine again was the outage, which is over.
            self._outage = False
            relays.restart("requests", "failed")
        figures = relays.figures
        if figures.failed_ratio > MAX_FAILED_RATIO and figures.failed >= MIN_FAILED:
            yield Found("HemostatProxyErrors", f"{self._failed()}, in vLLM or on the way to it")
        if down:
            which = ", ".join(_down(name, engine) for name, engine in down.items())
            verb = "gets" if len(down) == 1 else "get"
            yield Found("HemostatEngineEjected", f"{len(down)} of {len(engines)} engines {verb} no requests: {which}")
        if figures.repeated > MAX_REPEATED and figures.repeated_ratio > MAX_REPEATED_RATIO:
            text = f"{figures.repeated:.0f} of {figures.answered:.0f} requests of the last 30 minutes were sent to the"
            yield Found(
                "HemostatRequestsRepeated", f"{text} engine twice, because it did not accept what Hemostat adds"
            )
        p99 = relays.overhead_p99
        if p99 is not None and p99 > MAX_OVERHEAD_SECONDS and sum(relays.overhead) > MIN_OVERHEAD_REQUESTS:
            least = max((edge for edge in OVERHEAD_BUCKETS if edge < p99), default=0.0)
            text = f"Hemostat adds {1000 * least:.0f} ms or more to one request in a hundred"
            yield Found("HemostatOverhead", f"{text}, of those of the last 5 minutes")
        failing = {report.boot_id for report in self._reports.live(now) if report.counters.get("profiles_failed")}
        if failing:
            which = f"{len(failing)} of {self._reports.live_engines(now)} engines"
            text = f"A profile failed in {which}, and is off there until vLLM restarts: see vLLM's log"
            yield Found("HemostatProfileFailed", text)
        if (why := self._adapters.hosts.unusable) is not None:
            yield Found("HemostatAdaptersUnusable", f"Adapters serve or are tested, but no request can use one: {why}")

    def _failed(self) -> str:
        """Returns the share of failed requests, as the beginning of a sentence or its second half."""
        return f"{100.0 * self._relays.figures.failed_ratio:.0f} % of the requests of the last minute failed"

    def _of_the_model(self, wall: float) -> Iterator[Found]:
        """Yields the problems of the served model, its engines and its profiles."""
        raised = self._measured.alarms.raised()
        for test, (alert, text) in ALARMS.items():
            ours = [reading for reading in raised if reading.test == test and reading.raised is not None]
            if ours:
                kinds = ", ".join(reading.kind for reading in ours if reading.kind)
                since = min(reading.raised.since for reading in ours if reading.raised is not None)
                yield Found(alert, f"{text} in {kinds}" if kinds else text, since)

        if stated := list(self._canaries.statements()):
            more = f" (and {len(stated) - 1} more)" if len(stated) > 1 else ""
            yield Found("HemostatCanaryChanged", stated[0][0] + more, min(since for _, since in stated))

        if self._measured.by_engine.outliers:
            rows = [row for row in self._measured.by_engine.report() if row["outlier"]]
            which = ", ".join(
                f"{row['engine']} is {'further from' if row['farther'] else 'closer to'} the reference" for row in rows
            )
            page = ("engines", rows[0]["engine"]) if len(rows) == 1 else ()
            text = f"Engines differ on the same kinds of traffic: {which} than the others"
            yield Found("HemostatEngineOutlier", text, min(row["since"] for row in rows), page)

        harmed = self._measured.outcomes.harmed()
        if harmed:
            kind, proven = next(iter(harmed.items()))
            control, treated = proven["control"]["value"], proven["treated"]["value"]
            figures = f"{proven['outcome']} {treated:.3g} with it, {control:.3g} without"
            more = f" (and {len(harmed) - 1} more kinds)" if len(harmed) > 1 else ""
            text = f"A profile made answers in {kind} worse ({figures}), and was taken from this kind{more}"
            page = ("kinds", kind) if len(harmed) == 1 else ()
            yield Found("HemostatOutcomeHarm", text, min(proven["at"] for proven in harmed.values()), page)

        back = [
            event
            for event in self._profiles.events.newest_first()
            if event["decision"] == Decision.ROLL_BACK and event["at"] > wall - LONG_SECONDS
        ]
        if back:
            place = back[0]["kind"]
            more = f" (and {len(back) - 1} more in the last 30 minutes)" if len(back) > 1 else ""
            text = f"A profile was rolled back{f' in {place}' if place else ''}: {back[0]['why']}{more}"
            yield Found("HemostatCalibrationRolledBack", text, back[-1]["at"])

    def _of_measuring(self, now: float) -> Iterator[Found]:
        """Yields the problems that only the figures and the profiles suffer from."""
        yield from self._of_scoring(now)
        monitor, errors, error = self._monitor, self._store_errors, self._configuration.report.error
        if self._ownership.knows and monitor.state in REFERENCE:
            text = f"{REFERENCE[monitor.state]}: nothing is measured"
            yield Found("HemostatReferenceDown", f"{text} ({monitor.detail})" if monitor.detail else text)
        refused = self._store_failures.look(now, errors.count)
        if self._ownership.state in UNDECIDED:
            yield Found("HemostatStoreErrors", f"Nothing is decided or stored: {self._ownership.why}")
        elif refused:
            text = f"Reads and writes that the store refused in the last 15 minutes: {refused:.0f}"
            why = errors.last_message or "see the log"
            yield Found("HemostatStoreErrors", f"{text}; a restart may lose something ({why})")
        if error:
            yield Found("HemostatReloadFailed", f"The configuration was not reloaded, the former one serves: {error}")
        meter = self._pipeline.noise_floor
        if meter is not None and meter.failing:
            why = "; ".join(f"{model} model: {failure}" for model, failure in meter.failing.items())
            text = "The noise floor cannot be measured, so that the excess KL is not known"
            yield Found("HemostatNoiseFloorUnknown", f"{text} ({why})")
        if other := {version: engines for version, engines in self._reports.plugins(now).items() if not fits(version)}:
            which = f"{sum(other.values())} of {self._reports.live_engines(now)} engines"
            versions = ", ".join(map(shown, sorted(other)))
            text = f"The plugin does not fit Hemostat {__version__} in {which}"
            yield Found("HemostatPluginMisfit", f"{text}: its version there is {versions}")
        if failing := self._adapters.learner.failing:
            yield Found("HemostatAdapterBuildsFail", f"No adapter can be made: {failing}")
        relays = self._relays.figures
        if relays.lost_ratio > MAX_LOST_RATIO:
            lost = f"{relays.lost:.0f} of {relays.captured:.0f} captures of the last 15 minutes were lost"
            yield Found("HemostatCapturesLost", f"{lost} on their way to the control process")
        records = self._lost_records.look(now, self._records.lost) if self._records is not None else 0.0
        if records:
            text = f"Records that could not be written to records.path in the last 15 minutes: {records:.0f}"
            yield Found("HemostatRecordsLost", text)

    def _of_scoring(self, now: float) -> Iterator[Found]:
        """Yields the problem that requests could be scored, and are not, while the reference is ready."""
        relays, pipeline = self._relays, self._pipeline
        endings = pipeline.endings
        dropped_here = float(sum(endings.by_reason(Outcome.DROPPED).values()))
        if self._monitor.state is not ReferenceState.READY:
            # That is a problem of its own, and what is not scored meanwhile is a part of it.
            relays.restart("dropped", "completions")
            self._dropped.restart(dropped_here)
            return
        scored = endings.scored_captures
        dropped = self._dropped.look(now, dropped_here) + relays.figures.dropped
        of = dropped + self._scored.look(now, scored)
        if dropped >= MIN_DROPPED and dropped > MAX_DROPPED_RATIO * of:
            text = f"{dropped:.0f} of {of:.0f} captures of the last 15 minutes were dropped"
            reasons = endings.by_reason(Outcome.DROPPED)
            most = max(reasons, key=reasons.__getitem__, default="")
            yield Found("HemostatShadowDrops", f"{text} (since the start most often for {most})" if most else text)
        expected = relays.figures.completions * (pipeline.rate or 0.0) * pipeline.sampling.fraction
        if not self._scored_long.look(now, scored) and expected > MIN_EXPECTED_SCORES:
            text = (
                f"{relays.figures.completions:.0f} requests were answered in the last 30 minutes, and none was scored"
            )
            yield Found("HemostatShadowStarving", text)


def _down(name: str, engine: Engine) -> str:
    health = engine.health
    return name if not health.up else f"{name} (for {health.relays - health.up} of {health.relays} relays)"
