"""The parts of the control process, made and connected."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from hemostat.adapters.live.assembly import Adapters
from hemostat.admin.configuration import Configuration
from hemostat.admin.history import History
from hemostat.admin.problem_sources import MeasuringProblems, ModelProblems, ProcessProblems, ServingProblems
from hemostat.admin.problems import Problems
from hemostat.admin.recent import RelayGrowth
from hemostat.admin.status import ProcessParts, StatusSource
from hemostat.admin.status_parts import CalibrationParts, EngineParts, ScoringParts
from hemostat.canaries.keeper import Canaries
from hemostat.config.packages import require
from hemostat.config.schema import Settings
from hemostat.config.state_folder import state_folder
from hemostat.control.compared_models import CalibratedModel, OtherModels
from hemostat.control.learning import CalibrationNeeds, LearningSubject, ServedKinds
from hemostat.control.operator_actions import OperatorActions
from hemostat.control.ownership import Ownership
from hemostat.control.policy import Changes, EngineOffers, PolicyPublisher, SampledShares, ScorableModels
from hemostat.control.steady_clock import STATE_KEY, SteadyClock, boot_id, boot_time, sentence
from hemostat.control.stored_state import StoredState
from hemostat.engines.direct import DirectEngines
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.reports import PluginReports, ServedWeights
from hemostat.gate.live.keeper import ShadowGate
from hemostat.gate.live.stable import StableSide
from hemostat.ipc import relay_samples
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import OutcomeReport
from hemostat.ipc.supervised import make_tracing
from hemostat.ipc.turns import Turns
from hemostat.learner import stored
from hemostat.learner.client import Learner
from hemostat.learner.stored import StoredLearning
from hemostat.measurement.by_model import OtherModels as OtherModelFigures
from hemostat.measurement.measured import Measured
from hemostat.measurement.outcome_sampling import OutcomeSampling
from hemostat.measurement.rates import SmoothedRate
from hemostat.metrics import names
from hemostat.metrics.collector import HemostatCollector
from hemostat.metrics.reasons import Unscored
from hemostat.metrics.samples import AnySample
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.references import make_compressed_scorer, make_references
from hemostat.scored_record import RecordConsumer
from hemostat.scoring import prompt_templates
from hemostat.scoring.awaited_evidence import AwaitedEvidence
from hemostat.scoring.consumers import Calibration, NoiseFloorOffers, Texts, Traces
from hemostat.scoring.distances import DistanceWaits
from hemostat.scoring.engine_scores import EngineScorer
from hemostat.scoring.limits import Breakers, TokenBudget
from hemostat.scoring.noise_floor import NoiseFloorMeter
from hemostat.scoring.offline.evidence_time import EvidenceTime
from hemostat.scoring.passive_captures import PassiveCaptures
from hemostat.scoring.pipeline import ScoringPipeline, reference_budget
from hemostat.scoring.prompt_templates import PromptTemplates
from hemostat.scoring.record_reader import RecordReader
from hemostat.scoring.record_users import NoiseFloorUsers, RecordUsers
from hemostat.scoring.records_file import RecordsFile
from hemostat.scoring.reference_call import ReferenceCall
from hemostat.scoring.routing import Router
from hemostat.scoring.stages import CandidateCompletion, EngineFeatures, ScoringStages
from hemostat.store.errors import StoreErrorLog
from hemostat.store.factory import open_store
from hemostat.store.protocol import Snapshot, StoreFailure
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import HemostatError, InvalidArgumentError

if TYPE_CHECKING:
    from hemostat.scoring.offline.window import SpoolScoring
    from hemostat.scoring.spool.spool import Spool

LOGPROBS_REFUSED = Unscored.LOGPROBS_REFUSED.labels
"""The labels of the requests that the upstream refused for what Hemostat asked on top."""
_RANDOM = random.SystemRandom()
log = logging.getLogger("hemostat.control")

PERIODIC_SECONDS = 0.5
SAVE_SECONDS = 3.0
"""The seconds that a process that stops may take to store what it knows."""
CLOSE_SECONDS = 1.0
"""The seconds that it may take to close anything else; by then the store is another process's."""
"""How often relays get a policy that has changed with time alone, and the history a point that is due."""


