"""Several replicas with one store: one leads and decides, the others follow.

Invariants:
- The replica that holds the store's lease is the leader: it alone proposes, tests, promotes and rolls back, and so
  spends alpha. By its own clock it holds the lease for less time than by the store's, and the store refuses its writes
  once another replica has led: two leaders at once cannot write an event or a state.
- A replica that takes over keeps the lease while it reads, and leads from an answer of the store that came afterwards:
  it leads however long reading takes. One that cannot use what it reads gives the lease up, so that another can try.
- A new leader continues from what the store says, as after a restart: tests and windows go on from what their leader
  wrote last, and the alpha that was spent since stays spent. (Where a leader died before it had written that a test
  began, that test has decided nothing: decisions are written after it.) Where no other replica led in between, or the
  store has lost its data, the replica's own state is kept and written again.
- While the store does not answer, serving continues unchanged. The lease expires, and nobody promotes or begins a test;
  the last leader goes on watching what serves, and rolls back what harms. A switch to `off` and a rollback take effect
  at once at the replica where the operator asks for them, and at all others once the store answers.
- Operators may talk to any replica: a follower sends what changes state to the leader, as a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from hemostat.ipc.backoff import Backoff
from hemostat.store import schema
from hemostat.store.lease import Lease
from hemostat.store.protocol import LeaseAnswer, SharedStore, StoredProfile, StoreFailure, StoreIncompatible
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.replica")

LEASE_SECONDS = 10.0
"""After this time another replica can lead when the leader stopped without releasing the lease."""
LEADER_FRACTION = 0.8
"""Part of LEASE_SECONDS for which the leader holds itself for the leader."""
HEARTBEAT_SECONDS = 1.0
"""Between two looks at the store: a follower serves what the leader promoted within about this time."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Longest pauses between attempts at a store that does not answer."""
COMMAND_SECONDS = LEASE_SECONDS + 5.0
"""How long a follower waits for the leader's reply to a command."""
REPLY_POLL_SECONDS = 0.1


