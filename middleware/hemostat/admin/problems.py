"""What is wrong with the deployment now, worst first: the one list that the status, the console and `hemostat engines`
show. Each problem has the name of the alert that Prometheus raises for it, and that alert's section of the runbook."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

import msgspec

from hemostat.adapters.live.client import AdapterLearner
from hemostat.admin.configuration import Configuration
from hemostat.admin.recent import LOST_SECONDS, Growth, RelayGrowth
from hemostat.canaries.keeper import Canaries
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.upstreams import UpstreamEngine, UpstreamEngines
from hemostat.ipc.control_end import RelayLink
from hemostat.measurement.alarms import Alarms
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ReferenceState
from hemostat.scoring.pipeline import ScoringPipeline
from hemostat.scoring.records_file import RecordsFile
from hemostat.store.errors import StoreErrorLog

log = logging.getLogger("hemostat.control")

MAX_FAILED_RATIO, MIN_FAILED = 0.05, 5
"""Of the requests of a minute. The alert waits for five minutes instead: one failure is no reason to wake anybody."""
MAX_LOST_RATIO = 0.01
"""Of captures: a restart of the control process loses a few."""

Severity = Literal["critical", "warning"]
SEVERITIES: dict[str, Severity] = {
    "HemostatNoRelays": "critical",
    "HemostatUpstreamDown": "critical",
    "HemostatProxyErrors": "critical",
    "HemostatHemorrhage": "critical",
    "HemostatModelChanged": "warning",
    "HemostatCanaryChanged": "warning",
    "HemostatEngineEjected": "warning",
    "HemostatProfileFailed": "warning",
    "HemostatReferenceDown": "warning",
    "HemostatStoreErrors": "warning",
    "HemostatReloadFailed": "warning",
    "HemostatNoiseFloorUnknown": "warning",
    "HemostatAdapterBuildsFail": "warning",
    "HemostatCapturesLost": "warning",
    "HemostatRecordsLost": "warning",
}
"""Of the alerts whose problems are looked for here, worst first. The rules for Prometheus say the same."""
LOGGED = {
    "HemostatUpstreamDown": "vLLM answers again",
    "HemostatEngineEjected": "all engines that are not drained get requests again",
}
"""Of which no other part writes a line: alert -> what the log says once the problem is over."""
ALARMS = {
    "budget": ("HemostatHemorrhage", "ALARM: the divergence is larger than alarm.budget_nats"),
    "change": ("HemostatModelChanged", "ALARM: the compressed model no longer matches its baseline"),
}
"""By test."""
REFERENCE = {
    ReferenceState.STARTING: "The reference is not ready yet",
    ReferenceState.DOWN: "The reference does not answer",
    ReferenceState.MISMATCH: "The reference and the compressed model cannot be compared",
}

UNDECIDED = ("reading", "suspended")
"""Of the states of `hemostat.control.ownership`, those in which something is wrong."""


class OwnershipView(Protocol):
    """Of `hemostat.control.ownership.Ownership`."""

    @property
    def state(self) -> str: ...

    @property
    def why(self) -> str: ...

    @property
    def knows(self) -> bool: ...

    def require_active(self) -> None:
        """NotActiveError."""


class Problem(msgspec.Struct, frozen=True):
    alert: str
    severity: Severity
    since: float
    """Unix time."""
    text: str
    """One line."""
    runbook: str
    """The alert's section, relative to the address of the admin port."""


class DeploymentState(msgspec.Struct, frozen=True):
    level: Literal["ok", "warning", "critical"]
    """The severity of the worst problem."""
    problems: list[Problem]
    """Worst first."""


class Found(NamedTuple):
    alert: str
    text: str
    since: float | None = None
    """Unix time, where it is known. Else it is when the problem was found first."""


