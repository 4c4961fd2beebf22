"""Outcomes by kind and arm in the control process: what counts, what follows from harm, restarts, and what is shown."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.support.stores import LateWrites

from hemostat.ipc.messages import REST_KIND, OutcomeReport
from hemostat.measurement import outcomes
from hemostat.measurement.outcome_sampling import WAIT_SECONDS, OutcomeSampling
from hemostat.measurement.outcomes import STATE_KEY, Outcomes
from hemostat.metrics import names
from hemostat.store import spent_alpha

KIND = "chat json greedy"


@dataclass
class Served:
    """The profiles, as `Outcomes` knows them."""

    by_kind: dict[str, str] = field(default_factory=lambda: {KIND: "v1", REST_KIND: "v1"})
    followed: set[str] = field(default_factory=lambda: {KIND, REST_KIND})
    held: set[str] = field(default_factory=set)
    left: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    pinned: set[str] = field(default_factory=set)

    def kinds(self) -> set[str]:
        return self.followed

    def version(self, kind: str) -> str | None:
        return self.by_kind.get(kind)

    def is_operators(self, kind: str) -> bool:
        return kind in self.held | self.pinned

    def leave(self, kind: str, why: str, evidence: dict[str, Any]) -> None:
        if kind in self.pinned:
            return
        self.by_kind.pop(kind)
        self.held.add(kind)
        self.left.append((kind, why, evidence))


@dataclass
class World:
    served: Served = field(default_factory=Served)
    writes: LateWrites = field(default_factory=LateWrites)
    reported: list[str] = field(default_factory=list)
    """The lines about stored states that could not be read."""
    now: float = 1000.0
    control_fraction: float = 0.5
    outcomes: Outcomes = field(init=False)
    sampling: OutcomeSampling = field(init=False)
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.sampling = OutcomeSampling()
        self.outcomes = Outcomes(
            0.25,
            self.control_fraction,
            self.served,
            self.writes,
            lambda: self.now,
            self.sampling,
        )
        self.outcomes.restore(dict(self.writes.states), self.reported.append)

    def report(self, treated: bool, bad: bool, **changes: Any) -> None:
        given: dict[str, Any] = {
            "kind": KIND,
            "version": "v1",
            "conversation": self.rng.randbytes(16),
            "client": b"",
            "output_tokens": 9,
        }
        self.outcomes.update(OutcomeReport(treated=treated, bad={"json": bad}, **(given | changes)))

    def traffic(self, units: int, treated_rate: float, control_rate: float, **changes: Any) -> None:
        for _ in range(units):
            treated = self.rng.random() < 0.5
            self.report(treated, self.rng.random() < (treated_rate if treated else control_rate), **changes)
            self.outcomes.check()

    @property
    def shown(self) -> dict[str, Any]:
        return {kind["kind"]: kind for kind in self.outcomes.report()["kinds"]}

    def gauges(self) -> dict[tuple[str, ...], float]:
        return {(sample.name, *sample.labels): sample.value for sample in self.outcomes.samples()}


def test_harm_takes_the_profile_from_the_kind_alone() -> None:
    world = World()
    world.traffic(700, 0.9, 0.6)
    ((kind, why, evidence),) = world.served.left
    assert kind == KIND
    assert "json is bad in" in why
    assert evidence["interval"][0] > 0.05
    assert world.served.by_kind == {REST_KIND: "v1"}
    assert world.shown[KIND]["harmed"]["version"] == "v1"
    assert world.gauges()[names.OUTCOME_HARM, KIND] == 1.0
    json.dumps(world.outcomes.report(), allow_nan=False)


def test_a_harmless_profile_stays() -> None:
    world = World()
    world.traffic(400, 0.4, 0.4)
    assert not world.served.left
    (outcome,) = (o for o in world.shown[KIND]["outcomes"] if o["outcome"] == "json")
    assert outcome["control"]["units"] + outcome["treated"]["units"] == 400
    assert outcome["interval"][0] < 0.0 < outcome["interval"][1]
    gauges = world.gauges()
    assert (
        gauges[names.OUTCOME_DIFFERENCE, KIND, "json", "low"]
        < 0
        < gauges[names.OUTCOME_DIFFERENCE, KIND, "json", "high"]
    )


def test_a_conversation_counts_once_in_a_kind() -> None:
    world = World()
    for _ in range(5):
        world.report(True, True, conversation=b"one")
        world.report(True, True, conversation=b"one", kind=REST_KIND)
    assert {kind: shown["units"] for kind, shown in world.shown.items()} == {KIND: 1, REST_KIND: 1}
    world.report(True, True, conversation=b"")
    world.report(True, True, conversation=b"")
    assert world.shown[KIND]["units"] == 3


def test_what_is_not_of_the_served_version_is_ignored() -> None:
    world = World()
    world.report(True, True, version="older")
    world.report(True, True, kind="chat text greedy")
    world.served.by_kind.pop(REST_KIND)
    world.report(True, True, kind=REST_KIND)
    assert world.shown == {}


def test_another_version_begins_a_trial_that_spends_less() -> None:
    world = World()
    world.report(True, True)
    first = world.shown[KIND]["alpha"]
    world.served.by_kind[KIND] = "v2"
    world.report(True, False, version="v2")
    shown = world.shown[KIND]
    assert (shown["version"], shown["trial"], shown["units"]) == ("v2", 2, 1)
    assert shown["alpha"] == pytest.approx(first / 3)


def test_an_operator_releases_the_kind() -> None:
    world = World()
    world.traffic(700, 1.0, 0.5)
    world.outcomes.check()
    assert world.gauges()[names.OUTCOME_HARM, KIND] == 1.0
    world.served.held.clear()
    world.outcomes.check()
    assert world.gauges()[names.OUTCOME_HARM, KIND] == 0.0
    world.served.by_kind[KIND] = "v1"
    world.report(True, False)
    assert (world.shown[KIND]["trial"], world.shown[KIND]["units"]) == (2, 1), "in a trial of its own"


def test_a_restart_continues() -> None:
    world = World()
    world.traffic(200, 0.8, 0.6)
    world.report(True, True, conversation=b"one")
    world.outcomes.save()
    before = world.outcomes.report()
    world.restart()
    world.report(True, True, conversation=b"one")
    assert world.outcomes.report() == before
    world.traffic(3000, 0.8, 0.6)
    world.outcomes.save()
    world.restart()
    world.outcomes.check()
    assert world.shown[KIND]["harmed"] is not None


def test_the_state_is_saved_every_minute_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "MAX_SEEN", 100)
    world = World()
    world.traffic(300, 0.5, 0.5)
    assert STATE_KEY not in world.writes.states
    world.now += 61.0
    world.outcomes.check()
    stored = world.writes.states[STATE_KEY]
    assert stored is not None
    assert len(json.loads(stored)["state"]["seen"][1]) == 800
    assert len(stored) < 15_000


def test_arms_of_another_size_begin_anew() -> None:
    world = World()
    world.traffic(50, 0.5, 0.5)
    world.outcomes.save()
    world.control_fraction = 0.1
    world.restart()
    world.report(True, True)
    assert (world.shown[KIND]["trial"], world.shown[KIND]["units"]) == (2, 1)


@pytest.mark.parametrize(
    "stored", ["", "{}", "[]", '{"format": 1}', '{"schema": 1, "state": {"control_fraction": 0.5, "kinds": 3}}']
)
def test_a_damaged_state_is_not_used(stored: str) -> None:
    world = World()
    world.writes.states[STATE_KEY] = stored
    world.restart()
    assert ["stored as outcomes cannot be read" in line for line in world.reported] == [True]
    world.report(True, True)
    assert world.shown[KIND]["trial"] == 1


def test_a_kind_that_is_no_longer_followed_is_forgotten() -> None:
    world = World()
    world.report(True, True)
    world.served.followed = {REST_KIND}
    world.outcomes.check()
    assert world.shown == {}
    assert not world.gauges()


def test_a_pinned_profile_stays_and_its_harm_is_shown_until_it_is_unpinned() -> None:
    world = World()
    world.served.pinned.add(KIND)
    world.traffic(700, 0.9, 0.6)
    assert world.served.by_kind[KIND] == "v1"
    assert world.gauges()[names.OUTCOME_HARM, KIND] == 1.0
    world.served.pinned.clear()
    world.traffic(700, 0.9, 0.6)
    assert world.served.left, "it is judged again"


def test_only_conversations_whose_number_is_below_what_counts_are_units() -> None:
    world = World()
    world.outcomes.sample(150.0, 0.0)
    assert (world.sampling.reported, world.sampling.counted) == (0.25, 0.25)
    for number in range(100):
        world.report(True, True, drawn=number / 100)
    assert world.shown[KIND]["units"] == 25
    assert world.outcomes.report()["counted"] == 0.25


def test_who_has_answers_while_it_does_not_count_never_counts() -> None:
    """Its later answers are those of a conversation that goes on, and longer ones may be more frequent in one arm."""
    world = World()
    world.outcomes.sample(80.0, 0.0)
    world.outcomes.sample(0.0, WAIT_SECONDS)
    assert (world.sampling.reported, world.sampling.counted) == (1.0, 0.5)
    world.report(True, True, conversation=b"goes on", drawn=0.75)
    world.outcomes.sample(0.0, 2 * WAIT_SECONDS)
    assert world.sampling.counted == 1.0
    world.report(True, True, conversation=b"goes on", drawn=0.75)
    world.report(True, True, conversation=b"begins", drawn=0.75)
    assert world.shown[KIND]["units"] == 1


def test_a_conversation_that_continues_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "MAX_SEEN", 10)
    world = World()
    for _ in range(20):
        world.report(True, True, conversation=b"goes on")
        world.traffic(5, 0.5, 0.5)
    assert world.shown[KIND]["units"] == 101


def test_a_restart_counts_the_same_part() -> None:
    world = World()
    world.outcomes.sample(80.0, 0.0)
    world.restart()
    assert (world.sampling.reported, world.sampling.counted) == (0.5, 0.5), "stored at once"
    world.outcomes.sample(0.0, 0.0)
    world.outcomes.sample(0.0, WAIT_SECONDS - 1.0)
    assert world.sampling.reported == 0.5


def test_other_models_begin_anew() -> None:
    world = World()
    world.report(True, True, conversation=b"one")
    world.outcomes.forget()
    world.report(True, True, conversation=b"one")
    assert (world.shown[KIND]["trial"], world.shown[KIND]["units"]) == (2, 1), "alpha stays spent"


def test_alpha_that_was_spent_in_a_kind_stays_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kind is not followed for a while, where the models change, and over restarts."""
    monkeypatch.setattr(spent_alpha, "MAX_NAMES", 2)
    world = World()
    for expected in (1, 2, 3):
        world.traffic(5, 0.5, 0.5)
        assert world.shown[KIND]["trial"] == expected
        world.served.followed.remove(KIND)
        world.outcomes.check()
        world.served.followed.add(KIND)
        if expected == 2:
            world.outcomes.forget()
        world.outcomes.save()
        world.restart()
    for other in ("a", "b", "c"):
        world.served.by_kind[other] = "v1"
        world.served.followed.add(other)
        world.traffic(2, 0.5, 0.5, kind=other)
        world.served.followed.remove(other)
        world.outcomes.check()
    world.traffic(5, 0.5, 0.5)
    assert world.shown[KIND]["trial"] == 4, "among those that share a count"


