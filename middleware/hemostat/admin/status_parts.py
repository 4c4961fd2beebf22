"""The parts of the status, each with the parts of the control process that it is read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from hemostat.canaries.keeper import Canaries
from hemostat.config.schema import Shadow
from hemostat.engines.passive import PLUGIN_ALONE
from hemostat.engines.registry import EngineRegistry
from hemostat.ipc.messages import Stats
from hemostat.learner.client import Learner
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat.metrics.reasons import Outcome
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ModelPair
from hemostat.scoring.offline.evidence_time import EvidenceTime
from hemostat.scoring.pipeline import ScoringPipeline
from hemostat.scoring.records_file import RecordsFile
from hemostat_calibration.profiles.profile import IDENTITY

Report = dict[str, Any]
"""The figures of a subsystem, JSON-ready. Their keys are that subsystem's: names of figures, versions, reasons."""


class RequestsStatus(msgspec.Struct, frozen=True):
    """The numbers of sampled requests, by what became of them."""

    shadowed: int
    scored: int
    skipped: dict[str, int]
    """The number of skipped requests by reason, counted by relays and by this process."""
    dropped: dict[str, int]
    pending: int


class ProfileStatus(msgspec.Struct, frozen=True):
    """The profile that serves, or in mode `observe` would."""

    version: str
    family: str
    mode: str


class RecoveredStatus(msgspec.Struct, frozen=True):
    """The part of the divergence that the profile removes, on the same tokens."""

    ratio: float | None
    ci95: list[float | None]
    gain_nats: Report | None
    no_interval: str | None
    """The reason why `ci95` has no ends although the dependence of the requests is known."""


class ShadowStatus(msgspec.Struct, frozen=True):
    rate: float
    reference_tokens: int
    reference_tokens_per_second: float
    """The budget; 0: no limit."""
    uptime_seconds: float


class LaterStatus(msgspec.Struct, frozen=True):
    """The scoring of the spool in the window of `spool.score`."""

    figures_from: float | None
    """The Unix time of the first request that figures and alarms are of since the start, in seconds; None before it."""
    figures_until: float | None
    """The Unix time of their last request."""
    scored: int
    not_scored: dict[str, int]
    """The number of the others by reason."""
    segments_left_out: int
    """The number of segments that cannot be read; the log names each of them."""


class SpoolStatus(msgspec.Struct, frozen=True):
    """The spool, and what became of captures there since the start."""

    bytes: int
    """The size of all files."""
    written: int
    """The number of captures that were written."""
    lost: int
    """The number of captures that could not be written, or could not be read in a journal."""
    refused: int
    """The number of captures that were not admitted, as the spool is more than half full."""
    journals_left: int
    """The number of journals of earlier processes that cannot be read; the log names each of them."""


class QueueStatus(msgspec.Struct, frozen=True):
    depth: int
    lag_seconds: float
    """The age of the oldest capture that waits."""


class CompressedStatus(msgspec.Struct, frozen=True):
    models: list[str]
    adapters: list[str]
    """The LoRA adapters that the reference serves, too."""


class ModelStatus(msgspec.Struct, frozen=True):
    """A served base model, and the reference that belongs to it."""

    names: list[str]
    root: str
    """The path that its server loaded it from, as the server says; "" if it does not."""
    adapters: list[str]
    """The LoRA adapters that its reference serves, too."""
    reference: str
    """The name of its reference; "" without a match: then the model's requests are neither scored nor treated."""
    state: str
    detail: str
    """The reason why the model is not scored, or the reference with which it is."""
    calibrated: bool
    """It is True if profiles are for this model; all figures outside of `models` are of it."""
    figures: Report
    """The figures of a matched model that is not calibrated."""


class ReferenceStatus(msgspec.Struct, frozen=True):
    state: str
    detail: str


class EnginesStatus(msgspec.Struct, frozen=True):
    live: int
    acknowledged: list[str]
    """The profile versions that every rank of every engine holds."""
    counters: dict[str, int]
    ignored_addresses: int
    """The number of addresses that relays have reported as engines, and that are none of the upstream's."""


