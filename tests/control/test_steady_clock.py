"""A control process whose clock is set, in mid-cycle and across a restart: no gate opens, and an event says so."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.control import settings
from tests.support.evidence import evidence
from tests.support.records import Truth, log_softmax, make_record

from hemostat.canaries.pace import BUDGET_TOKENS, Pace, PaceState
from hemostat.control import composition, steady_clock
from hemostat.control.composition import Control
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.records import TokenRecord

HOUR, DAY, YEAR = 3600.0, 86_400.0, 365.25 * 86_400.0
JUMPS = {"-50 years": -50.0 * YEAR, "+50 years": 50.0 * YEAR, "+3 days": 3.0 * DAY, "-1 hour": -HOUR}
SENTENCES = {
    "-50 years": "the clock was set back by 50.0 years",
    "+50 years": "the clock was set forward by 50.0 years",
    "+3 days": "the clock was set forward by 3.0 days",
    "-1 hour": "the clock was set back by 1.0 hours",
}
KIND = "chat text sampled"


CLOSED = (False, False, False, False)


def record(seed: int) -> TokenRecord:
    """Forty tokens of two models whose logits differ by a little."""
    rng = np.random.default_rng(seed)
    reference = log_softmax(rng.normal(size=(40, 30)) * 2.0)
    compressed = log_softmax(reference + 0.1 * rng.normal(size=(40, 30)))
    emitted = np.array([rng.choice(30, p=np.exp(row)) for row in compressed])
    made = make_record(Truth(reference, compressed, emitted), 20)
    return replace(made, kind=KIND, request_id=str(seed), client=b"client %d" % (seed % 7))


RECORDS = [record(seed) for seed in range(60)]
NUMBERS = itertools.count()


class Machine:
    """A wall clock that can be set, a clock that cannot, and the run of the machine that the latter belongs to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.steady, self._boot = 1.7e9, 5000.0, "a"
        monkeypatch.setattr(composition, "boot_id", lambda: self._boot)

    def pass_(self, seconds: float) -> None:
        self.wall, self.steady = self.wall + seconds, self.steady + seconds

    def boot(self) -> None:
        self.steady, self._boot = 3.0, "b"


@asynccontextmanager
async def process(folder: Path, machine: Machine) -> AsyncIterator[Control]:
    made = settings(
        store={"url": f"sqlite:///{folder / 'store.db'}"},
        evidence={"cycle_hours": 24.0},
        alarm={"baseline_requests": 30, "budget_nats": 0.5},
        shadow={"floor_fraction": 0.0},
    )
    plane = Control(
        made,
        1234,
        clock=lambda: machine.steady,
        wall=lambda: machine.wall,
        steady=lambda: machine.steady,
    )
    await plane.start()
    plane.profile_manager.set_model_pair("m", 30)
    try:
        yield plane
    finally:
        await plane.close()


def live(plane: Control, machine: Machine, hours: float) -> None:
    """Five requests an hour, and what the process does regularly."""
    for _ in range(int(5 * hours)):
        machine.pass_(720.0)
        plane.do_periodic()
        made = RECORDS[next(NUMBERS) % len(RECORDS)]
        figures = divergence(made)
        plane.measured.alarms.update(made, figures)
        plane.measured.by_engine.update(made, figures)
        plane.profile_manager.update(evidence(made, divergences=figures.kl_rc))


def gates(plane: Control) -> tuple[bool, bool, bool, bool]:
    """The baseline is known, a budget test runs, the mix of kinds is known, and profiles may be promoted."""
    report = plane.measured.alarms.report()
    budget = any(test["test"] == "budget" for test in report["tests"])
    mix = (
        report["workload"]["baseline_requests"] > 0
        and plane.measured.alarms.report()["workload"]["distance"] is not None
    )
    guard = plane.profile_manager.trials.guard
    return all(kind["watched"] for kind in report["kinds"]), budget, mix, guard.has_seen_cycles


def sentences(plane: Control) -> list[str]:
    return [event["why"] for event in plane.measured.alarms.report()["events"]]


