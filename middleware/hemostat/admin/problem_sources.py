"""The sources of the deployment's problems (`problems.ProblemSource`).

serving         what clients notice
model           the served model, its engines and its profiles
measuring       what only the figures and the profiles suffer from
process         the store, the settings and the files of the control process
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from hemostat import __version__
from hemostat.adapters.live.client import AdapterLearner
from hemostat.adapters.serving.hosts import AdapterHosts
from hemostat.admin.configuration import Configuration
from hemostat.admin.problems import Found, OwnershipView
from hemostat.admin.recent import LONG_SECONDS, LOST_SECONDS, Growth, RelayGrowth
from hemostat.canaries.keeper import Canaries
from hemostat.engines.engine import Engine
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.reports import PluginReports
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import OVERHEAD_BUCKETS
from hemostat.measurement.measured import Measured
from hemostat.metrics.reasons import Outcome
from hemostat.profiles.decisions import Decision, EventLog
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ReferenceState
from hemostat.scoring.noise_floor import NoiseFloorMeter
from hemostat.scoring.pipeline import ScoringPipeline
from hemostat.scoring.records_file import RecordsFile
from hemostat.store.errors import StoreErrorLog
from hemostat_calibration.plugin_version import fits, shown

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


NO_RELAYS = "No relay process is connected: whether requests are served is not known"
NO_PLUGINS = "No vLLM with Hemostat's plugin reports: nothing is measured"
"""The same problem, where plugins sample in place of relays."""


class GateProblem(Protocol):
    """The part of `hemostat.gate.live.keeper.ShadowGate` that is read here."""

    @property
    def state(self) -> str: ...

    def problem(self) -> tuple[str, float] | None:
        """Returns what is wrong, in one line, and since when (Unix time)."""


class ServingProblems:
    """Finds the problems that clients notice. It updates `relays`, which the other sources only read."""

    def __init__(
        self,
        ownership: OwnershipView,
        link: RelayLink,
        relays: RelayGrowth,
        engines: EngineRegistry,
        adapters: AdapterHosts,
    ) -> None:
        self._ownership = ownership
        self._link = link
        self._relays = relays
        self._engines = engines
        self._adapters = adapters
        self._outage = False
        """It is True if no engine has answered, and not every relay has seen one answer since."""

    def problems(self, now: float, wall: float) -> Iterator[Found]:
        if not self._ownership.knows:
            return  # another process serves
        relays = self._relays
        relays.update(now, self._link.reporting, self._link.total())
        if not self._link.relays:
            alone = self._engines.reports.passive.enabled
            yield Found("HemostatNoRelays", NO_PLUGINS if alone else NO_RELAYS)
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
        failing = {
            report.boot_id for report in self._engines.reports.live(now) if report.counters.get("profiles_failed")
        }
        if failing:
            which = f"{len(failing)} of {self._engines.reports.live_engines(now)} engines"
            text = f"A profile failed in {which}, and is off there until vLLM restarts: see vLLM's log"
            yield Found("HemostatProfileFailed", text)
        if (why := self._adapters.unusable) is not None:
            yield Found("HemostatAdaptersUnusable", f"Adapters serve or are tested, but no request can use one: {why}")

    def _failed(self) -> str:
        """Returns the share of failed requests, as the beginning of a sentence or its second half."""
        return f"{100.0 * self._relays.figures.failed_ratio:.0f} % of the requests of the last minute failed"


class ModelProblems:
    """Finds the problems of the served model, its engines and its profiles."""

    def __init__(self, measured: Measured, canaries: Canaries, events: EventLog, gate: GateProblem) -> None:
        self._measured = measured
        self._canaries = canaries
        self._events = events
        self._gate = gate

    def problems(self, now: float, wall: float) -> Iterator[Found]:
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
            for event in self._events.newest_first()
            if event["decision"] == Decision.ROLL_BACK and event["at"] > wall - LONG_SECONDS
        ]
        if back:
            place = back[0]["kind"]
            more = f" (and {len(back) - 1} more in the last 30 minutes)" if len(back) > 1 else ""
            text = f"A profile was rolled back{f' in {place}' if place else ''}: {back[0]['why']}{more}"
            yield Found("HemostatCalibrationRolledBack", text, back[-1]["at"])

        if (problem := self._gate.problem()) is not None:
            alert = "HemostatGateFailed" if self._gate.state == "fail" else "HemostatGateUndecided"
            yield Found(alert, f"The live gate: {problem[0]}", problem[1])


class MeasuringProblems:
    """Finds the problems that only the figures and the profiles suffer from."""

    def __init__(
        self,
        ownership: OwnershipView,
        monitor: ReferenceMonitor,
        pipeline: ScoringPipeline,
        noise_floor: NoiseFloorMeter | None,
        relays: RelayGrowth,
        reports: PluginReports,
        adapter_learner: AdapterLearner,
    ) -> None:
        self._ownership = ownership
        self._monitor = monitor
        self._pipeline = pipeline
        self._noise_floor = noise_floor
        self._relays = relays
        self._reports = reports
        self._adapter_learner = adapter_learner
        self._dropped, self._scored = Growth(LOST_SECONDS), Growth(LOST_SECONDS)
        self._scored_long = Growth(LONG_SECONDS)

    def problems(self, now: float, wall: float) -> Iterator[Found]:
        yield from self._of_scoring(now)
        if self._ownership.knows and self._monitor.state in REFERENCE:
            text = f"{REFERENCE[self._monitor.state]}: nothing is measured"
            yield Found("HemostatReferenceDown", f"{text} ({self._monitor.detail})" if self._monitor.detail else text)
        meter = self._noise_floor
        if meter is not None and meter.failing:
            why = "; ".join(f"{model} model: {failure}" for model, failure in meter.failing.items())
            text = "The noise floor cannot be measured, so that the excess KL is not known"
            yield Found("HemostatNoiseFloorUnknown", f"{text} ({why})")
        if other := {version: engines for version, engines in self._reports.plugins(now).items() if not fits(version)}:
            which = f"{sum(other.values())} of {self._reports.live_engines(now)} engines"
            versions = ", ".join(map(shown, sorted(other)))
            text = f"The plugin does not fit Hemostat {__version__} in {which}"
            yield Found("HemostatPluginMisfit", f"{text}: its version there is {versions}")
        if failing := self._adapter_learner.failing:
            yield Found("HemostatAdapterBuildsFail", f"No adapter can be made: {failing}")
        relays = self._relays.figures
        if relays.lost_ratio > MAX_LOST_RATIO:
            lost = f"{relays.lost:.0f} of {relays.captured:.0f} captures of the last 15 minutes were lost"
            yield Found("HemostatCapturesLost", f"{lost} on their way to the control process")

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
        dropped = self._dropped.update(now, dropped_here).get() + relays.figures.dropped
        of = dropped + self._scored.update(now, scored).get()
        if dropped >= MIN_DROPPED and dropped > MAX_DROPPED_RATIO * of:
            text = f"{dropped:.0f} of {of:.0f} captures of the last 15 minutes were dropped"
            reasons = endings.by_reason(Outcome.DROPPED)
            most = max(reasons, key=reasons.__getitem__, default="")
            yield Found("HemostatShadowDrops", f"{text} (since the start most often for {most})" if most else text)
        expected = relays.figures.completions * (pipeline.rate or 0.0) * pipeline.sampling.fraction
        if not self._scored_long.update(now, scored).get() and expected > MIN_EXPECTED_SCORES:
            text = (
                f"{relays.figures.completions:.0f} requests were answered in the last 30 minutes, and none was scored"
            )
            yield Found("HemostatShadowStarving", text)


class ProcessProblems:
    """Finds the problems of the control process's store, settings and files. records: None if none are written."""

    def __init__(
        self,
        ownership: OwnershipView,
        store_errors: StoreErrorLog,
        configuration: Configuration,
        records: RecordsFile | None,
    ) -> None:
        self._ownership = ownership
        self._store_errors = store_errors
        self._configuration = configuration
        self._records = records
        self._store_failures = Growth(LOST_SECONDS)
        self._lost_records = Growth(LOST_SECONDS)

    def problems(self, now: float, wall: float) -> Iterator[Found]:
        refused = self._store_failures.update(now, self._store_errors.count).get()
        if self._ownership.state in UNDECIDED:
            yield Found("HemostatStoreErrors", f"Nothing is decided or stored: {self._ownership.why}")
        elif refused:
            text = f"Reads and writes that the store refused in the last 15 minutes: {refused:.0f}"
            why = self._store_errors.last_message or "see the log"
            yield Found("HemostatStoreErrors", f"{text}; a restart may lose something ({why})")
        if error := self._configuration.report.error:
            yield Found("HemostatReloadFailed", f"The configuration was not reloaded, the former one serves: {error}")
        records = self._lost_records.update(now, self._records.lost).get() if self._records is not None else 0.0
        if records:
            text = f"Records that could not be written to records.path in the last 15 minutes: {records:.0f}"
            yield Found("HemostatRecordsLost", text)


def _down(name: str, engine: Engine) -> str:
    health = engine.health
    return name if not health.up else f"{name} (for {health.relays - health.up} of {health.relays} relays)"
