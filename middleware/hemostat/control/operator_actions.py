"""What operators do through the admin port: import, promote, pin, roll back, set the mode, rebase an alarm.

Where replicas share a store, only the leader decides about profiles. `OperatorActions` carries an action out here where
this replica leads, else has the leader do so. `LocalActions` is the part that every replica carries out itself, for its
own operators and for commands from other replicas.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
from collections.abc import Callable
from typing import Any

from hemostat.control.learning import LearningSubject
from hemostat.engines.upstreams import UpstreamEngines
from hemostat.measurement.alarms import Alarms
from hemostat.profiles.manager import ProfileManager
from hemostat.store.errors import StoreErrorLog
from hemostat.store.lease import Lease
from hemostat.store.protocol import NotKeptError, Store, StoredProfile, StoreFailure
from hemostat.store.replica import COMMAND_SECONDS, Replica
from hemostat.store.writer import StoreWriter
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile

MAX_WRITE_SECONDS = 5.0
"""How long an action waits for the store: what is answered as done outlasts the process, anything else is
`NotKeptError`."""
NOT_KEPT = "not kept"
"""The leader's answer to a change of the mode that applies, and that its store has not kept."""


class LocalActions:
    """Carries out actions at this replica. on_change: called after each."""

    def __init__(
        self,
        profiles: ProfileManager,
        alarms: Alarms,
        subject: LearningSubject,
        upstreams: UpstreamEngines,
        store: Store,
        writer: StoreWriter,
        errors: StoreErrorLog,
        on_change: Callable[[], None],
    ) -> None:
        self._errors = errors
        self._profiles = profiles
        self._alarms = alarms
        self._subject = subject
        self._upstreams = upstreams
        self._store = store
        self._writer = writer
        self._on_change = on_change

    async def execute(self, action: str, arguments: list[Any]) -> str:
        """An operator's action, here or at another replica; its result. HemostatError."""
        result = ""
        match action, arguments:
            case "import", [version, scope]:
                result = self._profiles.operator.import_profile(await self._stored_profile(version), scope)
            case "promote", [version, kind]:
                self._profiles.operator.promote(version, kind)
            case "pin", [None, kind]:
                self._profiles.operator.unpin(kind)
            case "pin", [version, kind]:
                self._profiles.operator.pin(version, kind)
            case "rollback", [reason, kind]:
                self._profiles.operator.roll_back(reason, kind)
            case "release", [kind]:
                self._profiles.operator.release(kind)
            case "drain", [engine]:
                self._upstreams.drain(engine)
            case "undrain", [engine]:
                self._upstreams.drain(engine, ends=True)
            case "rebase", [kind]:
                self._alarms.rebase(kind)
                result = json.dumps(self._alarms.report())
            case "mode", ["off" | "observe" | "auto" as mode]:
                self._profiles.operator.set_mode(mode)
                self._subject.update()
            case _:
                raise HemostatError(f"{action}: not known to the leader; do all replicas run the same version?")
        self._on_change()
        return result

    async def execute_command(self, action: str, arguments: list[Any]) -> str:
        """Another replica's command: when this returns, the result can be read in the store. NOT_KEPT: that of a change
        of the mode cannot."""
        failures = self._errors.count
        result = await self.execute(action, arguments)
        written = await self._writer.wait_until_written(MAX_WRITE_SECONDS)
        if action == "mode" and not (written and self._errors.count == failures):
            return NOT_KEPT
        return result

    async def _stored_profile(self, version: str) -> CalibrationProfile:
        profile = self._profiles.catalogue.get(version)
        if profile is not None:
            return profile
        stored = await asyncio.to_thread(self._store.get_profile, version)
        if stored is None:
            raise HemostatError(f"profile {version} is not in the store any more; import it again")
        return await asyncio.to_thread(CalibrationProfile.from_bytes, stored.data, version)


class ModeOverride:
    """The mode that an operator set at this replica, until the leader has set it too.

    Without it, what the store still holds would undo the operator's action here for a moment.
    """

    def __init__(self, configured: str) -> None:
        """configured: `calibration.mode`, with which the store keeps an operator's choice."""
        self._configured = configured
        self._mode: str | None = None
        self._until = math.inf

    def begin(self, mode: str) -> None:
        self._mode, self._until = mode, math.inf

    def end(self) -> None:
        self._mode = None

    def apply(self, states: dict[str, str | None], now: float) -> None:
        """Put it in place of what the store holds; it ends once the leader has set the same, or had time to.
        now: monotonic seconds."""
        if self._mode is None:
            return
        self._until = min(self._until, now + COMMAND_SECONDS)
        if now > self._until or (states["mode"] or "").endswith(f" {self._mode}"):
            self._mode = None
        else:
            states["mode"] = f"{self._configured} {self._mode}"


