"""A seeded log of the life of profiles: every decision with its evidence, and every write of the store, in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
from tests.characterization import driver, golden
from tests.characterization.driver import BIASED, Life, contextual, harmful, helpful
from tests.characterization.worlds import V, World

EVEN = World()
OPPOSITE = World(bias=-1.2)
HALVED = World(bias=0.6)
"""Where what takes back the whole bias of the biased world does as much harm as good."""
LEARNED, JUDGED = driver.keys(judged=False), driver.keys(judged=True)


class Log:
    """Steps of one scenario. A write of an event is shown by its number among the step's events."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._states: dict[int, dict[str, Any]] = {}
        self._lives: list[Life] = []
        """Kept, so that no two have the same id."""

    def step(self, did: str, life: Life, answer: object = None) -> None:
        """What has been saved since the last step, and what holds now and did not then (None: no longer)."""
        saves, life.saves = life.saves, []
        events = [save["event"] for save in saves if save["write"] == "append_event"]
        lines = []
        for save in saves:
            if save["write"] == "append_event":
                lines.append(f"append_event {events.index(save['event'])}")
            else:
                lines.append(" ".join(str(golden.plain(part)) for part in save.values()))
        before, now = self._states.get(id(life), {}), life.state()
        changed = {name: now.get(name) for name in sorted(before | now) if before.get(name) != now.get(name)}
        self._states[id(life)] = now
        self._lives.append(life)
        step = {"did": did, "answer": answer, "events": events, "saves": lines, "now": changed}
        self.steps.append({name: value for name, value in step.items() if value not in (None, [], {})})


def evidence(log: Log) -> None:
    """Propose, test, promote, replace, roll back for harm, learn again; a restart; another model."""
    life = Life(alpha=0.2)
    weak = life.import_profile(driver.partial(0.3))
    fed = life.feed(BIASED, JUDGED, lambda: life.selected == weak)
    log.step("import a weak one and judge until it is promoted", life, fed)
    log.step("propose a learned one", life, life.propose(helpful(), 1000))
    life.feed(BIASED, JUDGED[200:210], exact=False)
    log.step("judge by bounds alone: nothing is proven", life)
    fed = life.feed(BIASED, JUDGED[210:700], lambda: life.selected != weak)
    log.step("judge until a learned one replaces what serves", life, fed)
    life.import_profile(harmful())
    fed = life.feed(OPPOSITE, JUDGED[:400], lambda: life.selected is None)
    log.step("the model changes: judge until what serves is rolled back", life, fed)
    log.step("propose again", life, life.propose(helpful(1, OPPOSITE), 6000))
    fed = life.feed(OPPOSITE, JUDGED[400:800], lambda: life.selected is not None)
    log.step("judge until one is promoted", life, fed)
    again = Life(life.store, known=False, at=life.now)
    again.restore()
    log.step("restart: the models are not known yet", again)
    again.know()
    log.step("the models are known", again)
    again.feed(OPPOSITE, JUDGED[1000:1010])
    log.step("judge what serves", again)
    again.know("another", V)
    log.step("another model", again)
    answer = again.propose(helpful(2, model="another"), 1000)
    log.step("proposals come as early as the first time", again, answer)
    log.step("decisions", again, [life.decisions(), again.decisions()])
    log.step("status and listing", life, {"status": life.status(), "events": len(life.listing()["events"])})


def unsupported(log: Log) -> None:
    """What serves outlasts a window in which it helps, and not one in which it neither helps nor harms."""
    life = Life(alpha=0.3)
    life.import_profile(helpful())
    fed = life.feed(BIASED, JUDGED, lambda: life.selected is not None)
    log.step("import one and judge until it is promoted", life, fed)
    window = life.window
    life.feed(BIASED, JUDGED[:window])
    log.step("one window in which it helps", life, window)
    fed = life.feed(HALVED, JUDGED[window:], lambda: life.selected is None)
    log.step("until the window's end it neither helps nor harms", life, fed)