class Replica:
    """Lives in the control process's event loop.

    is_held: (version) -> whether its profile is in memory already. states: keys that are read of the store's state.
    events: how many events are read.
    load: called with profiles (newest first, without data where they are held), states and events (newest first) that
        another replica has written.
    write_all: called with the versions that the store has, to write everything again.
    execute: (command, arguments) -> result, of a command from another replica; HemostatError.
    on_failure: called with every failure of the store.
    """

    def __init__(
        self,
        store: SharedStore,
        lease: Lease,
        *,
        is_held: Callable[[str], bool],
        states: tuple[str, ...],
        events: int,
        load: Callable[[list[StoredProfile], dict[str, str | None], list[dict[str, Any]]], None],
        write_all: Callable[[Mapping[str, float]], None],
        execute: Callable[[str, list[Any]], Awaitable[str]],
        on_failure: Callable[[StoreFailure], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._lease, self._clock = store, lease, clock
        self._is_held, self._states, self._events = is_held, states, events
        self._load, self._write_all, self._execute, self._on_failure = load, write_all, execute, on_failure
        self._revision: int | None = None
        self._must_read = False
        """Another replica has led, and what it wrote has not been read yet."""
        self.reachable = False
        """The store answered the last time."""

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(RETRY_SECONDS)
        while True:
            try:
                await self.heartbeat()
                backoff.reset()
                pause = HEARTBEAT_SECONDS
            except StoreFailure as failure:
                self._on_failure(failure)
                pause = backoff.pause()
            except Exception:
                # What was read cannot be used: serving continues unchanged, and the next attempt may succeed.
                log.exception("cannot use what the store contains")
                pause = RETRY_SECONDS[-1]
            await asyncio.sleep(pause)

    async def heartbeat(self) -> None:
        """Take or prolong the lease, or follow the leader. StoreFailure."""
        began, led_before = self._clock(), self._lease.leads
        answer = await self._ask_for_lease()
        store_was_empty = answer.previous_leader == ""
        if not answer.leads:
            if self._lease.is_last_leader:
                log.warning("another replica leads now")
            self._lease.lose()
            if answer.revision != self._revision:
                await self._read()
                self._revision = answer.revision
            return
        if not led_before or self._must_read:
            await self._take_over()
            began, answer = self._clock(), await self._ask_for_lease()
            if not answer.leads or self._must_read:
                return  # another replica has led meanwhile
        self._lease.grant(began + LEADER_FRACTION * LEASE_SECONDS)
        self._revision = None
        if not led_before or store_was_empty:
            log.info("this replica leads; the store was empty" if store_was_empty else "this replica leads")
            self._write_all(await asyncio.to_thread(self._store.versions))
        for name, command in await asyncio.to_thread(self._store.take_commands):
            await self._run_command(name, command)

    async def _ask_for_lease(self) -> LeaseAnswer:
        try:
            answer = await asyncio.to_thread(self._store.acquire_lease, LEASE_SECONDS)
        except StoreFailure:
            self.reachable = False
            raise
        self.reachable = True
        if answer.previous_leader not in {"", self._store.replica}:
            self._must_read = True
        return answer

    async def _take_over(self) -> None:
        """With the lease: read what another replica has written. The lease is prolonged meanwhile, and given up where
        what was read cannot be used."""
        try:
            async with self._prolonging():
                await self._migrate()
                if self._must_read:
                    self._lease.lose()
                    self._must_read = False  # asking for the lease sets it again where another one has led meanwhile
                    try:
                        await self._read()
                    except Exception:
                        self._must_read = True
                        raise
        except Exception:
            if self._must_read:
                with contextlib.suppress(StoreFailure):
                    await asyncio.to_thread(self._store.release_lease)
            raise

    @contextlib.asynccontextmanager
    async def _prolonging(self) -> AsyncIterator[None]:
        """The lease is prolonged within, and not any more afterwards."""
        done = asyncio.Event()
        prolonging = asyncio.create_task(self._prolong_until(done))
        try:
            yield
        finally:
            done.set()
            await prolonging

    async def _prolong_until(self, done: asyncio.Event) -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEASE_SECONDS / 4):
                    await done.wait()
                    return
            with contextlib.suppress(StoreFailure):
                await self._ask_for_lease()

    async def _migrate(self) -> None:
        """As the leader. StoreIncompatible: a replica that knows the store's version is to lead."""
        try:
            await asyncio.to_thread(schema.migrate, self._store, self._store.as_leader)
        except StoreIncompatible:
            await self.release()
            raise

    async def _read(self) -> None:
        """StoreIncompatible where a newer version leads: what serves here stays."""
        store = self._store
        schema.require_known(await asyncio.to_thread(store.get_state, schema.SCHEMA_KEY))
        # States first: the profiles that they name were written before them.
        states = {name: await asyncio.to_thread(store.get_state, name) for name in self._states}
        events = await asyncio.to_thread(store.events, self._events)
        profiles = []
        for version, created in (await asyncio.to_thread(store.versions)).items():
            if self._is_held(version):
                profiles.append(StoredProfile(version, b"", created))
            elif (profile := await asyncio.to_thread(self._read_profile, version)) is not None:
                profiles.append(profile)
        self._load(profiles, states, events)

    def _read_profile(self, version: str) -> StoredProfile | None:
        """Decoded here, in a thread: a large one takes a quarter of a second, too long for the event loop."""
        stored = self._store.get_profile(version)
        if stored is not None:
            with contextlib.suppress(InvalidProfileError):  # `load` reports what is wrong
                return replace(stored, read=CalibrationProfile.from_bytes(stored.data, version))
        return stored

    async def _run_command(self, name: str, command: str) -> None:
        try:
            action, *arguments = json.loads(command)
            answer = {"result": await self._execute(action, arguments)}
        except (HemostatError, ValueError, TypeError) as error:  # ValueError, TypeError: not a command
            answer = {"error": str(error)}
        await asyncio.to_thread(self._store.send_reply, name, json.dumps(answer))

    async def send(self, action: str, *arguments: str | None) -> str:
        """Have the leader execute a command; its result, or its error as a HemostatError."""
        name = secrets.token_hex(8)
        try:
            await asyncio.to_thread(self._store.send_command, name, json.dumps([action, *arguments]))
            end = self._clock() + COMMAND_SECONDS
            while self._clock() < end:
                await asyncio.sleep(REPLY_POLL_SECONDS)
                reply = await asyncio.to_thread(self._store.take_reply, name)
                if reply is not None:
                    answer = json.loads(reply)
                    if "error" in answer:
                        raise HemostatError(answer["error"])
                    return str(answer["result"])
        except StoreFailure as failure:
            self._on_failure(failure)
            raise HemostatError(f"the leading replica cannot be reached: {failure}") from None
        raise HemostatError("no replica leads now; it may be executed later: see hemostat profile list, or try again")

    async def release(self) -> None:
        """At an orderly end: another replica can lead at once."""
        self._lease.lose()
        await asyncio.to_thread(self._store.release_lease)
