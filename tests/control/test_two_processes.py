"""Two control processes with one store, every call of which may fail, be executed and fail, come late, or come twice.

After each step the store itself is read. What was begun there stays counted: tests, windows, alarms. What serves, and
who is a candidate, goes only with an event; no event goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tests.support import control as support
from tests.support.faulty_store import Fault, FaultyStore
from tests.support.nothing_lost import check
from tests.support.profile_bench import BIASED, FRACTION, JUDGED, MODEL, Bench, harmful, helpful
from tests.support.slow import slow_unless
from tests.support.stores import KEPT, Opener, opener
from tests.support.waiting import HANG_SECONDS
from tests.support.world import V

from hemostat.config.schema import Settings
from hemostat.control import composition
from hemostat.control.composition import Control
from hemostat.control.ownership import OwnershipState, Superseded
from hemostat.store.protocol import ExclusionLost, Snapshot, StoreConflict, StoreFailure, StoreUnreachable, Write
from hemostat.store.sqlite import SqliteStore
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.errors import HemostatError

T = TypeVar("T")
MADE: Settings = support.settings(
    calibration={"mode": "auto", "held_out_fraction": FRACTION, "clamp_nats": 1.0}, alarm={"baseline_requests": 30}
)
PROFILES = [helpful(), helpful(1), harmful(), harmful(seed=6)]
RECORDS = [(record, divergence(record)) for record in (Bench().record(BIASED.truth(n), JUDGED[n]) for n in range(31))]
"""So many that a test of the alarm begins."""
FAULTS = st.sampled_from([fault for fault in Fault if fault is not Fault.NONE])
WHICH = st.integers(0, 1)
SETTINGS = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


class Work(StrEnum):
    """Of a process."""

    IMPORT = "an operator imports a profile"
    PROMOTE = "an operator promotes a candidate"
    PIN = "an operator pins one"
    OFF = "an operator switches off, and on again"
    ROLL_BACK = "an operator rolls back what serves"
    JUDGE = "records are judged by, and the minute is over"


WORKS = st.tuples(st.sampled_from(Work), st.integers(0, 2))


class Process:
    """One control process: all of it but the sockets and the loops, whose steps are called one by one."""

    def __init__(self, store: FaultyStore) -> None:
        self.store = store
        with mock.patch.object(composition, "open_store", return_value=store):
            self.control = Control(MADE, 1234)
        self.ownership = self.control.ownership
        self.profiles = self.control.profile_manager
        self.bench = Bench()
        self.bench.profiles = self.profiles
        self._numbers = itertools.count()

    async def try_to_begin(self) -> None:
        snapshot = await self.ownership.try_to_begin()
        if snapshot is not None:
            self._use(snapshot)

    async def begin(self) -> None:
        async with asyncio.timeout(HANG_SECONDS):
            self._use(await self.ownership.begin())

    def _use(self, snapshot: Snapshot) -> None:
        self.control.restore(snapshot)
        self.profiles.set_model_pair(MODEL, V)

    def may(self, work: Work) -> bool:
        """What ends something may also be done while the process is suspended."""
        ends = work in (Work.OFF, Work.ROLL_BACK)
        return self.ownership.knows if ends else self.ownership.active

    def do(self, work: Work) -> None:
        operator, queue = self.profiles.operator, self.profiles.trials.queue
        match work:
            case Work.IMPORT:
                operator.import_profile(PROFILES[next(self._numbers) % len(PROFILES)])
            case Work.PROMOTE if queue:
                operator.promote(queue[0].version)
            case Work.PIN if queue:
                operator.pin(queue[0].version)
            case Work.OFF:
                operator.set_mode("off")
                operator.set_mode("auto")
            case Work.ROLL_BACK if self.profiles.serving.version is not None:
                operator.roll_back("a test")
            case Work.JUDGE:
                first = 10 * next(self._numbers) % 10_000
                self.bench.feed(BIASED, JUDGED[first : first + 2])
                for record, figures in RECORDS:
                    self.control.measured.alarms.update(record, figures)
                self.save()
            case _:
                pass

    def save(self) -> None:
        """As the process does once a minute, and at its end."""
        self.profiles.writer.save()
        self.control.measured.alarms.save()

    async def write(self) -> None:
        """As `StoreWriter.run` does, once."""
        try:
            await self.ownership.writer.write()
        except (ExclusionLost, StoreConflict) as failure:
            await support.lose(self.control, str(failure))
        except StoreFailure:
            pass


class Unowned(SqliteStore):
    """Whoever writes last wins, as with the former store."""

    def acquire(self) -> bool:
        return True

    def verify(self) -> None:
        return

    def _require_owner(self) -> None:
        return

    def commit(self, writes: list[Write], expected: int, commit_id: str) -> int:  # type: ignore[override]
        return super().commit(writes, self.head().revision, commit_id)


class Forgetful(FaultyStore):
    """What cannot be read counts as not stored, as with the former store."""

    def read(self) -> Snapshot:
        try:
            return super().read()
        except StoreFailure:
            return Snapshot()


class Lives(RuleBasedStateMachine):
    """kind: of the store. wrap: what a process calls it through."""

    kind = "sqlite"
    wrap: Callable[[Any], FaultyStore] = FaultyStore

    def opener(self, folder: Path) -> Opener:
        return opener(self.kind, folder)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hemostat-"))
        self.open_one = self.opener(self.folder)
        self.reader = self.open_one()
        self.before = Snapshot()
        self.stores: list[FaultyStore] = []
        self.processes: list[Process | None] = [None, None]
        self.loop = asyncio.new_event_loop()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        """Whatever has happened, a process that can read and write goes on from all of it."""
        for store in self.stores:
            store.close()
        last = Process(FaultyStore(self.open_one()))
        try:
            self.run(last.begin())
            assert last.ownership.active
            last.save()
            self.run(last.write())
            self.nothing_that_was_stored_is_gone()
        finally:
            last.store.close()
            self.reader.close()
            self.run(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.folder)

    # --- what happens to processes and calls -------------------------------------------------------------------------

    @rule(which=WHICH, faults=st.lists(st.sampled_from(Fault), max_size=3))
    def begin(self, which: int, faults: list[Fault]) -> None:
        """Three attempts, with these faults of the next calls. It takes over, where no other process owns the store."""
        process = self.processes[which]
        if process is None:
            store = type(self).wrap(self.open_one())
            self.stores.append(store)
            process = self.processes[which] = Process(store)
        process.store.faults = list(faults)
        for _ in range(3):
            if not process.ownership.knows:
                self.run(process.try_to_begin())

    @initialize()
    def one_is_active(self) -> None:
        self.begin(0, [])

    @rule(which=WHICH)
    def kill(self, which: int) -> None:
        if (process := self.processes[which]) is not None:
            process.store.close()
            self.processes[which] = None

    def the_session_ends(self, which: int) -> None:
        """The process lives, and does not know."""
        if (process := self.processes[which]) is not None:
            process.store.close()

    @rule()
    def late_calls_are_executed(self) -> None:
        for store in self.stores:
            store.execute_late()

    @rule(which=WHICH, lost=st.booleans())
    def look_after_ownership(self, which: int, lost: bool) -> None:
        """lost: its session has ended."""
        if lost:
            self.the_session_ends(which)
        process = self.processes[which]
        if process is None:
            return
        if process.ownership.active:
            self.run(process.ownership.verify())
        if process.ownership.state is OwnershipState.SUSPENDED:
            try:
                self.run(process.ownership.try_to_regain())
            except Superseded:
                self.kill(which)

    @rule(which=WHICH, returns=st.booleans())
    def another_one_writes(self, which: int, returns: bool) -> None:
        """The process loses its session, the other one takes over and writes. It may lose its own then."""
        self.the_session_ends(which)
        self.begin(1 - which, [])
        self.work(1 - which, [(Work.JUDGE, 1)], [])
        if returns:
            self.the_session_ends(1 - which)
        self.look_after_ownership(which, lost=False)
        self.work(which, [(Work.IMPORT, 1)], [])

    # --- what processes do -------------------------------------------------------------------------------------------

    @rule(
        which=WHICH,
        works=st.lists(WORKS, min_size=1, max_size=4),
        faults=st.lists(FAULTS, max_size=3),
        ends_well=st.booleans(),
    )
    def work(self, which: int, works: list[tuple[Work, int]], faults: list[Fault], *, ends_well: bool = True) -> None:
        """With these faults of the next calls. works: and how often it then tries to write what waits. ends_well: then
        all is written."""
        process = self.processes[which]
        if process is None:
            return
        process.store.faults = list(faults)
        for work, attempts in works:
            if process.may(work):
                with contextlib.suppress(HemostatError):  # another profile is pinned, for example
                    process.do(work)
            for _ in range(attempts):
                if process.ownership.active:
                    self.run(process.write())
                self.nothing_that_was_stored_is_gone()
        if ends_well and process.ownership.active:
            process.store.faults = []
            process.profiles.writer.write_serving()
            self.run(process.write())

    # --- what is stored ----------------------------------------------------------------------------------------------

    def stored(self) -> Snapshot:
        """The server may have ended the reader's session, which idles between reads: longer than it may on a busy
        machine. A read gives all or nothing."""
        try:
            return self.reader.read()
        except StoreUnreachable:
            return self.reader.read()

    @invariant()
    def nothing_that_was_stored_is_gone(self) -> None:
        result = self.stored()
        check(self.before, result)
        self.before = result


@pytest.mark.parametrize("kind", slow_unless(["sqlite"], KEPT))
def test_nothing_that_was_stored_is_ever_lost(kind: str, tmp_path: Path) -> None:
    opener(kind, tmp_path)  # skipped where its server is not installed
    machine = type("LivesOn", (Lives,), {"kind": kind})
    run_state_machine_as_test(machine, settings=SETTINGS)


class LastWriteWins(Lives):
    """With a mutant store: no process owns it, and no revision is checked."""

    def opener(self, folder: Path) -> Opener:
        return lambda: Unowned(folder / "hemostat.db")


class FailedReadIsEmpty(LastWriteWins):
    """The former store, with both of its defects."""

    wrap = Forgetful


@pytest.mark.parametrize("machine", [LastWriteWins, FailedReadIsEmpty])
def test_the_defects_of_the_former_store_are_found(machine: type[Lives]) -> None:
    """A test of the test."""
    result = settings(SETTINGS, derandomize=True, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=result)