def unproven(log: Log) -> None:
    """An import that proves nothing makes room for one that waits; a prompt counts once."""
    life = Life()
    first, *_ = [life.import_profile(harmful(seed)) for seed in range(3)]
    life.feed(EVEN, JUDGED[:10] * 3)
    log.step("three imports; ten prompts, three times each", life)
    fed = life.feed(EVEN, JUDGED[10:], lambda: first not in life.candidates)
    log.step("judge until one is dropped", life, fed)


def contextual_learner(log: Log) -> None:
    """A probe, proposals of two learners, those that are not due, and one in place of an older one."""
    life = Life()
    life.probe(driver.learners_probe())
    log.step("a learner begins", life)
    log.step("propose one of a family that goes last", life, life.propose(helpful(), 1344))
    answers = [life.propose(contextual(0.1 * n), tokens) for n, tokens in ((1, 1000), (2, 1500), (3, 4000))]
    log.step("propose at 1000, 1500 and 4000 tokens", life, answers)
    life.import_profile(contextual(0.5, first_anchor=2))
    log.step("import one that reads other anchors", life)
    fed = life.feed(BIASED, JUDGED, lambda: life.selected is not None)
    log.step("judge until one is promoted", life, fed)
    life.probe(driver.learners_probe(3))
    log.step("another learner begins", life, life.propose(contextual(0.9), 9000))
    foreign = harmful(vocabulary=V + 1)
    answers = [life.import_profile(foreign), life.propose(foreign, 10**6)]
    log.step("profiles of another vocabulary", life, answers)


def operator(log: Log) -> None:
    """Promote, pin, unpin, roll back, all modes; what is refused; what outlives a restart."""
    life = Life()
    bad, good = life.import_profile(harmful()), life.import_profile(helpful())
    nobody = "0" * 32
    refusals = [life.promote(nobody), life.pin(nobody), life.unpin(), life.roll_back(), life.promote(bad, "label")]
    log.step("what there is nothing to do for is refused", life, [*refusals, life.import_profile(helpful())])
    life.feed(EVEN, JUDGED[:5])
    log.step("promote after 5 requests", life, [life.promote(bad), life.promote(bad)])
    fed = life.feed(EVEN, JUDGED[5:500], lambda: life.selected is None)
    log.step("judge until it is rolled back", life, fed)
    log.step("pin it", life, life.pin(bad))
    life.feed(BIASED, JUDGED[:120])
    log.step("judge: it stays", life, life.promote(good))
    again = Life(life.store, known=False, at=life.now)
    again.restore()
    again.know()
    log.step("restart: the pin holds", again)
    log.step("unpin", life, life.unpin())
    fed = life.feed(BIASED, JUDGED[120:], lambda: life.selected == good)
    log.step("judge until the better one serves", life, fed)
    life.pin(good)
    log.step("pin what serves", life)
    for mode in ("observe", "observe", "off"):
        life.set_mode(mode)
        log.step(f"mode {mode}", life)
    life.feed(BIASED, [*LEARNED[:20], *JUDGED[:20]])
    log.step("records while it is off", life)
    again = Life(life.store, known=False, at=life.now)
    again.restore()
    log.step("restart with the same configuration", again)
    other = Life(life.store, known=False, at=life.now, mode="observe")
    other.restore()
    log.step("restart with another mode in the configuration", other)
    life.set_mode("auto")
    log.step("mode auto", life)
    log.step("roll back", life, life.roll_back())
    life.damage(good)
    life.promote(bad)
    again = Life(life.store, known=False, at=life.now)
    again.restore()
    log.step("restart with a damaged profile in the store", again)
    life.damage(life.import_profile(harmful(7)))
    life.damage(bad)
    again = Life(life.store, known=False, at=life.now)
    again.restore()
    log.step("restart with those damaged that serve and are tested", again)
    life.promote(life.import_profile(contextual()))
    life.import_profile(contextual(0.5))
    with mock.patch("hemostat.profiles.lifecycle.MAX_ONE_PROFILE_BYTES", 1):
        smaller = Life(life.store, known=False, at=life.now)
        smaller.restore()
    log.step("restart where profiles of this size are not kept", smaller)


