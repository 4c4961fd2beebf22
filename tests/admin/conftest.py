"""A browser, and the admin port of a `Control` that has seen something of everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from tests.support.admin_server import Served, everything, served
from tests.support.chromium import chromium
from tests.support.console_page import SCREEN


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings: dict[str, Any] = {"alarm": {"baseline_requests": 30, "budget_nats": 0.5}, "labels": ["batch"]}
    with served(tmp_path_factory.mktemp("served"), everything, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An error or warning of the browser, also about the content security policy, fails the test."""
    said: list[str] = []
    made = browser.new_page(viewport=SCREEN)  # type: ignore[arg-type]
    made.on("console", lambda message: said.append(message.text) if message.type in {"error", "warning"} else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    yield made
    made.close()
    assert not said
