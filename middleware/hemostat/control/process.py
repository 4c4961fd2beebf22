"""The control process: owns the shadow queue, the reference, the statistics, the calibrator, the store, the admin port.

`python -m hemostat.control.process` reads its settings as JSON from standard input and says `{"admin_port": n}` on
standard output once it listens. When it dies, the relays go on as a plain proxy and the supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry

from hemostat import logs
from hemostat.admin import history as overview
from hemostat.admin.app import create_app
from hemostat.admin.hardening import server_settings
from hemostat.admin.history import History
from hemostat.config.schema import Settings
from hemostat.engines.registry import EngineRegistry
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import Capture, Policy
from hemostat.ipc.process import die_with_parent, make_tracing
from hemostat.learner.client import Learner, LearningTarget
from hemostat.measurement.alarms import STATE as ALARM_STATE
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat.metrics.collector import HemostatCollector
from hemostat.metrics.samples import AnySample, Sample
from hemostat.profiles.decisions import MAX_EVENTS
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.persistence import STATE_KEYS
from hemostat.reference import make_reference
from hemostat.reference.match import compare
from hemostat.reference.probes import State, probe_shadowing
from hemostat.reference.protocol import Reference, ReferenceFailure, ReferenceInfo
from hemostat.reference.server import ModelCard, VllmServer
from hemostat.reference.vllm import VllmReference
from hemostat.relay import counters as relay_counters
from hemostat.shadow.limits import Breaker, BreakerState, ShadowQueue, TokenBudget
from hemostat.shadow.noise_floor import MODELS, Floor
from hemostat.shadow.records_file import RecordsFile
from hemostat.shadow.scorer import Scorer
from hemostat.store.factory import open_store_or_memory
from hemostat.store.lease import Lease
from hemostat.store.protocol import StoreAccessDenied, StoredProfile, StoreFailure, StoreUnreachable
from hemostat.store.replica import OBEYED_WITHIN, Replica
from hemostat.store.valkey import ValkeyStore
from hemostat.store.writer import StoreWriter
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.split import held_out

log = logging.getLogger("hemostat.control")

BURST_SECONDS = 10.0
"""The reference's token budget may be saved up for this long."""
MATCH_RETRY = 3.0
"""Seconds between attempts to start the reference and to compare it with the upstream."""
MODELS_EVERY = 30.0
"""Seconds between looks at what the upstream serves: adapters may be loaded at run time."""
HOUSEKEEPING = 0.5
WRITTEN_WITHIN = 2.0
"""Seconds that an order of another replica waits for the store before it is answered."""
TRACED = ("kl_rc", "kl_cr", "js", "tv", "top1_agreement", "covered_compressed")
"""Figures of a request, means over its tokens, that its shadow span tells."""