class PassiveStatus(msgspec.Struct, frozen=True):
    """The state of measuring with the plugin alone."""

    servers: int
    """The number of processes of vLLM's API servers whose plugin reports."""
    reads_headers: bool
    """It is True if each of them reads clients' headers, so that `X-Hemostat-Shadow: off` opts out."""
    needs_proxy: str
    """The sentence that says what does not work without the proxy."""


class UpstreamStatus(msgspec.Struct, frozen=True):
    """One of the engines that requests go to."""

    engine: str
    """The address as host:port."""
    relays: int
    up: int
    """The number of relays that take it for healthy."""
    drained: bool
    excluded: bool
    """It gets no new requests, since canaries state that it is an outlier: `upstream.outlier`."""
    outstanding: int
    requests: int
    resent: int
    ejections: int
    figures: Report
    """The engine's scored figures, and whether it is an outlier: `measurement.by_engine`. It is empty before that is
    known.
    """
    holds: list[str] | None
    """The profile versions that its plugin holds; None while it is not known which of the engines that report it is.
    With one upstream address, what all engines hold. Adapters: `adapter.engine`."""


class SpooledScoring(Protocol):
    """The part of `hemostat.scoring.offline.window.SpoolScoring` that the status shows."""

    scored: int

    @property
    def unscored(self) -> Mapping[str, int]: ...
    @property
    def left_out(self) -> int: ...
    @property
    def evidence_time(self) -> EvidenceTime: ...


