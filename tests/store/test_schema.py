"""A store of an older version is carried over, one of a newer version refused, another model's state not used.

`version_1.sql` is what commit a51c3f1 wrote: 40 scored requests, an alarm, a profile that an operator imported and
promoted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support import control as support
from tests.support.captures import INFO
from tests.support.paths import ROOT
from tests.support.served_models import pair, served_models

from hemostat.commands.setup_check import _store as check_store
from hemostat.control.composition import Control
from hemostat.control.model_identity import same_models
from hemostat.store import schema
from hemostat.store.factory import open_store
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import StoreFailure, StoreIncompatible

SERVED = "bbdbc45d47036c96ffac83156144cbc6"
VERSION_1 = ROOT / "tests" / "store" / "version_1.sql"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a store with what version 1 wrote."""
    file = tmp_path / "h.db"
    with sqlite3.connect(file) as connection:
        connection.executescript(VERSION_1.read_text())
    connection.close()
    return f"sqlite:///{file}"


def know_models(one: Control, *, model: str = support.MODEL, digest: str = INFO.digest) -> None:
    one.monitor.served = served_models(pair(model, info=replace(INFO, digest=digest)))
    one._models_changed()


async def test_version_1_is_carried_over(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = open_store(url)
    spent = {key: old.get_state(key) for key in ("tests.candidate", "tests.serving")}
    tests_of_alarm = json.loads(old.get_state("alarm") or "")["fields"]["tests"]
    assert tests_of_alarm > 0
    made = support.settings(store={"url": url}, calibration={"mode": "auto"})
    with caplog.at_level(logging.WARNING):
        async with support.control(tmp_path, made) as one:
            know_models(one)
            assert one.profile_manager.serving.version is None
            assert [c.version for c in one.profile_manager.trials.queue] == [SERVED]
            assert one.alarms._state.kinds == {}
            assert one.alarms._state.budget_tests == tests_of_alarm
            imported = [event for event in one.profile_manager.events.newest_first() if event["decision"] == "import"]
            assert "served under an older version of the store" in imported[0]["why"]
            assert one.profile_manager.events.newest_first()[-1]["why"] == "imported by the operator"
    assert "the store is of version 1" in caplog.text
    assert SERVED in caplog.text
    store = open_store(url)
    assert store.get_state("schema") == str(schema.SCHEMA)
    assert store.get_state("offered") is None
    assert store.get_profile(SERVED) is not None
    for key, number in spent.items():
        assert int(store.get_state(key) or 0) >= int(number or 0)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        async with support.control(tmp_path, made) as one:
            assert one.alarms._state.budget_tests == tests_of_alarm
    assert "version 1" not in caplog.text


@pytest.mark.parametrize("lost", ["", "{}", "[]", '{"selected": 3}', "\x00"])
def test_damaged_states_of_version_1_end_nothing(lost: str) -> None:
    store = MemoryStore()
    store.set_state("serving", lost)
    store.set_state("alarm", lost)
    schema.migrate(store, store)
    assert (store.get_state("serving"), store.get_state("alarm")) == (None, None)
    assert store.get_state(schema.ALARM_TESTS_KEY) == "0"


class EndingStore(MemoryStore):
    """Fails after a number of writes, as a process that is killed there."""

    left = 0

    def set_state(self, key: str, value: str | None) -> None:
        if not self.left:
            raise StoreFailure("killed")
        self.left -= 1
        super().set_state(key, value)


def test_an_interrupted_migration_is_completed_by_the_next() -> None:
    for writes in range(6):
        store = EndingStore()
        store.left = 100
        store.set_state("serving", json.dumps({"scope": "pooled", "pinned": False, "selected": {"": [SERVED, 7]}}))
        store.set_state("alarm", json.dumps({"fields": {"tests": 5}}))
        store.left = writes
        if writes < 5:
            with pytest.raises(StoreFailure):
                schema.migrate(store, store)
        store.left = 100
        schema.migrate(store, store)
        assert json.loads(store.get_state(schema.OFFERED_KEY) or "")["profiles"] == [[SERVED, ""]]
        assert store.get_state(schema.ALARM_TESTS_KEY) == "5"
        assert (store.get_state("serving"), store.get_state("alarm")) == (None, None)
        assert store.get_state("schema") == str(schema.SCHEMA)


@pytest.mark.parametrize("number", [str(schema.SCHEMA + 1), "99", "x", ""])
async def test_a_newer_store_is_refused_by_name_and_not_changed(number: str, url: str, tmp_path: Path) -> None:
    store = open_store(url)
    store.set_state("schema", number)
    made = support.settings(store={"url": url}, calibration={"mode": "auto"})
    one = Control(made, 1234)
    with pytest.raises(StoreIncompatible, match="install the version that wrote it, or name another store"):
        await one.start(None)
    assert store.get_state("schema") == number
    assert store.get_state("serving") is not None
    found = await check_store(made)
    assert "newer hemostat" in found.detail
    assert "name another store" in found.fix


@pytest.mark.parametrize("other", [{"digest": "another"}, {"model": "another"}])
async def test_what_is_about_other_models_is_not_used(
    other: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = support.settings(
        store={"url": f"sqlite:///{tmp_path}/new.db"}, calibration={"mode": "auto"}, alarm={"budget_nats": 0.5}
    )

    async def life(**models: str) -> tuple[str | None, int, int]:
        async with support.control(tmp_path, made) as one:
            know_models(one, **models)
            if not models and one.profile_manager.serving.version is None:
                one.profile_manager.operator.promote(one.profile_manager.operator.import_profile(support.profile(1)))
                one.pipeline.use_record(*support.scored("r"))
            alarms = one.alarms._state
            await asyncio.sleep(0)
            return one.profile_manager.serving.version, len(alarms.kinds), alarms.budget_tests

    version, kinds, begun = await life()
    assert version is not None
    assert kinds > 0
    assert await life() == (version, kinds, begun)
    with caplog.at_level(logging.WARNING):
        version, kinds, now = await life(**other)
        assert (version, kinds) == (None, 0)
        assert now >= begun
    assert "about other models" in caplog.text
    assert (await life(**other))[0] is None


def test_an_unknown_digest_is_no_difference() -> None:
    known = json.dumps({"model": "m", "vocab_size": 3, "reference": "d"})
    assert same_models(known, known)
    assert same_models(json.dumps({"model": "m", "vocab_size": 3, "reference": ""}), known)
    assert not same_models(known, json.dumps({"model": "m", "vocab_size": 4, "reference": "d"}))
    assert not same_models("damaged", known)
