"""Evidence of several replicas, made and connected; with one replica there is nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from hemostat.control.evidence import units
from hemostat.control.evidence.checkpoint import POSITIONS_KEY, Checkpoint
from hemostat.control.evidence.exchange import EvidenceExchange, UnitConsumers
from hemostat.control.evidence.lane import Lane
from hemostat.control.evidence.positions import Positions
from hemostat.control.model_identity import UNKNOWN, brief
from hemostat.learner.client import Learner
from hemostat.learner.stored import BLOB_KEY as LEARNER_BLOB
from hemostat.measurement.alarms import STATE_KEY as ALARM_STATE
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import STATE_KEY as ENGINES_STATE
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.outcomes import STATE_KEY as OUTCOMES_STATE
from hemostat.measurement.outcomes import Outcomes
from hemostat.metrics.samples import Sample
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.persistence import SERVING_KEY, TESTS_KEY
from hemostat.profiles.proposals import Proposals
from hemostat.shadow.seen_units import SeenUnits
from hemostat.store.lease import Lease
from hemostat.store.protocol import SharedStore, StoreFailure, StoreWrites

CHECKPOINT_KEYS = frozenset((SERVING_KEY, TESTS_KEY, ALARM_STATE, ENGINES_STATE, OUTCOMES_STATE))
"""Of the store's state, what evidence goes into."""
EVIDENCE, LEARNING, CONTEXTUAL = "evidence", "learning", "contextual"
"""The streams: what is judged by, what temperature and bias have learned, and what the contextual learner has learned.
Their positions are kept with different states."""

CONTEXTUAL_POSITIONS_KEY = "contextual"
"""Of the store's state, the positions of the third stream. Written when units are handed to the learner, before what it
has learned from them is stored: what was not stored when a leader died is lost, and never counted twice."""
MAX_CONTEXTUAL_ENTRIES = 512
"""Of the third stream: at most 128 MiB."""

LEARNED_POSITIONS_KEY = "temperature_bias"
"""Of the store's state, the positions of the second stream. Written after what was learned, and used only to remove
what is no longer needed: the positions that count are kept with what was learned itself."""


class LearnedState(Protocol):
    """Of `hemostat.control.learned_state.LearnedState`: what temperature and bias have learned, in the store."""

    positions: Positions

    @property
    def models(self) -> str | None:
        """`model_identity.model_identity`; None while they are not known."""

    @property
    def models_known(self) -> bool: ...

    async def read_again(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What both lanes need. on_failure: called with every failure of the store. on_change: called after units of other
    replicas were used. clock: monotonic seconds. wall: Unix time."""

    store: SharedStore
    lease: Lease
    on_failure: Callable[[StoreFailure], None]
    on_change: Callable[[], None]
    clock: Callable[[], float]
    wall: Callable[[], float]

    def lane(
        self, name: str, positions: Positions, positions_key: str, use: Callable[[units.Unit, bool], None], **more: Any
    ) -> Lane:
        """more: `models`, `prepare`, `ready`, `max_entries` and another `on_change` of `Lane`."""
        given = {"on_failure": self.on_failure, "on_change": self.on_change, "clock": self.clock, "wall": self.wall}
        return Lane(name, self.store, self.lease, positions, positions_key, use, **(given | more))


class SharedEvidence:
    """Owns the lanes, and the positions and the checkpoint of what is judged by.

    The owners of states write through the checkpoint, so it exists before them: `connect` comes afterwards.
    """

    def __init__(self, around: Surroundings, writes: StoreWrites) -> None:
        """writes: of the leader."""
        self._around = around
        self.positions = Positions()
        self._writes = writes
        self._contextual_positions = Positions()
        self.checkpoint = Checkpoint(writes, self.positions, CHECKPOINT_KEYS, around.clock)
        self.lanes: list[Lane] = []

    def connect(
        self,
        alarms: Alarms,
        engines: ByEngine,
        profiles: ProfileManager,
        outcomes: Outcomes,
        seen: SeenUnits,
        learned: LearnedState,
        learner: Learner,
    ) -> EvidenceExchange:
        around, writer = self._around, profiles.writer
        self.checkpoint.set_owners(writer.write_serving, writer.write_tests, alarms.save, engines.save, outcomes.save)
        consumers = UnitConsumers(alarms, engines, profiles, outcomes, seen)
        # What is taken before would be used by nobody: profiles and sums are of models that are not known yet.
        known: dict[str, Callable[[], Any]] = {
            "ready": lambda: learned.models_known,
            "models": lambda: brief(learned.models or UNKNOWN),
        }

        def use(unit: units.Unit, own: bool) -> None:
            with self.checkpoint.unit():
                consumers.use(unit, own=own)

        evidence = around.lane(EVIDENCE, self.positions, POSITIONS_KEY, use, on_change=self._evidence_used, **known)
        learning = around.lane(
            LEARNING,
            learned.positions,
            LEARNED_POSITIONS_KEY,
            # What it has sent itself before any replica led is among what it has learned.
            lambda unit, own: None if own and around.lease.term == 0 else _learn(profiles.proposals, unit),
            prepare=learned.read_again,
            **known,
        )
        profiles.proposals.on_learned = lambda scope, growth: learning.send(units.learned_unit(scope, growth))
        contextual = self._contextual_lane(learned, learner)
        self.lanes = [evidence, learning, contextual]
        return EvidenceExchange(evidence, around.lease, self.checkpoint, profiles, outcomes)

    def _contextual_lane(self, learned: LearnedState, learner: Learner) -> Lane:
        around, positions = self._around, self._contextual_positions
        store, lease = around.store, around.lease
        has_own = True
        """What this replica has sent before it led is still in its own learner."""

        async def prepare() -> None:
            nonlocal has_own
            positions.restore(await asyncio.to_thread(store.get_state, CONTEXTUAL_POSITIONS_KEY))
            another_has_led = lease.term > 0
            stored = await asyncio.to_thread(store.get_blob, LEARNER_BLOB) if another_has_led else None
            has_own = not (stored and learner.take_over())

        def use(unit: units.Unit, own: bool) -> None:
            if isinstance(unit, units.ContextualUnit) and not (own and has_own):
                learner.add_other(unit.shared)

        lane = around.lane(
            CONTEXTUAL,
            positions,
            CONTEXTUAL_POSITIONS_KEY,
            use,
            prepare=prepare,
            ready=lambda: learned.models_known and learner.accepts_others,
            models=lambda: brief(learned.models or UNKNOWN),
            on_change=lambda: self._writes.set_state(CONTEXTUAL_POSITIONS_KEY, positions.save()),
            max_entries=MAX_CONTEXTUAL_ENTRIES,
        )
        learner.share(lambda shared: lane.send(units.ContextualUnit(shared)), lambda: lease.is_last_leader)
        return lane

    def _evidence_used(self) -> None:
        self.checkpoint.note_others()
        self._around.on_change()

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run, until cancelled."""
        return [loop for lane in self.lanes for loop in lane.loops()]

    async def close(self) -> None:
        """Send what waits. StoreFailure."""
        for lane in self.lanes:
            await lane.outbox.send()

    def status(self) -> dict[str, dict[str, Any]]:
        """JSON-ready, by stream."""
        return {lane.name: lane.status() for lane in self.lanes}

    def samples(self) -> Iterator[Sample]:
        for lane in self.lanes:
            yield from lane.samples()


def _learn(proposals: Proposals, unit: units.Unit) -> None:
    if isinstance(unit, units.LearnedUnit):
        proposals.add_learned(unit.scope, units.growth_of(unit))
