"""Evidence of several replicas, made and connected; with one replica there is nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hemostat.evidence.checkpoint import Checkpoint
from hemostat.evidence.exchange import EvidenceExchange, UnitConsumers
from hemostat.evidence.positions import Positions
from hemostat.measurement.alarms import STATE_KEY as ALARM_STATE
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.outcomes import STATE_KEY as OUTCOMES_STATE
from hemostat.measurement.outcomes import Outcomes
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.persistence import SERVING_KEY, TESTS_KEY
from hemostat.shadow.seen_units import SeenUnits
from hemostat.store.lease import Lease
from hemostat.store.protocol import SharedStore, StoreFailure, StoreWrites

CHECKPOINT_KEYS = frozenset((SERVING_KEY, TESTS_KEY, ALARM_STATE, OUTCOMES_STATE))
"""Of the store's state, what evidence goes into."""


@dataclass(frozen=True, slots=True)
class SharedEvidence:
    """What exists before the owners of the states, which write through the checkpoint."""

    store: SharedStore
    lease: Lease
    positions: Positions
    checkpoint: Checkpoint

    def exchange(
        self,
        alarms: Alarms,
        profiles: ProfileManager,
        outcomes: Outcomes,
        seen: SeenUnits,
        *,
        on_failure: Callable[[StoreFailure], None],
        on_change: Callable[[], None],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> EvidenceExchange:
        self.checkpoint.set_owners(
            profiles.writer.write_serving, profiles.writer.write_tests, alarms.save, outcomes.save
        )
        return EvidenceExchange(
            self.store,
            self.lease,
            self.checkpoint,
            self.positions,
            UnitConsumers(alarms, profiles, outcomes, seen),
            profiles,
            outcomes,
            on_failure=on_failure,
            on_change=on_change,
            clock=clock,
            wall=wall,
        )


def shared_evidence(
    store: SharedStore, lease: Lease, writes: StoreWrites, clock: Callable[[], float]
) -> SharedEvidence:
    """writes: of the leader."""
    positions = Positions()
    return SharedEvidence(store, lease, positions, Checkpoint(writes, positions, CHECKPOINT_KEYS, clock))
