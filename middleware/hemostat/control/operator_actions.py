"""The actions of operators through the admin port: import, promote, pin, roll back, set the mode, rebase an alarm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from hemostat.canaries.keeper import Canaries
from hemostat.control.learning import LearningSubject
from hemostat.control.ownership import Ownership
from hemostat.engines.registry import EngineRegistry
from hemostat.gate.live.keeper import ShadowGate
from hemostat.measurement.alarms import Alarms
from hemostat.profiles.manager import ProfileManager
from hemostat.store.protocol import NotKeptError
from hemostat_calibration.profiles.profile import CalibrationProfile

MAX_WRITE_SECONDS = 5.0
"""The longest time that an action waits for the store. What is answered as done outlasts the process; anything else is
`NotKeptError`.
"""
T = TypeVar("T")


class OperatorActions:
    """Implements what the admin port calls: each action applies at once, and is then waited for in the store.
    The methods raise HemostatError, NotActiveError, or NotKeptError if an action applies and the store has not kept it.

    What ends something (mode `off`, a rollback) also applies while the process is suspended.

    on_change: called after each.
    """

    def __init__(
        self,
        profiles: ProfileManager,
        alarms: Alarms,
        canaries: Canaries,
        gate: ShadowGate,
        subject: LearningSubject,
        engines: EngineRegistry,
        ownership: Ownership,
        on_change: Callable[[], None],
    ) -> None:
        self._profiles = profiles
        self._alarms = alarms
        self._canaries = canaries
        self._gate = gate
        self._subject = subject
        self._engines = engines
        self._ownership = ownership
        self._on_change = on_change

    async def import_profile(self, data: bytes) -> str:
        """Imports a profile to be tested, and returns its version. Raises InvalidProfileError."""
        profile = await asyncio.to_thread(CalibrationProfile.from_bytes, data)
        return await self._execute(lambda: self._profiles.operator.import_profile(profile))

    async def promote(self, version: str, kind: str | None) -> None:
        """Promotes a version. kind: of traffic; None for all, here and below."""
        await self._execute(lambda: self._profiles.operator.promote(version, kind))

    async def pin(self, version: str | None, kind: str | None) -> None:
        """Pins a version. version: None unpins."""
        operator = self._profiles.operator
        await self._execute(lambda: operator.unpin(kind) if version is None else operator.pin(version, kind))

    async def rollback(self, reason: str, kind: str | None) -> None:
        await self._execute(lambda: self._profiles.operator.roll_back(reason, kind), ends=True)

    async def release(self, kind: str | None) -> None:
        """Ends the hold of kinds at identity."""
        await self._execute(lambda: self._profiles.operator.release(kind))

    async def drain(self, engine: str, *, ends: bool) -> None:
        """Lets the engine get no new requests, or, with `ends`, some again."""
        await self._execute(lambda: self._engines.drain(engine, ends=ends))

    async def rebase(self, kind: str | None) -> dict[str, Any]:
        """Makes the kind (None: each) learn a new baseline. Returns the alarms' report."""
        await self._execute(lambda: self._alarms.rebase(kind))
        return self._alarms.report()

    async def accept_canaries(self) -> dict[str, Any]:
        """Accepts what the engines compute now as right: a new set is taken. Returns the canaries' report."""
        await self._execute(self._canaries.accept)
        return self._canaries.report()

    async def begin_gate(
        self, candidate: str, expect: str, margin: float | None, kind_margin: float | None, *, waive_cycles: bool
    ) -> dict[str, Any]:
        """Begins a live gate. Returns its report."""
        await self._execute(lambda: self._gate.begin(candidate, expect, margin, kind_margin, waive_cycles=waive_cycles))
        return self._gate.report()

    async def end_gate(self) -> dict[str, Any]:
        """Ends the live gate, and forgets its evidence. Returns the report."""
        await self._execute(self._gate.end)
        return self._gate.report()

    async def set_mode(self, mode: str) -> None:
        def change() -> None:
            self._profiles.operator.set_mode(mode)
            self._subject.update()

        await self._execute(change, ends=mode == "off")

    async def _execute(self, action: Callable[[], T], *, ends: bool = False) -> T:
        """Executes an action, waits for the store, and returns the action's result. Raises NotKeptError if the store
        does not answer in time. ends: True if it ends something that serves."""
        (self._ownership.require_known if ends else self._ownership.require_active)()
        result = action()
        self._on_change()
        if not await self._ownership.writer.wait_until_written(MAX_WRITE_SECONDS):
            raise NotKeptError(
                "this applies now, but the store does not answer: it is kept as soon as that answers, and undone by a "
                "restart before that. See the log and hemostat_store_errors_total"
            )
        return result
