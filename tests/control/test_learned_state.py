"""Temperature and bias go on over a restart of the control process, from the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.support import control as support
from tests.support.captures import INFO
from tests.support.served_models import pair, served_models
from tests.support.stores import stored

from hemostat.control.composition import Control
from hemostat.control.learned_state import BLOB_KEY
from hemostat.control.model_identity import ModelIdentity


def know_models(control: Control, digest: str = INFO.digest) -> None:
    control.monitor.served = served_models(pair(support.MODEL, info=replace(INFO, digest=digest)))
    control._models_changed()


def learn(control: Control, prompts: range) -> None:
    for prompt in prompts:
        control.pipeline.update(*support.scored(f"r{prompt}", prompt))


async def test_what_was_learned_and_proposed_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:///{tmp_path}/h.db"
    made = support.settings(store={"url": url}, calibration={"mode": "observe", "held_out_fraction": 0.1})
    async with support.control(tmp_path, made) as plane:
        know_models(plane)
        learn(plane, range(100))
        before = plane.profile_manager.proposals.learned()
        assert before[0] >= 40
    assert BLOB_KEY in stored(url).blobs
    async with support.control(tmp_path, made) as plane:
        assert plane.profile_manager.proposals.learned() == (0, 0)
        know_models(plane)
        assert plane.profile_manager.proposals.learned() == before
        know_models(plane)
        learn(plane, range(100, 120))
        assert plane.profile_manager.proposals.learned() > before
    async with support.control(tmp_path, made) as plane:
        know_models(plane, "another")
        assert plane.profile_manager.proposals.learned() == (0, 0)
    assert "temperature and bias are learned anew" in caplog.text
    async with support.control(tmp_path, made) as plane:
        plane.learned.restore(b"damaged")
        know_models(plane, "another")
        assert plane.profile_manager.proposals.learned() == (0, 0)


async def test_what_is_learned_of_other_weights_is_forgotten_without_the_stored_evidence(tmp_path: Path) -> None:
    async with support.control(tmp_path) as plane:
        know_models(plane)
        learn(plane, range(100))
        about = plane.learned.models or ModelIdentity()
        before = plane.profile_manager.proposals.learned()
        for known in (replace(about, weights="old"), about, replace(about, weights="old")):
            plane.learned.set_models(known)
            assert plane.profile_manager.proposals.learned() == before > (0, 0)
        plane.learned.set_models(replace(about, weights="new"))
        assert plane.profile_manager.proposals.learned() == (0, 0)
