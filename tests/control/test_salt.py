"""The salt is made once, and kept in the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.control import control, settings, told
from tests.support.stores import put, stored

from hemostat.control.stored_state import SALT_BYTES, SALT_KEY
from hemostat.store.protocol import SetState


async def test_restarts_have_the_same_salt_and_relays_get_it_with_their_policy(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/h.db"
    salts = set()
    for _ in range(3):
        async with control(tmp_path, settings(store={"url": url})) as plane:
            salts.add(told(plane).salt)
    [salt] = salts
    assert len(salt) == SALT_BYTES
    assert json.loads(stored(url).states[SALT_KEY])["state"] == {"salt": salt.hex()}


async def test_stores_in_memory_differ(tmp_path: Path) -> None:
    salts = set()
    for _ in range(2):
        async with control(tmp_path) as plane:
            salts.add(plane.stored_state.salt)
    assert len(salts) == 2


@pytest.mark.parametrize("damaged", ["", "zz", "ab", "ab" * 33, json.dumps({"schema": 1, "state": {"salt": "zz"}})])
async def test_a_damaged_salt_is_replaced(damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:///{tmp_path}/h.db"
    put(url, SetState(SALT_KEY, damaged))
    async with control(tmp_path, settings(store={"url": url})) as plane:
        salt = plane.stored_state.salt
    assert len(salt) == SALT_BYTES
    assert json.loads(stored(url).states[SALT_KEY])["state"] == {"salt": salt.hex()}
    assert "conversations count as new" in caplog.text
    assert salt.hex() not in caplog.text
