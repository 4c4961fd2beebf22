"""The status that the admin port and the console show: one typed struct, and where each part of it comes from.

`progress` says which waiting times of the settings have passed: what is known now, and what comes when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from hemostat.admin.background import background
from hemostat.admin.configuration import Configuration, ConfigurationReport
from hemostat.admin.problems import DeploymentState, OwnershipView, Problems
from hemostat.admin.proxy_status import ArmEndings, ProxyStatus, endings_by_arm, proxy_status
from hemostat.admin.recent import RelayGrowth
from hemostat.admin.status_parts import (
    CalibrationParts,
    CompressedStatus,
    EngineParts,
    EnginesStatus,
    LaterStatus,
    ModelStatus,
    PassiveStatus,
    ProfileStatus,
    QueueStatus,
    RecoveredStatus,
    ReferenceStatus,
    Report,
    RequestsStatus,
    ScoringParts,
    ShadowStatus,
    SpoolStatus,
    UpstreamStatus,
)
from hemostat.config.schema import Settings
from hemostat.config.waiting_times import Step, waiting_times
from hemostat.ipc.control_end import RelayLink
from hemostat.measurement.measured import Measured


class StepStatus(msgspec.Struct, frozen=True):
    """One figure or decision that takes time."""

    step: Step
    what: str
    when: str
    """The earliest moment, in words."""
    known: bool
    """It is True if the figure or decision is there."""


def progress(
    settings: Settings,
    *,
    scored: int,
    kl: Mapping[str, Any],
    alarm: Mapping[str, Any],
    canaries: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> list[StepStatus]:
    """Returns the waiting times of the settings, each with whether it has passed.

    kl: `raw.kl_nats` of the status. The other arguments are the parts of the status with the same names.
    """
    known: dict[Step, bool] = {
        "figure": scored > 0,
        "interval": _has_interval(kl, "ci95_seen") or _has_interval(kl, "ci95"),
        "cycle": _has_interval(kl, "ci95"),
        "canaries": canaries["set"] is not None,
        "alarm": any(test["begun"] for test in alarm["tests"]),
        "promotion": any(kind["version"] for kind in calibration["kinds"]),
    }
    return [StepStatus(time.step, time.what, time.when, known[time.step]) for time in waiting_times(settings)]


def _has_interval(kl: Mapping[str, Any], name: str) -> bool:
    """Returns True if the figure has an interval. An interval that goes up to all that the figure can be says
    nothing."""
    high = kl.get(name, [None, None])[1]
    return high is not None and high < kl["cap"]


class ControlStatus(msgspec.Struct, frozen=True):
    """The state of this control process, from `control.ownership`. detail: one line that says why it is not active."""

    state: str
    detail: str


class Status(msgspec.Struct, frozen=True):
    """The body of `GET /api/v1/status`. Field names are the JSON's; the console and scripts rely on them."""

    at: float
    """The Unix time in seconds."""
    state: DeploymentState
    """The present problems, worst first."""
    background: str
    """One line on what runs in the background, how far it is, and what the next decision waits for; "" if nothing
    does."""
    progress: list[StepStatus]
    """The figures and decisions that take time: which are there, and when the others come."""
    requests: RequestsStatus
    coverage: Report
    """The part of what sampled requests generated that is scored, by kind, and the reasons for the rest:
    `measurement.coverage`.
    """
    tokens_scored: int
    top_k: int
    raw: Report
    """The figures of the compressed model itself: `measurement.figures`."""
    where: list[Report]
    """The raw figures by route and label."""
    kinds: list[Report]
    """The figures by kind of traffic: raw figures, what its arms were served, and what a profile gained."""
    conditional: Report
    """The figures of requests that a grammar restricts, which are in no other figure: `measurement.conditional`."""
    arms: Report
    alarm: Report
    outcomes: Report
    """The outcomes by kind of traffic and arm: `measurement.outcomes`."""
    decoding: list[Report]
    places: Report
    """The figures by position in the output, length of the context, and phase of a reasoning model:
    `measurement.by_place`.
    """
    thinking: Report
    """The length of the thinking and how often it does not end, by arm: `measurement.thinking`."""
    trajectory: Report
    noise_floor: Report
    excess: Report
    calibrated: Report
    profile: ProfileStatus
    calibration: Report
    learner: Report
    adapter: Report
    """The adapters that are made and judged: `adapters.live.assembly`; docs/calibration.md#adapters."""
    recovered: RecoveredStatus
    proxy: ProxyStatus
    endings: dict[str, ArmEndings]
    """The ways in which responses ended, by arm."""
    shadow: ShadowStatus
    queue: QueueStatus
    later: LaterStatus | None
    """The period of the figures where the spool is scored in a window; None without one."""
    spool: SpoolStatus | None
    """None without `spool.path`."""
    compressed: CompressedStatus
    models: list[ModelStatus]
    reference: ReferenceStatus
    engines: EnginesStatus
    passive: PassiveStatus | None
    """None if relays sample: docs/engines.md#measuring-with-the-plugin-alone."""
    upstream: list[UpstreamStatus]
    """The engines that requests go to."""
    outlier_engine: Report
    """The state of the comparison of engines, and why there is none: `measurement.by_engine`."""
    canaries: Report
    """The same sequences on every engine again: `canaries.keeper`; docs/engines.md#canaries."""
    gate: Report
    """The live gate: `gate.live.keeper`; docs/gate.md#live."""
    records_written: int
    relays: int
    data_port: int
    configuration: ConfigurationReport
    control: ControlStatus