class Control:
    """Wires the parts together; implements what the admin port and the collector ask for."""

    def __init__(self, settings: Settings, socket_path: Path, data_port: int) -> None:
        self.settings = settings
        self.data_port = data_port
        self.engines = EngineRegistry()
        self._began = time.monotonic()
        self.measurements = Measurements()
        self.history = History()
        self.tracing = make_tracing(settings.tracing.model_dump())
        self.store, self.store_errors = open_store_or_memory(settings.store.url)
        self.lease = Lease(shared=isinstance(self.store, ValkeyStore))
        self.writer = StoreWriter(self.store, self.lease, self.store_errors)
        # Every replica has alarms of its own: each is an event; the state kept for a restart is the leader's.
        self.alarms = Alarms(
            settings.alarm,
            MODELS if settings.shadow.floor_fraction > 0.0 else (),
            self.writer.as_leader,
            self.writer.as_replica,
            time.time,
        )
        self.calibration_failures = 0
        self.profile_manager = ProfileManager(
            settings.calibration,
            self.writer.as_leader,
            time.time,
            default_temperature_is_one=settings.upstream.openai_sampling_defaults,
            lease=self.lease,
        )
        self.replica: Replica | None = None
        """None without a store that other replicas could share."""
        # A name also without one: an engine that two of them share tells each what was tapped of its own requests.
        self.engines.replica = secrets.token_hex(8)
        if isinstance(self.store, ValkeyStore):
            self.replica = self._replica(self.store)
            self.engines.replica = self.store.replica
        self.reference = make_reference(settings)
        self.reference_info: ReferenceInfo | None = None
        self.learner = Learner(settings.calibration, self.profile_manager.proposals, self.publish)
        self.reference_state = "none" if self.reference is None else "starting"
        self.reference_detail = "" if self.reference is not None else "reference.backend is none: nothing is scored"
        self.served: frozenset[str] = frozenset()
        """Names of the compressed model itself; of its adapters in `adapters`."""
        self.adapters: frozenset[str] = frozenset()
        self.reference_adapters: frozenset[str] = frozenset()
        """Those that the reference serves, too, under the same names."""
        self.endings: dict[tuple[str, str], int] = {}
        self.captured = 0
        self.records = RecordsFile(settings.records.path) if settings.records.path else None
        self.link = RelayLink(socket_path, self._captured)
        shadow = settings.shadow
        self.queue = ShadowQueue(shadow.max_queue)
        self.breaker = Breaker()
        self.scorer: Scorer | None = None
        self.floor: Floor | None = None
        self.itself: VllmReference | None = None
        """The compressed model's own server, asked to score what it wrote."""
        self.floor_counts: dict[tuple[str, str], int] = {}
        if self.reference is not None:
            rate = shadow.reference_tokens_per_second
            budget = TokenBudget(rate, max(rate * BURST_SECONDS, 1.0))
            if shadow.floor_fraction > 0.0:
                upstream = settings.upstream
                self.itself = VllmReference(upstream.url, upstream.api_key, top_k=shadow.top_k, ca=upstream.ca)
                self.floor = Floor(
                    fraction=shadow.floor_fraction,
                    seed=shadow.seed,
                    budget=budget,
                    compressed=self.itself,
                    reference=self.reference,
                    sink=self._scored_itself,
                    count=self._count_floor,
                    clock=time.monotonic,
                )
            self.scorer = Scorer(
                queue=self.queue,
                budget=budget,
                breaker=self.breaker,
                reference=self.reference,
                info=lambda: self.reference_info,
                served=lambda: self.served,
                profiles=self.profile_manager.evaluated_profiles,
                engines=self.engines,
                sink=self._scored,
                count=self._count,
                clock=time.monotonic,
                anchors=self._anchors_read,
                hidden=self._learns_from,
                adapters=lambda: self.adapters & self.reference_adapters,
                by_request=settings.calibration.apply == "request",
            )
        self.registry = CollectorRegistry()
        self.registry.register(HemostatCollector(self._sources()))
        self._policy: Policy | None = None
        self._generation = 0
        self._restored = False
        self._mode_here: str | None = None
        """What an operator set at this replica, while the one that leads has yet to obey."""
        self._mode_until = math.inf

    # --- what the parts call ---------------------------------------------------------------------------------------

    def _captured(self, capture: Capture) -> None:
        self.captured += 1
        if self.scorer is None or self.reference_state != "ready":
            self._count("dropped", "reference_not_ready")
        else:
            self.scorer.offer(capture)

    def _count(self, outcome: str, reason: str) -> None:
        self.endings[outcome, reason] = self.endings.get((outcome, reason), 0) + 1

    def _scored_itself(self, model: str, record: TokenRecord) -> None:
        self.alarms.observe_floor(model, self.measurements.observe_floor(model, record))

    def _count_floor(self, model: str, outcome: str) -> None:
        self.floor_counts[model, outcome] = self.floor_counts.get((model, outcome), 0) + 1

    def _scored(self, record: TokenRecord, capture: Capture) -> None:
        profiles, gains = self.profile_manager, RecordGains(record)
        figures = self.measurements.observe(
            record,
            profiles.calibrated_profile(record),
            profiles.catalogue.get(record.applied),
            judging=profiles.is_held_out(record),
            gains=gains,
        )
        if self.records is not None:
            self.records.write(capture, record, figures)
        self.alarms.observe(record, figures)
        if self.floor is not None and record.model in self.served:
            self.floor.offer(np.frombuffer(capture.prompt_token_ids, "<i4"), record)
        if self.tracing is not None and capture.traceparent:
            self._trace(record, capture, figures)
        try:
            profiles.observe(record, gains)
            if profiles.may_learn(record):
                self.learner.offer(record, profiles.scope_of(record))
        except Exception:
            # What was measured stays measured, whatever calibration makes of it.
            self.calibration_failures += 1
            log.exception("calibration could not use the record of %s", capture.request_id)
        self.publish()

    def _trace(self, record: TokenRecord, capture: Capture, figures: TokenDivergence) -> None:
        assert self.tracing is not None
        try:
            self.tracing.record_score(
                capture.traceparent,
                capture.model,
                seconds=time.monotonic() - capture.captured_at,
                results={name: float(np.mean(getattr(figures, name))) for name in TRACED},
                attributes={
                    "request.id": capture.request_id,
                    "arm": str(record.arm),
                    "tokens": record.tokens,
                    "reference.model": record.reference_model,
                    "profile": record.applied or IDENTITY,
                    "bound": figures.bound,
                },
            )
        except Exception:
            log.exception("score of %s could not be traced", capture.request_id)

    # --- replicas --------------------------------------------------------------------------------------------------

    def _replica(self, store: ValkeyStore) -> Replica:
        return Replica(
            store,
            self.lease,
            held=lambda version: version in self.profile_manager.catalogue,
            states=(*STATE_KEYS, ALARM_STATE),
            events=MAX_EVENTS,
            take_up=self._take_up,
            keep=self._keep,
            obey=self._obey_and_write,
            failed=self.store_errors.record,
        )

    def _take_up(
        self, profiles: list[StoredProfile], states: dict[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        if self._mode_here is not None:
            now = time.monotonic()
            self._mode_until = min(self._mode_until, now + OBEYED_WITHIN)
            if now > self._mode_until or (states["mode"] or "").endswith(f" {self._mode_here}"):
                self._mode_here = None
            else:
                states["mode"] = f"{self.settings.calibration.mode} {self._mode_here}"
        self.profile_manager.restoring.reload(profiles, states, [e for e in events if e.get("decision") != "alarm"])
        if not self._restored:
            self.alarms.restore(states[ALARM_STATE], [e for e in events if e.get("decision") == "alarm"])
        self._teach()
        self.publish()

    def _keep(self, stored: Mapping[str, float]) -> None:
        self.store_errors.clear()
        self.profile_manager.restoring.write_all(stored)
        self.alarms.keep()

    async def _decide(self, action: str, *arguments: str | None) -> str:
        """Done here where this replica leads, else by the one that does."""
        if self.replica is None or self.lease.leads:
            return await self._obey(action, list(arguments))
        return await self.replica.ask(action, *arguments)

    async def _decide_at_once(self, action: str, *arguments: str | None) -> bool:
        """What ends something holds here whatever the store does, and everywhere once it answers: whether it does."""
        if self.replica is not None and not self.replica.reachable and not self.lease.leads:
            await self._obey(action, list(arguments))
            self.writer.send_command(secrets.token_hex(8), json.dumps([action, *arguments]))
            return False
        await self._decide(action, *arguments)
        return True

    async def _obey_and_write(self, action: str, arguments: list[Any]) -> str:
        """Whoever asked reads it in the store once this returns."""
        result = await self._obey(action, arguments)
        await self.writer.wait_until_written(WRITTEN_WITHIN)
        return result

    async def _obey(self, action: str, arguments: list[Any]) -> str:
        """What an operator asked for, here or at another replica; HemostatError."""
        result = ""
        match action, arguments:
            case "import", [version, scope]:
                profile = self.profile_manager.catalogue.get(version)
                if profile is None:
                    stored = await asyncio.to_thread(self.store.get_profile, version)
                    if stored is None:
                        raise HemostatError(f"profile {version} is not in the store any more; import it again")
                    profile = await asyncio.to_thread(CalibrationProfile.from_bytes, stored.data, version)
                result = self.profile_manager.operator.import_profile(profile, scope)
            case "promote", [version, scope]:
                self.profile_manager.operator.promote(version, scope)
            case "pin", [None]:
                self.profile_manager.operator.unpin()
            case "pin", [version]:
                self.profile_manager.operator.pin(version)
            case "rollback", [reason, scope]:
                self.profile_manager.operator.roll_back(reason, scope)
            case "mode", ["off" | "observe" | "auto" as mode]:
                self.profile_manager.operator.set_mode(mode)
                self._teach()
            case _:
                raise HemostatError(f"{action}: not known to the replica that leads; do all run the same version?")
        self.publish()
        return result

    # --- the learner -----------------------------------------------------------------------------------------------

    def _teach(self) -> None:
        """Tell the learner what to learn about, or why about nothing."""
        calibration, info, serving = self.settings.calibration, self.reference_info, self.profile_manager.serving
        if serving.mode == "off":
            self.learner.stop("calibration is off")
        elif serving.forced is not None:
            self.learner.stop("calibration.force: nothing is learned meanwhile")
        elif calibration.apply == "request":
            self.learner.stop("calibration.apply: request cannot apply contextual profiles")
        elif info is None or serving.model is None:
            self.learner.stop("the reference is not ready")
        elif info.full_vocabulary and not info.hidden_size:
            self.learner.stop(f"of the reference {info.model}: {info.hidden_detail}", unavailable=True)
        elif (folder := calibration.output_embedding or info.folder) is None:
            fix = "name the reference's checkpoint in calibration.output_embedding"
            self.learner.stop(f"{info.hidden_detail}; {fix}", unavailable=True)
        else:
            model = serving.model
            self.learner.learn_about(LearningTarget(model.name, model.vocab_size, folder, info.hidden_size))

    def _anchors_read(self) -> dict[str, int]:
        """The sets of anchors whose features are of use: digest -> how many."""
        evaluated = (anchors(profile) for profile in self.profile_manager.evaluated_profiles())
        return {anchors_digest(ids): len(ids) for ids in evaluated if ids is not None} | self.learner.anchor_counts

    def _learns_from(self, prompt_key: bytes) -> bool:
        return self.learner.wants_hidden_states and not held_out(
            prompt_key, self.settings.calibration.held_out_fraction
        )

    # --- what relays do --------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Send the relays a new policy when anything in it changed."""
        shadow, profiles = self.settings.shadow, self.profile_manager
        now = time.monotonic()
        self.engines.want(profiles.engine_versions())
        self.engines.leads = self.lease.leads
        policy = Policy(
            generation=0,
            mode=profiles.serving.mode,
            shadow_rate=shadow.rate,
            shadow_seed=shadow.seed,
            shadow_allow_on=shadow.allow_on,
            shadow_top_k=shadow.top_k,
            shadow_max_tokens=shadow.max_tokens,
            scoring=self.reference_state == "ready" and self.breaker.state(now) is not BreakerState.OPEN,
            tap=bool(self.engines.live(now)),
            serving=profiles.serving.version,
            forced=profiles.serving.forced,
            scope=self.settings.calibration.scope,
            scoped=profiles.serving.version_by_scope,
            control_fraction=self.settings.calibration.control_fraction,
            acknowledged=self.engines.acknowledged(now),
            labels=frozenset(self.settings.labels),
            apply=self.settings.calibration.apply,
            unscorable_models=self.adapters - self.reference_adapters,
            replica=self.engines.replica,
            openai_sampling_defaults=self.settings.upstream.openai_sampling_defaults,
            **profiles.request_parameters(),
        )
        if policy != self._policy:
            self._policy = policy
            self._generation += 1
            self.link.set_policy(msgspec.structs.replace(policy, generation=self._generation))

    # --- the reference ---------------------------------------------------------------------------------------------

    async def keep_reference(self, reference: Reference) -> None:
        """Start it and compare it with the upstream, until both fit; again when either has changed."""
        upstream = self.settings.upstream
        server = VllmServer(upstream.url, upstream.api_key, ca=upstream.ca)
        try:
            while True:
                state, detail = await self._match(reference, server)
                self._reference_is(state, detail)
                if state == "ready":
                    await self._until_changed(server, reference)
                else:
                    await asyncio.sleep(MATCH_RETRY)
        finally:
            await server.close()

    async def _match(self, reference: Reference, server: VllmServer) -> tuple[str, str]:
        """Do the two fit, and can the upstream say what is needed? The reference's state and why."""
        try:
            info = await reference.start()
            self.reference_adapters = await reference.adapters()
        except ReferenceFailure as failure:
            return "down", str(failure)
        try:
            self._serves(await server.models())
            card = await server.model(None)
            top_k = self.settings.shadow.top_k
            missing = [f for f in await probe_shadowing(server, card.id, top_k) if f.state is State.NO]
        except ReferenceFailure as failure:
            return "starting", f"the upstream does not answer: {failure}"
        for finding in missing:
            said = f"the upstream's {finding.what}: {finding.detail}; {finding.fix}"
            return ("starting" if finding.transient else "mismatch"), said
        try:
            match = await compare(self.settings.upstream, reference)
        except ReferenceFailure as failure:
            return "down", str(failure)
        if not match.ok:
            # Not compared means that one of the two did not answer yet, not that they differ.
            return ("mismatch" if match.compared else "starting"), match.detail
        if self.itself is not None:
            try:
                await self.itself.start()
            except ReferenceFailure as failure:
                return "starting", f"the upstream does not answer: {failure}"
        self.reference_info = info
        self.profile_manager.set_model_pair(card.id, info.vocab_size)
        self._teach()
        return "ready", f"{info.model} ({info.dtype})"

    async def _until_changed(self, server: VllmServer, reference: Reference) -> None:
        """Returns when the reference has to be looked at again, when the upstream serves another model, or refuses what
        sampled requests ask for (it may have come back with a lower --max-logprobs); that at most every MODELS_EVERY
        seconds, as relays count every request that they leave out for it."""
        began = looked_at = time.monotonic()
        refused = self._refusals()
        while True:
            now = time.monotonic()
            if self.breaker.state(now) is BreakerState.OPEN:
                self._reference_is("down", "the last scores failed; trying again")
                while self.breaker.state(time.monotonic()) is BreakerState.OPEN:  # noqa: ASYNC110  a state of time
                    await asyncio.sleep(HOUSEKEEPING)
                return
            if now - began >= MODELS_EVERY and self._refusals() > refused:
                # What relays are told next is a new policy, under which they sample again.
                self._reference_is("starting", "the upstream refused a sampled request; comparing again")
                return
            if now - looked_at >= MODELS_EVERY:
                looked_at, before = now, self.served
                # Who does not answer has lost no model.
                with contextlib.suppress(ReferenceFailure):
                    self.reference_adapters = await reference.adapters()
                with contextlib.suppress(ReferenceFailure):
                    self._serves(await server.models())
                if self.served != before:
                    return
            await asyncio.sleep(HOUSEKEEPING)

    def _refusals(self) -> float:
        return self.link.total().counters.get(names.SHADOW_REQUESTS, {}).get(("skipped", "logprobs_refused"), 0.0)

    def _serves(self, cards: list[ModelCard]) -> None:
        self.served = frozenset(card.id for card in cards if card.parent is None)
        self.adapters = frozenset(card.id for card in cards if card.parent is not None)
        self.publish()

    def _reference_is(self, state: str, detail: str) -> None:
        if (state, detail) != (self.reference_state, self.reference_detail):
            log.log(
                logging.INFO if state in {"ready", "starting"} else logging.ERROR, "reference %s: %s", state, detail
            )
        self.reference_state, self.reference_detail = state, detail
        self.publish()

    # --- loops -----------------------------------------------------------------------------------------------------

    async def keep_house(self) -> None:
        while True:
            self.publish()
            if self.history.due(time.monotonic()):
                self.history.add(time.monotonic(), time.time(), self.status())
            await asyncio.sleep(HOUSEKEEPING)

    async def restore(self) -> None:
        """Take up what the store holds from an earlier run."""
        force = self.settings.calibration.force
        if force is not None:
            try:
                data = await asyncio.to_thread(force.read_bytes)
                self.profile_manager.operator.force(CalibrationProfile.from_bytes(data))
            except (OSError, InvalidProfileError) as error:
                raise HemostatError(f"calibration.force: {force}: {error}") from error
        try:
            if self.replica is not None:
                await self.replica.beat()
                return
            profiles = await asyncio.to_thread(self.store.profiles)
            states = {name: await asyncio.to_thread(self.store.get_state, name) for name in STATE_KEYS}
            events = await asyncio.to_thread(self.store.events, MAX_EVENTS)
            alarm = await asyncio.to_thread(self.store.get_state, ALARM_STATE)
        except StoreAccessDenied:
            raise  # a wrong password is the operator's to put right; relays, if any run, go on meanwhile
        except StoreFailure as failure:
            self.store_errors.record(failure)
            return
        finally:
            self._restored = True
        self.profile_manager.restoring.restore(profiles, states, [e for e in events if e.get("decision") != "alarm"])
        self.alarms.restore(alarm, [e for e in events if e.get("decision") == "alarm"])

    # --- what the admin port shows (admin.Governed) ----------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.link.ready

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        skipped, dropped = self._endings("skipped"), self._endings("dropped")
        version = self.profile_manager.serving.reported
        profile = self.profile_manager.catalogue.get(version)
        recovered = self.measurements.recovered(version)
        totals = self.link.total()
        return {
            "at": time.time(),
            "requests": {
                "shadowed": self.captured,
                "scored": self.endings.get(("scored", ""), 0),
                "skipped": skipped,
                "dropped": dropped,
                "pending": self.scorer.pending if self.scorer else 0,
            },
            "tokens_scored": self.measurements.tokens,
            "top_k": self.settings.shadow.top_k,
            "raw": self.measurements.summary(None),
            "where": self.measurements.where(),
            "arms": self.measurements.arms(),
            "alarm": self.alarms.report(),
            "decoding": self.measurements.strategies.report(),
            "trajectory": self.measurements.trajectories.report(),
            "noise_floor": self.measurements.floor(),
            "excess": self.measurements.excess(),
            "calibrated": self.measurements.summary(version),
            "profile": {
                "version": version or IDENTITY,
                "family": profile.family if profile else IDENTITY,
                "mode": self.profile_manager.serving.mode,
            },
            "calibration": self.profile_manager.report.status(),
            "learner": self.learner.status(),
            "replica": {
                "leads": self.lease.leads,
                "shared": self.replica is not None,
                "store_reachable": self.replica.reachable if self.replica is not None else None,
            },
            "recovered": {
                "ratio": (recovered or {}).get("estimate"),
                "ci95": (recovered or {}).get("ci95", [None, None]),
                "gain_nats": self.measurements.gained(version),
            },
            "proxy": overview.proxy(totals),
            "endings": overview.endings(totals),
            "shadow": {
                "rate": self.settings.shadow.rate,
                "reference_tokens": self.scorer.reference_tokens if self.scorer else 0,
                "reference_tokens_per_second": self.settings.shadow.reference_tokens_per_second,
                "uptime_seconds": now - self._began,
            },
            "queue": {"depth": len(self.queue), "lag_seconds": self.queue.lag(now)},
            "compressed": {
                "models": sorted(self.served),
                "adapters": sorted(self.adapters & self.reference_adapters),
            },
            "reference": {"state": self.reference_state, "detail": self.reference_detail},
            "engines": {
                "live": self.engines.engines(now),
                "acknowledged": sorted(self.engines.acknowledged(now)),
                "counters": self.engines.counters(now),
            },
            "records_written": self.records.written if self.records else 0,
            "relays": self.link.relays,
            "data_port": self.data_port,
        }

    def _endings(self, outcome: str) -> dict[str, int]:
        """By reason, over the relays and this process."""
        found: dict[str, int] = {}
        relays = self.link.total().counters.get(names.SHADOW_REQUESTS, {})
        for (which, reason), value in relays.items():
            if which == outcome:
                found[reason] = found.get(reason, 0) + int(value)
        for (which, reason), count in self.endings.items():
            if which == outcome:
                found[reason] = found.get(reason, 0) + count
        return found

    def profiles(self) -> dict[str, Any]:
        return self.profile_manager.report.listing()

    def profile(self, version: str) -> dict[str, Any] | None:
        return self.profile_manager.report.describe(version)

    def profile_bytes(self, version: str) -> bytes | None:
        profile = self.profile_manager.catalogue.get(version)
        return profile.to_bytes() if profile else None

    async def import_profile(self, data: bytes, scope: str) -> str:
        profile = await asyncio.to_thread(CalibrationProfile.from_bytes, data)
        if self.replica is None or self.lease.leads:
            version = self.profile_manager.operator.import_profile(profile, scope)
            self.publish()
            return version
        try:
            stored = StoredProfile(profile.version, data, time.time())
            await asyncio.to_thread(self.store.put_profile, stored)
        except StoreFailure as failure:
            self.store_errors.record(failure)
            raise HemostatError(f"the replica that leads cannot be asked: {failure}") from None
        return await self._decide("import", profile.version, scope)

    async def promote(self, version: str, scope: str) -> None:
        await self._decide("promote", version, scope)

    async def pin(self, version: str | None) -> None:
        await self._decide("pin", version)

    async def rollback(self, reason: str, scope: str | None) -> None:
        await self._decide_at_once("rollback", reason, scope)

    async def rebase(self, route: str) -> None:
        self.alarms.rebase(route)

    async def set_mode(self, mode: str) -> None:
        if not self.lease.leads:
            # Here now: the replica that leads may be slow to answer, or be gone.
            self._mode_here, self._mode_until = mode, math.inf
            await self._obey("mode", [mode])
        if await self._decide_at_once("mode", mode):
            self._mode_here = None

    # --- metrics ---------------------------------------------------------------------------------------------------

    def _sources(self) -> list[Callable[[], Iterable[AnySample]]]:
        """What yields the samples of every metric."""
        return [
            self._samples,
            self.lease.samples,
            self.store_errors.samples,
            self.profile_manager.samples,
            self.learner.samples,
            self.measurements.samples,
            self.alarms.samples,
            *([self.scorer.samples] if self.scorer is not None else []),
            lambda: self.queue.samples(time.monotonic()),
            lambda: self.engines.samples(time.monotonic()),
            self.link.samples,
            lambda: relay_counters.samples(self.link.total()),
        ]

    def _samples(self) -> Iterator[Sample]:
        for labels, requests in self.endings.items():
            yield Sample(names.SHADOW_REQUESTS, labels, requests)
        for labels, requests in self.floor_counts.items():
            yield Sample(names.NOISE_FLOOR_REQUESTS, labels, requests)
        yield Sample(names.CALIBRATION_ERRORS, (), self.calibration_failures)
        if self.reference is not None:
            yield Sample(names.SHADOW_RATE_RATIO, (), self.settings.shadow.rate)
            yield Sample(names.REFERENCE_UP, (), float(self.reference_state == "ready"))
        else:
            yield Sample(names.REFERENCE_TOKENS, (), 0.0)
        # Without a name yet there is one series all the same: dashboards join every figure with this metric.
        reference = Path(self.reference_info.model).name if self.reference_info is not None else ""
        for name in sorted(self.served) or [""]:
            yield Sample(names.MODEL_INFO, (name, reference), 1.0)
        recovered = (self.measurements.recovered(self.profile_manager.serving.reported) or {}).get("estimate")
        if recovered is not None:
            yield Sample(names.RECOVERED_DIVERGENCE_RATIO, (), recovered)

    async def close(self) -> None:
        await self.link.close()
        if self.reference is not None:
            await self.reference.close()
        if self.itself is not None:
            await self.itself.close()
        self.alarms.keep()
        with contextlib.suppress(StoreUnreachable):
            await self.writer.drain()
            if self.replica is not None:
                await self.replica.resign()
        if self.records is not None:
            self.records.close()
        self.store.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: this process stops as the supervisor says."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def run(settings: Settings, socket_path: Path, data_port: int) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    host, port = settings.admin.host, settings.admin.port
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise HemostatError(
            f"admin: cannot bind {host}:{port} ({os.strerror(error.errno or 0)}); free it or set admin.port"
        ) from error
    control = Control(settings, socket_path, data_port)
    await control.restore()
    await control.link.start()
    control.publish()
    token = settings.admin.token.get_secret_value() if settings.admin.token else None
    admin = settings.admin
    app = create_app(control, token, time.monotonic, metrics_need_token=admin.metrics_need_token, names=admin.names)
    server = _Server(uvicorn.Config(app, **server_settings()))
    tasks: list[asyncio.Task[Any]] = [
        asyncio.create_task(server.serve(sockets=[listener])),
        asyncio.create_task(control.keep_house()),
        asyncio.create_task(control.writer.run()),
        *([asyncio.create_task(control.replica.run())] if control.replica is not None else []),
    ]
    if control.reference is not None and control.scorer is not None:
        # Beside one that is scored, the next one's codes are computed.
        workers = 2 if settings.reference.backend == "transformers" else 4
        tasks.append(asyncio.create_task(control.keep_reference(control.reference)))
        tasks.append(asyncio.create_task(control.scorer.run(workers)))
        tasks.append(asyncio.create_task(control.learner.run()))
        if control.floor is not None:
            tasks.append(asyncio.create_task(control.floor.run()))
    stopping = asyncio.create_task(stop.wait())
    print(json.dumps({"admin_port": listener.getsockname()[1]}), flush=True)  # noqa: T201  the supervisor reads it
    done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    app.state.closing.set()
    server.should_exit = True
    for task in tasks[1:]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await control.close()
    for task in done - {stopping}:
        task.result()
        raise RuntimeError("a loop ended by itself: that is a bug, and the supervisor starts this process again")


def main() -> int:
    given = json.load(sys.stdin)
    die_with_parent(given["parent"])
    settings = Settings.model_validate(given["settings"])
    logs.set_up(settings.log.level, settings.log.format)
    try:
        asyncio.run(run(settings, Path(given["socket"]), given["data_port"]))
    except HemostatError as error:
        print(f"hemostat: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
