"""The requests to an engine: a set is taken, replayed within the engine's budget of tokens, and explained."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np

from hemostat.canaries.client import CanaryClient
from hemostat.canaries.engine import (
    EngineCanaries,
    Reading,
    served,
)
from hemostat.canaries.judge import Judge
from hemostat.canaries.pace import BUDGET_TOKENS, HOUR_SECONDS
from hemostat.canaries.prompts import Prompts
from hemostat.canaries.states import CanaryStates, Sets
from hemostat.canaries.texts import cost
from hemostat.canaries.variants import cost as cost_of_variants
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ReferenceState
from hemostat.reference.protocol import ReferenceFailure, ScoreRequest
from hemostat.store.protocol import StoreWrites
from hemostat.store.spent_alpha import until_written
from hemostat_calibration.canaries import DAY_REPLAYS, REPLAYS, CanarySet, Condition, Origin, shortest
from hemostat_calibration.canary_prefix import PromptLengths, prefix_sequences
from hemostat_calibration.canary_prefix import cost as cost_behind_prefix

log = logging.getLogger("hemostat.canaries")

FIRST_SECONDS = 600.0
"""The time from the start until a set is taken if the store has none: engines have served for a while then."""


class Replays:
    """Owns the prompts, and when a set is taken and scored by the reference. `Schedule` says which engine's turn it is;
    `Judge` gets each replay.

    clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        sets: Sets,
        states: CanaryStates,
        judge: Judge,
        monitor: ReferenceMonitor,
        lengths: PromptLengths,
        writes: StoreWrites,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._sets = sets
        self._states = states
        self._judge = judge
        self._monitor = monitor
        self._lengths = lengths
        self._writes = writes
        self._clock, self._wall = clock, wall
        self.prompts: Prompts | None = None
        """The prompts of a set that is taken; None before they were read."""
        self._take_at = clock() + FIRST_SECONDS
        self._taking = asyncio.Lock()
        self._reference_at = -np.inf
        """The time at which the reference was last asked to score a set, monotonic seconds."""
        self._count = 0
        """The number of replays so far."""

    @property
    def base(self) -> CanarySet | None:
        """The set of the base model; None before one was taken."""
        return self._sets.base

    def begin_anew(self, why: str) -> None:
        """Forgets the sets: new ones are taken at once."""
        self._judge.record_event(f"a new set of canaries is taken: {why}", {})
        self._sets.clear()
        self._states.forget()
        self._take_at, self._reference_at = self._clock(), -np.inf

    def announced(self, now: Collection[tuple[str, str]]) -> str:
        """Returns what says that another model is served on purpose, at all engines; "" if nothing does.

        now: what the engines that are in use serve.
        """
        base, models = self._sets.base, set(now)
        if base is None or self.prompts is None:
            return ""
        if base.origin.prompts != self.prompts.digest:
            return "canaries.file has other prompts"
        if len(models) != 1 or models == {served(base.origin)} or models == {served(Origin(""))}:
            return ""
        return "{} from {} is served".format(*models.pop())

    async def take(self, canaries: EngineCanaries) -> None:
        """Takes the set of the base model at this engine, if the time for it has come."""
        assert self.prompts is not None
        async with self._taking:
            if self._sets.base is not None or self._clock() < self._take_at:
                return
            client = canaries.client(canaries.now.model)
            taken = await client.take(self.prompts, engine=canaries.name)
            self._sets.put(taken)
        log.info("canaries: a set of %d sequences was taken at %s", len(taken.canaries), canaries.name)

    async def score_reference(self, base: CanarySet) -> None:
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
        current = self._sets.base
        if current is not None and current.canaries is base.canaries:
            self._sets.put(replace(current, reference=np.concatenate(scored)))

    async def replay(self, canaries: EngineCanaries, model: str) -> bool:
        """Replays the set of one model of an engine. Returns False if it has to wait: for the budget, or as the set was
        replaced meanwhile."""
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
                of_adapter = await client.baseline(sequences, origin, decoded=base.decoded)
            if self._sets.base is None or self._sets.base.canaries is not base.canaries:
                return False
            self._sets.put(of_adapter)
            reading.due = self._clock() + HOUR_SECONDS
            return True
        if canaries.pace.left() < taken.tokens:
            return False
        async with self._spending(canaries, model, taken.tokens) as client:
            values = await client.replay(taken)
        current = self._sets.of(model)
        if current is None or current.canaries is not taken.canaries:
            return False
        self._count += 1
        reading.values, reading.number, reading.at = values, self._count, self._wall()
        reading.reference = taken.from_reference(values)
        self._judge.update(canaries, model, current)
        if self._belongs_to_baseline(canaries, reading, current):
            self._sets.put(current.with_replay(values, Condition(reading.at, load=canaries.load)))
        return True

    def _belongs_to_baseline(self, canaries: EngineCanaries, reading: Reading, taken: CanarySet) -> bool:
        """Returns True for the replays of the first day, an hour apart, of the engine that the set was taken at, as
        long as nothing is wrong there: so the baseline is of all loads of a day, and of all modes that kernels had."""
        if reading.suspected or reading.since or len(taken.baseline) >= REPLAYS + DAY_REPLAYS:
            return False
        last = taken.conditions[-1].at if len(taken.baseline) > REPLAYS else -np.inf
        gone = taken.origin.engine not in self._states.current
        return (gone or canaries.name == taken.origin.engine) and reading.at - last >= HOUR_SECONDS

    async def read_texts(self, canaries: EngineCanaries, base: CanarySet) -> None:
        """Sends the base model's texts as clients do, if that is due and the budget allows it. If something differs,
        they are sent again at once."""
        texts, model = canaries.texts, base.origin.model
        if base.texts is None or self._clock() < texts.due:
            return
        needed = cost(base.texts)
        for _ in range(2):
            if canaries.pace.left() < needed:
                return
            async with self._spending(canaries, model, needed) as client:
                client.sent = needed
                replayed = await client.texts().replay(base.texts)
            if self._sets.base is None or self._sets.base.canaries is not base.canaries:
                return
            self._judge.update_texts(canaries, base.texts.compare(replayed))
            if not texts.suspected:
                break
        texts.due = self._clock() + HOUR_SECONDS

    async def read_prefix(self, canaries: EngineCanaries, base: CanarySet) -> None:
        """Replays the base model's sequences behind a cached prefix, if that is due and the budget allows it. If they
        are too far away, they are replayed again at once. Engines without the plugin do not decode given tokens."""
        reading, model = canaries.prefix, base.origin.model
        if not base.decoded or self._clock() < reading.due:
            return
        if (taken := self._sets.prefix) is None:
            await self._take_prefix(canaries, base)
            return
        needed = cost_behind_prefix(taken.canaries)
        for _ in range(2):
            if canaries.pace.left() < needed:
                return
            async with self._spending(canaries, model, needed) as client:
                values = await client.replay(taken)
            current = self._sets.prefix
            if current is None or current.canaries is not taken.canaries:
                return
            self._count += 1
            reading.values, reading.number, reading.at = values, self._count, self._wall()
            self._judge.update_prefix(canaries, current)
            if self._belongs_to_baseline(canaries, reading, current):
                self._sets.put_prefix(current.with_replay(values, Condition(reading.at, load=canaries.load)))
            if not reading.awaited:
                return

    async def _take_prefix(self, canaries: EngineCanaries, base: CanarySet) -> None:
        """Takes the baseline, in moments of low load, at an engine whose last replay has shown nothing."""
        reading = canaries.base
        if reading is None or not reading.found or reading.suspected or reading.since:
            return
        canaries.prefix.due = self._clock() + HOUR_SECONDS
        client = canaries.client(base.origin.model)
        sequences = prefix_sequences(base.canaries, self._lengths.get(), canaries.now.max_model_len)
        if not sequences or not await client.caches_prefixes():
            return
        async with self._taking:
            if self._sets.prefix is not None:
                return
            taken = await client.baseline(sequences, replace(canaries.now, at=self._wall()), decoded=True)
            if self._sets.base is not None and self._sets.base.canaries is base.canaries:
                self._sets.put_prefix(taken)
        log.info("canaries: sequences behind a prefix of %d tokens were taken", sequences[0].cached)

    async def explain(self, canaries: EngineCanaries, base: CanarySet) -> bool:
        """Finds the cause of what the base model's replays have found, once. Returns False if it has to wait for the
        budget, for which replays wait, too."""
        reading = canaries.base
        if reading is None or not reading.since or reading.cause is not None or base.cause is None:
            return True
        needed = cost_of_variants(base.cause.text)
        if canaries.pace.left() < needed:
            return False
        async with self._spending(canaries, canaries.now.model, needed) as client:
            client.sent = needed
            measured = await client.variants().measure(base.cause.text)
        if self._sets.base is None or self._sets.base.canaries is not base.canaries:
            return False
        self._judge.explain(canaries, base, measured)
        return True

    @asynccontextmanager
    async def _spending(self, canaries: EngineCanaries, model: str, tokens: int) -> AsyncIterator[CanaryClient]:
        """Yields a client that spends the budget, which limits the replays that a statement may follow from. What is
        spent is stored before anything is sent: this process may end meanwhile, and each further replay has a chance of
        a false statement."""
        client = canaries.client(model)
        canaries.pace.spend(tokens)
        self._states.save()
        try:
            await until_written(self._writes)
            yield client
        finally:
            canaries.pace.give_back(tokens - client.sent)
