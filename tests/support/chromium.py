"""A real Chromium: where it is, a mark for tests that need it, and one that has been started."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from tests.support.minutes import starting

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium (CI does)")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        with starting("Chromium"):
            browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()
