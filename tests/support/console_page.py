"""The console in a real Chromium, over the admin port of a `Control` (fixtures: tests/admin/conftest.py)."""

from __future__ import annotations

from typing import Any

import httpx
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from .admin_server import KINDS, Served
from .console_states import SERVING, State
from .waiting import HANG_SECONDS

SCREEN = {"width": 1280, "height": 800}
PHONE = {"width": 400, "height": 800}
FITS_PHONE = "innerWidth === 400 && document.documentElement.scrollWidth <= innerWidth"
"""Charts take their width when the browser has told them its new size."""
PAGES = ("", "divergence", "kinds", f"kinds/{KINDS[0]}", "profiles", f"profiles/{SERVING[:8]}", "engines",
         "engines/10.0.0.1:8000", "gate", "alarm", "measurement", "events")  # fmt: skip
expect.set_options(timeout=1000 * HANG_SECONDS)


def get(served: Served, path: str) -> dict[str, Any]:
    result: dict[str, Any] = httpx.get(f"{served.url}/api/v1/{path}").raise_for_status().json()
    return result


def show(page: Page, served: Served, path: str = "", at: State | None = None) -> None:
    """Open a page of the console, of a made state or of the real one, and wait until it shows it."""
    if at is not None:
        at.answer(page)
    page.goto(f"{served.url}/#/{path}")
    expect(page.locator("main")).to_have_attribute("data-page", path.partition("/")[0].partition("?")[0] or "overview")
    expect(page.locator("main section").first).to_be_visible(timeout=15_000)


def rows(page: Page, caption: str) -> list[str]:
    """The text of each row of a table, cells apart."""
    table = page.get_by_role("region", name=caption, exact=True)
    return [" | ".join(row.locator("th, td").all_inner_texts()) for row in table.locator("tbody tr").all()]


def assert_accessible(page: Page) -> None:
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()