@pytest.mark.parametrize("jump", JUMPS)
async def test_a_clock_that_is_set_in_mid_cycle(jump: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    async with process(tmp_path, machine) as plane:
        live(plane, machine, 20)
        machine.wall += JUMPS[jump]
        live(plane, machine, 22)
        assert gates(plane) == CLOSED
        assert sentences(plane) == [f"{SENTENCES[jump]}: cycles of the traffic that had not ended begin again"]
        assert abs(plane.status.current().at - machine.wall) < 1.0, "people see the time of the wall clock"
        live(plane, machine, 4)
        assert gates(plane)[:2] == (True, True)
        assert not plane.profile_manager.trials.guard.has_seen_cycles
        live(plane, machine, 24)
        assert plane.profile_manager.trials.guard.has_seen_cycles
        assert len(sentences(plane)) == 1


@pytest.mark.parametrize("jump", JUMPS)
async def test_a_clock_that_is_set_between_two_processes(
    jump: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    async with process(tmp_path, machine) as plane:
        live(plane, machine, 20)
    machine.pass_(60.0)
    machine.wall += JUMPS[jump]
    async with process(tmp_path, machine) as plane:
        (event,) = sentences(plane)
        assert event.startswith("the clock was set")
        live(plane, machine, 22)
        assert gates(plane) == CLOSED
        live(plane, machine, 4)
        assert gates(plane)[:2] == (True, True)
    async with process(tmp_path, machine) as plane:
        assert sentences(plane) == [event], "it is said once"


@pytest.mark.parametrize("jump", JUMPS)
async def test_a_clock_that_is_set_while_the_machine_starts_again(
    jump: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    async with process(tmp_path, machine) as plane:
        live(plane, machine, 20)
    machine.boot()
    machine.wall += JUMPS[jump]
    async with process(tmp_path, machine) as plane:
        live(plane, machine, 3)
        assert gates(plane) == CLOSED, "what the wall clock says has passed is not known to have"
        believable = jump == "+3 days"  # nobody can tell whether the machine was off for three days
        assert len(sentences(plane)) == (not believable)
        live(plane, machine, 3 if believable else 22)
        assert gates(plane)[:2] == (True, True)


async def test_a_process_that_was_away_goes_on_with_its_cycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length of the absence is known within one run of the machine, so it is a pause like any other."""
    machine = Machine(monkeypatch)
    async with process(tmp_path, machine) as plane:
        live(plane, machine, 20)
    machine.pass_(5 * HOUR)
    async with process(tmp_path, machine) as plane:
        live(plane, machine, 2)
        assert gates(plane)[:2] == (True, True)
        assert sentences(plane) == []


async def test_a_process_that_is_killed_after_the_clock_was_set_does_not_believe_it_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written since."""
    machine = Machine(monkeypatch)
    async with process(tmp_path, machine) as plane:
        live(plane, machine, 20)
        await plane.writer.write()
        monkeypatch.setattr(plane, "_save", lambda: asyncio.sleep(0.0))
        machine.wall += JUMPS["+3 days"]
    async with process(tmp_path, machine) as plane:
        assert len(sentences(plane)) == 1
        live(plane, machine, 3)
        assert gates(plane) == CLOSED


async def test_a_stored_time_that_is_damaged_is_no_reason_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    async with process(tmp_path, machine) as plane:
        plane.writer.set_state(steady_clock.STATE_KEY, "{")
        monkeypatch.setattr(plane.time, "save", lambda writes: None)
    async with process(tmp_path, machine) as plane:
        assert plane.ownership.active


def test_the_clock_that_nobody_sets_goes_on_while_the_machine_is_suspended() -> None:
    """CLOCK_BOOTTIME and CLOCK_MONOTONIC differ by the time for which the machine was suspended."""
    assert steady_clock.boot_time() >= time.monotonic() - 1.0
    assert steady_clock.boot_time() <= steady_clock.boot_time()


def test_a_machine_without_that_clock_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert abs(steady_clock.boot_time() - time.monotonic()) < 1.0
    monkeypatch.setattr(steady_clock, "_BOOT_ID", Path("/nowhere"))
    assert steady_clock.boot_id() == ""


@pytest.mark.parametrize("jump", JUMPS.values(), ids=list(JUMPS))
def test_the_budget_of_canaries_lasts_where_the_clock_is_set_between_two_processes(jump: float) -> None:
    """Each replay has a chance of a false statement, so that their number in an hour is limited."""
    before = Pace(lambda: 1000.0, lambda: 1.7e9, PaceState())
    before.spend(BUDGET_TOKENS)
    now = 1.7e9 + 60.0 + jump
    kept = before.state().after_break(TimeBreak(now, jump, anew=True))
    monotonic = [5.0]
    after = Pace(lambda: monotonic[0], lambda: now, kept)
    assert after.left() == 0
    monotonic[0] += HOUR
    assert after.left() == BUDGET_TOKENS
