"""The status that the admin port and the console show: one typed struct, and where each part of it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from hemostat.admin.configuration import Configuration, ConfigurationReport
from hemostat.admin.problems import DeploymentState, OwnershipView, Problems
from hemostat.admin.proxy_status import ArmEndings, ProxyStatus, endings_by_arm, proxy_status
from hemostat.config.schema import Settings
from hemostat.engines.addresses import EngineAddresses
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.upstreams import UpstreamEngines
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import Stats
from hemostat.ipc.reasons import Outcome
from hemostat.learner.client import Learner
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.measurements import Measurements
from hemostat.measurement.outcomes import Outcomes
from hemostat.metrics import names
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ModelPair
from hemostat.scoring.pipeline import ScoringPipeline
from hemostat.scoring.records_file import RecordsFile
from hemostat_calibration.profiles.profile import IDENTITY

Report = dict[str, Any]
"""JSON-ready figures of a subsystem, whose keys are that subsystem's: names of figures, versions, scopes."""


class RequestsStatus(msgspec.Struct, frozen=True):
    """Sampled requests, by what became of them."""

    shadowed: int
    scored: int
    skipped: dict[str, int]
    """By reason, of relays and of this process."""
    dropped: dict[str, int]
    pending: int


class ProfileStatus(msgspec.Struct, frozen=True):
    """The profile that serves, or in mode `observe` would."""

    version: str
    family: str
    mode: str


class RecoveredStatus(msgspec.Struct, frozen=True):
    """Part of the divergence that the profile removes, on the same tokens."""

    ratio: float | None
    ci95: list[float | None]
    gain_nats: Report | None


class ShadowStatus(msgspec.Struct, frozen=True):
    rate: float
    reference_tokens: int
    reference_tokens_per_second: float
    """The budget; 0: no limit."""
    uptime_seconds: float


class QueueStatus(msgspec.Struct, frozen=True):
    depth: int
    lag_seconds: float
    """Age of the oldest capture that waits."""


class CompressedStatus(msgspec.Struct, frozen=True):
    models: list[str]
    adapters: list[str]
    """LoRA adapters that the reference serves, too."""


class ModelStatus(msgspec.Struct, frozen=True):
    """A served base model, and the reference that belongs to it."""

    names: list[str]
    adapters: list[str]
    """LoRA adapters that its reference serves, too."""
    reference: str
    """"" without a match: the model's requests are neither scored nor treated."""
    state: str
    detail: str
    """Why it is not scored, or with what."""
    calibrated: bool
    """Profiles are for this one; all figures outside of `models` are of it."""
    figures: Report
    """Of a matched model that is not calibrated."""


class ReferenceStatus(msgspec.Struct, frozen=True):
    state: str
    detail: str


class EnginesStatus(msgspec.Struct, frozen=True):
    live: int
    acknowledged: list[str]
    """Profile versions that every rank of every engine holds."""
    counters: dict[str, int]


class UpstreamStatus(msgspec.Struct, frozen=True):
    """One of the engines that requests go to."""

    engine: str
    """host:port"""
    relays: int
    up: int
    """Relays that take it for healthy."""
    drained: bool
    outstanding: int
    requests: int
    resent: int
    ejections: int
    figures: Report
    """What was scored of it, and whether it is like the others: `measurement.by_engine`. Empty before that."""
    holds: list[str] | None
    """The profile versions that its plugin holds; None while it is not known which of the engines that report it is.
    With one upstream address, what all engines hold. Adapters: `adapter.engine`."""


class ControlStatus(msgspec.Struct, frozen=True):
    """Of this control process: `control.ownership`. detail: why it is not active, one line."""

    state: str
    detail: str


