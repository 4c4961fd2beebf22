"""A store that an earlier version has written with schema 1: all of it is taken along.

`schema_1.json` has the states that the last version with that schema has stored: "rest" and two other kinds are
followed, the operator has promoted a profile and set the mode to `observe`, and 30 conversations were counted.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from tests.support import postgres
from tests.support.control import control, settings
from tests.support.profile_bench import Bench, helpful
from tests.support.stores import KEPT, put, stored

from hemostat.control.ownership import Ownership
from hemostat.control.stored_state import MODELS_KEY, SALT_KEY
from hemostat.engines.registry import STATE_KEY as DRAINED_KEY
from hemostat.ipc.messages import REST_KIND
from hemostat.measurement.outcomes import STATE_KEY as OUTCOMES_KEY
from hemostat.profiles.persistence import MODE_KEY, PROPOSED_KEY, SERVING_KEY, stored_proposed
from hemostat.store.errors import StoreErrorLog
from hemostat.store.factory import open_store
from hemostat.store.protocol import SCHEMA, PutProfile, SetState, StateKey, StoredProfile
from hemostat.store.schema_1 import upgraded

EARLIER = {
    StateKey(key): text for key, text in json.loads(Path(__file__).with_name("schema_1.json").read_text()).items()
}
CHANGED = {SERVING_KEY, MODE_KEY, PROPOSED_KEY, DRAINED_KEY, MODELS_KEY, SALT_KEY, OUTCOMES_KEY}


@pytest.fixture(params=KEPT)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a store with schema 1."""
    profile = helpful()
    writes = [SetState(key, text) for key, text in EARLIER.items()]
    kept = PutProfile(StoredProfile(profile.version, profile.to_bytes(), 0.0))
    if request.param == "postgres":
        server = postgres.shared()
        database = server.new_database()
        url = server.url(database)
        put(url, kept, *writes)
        server.execute("UPDATE hemostat_head SET schema = 1", database)
        return url
    url = f"sqlite:///{tmp_path}/h.db"
    put(url, kept, *writes)
    with sqlite3.connect(tmp_path / "h.db") as connection:
        connection.execute("UPDATE head SET schema = 1")
    connection.close()
    return url


async def test_the_first_commit_upgrades_the_whole_store(url: str) -> None:
    before = stored(url)
    assert (before.head.schema, before.states) == (1, EARLIER), "reading changes nothing"
    store = open_store(url)
    ownership = Ownership(store, StoreErrorLog())
    read = await ownership.begin()
    ownership.activate()
    await ownership.writer.write()
    await ownership.close()
    after = stored(url)
    assert after.head.schema == SCHEMA
    assert after.states == read.states
    assert {key for key, text in after.states.items() if EARLIER[key] != text} == CHANGED
    assert all(json.loads(after.states[key])["schema"] == 1 for key in CHANGED)


async def test_a_control_process_goes_on_from_it(url: str, tmp_path: Path) -> None:
    for _ in range(2):
        async with control(
            tmp_path, settings(store={"url": url}, calibration={"mode": "auto", "control_fraction": 0.5})
        ) as plane:
            assert plane.stored_state.salt == bytes(range(32))
            assert plane.engines.drained == {"127.0.0.1:8001"}
            assert plane.stored_state.models.model == "m"
            assert plane.profile_manager.serving.mode == "observe"
            assert set(plane.profile_manager.kinds.table.followed) == {"often", "rare"}
            [trial] = plane.measured.outcomes.report()["kinds"]
            assert (trial["trial"], trial["version"], trial["units"]) == (1, "v1", 30)
            assert [event for event in plane.measured.alarms.events if "cannot be read" in event["why"]] == []
            await plane.writer.write()
    assert stored_proposed(stored(url).states) == {"contextual": 40_000, "adapter": 10_000}


def test_what_served_serves_on() -> None:
    states = EARLIER | upgraded(EARLIER, {})
    bench = Bench(known=False)
    bench.store.put_profile(StoredProfile(helpful().version, helpful().to_bytes(), 0.0))
    for key, text in states.items():
        bench.store.set_state(key, text)
    again = bench.restart(crash=True)
    assert again.profiles.serving.selected_by_kind[REST_KIND] == helpful().version


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null", "3", '"zz"'])
def test_what_is_damaged_is_left_for_its_owner_to_report(damaged: str) -> None:
    changed = upgraded(dict.fromkeys(CHANGED, damaged), {})
    assert changed.keys() <= CHANGED


@pytest.mark.parametrize("key", sorted(CHANGED))
async def test_what_cannot_be_read_begins_anew_with_one_line(
    key: StateKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"sqlite:///{tmp_path}/h.db"
    newer = json.dumps({"schema": 99, "state": {}})
    put(url, SetState(key, newer))
    async with control(tmp_path, settings(store={"url": url})) as plane:
        assert plane.ownership.active
        await plane.writer.write()
    lines = caplog.messages if key in {MODE_KEY, PROPOSED_KEY} else [event["why"] for event in stored(url).events]
    [line] = [line for line in lines if f"what is stored as {key} cannot be read, and begins anew" in line]
    assert "schema 99" in line
