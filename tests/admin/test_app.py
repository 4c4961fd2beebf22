"""The admin port in front of a real `Control`: who may do what, and what it says when not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.admin_server import admin_client
from tests.support.control import (
    AUTHORIZED,
    TOKEN,
    connect_relay,
    control,
    profile,
    relay_stats,
    scored,
    set_gate,
    settings,
)

from hemostat.admin import access
from hemostat.admin import app as admin
from hemostat.admin.access import Tokens
from hemostat.admin.hardening import HEADERS
from hemostat.control.composition import Control
from hemostat.ipc.messages import REST_KIND, Policy
from hemostat.store.protocol import NotKeptError

GUARDED = [
    ("POST", "/api/v1/calibration"),
    ("POST", "/api/v1/profiles"),
    ("POST", "/api/v1/profiles/rollback"),
    ("POST", "/api/v1/profiles/promote"),
    ("POST", "/api/v1/profiles/pin"),
    ("POST", "/api/v1/profiles/release"),
    ("POST", "/api/v1/alarm/rebase"),
    ("POST", "/api/v1/canaries/accept"),
    ("POST", "/api/v1/gate"),
    ("DELETE", "/api/v1/gate"),
    ("POST", "/api/v1/engines/drain"),
    ("POST", "/api/v1/engines/undrain"),
    ("POST", "/api/v1/engines/trace"),
]
ENGINES = [("POST", f"/api/v1/engine/{name}") for name in ("report", "answers", "tap")]


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Control]:
    async with control(tmp_path) as made:
        yield made


@pytest.fixture
async def client(plane: Control) -> AsyncIterator[httpx.AsyncClient]:
    async with admin_client(plane) as made:
        yield made


def detail(response: httpx.Response) -> str:
    said = response.json()["detail"]
    assert isinstance(said, str)
    return said


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_what_changes_state_needs_the_token(plane: Control, method: str, path: str) -> None:
    async with admin_client(plane) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
            sent = {name: value.encode() for name, value in headers.items()}
            response = await client.request(method, path, headers=sent, content=b'{"mode":"off"}')  # type: ignore[arg-type]
            assert response.status_code == 401, headers
            assert "admin.token" in detail(response)
        assert (await client.request(method, path, headers=AUTHORIZED)).status_code not in {401, 403}
    async with admin_client(plane, Tokens()) as client:
        response = await client.request(method, path, headers=AUTHORIZED)
        assert response.status_code == 403
        assert "HEMOSTAT_ADMIN__TOKEN" in detail(response)
    assert plane.profile_manager.serving.mode == "observe", "nothing was changed"


async def test_the_token_is_compared_in_constant_time(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    await client.post("/api/v1/profiles/rollback", headers={"Authorization": "Bearer x"})
    assert compared == [(b"x", TOKEN.encode())]


@pytest.mark.parametrize(("method", "path"), [g for g in (*GUARDED, *ENGINES) if "rollback" not in g[1]])
async def test_bodies_are_bounded_and_unread_without_the_token(
    plane: Control, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    monkeypatch.setattr(admin, "MAX_PROFILE_BYTES", 100_000)
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(400):
            read += 100_000
            yield b" " * 100_000

    async with admin_client(plane) as client:
        assert (await client.request(method, path, content=endless())).status_code == 401
        unread, read = read, 0
        response = await client.request(method, path, content=endless(), headers=AUTHORIZED)
    assert unread == 0
    assert response.status_code == 413
    assert "bytes" in detail(response)
    assert read < 20_000_000


async def test_the_mode_is_switched_at_once_and_relays_are_informed(plane: Control, client: httpx.AsyncClient) -> None:
    plane.profile_manager.set_model_pair("m", 30)
    version = plane.profile_manager.operator.import_profile(profile())
    plane.profile_manager.operator.promote(version)
    told: list[Policy] = []
    plane.link.set_policy = told.append  # type: ignore[method-assign]
    for mode, serving in (("auto", version), ("off", None), ("observe", None)):
        response = await client.post("/api/v1/calibration", headers=AUTHORIZED, json={"mode": mode})
        assert response.json() == {"mode": mode}
        assert (told[-1].mode, told[-1].serving_by_kind.get(REST_KIND)) == (mode, serving)
        assert (await client.get("/api/v1/status")).json()["profile"]["mode"] == mode
    assert [policy.generation for policy in told] == [1, 2, 3]


@pytest.mark.parametrize("body", [b"", b"off", b'{"mode": "on"}', b'{"mode": "off", "x": 1}', b"[]", b'{"mode": null}'])
async def test_a_mode_that_there_is_not(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/api/v1/calibration", headers=AUTHORIZED, content=body)
    assert response.status_code == 422
    assert '"off"' in detail(response)


async def test_a_profile_is_imported_shown_fetched_and_taken_back(plane: Control, client: httpx.AsyncClient) -> None:
    plane.profile_manager.set_model_pair("m", 30)
    given = profile()
    response = await client.post("/api/v1/profiles", headers=AUTHORIZED, content=given.to_bytes())
    version = response.json()["version"]
    assert version == given.version
    shown = (await client.get(f"/api/v1/profiles/{version}")).json()
    assert (shown["state"], shown["family"], shown["vocab_size"]) == ("candidate", "temperature_bias", 30)
    assert [event["decision"] for event in shown["evidence"]] == ["import"]
    fetched = await client.get(f"/api/v1/engine/profiles/{version}", headers=AUTHORIZED)
    assert fetched.content == given.to_bytes()
    held = {"boot_id": "b", "rank": 0, "world_size": 1, "versions": [], "vocab_size": 30}
    report = held | {"counters": {}, "runner": "v1", "vllm": "0"}
    plane.policy.publish()
    answer = await client.post("/api/v1/engine/report", headers=AUTHORIZED, json=report)
    told = answer.json()
    assert len(told.pop("secrets")) == 2, "the present one and the next one"
    assert told == {"hold": [version], "nonce_prefix": plane.engines.reports.nonce_prefix}

    nothing = await client.post("/api/v1/profiles/rollback", headers=AUTHORIZED)
    assert nothing.status_code == 400
    assert "identity serves" in detail(nothing)
    plane.profile_manager.operator.promote(version)
    listing = (await client.post("/api/v1/profiles/rollback", headers=AUTHORIZED)).json()
    assert listing["serving"] == "identity"
    assert listing["events"][0]["decision"] == "roll_back"
    assert plane.profile_manager.serving.selected is None


async def test_the_operators_word_goes_before_the_guards(plane: Control, client: httpx.AsyncClient) -> None:
    plane.profile_manager.set_model_pair("m", 30)
    plane.profile_manager.operator.set_mode("auto")
    version, other = (
        plane.profile_manager.operator.import_profile(profile()),
        plane.profile_manager.operator.import_profile(profile(1)),
    )
    told: list[Policy] = []
    plane.link.set_policy = told.append  # type: ignore[method-assign]

    async def post(action: str, **body: Any) -> httpx.Response:
        return await client.post(f"/api/v1/profiles/{action}", headers=AUTHORIZED, json=body)

    listing = (await post("promote", version=version)).json()
    assert (listing["serving"], listing["events"][0]["reason"]) == (version, "operator")
    assert told[-1].serving_by_kind.get(REST_KIND) == version
    listing = (await post("pin", version=other)).json()
    assert (listing["serving"], listing["pinned"], listing["events"][0]["decision"]) == (other, True, "pin")
    assert told[-1].serving_by_kind.get(REST_KIND) == other
    refused = await post("promote", version=version)
    assert (refused.status_code, "unpin" in detail(refused)) == (400, True)
    listing = (await post("pin", version=None)).json()
    assert (listing["serving"], listing["pinned"]) == (other, False)
    assert (await post("promote", version=version[:8])).json()["serving"] == version, "8 digits are enough"
    assert (await post("pin", version=other[:8])).json()["serving"] == other
    assert (await post("pin", version=None)).json()["pinned"] is False
    assert (await client.get(f"/api/v1/profiles/{version[:8]}")).json()["version"] == version
    for body, code in (
        ({"version": "latest"}, 422),
        ({"version": version[:7]}, 422),
        ({"version": "0" * 33}, 422),
        ({"version": "0" * 32 + "\n"}, 422),
        ({}, 422),
        ({"version": "0" * 32}, 400),
        ({"version": version, "kind": "batch"}, 400),
        ({"version": version, "why": "x"}, 422),
    ):
        refused = await post("promote", **body)
        assert refused.status_code == code, body
        assert detail(refused)
    refused = await post("rollback", kind="batch")
    assert (refused.status_code, "no kind 'batch' is followed" in detail(refused)) == (400, True)
    refused = await post("release")
    assert (refused.status_code, "nothing is held" in detail(refused)) == (400, True)
    assert (await post("rollback")).json()["serving"] == "identity"
    assert told[-1].serving_by_kind.get(REST_KIND) is None


async def test_digits_that_several_versions_begin_with_name_none(plane: Control, client: httpx.AsyncClient) -> None:
    plane.profile_manager.set_model_pair("m", 30)
    held = [plane.profile_manager.operator.import_profile(profile(seed)) for seed in range(2)]
    plane.profile_manager.catalogue._profiles[held[0][:8] + "0" * 24] = plane.profile_manager.catalogue[held[1]]
    refused = await client.get(f"/api/v1/profiles/{held[0][:8]}")
    assert refused.status_code == 400
    assert f"several versions begin with {held[0][:8]}: {held[0]}" in detail(refused)
    assert (await client.get(f"/api/v1/profiles/{held[0]}")).json()["version"] == held[0]


async def test_a_mode_that_was_not_kept_is_an_error_that_says_that_it_applies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control(tmp_path, settings()) as plane, admin_client(plane) as client:
        kept = True

        async def set_mode(mode: str) -> None:
            if not kept:
                raise NotKeptError("this applies now, but the store could not keep it")

        monkeypatch.setattr(plane.actions, "set_mode", set_mode)
        off = {"headers": AUTHORIZED, "json": {"mode": "off"}}
        response = await client.post("/api/v1/calibration", **off)
        assert (response.status_code, response.json()) == (200, {"mode": "off"})
        kept = False
        response = await client.post("/api/v1/calibration", **off)
        assert response.status_code == 507
        assert detail(response).startswith("this applies now, but the store could not keep it")


async def test_profiles_that_are_none(plane: Control, client: httpx.AsyncClient) -> None:
    plane.profile_manager.set_model_pair("m", 30)
    for body, said in ((b"", "profile"), (b"junk" * 100, "profile"), (profile(vocabulary=31).to_bytes(), "31 ids")):
        response = await client.post("/api/v1/profiles", headers=AUTHORIZED, content=body)
        assert response.status_code == 400
        assert said in detail(response)
    assert plane.profile_manager.report.listing()["profiles"] == []


@pytest.mark.parametrize("name", ["a" * 32, "A" * 32, "latest", "..%2f..%2fetc", "a" * 33])
async def test_names_that_are_no_version(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.get(f"/api/v1/profiles/{name}")).status_code == 404
    assert (await client.get(f"/api/v1/engine/profiles/{name}", headers=AUTHORIZED)).status_code == 404


async def test_health_depends_on_relays_only(plane: Control, client: httpx.AsyncClient, tmp_path: Path) -> None:
    assert (await client.get("/livez")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503
    writer = await connect_relay(plane, tmp_path, 1, relay_stats())
    assert plane.monitor.state == "none"
    assert (await client.get("/readyz")).status_code == 200
    draining = await connect_relay(plane, tmp_path, 2, relay_stats(ready=False))
    assert (await client.get("/readyz")).status_code == 200, "one still takes requests"
    writer.close()
    draining.close()


async def test_security_headers_are_on_everything(client: httpx.AsyncClient) -> None:
    for path in ("/", "/runbook", "/console.js", "/metrics", "/livez", "/readyz", "/api/v1/status", "/nothing"):
        response = await client.get(path)
        for name, value in HEADERS.items():
            assert response.headers[name] == value, path
    assert "no-store" in HEADERS["cache-control"]


async def test_metrics_are_metrics(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "hemostat_requests" in {family.name for family in text_string_to_metric_families(response.text)}


async def test_status_has_the_reports_shape_and_is_json(plane: Control, client: httpx.AsyncClient) -> None:
    def figures(status: dict[str, Any]) -> set[str]:
        return {name for name in status["raw"] if name in status["calibrated"]}

    wanted = {"kl_nats", "total_variation", "top1_agreement", "covered_mass", "ci95"}
    for n in range(3):
        status = json.loads((await client.get("/api/v1/status")).text, parse_constant=pytest.fail)
        assert {"sent", "ok", "failed"}.isdisjoint(status["requests"])
        assert status["requests"].keys() == {"shadowed", "scored", "skipped", "dropped", "pending"}
        assert wanted <= figures(status)
        assert status["profile"] == {"version": "identity", "family": "identity", "mode": "observe"}
        assert status["calibrated"] == status["raw"]
        plane.pipeline.update(*scored(str(n), prompt=n))
    assert status["tokens_scored"] == 6


async def test_a_gate_is_begun_shown_asked_by_webhooks_and_ended(tmp_path: Path) -> None:
    made = settings(reference={"backend": "vllm", "url": "http://127.0.0.1:1"})
    async with control(tmp_path, made) as plane, admin_client(plane) as client:
        assert (await client.get("/api/v1/gate")).json()["state"] == "none"
        for body in ({}, {"candidate": "http://127.0.0.1:1", "expect": "better"}, {"candidate": "x", "expect": "same"}):
            answer = await client.post("/api/v1/gate", headers=AUTHORIZED, json=body)
            assert answer.status_code in (400, 422), answer.text
        body = {"candidate": "http://127.0.0.1:1", "expect": "other", "margin": 0.1, "waive_cycles": True}
        answer = await client.post("/api/v1/gate", headers=AUTHORIZED, json=body)
        assert (answer.status_code, answer.json()["state"]) == (200, "running")
        shown = (await client.get("/api/v1/gate")).json()
        assert (shown["candidate"], shown["expect"]) == ("http://127.0.0.1:1", "other")
        assert shown["waived"]
        flagger = {"name": "podinfo", "namespace": "test", "phase": "Progressing", "metadata": {}}
        for state, confirmed, rolled_back in (("running", 409, 409), ("pass", 200, 409), ("fail", 409, 200)):
            set_gate(plane, state)
            for name, code in (("confirm-promotion", confirmed), ("rollback", rolled_back)):
                answer = await client.post(f"/api/v1/gate/{name}", json=flagger)
                assert (answer.status_code, answer.text.partition(":")[0].strip()) == (code, state)
                assert answer.text.count("\n") == 1
        text = (await client.get("/metrics")).text
        assert 'hemostat_gate_state{state="fail"} 1.0' in text
        ended = await client.delete("/api/v1/gate", headers=AUTHORIZED)
        assert ended.json()["state"] == "none"
        assert (await client.delete("/api/v1/gate", headers=AUTHORIZED)).status_code == 400
        assert (await client.get("/api/v1/status")).json()["gate"]["state"] == "none"


async def test_an_operator_accepts_what_the_canaries_find(tmp_path: Path) -> None:
    async with control(tmp_path) as plane, admin_client(plane) as client:
        answer = await client.post("/api/v1/canaries/accept", headers=AUTHORIZED)
        assert (answer.status_code, answer.json()["set"]) == (200, None)  # one is taken anew
        assert plane.store.read().events[0]["why"] == "a new set of canaries is taken: accepted by the operator"
        plane.canaries.problem = "canaries.enabled is false"
        answer = await client.post("/api/v1/canaries/accept", headers=AUTHORIZED)
        assert (answer.status_code, detail(answer)) == (400, "there are no canaries: canaries.enabled is false")