class OperatorActions:
    """Implements what the admin port calls. NotKeptError where an action applies, and the store has not kept it.

    replica: None without a store that replicas share. wall: Unix time. on_change: called after an import.
    """

    def __init__(
        self,
        local: LocalActions,
        profiles: ProfileManager,
        store: Store,
        writer: StoreWriter,
        errors: StoreErrorLog,
        lease: Lease,
        replica: Replica | None,
        override: ModeOverride,
        wall: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._local = local
        self._profiles = profiles
        self._store = store
        self._writer = writer
        self._errors = errors
        self._lease = lease
        self._replica = replica
        self._override = override
        self._wall = wall
        self._on_change = on_change

    async def import_profile(self, data: bytes, scope: str) -> str:
        """A profile to be tested; its version. InvalidProfileError, HemostatError."""
        profile = await asyncio.to_thread(CalibrationProfile.from_bytes, data)
        if self._replica is None or self._lease.leads:
            failures = self._errors.count
            version = self._profiles.operator.import_profile(profile, scope)
            self._on_change()
            await self._require_kept(failures)
            return version
        try:
            stored = StoredProfile(profile.version, data, self._wall())
            await asyncio.to_thread(self._store.put_profile, stored)
        except StoreFailure as failure:
            self._errors.record(failure)
            raise HemostatError(f"the leading replica cannot be reached: {failure}") from None
        return await self._execute("import", profile.version, scope)

    async def promote(self, version: str, kind: str | None) -> None:
        """kind: of traffic; None for all, here and below."""
        await self._execute("promote", version, kind)

    async def pin(self, version: str | None, kind: str | None) -> None:
        """version: None unpins."""
        await self._execute("pin", version, kind)

    async def rollback(self, reason: str, kind: str | None) -> None:
        await self._execute_at_once("rollback", reason, kind)

    async def release(self, kind: str | None) -> None:
        """End the hold of kinds at identity."""
        await self._execute("release", kind)

    async def drain(self, engine: str, *, ends: bool) -> None:
        """The engine gets no new requests, or some again."""
        await self._execute("undrain" if ends else "drain", engine)

    async def rebase(self, kind: str | None) -> dict[str, Any]:
        """The kind (None: each) learns a new baseline. The alarms' report."""
        report: dict[str, Any] = json.loads(await self._execute("rebase", kind))
        return report

    async def set_mode(self, mode: str) -> bool:
        """The mode applies when this returns. False: the store has not kept it, so that a restart would undo it."""
        failures = self._errors.count
        if not self._lease.leads:
            # Here first: the leader may be slow to answer, or gone.
            self._override.begin(mode)
            await self._local.execute("mode", [mode])
        try:
            answer = await self._execute_at_once("mode", mode)
            if answer is not None:
                self._override.end()
            await self._require_kept(failures)
        except NotKeptError:
            return False
        return answer not in (None, NOT_KEPT)

    async def _execute(self, action: str, *arguments: str | None) -> str:
        """Here where this replica leads, else by the leader."""
        if self._replica is None or self._lease.leads:
            failures = self._errors.count
            result = await self._local.execute(action, list(arguments))
            await self._require_kept(failures)
            return result
        return await self._replica.send(action, *arguments)

    async def _require_kept(self, failures: int) -> None:
        """NotKeptError where what was done is not in the store yet. failures: of the store, before the action."""
        written = await self._writer.wait_until_written(MAX_WRITE_SECONDS)
        if not written or self._errors.count != failures:
            raise NotKeptError(
                "this applies now, but the store could not keep it: a restart may undo it. See the log and "
                "hemostat_store_errors_total"
            )

    async def _execute_at_once(self, action: str, *arguments: str | None) -> str | None:
        """An action that ends something is carried out here even when the store does not answer, and everywhere as soon
        as it does. None in the first case, else its result."""
        if self._replica is not None and not self._replica.reachable and not self._lease.leads:
            await self._local.execute(action, list(arguments))
            self._writer.send_command(secrets.token_hex(8), json.dumps([action, *arguments]))
            return None
        return await self._execute(action, *arguments)