def kinds(log: Log) -> None:
    """Two kinds of traffic whose models err in opposite directions: learned together, imported, and by the operator."""
    life = Life(alpha=0.3)
    a = {"label": "a", "kind": "chat label a"}
    b = {"label": "b", "kind": "chat label b"}
    for n in range(60):
        life.feed(BIASED, LEARNED[2 * n : 2 * n + 1], **a)
        life.feed(OPPOSITE, LEARNED[2 * n + 1 : 2 * n + 2], **b)
    answer = life.propose(helpful(), 1000)
    log.step("two labels whose models err in opposite directions; propose what helps the one", life, answer)
    fed = 0
    for n, key in enumerate(JUDGED):
        if "chat label a" in life.by_kind:
            break
        life.feed(BIASED if n % 2 else OPPOSITE, [key], **(a if n % 2 else b))
        fed += 1
    log.step("judge both until a profile serves the one", life, fed)
    answers = [life.import_profile(helpful(1))]
    log.step("import one", life, answers)
    life.end()
    again = Life(life.store, known=False, at=life.now)
    again.restore()
    again.know()
    log.step("restart", again)
    strong = life.import_profile(contextual())
    life.promote(strong)
    log.step("promote one for all kinds", life)
    weak = life.import_profile(driver.partial(0.5))
    answers = [life.promote(weak, "chat label a"), life.roll_back("chat label b"), life.roll_back("x")]
    log.step("promote one for one kind, and let identity serve the other", life, answers)
    life.pin(weak)
    log.step("pin it for all", life)
    life.unpin()
    log.step("unpin", life)
    fed = life.feed(OPPOSITE, JUDGED[400:900], lambda: "chat label a" not in life.by_kind, **a)
    log.step("the model changes for one kind: judge until its own is rolled back", life, fed)
    for n in range(30):
        life.feed(EVEN, LEARNED[:1], label=f"l{n}", kind=f"chat label l{n}")
    answers = [life.promote(life.import_profile(contextual(0.2 + 0.1 * n)), f"chat label l{n}") for n in range(5)]
    life.saves = [save for save in life.saves if save["write"] != "set_state"]
    log.step("more kinds than are followed, more profiles than may serve; without the states", life, answers)
    life.harm("chat label l0")
    answers = [life.release("chat label l1"), life.release()]
    life.saves = [save for save in life.saves if save["write"] != "set_state"]
    log.step("an outcome of one kind is harmed; without the states", life, answers)
    for kind in ("chat", "code"):
        life.feed(EVEN, LEARNED[:60], kind=kind)
    life.saves = [save for save in life.saves if save["write"] != "set_state"]
    log.step("others take the places of the rarest; without the states", life)
    answers = [life.roll_back()]
    life.saves = [save for save in life.saves if save["write"] != "set_state"]
    log.step("roll back everything; without the states", life, answers)


def bounds(log: Log) -> None:
    """More imports than the line and the store hold."""
    life = Life()
    for seed in range(34):
        life.now += 1.0
        life.import_profile(harmful(seed))
        if seed in {7, 8}:
            log.step(f"import up to {seed}", life)
    life.saves = [save for save in life.saves if save["write"] != "append_event"]
    log.step("import up to 33; without the events", life)


SCENARIOS: tuple[Callable[[Log], None], ...] = (
    evidence,
    unsupported,
    unproven,
    contextual_learner,
    operator,
    kinds,
    bounds,
)


@cache
def _made(scenario: Callable[[Log], None]) -> str:
    log = Log()
    scenario(log)
    return golden.with_named_versions(log.steps)


def made() -> dict[str, str]:
    """Golden files of this module: name -> text."""
    return {_name(scenario): _made(scenario) for scenario in SCENARIOS}


def _name(scenario: Callable[[Log], None]) -> str:
    return f"life_{scenario.__name__}.json"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_life_of_profiles_is_as_recorded(scenario: Callable[[Log], None]) -> None:
    difference = golden.difference(_name(scenario), _made(scenario))
    assert not difference, difference


def test_every_decision_is_in_the_record() -> None:
    """A scenario that no longer reached a decision would compare less than it says."""
    steps = [step for text in made().values() for step in json.loads(text)["steps"]]
    seen = {(event["decision"], event["reason"]) for step in steps for event in step.get("events", ())}
    assert seen == set(driver.every_decision())