class Problems:
    """Reads the parts of the control process, and owns since when each problem is there.

    records: None where none are written. clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        *,
        ownership: OwnershipView,
        link: RelayLink,
        engines: EngineRegistry,
        upstreams: UpstreamEngines,
        monitor: ReferenceMonitor,
        alarms: Alarms,
        canaries: Canaries,
        pipeline: ScoringPipeline,
        adapters: AdapterLearner,
        store_errors: StoreErrorLog,
        records: RecordsFile | None,
        configuration: Configuration,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._ownership = ownership
        self._link = link
        self._engines = engines
        self._upstreams = upstreams
        self._monitor = monitor
        self._alarms = alarms
        self._canaries = canaries
        self._pipeline = pipeline
        self._adapters = adapters
        self._store_errors = store_errors
        self._records = records
        self._configuration = configuration
        self._clock = clock
        self._wall = wall
        self._relays = RelayGrowth()
        self._store_failures = Growth(LOST_SECONDS)
        self._lost_records = Growth(LOST_SECONDS)
        self._since: dict[str, float] = {}
        """By alert."""

    def look(self) -> DeploymentState:
        """The present state. Called about once a second: what relays count is compared with a minute ago."""
        now, wall = self._clock(), self._wall()
        raised = {
            problem.alert: problem
            for problem in (*self._of_serving(now), *self._of_the_model(), *self._of_measuring(now))
        }
        for alert, over in LOGGED.items():
            if alert in raised and alert not in self._since:
                log.log(logging.ERROR if SEVERITIES[alert] == "critical" else logging.WARNING, "%s", raised[alert].text)
            elif alert in self._since and self._ownership.knows and not LOGGED.keys() & raised.keys():
                log.info("%s", over)
        self._since = {alert: problem.since or self._since.get(alert, wall) for alert, problem in raised.items()}
        problems = [
            Problem(alert, severity, self._since[alert], raised[alert].text, f"runbook#{alert.lower()}")
            for alert, severity in SEVERITIES.items()
            if alert in raised
        ]
        return DeploymentState(problems[0].severity if problems else "ok", problems)

    def _of_serving(self, now: float) -> Iterator[Found]:
        """What clients notice."""
        if not self._ownership.knows:
            return  # another process serves
        relays = self._relays
        relays.look(now, self._link.reporting, self._link.total())
        failed = f"{100.0 * relays.failed_ratio:.0f} % of the requests of the last minute failed"
        if not self._link.relays:
            yield Found("HemostatNoRelays", "No relay process is connected: whether requests are served is not known")
        engines = {
            name: engine for name, engine in self._upstreams.current().items() if name not in self._upstreams.drained
        }
        down = {name: engine for name, engine in engines.items() if engine.up < engine.relays}
        if engines and not any(engine.up for engine in engines.values()):
            who = "vLLM does not answer" if len(engines) == 1 else f"None of the {len(engines)} engines answers"
            yield Found("HemostatUpstreamDown", f"{who}: {failed}" if relays.failed else who)
            return
        if relays.failed_ratio > MAX_FAILED_RATIO and relays.failed >= MIN_FAILED:
            yield Found("HemostatProxyErrors", f"{failed}, in vLLM or on the way to it")
        if down:
            which = ", ".join(_down(name, engine) for name, engine in down.items())
            verb = "gets" if len(down) == 1 else "get"
            yield Found("HemostatEngineEjected", f"{len(down)} of {len(engines)} engines {verb} no requests: {which}")
        failing = {engine.boot_id for engine in self._engines.live(now) if engine.counters.get("profiles_failed")}
        if failing:
            which = f"{len(failing)} of {self._engines.live_engines(now)} engines"
            text = f"A profile failed in {which}, and is off there until vLLM restarts: see vLLM's log"
            yield Found("HemostatProfileFailed", text)

    def _of_the_model(self) -> Iterator[Found]:
        raised = self._alarms.raised()
        for test, (alert, text) in ALARMS.items():
            ours = [reading for reading in raised if reading.test == test and reading.raised is not None]
            if ours:
                kinds = ", ".join(reading.kind for reading in ours if reading.kind)
                since = min(reading.raised.since for reading in ours if reading.raised is not None)
                yield Found(alert, f"{text} in {kinds}" if kinds else text, since)

        if stated := list(self._canaries.statements()):
            more = f" (and {len(stated) - 1} more)" if len(stated) > 1 else ""
            yield Found("HemostatCanaryChanged", stated[0][0] + more, min(since for _, since in stated))

    def _of_measuring(self, now: float) -> Iterator[Found]:
        """What only the figures and the profiles miss."""
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
        if self._adapters.failing:
            yield Found("HemostatAdapterBuildsFail", f"No adapter can be made: {self._adapters.failing}")
        if self._relays.lost_ratio > MAX_LOST_RATIO:
            lost = f"{self._relays.lost:.0f} of {self._relays.captured:.0f} captures of the last 15 minutes were lost"
            yield Found("HemostatCapturesLost", f"{lost} on their way to the control process")
        records = self._lost_records.look(now, self._records.lost) if self._records is not None else 0.0
        if records:
            text = f"Records that could not be written to records.path in the last 15 minutes: {records:.0f}"
            yield Found("HemostatRecordsLost", text)


def _down(name: str, engine: UpstreamEngine) -> str:
    return name if not engine.up else f"{name} (for {engine.relays - engine.up} of {engine.relays} relays)"
