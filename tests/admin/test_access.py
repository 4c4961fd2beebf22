"""Who may request which route: each of them without a token, with the engines' and with the operator's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from tests.support.admin_server import admin_client
from tests.support.control import TOKEN, control, settings

from hemostat.admin.access import ACCESS, Access, Tokens
from hemostat.admin.app import create_app
from hemostat.control.composition import Control

ENGINE_TOKEN = "of-engines"
BOTH = Tokens(TOKEN, ENGINE_TOKEN)
WITH = {"no": {}, "engine": {"Authorization": f"Bearer {ENGINE_TOKEN}"}, "admin": {"Authorization": f"Bearer {TOKEN}"}}
REFUSED = {401, 403}
STREAM = ("GET", "/api/v1/stream")
"""It does not end; what may be requested without a token is tried elsewhere."""


WEBHOOKS = {("POST", "/api/v1/gate/confirm-promotion"), ("POST", "/api/v1/gate/rollback")}
"""They only read; a canary controller calls them without a token."""


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Control]:
    async with control(tmp_path) as made:
        yield made


def test_every_route_is_in_the_table_and_the_table_has_no_other(plane: Control) -> None:
    routes = create_app(plane, BOTH, lambda: 0.0).routes
    assert {(method, route.path) for route in routes for method in route.methods} == set(ACCESS)  # type: ignore[attr-defined]
    changing = {(method, path) for method, path in ACCESS if method != "GET"}
    assert {route for route in changing if ACCESS[route] not in {Access.ADMIN, Access.ENGINE}} == WEBHOOKS


async def test_a_route_that_is_not_in_the_table_is_refused(plane: Control) -> None:
    app: FastAPI = create_app(plane, BOTH, lambda: 0.0)
    app.add_api_route("/api/v1/new", lambda: "secret")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin") as client:
        assert (await client.get("/api/v1/new", headers=WITH["admin"])).status_code == 403


async def request(client: httpx.AsyncClient, route: tuple[str, str], token: str) -> httpx.Response:
    method, path = route
    path = path.replace("{version}", "a" * 32).replace("{name:path}", "console.css")
    return await client.request(method, path, headers=WITH[token])


@pytest.mark.parametrize("token", WITH)
@pytest.mark.parametrize("route", sorted(ACCESS.keys() - {STREAM}), ids=" ".join)
async def test_each_route_with_each_token(plane: Control, route: tuple[str, str], token: str) -> None:
    allowed = {Access.ADMIN: {"admin"}, Access.ENGINE: {"engine"}}.get(ACCESS[route], set(WITH))
    async with admin_client(plane, BOTH) as client:
        response = await request(client, route, token)
    assert (response.status_code not in REFUSED) == (token in allowed), response.text
    if token not in allowed:
        setting = "admin.engine_token" if ACCESS[route] is Access.ENGINE else "admin.token"
        assert f"<{setting}>" in response.json()["detail"]
    assert plane.profile_manager.serving.mode == "observe", "nothing was changed"


@pytest.mark.parametrize("token", WITH)
async def test_metrics_may_need_the_operators_token(plane: Control, token: str) -> None:
    async with admin_client(plane, Tokens(TOKEN, ENGINE_TOKEN, metrics_need_token=True)) as client:
        assert ((await request(client, ("GET", "/metrics"), token)).status_code == 200) == (token == "admin")


@pytest.mark.parametrize("route", [route for route, access in ACCESS.items() if access is Access.ENGINE], ids=" ".join)
async def test_without_a_token_of_their_own_engines_need_the_operators(plane: Control, route: tuple[str, str]) -> None:
    """As before there was one; nobody is let in who was not."""
    async with admin_client(plane, Tokens(TOKEN)) as client:
        result = {token: (await request(client, route, token)).status_code in REFUSED for token in WITH}
    assert result == {"no": True, "engine": True, "admin": False}
    async with admin_client(plane, Tokens()) as client:
        for token in WITH:
            response = await request(client, route, token)
            assert response.status_code == 403
            assert "set admin.engine_token (HEMOSTAT_ADMIN__ENGINE_TOKEN)" in response.json()["detail"]
    async with admin_client(plane, Tokens(None, ENGINE_TOKEN)) as client:
        assert (await request(client, route, "engine")).status_code not in REFUSED
        assert (await request(client, ("POST", "/api/v1/calibration"), "engine")).status_code == 403


def test_the_tokens_of_the_settings() -> None:
    made = settings(admin={"port": 0, "token": "a", "engine_token": "b", "metrics_need_token": True})
    assert Tokens.of(made.admin) == Tokens("a", "b", metrics_need_token=True)
    assert Tokens.of(settings(admin={"port": 0}).admin) == Tokens()