class Control:
    """Makes the parts and connects them. Each part owns its state; this class owns when they start and end."""

    def __init__(
        self,
        settings: Settings,
        data_port: int,
        *,
        passive: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = boot_time,
        draw: Callable[[], float] = _RANDOM.random,
    ) -> None:
        # Each part is made after the parts that it needs. What these tell it in turn, it is told by an `on_…` that is
        # set once both are there.
        self.time = SteadyClock(wall, steady, boot_id())
        self._clock, self._wall = clock, self.time.now
        wall = self._wall
        self.changes = Changes()
        self.configuration = Configuration(wall())
        self.history = History()
        self.breakers = Breakers()
        self.spool = make_spool(settings, clock, self._wall)
        self.evidence_time = None if settings.spool.window is None else EvidenceTime(wall)
        self.records = RecordsFile(settings.records.path, clock) if settings.records.path else None
        self.tracing = make_tracing(settings.tracing.model_dump())
        self.store, self.store_errors = open_store(settings.store.url), StoreErrorLog()
        self.ownership = Ownership(self.store, self.store_errors)
        self.writer = self.ownership.writer
        self.link = RelayLink(clock)
        self.passive = passive
        """It is True if no relay can connect, so that engines' plugins sample requests themselves."""
        self.profile_manager = ProfileManager(
            settings.calibration,
            self.writer,
            wall,
            evidence=settings.evidence,
            adapter=settings.adapter,
        )
        self.profiles = self.profile_manager.report
        self.requests, self.outcome_sampling = SmoothedRate(), OutcomeSampling()
        self.measured = Measured(
            settings,
            ServedKinds(self.profile_manager),
            self.outcome_sampling,
            self.writer,
            wall,
            None if self.evidence_time is None else self.evidence_time.now,
        )
        self._connect_models(settings)
        self._connect_learners(settings)
        self._connect_scoring(settings, draw)
        self._connect_relays(settings)
        self._connect_admin(settings, data_port)

    def _connect_models(self, settings: Settings) -> None:
        """Connects the engines, and the references that their models are compared with."""
        self.engines = EngineRegistry(
            settings.upstream,
            PluginReports(nonce_prefix=secrets.token_hex(8)),
            self.link.engines,
            self.writer,
            self._clock,
            self.changes.notify,
        )
        self.direct = DirectEngines(self.engines.configured, self.engines.connect)
        self.engines.health_sources.append(self.direct.engines)
        self.weights = ServedWeights(self.engines.reports)
        self.references = make_references(settings)
        self.compressed_scorer = make_compressed_scorer(settings)
        self.engine_scorer = (
            None if self.compressed_scorer is None else EngineScorer(self.engines, settings.shadow.top_k)
        )
        self.monitor = ReferenceMonitor(
            self.references,
            settings,
            compressed_scorer=self.compressed_scorer,
            scores_fail=lambda name: self.breakers.open(name, self._clock()),
            refused=self._refused_by_upstream,
        )
        self.canaries = Canaries(
            settings,
            self.engines,
            self.monitor,
            self.writer,
            active=lambda: self.ownership.active,
            clock=self._clock,
            wall=self._wall,
        )

    def _connect_learners(self, settings: Settings) -> None:
        profiles, proposals = self.profile_manager, self.profile_manager.proposals
        clock, notify = self._clock, self.changes.notify
        self._stored_learning = StoredLearning(self.writer)
        turns = Turns()
        self.learner = Learner(
            settings.calibration, proposals, notify, storage=self._stored_learning, clock=clock, turns=turns
        )
        self.adapters = Adapters(settings, profiles, self.monitor, self.engines, notify, clock=clock, turns=turns)
        self.subject = LearningSubject(profiles, self.monitor, self.learner, self.adapters)

    def _connect_scoring(self, settings: Settings, draw: Callable[[], float]) -> None:
        self.templates = PromptTemplates(self.writer, self._clock)
        clock, measured, budget = self._clock, self.measured, reference_budget(settings.shadow)
        other_models = OtherModelFigures(settings.shadow.max_tokens, measured.cycle)
        self.noise_floor: NoiseFloorMeter | None = None
        """Repeats scorings for the noise floor; None where it is not measured."""
        if self.references is not None and self.compressed_scorer is not None:
            self.noise_floor = NoiseFloorMeter(
                fraction=settings.shadow.floor_fraction,
                draw=draw,
                budget=budget,
                compressed=self.compressed_scorer,
                emit=NoiseFloorUsers(self.monitor, measured, other_models).update,
                clock=clock,
            )
        self.gate = ShadowGate(
            settings,
            StableSide(EngineScorer(self.engines, settings.shadow.top_k), budget, clock),
            self.ownership,
            noted=self.profile_manager.trials.noted_inflation,
            record_event=measured.alarms.record_event,
            draw=draw,
            clock=clock,
            wall=self._wall,
        )
        others: list[RecordConsumer] = [self.gate, self.canaries]
        if self.noise_floor is not None:
            others.append(NoiseFloorOffers(self.noise_floor))
        if self.tracing is not None:
            others.append(Traces(self.tracing, clock))
        if settings.adapter.enabled:
            others.append(Texts(self.adapters.learner, self.profile_manager))
        stages = None if self.references is None else self._scoring_stages(settings, budget)
        late = settings.spool.score != "now"
        self.pipeline = ScoringPipeline(
            settings,
            self.monitor,
            self.engines.reports,
            stages,
            RecordUsers(
                RecordReader(
                    self.monitor,
                    self.profile_manager,
                    age=lambda capture: math.inf if late else clock() - capture.captured_at,
                ),
                measured,
                Calibration(self.profile_manager, self.learner),
                other_models,
                DistanceWaits(self.adapters.judge if settings.adapter.enabled else None),
                self.changes.notify,
                others=others,
                records=self.records,
            ),
            clock,
            spool=self.spool,
            decides=lambda: self.ownership.active,
            is_awaited=AwaitedEvidence(self.profile_manager, self.templates.assign).is_awaited,
        )
        self.later = self._scoring_in_window(settings, stages)

    def _scoring_in_window(self, settings: Settings, stages: ScoringStages | None) -> SpoolScoring | None:
        """Returns what scores the spool in the window of `spool.score`; None without one."""
        spool, window = settings.spool, settings.spool.window
        if window is None or stages is None or self.evidence_time is None or spool.path is None or spool.key is None:
            return None
        from hemostat.scoring.offline.window import SpoolScoring, is_open  # noqa: PLC0415
        from hemostat.scoring.spool.keys import read_key  # noqa: PLC0415  an extra

        return SpoolScoring(
            Path(spool.path),
            read_key(spool.key),
            stages,
            emit=self.pipeline.update,
            save=self.measured.save,
            evidence_time=self.evidence_time,
            may_score=lambda: is_open(window, self._wall()) and self.ownership.active and self.monitor.ready,
            wall=self._wall,
        )

    def _scoring_stages(self, settings: Settings, budget: TokenBudget) -> ScoringStages:
        clock = self._clock
        needs = CalibrationNeeds(settings.calibration, self.profile_manager, self.learner, self.adapters)
        return ScoringStages(
            Router(self.monitor, needs, self.breakers, clock),
            CandidateCompletion(self.engine_scorer, budget, clock),
            budget,
            EngineFeatures(needs),
            ReferenceCall(needs, clock),
            self.templates.assign,
            clock,
            max_scored=settings.shadow.max_scored_tokens,
        )

    def _connect_relays(self, settings: Settings) -> None:
        """Connects what relays send and receive, and what is stored."""
        pipeline = self.pipeline
        self.link.on_capture = pipeline.offer
        self.link.on_outcome = self._receive_outcome
        self.link.on_sampled = pipeline.coverage.update_relayed
        self.stored_state = StoredState(self.writer, self.profile_manager, self.measured, self.engines)
        self.stored_state.on_other_models = self.gate.forget
        self.policy = PolicyPublisher(
            settings,
            self.link,
            self.profile_manager,
            EngineOffers(self.engines, self.adapters.hosts, self.profile_manager.catalogue.changes_weights),
            ScorableModels(self.monitor, self.breakers, spools=self.spool is not None),
            SampledShares(pipeline.sampling, self.outcome_sampling, pipeline.answer_losses),
            self.stored_state,
            self._clock,
        )
        self.changes.subscribe(self.policy.publish)
        self._connect_plugins(settings)
        self.calibrated_model = CalibratedModel(
            self.monitor,
            self.weights,
            self.profile_manager,
            self.stored_state,
            self.learner,
            self.subject,
            self._clock,
        )
        self.other_models = OtherModels(self.monitor, pipeline.users.other_models.forget)
        self.monitor.on_change = self._models_changed

    def _connect_plugins(self, settings: Settings) -> None:
        """Connects the plugins that sample requests themselves."""
        plugins, served = self.engines.reports.passive, self.monitor
        plugins.enabled = self.passive
        plugins.on_stats, plugins.on_sampled = self.link.update, self.pipeline.coverage.update_relayed
        plugins.on_answer = PassiveCaptures(
            self.pipeline.offer,
            salt=lambda: self.stored_state.salt,
            top_k=lambda: self.policy.settings.shadow.top_k,
            tapped=lambda: bool(self.engines.reports.live(self._clock())),
            several_models=lambda: served.served.scorable is not None and len(served.served.scorable) > 1,
            engine=self.direct.only,
            clock=self._clock,
        ).update

    def _connect_admin(self, settings: Settings, data_port: int) -> None:
        """Connects what the admin port shows and does."""
        clock, wall, profiles = self._clock, self._wall, self.profile_manager
        self.actions = OperatorActions(
            profiles,
            self.measured.alarms,
            self.canaries,
            self.gate,
            self.subject,
            self.engines,
            self.ownership,
            self.changes.notify,
        )
        relays = RelayGrowth()
        self.problems = Problems(
            self.ownership,
            [
                ServingProblems(self.ownership, self.link, relays, self.engines, self.adapters.hosts),
                ModelProblems(self.measured, self.canaries, profiles.events, self.gate),
                MeasuringProblems(
                    self.ownership,
                    self.monitor,
                    self.pipeline,
                    self.noise_floor,
                    relays,
                    self.engines.reports,
                    self.adapters.learner,
                ),
                ProcessProblems(self.ownership, self.store_errors, self.configuration, self.records),
            ],
            clock,
            wall,
        )
        self.status = StatusSource(
            settings,
            ProcessParts(self.problems, self.ownership, self.link, relays, self.configuration, data_port),
            ScoringParts(self.monitor, self.pipeline, self.records, self.later, self.spool),
            EngineParts(self.engines, self.canaries, self.gate),
            self.measured,
            CalibrationParts(profiles, self.learner, self.adapters.status),
            clock,
            wall,
        )
        self.registry = CollectorRegistry()
        self.registry.register(HemostatCollector([self._samples]))

    def _models_changed(self) -> None:
        self.calibrated_model.update()
        self.other_models.update()
        self.changes.notify()

    def _samples(self) -> Iterator[AnySample]:
        """Yields the samples. While this process does not know what is stored, it shows nothing of that: zeros would
        look like a loss."""
        own = [self.configuration.samples, self.store_errors.samples]
        for source in [*own, *(self._sample_sources() if self.ownership.knows else ())]:
            yield from source()

    def _sample_sources(self) -> list[Callable[[], Iterable[AnySample]]]:
        return [
            self.pipeline.samples,
            *([] if self.noise_floor is None else [self.noise_floor.samples]),
            self.monitor.samples,
            self.measured.samples,
            self.engines.samples,
            self.canaries.samples,
            self.gate.samples,
            self.profile_manager.samples,
            self.learner.samples,
            self.adapters.samples,
            self.link.samples,
            *(() if self.records is None else (self.records.samples,)),
            lambda: self.engines.reports.samples(self._clock()),
            lambda: relay_samples.samples(self.link.total()),
        ]

    def _refused_by_upstream(self) -> float:
        return self.link.total().counters.get(names.SHADOW_REQUESTS, {}).get(LOGPROBS_REFUSED, 0.0)

    def _receive_outcome(self, report: OutcomeReport) -> None:
        if self.ownership.active:
            self.measured.outcomes.update(report)

    async def start(self) -> None:
        """Returns once this process owns the store, and uses what it holds."""
        self.restore(await self.ownership.begin())

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from all that is stored, and becomes active."""
        self.time.look()
        self.stored_state.restore(snapshot)
        self.templates.restore(snapshot.blobs.get(prompt_templates.BLOB_KEY), self.stored_state.salt)
        self.canaries.restore(snapshot.blobs)
        self.gate.restore(snapshot.blobs)
        self._stored_learning.restore(snapshot.blobs.get(stored.BLOB_KEY))
        self._go_on_after(snapshot.states.get(STATE_KEY))
        self.ownership.activate()

    def _go_on_after(self, stored: str | None) -> None:
        """Goes on after an earlier process. stored: the time as an earlier process has stored it."""
        try:
            time_break = self.time.restore(stored)
        except InvalidArgumentError as error:
            log.error("the stored time cannot be read; times that are stored are taken as they are: %s", error)
            time_break = None
        if time_break is not None:
            self._pass(time_break, sentence(time_break, restarted=True))
        self.time.save(self.writer)

    def _pass(self, time_break: TimeBreak, why: str) -> None:
        """Passes on that the clock was set: whoever keeps times takes the difference out of them."""
        for part in (self.measured, self.profile_manager, self.canaries, self.gate):
            part.after_break(time_break)
        if time_break.anew:
            self.measured.alarms.record_event(why)
        else:
            log.info("%s", why)
        self.time.save(self.writer)
        self.measured.save()
        self.profile_manager.writer.write_tests()
        self.profile_manager.writer.write_serving()

    def apply(self, settings: Settings) -> None:
        """Takes over those settings that can change while this process runs (`config.reloading.IN_PLACE`)."""
        self.policy.settings = self.status.settings = settings
        if self.pipeline.rate is not None:
            self.pipeline.rate = settings.shadow.rate
        self.changes.notify()

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Returns the coroutines that have to run until they are cancelled."""
        loops = [
            self.run_periodic(),
            self.link.run(),
            self.ownership.watch(),
            self.writer.run(),
            self.engines.configured.run(),
            self.engines.run(),
            self.canaries.run(),
        ]
        if self.passive:
            loops.append(self.direct.run())
        if self.references is not None:
            loops += [self.monitor.run(), self.learner.run(), self.gate.run(), self.gate.watch()]
            loops += self.adapters.loops()
        if self.spool is not None:
            loops.append(self.spool.run())
        if self.later is not None:
            loops.append(self.later.run())
        if self.noise_floor is not None:
            loops.append(self.noise_floor.run())
        return loops + self.pipeline.loops()

    def do_periodic(self) -> None:
        """Does what is due because time has passed."""
        now, time_break = self._clock(), self.time.look()
        if time_break is not None and self.ownership.knows:
            self._pass(time_break, sentence(time_break))
        self.problems.look()
        self.requests.update(self.link.requests, now)
        if self.ownership.active:
            self.time.save_if_due(self.writer)
            self.measured.outcomes.sample(self.requests.per_second, now)
            self.measured.outcomes.check()
            self.pipeline.sample(self.requests.per_second)
            if self.calibrated_model.look_at_weights():
                self._models_changed()
            self.policy.publish()
            self.profile_manager.writer.save_if_due()
            self.templates.save_if_due()
        if self.history.due(now):
            self.history.update(now, self._wall(), self.status.current())

    async def run_periodic(self) -> None:
        while True:
            self.do_periodic()
            await asyncio.sleep(PERIODIC_SECONDS)

    async def close(self) -> None:
        """Writes what is queued for the store, and releases all resources. Nothing is waited for without a limit."""
        self.pipeline.users.distances.flush()
        if self.ownership.active:
            await _within(SAVE_SECONDS, "what this process knows", self._save())
        await self.ownership.close()
        for scorer in (self.references, self.compressed_scorer, self.engine_scorer, self.gate):
            if scorer is not None:
                await _within(CLOSE_SECONDS, "a connection to a model", scorer.close())
        if self.records is not None:
            self.records.close()
        if self.spool is not None:
            await _within(SAVE_SECONDS, "the spool's last segment", asyncio.to_thread(self.spool.close))
        if self.tracing is not None:
            await _within(CLOSE_SECONDS, "the last spans", asyncio.to_thread(self.tracing.close))

    async def _save(self) -> None:
        self.time.save(self.writer)
        self.measured.save()
        if self.gate.state != "none":
            self.gate.save()
        self.templates.save()
        self.profile_manager.writer.save()
        try:
            await self.writer.write()
        except StoreFailure as failure:
            self.store_errors.record(failure)