@dataclass(frozen=True, slots=True)
class ProcessParts:
    """The parts that describe this control process. data_port: 0 if relays are on other machines."""

    problems: Problems
    ownership: OwnershipView
    link: RelayLink
    growth: RelayGrowth
    configuration: Configuration
    data_port: int

    @property
    def ready(self) -> bool:
        """It is True if at least one relay takes requests, or if they are on other machines; the reference does not
        matter.
        """
        return self.link.ready or not self.data_port

    def control(self) -> ControlStatus:
        return ControlStatus(state=str(self.ownership.state), detail=self.ownership.why)


class StatusSource:
    """Reads the parts of the control process; owns no state of theirs. Cheap: nothing is computed over records.

    clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        settings: Settings,
        process: ProcessParts,
        scoring: ScoringParts,
        engines: EngineParts,
        measured: Measured,
        calibration: CalibrationParts,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.settings = settings
        """The settings in force; they may be replaced."""
        self._process = process
        self._scoring = scoring
        self._engines = engines
        self._measured = measured
        self._calibration = calibration
        self._clock = clock
        self._wall = wall
        self._started = clock()

    @property
    def ready(self) -> bool:
        return self._process.ready

    def current(self) -> Status:
        now, settings = self._clock(), self.settings.shadow
        process, scoring, engines, calibration = self._process, self._scoring, self._engines, self._calibration
        measured, measurements, totals = self._measured, self._measured.measurements, process.link.total()
        state = process.problems.look()
        raw, alarm, canaries = measurements.summary(None), measured.alarms.report(), engines.canaries.report()
        profiles, learner, adapter = (
            calibration.profiles.report.status(),
            calibration.learner.status(),
            calibration.adapters(),
        )
        return Status(
            at=self._wall(),
            state=state,
            background=background(learner, adapter, profiles["next_decision"]),
            progress=progress(
                self.settings,
                scored=scoring.scored,
                kl=raw["kl_nats"],
                alarm=alarm,
                canaries=canaries,
                calibration=profiles,
            ),
            requests=scoring.requests(totals),
            coverage=scoring.pipeline.coverage.report(),
            tokens_scored=measurements.tokens,
            top_k=settings.top_k,
            raw=raw,
            where=measurements.where(),
            kinds=measurements.by_kind.report(),
            conditional=measurements.conditional.report(),
            arms=measurements.arms(),
            alarm=alarm,
            outcomes=measured.outcomes.report(),
            decoding=measurements.by_decoding.report(),
            places=measurements.by_place.report(),
            thinking=measurements.thinking.report(),
            trajectory=measurements.survival.report(),
            noise_floor=measurements.noise_floor(),
            excess=measurements.excess(),
            calibrated=measurements.summary(calibration.version),
            profile=calibration.profile(),
            calibration=profiles,
            learner=learner,
            adapter={**adapter, "distances": dict(scoring.pipeline.users.distances.outcomes)},
            recovered=calibration.recovered(measurements),
            proxy=proxy_status(totals, process.growth.figures.minute),
            endings=endings_by_arm(totals),
            shadow=scoring.shadow(settings, now - self._started),
            queue=scoring.queue(now),
            later=scoring.later(),
            spool=scoring.spool(),
            compressed=scoring.compressed(),
            models=scoring.models(),
            reference=scoring.reference(),
            engines=engines.engines(now),
            passive=engines.passive(now),
            upstream=engines.upstream(measured.by_engine.report(), now),
            outlier_engine=measured.by_engine.status(),
            canaries=canaries,
            gate=engines.gate.report(),
            records_written=scoring.records_written,
            relays=process.link.relays,
            data_port=process.data_port,
            configuration=process.configuration.report,
            control=process.control(),
        )