class Status(msgspec.Struct, frozen=True):
    """`GET /api/v1/status`. Field names are the JSON's; the console and scripts rely on them."""

    at: float
    """Unix time, seconds."""
    state: DeploymentState
    """What is wrong, worst first."""
    requests: RequestsStatus
    coverage: Report
    """Which part of what sampled requests generated is scored, by kind, and why the rest is not:
    `measurement.coverage`."""
    tokens_scored: int
    top_k: int
    raw: Report
    """Figures of the compressed model itself: `measurement.figures`."""
    where: list[Report]
    """The same by route and label."""
    kinds: list[Report]
    """By kind of traffic: raw figures, what its arms were served, and what a profile gained."""
    conditional: Report
    """Of requests that a grammar restricts, in no other figure: `measurement.conditional`."""
    arms: Report
    alarm: Report
    outcomes: Report
    """By kind of traffic and arm: `measurement.outcomes`."""
    decoding: list[Report]
    places: Report
    """By position in the output, length of the context, and phase of a reasoning model: `measurement.by_place`."""
    thinking: Report
    """Length of the thinking and how often it does not end, by arm: `measurement.thinking`."""
    trajectory: Report
    noise_floor: Report
    excess: Report
    calibrated: Report
    profile: ProfileStatus
    calibration: Report
    learner: Report
    adapter: Report
    """What is made and judged: `control.adapters`; docs/calibration.md#adapters."""
    recovered: RecoveredStatus
    proxy: ProxyStatus
    endings: dict[str, ArmEndings]
    """By arm."""
    shadow: ShadowStatus
    queue: QueueStatus
    compressed: CompressedStatus
    models: list[ModelStatus]
    reference: ReferenceStatus
    engines: EnginesStatus
    upstream: list[UpstreamStatus]
    """The engines that requests go to."""
    records_written: int
    relays: int
    data_port: int
    configuration: ConfigurationReport
    control: ControlStatus


