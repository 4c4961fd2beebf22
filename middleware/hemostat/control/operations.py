"""What operators and other replicas do to the profiles, made and connected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hemostat.control.evidence.positions import Positions
from hemostat.control.learning import LearningSubject
from hemostat.control.operator_actions import LocalActions, ModeOverride, OperatorActions
from hemostat.control.stored_state import STATE_KEYS, StoredState
from hemostat.engines.upstreams import UpstreamEngines
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.outcomes import Outcomes
from hemostat.profiles.decisions import MAX_EVENTS
from hemostat.profiles.manager import ProfileManager
from hemostat.store.errors import StoreErrorLog
from hemostat.store.lease import Lease
from hemostat.store.protocol import Store
from hemostat.store.replica import Replica
from hemostat.store.writer import StoreWriter


@dataclass(frozen=True, slots=True)
class Operations:
    """replica: None without a store that other replicas could share."""

    stored_state: StoredState
    replica: Replica | None
    actions: OperatorActions


def make_operations(
    mode: str,
    profiles: ProfileManager,
    alarms: Alarms,
    by_engine: ByEngine,
    upstreams: UpstreamEngines,
    outcomes: Outcomes,
    subject: LearningSubject,
    *,
    store: Store,
    errors: StoreErrorLog,
    writer: StoreWriter,
    lease: Lease,
    positions: Positions | None,
    clock: Callable[[], float],
    wall: Callable[[], float],
    on_change: Callable[[], None],
) -> Operations:
    """mode: `calibration.mode`. positions: of the evidence of several replicas. clock: monotonic seconds. wall: Unix
    time."""
    override = ModeOverride(mode)
    local = LocalActions(profiles, alarms, subject, upstreams, store, writer, errors, on_change)
    stored_state = StoredState(
        store,
        errors,
        writer.as_leader,
        lease,
        profiles,
        alarms,
        by_engine,
        upstreams,
        outcomes,
        positions,
        subject,
        override,
        clock,
        on_change,
    )
    replica = None
    if store.shared is not None:
        replica = Replica(
            store.shared,
            lease,
            is_held=lambda version: version in profiles.catalogue,
            states=STATE_KEYS,
            events=MAX_EVENTS,
            load=stored_state.reload,
            write_all=stored_state.write_all,
            execute=local.execute_command,
            on_failure=errors.record,
            clock=clock,
        )
    actions = OperatorActions(local, profiles, store, writer, errors, lease, replica, override, wall, on_change)
    return Operations(stored_state, replica, actions)
