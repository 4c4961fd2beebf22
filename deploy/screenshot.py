"""`make screenshot`: writes a picture of the console's overview in each state of `tests/support/console_states.py` to
docs/console/; with options, other pictures to build/console/.

The pages are the real ones and the answers of the API are made, so that a picture takes a second and needs no model.
"""

# ruff: noqa: T201 - a command
from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.admin_server import everything, served  # noqa: E402
from tests.support.console_states import CHANGES, State, make  # noqa: E402

PICTURES = ROOT / "docs" / "console"
COLOURS = 64
MAX_BYTES = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--page", default="", help="address of a page, such as kinds or divergence?by=route")
    options = parser.parse_args()
    plain = not options.page and not options.dark and options.width == parser.get_default("width")
    folder = PICTURES if plain else ROOT / "build" / "console"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("screenshot: chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as temporary,
        served(Path(temporary), everything) as admin,
        sync_playwright() as playwright,
    ):
        answers = [httpx.get(f"{admin.url}/api/v1/{name}", trust_env=False).json() for name in ("status", "profiles")]
        browser = playwright.chromium.launch(executable_path=chromium)
        for name in CHANGES:
            out = folder / f"{name.lower().replace(' ', '-')}.png"
            take(browser, make(name, *answers), f"{admin.url}/#/{options.page}", out, options.width, dark=options.dark)
            print(f"{out}: {out.stat().st_size:,} bytes")
        browser.close()
    return int(plain and any(path.stat().st_size > MAX_BYTES for path in folder.glob("*.png")))


def take(browser: Browser, state: State, url: str, out: Path, width: int, *, dark: bool) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
    state.answer(page)
    page.goto(url)
    page.wait_for_selector("main section")
    if len(state.history["points"]["time"]) > 1:
        page.wait_for_selector("main canvas, main table")
    page.screenshot(path=out, full_page=True)
    page.close()
    # A page has few colours, so a palette makes the file small. Median cut would lose the colours of thin lines.
    few = Image.open(out).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