class SpooledCaptures(Protocol):
    """The part of `hemostat.scoring.spool.spool.Spool` that the status shows."""

    written: int
    lost: int
    refused: int

    @property
    def bytes(self) -> int: ...
    @property
    def left(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ScoringParts:
    """The parts that sample and score. records: None if no records are written. spooled: None if nothing is scored in a
    window. captures: None without a spool."""

    monitor: ReferenceMonitor
    pipeline: ScoringPipeline
    records: RecordsFile | None
    spooled: SpooledScoring | None = None
    captures: SpooledCaptures | None = None

    @property
    def scored(self) -> int:
        """The number of captures that were scored, at once or later."""
        return self.pipeline.endings.scored_captures + (0 if self.spooled is None else self.spooled.scored)

    def later(self) -> LaterStatus | None:
        if self.spooled is None:
            return None
        time = self.spooled.evidence_time
        until = None if time.began is None else time.now()
        return LaterStatus(time.began, until, self.spooled.scored, dict(self.spooled.unscored), self.spooled.left_out)

    def spool(self) -> SpoolStatus | None:
        spool = self.captures
        if spool is None:
            return None
        return SpoolStatus(spool.bytes, spool.written, spool.lost, spool.refused, spool.left)

    def requests(self, totals: Stats) -> RequestsStatus:
        endings = self.pipeline.endings
        by_outcome = {}
        for outcome in (Outcome.SKIPPED, Outcome.DROPPED):
            by_reason: dict[str, int] = {}
            for (which, reason), value in totals.counters.get(names.SHADOW_REQUESTS, {}).items():
                if which == outcome:
                    by_reason[reason] = by_reason.get(reason, 0) + int(value)
            for reason, count in endings.by_reason(outcome).items():
                by_reason[reason] = by_reason.get(reason, 0) + count
            by_outcome[outcome] = by_reason
        return RequestsStatus(
            shadowed=self.pipeline.received,
            scored=self.scored,
            skipped=by_outcome[Outcome.SKIPPED],
            dropped=by_outcome[Outcome.DROPPED],
            pending=self.pipeline.pending,
        )

    def shadow(self, settings: Shadow, uptime_seconds: float) -> ShadowStatus:
        return ShadowStatus(
            rate=settings.rate * self.pipeline.sampling.fraction,
            reference_tokens=self.pipeline.reference_tokens,
            reference_tokens_per_second=settings.reference_tokens_per_second,
            uptime_seconds=uptime_seconds,
        )

    def queue(self, now: float) -> QueueStatus:
        queue = self.pipeline.queue
        return QueueStatus(depth=len(queue), lag_seconds=queue.lag_seconds(now))

    def compressed(self) -> CompressedStatus:
        served = self.monitor.served
        return CompressedStatus(models=sorted(served.models), adapters=sorted(served.scorable_adapters))

    def models(self) -> list[ModelStatus]:
        return [self._model(pair) for pair in self.monitor.served.pairs]

    def _model(self, pair: ModelPair) -> ModelStatus:
        calibrated, matched = pair is self.monitor.served.calibrated, pair.reference is not None
        return ModelStatus(
            names=sorted(pair.names),
            root=pair.root,
            adapters=sorted(pair.scorable_adapters),
            reference=pair.reference.model if pair.reference is not None else "",
            state=pair.state.value,
            detail=pair.detail,
            calibrated=calibrated,
            figures=self.pipeline.users.other_models.report(pair.name) if matched and not calibrated else {},
        )

    def reference(self) -> ReferenceStatus:
        return ReferenceStatus(state=self.monitor.state.value, detail=self.monitor.detail)

    @property
    def records_written(self) -> int:
        return self.records.written if self.records is not None else 0


class GateReport(Protocol):
    """The part of `hemostat.gate.live.keeper.ShadowGate` that the status shows."""

    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The engines: those that report, and those that requests go to."""

    registry: EngineRegistry
    canaries: Canaries
    gate: GateReport

    def engines(self, now: float) -> EnginesStatus:
        return EnginesStatus(
            live=self.registry.reports.live_engines(now),
            acknowledged=sorted(self.registry.reports.acknowledged(now)),
            counters=self.registry.reports.counters(now),
            ignored_addresses=len(self.registry.configured.ignored),
        )

    def passive(self, now: float) -> PassiveStatus | None:
        """Returns None if this control process has relays, so that plugins sample nothing themselves."""
        plugins = self.registry.reports.passive
        if not plugins.enabled:
            return None
        return PassiveStatus(plugins.live(now), plugins.reads_headers(now), PLUGIN_ALONE)

    def upstream(self, figures: list[Report], now: float) -> list[UpstreamStatus]:
        """Returns the status of each engine. figures: the list from `measurement.by_engine`."""
        by_engine = {row["engine"]: row for row in figures}
        held, excluded = self.registry.shown(now), self.registry.excluded
        return [
            UpstreamStatus(
                engine=name,
                relays=engine.health.relays,
                up=engine.health.up,
                drained=name in self.registry.drained,
                excluded=name in excluded,
                outstanding=engine.health.outstanding,
                requests=engine.health.requests,
                resent=engine.health.resent,
                ejections=engine.health.ejections,
                figures=by_engine.get(name, {}),
                holds=sorted(held[name]) if name in held else None,
            )
            for name, engine in self.registry.current().items()
        ]


@dataclass(frozen=True, slots=True)
class CalibrationParts:
    """The parts that learn, judge and serve. adapters: returns the status of the adapters that are made and judged."""

    profiles: ProfileManager
    learner: Learner
    adapters: Callable[[], Report]

    @property
    def version(self) -> str | None:
        """The version of the profile that serves, or that would serve in mode `observe`."""
        return self.profiles.serving.reported

    def profile(self) -> ProfileStatus:
        profile = self.profiles.catalogue.get(self.version)
        return ProfileStatus(
            version=self.version or IDENTITY,
            family=profile.family if profile else IDENTITY,
            mode=self.profiles.serving.mode,
        )

    def recovered(self, measurements: Measurements) -> RecoveredStatus:
        recovered = measurements.recovered(self.version) or {}
        return RecoveredStatus(
            ratio=recovered.get("estimate"),
            ci95=recovered.get("ci95", [None, None]),
            gain_nats=measurements.gained(self.version),
            no_interval=recovered.get("no_interval"),
        )