@pytest.mark.parametrize(
    "stored",
    ['{"format": 1, "kinds": []}', '{"format": 3, "trials": {}}', "not JSON", None],
    ids=["older", "newer", "damaged", "missing"],
)
def test_the_number_of_a_trial_is_recovered_from_every_format(stored: str | None) -> None:
    world = World()
    world.report(True, True)
    first = world.shown[KIND]["alpha"]
    world.writes.states[STATE_KEY] = stored
    world.restart()
    world.report(True, True)
    assert world.shown[KIND]["trial"] == 2
    assert world.shown[KIND]["alpha"] == pytest.approx(first / 3)


def test_a_process_that_is_killed_as_a_trial_has_begun_does_not_spend_its_alpha_again() -> None:
    """Everything that was queued and not written is lost."""
    world = World()
    for expected in (1, 2, 3):
        world.report(True, True)
        assert world.shown[KIND]["trial"] == expected
        assert STATE_KEY not in world.writes.states, "the trials themselves are written once a minute"
        world.writes.lose()
        world.restart()


def test_a_trial_decides_nothing_before_its_number_is_stored() -> None:
    """If the process is killed meanwhile, the next trial may have the same number: nothing was spent of its alpha."""
    world = World()
    world.writes.away = True
    world.traffic(700, 0.9, 0.6)
    assert not world.served.left
    world.writes.lose()
    world.restart()
    world.traffic(5, 0.9, 0.6)
    assert world.shown[KIND]["trial"] == 1
    world.writes.away = True
    world.traffic(700, 0.9, 0.6)
    assert world.served.left, "its number was stored before the store went away"


def test_what_is_proven_while_the_store_is_away_is_decided_when_it_is_back() -> None:
    world = World()
    world.writes.away = True
    world.traffic(700, 0.9, 0.6)
    world.writes.write()
    world.outcomes.check()
    assert world.served.left


def test_numbers_of_versions_that_stored_them_with_the_trials_are_recovered() -> None:
    world = World()
    world.writes.states[STATE_KEY] = json.dumps(
        {"format": 1, "kinds": {KIND: {"number": 4}}, "begun": {REST_KIND: 2, "": "x"}}
    )
    world.restart()
    world.report(True, True)
    world.report(True, True, kind=REST_KIND)
    assert (world.shown[KIND]["trial"], world.shown[REST_KIND]["trial"]) == (5, 3)
