"""Several replicas with one store: one of them decides, the others serve what it has decided.

Invariants:
- Who has the store's lease leads: it alone proposes, tests, promotes, takes back, and so spends alpha. It holds itself
  for the leader for less time than the store does, by its own clock, and what it writes the store refuses once another
  has led: an event or a state of two deciders at once cannot be.
- Who leads next after another goes on from what the store says, counts of begun tests included, as after a restart:
  evidence of tests under way is lost with their leader, and what they spent stays spent. (Where a leader died before
  it could write that a test has begun, that test has decided nothing: decisions are written after it.) Where nobody
  else led in between, or the store has lost its data, what the replica knows stands, and is written again.
- Where the store does not answer, everything goes on serving as it was. The lease runs out, nobody promotes or begins a
  test; who led last goes on watching what serves, and takes back what harms. A switch to `off` and a roll back hold at
  once where the operator says so, and everywhere once the store is back.
- Operators may talk to any replica: what changes state is handed to the one that leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from hemostat.store.lease import Lease
from hemostat.store.protocol import StoredProfile, StoreFailure
from hemostat.store.valkey import ValkeyStore
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.replica")

LEASE = 10.0
"""Seconds after which another replica leads when the one that does is gone without a word."""
OWN_PART = 0.8
"""Part of it for which the one that leads believes so itself."""
HEARTBEAT = 1.0
"""Seconds between looks at the store: a follower serves what was promoted elsewhere within about this."""
BACKOFF = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds between attempts at a store that does not answer."""
OBEYED_WITHIN = LEASE + 5.0
ASK_EVERY = 0.1


class Replica:
    """Lives in the control process's event loop.

    held: (version) -> whether its profile is here already. states: what is read of the store's state.
    take_up: called with profiles (newest first, without data where they are held), states and events (newest first)
    that another replica has written. keep: called with the versions that the store has, to write everything again.
    obey: (action, arguments) -> result, of what was asked for at another replica; HemostatError.
    failed: called with every failure of the store.
    """

    def __init__(
        self,
        store: ValkeyStore,
        lease: Lease,
        *,
        held: Callable[[str], bool],
        states: tuple[str, ...],
        events: int,
        take_up: Callable[[list[StoredProfile], dict[str, str | None], list[dict[str, Any]]], None],
        keep: Callable[[Mapping[str, float]], None],
        obey: Callable[[str, list[Any]], Awaitable[str]],
        failed: Callable[[StoreFailure], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._lease, self._clock = store, lease, clock
        self._held, self._states, self._events = held, states, events
        self._take_up, self._keep, self._obey, self._failed = take_up, keep, obey, failed
        self._revision: int | None = None
        self._behind = False
        """Another replica has led, and what it wrote is not here yet."""
        self.reachable = False

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            try:
                await self.beat()
                failures, pause = 0, HEARTBEAT
            except StoreFailure as failure:
                self._failed(failure)
                failures, pause = failures + 1, BACKOFF[min(failures, len(BACKOFF) - 1)]
            except Exception:
                # What was read could not be used: what serves goes on, and the next look may find better.
                log.exception("what the store says could not be taken up")
                pause = BACKOFF[-1]
            await asyncio.sleep(pause)

    async def beat(self) -> None:
        """Lead, or follow who does. StoreFailure."""
        began, led = self._clock(), self._lease.leads
        try:
            standing = await asyncio.to_thread(self._store.acquire_lease, LEASE)
        except StoreFailure:
            self.reachable = False
            raise
        self.reachable = True
        if standing.previous_leader not in {"", self._store.replica}:
            self._behind = True
        if not standing.leads:
            if self._lease.is_last_leader:
                log.warning("another replica leads now")
            self._lease.lose()
            if standing.revision != self._revision:
                await self._read()
                self._revision = standing.revision
            return
        if self._behind:
            self._lease.lose()
            await self._read()
            self._behind = False
        self._lease.grant(began + OWN_PART * LEASE)
        self._revision = None
        if not led or standing.previous_leader == "":
            log.info("this replica leads" if standing.previous_leader else "this replica leads; the store was empty")
            self._keep(await asyncio.to_thread(self._store.versions))
        for name, order in await asyncio.to_thread(self._store.take_commands):
            await self._carry_out(name, order)

    async def _read(self) -> None:
        store = self._store
        # States first: the profiles that they name were written before them.
        states = {name: await asyncio.to_thread(store.get_state, name) for name in self._states}
        events = await asyncio.to_thread(store.events, self._events)
        profiles = []
        for version, created in (await asyncio.to_thread(store.versions)).items():
            if self._held(version):
                profiles.append(StoredProfile(version, b"", created))
            elif (profile := await asyncio.to_thread(self._load, version)) is not None:
                profiles.append(profile)
        self._take_up(profiles, states, events)

    def _load(self, version: str) -> StoredProfile | None:
        """With what it holds: reading a large one takes a quarter of a second, too long for the event loop."""
        stored = self._store.get_profile(version)
        if stored is not None:
            with contextlib.suppress(InvalidProfileError):  # whoever takes it up says what is wrong
                return replace(stored, read=CalibrationProfile.from_bytes(stored.data, version))
        return stored

    async def _carry_out(self, name: str, order: str) -> None:
        try:
            action, *arguments = json.loads(order)
            answer = {"result": await self._obey(action, arguments)}
        except (HemostatError, ValueError, TypeError) as error:  # ValueError, TypeError: that was no order
            answer = {"error": str(error)}
        await asyncio.to_thread(self._store.send_reply, name, json.dumps(answer))

    async def ask(self, action: str, *arguments: str | None) -> str:
        """Have the replica that leads do it; its result, or its error as a HemostatError."""
        name = secrets.token_hex(8)
        try:
            await asyncio.to_thread(self._store.send_command, name, json.dumps([action, *arguments]))
            end = self._clock() + OBEYED_WITHIN
            while self._clock() < end:
                await asyncio.sleep(ASK_EVERY)
                said = await asyncio.to_thread(self._store.take_reply, name)
                if said is not None:
                    answer = json.loads(said)
                    if "error" in answer:
                        raise HemostatError(answer["error"])
                    return str(answer["result"])
        except StoreFailure as failure:
            self._failed(failure)
            raise HemostatError(f"the replica that leads cannot be asked: {failure}") from None
        raise HemostatError("no replica leads just now; it may be done yet: see hemostat profile list, or try again")

    async def resign(self) -> None:
        """At an orderly end: another one may lead at once."""
        self._lease.lose()
        await asyncio.to_thread(self._store.release_lease)
