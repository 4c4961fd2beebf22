"""The secrets of requests that make the plugin act: who gets them, when they change, and where they are not."""

from __future__ import annotations

import logging
from itertools import count
from pathlib import Path

import pytest
from tests.support.admin_server import admin_client
from tests.support.control import AUTHORIZED, control, settings, status_json, told

from hemostat.engines.messages import RankReport
from hemostat.engines.request_secrets import ROTATE_SECONDS, RequestSecrets
from hemostat_calibration.engine_keys import SECRET_CHARACTERS, is_signed


def test_engines_know_a_secret_before_it_is_used_and_requests_are_signed_with_the_current_one() -> None:
    numbers = count()
    secrets = RequestSecrets(lambda: f"s{next(numbers)}")
    assert secrets.for_engines(1000.0) == ["s0", "s1"]
    assert secrets.for_engines(1000.0 + ROTATE_SECONDS - 1) == ["s0", "s1"]
    assert secrets.for_engines(1000.0 + ROTATE_SECONDS) == ["s1", "s2"]
    assert secrets.current(1000.0 + ROTATE_SECONDS) == "s1"
    assert secrets.current(1000.0 + 10 * ROTATE_SECONDS) == "s2"
    keys = {"hemostat_tap": "n"}
    signed, again = (secrets.signed(keys, 1000.0 + 10 * ROTATE_SECONDS) for _ in range(2))
    assert is_signed(signed, ["s2"])
    assert signed != again, "each has a number of its own"


def test_each_control_process_has_secrets_of_its_own() -> None:
    one, other = RequestSecrets(), RequestSecrets()
    assert len({*one.for_engines(0.0), *other.for_engines(0.0)}) == 4
    assert all(len(secret) == SECRET_CHARACTERS for secret in one.for_engines(0.0))


async def test_relays_and_engines_get_them_and_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = settings(admin={"port": 0, "token": "secret", "engine_token": "engines"})
    now = 1000.0
    async with control(tmp_path, made, clock=lambda: now) as plane:
        secrets = plane.engines.reports.secrets.for_engines(now)
        plane.engines.reports.update(RankReport("one", 0, 1, [], 100, {}, "v1", "0.32.0"), now)
        assert told(plane).secret == secrets[0]
        async with admin_client(plane) as client:
            report = {"boot_id": "b", "rank": 0, "world_size": 1, "versions": [], "vocab_size": 9, "counters": {}}
            answer = await client.post(
                "/api/v1/engine/report", json=report | {"runner": "v1", "vllm": "0.32.0"}, headers=AUTHORIZED
            )
            assert answer.json()["secrets"] == secrets
            pages = [(await client.get(path)).text for path in ("/metrics", "/api/v1/status", "/api/v1/profiles")]
        text = "\n".join([*pages, str(status_json(plane)), caplog.text])
        assert not [secret for secret in secrets if secret in text]
        now += ROTATE_SECONDS
        assert told(plane).secret == secrets[1], "a rotation is a new policy"