def make_spool(settings: Settings, clock: Callable[[], float], wall: Callable[[], float]) -> Spool | None:
    """Returns the spool; None without `spool.path`. Raises HemostatError if it cannot be used."""
    spool = settings.spool
    if spool.path is None:
        return None
    require("spool")
    from hemostat.scoring.spool.keys import read_key  # noqa: PLC0415  an extra
    from hemostat.scoring.spool.objects import location  # noqa: PLC0415
    from hemostat.scoring.spool.spool import Spool  # noqa: PLC0415

    assert spool.key is not None
    folder = location(spool.path)
    return Spool(
        folder,
        read_key(spool.key),
        journals=folder if isinstance(folder, Path) else _journals_of(spool.path),
        max_bytes=spool.max_bytes,
        max_age=3600.0 * spool.keep_hours,
        clock=clock,
        wall=wall,
        draw=_RANDOM.random,
    )


def _journals_of(address: str) -> Path:
    """Returns the folder of this machine for the journals of a spool in an object store. Raises HemostatError."""
    try:
        folder = state_folder()
    except RuntimeError as error:
        raise HemostatError(f"spool.path: {error}; set XDG_STATE_HOME, where the newest requests are kept") from None
    return folder / f"spool-{hashlib.sha256(address.encode()).hexdigest()[:16]}"


async def _within(seconds: float, what: str, work: Coroutine[Any, Any, None]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        log.warning("stopping: %s could not be finished within %g s", what, seconds)
