"""The canaries of the engines behind the relays: takes the sets, replays them, and says which engine has changed.

A set is taken once, at an engine that is up, and kept in the store. Each engine replays it every hour, and at once when
it comes back or was started again, within its budget of tokens. A replay that is too far away is repeated at once, and
only two in a row are a statement. In addition to the base model, each LoRA adapter that an engine lists is asked the
shortest sequences, against a baseline of its own.

A set is taken anew only where an operator accepts what is served, or announces it: another served name, another path of
the model, or another file of prompts. Other weights under the same path are a change.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from hemostat.canaries.client import CanaryClient
from hemostat.canaries.engine import (
    BASELINE,
    ENGINES,
    STATES_KEY,
    EngineCanaries,
    EngineState,
    EngineStates,
    Reading,
    statement,
)
from hemostat.canaries.pace import BUDGET_TOKENS, HOUR_SECONDS, Pace, PaceState
from hemostat.canaries.prompts import PromptFileError, Prompts, load
from hemostat.canaries.sets import BLOB_KEY, SCHEMA, Sets
from hemostat.canaries.variants import cost
from hemostat.config.schema import Settings
from hemostat.engines.addresses import EngineAddresses
from hemostat.engines.messages import EngineReport
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.upstreams import UpstreamEngines
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ReferenceState
from hemostat.reference.protocol import ReferenceFailure, ScoreRequest
from hemostat.store.protocol import StoreWrites
from hemostat.store.spent_alpha import until_written
from hemostat_calibration import state_codec
from hemostat_calibration.canaries import REPLAYS, CanarySet, Origin, shortest
from hemostat_calibration.canary_cause import UNCHANGED, Verdict, of_engines
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import HemostatError, InvalidArgumentError
from hemostat_calibration.messages import in_words

log = logging.getLogger("hemostat.canaries")

TICK_SECONDS = 1.0
FIRST_SECONDS = 600.0
"""After the start, before a set is taken where the store has none: engines have served for a while then."""
RETRY_SECONDS = 300.0
"""The time from an attempt that could not tell until the next one."""
REQUEST_SECONDS = 60.0
RECENT_SECONDS = 2 * HOUR_SECONDS
"""The age up to which replays of other engines are compared."""
EQUAL, EXCEEDED, FAILED = "equal", "exceeded", "failed"


class Canaries:
    """Lives in the control process's event loop, and touches no client's request.

    active: this process owns the store. clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        settings: Settings,
        addresses: EngineAddresses,
        registry: EngineRegistry,
        upstreams: UpstreamEngines,
        monitor: ReferenceMonitor,
        writes: StoreWrites,
        *,
        active: Callable[[], bool],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._settings = settings.canaries
        self._model = settings.calibration.model
        self._addresses = addresses
        self._registry = registry
        self._upstreams = upstreams
        self._monitor = monitor
        self._writes = writes
        self._active = active
        self._clock, self._wall = clock, wall
        self._sets = Sets(writes)
        self._engines: dict[str, _Engine] = {}
        self._gone: dict[str, EngineState] = {}
        """The states of engines that are not reported now; each is kept for an hour."""
        self._prompts: Prompts | None = None
        self._take_at = clock() + FIRST_SECONDS
        self._taking = asyncio.Lock()
        self._reference_at = -np.inf
        """When the reference was last asked to score a set, monotonic seconds."""
        self._count = 0
        """The number of replays so far."""
        self._outcomes: Counter[str] = Counter({EQUAL: 0, EXCEEDED: 0, FAILED: 0})
        self.problem = "" if settings.canaries.enabled else "canaries.enabled is false"
        """The reason why nothing is replayed; "" if something is."""

    def restore(self, blobs: Mapping[str, bytes]) -> None:
        """Takes what an earlier run stored."""
        if not self._settings.enabled:
            return
        if BLOB_KEY not in blobs:
            log.info("canaries: the store has no set; one is taken in %.0f minutes", FIRST_SECONDS / 60.0)
        for key, read in ((BLOB_KEY, self._sets.restore), (STATES_KEY, self._restore_engines)):
            try:
                if key in blobs:
                    read(blobs[key])
            except InvalidArgumentError as error:
                self._outcomes[FAILED] += 1
                log.error("canaries: what is stored as %s cannot be used, and is taken anew: %s", key, error)

    def _restore_engines(self, stored: bytes) -> None:
        self._gone = dict(state_codec.decode(EngineStates, stored, SCHEMA).engines)

    def _save(self) -> None:
        """Stores the states of all engines, and of the ones that were reported within the last hour."""
        since = self._wall() - HOUR_SECONDS
        self._gone = {name: state for name, state in self._gone.items() if state.pace.looked_at > since}
        states = {name: engine.canaries.state() for name, engine in self._engines.items()}
        self._writes.put_blob(STATES_KEY, state_codec.encode(EngineStates(self._gone | states), SCHEMA))

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set: replays were as long ago as before, so that the budget lasts, and the same
        replays of engines are compared with each other."""
        self._gone = {
            name: replace(state, pace=state.pace.after_break(time_break)) for name, state in self._gone.items()
        }
        for engine in self._engines.values():
            for reading in engine.canaries.readings.values():
                reading.at = time_break.seen(reading.at)
        if self._gone or self._engines:
            self._save()

    def accept(self) -> None:
        """Accepts what the engines compute now as right: a new set is taken at once. Raises HemostatError if none can
        be taken.
        """
        if self.problem:
            raise HemostatError(f"there are no canaries: {self.problem}")
        self._forget("accepted by the operator")

    def _forget(self, why: str) -> None:
        self._record(f"a new set of canaries is taken: {why}", {})
        self._sets.clear()
        for engine in self._engines.values():
            engine.canaries.forget()
        self._gone = {name: replace(state, readings={}) for name, state in self._gone.items()}
        self._save()
        self._take_at, self._reference_at = self._clock(), -np.inf

    # --- when ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Replays the canaries until it is cancelled."""
        if not self._settings.enabled:
            return
        try:
            self._prompts = await asyncio.to_thread(load, self._settings.file)
        except PromptFileError as error:
            self.problem = f"canaries.file: {error}"
            self._outcomes[FAILED] += 1
            log.error("no canaries: %s", self.problem)
            return
        try:
            while True:
                await self.step()
                await asyncio.sleep(TICK_SECONDS)
        finally:
            for name in list(self._engines):
                await self._drop(name)

    async def step(self) -> None:
        """Looks at the engines, and begins what is due there."""
        current = self._upstreams.current()
        for gone in self._engines.keys() - current.keys():
            await self._drop(gone)
        for name, seen in current.items():
            if name not in self._engines:
                self._engines[name] = self._begin(name)
            engine = self._engines[name]
            engine.canaries.pace.look(seen.outstanding)
            report = self._report(name)
            engine.look(seen.up > 0, "" if report is None else report.boot_id)
            serves = engine.up and name not in self._upstreams.drained
            if serves and engine.idle and self._active() and self._clock() >= engine.not_before:
                engine.task = asyncio.create_task(self._work(engine), name=f"canaries of {name}")

    def _report(self, name: str) -> EngineReport | None:
        """Returns what the plugin of an engine reports; None if it is not known which engine that is."""
        engines = self._addresses.at(name) if self._addresses.several else self._registry
        live = engines.live(self._clock())
        return live[0] if len({report.boot_id for report in live}) == 1 else None

    def _begin(self, name: str) -> _Engine:
        known = self._gone.pop(name, EngineState(PaceState(), {}))
        server, pace = self._addresses.server(name, REQUEST_SECONDS), Pace(self._clock, self._wall, known.pace)
        canaries = EngineCanaries(name, server, pace, lambda: self._weights(name), known.readings, self._sign)
        return _Engine(canaries)

    def _sign(self, xargs: dict[str, Any]) -> dict[str, Any]:
        return self._registry.secrets.signed(xargs, self._clock())

    def _weights(self, name: str) -> str:
        report = self._report(name)
        return "" if report is None else report.weights

    async def _drop(self, name: str) -> None:
        engine = self._engines.pop(name)
        self._gone[name] = engine.canaries.state()
        if engine.task is not None:
            engine.task.cancel()
            await asyncio.gather(engine.task, return_exceptions=True)
        await engine.canaries.close()

    # --- what ------------------------------------------------------------------------------------------------------

    async def _work(self, engine: _Engine) -> None:
        """Does what is due at this engine now. A failure is counted and shown, not raised."""
        canaries, now = engine.canaries, self._clock()
        try:
            if now - engine.listed_at >= HOUR_SECONDS:
                await canaries.list_models(self._model)
                engine.listed_at = now
            if why := self._announced():
                self._forget(why)
            if (base := self._sets.base) is None:
                await self._take(canaries)
                return
            if _served(canaries.now) != _served(base.origin):
                self._wait_for_others(canaries, base.origin)
                return
            canaries.differs = ""
            await self._score_reference(base)
            if not await self._explain(canaries, base):
                return
            first, *adapters = canaries.readings
            # The one that has been due for longest comes first, and none is replayed while it waits for the budget.
            for model in (first, *sorted(adapters, key=lambda name: canaries.readings[name].due)):
                if now >= canaries.readings[model].due and not await self._replay(canaries, model):
                    break
        except (ReferenceFailure, InvalidArgumentError) as failure:
            self._fail(engine, str(failure))
        except Exception as error:
            log.exception("canaries: %s could not be asked", canaries.name)
            self._fail(engine, in_words(error))
        else:
            canaries.failure = ""

    def _fail(self, engine: _Engine, why: str) -> None:
        self._outcomes[FAILED] += 1
        if why != engine.canaries.failure:
            log.warning("canaries: %s could not be asked: %s", engine.canaries.name, why)
        engine.canaries.failure, engine.not_before = why, self._clock() + RETRY_SECONDS
        engine.listed_at = -np.inf

    def _wait_for_others(self, canaries: EngineCanaries, then: Origin) -> None:
        """Leaves an engine out of the comparison until all engines serve the same path: this may be a rolling
        update."""
        why = "serves {} from {}, the set is of {} from {}".format(*_served(canaries.now), *_served(then))
        if why != canaries.differs:
            log.warning("canaries: %s %s: it is not compared until all engines serve the same", canaries.name, why)
        canaries.differs = why

    def _announced(self) -> str:
        """Returns what says that another model is served on purpose, at all engines; "" if nothing does."""
        base = self._sets.base
        if base is None or self._prompts is None:
            return ""
        if base.origin.prompts != self._prompts.digest:
            return "canaries.file has other prompts"
        drained = self._upstreams.drained
        served = {
            _served(engine.canaries.now) for name, engine in self._engines.items() if engine.up and name not in drained
        }
        if len(served) != 1 or served == {_served(base.origin)} or served == {_served(Origin(""))}:
            return ""
        return "{} from {} is served".format(*served.pop())

    async def _take(self, canaries: EngineCanaries) -> None:
        assert self._prompts is not None
        async with self._taking:
            if self._sets.base is not None or self._clock() < self._take_at:
                return
            client = canaries.client(canaries.now.model)
            taken = await client.take(self._prompts, engine=canaries.name)
            self._sets.put(taken)
        log.info("canaries: a set of %d sequences was taken at %s", len(taken.canaries), canaries.name)

    async def _score_reference(self, base: CanarySet) -> None:
        """Asks the reference, once there is one, for its scores of the same tokens. Engines are replayed without them,
        too."""
        pair, now = self._monitor.served.calibrated, self._clock()
        if len(base.reference) or pair is None or pair.scorer is None or pair.state is not ReferenceState.READY:
            return
        if now - self._reference_at < HOUR_SECONDS:
            return
        self._reference_at = now
        scored = []
        try:
            for canary in base.canaries:
                ids = np.array(canary.ids, np.int32)
                request = ScoreRequest(ids[:1], ids[1:], np.full((canary.scored, 1), -1, np.int32))
                scored.append((await pair.scorer.score(request)).emitted)
        except ReferenceFailure as failure:
            log.warning("canaries: the reference did not score them, and is asked again in an hour: %s", failure)
            return
        if self._sets.base is base:
            self._sets.put(replace(base, reference=np.concatenate(scored)))

    async def _replay(self, canaries: EngineCanaries, model: str) -> bool:
        """Returns False if it has to wait: for the budget, or as the set was replaced meanwhile."""
        base, taken, reading = self._sets.base, self._sets.of(model), canaries.readings[model]
        if base is None:
            return False
        if taken is None:
            sequences = shortest(base.canaries)
            needed = REPLAYS * sum(canary.tokens for canary in sequences)
            if needed > BUDGET_TOKENS - base.tokens:
                log.warning("canaries: %s is not asked: %d tokens of its baseline exceed the budget", model, needed)
                reading.due = np.inf
                return True
            if canaries.pace.left() < needed:
                return False
            origin = replace(canaries.now, model=model, prompts=base.origin.prompts, at=self._wall())
            async with self._spending(canaries, model, needed) as client:
                of_adapter = await client.baseline(sequences, origin)
            if self._sets.base is None or self._sets.base.canaries is not base.canaries:
                return False
            self._sets.put(of_adapter)
            reading.due = self._clock() + HOUR_SECONDS
            return True
        if canaries.pace.left() < taken.tokens:
            return False
        async with self._spending(canaries, model, taken.tokens) as client:
            values = await client.replay(taken.canaries)
        current = self._sets.of(model)
        if current is None or current.canaries is not taken.canaries:
            return False
        self._count += 1
        reading.values, reading.number, reading.at = values, self._count, self._wall()
        reading.reference = taken.from_reference(values)
        self._judge(canaries, model, taken)
        return True

    async def _explain(self, canaries: EngineCanaries, base: CanarySet) -> bool:
        """Finds the cause of what the base model's replays have found, once. Returns False if it has to wait for the
        budget, for which replays wait, too."""
        reading = canaries.base
        if reading is None or not reading.since or reading.cause is not None or base.cause is None:
            return True
        needed = cost(base.cause.text)
        if canaries.pace.left() < needed:
            return False
        async with self._spending(canaries, canaries.now.model, needed) as client:
            client.sent = needed
            measured = await client.variants().measure(base.cause.text)
        if self._sets.base is None or self._sets.base.canaries is not base.canaries:
            return False
        changes = base.origin.changes(canaries.now)
        reading.cause = base.cause.explain(measured, self._settings.tolerance_nats, changes)
        self._record(self._statement(canaries, canaries.now.model, reading, base), self._figures(reading))
        self._save()
        return True

    def _cause(self, canaries: EngineCanaries, model: str, reading: Reading) -> Verdict | None:
        """Returns the cause of what its replays have found, if it is known: a cause that all engines have, or the cause
        at this engine alone.
        """
        alike = self._alike(canaries, model)
        found = {name: other.cause if other.since else UNCHANGED for name, other in alike.items()}
        known = {name: cause for name, cause in found.items() if cause is not None}
        return of_engines(known) if reading.cause is not None and len(known) == len(found) > 1 else reading.cause

    def _statement(self, canaries: EngineCanaries, model: str, reading: Reading, taken: CanarySet) -> str:
        cause = self._cause(canaries, model, reading)
        return statement(canaries.name, model, reading, taken.origin, canaries.now, cause)

    @asynccontextmanager
    async def _spending(self, canaries: EngineCanaries, model: str, tokens: int) -> AsyncIterator[CanaryClient]:
        """Yields a client that spends the budget, which limits the replays that a statement may follow from. What is
        spent is stored before anything is sent: this process may end meanwhile, and each further replay has a chance of
        a false statement."""
        client = canaries.client(model)
        canaries.pace.spend(tokens)
        self._save()
        try:
            await until_written(self._writes)
            yield client
        finally:
            canaries.pace.give_back(tokens - client.sent)

    def _judge(self, canaries: EngineCanaries, model: str, taken: CanarySet) -> None:
        """Judges a replay of this engine: against the baseline, and all engines that serve the same against each
        other."""
        tolerance, now = self._settings.tolerance_nats, self._wall()
        reading, alike = canaries.readings[model], self._alike(canaries, model)
        before = {name: dict(reading.since) for name, reading in alike.items()}
        values = {name: reading.values for name, reading in alike.items() if reading.values is not None}
        reading.judge(BASELINE, taken.compare(values[canaries.name], tolerance), [reading.number], now)
        numbers = [reading.number for reading in alike.values()]
        for name, comparison in taken.compare_engines(values, tolerance).items():
            alike[name].judge(ENGINES, comparison, numbers, now)
        self._outcomes[EXCEEDED if reading.suspected else EQUAL] += 1
        awaited = max((reading.awaited.get(ENGINES, 0) for reading in alike.values()), default=0)
        for name, current in alike.items():
            if current.number <= max(awaited, current.awaited.get(BASELINE, 0)):
                current.due = 0.0
            elif name == canaries.name:
                current.due = self._clock() + HOUR_SECONDS
            if current.since.keys() != before[name].keys():
                text = self._statement(self._engines[name].canaries, model, current, taken)
                self._record(text or f"Canaries: {name} ({model}) is as it was", self._figures(current))
        self._save()

    def _alike(self, canaries: EngineCanaries, model: str) -> dict[str, Reading]:
        """Returns by engine the readings of the last hours of all engines that serve the same, this one among them."""
        readings = {}
        for name, other in self._engines.items():
            reading = other.canaries.readings.get(model)
            if reading is None or reading.values is None or _served(other.canaries.now) != _served(canaries.now):
                continue
            if self._wall() - reading.at < RECENT_SECONDS:
                readings[name] = reading
        return readings

    def _record(self, why: str, evidence: dict[str, Any]) -> None:
        log.warning("%s", why)
        event = {"at": self._wall(), "decision": "alarm", "version": "", "why": why, "evidence": evidence}
        self._writes.append_event(event)

    # --- what is shown ---------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[tuple[EngineCanaries, str, Reading]]:
        """Yields the engines with their models and readings, as far as they were replayed."""
        for engine in self._engines.values():
            for model, reading in engine.canaries.readings.items():
                if reading.found:
                    yield engine.canaries, model, reading

    def statements(self) -> Iterator[tuple[str, float]]:
        """Yields what is wrong now, one line each, and since when (Unix time)."""
        for canaries, model, reading in self._all():
            taken = self._sets.of(model)
            if taken is not None and reading.since:
                yield self._statement(canaries, model, reading, taken), min(reading.since.values())

    def report(self) -> dict[str, Any]:
        """Returns the state of the canaries, JSON-ready.

        set: what is replayed; None before one was taken. failures: why an engine is not compared. engines: the last
        replay of each model of each engine. distance_nats: the median distance of its sequences. cause: the cause of
        what was found there, in words.
        """
        base = self._sets.base
        return {
            "detail": self.problem or ("" if base is not None else "no set was taken yet"),
            "set": None
            if base is None
            else {
                "model": base.origin.model,
                "root": base.origin.root,
                "vllm": base.origin.version,
                "weights": base.origin.weights,
                "engine": base.origin.engine,
                "taken": base.origin.at,
                "sequences": len(base.canaries),
                "tokens": base.tokens,
            },
            "failures": {
                name: text
                for name, engine in self._engines.items()
                if (text := engine.canaries.failure or engine.canaries.differs)
            },
            "engines": [
                {
                    "engine": canaries.name,
                    "model": model,
                    "at": reading.at,
                    "since": min(reading.since.values(), default=None),
                    "changed": BASELINE in reading.since,
                    "outlier": ENGINES in reading.since,
                    "cause": None if (cause := self._cause(canaries, model, reading)) is None else cause.text,
                    **self._figures(reading),
                }
                for canaries, model, reading in self._all()
            ],
        }

    def _figures(self, reading: Reading) -> dict[str, Any]:
        figures = {
            against: {
                "votes": comparison.votes,
                "needed": comparison.needed,
                "sequences": len(comparison.bounds),
                "distance_nats": comparison.nats,
            }
            for against, comparison in reading.found.items()
        }
        return {**figures, "reference_nats": reading.reference}

    def samples(self) -> Iterator[Sample]:
        for outcome, count in self._outcomes.items():
            yield Sample(names.CANARY_REPLAYS, (outcome,), count)
        for canaries, model, reading in self._all():
            cause = self._cause(canaries, model, reading)
            for against, comparison in reading.found.items():
                labels = (canaries.name, model, against)
                yield Sample(names.CANARY_DISTANCE_NATS, labels, comparison.nats)
                found = "" if cause is None or against not in reading.since else cause.cause.value
                yield Sample(names.CANARY_CHANGED, (*labels, found), float(against in reading.since))


def _served(origin: Origin) -> tuple[str, str]:
    """Returns the served name and the path of the origin's model."""
    return origin.model, origin.root


class _Engine:
    """The state of one engine: when it is asked."""

    def __init__(self, canaries: EngineCanaries) -> None:
        self.canaries = canaries
        self.up = False
        self._boot = ""
        self.listed_at = -np.inf
        """The time when its models were listed, monotonic seconds."""
        self.not_before = 0.0
        self.task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        return self.task is None or self.task.done()

    def look(self, up: bool, boot: str) -> None:
        """Looks at the engine: one that comes back, or whose plugin reports another boot id, is asked at once."""
        if (up and not self.up) or (boot and self._boot and boot != self._boot):
            self.listed_at, self.not_before = -np.inf, 0.0
            for reading in self.canaries.readings.values():
                reading.due = 0.0
        self.up, self._boot = up, boot or self._boot
