"""A compressed checkpoint that is replaced under the same path: what is known of the old one does not count for it."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support import control as support
from tests.support.captures import INFO
from tests.support.samples import histograms, values
from tests.support.served_models import pair, served_models
from tests.support.stores import put, stored

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.control.stored_state import MODELS_KEY
from hemostat.engines.messages import RankReport
from hemostat.engines.reports import SILENCE_SECONDS
from hemostat.store.protocol import SetState


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return support.settings(
        store={"url": f"sqlite:///{tmp_path}/h.db"},
        calibration={"mode": "auto", "held_out_fraction": 0.1},
        alarm={"budget_nats": 0.5},
    )


class Now:
    value = 1000.0

    def __call__(self) -> float:
        return self.value


class Life:
    """One control process, on a clock of its own. Its model is known before any engine reports, as at a real start."""

    def __init__(self, control: Control, clock: Now) -> None:
        self.one = control
        self.clock = clock
        control.monitor.served = served_models(pair(support.MODEL, info=INFO))
        control.monitor.on_change()

    def reports(self, **engines: str) -> None:
        """By boot id, the weights that each live engine reports; others have been silent for long enough."""
        self.clock.value += SILENCE_SECONDS + 1.0
        for boot, weights in engines.items():
            self.one.engines.reports.update(
                RankReport(boot, 0, 1, [], 30, {}, "v1", "0", model=support.MODEL, weights=weights), self.clock.value
            )
        self.one.do_periodic()

    def use(self, prompts: range) -> None:
        for prompt in prompts:
            self.one.pipeline.update(*support.scored(f"r{prompt}", prompt))

    @property
    def known(self) -> tuple[bool, bool]:
        """A profile serves, the alarm has evidence."""
        serving = self.one.profile_manager.serving
        return serving.version is not None, bool(self.one.measured.alarms.report()["kinds"])


@asynccontextmanager
async def life(folder: Path, made: Settings) -> AsyncIterator[Life]:
    now = Now()
    async with support.control(folder, made, clock=now) as plane:
        yield Life(plane, now)


async def first_life(folder: Path, made: Settings, **engines: str) -> None:
    async with life(folder, made) as first:
        first.reports(**engines)
        operator = first.one.profile_manager.operator
        operator.promote(operator.import_profile(support.profile(1)))
        first.use(range(40))
        assert first.known == KNOWN


KNOWN, NOTHING = (True, True), (False, False)


async def test_while_it_runs(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await first_life(tmp_path, settings, a="old")
    async with life(tmp_path, settings) as plane:
        plane.reports(a="old")
        assert plane.known == KNOWN
        plane.reports(a="old", b="new")
        assert plane.known == KNOWN, "a rolling update has begun"
        plane.reports(old_plugin="")
        plane.reports()
        assert plane.known == KNOWN, "nothing is known of what serves"
        with caplog.at_level(logging.WARNING):
            plane.reports(b="new")
        assert plane.known == NOTHING
        assert "the stored evidence is about other models" in caplog.text
        plane.use(range(40, 80))
        plane.reports(b="new", c="new")
        assert plane.known == (False, True)


async def test_while_it_did_not_run(settings: Settings, tmp_path: Path) -> None:
    """What is stored is read before any engine reports, and the weights that it is about are not forgotten over lives
    in which none does."""
    await first_life(tmp_path, settings, a="old")
    for _ in range(2):
        async with life(tmp_path, settings) as plane:
            assert plane.known == KNOWN
            plane.use(range(100, 120))
    async with life(tmp_path, settings) as plane:
        plane.reports(a="old")
        assert plane.known == KNOWN
    async with life(tmp_path, settings) as plane:
        plane.reports(b="new")
        assert plane.known == NOTHING
    async with life(tmp_path, settings) as plane:
        assert plane.known == NOTHING


async def test_what_was_stored_before_weights_were_known_is_used(settings: Settings, tmp_path: Path) -> None:
    """By an older version of Hemostat, or with engines without the plugin."""
    await first_life(tmp_path, settings)
    models = json.loads(stored(settings.store.url).states[MODELS_KEY])["state"]
    assert models["weights"] == ""
    async with life(tmp_path, settings) as plane:
        plane.reports(a="x")
        assert plane.known == KNOWN
    assert json.loads(stored(settings.store.url).states[MODELS_KEY])["state"]["weights"] == "x"


@pytest.mark.parametrize("damaged", ["", "[]", '{"vocab_size": "30"}'])
async def test_evidence_about_unreadable_models_is_forgotten(settings: Settings, tmp_path: Path, damaged: str) -> None:
    await first_life(tmp_path, settings)
    put(settings.store.url, SetState(MODELS_KEY, damaged))
    async with life(tmp_path, settings) as plane:
        plane.reports(a="x")
        assert plane.known == NOTHING


async def test_copies_at_two_engines_are_one_checkpoint(settings: Settings, tmp_path: Path) -> None:
    await first_life(tmp_path, settings, a="same", b="same")
    async with life(tmp_path, settings) as plane:
        plane.reports(c="same", d="same")
        assert plane.known == KNOWN


OLD, NOISY, OTHER = (-1.0, -2.0, -3.0), (-1.02, -1.99, -3.0), (-1.4, -2.5, -2.0)


def refers_to(plane: Life, probe: tuple[float, ...]) -> None:
    """The reference is matched, and gives fixed texts these log-probabilities."""
    plane.one.monitor.served = served_models(pair(support.MODEL, info=replace(INFO, probe=probe)))
    plane.one.monitor.on_change()


def reasons(plane: Life) -> list[str]:
    return [event["why"] for event in plane.one.measured.alarms.events]


async def test_a_reference_with_other_weights_under_the_same_name(settings: Settings, tmp_path: Path) -> None:
    """Its probe changes, and nothing else does."""
    await first_life(tmp_path, settings, a="old")
    async with life(tmp_path, settings) as plane:
        refers_to(plane, OLD)
        assert plane.known == KNOWN, "what was stored before there were probes is used"
        refers_to(plane, NOISY)
        assert plane.known == KNOWN, "the noise of a server"
        assert not reasons(plane)
        refers_to(plane, OTHER)
        assert plane.known == NOTHING
        assert [why for why in reasons(plane) if "the reference has loaded other weights" in why]


async def test_a_reference_that_was_replaced_while_it_did_not_run(settings: Settings, tmp_path: Path) -> None:
    await first_life(tmp_path, settings, a="old")
    async with life(tmp_path, settings) as plane:
        refers_to(plane, OLD)
    async with life(tmp_path, settings) as plane:
        refers_to(plane, NOISY)
        assert plane.known == KNOWN
    async with life(tmp_path, settings) as plane:
        refers_to(plane, OTHER)
        assert plane.known == NOTHING


def figures(plane: Life) -> tuple[int, int, int, int]:
    """Returns the requests of the headline figures, of the kinds, of the positions, and of the texts."""
    status = support.status_json(plane.one)
    return (
        status["raw"]["requests"],
        sum(kind["requests"] for kind in status["kinds"]),
        sum(place["requests"] for place in status["places"]["position"]),
        status["trajectory"].get("total_variation", {}).get("requests", 0),
    )


def counters(plane: Life) -> dict[tuple[str, ...], float]:
    """The counters of what was scored, and the numbers of tokens in histograms, as Prometheus sees them."""
    samples = list(plane.one.measured.measurements.samples())
    found = {key: value for key, value in values(samples).items() if key[0].endswith("_total")}
    return found | {key: float(sum(sample.counts)) for key, sample in histograms(samples).items()}


@pytest.mark.parametrize("changed", ["reference", "compressed"])
async def test_the_headline_figures_begin_anew(settings: Settings, tmp_path: Path, changed: str) -> None:
    """They would be means over two pairs of models, and describe neither. Counters go on: one that goes back is a
    restart for Prometheus."""
    async with life(tmp_path, settings) as plane:
        refers_to(plane, OLD)
        plane.reports(a="old")
        plane.use(range(40))
        assert figures(plane)[:2] == (40, 40)
        assert all(figures(plane))
        before = counters(plane)
        if changed == "reference":
            refers_to(plane, OTHER)
        else:
            plane.reports(b="new")
        assert figures(plane) == (0, 0, 0, 0)
        assert counters(plane) == before
        plane.use(range(40, 50))
        assert figures(plane)[:2] == (10, 10)


async def test_the_figures_of_another_model_begin_anew_by_themselves(settings: Settings, tmp_path: Path) -> None:
    def refer(plane: Life, probe: tuple[float, ...]) -> None:
        other = pair("other", info=replace(INFO, probe=probe))
        plane.one.monitor.served = served_models(pair(support.MODEL, info=replace(INFO, probe=OLD)), other)
        plane.one.monitor.on_change()

    def requests(plane: Life) -> tuple[int, int]:
        others = plane.one.pipeline.users.other_models.report("other")
        return figures(plane)[0], others["raw"]["requests"]

    async with life(tmp_path, settings) as plane:
        refer(plane, OLD)
        plane.use(range(20))
        for prompt in range(20):
            plane.one.pipeline.update(*support.scored(f"o{prompt}", prompt, model="other"))
        assert requests(plane) == (20, 20)
        refer(plane, NOISY)
        assert requests(plane) == (20, 20), "the noise of a server"
        refer(plane, OTHER)
        assert requests(plane) == (20, 0)
