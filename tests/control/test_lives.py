"""A control process is killed at every stage of a profile's life: its successor, which has the store alone, goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.support.adapter_bench import Judging
from tests.support.adapters import adapter
from tests.support.control import control, settings
from tests.support.profile_bench import FRACTION, MODEL, Bench, contextual, helpful
from tests.support.world import V

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.decisions import Reason
from hemostat.profiles.manager import ProfileManager
from hemostat_calibration.profiles.profile import CalibrationProfile

GREEDY = "chat text greedy"
SHARE = 0.7
"""Of the way to the reference that an adapter takes."""


def at(folder: Path) -> Settings:
    calibration = {"mode": "auto", "held_out_fraction": FRACTION, "clamp_nats": 1.0}
    store = {"url": f"sqlite:///{folder / 'store.db'}"}
    return settings(calibration=calibration, store=store, adapter={"enabled": True})


def shown(profiles: ProfileManager) -> dict[str, Any]:
    """All that a restart keeps."""
    trials, serving = profiles.trials, profiles.serving
    return {
        "mode": serving.mode,
        "serves": serving.version_by_kind,
        "kinds": {name: asdict(state) for name, state in serving.kinds.items()},
        "queue": trials.queue,
        "tests": {candidate: dict(trials.evidence_by_kind(candidate)) for candidate in trials.queue},
        "windows": {name: trials.serving_evidence(name) for name in serving.kinds},
        "begun": (trials.tests_begun, dict(trials.guard.windows)),
        "events": profiles.events.newest_first(),
    }


class Life:
    """What happens to a profile in the world of `Judging`, in a control process that is killed after each step."""

    def __init__(self, plane: Control, profile: CalibrationProfile) -> None:
        self.profiles, self.version = plane.profile_manager, profile.version
        bench = Bench()
        bench.profiles = self.profiles
        self._judging = Judging({profile.version: SHARE}, bench)
        self._profile = profile

    def feed(self, units: int) -> None:
        """At most so many of each kind, until what serves changes."""
        for kind in (REST_KIND, GREEDY):
            self._judging.feed(units, kind=kind)

    def serves(self) -> bool:
        return set(self.profiles.serving.version_by_kind.values()) == {self.version}

    def watched(self) -> list[Any]:
        return [watch for kind in self.profiles.serving.kinds if (watch := self.profiles.trials.serving_evidence(kind))]

    # --- the stages, in their order --------------------------------------------------------------------------------

    def under_test(self) -> None:
        self.feed(1)
        self.profiles.operator.import_profile(self._profile)
        self.feed(4)
        (candidate,) = self.profiles.trials.queue
        assert all(evidence.units for evidence in self.profiles.trials.evidence_by_kind(candidate).values())
        assert not self.serves()

    def promoted_on_evidence(self) -> None:
        self.feed(400)
        assert self.profiles.events.newest_first()[0]["reason"] == Reason.EVIDENCE
        assert set(self.profiles.serving.version_by_kind) == {REST_KIND, GREEDY}

    def in_its_window(self) -> None:
        self.feed(5)
        assert any(0 < watch.units < watch.window for watch in self.watched())

    def proven_again(self) -> None:
        for _ in range(100):
            if any(watch.supported for watch in self.watched()):
                return
            self.feed(5)
        raise AssertionError(self.watched())

    def pinned(self) -> None:
        self.profiles.operator.pin(self.version)

    def unpinned(self) -> None:
        self.profiles.operator.unpin(GREEDY)
        assert self.profiles.serving.fixed == {REST_KIND}

    def off(self) -> None:
        self.profiles.operator.set_mode("off")

    def on(self) -> None:
        self.profiles.operator.set_mode("auto")
        assert self.serves()

    def rolled_back(self) -> None:
        self.profiles.operator.roll_back("a test")
        assert self.profiles.serving.version is None

    def promoted_by_the_operator(self) -> None:
        self.profiles.serving.max_adapters = 1
        self.profiles.operator.promote(self.version)
        assert all(state.chosen for state in self.profiles.serving.kinds.values())

    def held(self) -> None:
        self.profiles.lifecycle.roll_back(GREEDY, Reason.OUTCOMES, "people regenerate more answers", {})
        assert self.profiles.serving.held == {GREEDY}

    def released(self) -> None:
        self.profiles.operator.release(GREEDY)

    @property
    def stages(self) -> list[Callable[[], None]]:
        return [
            self.under_test,
            self.promoted_on_evidence,
            self.in_its_window,
            self.proven_again,
            self.pinned,
            self.unpinned,
            self.off,
            self.on,
            self.rolled_back,
            self.promoted_by_the_operator,
            self.held,
            self.released,
        ]


@pytest.mark.parametrize(
    "profile", [helpful(), contextual(), adapter(1)], ids=["temperature_bias", "contextual", "adapter"]
)
async def test_killed_at_every_stage_of_a_life_the_successor_continues(
    tmp_path: Path, profile: CalibrationProfile
) -> None:
    async with control(tmp_path, at(tmp_path), loops=True) as plane:
        plane.profile_manager.set_model_pair(MODEL, V)
        plane.profile_manager.serving.max_adapters = 1  # the engine has a slot
        life = Life(plane, profile)
        for number, stage in enumerate(life.stages):
            stage()
            life.profiles.writer.save()
            expected = shown(life.profiles)
            life.feed(2)  # records since the last save are lost; none of them decides
            assert await plane.writer.wait_until_written(60.0)
            folder = tmp_path / f"{number}"  # short: the path of a socket is limited
            folder.mkdir()
            shutil.copy(tmp_path / "store.db", folder)
            async with control(folder, at(folder)) as successor:
                successor.profile_manager.set_model_pair(MODEL, V)
                result = shown(successor.profile_manager)
                assert result == expected, stage.__name__