class StatusSource:
    """Reads the parts of the control process; owns no state of theirs. Cheap: nothing is computed over records.

    clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        settings: Settings,
        data_port: int,
        *,
        problems: Problems,
        ownership: OwnershipView,
        link: RelayLink,
        engines: EngineRegistry,
        monitor: ReferenceMonitor,
        pipeline: ScoringPipeline,
        measurements: Measurements,
        alarms: Alarms,
        by_engine: ByEngine,
        upstreams: UpstreamEngines,
        addresses: EngineAddresses,
        outcomes: Outcomes,
        profiles: ProfileManager,
        learner: Learner,
        adapters: Callable[[], Report],
        records: RecordsFile | None,
        configuration: Configuration,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.settings = settings
        """May be replaced."""
        self._data_port = data_port
        self._configuration = configuration
        self._problems = problems
        self._ownership = ownership
        self._link = link
        self._engines = engines
        self._monitor = monitor
        self._pipeline = pipeline
        self._measurements = measurements
        self._alarms = alarms
        self._by_engine = by_engine
        self._upstreams = upstreams
        self._addresses = addresses
        self._outcomes = outcomes
        self._profiles = profiles
        self._learner = learner
        self._adapters = adapters
        self._records = records
        self._clock = clock
        self._wall = wall
        self._started = clock()

    @property
    def ready(self) -> bool:
        """At least one relay takes requests, or they are on other machines; the reference does not matter."""
        return self._link.ready or not self._data_port

    def current(self) -> Status:
        now = self._clock()
        measurements, shadow, served = self._measurements, self.settings.shadow, self._monitor.served
        version = self._profiles.serving.reported
        totals = self._link.total()
        return Status(
            at=self._wall(),
            state=self._problems.look(),
            requests=self._requests(totals),
            coverage=self._pipeline.coverage.report(),
            tokens_scored=measurements.tokens,
            top_k=shadow.top_k,
            raw=measurements.summary(None),
            where=measurements.where(),
            kinds=measurements.by_kind.report(),
            conditional=measurements.conditional.report(),
            arms=measurements.arms(),
            alarm=self._alarms.report(),
            outcomes=self._outcomes.report(),
            decoding=measurements.by_decoding.report(),
            places=measurements.by_place.report(),
            thinking=measurements.thinking.report(),
            trajectory=measurements.survival.report(),
            noise_floor=measurements.noise_floor(),
            excess=measurements.excess(),
            calibrated=measurements.summary(version),
            profile=self._profile(version),
            calibration=self._profiles.report.status(),
            learner=self._learner.status(),
            adapter={**self._adapters(), "distances": dict(self._pipeline.distances.outcomes)},
            recovered=self._recovered(version),
            proxy=proxy_status(totals),
            endings=endings_by_arm(totals),
            shadow=ShadowStatus(
                rate=shadow.rate * self._pipeline.sampling.fraction,
                reference_tokens=self._pipeline.reference_tokens,
                reference_tokens_per_second=shadow.reference_tokens_per_second,
                uptime_seconds=now - self._started,
            ),
            queue=QueueStatus(depth=len(self._pipeline.queue), lag_seconds=self._pipeline.queue.lag_seconds(now)),
            compressed=CompressedStatus(models=sorted(served.models), adapters=sorted(served.scorable_adapters)),
            models=[self._model(pair) for pair in served.pairs],
            reference=ReferenceStatus(state=self._monitor.state.value, detail=self._monitor.detail),
            engines=EnginesStatus(
                live=self._engines.live_engines(now),
                acknowledged=sorted(self._engines.acknowledged(now)),
                counters=self._engines.counters(now),
            ),
            upstream=self._upstream(),
            records_written=self._records.written if self._records is not None else 0,
            relays=self._link.relays,
            data_port=self._data_port,
            configuration=self._configuration.report,
            control=ControlStatus(state=str(self._ownership.state), detail=self._ownership.why),
        )

    def _upstream(self) -> list[UpstreamStatus]:
        figures = {row["engine"]: row for row in self._by_engine.report()}
        held = self._addresses.shown(self._clock())
        return [
            UpstreamStatus(
                engine=name,
                relays=engine.relays,
                up=engine.up,
                drained=name in self._upstreams.drained,
                outstanding=engine.outstanding,
                requests=engine.requests,
                resent=engine.resent,
                ejections=engine.ejections,
                figures=figures.get(name, {}),
                holds=sorted(held[name]) if name in held else None,
            )
            for name, engine in self._upstreams.current().items()
        ]

    def _model(self, pair: ModelPair) -> ModelStatus:
        calibrated, matched = pair is self._monitor.served.calibrated, pair.reference is not None
        return ModelStatus(
            names=sorted(pair.names),
            adapters=sorted(pair.scorable_adapters),
            reference=pair.reference.model if pair.reference is not None else "",
            state=pair.state.value,
            detail=pair.detail,
            calibrated=calibrated,
            figures=self._pipeline.other_models.report(pair.name) if matched and not calibrated else {},
        )

    def _requests(self, totals: Stats) -> RequestsStatus:
        endings = self._pipeline.endings
        by_outcome = {}
        for outcome in (Outcome.SKIPPED, Outcome.DROPPED):
            found: dict[str, int] = {}
            for (which, reason), value in totals.counters.get(names.SHADOW_REQUESTS, {}).items():
                if which == outcome:
                    found[reason] = found.get(reason, 0) + int(value)
            for reason, count in endings.by_reason(outcome).items():
                found[reason] = found.get(reason, 0) + count
            by_outcome[outcome] = found
        return RequestsStatus(
            shadowed=self._pipeline.received,
            scored=endings.scored,
            skipped=by_outcome[Outcome.SKIPPED],
            dropped=by_outcome[Outcome.DROPPED],
            pending=self._pipeline.pending,
        )

    def _profile(self, version: str | None) -> ProfileStatus:
        profile = self._profiles.catalogue.get(version)
        return ProfileStatus(
            version=version or IDENTITY,
            family=profile.family if profile else IDENTITY,
            mode=self._profiles.serving.mode,
        )

    def _recovered(self, version: str | None) -> RecoveredStatus:
        recovered = self._measurements.recovered(version) or {}
        return RecoveredStatus(
            ratio=recovered.get("estimate"),
            ci95=recovered.get("ci95", [None, None]),
            gain_nats=self._measurements.gained(version),
        )
